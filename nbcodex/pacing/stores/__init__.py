"""Where observed buckets are kept: in memory, or where several processes share them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from nbcodex.pacing.shares import Shared

T = TypeVar("T")


class StoreError(Exception):
    """The store cannot be used; says why, in a sentence."""


class Store(Protocol):
    """What the ledger asks of a store."""

    salt: bytes
    """Makes the buckets' names, the same for all who share the store."""

    def deal(self, name: str, deed: Callable[[Shared], T]) -> T:
        """Let `deed` read and change the bucket `name`, undisturbed, and return what it returns.

        Raises
        ------
        StoreError
            If the store cannot be used.
        """
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


def open_store(folder: Path) -> Store:
    """Return the store of all processes that have a folder in common; it may block.

    Raises
    ------
    StoreError
        If it cannot be used.
    """
    from nbcodex.pacing.stores.sqlite import open_in

    return open_in(folder)
