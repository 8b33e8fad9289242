"""Where an event loop deals with a ledger.

Owns on which thread the ledger's deeds are done, and what becomes of a store that fails. Must not
know what the deeds do.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import TypeVar

from nbcodex.ratelimit.rate_limiter import RateLimiter
from nbcodex.ratelimit.sharing import LimitState
from nbcodex.ratelimit.stores import MemoryStore

T = TypeVar("T")
Operation = Callable[[RateLimiter], T]


class Limiter:
    """A ledger in memory, whose deeds are done at once.

    Attributes
    ----------
    labels : dict
        What people call the buckets, by name.
    sharing_problem : str or None
        Why nothing is shared with other processes, where it should be.
    """

    def __init__(self) -> None:
        self._core = RateLimiter(MemoryStore(), holder=secrets.token_hex(8))
        self.labels: dict[str, str] = {}
        self.sharing_problem: str | None = None

    async def salt(self) -> bytes:
        """Return what makes the buckets' names the same for all who share the ledger."""
        return self._core.salt

    async def run(self, deed: Operation[T]) -> T:
        """Do a deed and return what it returns. It is done even if the waiting task is cancelled.

        Operations are done in the order in which they come.
        """
        return deed(self._core)

    def post(self, deed: Operation[object]) -> None:
        """Do a deed in its turn, and wait for nothing."""
        deed(self._core)

    def waker(self, event: asyncio.Event) -> Callable[[], None]:
        """Return what sets `event`, for the ledger to call."""
        return event.set

    async def limit_states(self, now: float, *more: str) -> dict[str, LimitState]:
        """Return what is known of the buckets that were used here, and of `more`, by label."""
        known = await self.run(lambda ledger: ledger.limit_states(now, *more))
        return {self.labels.get(name, name): each for name, each in known.items()}

    def close(self) -> None:
        """Let go of what is open."""
