"""The life of one request, from the question to one of its five endings.

Owns attempts, backoff and patience (with tenacity), and speaks in events. Knows neither HTTP nor
any display; runs on the one event loop, so nothing here is locked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any, Literal

import tenacity

from nbcodex import budget, events, fitting, parking, shapes
from nbcodex.clock import Clock
from nbcodex.errors import (
    AnswerError,
    GoneError,
    LimitError,
    NbcodexError,
    ParkedError,
    TransientError,
)
from nbcodex.journal.journal import Journal
from nbcodex.keeper import Keeper
from nbcodex.pacing import backoff
from nbcodex.pacing.ledger import Hold, Ledger, Reservation
from nbcodex.partial import ASKED_ANEW, POSSIBLY_PAID, Partial
from nbcodex.records import Mark, Reply, Request, Resumption, Status
from nbcodex.settings import Settings
from nbcodex.wire import prices, tokens
from nbcodex.wire.attempt import Anew, Completed, Note, Opened, Piece, Text, Thought, Wire

Listener = Callable[[events.Event], None]
Order = Literal["stop", "cancel", "park"]

log = logging.getLogger(__name__)


class Engine:
    """What all requests of a process share: the wire, the ledger and the retry budgets.

    Parameters
    ----------
    wire : Wire
        The way to the server.
    journal : callable
        Returns what survives the process, by the settings: awaited before anything is sent, and
        before anything is told to have ended.
    ledger : Ledger
        Who may send, and when.
    clock : Clock
        The time.
    chance : random.Random
        Source of jitter.
    """

    def __init__(
        self,
        *,
        wire: Wire,
        journal: Callable[[Settings], Journal],
        ledger: Ledger,
        clock: Clock,
        chance: random.Random | None = None,
    ) -> None:
        self.wire = wire
        self.journal = journal
        self.ledger = ledger
        self.clock = clock
        self.chance = chance or random.Random()  # noqa: S311 - jitter, not cryptography
        self.allowance = budget.Budget(clock)
        self._loading: threading.Thread | None = None
        self._budgets: dict[str, backoff.RetryBudget] = {}

    def start(
        self,
        request: Request,
        settings: Settings,
        listener: Listener,
        *,
        resumption: Resumption | None = None,
    ) -> Run:
        """Begin the life of a request, or take one up that is in the journal.

        `listener` hears its events on the loop's thread.
        """
        run = Run(self, request, settings, listener, resumption=resumption)
        run.task = asyncio.get_running_loop().create_task(run.live(), name=f"codex-{request.id}")
        run.task.add_done_callback(run.see_off)
        return run

    def load_prices(self, base_url: str) -> None:
        """Have the price tables ready by the end of the first answer, if they will be needed."""
        if not self._loading and prices.seller(base_url):
            self._loading = threading.Thread(target=prices.load, daemon=True)
            self._loading.start()

    def budget(self, base_url: str) -> backoff.RetryBudget:
        """Return the retry budget that all requests to one server share."""
        return self._budgets.setdefault(base_url, backoff.RetryBudget())


class Run:
    """One request on its way. Its orders are given on the loop's thread."""

    task: asyncio.Task[None]

    def __init__(
        self,
        engine: Engine,
        request: Request,
        settings: Settings,
        listener: Listener,
        *,
        resumption: Resumption | None,
    ) -> None:
        self._engine, self._clock = engine, engine.clock
        self._request, self._settings, self._listener = request, settings, listener
        self._nudge = asyncio.Event()
        self._order: Order | None = None
        self._resumption = resumption
        self._partial = Partial()
        self._keeper = Keeper(engine.journal(settings), request, self._partial, engine.clock)
        self._living = self._probing = False
        self._born_at = self._heard_at = self._clock.now()
        self._attempts, self._waited = 0, 0.0
        self._base_url = ""
        self._model: str | None = request.model
        self._asking = request  # as it is put now
        self._answer: Completed | None = None
        self._reservation: Reservation | None = None
        self._opened = self._simulated = False
        self._announced = 0.0
        self._fault = False

    # Orders.

    def order(self, what: Order) -> None:
        """End the request as its user wishes; the first order counts."""
        if self._order is None:
            self._order = what
            if self._living:
                self.task.cancel()

    def retry_now(self) -> None:
        """Send this one request through a wait, as a probe; without effect when it is not held."""
        self._probing = True
        self._nudge.set()

    # The life.

    async def live(self) -> None:
        """Live from `Queued` to an ending. Every failure ends in an event, never in a traceback."""
        self._living = True
        self._say(events.Queued(**self._now(), model=self._model, patience=self._request.patience))
        ending = await self._ending()
        self._living = False  # what has ended is not to be ended otherwise
        ending = self._accounted(ending)
        await self._keeper.finish(ending)
        self._say(ending)
        if isinstance(ending, events.Cancelled) and (mark := self._partial.mark):
            await self._engine.wire.cancel(self._request, self._settings, mark=mark)

    def _accounted(self, ending: events.Ending) -> events.Ending:
        """Count what the request has used, and warn where its user's budget runs out."""
        reply = ending.reply
        warnings = self._engine.allowance.settle(self._request.id, reply)
        return replace(ending, reply=replace(reply, notes=(*reply.notes, *warnings)))

    async def _ending(self) -> events.Ending:
        """Return what the request comes to."""
        try:
            if self._order:
                raise asyncio.CancelledError
            if reply := self._reused(await self._admitted()):
                return events.Finished(**self._now(), reply=reply)
            self._answer = await self._completed()
            parsed = await self._fitted(self._answer)
        except asyncio.CancelledError:
            if self._order is None:
                raise  # the process ends, and nobody is left to hear of it
            return self._ended_as_ordered()
        except ParkedError as error:
            return events.Parked(**self._now(), error=error, reply=self._reply("parked"))
        except NbcodexError as error:
            if isinstance(error, AnswerError):
                self._partial.note(fitting.UNFIT)
            reply = self._reply("failed", self._answer)
            return events.Failed(**self._now(), error=error, reply=reply)
        reply = self._reply("done", self._answer)
        return events.Finished(**self._now(), reply=replace(reply, parsed=parsed))

    async def _admitted(self) -> Reply | None:
        """Put the request into the journal before anything is sent; return an answer to reuse."""
        self._base_url = self._engine.wire.endpoint(self._request, self._settings).base_url
        if self._resumption is None:
            return await self._keeper.admit(self._base_url)
        if self._resumption.not_before is not None:
            await self._sit_out(self._resumption.not_before)
        await self._keeper.take_up()
        if mark := self._resumption.mark:
            self._partial.take_up(mark, self._resumption.text)
            if self._partial.text:
                self._say(events.Delta(**self._now(), text=self._partial.text))
        return None

    def _reused(self, reply: Reply | None) -> Reply | None:
        """Return an answer of the journal with its object; None where it has another shape now."""
        if reply is None or self._request.schema is None:
            return reply
        try:
            return replace(reply, parsed=shapes.read(self._request.schema, reply.text))
        except shapes.MisfitError:
            return None

    async def _fitted(self, answer: Completed) -> object:
        """Return the object that was asked for, if one was; ask once more where it does not fit.

        Raises
        ------
        NbcodexError
            If there is none in the end.
        """
        fitting.check_given(answer)
        schema = self._request.schema
        if schema is None:
            return None
        try:
            return shapes.read(schema, answer.text)
        except shapes.MisfitError as misfit:
            fitting.check_mendable(self._request, answer, misfit, waited=self._waited)
            repaired = await self._repaired(answer, misfit)
        try:
            return shapes.read(schema, repaired.text)
        except shapes.MisfitError as misfit:
            raise fitting.unfit(schema, misfit, asked="twice") from None

    async def _repaired(self, answer: Completed, misfit: shapes.MisfitError) -> Completed:
        """Ask for another answer, which counts as waiting: it is paid from the patience."""
        began, waited = self._clock.now(), self._waited
        self._asking = shapes.again(self._request, answer.text, misfit)
        self._partial.note(fitting.ASKED_AGAIN)
        self._partial.ask_anew()
        try:
            second = await self._completed()
        except NbcodexError as error:
            raise fitting.unfit(self._request.schema, misfit, asked="once", then=error) from error
        finally:
            self._waited = waited + self._clock.now() - began
        self._answer = replace(second, usage=answer.usage.plus(second.usage))
        fitting.check_given(self._answer)
        return self._answer

    async def _sit_out(self, wall: float) -> None:
        """Wait for a moment that the user chose, which uses up no patience."""
        until = self._clock.now() + wall - self._clock.wall()
        self._say(events.Held(**self._now(), limit=None, resume_at=until, waited=0.0))
        await self._clock.wait(until, unless=self._nudge)

    def _ended_as_ordered(self) -> events.Ending:
        if self._order == "park":
            error = parking.by_user(self._request)
            return events.Parked(**self._now(), error=error, reply=self._reply("parked"))
        if self._order == "cancel":
            return events.Cancelled(**self._now(), reply=self._reply("cancelled"))
        return events.Interrupted(**self._now(), reply=self._reply("interrupted"))

    def see_off(self, task: asyncio.Task[None]) -> None:
        """Make sure of an ending: even a defect of ours leaves nobody waiting."""
        if task.cancelled() or (defect := task.exception()) is None:
            return
        log.error("request %s met a defect", self._request.id, exc_info=defect)
        error = NbcodexError(
            f"A defect in nbcodex: {type(defect).__name__}.", advice="Please report it."
        )
        reply = Reply(id=self._request.id, text=self._partial.text, status="failed")
        self._say(events.Failed(**self._now(), error=error, reply=reply))

    # The attempts.

    async def _completed(self) -> Completed:
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            wait=self._wait,
            stop=self._out_of_patience,
            before_sleep=self._back_off,
            sleep=self._sleep,
            retry_error_callback=self._park,
        )
        completed: Completed = await attempts(self._attempt)
        self._engine.budget(self._base_url).succeed(self._clock.now())
        return completed

    async def _attempt(self) -> Completed:
        """Send the request once, or go on with its durable answer, and read to the end."""
        self._heard_at = self._clock.now()
        if not (self._request.model or self._settings.model):
            await self._keeper.settled()  # for to name one, the server may have to be asked
        self._model = await self._engine.wire.model(self._request, self._settings)
        endpoint = self._engine.wire.endpoint(self._request, self._settings)
        self._base_url = endpoint.base_url  # that of a client made by a factory is known only now
        if mark := self._partial.mark:
            with contextlib.suppress(GoneError):
                return await self._pick_up(mark)
            self._partial.note(ASKED_ANEW)
        return await self._ask(self._engine.wire.bucket(endpoint, self._model))

    async def _pick_up(self, mark: Mark) -> Completed:
        """Go on where the stream broke; that draws on no limit, so nothing is reserved."""
        self._reservation = None
        await self._begin()
        text = self._partial.resume(mark)
        wire = self._engine.wire
        return await self._read(wire.pick_up(self._request, self._settings, mark=mark, text=text))

    async def _ask(self, bucket: str) -> Completed:
        self._partial.ask_anew()
        await self._engine.allowance.admit(
            self._request,
            caps=map(budget.read, self._settings.budgets),
            journal=self._engine.journal(self._settings),
            model=self._model,
            base_url=self._base_url,
        )
        self._reservation = reservation = await self._reserve(bucket)
        await self._begin()
        wire, model = self._engine.wire, self._model or ""
        try:
            return await self._read(wire.stream(self._asking, self._settings, model=model))
        except LimitError:
            raise  # tenacity's callbacks close the bucket before anybody else can be let in
        except BaseException:
            self._engine.ledger.cancel(reservation)
            raise

    async def _begin(self) -> None:
        self._attempts += 1
        self._heard_at, self._opened = self._clock.now(), False
        await self._keeper.begin(self._attempts)
        sent = events.Sent(
            **self._now(),
            attempt=self._attempts,
            model=self._model,
            input_tokens=tokens.of_request(self._asking),
        )
        self._say(sent)
        self._engine.load_prices(self._base_url)

    async def _read(self, pieces: AsyncGenerator[Piece]) -> Completed:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                self._heard_at = self._clock.now()
                match piece:
                    case Opened():
                        self._opened, self._simulated = True, piece.simulated
                        if self._reservation:
                            self._engine.ledger.admit(self._reservation, piece.snapshot)
                    case Mark():
                        self._partial.reach(piece)
                        await self._keeper.remember(piece)
                    case Anew():
                        self._partial.replace()
                    case Text(text):
                        if self._partial.add(text):
                            self._say(events.Restarted(**self._now()))
                        self._say(events.Delta(**self._now(), text=text))
                        self._keeper.keep_soon()
                    case Thought(text):
                        self._say(events.Delta(**self._now(), text=text, reasoning=True))
                    case Note(text):
                        self._partial.note(text)
                    case Completed():
                        return piece
        raise AssertionError("the wire ends a stream with Completed or an error")

    # Waiting.

    async def _reserve(self, bucket: str) -> Reservation:
        """Wait for leave to send."""
        ledger = self._engine.ledger
        ledger.listen(bucket, self._nudge)
        try:
            while True:
                self._nudge.clear()
                if self._probing:
                    self._probing = False
                    return ledger.probe(bucket)
                leave = ledger.reserve(bucket, self._clock.now())
                if isinstance(leave, Reservation):
                    return leave
                await self._held(leave)
                await self._pause(leave.until)
        finally:
            ledger.leave(bucket, self._nudge)

    async def _held(self, hold: Hold) -> None:
        """Say once that the model is closed; park where the wait is longer than the patience."""
        if hold.scouted or hold.until <= self._announced:
            return
        if self._waited + hold.until - self._clock.now() > self._request.patience:
            raise self._parked(parking.closed(hold.limit), hold.until)
        await self._keeper.settled()
        self._announced = hold.until
        self._say(
            events.Held(**self._now(), limit=hold.limit, resume_at=hold.until, waited=self._waited)
        )
        await self._keeper.wait(hold.until, hold.limit)

    async def _pause(self, until: float) -> None:
        before = self._clock.now()
        try:
            await self._clock.wait(until, unless=self._nudge)
        finally:
            self._waited += self._clock.now() - before

    # What tenacity asks.

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Return the seconds to wait after a failed attempt."""
        error, now = _failure(state), self._clock.now()
        stated = None if error.wait is None else backoff.stated(error.wait, self._engine.chance)
        if isinstance(error, LimitError):
            return _exponential(state) if stated is None else stated
        self._waited += now - self._heard_at  # the silence before a fault is a wait, too
        earned = self._engine.budget(self._base_url).spend(now)
        # A server in trouble may ask for too short a wait again and again: it still gets longer.
        return max(stated or 0.0, _exponential(state), earned)

    def _out_of_patience(self, state: tenacity.RetryCallState) -> bool:
        return self._waited + state.upcoming_sleep > self._request.patience

    async def _back_off(self, state: tenacity.RetryCallState) -> None:
        """Announce the wait."""
        error = _failure(state)
        if self._is_in_the_gap(error):
            self._partial.note(POSSIBLY_PAID)
        self._fault = self._reservation is None or not isinstance(error, LimitError)
        self._announced = self._closed_until(error, state.upcoming_sleep)
        self._probing = False
        self._nudge.clear()
        backing_off = events.BackingOff(
            **self._now(),
            error=error,
            attempt=self._attempts,
            resume_at=self._announced,
            waited=self._waited,
        )
        self._say(backing_off)
        await self._keeper.wait(backing_off.resume_at, backing_off.limit)

    def _is_in_the_gap(self, error: TransientError) -> bool:
        """Whether a durable answer may be under way of which nobody knows the name."""
        was_sent = self._opened or getattr(error, "was_sent", False)
        return self._request.durable and self._partial.mark is None and was_sent

    def _park(self, state: tenacity.RetryCallState) -> Completed:
        """Give up for now."""
        error, resume_at = _failure(state), self._clock.now() + state.upcoming_sleep
        if not _is_matter_of_size(error):
            resume_at = self._closed_until(error, state.upcoming_sleep)
        raise self._parked(error, resume_at) from error

    def _closed_until(self, error: TransientError, seconds: float) -> float:
        """Close the bucket where a limit asks for it; return the instant of the next attempt."""
        resume_at = self._clock.now() + seconds
        if self._reservation is None or not isinstance(error, LimitError):
            return resume_at
        return self._engine.ledger.refuse(
            self._reservation, until=resume_at, limit=error.limit
        ).until

    async def _sleep(self, seconds: float) -> None:
        """Wait out a fault. A limit's wait is the bucket's hold, which `_reserve` waits for."""
        if self._fault:
            await self._pause(self._clock.now() + seconds)

    # What is said.

    def _now(self) -> dict[str, Any]:
        """Return what every event says."""
        return {"request_id": self._request.id, "at": self._clock.now()}

    def _say(self, event: events.Event) -> None:
        """Tell the listener; whatever it raises is its own affair."""
        try:
            self._listener(event)
        except Exception:
            log.exception("a listener failed on %s", type(event).__name__)

    def _reply(self, status: Status, completed: Completed | None = None) -> Reply:
        """Return what there is of an answer."""
        usage = self._partial.usage(self._request, status, completed)
        model = (completed and completed.model) or self._model
        return Reply(
            id=self._request.id,
            text=completed.text if completed else self._partial.text,
            status=status,
            model=model,
            usage=usage,
            cost=prices.cost(usage, model, self._base_url),
            attempts=self._attempts,
            waited=self._waited,
            seconds=max(0.0, self._clock.now() - self._born_at - self._waited),
            cut=completed.cut if completed else None,
            images=completed.images if completed else (),
            simulated=self._simulated,
            notes=self._partial.notes,
        )

    def _parked(self, cause: TransientError, resume_at: float) -> ParkedError:
        return parking.for_want_of_patience(
            self._request, cause, resume_at=resume_at, waited=self._waited, clock=self._clock
        )


def _failure(state: tenacity.RetryCallState) -> TransientError:
    """Return the error of the attempt that tenacity asks about."""
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, TransientError)  # noqa: S101 - no other is retried
    return error


def _is_matter_of_size(error: TransientError) -> bool:
    """Whether a smaller request might be let in at once, so that others need not wait."""
    return isinstance(error, LimitError) and error.limit.resource == "tokens"


_exponential = tenacity.wait_exponential_jitter(
    initial=backoff.FIRST, exp_base=backoff.FACTOR, max=backoff.LONGEST, jitter=backoff.FIRST
)
"""Seconds to wait where the server says nothing; the jitter only adds."""
