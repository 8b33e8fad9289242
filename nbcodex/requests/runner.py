"""The life of one request, from the question to one of its five endings.

Owns when it is tried again, and what it comes to (with tenacity). Knows neither HTTP nor any
display; runs on the one event loop, so nothing here is locked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import tenacity

from nbcodex import events
from nbcodex.errors import (
    LONG_CONVERSATION_ADVICE,
    AnswerError,
    LimitError,
    NbcodexError,
    ParkedError,
    TooLargeError,
    TransientError,
    shorten,
)
from nbcodex.journal.entry import JournalEntry
from nbcodex.journal.spending import SpendAmount
from nbcodex.models import NOTE_POSSIBLY_PAID, NOTE_POSSIBLY_PAID_TWICE, Reply, Request, Resumption
from nbcodex.openai_api.answers import CompletedAnswer
from nbcodex.ratelimit import backoff
from nbcodex.ratelimit.limiter import Waiter
from nbcodex.requests import fitting, parking, repair, spending_cap
from nbcodex.requests.sender import Sender
from nbcodex.requests.services import Services
from nbcodex.requests.story import Story
from nbcodex.settings import Settings

Listener = Callable[[events.Event], None]
Order = Literal["stop", "cancel", "park"]

log = logging.getLogger(__name__)

TOLD = 60
"""Characters of a prompt that are told, for people to know the request by."""


def start(
    services: Services,
    request: Request,
    settings: Settings,
    listener: Listener,
    *,
    resumption: Resumption | None = None,
    kept: Callable[[], object] = lambda: None,
) -> Run:
    """Begin the life of a request, or take one up that is in the journal.

    `listener` hears its events on the loop's thread; there, `kept` is called when the request
    is in the journal, or it is known that it cannot be.
    """
    run = Run(services, request, settings, listener, resumption=resumption, kept=kept)
    run.task = asyncio.get_running_loop().create_task(run.live(), name=f"codex-{request.id}")
    run.task.add_done_callback(run.see_off)
    return run


class Run:
    """One request on its way. Its orders are given on the loop's thread."""

    task: asyncio.Task[None]

    def __init__(
        self,
        services: Services,
        request: Request,
        settings: Settings,
        listener: Listener,
        *,
        resumption: Resumption | None,
        kept: Callable[[], object],
    ) -> None:
        self._services, self._clock, self._kept = services, services.clock, kept
        self._request, self._settings = request, settings
        self._resumption = resumption
        self._story = Story(request, listener, clock=services.clock, simulators=services.simulators)
        self._partial = self._story.partial
        self._entry = JournalEntry(
            services.journal(settings), request, self._partial, services.clock
        )
        resumed = resumption is not None
        self._waiter = Waiter(self._clock, self._story.patience, may_probe=resumed)
        self._sender = Sender(
            services.api_client,
            settings,
            self._story,
            self._entry,
            services.limiter(settings),
            self._waiter,
            under_way=services.load_prices,
            permit=self._permitted,
        )
        self._order: Order | None = None
        self._living = self._fault = False

    # Orders.

    def end(self, order: Order) -> None:
        """End the request as its user wishes; the first order counts."""
        if self._order is None:
            self._order = order
            if self._living:
                self.task.cancel()

    def retry_now(self) -> None:
        """Send this one request through a wait, as a probe; without effect when it is not held."""
        self._waiter.retry_now()

    # The life.

    async def live(self) -> None:
        """Live from `Queued` to an ending. Every failure ends in an event, never in a traceback."""
        self._living = True
        self._story.tell(
            events.Queued,
            model=self._story.model,
            patience=self._request.patience,
            prompt=shorten(self._request.prompt, TOLD),
        )
        ending = await self._ending()
        self._living = False  # what has ended is not to be ended otherwise
        # What goes on at the server counts when it is picked up.
        goes_on = self._partial.goes_on(ending.reply.status)
        assumed = SpendAmount() if goes_on else self._services.budget.aside_for(self._request.id)
        ending = self._accounted(ending, assumed)
        await self._entry.finish(ending, assumed=assumed)
        self._story.say(ending)
        if isinstance(ending, events.Cancelled) and (mark := self._partial.mark):
            await self._services.api_client.cancel_response(
                self._request, self._settings, mark=mark
            )

    def _accounted(self, ending: events.Ending, assumed: SpendAmount) -> events.Ending:
        """Count what the request has used, and warn where its user's budget runs out."""
        reply = ending.reply
        allowance = self._services.budget
        warnings = allowance.settle(self._request.id, reply, otherwise=assumed)
        return replace(ending, reply=replace(reply, notes=(*reply.notes, *warnings)))

    async def _ending(self) -> events.Ending:
        """Return what the request comes to."""
        story = self._story
        try:
            if self._order:
                raise asyncio.CancelledError
            if reply := repair.reused(self._request, await self._admitted()):
                return story.event(events.Finished, reply=reply)
            parsed = await repair.fitted(story, await self._completed(), self._completed)
        except asyncio.CancelledError:
            if self._order is None:
                raise  # the process ends, and nobody is left to hear of it
            return self._ended_as_ordered()
        except ParkedError as error:
            return story.event(events.Parked, error=error, reply=story.reply("parked"))
        except NbcodexError as error:
            if isinstance(error, AnswerError):
                self._partial.note(fitting.UNFIT)
            if isinstance(error, TooLargeError) and self._request.turns:
                error.advice = LONG_CONVERSATION_ADVICE
            reply = story.reply("failed", story.answer)
            return story.event(events.Failed, error=error, reply=reply)
        reply = replace(story.reply("done", story.answer), parsed=parsed)
        return story.event(events.Finished, reply=reply)

    async def _admitted(self) -> Reply | None:
        """Put the request into the journal before anything is sent; return an answer to reuse."""
        base_url = self._services.api_client.endpoint(self._request, self._settings).base_url
        self._story.base_url = base_url
        self._services.budget.foresee(self._services.journal(self._settings))
        if self._resumption is None:
            reused = await self._entry.insert(base_url)
            self._entry.on_inserted(self._kept)
            return reused
        if (wall := self._resumption.not_before) is not None:
            until = self._clock.now() + wall - self._clock.wall()
            self._story.tell(events.CoolingDown, limit=None, resume_at=until, waited=0.0)
            await self._waiter.sleep_until(until, uses_patience=False)
        goes_on = self._resumption.position is not None
        if reused := await self._entry.claim(base_url, reuse=not goes_on):
            return reused
        for note in self._resumption.notes:
            self._partial.note(note)
        if mark := self._resumption.position:
            self._partial.take_up(mark, self._resumption.text)
            if self._partial.text:
                self._story.grow(self._partial.text)
        return None

    def _ended_as_ordered(self) -> events.Ending:
        if self._sender.sent:
            self._note_the_gap(NOTE_POSSIBLY_PAID)
        story = self._story
        if self._order == "park":
            error = parking.by_user(self._request, story.wait, clock=self._clock)
            return story.event(events.Parked, error=error, reply=story.reply("parked"))
        if self._order == "cancel":
            return story.event(events.Cancelled, reply=story.reply("cancelled"))
        return story.event(events.Interrupted, reply=story.reply("interrupted"))

    def see_off(self, task: asyncio.Task[None]) -> None:
        """Make sure of an ending: even a defect of ours leaves nobody waiting."""
        if task.cancelled() or (defect := task.exception()) is None:
            return
        log.error("request %s met a defect", self._request.id, exc_info=defect)
        error = NbcodexError(
            f"A defect in nbcodex: {type(defect).__name__}.", advice="Please report it."
        )
        reply = Reply(id=self._request.id, text=self._partial.text, status="failed")
        self._story.tell(events.Failed, error=error, reply=reply)

    # The attempts.

    async def _permitted(self) -> None:
        """Hold the request against its user's budget."""
        await self._services.budget.admit(
            self._request,
            caps=map(spending_cap.read, self._settings.budgets),
            journal=self._services.journal(self._settings),
            model=self._story.model,
            base_url=self._story.base_url,
            so_far=self._story.spent,
        )

    async def _completed(self) -> CompletedAnswer:
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            wait=self._wait,
            stop=self._out_of_patience,
            before_sleep=self._back_off,
            sleep=self._sleep,
            retry_error_callback=self._park,
        )
        completed: CompletedAnswer = await attempts(self._sender.attempt)
        self._services.retry_budget(self._story.base_url).record_success(self._clock.now())
        return completed

    # What tenacity asks.

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Return the seconds to wait after a failed attempt."""
        error, now = _failure(state), self._clock.now()
        self._sender.sent = False
        if self._sender.opened or getattr(error, "was_sent", False):
            self._note_the_gap(NOTE_POSSIBLY_PAID_TWICE)
        stated = (
            None if error.wait is None else backoff.stated_wait(error.wait, self._services.chance)
        )
        if isinstance(error, LimitError):
            return _exponential(state) if stated is None else stated
        self._story.patience.waited += (
            now - self._sender.heard_at
        )  # the silence before a fault is a wait, too
        earned = self._services.retry_budget(self._story.base_url).spend(now)
        # A server in trouble may ask for too short a wait again and again: it still gets longer.
        return max(stated or 0.0, _exponential(state), earned)

    def _out_of_patience(self, state: tenacity.RetryCallState) -> bool:
        return not self._story.patience.covers(state.upcoming_sleep)

    async def _back_off(self, state: tenacity.RetryCallState) -> None:
        """Announce the wait."""
        error, story = _failure(state), self._story
        self._fault = not (self._sender.reservation and isinstance(error, LimitError))
        resume_at = await self._closed_until(error, self._clock.now() + state.upcoming_sleep)
        self._waiter.start_cooldown(resume_at)
        backing_off = story.event(
            events.BackingOff,
            error=error,
            attempt=story.attempts,
            resume_at=resume_at,
            waited=story.waited,
        )
        story.say(backing_off)
        await self._entry.wait(backing_off.resume_at, backing_off.limit)

    def _note_the_gap(self, note: str) -> None:
        """Note where a durable answer may be under way of which nobody knows the name."""
        if self._request.durable and self._partial.mark is None:
            self._partial.note(note)

    async def _park(self, state: tenacity.RetryCallState) -> CompletedAnswer:
        """Give up for now."""
        error, now = _failure(state), self._clock.now()
        resume_at = now + state.upcoming_sleep
        # A smaller request might be let in at once: what is too much for now closes nothing.
        closed_until = await self._closed_until(error, now if _is_of_size(error) else resume_at)
        raise self._story.parked(error, max(resume_at, closed_until)) from error

    async def _closed_until(self, error: TransientError, resume_at: float) -> float:
        """Close the bucket where a limit asks for it; return the instant of the next attempt."""
        reservation = self._sender.reservation
        if reservation is None or not isinstance(error, LimitError):
            return resume_at
        return await reservation.refuse(error.limit, error.snapshot, until=resume_at)

    async def _sleep(self, seconds: float) -> None:
        """Wait out a fault. A limit's wait is a cooldown, which the limiter waits for."""
        if self._fault:
            await self._waiter.sleep_until(self._clock.now() + seconds)


def _failure(state: tenacity.RetryCallState) -> TransientError:
    """Return the error of the attempt that tenacity asks about."""
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, TransientError)  # noqa: S101 - no other is retried
    return error


def _is_of_size(error: TransientError) -> bool:
    """Whether a smaller request might be let in at once, so that others need not wait."""
    return isinstance(error, LimitError) and error.limit.resource == "tokens"


_exponential = tenacity.wait_exponential_jitter(
    initial=backoff.BACKOFF_INITIAL_S,
    exp_base=backoff.BACKOFF_FACTOR,
    max=backoff.BACKOFF_MAX_S,
    jitter=backoff.BACKOFF_INITIAL_S,
)
"""Seconds to wait where the server says nothing; the jitter only adds."""
