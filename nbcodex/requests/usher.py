"""The ledger's side of one request: waits for its turn to send, and tells what came of it.

Owns the place in the row, the patience that holds use up, and Retry now. Must not know attempts,
nor what an answer says.
"""

from __future__ import annotations

import asyncio
import math
from functools import partial

from nbcodex import events
from nbcodex.errors import LimitError
from nbcodex.models import LimitSnapshot, Request, Usage
from nbcodex.openai_api import pricing
from nbcodex.ratelimit.charge_policy import Cost, Permit
from nbcodex.ratelimit.limiter import Limiter
from nbcodex.ratelimit.rate_limiter import Cooldown, QueueEntry, RateLimiter
from nbcodex.requests import parking
from nbcodex.requests.keeper import Keeper
from nbcodex.requests.story import Story

WORTH = 1.0
"""Seconds that a wait must last before anybody hears of it: spacing requests out is no news."""

ASSUMED = 1_000
"""Output that a request is reckoned with which names no bound; what is used of it is learnt."""


class Usher:
    """Leads one request to the server, again and again if need be.

    Parameters
    ----------
    limiter : Desk
        Where the core is asked.
    story : Story
        Whose waits count, and are told.
    keeper : Keeper
        Notes the waits.
    resumed : bool
        Whether its user has taken it up again, and so wants to know whether it can go now.
    """

    def __init__(
        self, limiter: Limiter, story: Story, keeper: Keeper, *, resumed: bool = False
    ) -> None:
        self._limiter, self._story, self._keeper = limiter, story, keeper
        self._clock = story.clock
        self._nudge = asyncio.Event()
        self._ticket: QueueEntry | None = None
        self._given: Permit | None = None
        self._probing = self._queued = False
        self._resumed = resumed
        self._due: float | None = None
        self._announced = self._quiet_until = 0.0

    @property
    def asked(self) -> bool:
        """Whether the attempt under way draws on a limit."""
        return self._given is not None

    def hurry(self) -> None:
        """Send the request through a wait, as a probe; without effect when it is not held."""
        self._probing = not self._queued
        self._nudge.set()

    # To the server.

    async def salt(self) -> bytes:
        """Return what buckets are to be named with."""
        return await self._limiter.salt()

    async def reserve(self, bucket: str, *, label: str) -> None:
        """Wait for leave to send.

        Parameters
        ----------
        bucket, label : str
            The limits that it draws on: their name, and what people call them.

        Raises
        ------
        ParkedError
            If the hold is longer than the patience.
        TooLargeError
            If the request is larger than the limit.
        """
        self._given, self._quiet_until = None, self._clock.now() + WORTH
        self._limiter.labels[bucket] = label
        try:
            while hold := await self._limiter.run(partial(self._ask, bucket, self._clock.now())):
                await (self._queue(hold) if hold.queued else self._endure(hold))
                self._nudge.clear()
        except BaseException:
            # In its turn, so that leave which is being given just now is given back, too.
            self._limiter.post(partial(self._withdraw, self._clock.now()))
            raise
        finally:
            self._queued, self._due = False, None

    def _ask(self, bucket: str, now: float, core: RateLimiter) -> Cooldown | None:
        ticket = self._ticket
        if ticket is None or ticket.bucket != bucket:
            wake = self._limiter.waker(self._nudge)
            ticket = self._ticket = core.enqueue(bucket, cost_of(self._story.asking), wake)
        else:
            core.requeue(ticket)
        if self._probing:
            self._probing, self._given = False, core.probe(ticket, now)
            return None
        leave = core.try_acquire(ticket, now, may_probe=self._resumed)
        if isinstance(leave, Cooldown):
            return leave
        self._given = leave
        leave.sent_at = math.inf  # it has yet to be put down in the journal
        return None

    def _withdraw(self, now: float, core: RateLimiter) -> None:
        if self._ticket is not None:
            core.dequeue(self._ticket)
        if self._given is not None:
            core.release(self._given, now)

    # Waiting.

    async def _queue(self, hold: Cooldown) -> None:
        """Wait for capacity, which is nobody's fault and uses up no patience."""
        if self._is_news(hold):
            self._queued, self._due = True, hold.due_at
            waited = self._story.waited
            self._story.tell(
                events.CoolingDown, limit=None, resume_at=hold.due_at, waited=waited, queued=True
            )
        until = hold.until if self._queued else min(hold.until, self._quiet_until)
        await self._clock.wait(until, unless=self._nudge)

    def _is_news(self, hold: Cooldown) -> bool:
        """Whether a wait for capacity is to be told: it lasts, or its end is known better now."""
        # However near its end: until it is told, whoever waits looks up when the silence is over.
        if not self._queued and self._clock.now() >= self._quiet_until:
            return True
        if hold.due_at is None:
            return False
        known = self._clock.now() if self._due is None else self._due
        return abs(hold.due_at - known) > WORTH

    async def _endure(self, hold: Cooldown) -> None:
        """Wait for a hold to end; park where it is longer than the patience."""
        if not self._story.endures(hold.until):
            if self._resumed and hold.inherited:
                # Hours may have passed since another kernel was refused: the server is asked once.
                self._resumed, self._probing = False, True
                return
            raise self._story.parked(parking.closed(hold.limit), hold.until)
        if hold.until > max(self._announced, self._clock.now()) + WORTH:
            await self._announce(hold)
        await self.pause(hold.until)
        self._quiet_until = self._clock.now() + WORTH

    async def _announce(self, hold: Cooldown) -> None:
        """Say until when the model is closed."""
        await self._keeper.settled()
        self._announced, self._queued, self._due = hold.until, False, None
        self._story.tell(
            events.CoolingDown, limit=hold.limit, resume_at=hold.until, waited=self._story.waited
        )
        await self._keeper.wait(hold.until, hold.limit)

    async def pause(self, until: float) -> None:
        """Wait for an instant, at the cost of patience."""
        before = self._clock.now()
        try:
            await self._clock.wait(until, unless=self._nudge)
        finally:
            self._story.waited += self._clock.now() - before

    def calm(self, announced: float) -> None:
        """Forget a Retry now that came too late; the wait until `announced` has been told."""
        self._announced, self._probing = announced, False
        self._nudge.clear()

    async def sit_out(self, until: float) -> None:
        """Wait for an instant that the user chose, which uses up no patience."""
        self._story.tell(events.CoolingDown, limit=None, resume_at=until, waited=0.0)
        await self._clock.wait(until, unless=self._nudge)

    # What came of it.

    def forgo(self) -> None:
        """The next attempt draws on no limit."""
        self._given = None

    def sent(self) -> None:
        """The request goes now."""
        if self._given:
            self._given.sent_at = self._clock.now()

    def admit(self, snapshot: LimitSnapshot | None) -> None:
        """The server let the request in."""
        if given := self._given:
            now = self._clock.now()
            self._limiter.post(lambda core: core.observe(given, snapshot, now))

    def settle(self, usage: Usage) -> None:
        """The answer is complete, or was broken off by its user; without usage, nobody knows."""
        if given := self._given:
            now = self._clock.now()
            if usage.output_tokens is None:
                self._limiter.post(lambda core: core.release(given, now))
            else:
                self._limiter.post(lambda core: core.settle(given, usage, now))

    async def refuse(self, error: LimitError, *, until: float) -> float:
        """A limit refused the request: close the bucket; return until when it is closed."""
        if (given := self._given) is None:
            return until
        now = self._clock.now()
        hold = await self._limiter.run(
            lambda core: core.refuse(
                given, until=until, limit=error.limit, snapshot=error.snapshot, now=now
            )
        )
        return hold.until


def cost_of(request: Request) -> Cost:
    """Return what a request asks of the limits."""
    output = ASSUMED if request.max_output is None else request.max_output
    return Cost(float(pricing.estimate_request_tokens(request)), float(output))
