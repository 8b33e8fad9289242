"""The async side of the rate limiter: waits for permits, and reports how each attempt ended.

`RateLimiter` decides; it is asked again here when its decision may have changed.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from nbcodex.models import Limit, LimitSnapshot, Usage
from nbcodex.ratelimit.charge_policy import Need, Permit
from nbcodex.ratelimit.limit_model import Refusal
from nbcodex.ratelimit.rate_limiter import Cooldown, QueueEntry, RateLimiter, Wait
from nbcodex.ratelimit.sharing import LimitState
from nbcodex.ratelimit.stores import MemoryStore
from nbcodex.runtime.clock import Clock

ResultT = TypeVar("ResultT")
Operation = Callable[[RateLimiter], ResultT]
OnWait = Callable[[Wait | Cooldown], Awaitable[None]]

MIN_REPORTED_WAIT_S = 1.0  # shorter waits only space requests out


@dataclass(eq=False)  # an exception has to be hashable
class CooldownTooLongError(Exception):
    """The cooldown ends later than the patience allows."""

    cooldown: Cooldown


@dataclass(slots=True)
class Patience:
    """The seconds that a user accepts to wait in total. Queueing for capacity does not count."""

    max_wait: float
    waited: float = 0.0

    def covers(self, wait: float) -> bool:
        """Return whether another `wait` seconds are acceptable."""
        return self.waited + wait <= self.max_wait


class Waiter:
    """How one request waits. It lives as long as the request, so that a retry keeps its place.

    With `may_probe`, the request is sent once during a cooldown that another process caused and
    that ends later than the patience allows: such a cooldown may be obsolete by now.
    """

    def __init__(self, clock: Clock, patience: Patience, *, may_probe: bool = False) -> None:
        self.clock, self.patience = clock, patience
        self.wake = asyncio.Event()  # set when it is time to ask `RateLimiter` again
        self.permit: Permit | None = None  # the one that `try_acquire` took
        self._entry: QueueEntry | None = None  # its place in the queue
        self._may_probe, self._probes_next = may_probe, False  # whether the next try sends a probe
        self._reported_wait: Wait | None = None  # the last report, if it was of a wait in the queue
        self._reported_cooldown_until = 0.0
        self._quiet_until = 0.0  # no wait is reported before then

    def retry_now(self) -> None:
        """Send the request during a cooldown, as a probe; no effect while it only queues."""
        self._probes_next = self._reported_wait is None
        self.wake.set()

    def record_reported_wait(self, until: float) -> None:
        """Record a cooldown that the caller has reported; ignore an earlier `retry_now`."""
        self._reported_cooldown_until, self._probes_next = until, False
        self.wake.clear()

    async def sleep_until(self, until: float, *, uses_patience: bool = True) -> bool:
        """Wait for an instant; return True as soon as `wake` is set, as by `retry_now`."""
        started_at = self.clock.now()
        try:
            return await self.clock.wait(until, unless=self.wake)
        finally:
            self.patience.waited += (self.clock.now() - started_at) * uses_patience

    # The methods below are used by `Limiter.acquire` alone.

    def reset(self) -> None:
        """Forget the reports of the last wait, and report nothing in the next second."""
        self._reported_wait = None
        self._quiet_until = self.clock.now() + MIN_REPORTED_WAIT_S

    def try_acquire(
        self, limits_id: str, need: Need, wake: Callable[[], None], now: float, core: RateLimiter
    ) -> Wait | Cooldown | None:
        """Take a permit, or return what to wait for."""
        entry = self._entry
        if entry is None or entry.limits_id != limits_id:
            entry = self._entry = core.enqueue(limits_id, need, wake)
        else:
            core.requeue(entry)
        if self._probes_next:
            self._probes_next, self.permit = False, core.probe(entry, now)
            return None
        result = core.try_acquire(entry, now, may_probe=self._may_probe)
        if isinstance(result, Wait | Cooldown):
            return result
        self.permit = result
        # The journal commits first: until `Reservation.mark_sent`, nothing is on its way.
        result.sent_at = math.inf
        return None

    def withdraw(self, core: RateLimiter, now: float) -> None:
        """Leave the queue, and release a permit with which nothing was sent."""
        if self._entry is not None:
            core.dequeue(self._entry)
        if self.permit is not None:
            core.release(self.permit, now)

    async def wait_for_capacity(self, wait: Wait, on_wait: OnWait) -> None:
        """Queue, which uses no patience, until it is time to ask again."""
        now, reported = self.clock.now(), self._reported_wait
        earlier = reported.start_at if reported and reported.start_at is not None else now
        has_moved = wait.start_at is not None and abs(wait.start_at - earlier) > MIN_REPORTED_WAIT_S
        # After a second every wait is reported, even if it is about to end. Otherwise `until` below
        # would have passed already, and `acquire` would loop without yielding.
        if has_moved or not (reported or now < self._quiet_until):
            self._reported_wait = reported = wait
            await on_wait(wait)
        until = wait.until if reported else min(wait.until, self._quiet_until)
        await self.clock.wait(until, unless=self.wake)

    async def wait_out_cooldown(self, cooldown: Cooldown, on_wait: OnWait) -> None:
        """Wait for a cooldown to end, or decide to send a probe."""
        now = self.clock.now()
        if not self.patience.covers(cooldown.until - now):
            if not (self._may_probe and cooldown.inherited):
                raise CooldownTooLongError(cooldown)
            self._may_probe, self._probes_next = False, True
            return
        if cooldown.until > max(self._reported_cooldown_until, now) + MIN_REPORTED_WAIT_S:
            self._reported_cooldown_until = cooldown.until
            self._reported_wait = None
            await on_wait(cooldown)
        await self.sleep_until(cooldown.until)
        self._quiet_until = self.clock.now() + MIN_REPORTED_WAIT_S


class Reservation:
    """A permit in use. Calls take effect in order; of those that end it, only the first counts."""

    def __init__(self, limiter: Limiter, permit: Permit, clock: Clock) -> None:
        self._limiter, self._permit, self._clock = limiter, permit, clock

    def mark_sent(self) -> None:
        """Record that the attempt is sent now."""
        self._permit.sent_at = self._clock.now()

    def observe(self, snapshot: LimitSnapshot | None) -> None:
        """Learn from the headers of an admitted attempt."""
        now = self._clock.now()
        self._limiter.post(lambda core: core.observe(self._permit, snapshot, now))

    def settle(self, usage: Usage) -> None:
        """Report what a finished answer used; unknown usage is treated as `release` does."""
        now = self._clock.now()
        self._limiter.post(lambda core: core.settle(self._permit, usage, now))

    def release(self, *, ended_early: bool = False) -> None:
        """End an attempt of unknown usage, or one whose stream the server ended incomplete."""
        now = self._clock.now()
        self._limiter.post(lambda core: core.release(self._permit, now, ended_early=ended_early))

    async def refuse(
        self, limit: Limit | None, snapshot: LimitSnapshot | None, *, cooldown_until: float
    ) -> float:
        """Begin a cooldown, because a limit has refused the attempt; return its end."""
        now = self._clock.now()
        cooldown = await self._limiter.run_operation(
            lambda core: core.refuse(self._permit, Refusal(cooldown_until, limit, snapshot), now)
        )
        return cooldown.until


class Limiter:
    """Rate limits of this process alone, in memory: operations run at once, on the event loop."""

    def __init__(self) -> None:
        self._core = RateLimiter(MemoryStore(), process_id=secrets.token_hex(8))
        self.labels: dict[str, str] = {}  # what users call the limits, by limits id
        self.sharing_problem: str | None = None  # why limits are not shared although they should be

    async def salt(self) -> bytes:
        """Return the salt of the limits ids, which are hashes: one for all sharing processes."""
        return self._core.store.salt

    async def run_operation(self, operation: Operation[ResultT]) -> ResultT:
        """Run an operation after earlier ones, even if its task is cancelled; return its result."""
        return operation(self._core)

    def post(self, operation: Operation[object]) -> None:
        """Run an operation after earlier ones, without waiting for it."""
        operation(self._core)

    def waker(self, event: asyncio.Event) -> Callable[[], None]:
        """Return a function that sets `event`, for operations to call."""
        return event.set

    async def acquire(
        self, limits_id: str, need: Need, waiter: Waiter, *, label: str, on_wait: OnWait
    ) -> Reservation:
        """Wait for a permit to send one attempt.

        `limits_id` is the hashed name of the limits, `label` their name for users. A retry keeps
        the need of the first attempt. `on_wait` is awaited before a wait of a second or more, and
        again when its end has moved. Raises `CooldownTooLongError` if a cooldown ends later than
        the patience allows, and `TooLargeError` if the limit can never admit the request.
        """
        clock, wake = waiter.clock, self.waker(waiter.wake)
        self.labels[limits_id] = label
        waiter.permit = None
        waiter.reset()
        try:
            while wait := await self.run_operation(
                partial(waiter.try_acquire, limits_id, need, wake, clock.now())
            ):
                if isinstance(wait, Cooldown):
                    await waiter.wait_out_cooldown(wait, on_wait)
                else:
                    await waiter.wait_for_capacity(wait, on_wait)
                waiter.wake.clear()
        except BaseException:
            # Posted behind the operation that may be running on the worker's thread: a permit that
            # it issues at this moment is returned as well.
            self.post(partial(waiter.withdraw, now=clock.now()))
            raise
        finally:
            waiter.reset()
        assert waiter.permit is not None  # noqa: S101 - nothing was left to wait for
        return Reservation(self, waiter.permit, clock)

    async def limit_states(self, now: float, *limits_ids: str) -> dict[str, LimitState]:
        """Return what is known of the limits that were used here, and of `limits_ids`, by label."""
        states = await self.run_operation(lambda core: core.limit_states(now, *limits_ids))
        return {self.labels.get(id_, id_): state for id_, state in states.items()}

    def close(self) -> None:
        """Release open resources."""
