"""Runs one request: commits it to the journal, makes attempts, waits between them, and ends it.

It decides when another attempt is made, and the order of events: nothing is sent before the request
is in the journal, and no ending is emitted before the journal has it. All of this runs on the one
event loop, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import tenacity

from nbcodex import errors, events, models
from nbcodex.events import EndAction, Listener
from nbcodex.journal.journal import Journal
from nbcodex.journal.spending import SpendAmount
from nbcodex.models import Rates, Reply, Request, Resumption, StreamPosition
from nbcodex.openai_api import answers, pricing
from nbcodex.openai_api.answers import CompletedAnswer
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.openai_api.endpoints import check_server
from nbcodex.ratelimit import backoff
from nbcodex.ratelimit.limiter import CooldownTooLongError, Limiter, Reservation, Waiter
from nbcodex.ratelimit.rate_limiter import Cooldown, Wait
from nbcodex.requests import structured_output
from nbcodex.requests.budget import Budget, rate_limit_need
from nbcodex.requests.entry_writer import EntryWriter
from nbcodex.requests.request_state import RequestState, cooldown_error
from nbcodex.runtime.clock import Clock
from nbcodex.settings import Settings

PROMPT_PREVIEW_CHARS = 60
NOTE_SENT_AGAIN = "the server lost the answer: sent again"

EventT = TypeVar("EventT", bound=events.Event)

log = logging.getLogger(__name__)

# The wait after a failed attempt, which grows with their number. The jitter only makes it longer.
_exponential_wait = tenacity.wait_exponential_jitter(
    initial=backoff.BACKOFF_INITIAL_S,
    exp_base=backoff.BACKOFF_FACTOR,
    max=backoff.BACKOFF_MAX_S,
    jitter=backoff.BACKOFF_INITIAL_S,
)


@dataclass(slots=True, kw_only=True)
class Services:
    """What all requests of a process share."""

    api_client: ApiClient
    clock: Clock
    limiter: Callable[[Settings], Limiter]
    journal: Callable[[Settings], Journal]
    # The journal that counts what is spent: it may be on disk even where prompts are not kept.
    spending_journal: Callable[[Settings], Journal]
    rng: random.Random = field(default_factory=random.Random)  # of the jitter in waits
    # Base URLs of servers that are simulators, as far as their answers have shown.
    simulators: set[str] = field(default_factory=set)
    budget: Budget = field(init=False)
    # By base URL: all requests to one server share a retry budget, which bounds their retries.
    retry_budgets: dict[str, backoff.RetryBudget] = field(init=False)

    def __post_init__(self) -> None:
        self.budget, self.retry_budgets = Budget(self.clock), defaultdict(backoff.RetryBudget)

    async def count_spending(
        self, replies: Sequence[Reply], settings: Settings, *, if_unknown: SpendAmount | None = None
    ) -> None:
        """Count what replies used (or `if_unknown`), unless their entries' journal does so."""
        spending_journal = self.spending_journal(settings)
        if spending_journal is not self.journal(settings):
            await spending_journal.count_spending(replies, if_unknown=if_unknown)


