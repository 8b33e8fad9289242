"""Waiting for one's turn: the usher gives the loop to others meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from nbcodex.models import Request
from nbcodex.ratelimit.limiter import Limiter
from nbcodex.ratelimit.rate_limiter import Cooldown, RateLimiter
from nbcodex.requests.usher import WORTH, Usher
from tests.virtual import LoopClock, run_virtual

T = TypeVar("T")


class StrictClock(LoopClock):
    """Time that whoever waits for it has to let pass."""

    async def wait(self, until: float, *, unless: asyncio.Event | None = None) -> bool:
        assert until > self.now(), "it looks again and again without giving the loop to others"
        return await super().wait(until, unless=unless)


class Postponing:
    """A ledger that puts its turn off, by less than is worth a word, and once more."""

    def __init__(self, *turns: float) -> None:
        self._turns = list(turns)

    def enqueue(self, *_: object) -> object:
        return SimpleNamespace(bucket="bucket")

    def requeue(self, _: object) -> None:
        pass

    def try_acquire(self, _: object, now: float, **_how: object) -> object:
        while self._turns and self._turns[0] <= now:
            self._turns.pop(0)
        if not self._turns:
            return SimpleNamespace()
        return Cooldown(self._turns[0], queued=True, due_at=self._turns[0])


class PostponingLimiter(Limiter):
    """A limiter with such a ledger."""

    def __init__(self, *turns: float) -> None:
        super().__init__()
        self._postponing: Any = Postponing(*turns)

    async def run(self, deed: Callable[[RateLimiter], T]) -> T:
        return deed(self._postponing)


def test_a_turn_that_is_near_again_and_again_is_waited_for() -> None:
    """Who has waited for long, for a turn that is near, is told so once, and does not spin."""

    async def waits() -> float:
        clock = StrictClock()
        begun = clock.now()
        limiter = PostponingLimiter(begun + 0.9 * WORTH, begun + 1.8 * WORTH)
        told: list[object] = []
        story: Any = SimpleNamespace(
            clock=clock, asking=Request(prompt="?"), waited=0.0, tell=lambda *a, **_: told.append(a)
        )
        usher = Usher(limiter, story, cast(Any, None))
        await usher.reserve("bucket", label="a model")
        assert len(told) == 1
        return clock.now() - begun

    assert abs(run_virtual(waits()) - 1.8 * WORTH) < 1e-3
