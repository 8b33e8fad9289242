"""Prepares maps: new ones, and those that are resumed, from this process or from the journal.

Keeps the last maps of this process. What can be checked is checked before anything is sent.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from nbcodex import host
from nbcodex.client import get_client
from nbcodex.errors import ConfigurationError, EntryError, NbcodexError
from nbcodex.journal.journal import Journal
from nbcodex.journal.owner import ACTIVE_STATUSES
from nbcodex.journal.reads import Entry
from nbcodex.mapping.backends import BACKENDS, BatchBackend
from nbcodex.mapping.estimate import Estimate, confirm_start, estimate
from nbcodex.mapping.inputs import FrameInput, read_input, rows_from_journal
from nbcodex.mapping.map_run import MapRun, OnError, RowState
from nbcodex.mapping.map_runner import active_runners
from nbcodex.mapping.rows import PromptSource, RowKey, RowRequests, schema_fields
from nbcodex.models import Origin, Reply, Request, RequestOptions
from nbcodex.openai_api.endpoints import check_server
from nbcodex.requests.options import to_count
from nbcodex.settings import Settings

INACTIVE_TIMEOUT_S = 5.0  # a resume waits this long for rows that are still active after Stop
# Rows whose requests are compared, to find out whether a frame holds the results of the same map.
RERUN_SAMPLE_ROWS = 5

# The last maps of this process, by id. Their data is kept, so that they can be resumed.
kept_runs: dict[str, MapRun] = {}


def prepare_map(
    template: PromptSource,
    data: Any,
    request_options: RequestOptions,
    *,
    settings: Settings,
    origin: Origin,
    limit: int | None = None,
    dry_run: bool = False,
    row_key: RowKey = None,
    on_error: OnError = "keep",
    engine: str = "live",
    confirm: bool | None = None,
) -> MapRun | Estimate:
    """Return a map that is ready to be executed, or for a dry run what it would use.

    `origin` is that of the caller, with the notebook variable that gets the result, if there is
    one, also after a resume.
    """
    limit = to_count(limit, "limit", "rows")
    if on_error not in ("keep", "raise"):
        raise ConfigurationError("on_error must be 'keep' or 'raise'.")
    if engine not in BACKENDS:
        raise ConfigurationError(
            f"engine={engine!r} is unknown.",
            advice="'live' sends row by row, 'batch' uploads all rows together.",
        )
    client, inputs = get_client(), read_input(data, limit=limit)
    map_id = f"m{secrets.token_hex(4)}"
    origin = replace(
        origin,
        map_id=map_id,
        row_count=inputs.total,
        data_kind=inputs.kind,
        engine=engine,
    )
    row_requests = RowRequests(
        template, inputs, request_options, row_key=row_key, settings=settings, origin=origin
    )
    if isinstance(inputs, FrameInput):
        inputs.schema_fields = schema_fields(row_requests.schema)
        inputs.refills_columns = _is_rerun(inputs, row_requests, client.journal(settings))
    if dry_run:
        return estimate(inputs, row_requests, client)
    if confirm is not True:  # the caller has not agreed yet
        confirm_start(inputs, row_requests, client, host.current.confirm)
    backend = BACKENDS[engine](client, settings, map_id=map_id)
    return MapRun(inputs, row_requests, backend, origin=origin, on_error=on_error)


def _is_rerun(inputs: FrameInput, row_requests: RowRequests, journal: Journal) -> bool:
    """Return whether a frame holds results of the same map: those columns are filled again."""
    # The results of another map stay, and this map adds columns beside them.
    template = row_requests.template
    if template and not template.column_names.isdisjoint(inputs.earlier_columns):
        return False  # an earlier answer is part of this map's prompts
    for row, row_id in inputs.rows_with_earlier_ids(limit=RERUN_SAMPLE_ROWS):
        with contextlib.suppress(NbcodexError):
            run = kept_runs.get(row_id.partition("-")[0])  # a row's id is ``MAP-INDEX``
            earlier = run.row_requests.request(row) if run and run.row_requests else None
            earlier = earlier or journal.find_entry(row_id).request
            pair = earlier, row_requests.request(row)
            # Other options may differ in a rerun, which may raise `max_output`, for example.
            asked = [(r.prompt, r.model, r.system, r.schema and r.schema.definition) for r in pair]
            if asked[0] == asked[1]:
                return True
    return False


def resume_map(
    prefix: str, *, cancel_jobs: bool = False, any_server: bool = False
) -> MapRun | None:
    """Return the map whose id begins with `prefix`, ready to be executed again; None if none does.

    With `cancel_jobs`, its batch jobs are cancelled, and only what they have answered is fetched.
    With `any_server`, it may go to another server than it was written for.
    """
    client, settings = get_client(), host.current.settings()
    maps = client.journal(settings).maps
    kept = [id_ for id_ in kept_runs if id_.startswith(prefix)] if prefix else []
    map_id = kept[0] if len(kept) == 1 else maps.find_id(prefix)
    if map_id is None:
        return None
    run = kept_runs.get(map_id)
    # Rows that are still active after Stop would be sent a second time by a resume.
    is_active = any(runner.run.id == map_id for runner in active_runners())
    if is_active or (run is not None and not run.wait_inactive(timeout=INACTIVE_TIMEOUT_S)):
        raise NbcodexError(
            f"The map {map_id} is still running.",
            advice=f"Wait for it, or end it with `%codex park {map_id}`.",
        )
    # Only the journal shows whether another kernel has resumed the map meanwhile.
    entries = {entry.id: entry for entry in maps.entries(map_id)}
    if any(entry.status in ACTIVE_STATUSES and not entry.abandoned for entry in entries.values()):
        raise NbcodexError(f"The map {map_id} is running in another kernel.", advice="Wait for it.")
    if any_server:
        entries = {k: replace(e, request=e.request.with_server(None)) for k, e in entries.items()}
    if not cancel_jobs:  # `BatchUploader` cancels jobs at their own server only
        # Checked for all rows together, so that a map raises one error. The last row stands for
        # those that are not in the journal.
        pending = [each for each in entries.values() if each.resumable]
        rows = [each.request for each in pending or list(entries.values())[-1:]]
        for row in {(row.origin.server, row.api_base): row for row in rows}.values():
            # The server that the settings lead to, without the one that the row is bound to.
            sample = Request(prompt="", api_base=row.api_base)
            check_server(row, client.endpoint(sample, settings))
    # A run over an iterator keeps no rows: those that were started are in the journal.
    if run is None or not run.keeps_replies:
        run = _run_from_journal(map_id, list(entries.values()))
    if isinstance(run.backend, BatchBackend):
        run.backend.prepare_resume(cancel_jobs=cancel_jobs)
    elif cancel_jobs:
        raise NbcodexError(
            f"No batch job of the map {map_id} is with a provider.",
            advice="Nothing of it is running.",
        )
    if not run.prepare_resume(entries, settings):
        raise EntryError(
            f"Nothing of the map {map_id} is left to be done.", advice=describe_unstored_rows(run)
        )
    return run


def _run_from_journal(map_id: str, entries: Sequence[Entry]) -> MapRun:
    """Return a map of another process, or of an iterator: its rows are those in the journal."""
    client, settings = get_client(), host.current.settings()
    # Others are rows of an earlier map with the same id by chance, which the journal has renamed.
    own = [each for each in entries if each.id == f"{map_id}-{each.request.origin.row_index}"]
    first = own[0].request if own else None
    origin = first.origin if first else Origin(map_id=map_id)
    rows = {entry.request.origin.row_index or 0: entry for entry in own}
    total = max(1 + max(rows, default=-1), origin.row_count or 0)
    labels = [(rows[n].request.row or n) if n in rows else n for n in range(total)]
    fields = schema_fields(first.schema if first else None)
    inputs = rows_from_journal(labels, origin.data_kind, fields)
    inputs.unstored_rows = total - len(rows)
    backend = BACKENDS[origin.engine](client, settings, map_id=map_id)
    run = MapRun(inputs, row_requests=None, backend=backend, origin=origin)
    for index, entry in rows.items():
        run.restore(RowState(index, labels[index], request=entry.request), entry.reply)
    return run


def describe_unstored_rows(run: MapRun) -> str:
    """Return a notice about rows that are not in the journal; empty if there are none."""
    if not (unstored := run.inputs.unstored_rows):
        return ""
    return (
        f"{unstored:,} of its {run.inputs.total:,} rows never reached the journal: run the map "
        "again, with its data; what is answered costs nothing."
    )


class LastMap(Sequence[Reply]):
    """`nbcodex.map.last`, `map.recent[ID]`: a map's replies in order; one without answer is false.

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
    def failed(self) -> dict[Hashable, str]:
        """Why rows failed, by row key, else index, key or position; duplicates name their row."""
        return self._reasons(parked=False)

    @property
    def parked(self) -> dict[Hashable, str]:
        """Why rows are parked; `%codex resume` continues with them."""
        return self._reasons(parked=True)

    def _reasons(self, *, parked: bool) -> dict[Hashable, str]:
        reasons: dict[Hashable, str] = {}
        for index, failure in sorted(self._run.failures.items()):
            if failure.is_parked is parked:
                is_taken = failure.label in reasons
                label = f"{failure.label} (row {index})" if is_taken else failure.label
                reasons[label] = failure.reason
        return reasons

    def __len__(self) -> int:
        return self._run.inputs.total or 0

    def __getitem__(self, index: Any) -> Any:
        return self._run.replies_in_order()[index]

    def __iter__(self) -> Iterator[Reply]:
        return iter(self._run.replies_in_order())

    def __repr__(self) -> str:
        replies = [reply for reply in self if reply]
        done, cut = len(replies), sum(reply.cut is not None for reply in replies)
        counts = [
            f"{done:,} of {len(self):,} answered"
            + (f" ({cut:,} cut by output limit or filter)" if cut else ""),
            f"{len(self.failed):,} failed",
            f"{len(self.parked):,} parked" if self.parked else "",
        ]
        return f"<map {self.id}: {', '.join(filter(None, counts))}>"
