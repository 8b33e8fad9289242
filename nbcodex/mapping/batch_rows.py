"""The rows of a batch map that have no ending yet, and how each of them ends.

An ending is charged to the budget, then committed to the journal, then emitted. A job's files at
the provider are erased only when all its answers are committed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nbcodex import errors
from nbcodex.errors import NbcodexError
from nbcodex.events import Ending, Event, Failed, Finished, Listener, Parked
from nbcodex.journal.maps import BatchJobs
from nbcodex.journal.reads import Entry
from nbcodex.mapping.batch_api import BatchApi, PendingJob, RowResult
from nbcodex.models import ZERO_USAGE, Reply, Request
from nbcodex.openai_api import pricing
from nbcodex.openai_api.answers import judge
from nbcodex.openai_api.pricing import BATCH_TIER
from nbcodex.requests.request_state import RequestState
from nbcodex.requests.runner import Services
from nbcodex.requests.structured_output import NOTE_DECLINED, parse_final_answer
from nbcodex.settings import Settings

COMMIT_CHUNK_ROWS = 250  # endings that are committed in one transaction

# Server, API, model and patience: what the rows of one batch job have in common.
Destination = tuple[str, str, str, float]


@dataclass(slots=True, eq=False)
class PendingRow:
    """A row without an ending."""

    request: Request
    # The row's entry in the journal until this process has claimed it; None if it had none before.
    entry: Entry | None = None
    destination: Destination = ("", "", "", 0.0)
    equality_key: bytes = b""  # the same in rows with equal requests
    upload_until: float = 0.0  # when its patience ends; set when it is ready to be uploaded


@dataclass(slots=True, eq=False)
class PendingRows:
    """The rows of one map without an ending, by id; lives on the event loop."""

    services: Services
    settings: Settings
    batch_jobs: BatchJobs
    batch_api: BatchApi
    on_event: Listener
    rows: dict[str, PendingRow] = field(default_factory=dict)
    shielded: set[asyncio.Task[None]] = field(default_factory=set)  # must run to their end

    async def finish(self, endings: Sequence[Ending]) -> None:
        """Charge, commit and emit endings, even if the calling task is cancelled meanwhile."""

        async def work() -> None:
            for ending in await self._commit(endings):
                self._emit_ending(ending)

        if endings:
            await self._shield(work())

    async def fail(self, requests: Iterable[Request], error: NbcodexError) -> None:
        """Finish rows with an error; a ParkedError keeps them for later."""
        await self.finish([self.failed_ending(request, error) for request in requests])

    async def park(self, requests: Iterable[Request], why: str) -> None:
        """Finish rows as kept for later."""
        await self.finish([self.failed_ending(each, parked_error(each, why)) for each in requests])

    def fail_without_commit(
        self, request: Request, error: NbcodexError, *, attempts: int = 0
    ) -> None:
        """Do what `fail` does for one row, whose entry in the journal stays as it is."""
        # A reply without attempts costs nothing: what was reserved for the row is released.
        self.services.budget.commit(request.id, Reply(id=request.id, attempts=0))
        self._emit_ending(self.failed_ending(request, error, attempts=attempts))

    async def _commit(self, endings: Sequence[Ending]) -> list[Ending]:
        """Charge and commit endings; return them with budget warnings, to be emitted."""
        # Charged first, so that the warnings are in the journal's reply, too. Committed before
        # they are emitted: a user never sees an answer that a crash could still lose.
        charged: list[Ending] = []
        replies: list[tuple[Reply, str | None]] = []  # each with the text of its error
        for ending in endings:
            warnings = self.services.budget.commit(ending.request_id, ending.reply)
            reply = replace(ending.reply, notes=(*ending.reply.notes, *warnings))
            charged.append(replace(ending, reply=reply))
            replies.append((reply, str(ending.error) if ending.error else None))
        await self.batch_jobs.finish_rows(replies)
        await self.services.count_spending([reply for reply, _ in replies], self.settings)
        return charged

    def _emit_ending(self, ending: Ending) -> None:
        self.rows.pop(ending.request_id, None)
        self.on_event(ending)

    def emit(self, ids: Iterable[str], cls: Callable[..., Event], **details: Any) -> None:
        """Emit an event of the class `cls` for several rows; `details` are its other fields."""
        now = self.services.clock.now()
        for id_ in ids:
            self.on_event(cls(request_id=id_, at=now, **details))

    async def _shield(self, work: Coroutine[Any, Any, None]) -> None:
        # The event loop holds only weak references to tasks (python/cpython#91887).
        task = asyncio.create_task(work)
        self.shielded.add(task)
        task.add_done_callback(self.shielded.discard)
        await asyncio.shield(task)

    def failed_ending(self, request: Request, error: NbcodexError, *, attempts: int = 0) -> Ending:
        """Return the ending of a row that cost nothing; a parked one has had `attempts`."""
        now = self.services.clock.now()
        if isinstance(error, errors.ParkedError):
            reply = Reply(id=request.id, status="parked", attempts=attempts)
            return Parked(request_id=request.id, at=now, error=error, reply=reply)
        reply = Reply(id=request.id, status="failed", attempts=1, usage=ZERO_USAGE, cost=0.0)
        return Failed(request_id=request.id, at=now, error=error, reply=reply)

    async def read_results(self, job: PendingJob) -> None:
        """Finish all rows of a job that has ended at the provider, and erase its files."""
        # In a thread, because loading takes longer than displays may wait for the event loop.
        await asyncio.to_thread(pricing.load_prices)
        chunk: dict[str, Ending] = {}
        async with contextlib.aclosing(self.batch_api.results(job)) as results:
            async for request, result in results:
                if len(chunk) >= COMMIT_CHUNK_ROWS:
                    await self.finish(list(chunk.values()))
                    for id_ in chunk:
                        del job.requests[id_]
                    chunk.clear()
                # Of two results for a row the first counts: an answer comes before an error.
                if request.id in job.requests and request.id not in chunk:
                    chunk[request.id] = self._ending_from_result(request, result, job)
        await self._shield(self._finish_job(job, chunk))

    async def _finish_job(self, job: PendingJob, endings: dict[str, Ending]) -> None:
        """Commit the last `endings` of a job by row, erase its files, and emit the endings."""
        status, reason = job.batch.status, job.batch.error or "no reason given"
        for id_, request in job.requests.items():
            if id_ in endings:
                continue
            error: NbcodexError = errors.RequestError(f"The provider refused the batch: {reason}")
            if status != "failed":
                why = f"The batch is {status}, and this row was not answered."
                error = parked_error(request, why)
            endings[id_] = self.failed_ending(request, error)
        charged = await self._commit(list(endings.values()))
        # Answers first, files second: a kernel that dies in between leaves files, which the next
        # map erases. The other order could lose paid answers. Files that are kept on purpose are
        # taken for erased, so that no later map erases them.
        erased = self.settings.keep_files or await self.batch_api.erase(job)
        await self.batch_jobs.close_job(job.tag, erased=erased)
        for ending in charged:
            self._emit_ending(ending)

    def _ending_from_result(self, request: Request, result: RowResult, job: PendingJob) -> Ending:
        """Return a row's ending from the provider's result; a temporary failure parks the row."""
        if isinstance(result, errors.TransientError):
            result = parked_error(request, result.message)
        if isinstance(result, NbcodexError):
            return self.failed_ending(request, result)
        # The reply is made as for a live request, so that it has the same fields.
        now, base_url = self.services.clock.now(), job.base_url
        state = RequestState(
            request=request,
            clock=self.services.clock,
            simulators={base_url} if result.simulated else set(),  # servers that are simulators
            base_url=base_url,
            model=job.model,
            attempts=1,
            answer=replace(result, usage=replace(result.usage, service_tier=BATCH_TIER)),
        )
        try:
            judge(result)  # raises an AnswerError
            # Unlike a live request, a row is not asked for a second time.
            parsed = parse_final_answer(request, result.text)
        except errors.AnswerError as error:
            state.partial.add_note(error.note)  # `partial` has the notes of the reply, too
            return Failed(request_id=request.id, at=now, error=error, reply=state.reply("failed"))
        if result.declined:
            state.partial.add_note(NOTE_DECLINED)
        reply = replace(state.reply("done"), parsed=parsed)
        return Finished(request_id=request.id, at=now, reply=reply)


def parked_error(request: Request, why: str) -> errors.ParkedError:
    """Return the error of a row that is kept for later."""
    advice = errors.Advice(
        f"`%codex resume {request.origin.map_id or request.id}` continues it.",
        script="The same call of nbcodex.map continues it.",
    )
    return errors.ParkedError(why, advice=advice)
