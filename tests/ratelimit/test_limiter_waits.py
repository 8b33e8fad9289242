"""How the limiter waits between its calls of the core."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

from nbcodex.ratelimit.charge_policy import Need
from nbcodex.ratelimit.limiter import MIN_REPORTED_WAIT_S, Limiter, Patience, Waiter
from nbcodex.ratelimit.rate_limiter import Cooldown, RateLimiter, Wait
from tests.virtual import LoopClock, run_virtual

ResultT = TypeVar("ResultT")


class StrictClock(LoopClock):
    """A clock that fails if a wait is for an instant that has passed."""

    async def wait(self, until: float, *, unless: asyncio.Event | None = None) -> bool:
        assert until > self.now(), "it would spin without yielding to other tasks"
        return await super().wait(until, unless=unless)


class PostponingCore:
    """A rate limiter that postpones a request several times, each by less than is reported."""

    def __init__(self, *turns: float) -> None:
        self._turns = list(turns)

    def enqueue(self, *_: object) -> object:
        return SimpleNamespace(limits_id="name")

    def requeue(self, _: object) -> None:
        pass

    def try_acquire(self, _: object, now: float, **_how: object) -> object:
        while self._turns and self._turns[0] <= now:
            self._turns.pop(0)
        if not self._turns:
            return SimpleNamespace()
        return Wait(self._turns[0], start_at=self._turns[0])


class PostponingLimiter(Limiter):
    """A limiter with such a core."""

    def __init__(self, *turns: float) -> None:
        super().__init__()
        self._postponing: Any = PostponingCore(*turns)

    async def run_operation(self, operation: Callable[[RateLimiter], ResultT]) -> ResultT:
        return operation(self._postponing)


def test_short_waits_that_add_up_are_reported_once_without_spinning() -> None:
    """A request that has waited for a second is reported, however near its turn is."""

    async def waits() -> float:
        clock = StrictClock()
        started_at = clock.now()
        limiter = PostponingLimiter(
            started_at + 0.9 * MIN_REPORTED_WAIT_S, started_at + 1.8 * MIN_REPORTED_WAIT_S
        )
        reported: list[Wait | Cooldown] = []

        async def report(wait: Wait | Cooldown) -> None:
            reported.append(wait)

        waiter = Waiter(clock, Patience(600.0))
        await limiter.acquire("name", Need(1, 1), waiter, label="a model", on_wait=report)
        assert len(reported) == 1
        assert waiter.patience.waited == 0
        return clock.now() - started_at

    assert abs(run_virtual(waits()) - 1.8 * MIN_REPORTED_WAIT_S) < 1e-3