class RequestRunner:
    """One running request. Its methods are called on the loop's thread."""

    task: asyncio.Task[None]

    def __init__(
        self,
        services: Services,
        request: Request,
        settings: Settings,
        listener: Listener,
        *,
        resumption: Resumption | None = None,
        # Called once the request is in the journal, or cannot be written to it.
        on_committed: Callable[[], object] = lambda: None,
    ) -> None:
        self._services, self._clock = services, services.clock
        self._request, self._settings, self._resumption = request, settings, resumption
        self._listener, self._on_committed = listener, on_committed
        self._limiter = services.limiter(settings)
        self.state = RequestState(request, services.clock, simulators=services.simulators)
        journal = services.journal(settings)
        self._entry = EntryWriter(journal, request, self.state.partial, self._clock)
        # Does all waits of the request, and counts them as patience. The cooldown that parked a
        # resumed request may be hours old, so one probe is allowed.
        self._waiter = Waiter(self._clock, self.state.patience, may_probe=resumption is not None)
        # While a resumed request has not claimed its entry, its failure leaves the entry as it is.
        self._is_unclaimed = resumption is not None
        self._end_action: EndAction | None = None
        self._is_cancellable = False

    def start(self) -> RequestRunner:
        """Start the request's task."""
        self.task = asyncio.create_task(self.run(), name=f"codex-{self._request.id}")
        self.task.add_done_callback(self._report_defect)
        return self

    def end(self, action: EndAction) -> None:
        """End the request; later calls have no effect."""
        if self._end_action is None:
            self._end_action = action
            if self._is_cancellable:
                self.task.cancel()

    def retry_now(self) -> None:
        """Send a waiting request now, to find out whether the limit still holds."""
        self._waiter.retry_now()

    async def run(self) -> None:
        """Run from `Queued` to an ending. Every failure becomes an event, never a traceback."""
        state, services = self.state, self._services
        # Until here, `end` does not cancel the task: one that is cancelled before its first step
        # would never emit an ending.
        self._is_cancellable = True
        prompt = errors.shorten(self._request.prompt, PROMPT_PREVIEW_CHARS)
        self._emit(events.Queued, model=state.model, patience=self._request.patience, prompt=prompt)
        ending = await self._find_ending()
        # From here on, Stop cannot turn an answer into an interruption.
        self._is_cancellable = False
        # A reply of unknown usage counts as reserved; but a durable answer that continues at the
        # server is counted when it is resumed.
        continues = state.partial.continues_at_server(ending.reply.status)
        assumed = SpendAmount() if continues else services.budget.reserved_for(self._request.id)
        warnings = services.budget.commit(self._request.id, ending.reply, if_unknown=assumed)
        reply = replace(ending.reply, notes=(*ending.reply.notes, *warnings))
        ending = replace(ending, reply=reply)
        await self._entry.finish(ending, spent_if_unknown=assumed)
        await services.count_spending([reply], self._settings, if_unknown=assumed)
        self._send_event(ending)
        # After the ending: the server may be slow.
        if isinstance(ending, events.Cancelled) and (position := state.partial.position):
            await services.api_client.cancel_response(
                self._request, self._settings, position=position
            )

    async def _find_ending(self) -> events.Ending:
        state = self.state
        try:
            if self._end_action:
                raise asyncio.CancelledError
            reused = structured_output.parse_reused(self._request, await self._insert_or_claim())
            return self._new_event(events.Finished, reply=reused or await self._answer())
        except asyncio.CancelledError:
            if self._end_action is None:
                raise  # the event loop shuts down with the process
            if state.is_sent:
                state.note_unknown_response(models.NOTE_POSSIBLY_PAID)
            if self._end_action == "cancel":
                return self._new_event(events.Cancelled, reply=state.reply("cancelled"))
            if self._end_action == "stop":
                return self._new_event(events.Interrupted, reply=state.reply("interrupted"))
            error = state.parked_by_user_error()
            return self._new_event(events.Parked, error=error, reply=state.reply("parked"))
        except errors.ParkedError as error:
            return self._new_event(events.Parked, error=error, reply=state.reply("parked"))
        except errors.NbcodexError as error:
            if isinstance(error, errors.AnswerError):
                state.partial.add_note(error.note)
            if isinstance(error, errors.TooLargeError) and self._request.turns:
                error.advice = errors.join_advice(error.advice, errors.LONG_CONVERSATION_ADVICE)
            if self._is_unclaimed and isinstance(error, errors.ConfigurationError):
                error.message += " The request stays in the journal as it was."
            reply = state.reply("failed")
            return self._new_event(
                events.Failed, error=error, reply=reply, entry_unchanged=self._is_unclaimed
            )

    async def _insert_or_claim(self) -> Reply | None:
        """Insert the request, or become owner of a resumed one's entry; return a reused answer."""
        state, resumption = self.state, self._resumption
        request, settings, api_client = self._request, self._settings, self._services.api_client
        if resumption is None:
            endpoint = api_client.endpoint(request, settings)
        else:
            # Also awaits an async `Settings.client`, because the check needs its client's server.
            endpoint = await api_client.await_endpoint(request, settings)
            check_server(request, endpoint)  # raises if the entry was written for another one
        state.base_url = endpoint.base_url
        # What is spent is read while the request is being committed, not after it.
        self._services.budget.start_reading(self._services.spending_journal(self._settings))
        if resumption is None:
            return await self._entry.schedule_insert(
                state.base_url, endpoint.server, on_committed=self._on_committed
            )
        if resumption.not_before is not None:
            until = self._clock.now() + resumption.not_before - self._clock.wall()
            self._emit(events.CoolingDown, limit=None, resume_at=until, waited=0.0)
            await self._waiter.sleep_until(until, uses_patience=False)
            state.started_at = self._clock.now()  # its figures leave this wait out
        # A durable answer that continues at the server is preferred to an equal request's answer.
        reuse = resumption.position is None
        reused = await self._entry.claim(state.base_url, endpoint.server, reuse=reuse)
        self._is_unclaimed = False
        if reused:
            return reused
        for note in resumption.notes:
            state.partial.add_note(note)
        if resumption.position:
            state.partial.restore(resumption.position, resumption.text)
            if state.partial.text:
                self._emit_text(state.partial.text)
        return None

    async def _answer(self) -> Reply:
        """Return the finished reply; if its answer does not fit the schema, ask once more."""
        state, schema = self.state, self._request.schema
        state.answer = answer = await self._retry()
        answers.judge(answer)  # raises an AnswerError if it is not usable
        if answer.declined:
            state.partial.add_note(structured_output.NOTE_DECLINED)
        if schema is None:
            return state.reply("done")
        try:
            parsed = structured_output.parse_answer(schema, answer.text)
        except structured_output.SchemaMismatchError as mismatch:
            structured_output.check_repairable(self._request, answer, mismatch, waited=state.waited)
            state.answer = await self._repair(answer, mismatch)
            answers.judge(state.answer)
            parsed = structured_output.parse_final_answer(
                self._request, state.answer.text, asked_twice=True
            )
            state.partial.add_note(structured_output.NOTE_ASKED_AGAIN)
        return replace(state.reply("done"), parsed=parsed)

    async def _repair(
        self, answer: CompletedAnswer, mismatch: structured_output.SchemaMismatchError
    ) -> CompletedAnswer:
        """Ask once more for an answer that fits; all of the time that this takes uses patience."""
        state, started_at, waited = self.state, self._clock.now(), self.state.waited
        queued, first_usage = state.queued, state.attempt_usage("done", answer)
        # If no second answer arrives, the reply has this usage, too.
        state.answer = answer = replace(answer, usage=first_usage)
        state.sent_request = structured_output.repair_request(self._request, answer, mismatch)
        state.partial.start_over()
        try:
            second = await self._retry()
        except errors.NbcodexError as error:
            raise structured_output.mismatch_error(
                self._request, mismatch, repair_error=error
            ) from error
        except asyncio.CancelledError:
            state.broken_usage += first_usage  # the reply's own usage is of the new text
            raise
        finally:
            state.patience.waited = waited + self._clock.now() - started_at
            state.queued = queued  # what was added is part of `waited`
        return replace(second, usage=first_usage + state.attempt_usage("done", second))

    async def _retry(self) -> CompletedAnswer:
        """Make attempts until one brings an answer, or the patience is used up."""
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(errors.TransientError),
            wait=lambda retry_state: self.state.backoff_s(_exponential_wait(retry_state)),
            stop=lambda retry_state: not self.state.patience.covers(retry_state.upcoming_sleep),
            sleep=self._back_off,
            retry_error_callback=self._park,
        )
        answer: CompletedAnswer = await retrying(self._attempt)
        self._services.retry_budgets[self.state.base_url].record_success(self._clock.now())
        return answer

    async def _attempt(self) -> CompletedAnswer:
        """Send the request once, or continue its durable answer, and read to the end."""
        state, api_client = self.state, self._services.api_client
        request, settings = self._request, self._settings
        state.last_activity_at = self._clock.now()
        try:
            if not (request.model or settings.model):
                # The server may be asked for its model below, and nothing may be sent before this.
                await self._entry.wait_inserted()
            state.model = await api_client.resolve_model(request, settings)
            endpoint = api_client.endpoint(request, settings)
            state.base_url = endpoint.base_url  # that of `Settings.client` is known only now
            if position := state.partial.position:
                # The server counts this towards no limit, so nothing is reserved.
                state.reservation = None
                await self._start_attempt()
                text = state.partial.continue_from(position)
                stream = api_client.resume_stream(request, settings, position=position, text=text)
                with contextlib.suppress(errors.AnswerLostError):
                    return await self._read(stream)
                state.partial.add_note(NOTE_SENT_AGAIN)
            # Other processes see this id: a hash, with the salt that all of them share.
            salt = await self._limiter.salt()
            limits_id = api_client.limits_id(endpoint, state.model, salt=salt)
            return await self._send(limits_id, state.model)
        except errors.NbcodexError as error:
            if error.simulated:
                self._services.simulators.add(state.base_url)
            if isinstance(error, errors.TransientError):
                self._charge_failure(error)
            raise

    async def _send(self, limits_id: str, model: str) -> CompletedAnswer:
        state = self.state
        state.start_over()
        await self._services.budget.reserve(
            self._request,
            caps=self._settings.budgets,
            journal=self._services.spending_journal(self._settings),
            model=model,
            base_url=state.base_url,
            broken=state.broken_spend,
        )
        reservation = await self._acquire(limits_id)
        tier = pricing.requested_tier(state.sent_request)
        try:
            await self._start_attempt(
                rates=pricing.token_rates(model, state.base_url, tier),
                unpriced=pricing.is_price_unknown(model, state.base_url),
            )
            reservation.mark_sent()
            answer = await self._read(
                self._services.api_client.stream(state.sent_request, self._settings, model=model)
            )
        except errors.NbcodexError as error:
            state.fail_attempt(error)
            # After a refusal, `_start_cooldown` ends the reservation and begins the cooldown in one
            # step, so that no other request is sent between the two.
            if not isinstance(error, errors.LimitError):
                reservation.release(ended_early=getattr(error, "ended_early", False))
            raise
        except asyncio.CancelledError:
            # Ended by the user: the server stops as well, and charges for the text so far.
            reservation.settle(state.attempt_usage("interrupted"))
            raise
        except BaseException:
            reservation.release()
            raise
        reservation.settle(state.attempt_usage("done", answer))
        return answer

    async def _acquire(self, limits_id: str) -> Reservation:
        state, need = self.state, rate_limit_need(self.state.sent_request)
        state.reservation = None
        label = f"{state.model} at {state.base_url}"  # what users read in place of the id
        started_at, waited = self._clock.now(), state.waited
        try:
            state.reservation = await self._limiter.acquire(
                limits_id, need, self._waiter, label=label, on_wait=self._report_wait
            )
        except CooldownTooLongError as error:
            cause = cooldown_error(error.cooldown.limit)
            raise state.patience_error(cause, error.cooldown.until) from None
        finally:
            # Cooldowns use patience, the queue does not.
            state.queued += max(0.0, self._clock.now() - started_at - (state.waited - waited))
        return state.reservation

    async def _report_wait(self, wait: Wait | Cooldown) -> None:
        resume_at = wait.start_at if isinstance(wait, Wait) else wait.until  # a Wait: in the queue
        if isinstance(wait, Cooldown):
            await self._entry.record_wait(wait.until)
        self._emit(
            events.CoolingDown,
            limit=wait.limit,
            resume_at=resume_at,
            waited=self.state.waited,
            queued=isinstance(wait, Wait),
        )

    async def _start_attempt(self, *, rates: Rates | None = None, unpriced: bool = False) -> None:
        """Commit that an attempt begins, then emit `Sent`."""
        state = self.state
        # Counted before it is sent: if the process dies in between, the journal has an attempt too
        # many, which is better than a paid answer without a trace.
        state.attempts += 1
        state.last_activity_at, state.is_accepted = self._clock.now(), False
        await self._entry.start_attempt(state.attempts)
        self._emit(
            events.Sent,
            attempt=state.attempts,
            model=state.model,
            input_tokens=pricing.estimate_request_tokens(state.sent_request),
            rates=rates,
            unpriced=unpriced,
            simulated=state.is_simulated,
        )
        state.is_sent = True
        pricing.start_loading(state.base_url)

    async def _read(self, stream: AsyncGenerator[answers.StreamEvent]) -> CompletedAnswer:
        state, partial = self.state, self.state.partial
        async with contextlib.aclosing(stream):
            async for event in stream:
                state.last_activity_at = self._clock.now()
                match event:
                    case answers.ResponseStarted():
                        state.is_accepted = True
                        # A real server may have taken over the simulator's address.
                        self._services.simulators.discard(state.base_url)
                        if event.simulated:
                            self._services.simulators.add(state.base_url)
                        if state.reservation:
                            state.reservation.observe(event.snapshot)
                    case StreamPosition():
                        # Committed before the text after it is shown: otherwise, a killed kernel
                        # could have shown text that it cannot continue.
                        partial.set_position(event)
                        await self._entry.set_response_id(event)
                    case answers.Reset():
                        partial.expect_replacement()
                    case answers.TextDelta(text):
                        # The old text is shown until the first new text arrives.
                        if partial.append(text):
                            self._emit(events.Restarted)
                        self._emit_text(text)
                        self._entry.update_soon()
                    case answers.ReasoningDelta(text):
                        self._emit_text(text, reasoning=True)
                    case answers.Notice(text):
                        partial.add_note(text)
                    case CompletedAnswer():
                        return event
        raise AssertionError("the API client ends a stream with an answer or an error")

    def _charge_failure(self, error: errors.TransientError) -> None:
        """Charge the patience and the retry budget for a failed attempt."""
        state, now, wait = self.state, self._clock.now(), error.wait
        state.is_sent = False
        # The request may have reached a server whose connection broke, which then works on it.
        may_be_received = isinstance(error, errors.TransportError) and not error.is_unbilled
        if state.is_accepted or may_be_received:
            state.note_unknown_response(models.NOTE_POSSIBLY_PAID_TWICE)
        state.error, state.retry_budget_wait = error, 0.0
        state.stated_wait = None if wait is None else backoff.with_jitter(wait, self._services.rng)
        state.refusals = state.refusals + 1 if isinstance(error, errors.LimitError) else 0
        if not state.refusals:
            # The time without data before a fault counts as a wait.
            state.patience.waited += now - state.last_activity_at
            state.retry_budget_wait = self._services.retry_budgets[state.base_url].spend(now)

    async def _back_off(self, seconds: float) -> None:
        """Report the wait before the next attempt, and wait."""
        error, attempt, waited = self.state.error, self.state.attempts, self.state.waited
        failed_at = self._clock.now()
        resume_at = await self._start_cooldown(error, failed_at + seconds)
        self._waiter.record_reported_wait(resume_at)  # so that `acquire` does not report it again
        self._emit(
            events.BackingOff, error=error, attempt=attempt, resume_at=resume_at, waited=waited
        )
        await self._entry.record_wait(resume_at)
        # A cooldown is waited out in `acquire`, before the next attempt.
        if not (isinstance(error, errors.LimitError) and self.state.reservation):
            # A success ends the wait for the budget, not the one that the server has stated.
            stated_until = min(resume_at, failed_at + (self.state.stated_wait or 0.0))
            is_woken = await self._waiter.sleep_until(stated_until)
            waiting = self._services.retry_budgets[self.state.base_url].waiting
            if self.state.retry_budget_wait:
                waiting[self._waiter.wake] = None  # another request's success sets this event
            try:
                is_woken = is_woken or await self._waiter.sleep_until(resume_at)
            finally:
                waiting.pop(self._waiter.wake, None)
            # `backoff_s` has cut the wait for the budget to the patience that was left.
            allowed_at = failed_at + self.state.retry_budget_wait
            if not is_woken and self._clock.now() < allowed_at:
                raise self.state.patience_error(error, allowed_at)

    async def _park(self, retry_state: tenacity.RetryCallState) -> CompletedAnswer:
        """Raise a ParkedError: the next wait is longer than the patience."""
        error, now = self.state.error, self._clock.now()
        resume_at = now + retry_state.upcoming_sleep
        # A limit on tokens or images may admit another request at once, so there is no cooldown.
        limited = error.limit.resource if isinstance(error, errors.LimitError) else None
        may_admit = limited not in {None, "requests", "parallel requests", "traffic growth"}
        cooldown_until = await self._start_cooldown(error, now if may_admit else resume_at)
        raise self.state.patience_error(error, max(resume_at, cooldown_until)) from error

    async def _start_cooldown(self, error: errors.TransientError, resume_at: float) -> float:
        """Begin a cooldown if a limit refused the attempt; return when the next is due."""
        reservation = self.state.reservation
        if reservation is None or not isinstance(error, errors.LimitError):
            return resume_at
        return await reservation.refuse(error.limit, error.snapshot, cooldown_until=resume_at)

    def _new_event(self, event_class: Callable[..., EventT], **details: Any) -> EventT:
        return event_class(request_id=self._request.id, at=self._clock.now(), **details)

    def _emit(self, event_class: Callable[..., events.Event], **details: Any) -> None:
        self._send_event(self._new_event(event_class, **details))

    def _emit_text(self, text: str, *, reasoning: bool = False) -> None:
        self._emit(events.Delta, text=text, reasoning=reasoning, simulated=self.state.is_simulated)

    def _send_event(self, event: events.Event) -> None:
        self.state.last_event = event
        self._listener(event)

    def _report_defect(self, task: asyncio.Task[None]) -> None:
        # A defect of ours must not let a thread wait forever for an ending.
        if error := defect_error(task):
            reply = Reply(id=self._request.id, text=self.state.partial.text, status="failed")
            self._emit(events.Failed, error=error, reply=reply)


def defect_error(task: asyncio.Task[None]) -> errors.NbcodexError | None:
    """Return the error that reports a defect of ours, if one has ended `task`; log its cause."""
    if task.cancelled() or (defect := task.exception()) is None:
        return None
    log.error("%s met a defect", task.get_name(), exc_info=defect)
    return errors.NbcodexError(
        f"A defect in nbcodex: {type(defect).__name__}.", advice="Please report it."
    )
