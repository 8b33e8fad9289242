"""A store that other machines share, for as long as it can be used; this machine's own meanwhile.

Owns when to change from one to the other. Must not know what stands behind either.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from nbcodex.ratelimit.sharing import LEASE_S, SharedModel
from nbcodex.ratelimit.stores import ResultT, Store, UnreachableError

# How long an operation waits for the shared store: for the first connection, and when it has just
# been lost.
CONNECT_WAIT_S, RECONNECT_WAIT_S = 1.0, 0.5
# After a change to the local store, stay there for so long: meanwhile the lease in the shared one
# expires, so what this process had in flight there does not count twice.
MIN_LOCAL_S = LEASE_S + 1.0
# Between two looks whether the shared store is back: at first, and at most.
FIRST_CHECK_INTERVAL_S, MAX_CHECK_INTERVAL_S = 0.05, 5.0
# A store that comes and goes is reported once in so long.
NOTICE_INTERVAL_S = 60.0


class RemoteStore(Store, Protocol):
    """A store on another machine."""

    def reconnect(self) -> None:
        """Connect anew; raise an `UnreachableError` if it cannot be used."""
        ...


class FallbackStore(Store):
    """Keeps models in a shared store, or else in a local one. Used from one thread at a time.

    `notify` is called when the shared store is lost, and when it is back.
    """

    def __init__(self, shared: RemoteStore, local: Store, *, notify: Callable[[str], None]) -> None:
        self.salt = shared.salt
        self._shared, self._local, self._notify = shared, local, notify
        self._reachable, self._closed = threading.Event(), threading.Event()
        self._checker: threading.Thread | None = None
        self._reason = "Redis does not answer."
        self._stay_until = self._quiet_until = 0.0
        self._patience = CONNECT_WAIT_S
        self._is_local = self._is_reported = False

    def transaction(self, name: str, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        """Let `operation` read and change the model `name`, in the store that can be used."""
        # Once more after a lost connection: the shared store returns the result of an operation
        # that it has done without its answer having arrived.
        for _ in range(1 if self._is_local else 2):
            if not self._is_ready():
                break
            try:
                result = self._shared.transaction(name, operation)
            except UnreachableError as error:
                self._reason = str(error)
                self._reachable.clear()
            else:
                self._use_shared()
                return result
        self._use_local()
        return self._local.transaction(name, operation)

    def close(self) -> None:
        """Close both for good."""
        self._closed.set()
        if self._checker is not None:
            self._checker.join()
        self._shared.close()
        self._local.close()

    def _is_ready(self) -> bool:
        if self._is_local:
            return self._reachable.is_set() and time.monotonic() >= self._stay_until
        if self._reachable.is_set():
            return True
        self._start_checks()
        is_back, self._patience = self._reachable.wait(self._patience), RECONNECT_WAIT_S
        return is_back

    def _use_local(self) -> None:
        self._start_checks()
        if self._is_local:
            return
        now = time.monotonic()
        self._is_local, self._stay_until = True, now + MIN_LOCAL_S
        if now >= self._quiet_until:
            self._is_reported, self._quiet_until = True, now + NOTICE_INTERVAL_S
            self._notify(
                f"{self._reason} Until it can be used, this machine does not share the limits with "
                "others, and may be refused more often."
            )

    def _use_shared(self) -> None:
        self._is_local, was_reported = False, self._is_local and self._is_reported
        if was_reported:
            self._is_reported = False
            self._notify("Redis can be used again: the limits are shared with the other machines.")

    # On a thread of its own, so that no request waits for a check.

    def _start_checks(self) -> None:
        is_checking = self._checker is not None and self._checker.is_alive()
        if not self._reachable.is_set() and not is_checking:
            self._checker = threading.Thread(target=self._check, name="nbcodex-redis", daemon=True)
            self._checker.start()

    def _check(self) -> None:
        interval = FIRST_CHECK_INTERVAL_S
        while not self._closed.is_set():
            try:
                self._shared.reconnect()
            except UnreachableError as error:
                self._reason = str(error)
            else:
                self._reachable.set()
                return
            self._closed.wait(interval)
            interval = min(2 * interval, MAX_CHECK_INTERVAL_S)
