"""Observed buckets of one process."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from nbcodex.ratelimit.shares import Shared

T = TypeVar("T")


class MemoryStore:
    """Keeps buckets for as long as it lives. Used from one thread at a time."""

    def __init__(self) -> None:
        self.salt = secrets.token_bytes(16)
        self._kept: dict[str, Shared] = {}

    def deal(self, name: str, deed: Callable[[Shared], T]) -> T:
        """Let `deed` read and change the bucket `name`, and return what it returns."""
        return deed(self._kept.setdefault(name, Shared()))

    def together(self) -> AbstractContextManager[None]:
        """Each deed is done at once, whatever stands around it."""
        return nullcontext()

    def close(self) -> None:
        """There is nothing to let go of."""
