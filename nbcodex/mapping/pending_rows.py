"""The rows of a batch map that have no ending yet, and how each one gets its ending.

Owns the order: budget, journal, event. Must not know files or batch jobs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nbcodex.errors import AnswerError, BudgetError, NbcodexError, ParkedError, TransientError
from nbcodex.events import Ending, Event, Failed, Finished, Parked
from nbcodex.models import NO_USAGE, Reply, Request
from nbcodex.openai_api.answers import CompletedAnswer, judge
from nbcodex.openai_api.batches import BATCH_PRICE_FACTOR
from nbcodex.ratelimit.limiter import Patience
from nbcodex.requests.request_state import RequestState
from nbcodex.requests.structured_output import NOTE_REFUSED, parse_final_answer
from nbcodex.runtime.clock import Clock

if TYPE_CHECKING:
    from nbcodex.journal.batch_jobs import BatchJobs
    from nbcodex.journal.codec import Entry
    from nbcodex.requests.runner import Services
    from nbcodex.settings import Settings

# Server, API and model: what the rows of one batch job have in common.
Destination = tuple[str, str, str]
# What the provider says about one row.
RowResult = CompletedAnswer | NbcodexError


@dataclass(slots=True, eq=False)
class PendingRow:
    """A row without an ending."""

    request: Request
    # Set as long as a row that was in the journal before is not claimed for this process.
    entry: Entry | None = None
    destination: Destination = ("", "", "")
    key: bytes = b""

    @property
    def part(self) -> str | None:
        """The tag of the part with which it was uploaded before."""
        return self.entry.batch_job if self.entry else None


class PendingRows:
    """The rows of one map without an ending, by id; lives on the event loop."""

    def __init__(
        self,
        services: Services,
        settings: Settings,
        jobs: BatchJobs,
        emit: Callable[[Event], None],
    ) -> None:
        self.rows: dict[str, PendingRow] = {}
        self._services, self._settings, self._jobs, self._emit = services, settings, jobs, emit
        self._shielded: set[asyncio.Task[None]] = set()

    async def finish(self, endings: Sequence[Ending]) -> None:
        """Charge, commit and emit endings, to the end even if the calling task is cancelled."""
        if endings:
            await self.shield(self._finish(endings))

    async def _finish(self, endings: Sequence[Ending]) -> None:
        for ending in await self.commit(endings):
            self.emit_ending(ending)

    async def commit(self, endings: Sequence[Ending]) -> list[Ending]:
        """Charge and commit endings; return them, with budget warnings, to be emitted."""
        # Charged first, so that the warnings are in the journal's reply, too. Committed before
        # they are emitted: a user never sees an answer that a crash could still lose.
        charged = [self._charge(ending) for ending in endings]
        await self._jobs.finish_rows([(ending.reply, _error_text(ending)) for ending in charged])
        await self._services.count_spending([ending.reply for ending in charged], self._settings)
        return charged

    def _charge(self, ending: Ending) -> Ending:
        reply = ending.reply
        warnings = self._services.budget.commit(ending.request_id, reply)
        return replace(ending, reply=replace(reply, notes=(*reply.notes, *warnings)))

    def emit_ending(self, ending: Ending) -> None:
        """Emit the ending of a row that is committed."""
        self.rows.pop(ending.request_id, None)
        self._emit(ending)

    def drop(self, ending: Ending) -> None:
        """Emit an ending that cost nothing here, and that the journal already has."""
        self._services.budget.commit(ending.request_id, Reply(id=ending.request_id, attempts=0))
        self.emit_ending(ending)

    def emit(self, ids: Iterable[str], kind: Callable[..., Event], **details: Any) -> None:
        """Emit an event of one kind for several rows."""
        now = self._services.clock.now()
        for id_ in ids:
            self._emit(kind(request_id=id_, at=now, **details))

    async def shield(self, work: Coroutine[Any, Any, None]) -> None:
        """Complete `work` even if the calling task is cancelled."""
        # The event loop holds only weak references to tasks (python/cpython#91887).
        task = asyncio.create_task(work)
        self._shielded.add(task)
        task.add_done_callback(self._shielded.discard)
        await asyncio.shield(task)

    async def wait_shielded(self) -> None:
        """Return when no shielded work is left."""
        await asyncio.gather(*self._shielded, return_exceptions=True)


def _error_text(ending: Ending) -> str | None:
    error = getattr(ending, "error", None)
    return str(error) if error else None


# Endings.


def ending_from_result(
    request: Request, result: RowResult, *, model: str | None, base_url: str, clock: Clock
) -> Ending:
    """Return the ending of a row from what the provider says; temporary failures are parked."""
    if isinstance(result, TransientError):
        return parked_ending(request, result.message, clock=clock)
    if isinstance(result, NbcodexError):
        return failed_ending(request, result, clock=clock)
    # The ending is built as for a live request, so that replies have the same fields.
    state = RequestState(
        request=request,
        clock=clock,
        patience=Patience(request.patience),
        simulators={base_url} if result.simulated else set(),
        base_url=base_url,
        model=model,
        attempts=1,
        answer=result,
    )
    try:
        judge(result)
        # Unlike a live request, a row is not asked for a second time.
        parsed = parse_final_answer(request.schema, result.text, asked="once")
    except AnswerError as error:
        state.partial.add_note(error.note)
        reply = _at_batch_price(state.reply("failed"))
        return Failed(request_id=request.id, at=clock.now(), error=error, reply=reply)
    if result.refused:
        state.partial.add_note(NOTE_REFUSED)
    reply = replace(_at_batch_price(state.reply("done")), parsed=parsed)
    return Finished(request_id=request.id, at=clock.now(), reply=reply)


def failed_ending(request: Request, error: NbcodexError, *, clock: Clock) -> Ending:
    """Return the ending of a row that cost nothing; a refusal by the budget parks it."""
    if isinstance(error, BudgetError):
        reply = Reply(id=request.id, status="parked", attempts=0)
        return Parked(request_id=request.id, at=clock.now(), error=error, reply=reply)
    reply = Reply(id=request.id, status="failed", attempts=1, usage=NO_USAGE, cost=0.0)
    return Failed(request_id=request.id, at=clock.now(), error=error, reply=reply)


def parked_ending(request: Request, why: str, *, clock: Clock, attempts: int = 0) -> Parked:
    """Return the ending of a row that is kept for later; it cost nothing."""
    advice = f"`%codex resume {request.origin.map_id or request.id}` continues it."
    error = ParkedError(why, advice=advice)
    reply = Reply(id=request.id, status="parked", attempts=attempts)
    return Parked(request_id=request.id, at=clock.now(), error=error, reply=reply)


def _at_batch_price(reply: Reply) -> Reply:
    return reply if reply.cost is None else replace(reply, cost=reply.cost * BATCH_PRICE_FACTOR)
