"""A store that other machines share, as long as it can be used; this machine's own meanwhile.

Owns when to turn from one to the other. Must not know what stands behind either. Looking whether
the shared one is back is done on a thread of its own: nobody waits for it for more than a moment.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

from nbcodex.ratelimit.sharing import LEASE, SharedModel
from nbcodex.ratelimit.stores import Store, UnreachableError

T = TypeVar("T")

FIRST, GRACE = 1.0, 0.5
"""Seconds that a deed waits for the shared store: at first, and when it has just gone."""
STAY = LEASE + 1.0
"""Seconds for which one who has fallen back stays: meanwhile its lease there runs out, so what it
had under way there is counted no more."""
LOOK, RARELY = 0.05, 5.0
"""Seconds between two looks at the shared store: the first, and at most."""
QUIET = 60.0
"""Seconds in which a store that comes and goes is spoken of once."""


class Remote(Store, Protocol):
    """A store on another machine."""

    def check(self) -> None:
        """Connect anew; raise an `UnreachableError` if it cannot be used."""
        ...


class Fallback:
    """Keeps buckets in a shared store, or else in a local one. Used from one thread at a time.

    Parameters
    ----------
    shared : Remote
        The store that other machines share.
    local : Store
        What stands in for it.
    notify : callable
        Told once that it is gone, and that it is back.
    stay : float
        Seconds for which one who has fallen back stays.
    """

    def __init__(
        self, shared: Remote, local: Store, *, notify: Callable[[str], None], stay: float = STAY
    ) -> None:
        self.salt = shared.salt
        self._shared, self._local, self._notify, self._stay = shared, local, notify, stay
        self._there, self._closed = threading.Event(), threading.Event()
        self._seeker: threading.Thread | None = None
        self._reason = "Redis does not answer."
        self._stays_until = self._quiet_until = 0.0
        self._grace = FIRST
        self._away = self._told = False

    def transaction(self, name: str, deed: Callable[[SharedModel], T]) -> T:
        """Let `deed` read and change the bucket `name`, where that can be done now."""
        for _ in range(1 if self._away else 2):
            if not self._is_ready():
                break
            try:
                result = self._shared.transaction(name, deed)
            except UnreachableError as error:
                self._reason = str(error)
                self._there.clear()
            else:
                self._come_back()
                return result
        self._fall_back()
        return self._local.transaction(name, deed)

    def batch(self) -> AbstractContextManager[None]:
        """Each deed is done by itself: where one ends in, the next may not."""
        return nullcontext()

    def close(self) -> None:
        """Close both for good."""
        self._closed.set()
        if self._seeker is not None:
            self._seeker.join()
        self._shared.close()
        self._local.close()

    def _is_ready(self) -> bool:
        """Return whether the shared store can be used; wait a moment if it has just gone."""
        if self._away:
            return self._there.is_set() and time.monotonic() >= self._stays_until
        if self._there.is_set():
            return True
        self._seek()
        found, self._grace = self._there.wait(self._grace), GRACE
        return found

    def _fall_back(self) -> None:
        self._seek()
        if self._away:
            return
        now = time.monotonic()
        self._away, self._stays_until = True, now + self._stay
        if now >= self._quiet_until:
            self._told, self._quiet_until = True, now + QUIET
            self._notify(
                f"{self._reason} Until it can be used, this machine shares the limits with no "
                "other, and may be refused more often."
            )

    def _come_back(self) -> None:
        if not self._away:
            return
        self._away = False
        if self._told:
            self._told = False
            self._notify("Redis can be used again: the limits are shared with the other machines.")

    # On a thread of its own.

    def _seek(self) -> None:
        """Look for the shared store until it is there."""
        if not self._there.is_set() and not (self._seeker and self._seeker.is_alive()):
            self._seeker = threading.Thread(target=self._look, name="nbcodex-redis", daemon=True)
            self._seeker.start()

    def _look(self) -> None:
        pause = LOOK
        while not self._closed.is_set():
            try:
                self._shared.check()
            except UnreachableError as error:
                self._reason = str(error)
            else:
                self._there.set()
                return
            self._closed.wait(pause)
            pause = min(2 * pause, RARELY)
