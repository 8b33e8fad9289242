"""Where observed buckets are kept: in memory, or where several processes or hosts share them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from nbcodex.errors import ConfigurationError
from nbcodex.ratelimit.shares import Shared

if TYPE_CHECKING:
    from nbcodex.settings import Secret

T = TypeVar("T")

COMMON_SALT = b"nbcodex, shared by hosts"
"""Names buckets where hosts share them: nothing has to be agreed upon, and what reaches Redis is a
slow hash of such a name."""


class StoreError(Exception):
    """The store cannot be used; says why, in a sentence without a secret."""


class UnreachableError(StoreError):
    """A store on another machine cannot be used now."""


class Store(Protocol):
    """What the ledger asks of a store."""

    salt: bytes
    """Makes the buckets' names, the same for all who share the store."""

    def deal(self, name: str, deed: Callable[[Shared], T]) -> T:
        """Let `deed` read and change the bucket `name`, undisturbed, and return what it returns.

        It may be done more than once, each time on other numbers; only the last time counts.

        Raises
        ------
        StoreError
            If the store cannot be used.
        """
        ...

    def together(self) -> AbstractContextManager[None]:
        """Return a block in which deeds may share one write.

        Raises
        ------
        StoreError
            At its end, if that fails: none of them is kept then.
        """
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


def open_store(
    folder: Path, *, redis_url: Secret | None = None, say: Callable[[str], None] = lambda _: None
) -> Store:
    """Return the store of all processes that have a folder, or a Redis, in common; it may block.

    Parameters
    ----------
    folder : Path
        Where this machine's buckets are kept.
    redis_url : Secret or None
        The Redis of several hosts; where it cannot be used, this machine's own store stands in.
    say : callable
        Hears, on the thread that uses the store, that Redis is gone or back.

    Raises
    ------
    StoreError
        If it cannot be used.
    """
    from nbcodex.ratelimit.stores.sqlite import open_in

    if not redis_url:
        return open_in(folder)
    from nbcodex.ratelimit.stores.fallback import Fallback
    from nbcodex.ratelimit.stores.memory import MemoryStore
    from nbcodex.ratelimit.stores.redis import RedisStore

    try:
        shared = RedisStore(redis_url)
    except ConfigurationError as error:
        raise StoreError(str(error)) from None
    local: Store
    try:
        local = open_in(folder)
    except StoreError:
        local = MemoryStore()
    return Fallback(shared, local, say=say)
