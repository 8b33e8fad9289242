"""The rows of a batch map that have no ending yet, and how each one gets its ending.

Owns the order budget, journal, event, and that a job's files are erased only when all its answers
are committed. Must not know when jobs are created.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nbcodex.errors import (
    AnswerError,
    BudgetError,
    NbcodexError,
    ParkedError,
    RequestError,
    TransientError,
)
from nbcodex.events import Ending, Event, Failed, Finished, Parked
from nbcodex.mapping.batch_api import BatchApi, BatchPart, RowResult
from nbcodex.models import NO_USAGE, Reply, Request
from nbcodex.openai_api import pricing
from nbcodex.openai_api.answers import judge
from nbcodex.openai_api.pricing import BATCH_TIER
from nbcodex.requests.request_state import RequestState
from nbcodex.requests.structured_output import NOTE_REFUSED, parse_final_answer

if TYPE_CHECKING:
    from nbcodex.journal.maps import BatchJobs
    from nbcodex.journal.reads import Entry
    from nbcodex.requests.runner import Services
    from nbcodex.settings import Settings

# Endings that are committed in one transaction.
COMMIT_CHUNK_ROWS = 250

# Server, API and model: what the rows of one batch job have in common.
Destination = tuple[str, str, str]


@dataclass(slots=True, eq=False)
class PendingRow:
    """A row without an ending."""

    request: Request
    # Set as long as a row that was in the journal before is not claimed for this process.
    entry: Entry | None = None
    destination: Destination = ("", "", "")
    key: bytes = b""  # its `equality_key`


class PendingRows:
    """The rows of one map without an ending, by id; lives on the event loop."""

    def __init__(
        self,
        services: Services,
        settings: Settings,
        jobs: BatchJobs,
        batch_api: BatchApi,
        emit: Callable[[Event], None],
    ) -> None:
        self.rows: dict[str, PendingRow] = {}
        self._services, self._settings, self._clock = services, settings, services.clock
        self._jobs, self._batch_api, self._emit = jobs, batch_api, emit
        self._shielded: set[asyncio.Task[None]] = set()

    async def finish(self, endings: Sequence[Ending]) -> None:
        """Charge, commit and emit endings, to the end even if the calling task is cancelled."""

        async def work() -> None:
            for ending in await self._commit(endings):
                self._emit_ending(ending)

        if endings:
            await self._shield(work())

    def drop(self, ending: Ending) -> None:
        """Emit an ending that cost nothing here, and leave the journal as it is."""
        self._services.budget.commit(ending.request_id, Reply(id=ending.request_id, attempts=0))
        self._emit_ending(ending)

    async def _commit(self, endings: Sequence[Ending]) -> list[Ending]:
        """Charge and commit endings; return them, with budget warnings, to be emitted."""
        # Charged first, so that the warnings are in the journal's reply, too. Committed before
        # they are emitted: a user never sees an answer that a crash could still lose.
        charged: list[Ending] = []
        rows: list[tuple[Reply, str | None]] = []
        for ending in endings:
            warnings = self._services.budget.commit(ending.request_id, ending.reply)
            reply = replace(ending.reply, notes=(*ending.reply.notes, *warnings))
            error = getattr(ending, "error", None)
            charged.append(replace(ending, reply=reply))
            rows.append((reply, str(error) if error else None))
        await self._jobs.finish_rows(rows)
        await self._services.count_spending([reply for reply, _ in rows], self._settings)
        return charged

    def _emit_ending(self, ending: Ending) -> None:
        self.rows.pop(ending.request_id, None)
        self._emit(ending)

    def emit(self, ids: Iterable[str], kind: Callable[..., Event], **details: Any) -> None:
        """Emit an event of one kind for several rows."""
        now = self._clock.now()
        for id_ in ids:
            self._emit(kind(request_id=id_, at=now, **details))

    async def _shield(self, work: Coroutine[Any, Any, None]) -> None:
        """Complete `work` even if the calling task is cancelled."""
        # The event loop holds only weak references to tasks (python/cpython#91887).
        task = asyncio.create_task(work)
        self._shielded.add(task)
        task.add_done_callback(self._shielded.discard)
        await asyncio.shield(task)

    async def wait_shielded(self) -> None:
        """Return when no commit is under way that a cancelled task has left."""
        await asyncio.gather(*self._shielded, return_exceptions=True)

    def failed(self, request: Request, error: NbcodexError) -> Ending:
        """Return the ending of a row that cost nothing; a refusal by the budget parks it."""
        if isinstance(error, BudgetError):
            reply = Reply(id=request.id, status="parked", attempts=0)
            return Parked(request_id=request.id, at=self._clock.now(), error=error, reply=reply)
        reply = Reply(id=request.id, status="failed", attempts=1, usage=NO_USAGE, cost=0.0)
        return Failed(request_id=request.id, at=self._clock.now(), error=error, reply=reply)

    def parked(self, request: Request, why: str, *, attempts: int = 0) -> Parked:
        """Return the ending of a row that is kept for later; it cost nothing."""
        advice = f"`%codex resume {request.origin.map_id or request.id}` continues it."
        error = ParkedError(why, advice=advice)
        reply = Reply(id=request.id, status="parked", attempts=attempts)
        return Parked(request_id=request.id, at=self._clock.now(), error=error, reply=reply)

    async def read_results(self, part: BatchPart) -> None:
        """Finish all rows of a part whose job has ended, and erase its files."""
        # Loading takes longer than a display may wait for the event loop.
        await asyncio.to_thread(pricing.load_prices)
        chunk: dict[str, Ending] = {}
        async with contextlib.aclosing(self._batch_api.results(part)) as results:
            async for request, result in results:
                if len(chunk) >= COMMIT_CHUNK_ROWS:
                    await self.finish(list(chunk.values()))
                    for finished in chunk:
                        del part.requests[finished]
                    chunk.clear()
                if request.id in part.requests:  # else it was listed twice, and is committed
                    chunk[request.id] = self._ending_from_result(request, result, part)
        await self._shield(self._finish_part(part, chunk))

    async def _finish_part(self, part: BatchPart, last: dict[str, Ending]) -> None:
        """Commit the last endings of a part, erase its files, and emit the endings."""
        assert part.batch is not None  # noqa: S101 - its results were read
        status, reason = part.batch.status, part.batch.error or "no reason given"
        for id_, request in part.requests.items():
            if id_ not in last and status == "failed":
                error = RequestError(f"The provider refused the batch: {reason}")
                last[id_] = self.failed(request, error)
            elif id_ not in last:
                why = f"The batch is {status}, and this row was not answered."
                last[id_] = self.parked(request, why)
        charged = await self._commit(list(last.values()))
        # Answers first, files second: a kernel that dies in between leaves files, which the next
        # map erases. The other order could lose paid answers.
        erased = self._settings.keep_files or await self._batch_api.erase(part.batch, part.sample)
        await self._jobs.close_job(part.tag, erased=erased)
        for ending in charged:
            self._emit_ending(ending)

    def _ending_from_result(self, request: Request, result: RowResult, part: BatchPart) -> Ending:
        """Return the ending of a row from what the provider says; temporary failures park it."""
        if isinstance(result, TransientError):
            return self.parked(request, result.message)
        if isinstance(result, NbcodexError):
            return self.failed(request, result)
        # The ending is built as for a live request, so that replies have the same fields.
        now, base_url = self._clock.now(), part.base_url
        state = RequestState(
            request=request,
            clock=self._clock,
            simulators={base_url} if result.simulated else set(),
            base_url=base_url,
            model=part.model,
            attempts=1,
            answer=replace(result, usage=replace(result.usage, service_tier=BATCH_TIER)),
        )
        try:
            judge(result)
            # Unlike a live request, a row is not asked for a second time.
            parsed = parse_final_answer(request.schema, result.text, asked="once")
        except AnswerError as error:
            state.partial.add_note(error.note)
            return Failed(request_id=request.id, at=now, error=error, reply=state.reply("failed"))
        if result.refused:
            state.partial.add_note(NOTE_REFUSED)
        reply = replace(state.reply("done"), parsed=parsed)
        return Finished(request_id=request.id, at=now, reply=reply)
