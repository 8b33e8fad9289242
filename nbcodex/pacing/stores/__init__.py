"""Where observed buckets are kept: in memory, or where several processes share them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from nbcodex.pacing.shares import Shared

T = TypeVar("T")


class Store(Protocol):
    """What the ledger asks of a store."""

    def deal(self, name: str, deed: Callable[[Shared], T]) -> T:
        """Let `deed` read and change the bucket `name`, undisturbed, and return what it returns."""
        ...
