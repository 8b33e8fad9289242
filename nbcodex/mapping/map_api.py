"""`nbcodex.map` and `nbcodex.amap`: what is asked of many rows, and going on after Stop.

Owns the map that was asked last. Everything that can be refused is refused before anything is sent.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nbcodex import host
from nbcodex.client import current
from nbcodex.errors import ConfigurationError, EntryError, NbcodexError
from nbcodex.journal.reads import ACTIVE_STATUSES
from nbcodex.mapping import map_runner
from nbcodex.mapping.backends import way
from nbcodex.mapping.bulk import BatchBackend
from nbcodex.mapping.estimate import Estimate, estimate, have_agreed, is_priced
from nbcodex.mapping.inputs import List, Row, read_input
from nbcodex.mapping.last import Last
from nbcodex.mapping.map_run import Item, MapRun, OnError
from nbcodex.mapping.map_runner import active_runners
from nbcodex.mapping.rows import RowKey, Words, recipe
from nbcodex.mapping.shelf import settled
from nbcodex.models import Origin

SETTLING = 5.0
"""Seconds that going on waits for what Stop left under way."""

REMEMBERED = 8
"""Maps that stopped whose data is kept, so that they can go on."""


def map(  # noqa: A001 - it is nbcodex.map
    template: Words,
    data: Any,
    *,
    limit: int | None = None,
    dry_run: bool = False,
    row_key: RowKey = None,
    on_error: OnError = "keep",
    engine: str = "live",
    confirm: bool | None = None,
    **options: Any,
) -> Any:
    """Ask the same of many rows, and return the answers as the same kind of data.

    Rows are paced with all other requests, as many at once as the limits take. Each is kept in the
    journal: run again, a map pays only for what is missing. A row is the same as one of before if
    its request is equal (prompt, model, options) and so is its row key; `reuse=False` asks all
    anew. Rows of one map that are equal are asked once.

    Parameters
    ----------
    template : str or callable
        ``"Translate {text} to {lang}"`` with the names of columns; ``{}`` or ``{item}`` is a plain
        item itself. Or a function of an item (of a frame: of a dict of the row's columns) that
        returns a prompt, or a dict of ``prompt`` and options for this row. It is called in this
        thread; for some rows twice, where the cost of all is estimated first.
    data : list, tuple, dict, pandas or polars frame or series, or iterator
        The rows. An iterator is read only as far as there is something to do, and not kept.
    limit : int or None
        Only the first so many rows.
    dry_run : bool
        Whether to return an `Estimate` of tokens and cost, and to send nothing. An iterator is
        read for it.
    row_key : str, callable or None
        What a row is called in listings and errors: a column, or a function of an item. Two rows
        that ask the same are asked apart if their keys differ.
    on_error : {"keep", "raise"}
        Whether a row that fails is kept as a false reply that says why in `error`, or ends the
        map; the rest is then parked. A row that is parked itself has not failed, and ends nothing.
    engine : {"live", "batch"}
        How rows are answered: each for itself now, or all handed in to the provider's Batch API,
        at half the price and within a day. A map that is with the provider survives the kernel:
        run it again, or ``%codex resume ID``.
    confirm : bool or None
        True asks nobody whether to go on where the estimate is above ``Codex.ask_above`` dollars.
    **options
        Those of `nbcodex.ask`. Rows wait for limits and faults as long as it takes, unless
        `patience` is given.

    Returns
    -------
    list, tuple, dict or frame
        Replies in order; by key; or a copy of the frame with the columns ``answer``,
        ``input_tokens``, ``output_tokens``, ``cost``, ``error`` and ``id`` (with a number behind
        where such a name is taken).
    iterator
        For an iterator: of replies, in order.
    Estimate
        For `dry_run`.

    Raises
    ------
    ConfigurationError
        If a column is missing, an option makes no sense, or nobody can be asked about the cost;
        nothing was sent.
    NbcodexError
        If what is wrong would meet every row (key, quota, model), or for `on_error="raise"`.
    Stopped
        If the user pressed Stop: ``%codex resume ID`` goes on, and ``nbcodex.map.last`` holds what
        is finished.
    CancelledError, ParkedError
        If the user ended it otherwise: by ``%codex cancel ID`` or ``park ID``, or in the monitor.
        It goes on as after Stop.
    """
    asked = MapOptions(limit, dry_run, row_key, on_error, engine, confirm, options)
    made = prepare_map(template, data, asked)
    if isinstance(made, Estimate):
        return made
    return map_runner.run_map(made) if made.keeps_replies else map_runner.stream_map(made)


async def amap(
    template: Words,
    data: Any,
    *,
    limit: int | None = None,
    dry_run: bool = False,
    row_key: RowKey = None,
    on_error: OnError = "keep",
    engine: str = "live",
    confirm: bool | None = None,
    **options: Any,
) -> Any:
    """Do as `map` does, without blocking the caller's event loop.

    For an iterator it returns an async iterator: ``async for reply in await nbcodex.amap(…)``.
    """
    asked = MapOptions(limit, dry_run, row_key, on_error, engine, confirm, options)
    made = prepare_map(template, data, asked)
    if isinstance(made, Estimate):
        return made
    return (
        await map_runner.run_map_async(made)
        if made.keeps_replies
        else map_runner.stream_map_async(made)
    )


@dataclass(frozen=True, slots=True)
class MapOptions:
    """What is said of a map beside its template and its data; see `map`."""

    limit: int | None
    dry_run: bool
    row_key: RowKey
    on_error: OnError
    engine: str
    confirm: bool | None
    options: dict[str, Any]

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises
        ------
        ConfigurationError
            It says which.
        """
        whole = isinstance(self.limit, int) and not isinstance(self.limit, bool)
        if self.limit is not None and not (whole and self.limit >= 1):
            raise ConfigurationError("limit is a number of rows, 1 or more.")
        if self.on_error not in ("keep", "raise"):
            raise ConfigurationError("on_error is 'keep' or 'raise'.")


def prepare_map(
    template: Words, data: Any, asked: MapOptions, *, variable: str | None = None
) -> MapRun | Estimate:
    """Return a map that is yet to be gone through, or what it would use.

    Raises
    ------
    ConfigurationError
        If it makes no sense, or the user does not agree; nothing was sent.
    """
    asked.check()
    client, settings = current(), host.current.settings()
    shape = read_input(data, limit=asked.limit)
    origin = replace(
        host.current.origin(),
        variable=variable,
        map_id=f"m{secrets.token_hex(4)}",
        row_count=shape.total,
        engine=asked.engine,
    )
    made = recipe(
        template, shape, asked.options, row_key=asked.row_key, settings=settings, origin=origin
    )
    answering = way(asked.engine, client, settings)
    if asked.dry_run:
        return estimate(shape, made, client, settings)
    if shape.total and asked.confirm is not True and is_priced(made, client, settings):
        told = estimate(shape, made, client, settings, sample=True)
        have_agreed(told, above=settings.ask_above, ask=host.current.confirm)
    run = MapRun(
        shape,
        made,
        answering,
        origin=origin,
        client=client,
        settings=settings,
        on_error=asked.on_error,
    )
    run.on_stats = host.current.watch()
    _remember(run)
    return run


def resume_map(prefix: str, *, ending: bool = False) -> MapRun | None:
    """Return the map that `prefix` names, ready to be gone through again; None if there is none.

    A map of this process goes on with its data, one of another with its rows in the journal. With
    `ending`, what is with a provider is ended there, and what it has answered is fetched.

    Raises
    ------
    EntryError
        If the id is that of several maps, or nothing of the map is left to be done.
    """
    client, settings = current(), host.current.settings()
    batches = client.journal(settings).maps
    held = [id_ for id_ in _held if id_.startswith(prefix)] if prefix else []
    batch = held[0] if len(held) == 1 else batches.find_id(prefix)
    if batch is None:
        return None
    run = _held.get(batch)
    goes = any(runner.run.id == batch for runner in active_runners())
    if goes or (run is not None and not settled(run, within=SETTLING)):
        raise NbcodexError(
            f"The map {batch} is under way.", advice=f"`%codex park {batch}` ends it, or wait."
        )
    entries = {entry.id: entry for entry in batches.entries(batch)}
    if any(entry.status in ACTIVE_STATUSES and not entry.abandoned for entry in entries.values()):
        raise NbcodexError(
            f"The map {batch} is under way in another kernel.", advice="Wait for it."
        )
    if run is None or not run.keeps_replies:
        run = _from_the_journal(batch, list(entries.values()))
    if isinstance(run.way, BatchBackend):
        run.way.begin_anew(ending=ending)
    elif ending:
        raise NbcodexError(
            f"Nothing of the map {batch} is with a provider.", advice="Nothing of it is under way."
        )
    if not run.take_up(entries, settings):
        raise EntryError(
            f"Nothing of the map {batch} is left to be done.", advice=describe_unknown_rows(run)
        )
    run.on_stats = host.current.watch()
    _remember(run)
    return run


def _from_the_journal(batch: str, entries: Sequence[Any]) -> MapRun:
    """Return a map of which only the journal knows: its result is a list."""
    client, settings = current(), host.current.settings()
    origin = entries[0].request.origin if entries else Origin(map_id=batch)
    rows = 1 + max((entry.request.origin.row_index or 0 for entry in entries), default=-1)
    known = {entry.request.origin.row_index or 0 for entry in entries}
    shape = Remembered(max(rows, origin.row_count or 0), known=len(known))
    answering = way(origin.engine, client, settings)
    run = MapRun(shape, None, answering, origin=origin, client=client, settings=settings)
    for entry in entries:
        index = entry.request.origin.row_index or 0
        label = entry.request.row or str(index)
        run.remember(Item(index, label, request=entry.request), entry.reply)
    return run


class Remembered(List):
    """The rows of a map that the journal holds; there is nothing more to be read."""

    def __init__(self, total: int, *, known: int) -> None:
        super().__init__((), None)
        self.total, self.unknown = total, total - known

    def rows(self) -> Iterator[Row]:
        """Return nothing: what there is has been remembered."""
        return iter(())


def describe_unknown_rows(run: MapRun) -> str:
    """Return what has to be said of rows that only the map's data knows; empty where none are."""
    shape = run.shape
    if not (isinstance(shape, Remembered) and shape.unknown):
        return ""
    return (
        f"{shape.unknown:,} of its {shape.total:,} rows never reached the journal: run the map "
        "again, with its data; what is answered costs nothing."
    )


_held: dict[str, MapRun] = {}


def _remember(run: MapRun) -> None:
    map.last = Last(run)  # type: ignore[attr-defined]
    _held.pop(run.id, None)
    _held[run.id] = run
    for id_ in list(_held)[:-REMEMBERED]:
        del _held[id_]


map.last = None  # type: ignore[attr-defined]
