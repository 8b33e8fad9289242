"""`nbcodex.map` and `nbcodex.amap`: one prompt for many rows, and resuming a map.

Owns the last maps of this process. Everything that can be refused is refused before anything is
sent.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, overload

from nbcodex import host
from nbcodex.client import current
from nbcodex.errors import ConfigurationError, EntryError, NbcodexError
from nbcodex.journal.codec import Entry
from nbcodex.journal.reads import ACTIVE_STATUSES
from nbcodex.mapping import map_runner
from nbcodex.mapping.backends import BatchBackend, make_backend
from nbcodex.mapping.estimate import Estimate, confirm_cost, estimate, has_known_prices
from nbcodex.mapping.inputs import ListInput, Row, read_input
from nbcodex.mapping.map_run import MapRun, OnError, RowState
from nbcodex.mapping.map_runner import active_runners
from nbcodex.mapping.rows import PromptSource, RowKey, row_requests
from nbcodex.models import Origin, Reply

# A resume waits so long for the rows that Stop left active.
INACTIVE_TIMEOUT_S = 5.0
# Maps whose data is kept after they stopped, so that they can be resumed.
MAX_KEPT_RUNS = 8


def map(  # noqa: A001 - it is nbcodex.map
    template: str | Callable[[Any], object],
    data: Any,
    *,
    limit: int | None = None,
    dry_run: bool = False,
    row_key: str | Callable[[Any], object] | None = None,
    on_error: Literal["keep", "raise"] = "keep",
    engine: Literal["live", "batch"] = "live",
    confirm: bool | None = None,
    model: str | None = None,
    system: str | None = None,
    max_output: int | None = None,
    effort: str | None = None,
    params: Mapping[str, Any] | None = None,
    patience: str | float | None = None,
    api: str | None = None,
    api_base: str | None = None,
    reuse: bool | None = None,
    durable: bool | None = None,
    schema: object = None,
    images: Iterable[Any] | None = None,
) -> Any:
    """Send one prompt for each of many rows; return the answers as the same kind of data.

    Rows share the rate limits with all other requests, and as many are sent at once as the limits
    allow. Each one is kept in the journal: run again, a map pays only for what is missing. A row is
    the same as an earlier one if its request (prompt, model, options) and its row key are equal.
    Equal rows of one map are sent once.

    Parameters
    ----------
    template : str or callable
        ``"Translate {text} to {lang}"`` with column names; ``{}`` or ``{item}`` is the item
        itself. Or a function of an item (for a frame: a dict of the row's columns) that returns a
        prompt, or a dict of ``prompt`` and options for this row. It is called in this thread; for
        some rows twice, since the cost of all is estimated first.
    data : list, tuple, dict, pandas or polars frame or series, or iterator
        The rows. An iterator is read only as far as rows can be started, and not kept.
    limit : int or None
        Use only the first rows.
    dry_run : bool
        Return an `Estimate` of tokens and cost, and send nothing. Reads an iterator to its end.
    row_key : str, callable or None
        Names rows in listings and errors: a column, or a function of an item. Rows with equal
        requests but different keys are sent separately.
    on_error : {"keep", "raise"}
        Keep a row that fails as a false reply with its reason in `error`, or end the map and park
        the rest. A parked row has not failed.
    engine : {"live", "batch"}
        Send each row now, or upload all to the provider's Batch API, at half the price and
        answered within a day. A batch survives the kernel: run the map again, or
        ``%codex resume ID``.
    confirm : bool or None
        True starts the map without asking, even above ``Codex.ask_above`` dollars.
    model, system, max_output, effort, params, patience, api, api_base, durable, schema, images
        As for `nbcodex.ask`. Without a `patience`, rows wait as long as limits and faults last.
    reuse : bool or None
        False sends all rows again, equal ones included.

    Returns
    -------
    list, tuple, dict or frame
        Replies in order; by key; or a copy of the frame with the columns ``answer``,
        ``input_tokens``, ``output_tokens``, ``cost``, ``error`` and ``id`` (numbered where one of
        these names is taken). For an iterator: an iterator of replies, in order. With `dry_run`:
        an `Estimate`.

    Raises
    ------
    ConfigurationError
        If a column is missing, an option is invalid, or the cost cannot be confirmed; nothing was
        sent.
    NbcodexError
        If an error would meet every row (key, quota, model), or with ``on_error="raise"``.
    Stopped
        If the user pressed Stop: ``%codex resume ID`` continues, and ``nbcodex.map.last`` holds
        what is finished.
    CancelledError, ParkedError
        If the user ended it with ``%codex cancel ID``, ``park ID`` or in the monitor.

    Examples
    --------
    >>> frame = nbcodex.map("Sentiment of {text}, one word", frame, max_output=20)
    >>> frame["answer"]
    """
    options = _map_options(locals())
    run = prepare_map(template, data, options)
    if isinstance(run, Estimate):
        return run
    return map_runner.run_map(run) if run.keeps_replies else map_runner.stream_map(run)


async def amap(
    template: str | Callable[[Any], object],
    data: Any,
    *,
    limit: int | None = None,
    dry_run: bool = False,
    row_key: str | Callable[[Any], object] | None = None,
    on_error: Literal["keep", "raise"] = "keep",
    engine: Literal["live", "batch"] = "live",
    confirm: bool | None = None,
    model: str | None = None,
    system: str | None = None,
    max_output: int | None = None,
    effort: str | None = None,
    params: Mapping[str, Any] | None = None,
    patience: str | float | None = None,
    api: str | None = None,
    api_base: str | None = None,
    reuse: bool | None = None,
    durable: bool | None = None,
    schema: object = None,
    images: Iterable[Any] | None = None,
) -> Any:
    """Do what `map` does, without blocking the caller's event loop.

    For an iterator it returns an async iterator.

    Examples
    --------
    >>> replies = await nbcodex.amap("Translate {} to French", ["cheese", "wine"])
    >>> async for reply in await nbcodex.amap("Translate {} to French", iter(words)):
    ...     print(reply)
    """
    options = _map_options(locals())
    run = prepare_map(template, data, options)
    if isinstance(run, Estimate):
        return run
    if run.keeps_replies:
        return await map_runner.run_map_async(run)
    return map_runner.stream_map_async(run)


@dataclass(frozen=True, slots=True, kw_only=True)
class MapOptions:
    """The options of a map, see `map`; `request` holds those that it shares with `nbcodex.ask`."""

    limit: int | None = None
    dry_run: bool = False
    row_key: RowKey = None
    on_error: OnError = "keep"
    engine: str = "live"
    confirm: bool | None = None
    request: Mapping[str, Any]

    def check(self) -> None:
        """Raise a ConfigurationError if an option is invalid."""
        is_number = isinstance(self.limit, int) and not isinstance(self.limit, bool)
        if self.limit is not None and not (is_number and self.limit >= 1):
            raise ConfigurationError("limit must be a number of rows, 1 or more.")
        if self.on_error not in ("keep", "raise"):
            raise ConfigurationError("on_error must be 'keep' or 'raise'.")


def _map_options(arguments: dict[str, Any]) -> MapOptions:
    """Return the arguments of `map` as options."""
    # From its `locals()`: spelling out 18 names twice more is how one of them gets lost.
    options = {name: arguments[name] for name in arguments.keys() - {"template", "data"}}
    own = {
        field.name: options.pop(field.name) for field in fields(MapOptions) if field.name in options
    }
    return MapOptions(**own, request=options)


def prepare_map(
    template: PromptSource, data: Any, options: MapOptions, *, variable: str | None = None
) -> MapRun | Estimate:
    """Return a map that is ready to be executed, or for a dry run what it would use.

    `variable` is the notebook variable that gets the result, also after a resume. Raises a
    ConfigurationError if the map is invalid, a NbcodexError if the user declines.
    """
    options.check()
    client, settings = current(), host.current.settings()
    inputs = read_input(data, limit=options.limit)
    map_id = f"m{secrets.token_hex(4)}"
    origin = replace(
        host.current.origin(),
        variable=variable,
        map_id=map_id,
        row_count=inputs.total,
        engine=options.engine,
    )
    requests = row_requests(
        template,
        inputs,
        options.request,
        row_key=options.row_key,
        settings=settings,
        origin=origin,
    )
    backend = make_backend(options.engine, client, settings, map_id=map_id)
    if options.dry_run:
        return estimate(inputs, requests, client, settings)
    # The number of an iterator's rows is unknown, and reading it would use it up.
    if (
        inputs.total
        and options.confirm is not True
        and has_known_prices(requests, client, settings)
    ):
        expected = estimate(inputs, requests, client, settings, from_sample=True)
        confirm_cost(expected, threshold=settings.ask_above, confirm=host.current.confirm)
    run = MapRun(
        inputs,
        requests,
        backend,
        origin=origin,
        client=client,
        settings=settings,
        on_error=options.on_error,
    )
    _keep(run)
    return run


def resume_map(prefix: str, *, cancel_jobs: bool = False) -> MapRun | None:
    """Return the map whose id begins with `prefix`, ready to be executed again; None if none does.

    A map of this process continues with its data, another one with its rows in the journal. With
    `cancel_jobs`, its batch jobs are cancelled, and only what they have answered is fetched.
    Raises an EntryError if several ids begin so, or nothing of the map is left to be done.
    """
    client, settings = current(), host.current.settings()
    maps = client.journal(settings).maps
    kept = [id_ for id_ in _kept_runs if id_.startswith(prefix)] if prefix else []
    map_id = kept[0] if len(kept) == 1 else maps.find_id(prefix)
    if map_id is None:
        return None
    run = _kept_runs.get(map_id)
    # After Stop, rows may need some more seconds to end; a resume would send them a second time.
    is_active = any(runner.run.id == map_id for runner in active_runners())
    if is_active or (run is not None and not run.wait_inactive(timeout=INACTIVE_TIMEOUT_S)):
        raise NbcodexError(
            f"The map {map_id} is still running.",
            advice=f"Wait for it, or end it with `%codex park {map_id}`.",
        )
    # The journal knows best: another kernel may have resumed the map meanwhile.
    entries = {entry.id: entry for entry in maps.entries(map_id)}
    if any(entry.status in ACTIVE_STATUSES and not entry.abandoned for entry in entries.values()):
        raise NbcodexError(f"The map {map_id} is running in another kernel.", advice="Wait for it.")
    # What is left of an iterator is not kept, only the rows that were started.
    if run is None or not run.keeps_replies:
        run = _run_from_journal(map_id, list(entries.values()))
    if isinstance(run.backend, BatchBackend):
        run.backend.prepare_resume(cancel_jobs=cancel_jobs)
    elif cancel_jobs:
        raise NbcodexError(
            f"No batch job of the map {map_id} is with a provider.", advice="It is not running."
        )
    if not run.prepare_resume(entries, settings):
        raise EntryError(
            f"Nothing of the map {map_id} is left to be done.", advice=describe_unknown_rows(run)
        )
    _keep(run)
    return run


def _run_from_journal(map_id: str, entries: Sequence[Entry]) -> MapRun:
    """Return a map of another process, whose data is not here: its result is a list."""
    client, settings = current(), host.current.settings()
    origin = entries[0].request.origin if entries else Origin(map_id=map_id)
    indexes = {entry.request.origin.row_index or 0 for entry in entries}
    total = max(1 + max(indexes, default=-1), origin.row_count or 0)
    inputs = JournalInput(total, unknown=total - len(indexes))
    backend = make_backend(origin.engine, client, settings, map_id=map_id)
    run = MapRun(inputs, None, backend, origin=origin, client=client, settings=settings)
    for entry in entries:
        index = entry.request.origin.row_index or 0
        label = entry.request.row or str(index)
        run.restore(RowState(index, label, request=entry.request), entry.reply)
    return run


class JournalInput(ListInput):
    """The rows of a map in the journal, without its data; `unknown` ones never got there."""

    def __init__(self, total: int, *, unknown: int) -> None:
        super().__init__((), None)
        self.total, self.unknown = total, unknown

    def rows(self) -> Iterator[Row]:
        """Return nothing: the known rows are restored from their entries."""
        return iter(())


def describe_unknown_rows(run: MapRun) -> str:
    """Return a notice about rows that are only in the map's data; empty if there are none."""
    inputs = run.inputs
    if not (isinstance(inputs, JournalInput) and inputs.unknown):
        return ""
    return (
        f"{inputs.unknown:,} of its {inputs.total:,} rows never reached the journal: run the map "
        "again, with its data; what is answered costs nothing."
    )


class LastMap(Sequence[Reply]):
    """`nbcodex.map.last`: the latest map's replies in order, false where there is no answer.

    For an iterator it is empty, because those replies are not kept. `id` is the map's id.
    """

    def __init__(self, run: MapRun) -> None:
        self._run = run
        self.id = run.id

    @property
    def result(self) -> Any:
        """The replies as the kind of data that was given."""
        return self._run.result

    @property
    def failed(self) -> dict[str, str]:
        """Why rows have no answer, by row key, or else by index, key or position.

        If several rows have the same name, all but the first get their position in addition.
        """
        reasons: dict[str, str] = {}
        for index, (label, why) in sorted(self._run.failures.items()):
            reasons[f"{label} (row {index})" if label in reasons else label] = why
        return reasons

    def __len__(self) -> int:
        return self._run.inputs.total or 0

    @overload
    def __getitem__(self, index: int) -> Reply: ...
    @overload
    def __getitem__(self, index: slice) -> list[Reply]: ...
    def __getitem__(self, index: int | slice) -> Reply | list[Reply]:
        return self._run.replies_in_order()[index]

    def __iter__(self) -> Iterator[Reply]:
        return iter(self._run.replies_in_order())

    def __repr__(self) -> str:
        done = sum(bool(reply) for reply in self)
        return f"<map {self.id}: {done:,} of {len(self):,} answered, {len(self.failed):,} failed>"


_kept_runs: dict[str, MapRun] = {}


def _keep(run: MapRun) -> None:
    """Make a run the latest one, with the display of the calling cell."""
    run.on_stats = host.current.watch()
    map.last = LastMap(run)  # type: ignore[attr-defined]
    _kept_runs.pop(run.id, None)
    _kept_runs[run.id] = run
    for id_ in list(_kept_runs)[:-MAX_KEPT_RUNS]:
        del _kept_runs[id_]


map.last = None  # type: ignore[attr-defined]
