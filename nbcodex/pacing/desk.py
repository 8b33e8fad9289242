"""Where an event loop deals with a ledger.

Owns on which thread the ledger's deeds are done. Must not know what they do.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import TypeVar

from nbcodex.pacing.ledger import Ledger
from nbcodex.pacing.prior import Known

T = TypeVar("T")


class Desk:
    """A ledger in memory, whose deeds are done at once.

    Parameters
    ----------
    ledger : Ledger
        Who may send, and when.

    Attributes
    ----------
    labels : dict
        What people call the buckets, by name.
    """

    def __init__(self, ledger: Ledger | None = None) -> None:
        self._ledger = ledger or Ledger()
        self.labels: dict[str, str] = {}
        self._salt = secrets.token_bytes(16)

    async def salt(self) -> bytes:
        """Return what makes the buckets' names the same for all who share the ledger."""
        return self._salt

    async def do(self, deed: Callable[[Ledger], T]) -> T:
        """Do a deed and return what it returns. It is done even if the waiting task is cancelled.

        Deeds are done in the order in which they come.
        """
        return deed(self._ledger)

    def post(self, deed: Callable[[Ledger], object]) -> None:
        """Do a deed in its turn, and wait for nothing."""
        deed(self._ledger)

    def waker(self, event: asyncio.Event) -> Callable[[], None]:
        """Return what sets `event`, for the ledger to call."""
        return event.set

    async def known(self, now: float) -> dict[str, Known]:
        """Return what is known of each bucket that this process has used, by its label."""
        known = await self.do(lambda ledger: ledger.known(now))
        return {self.labels.get(name, name): each for name, each in known.items()}
