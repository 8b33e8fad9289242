"""The one event loop, in one daemon thread, on which all network work runs.

The kernel's main thread only waits and renders, so an interrupt reaches it at once.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")

# On Windows an interrupt does not wake a waiting thread, so no wait is longer than this there.
INTERRUPT_CHECK_INTERVAL_S = 0.1 if os.name == "nt" else None

SHUTDOWN_TIMEOUT_S = 1.0  # for tasks to end when the interpreter does


class EventLoop:
    """An asyncio loop in a daemon thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # A daemon: the interpreter waits for all other threads before it calls `atexit` functions.
        self._thread = threading.Thread(target=self._run, name="nbcodex", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # When the loop stops, the runner cancels all tasks and waits for them.
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()

    @property
    def is_current_thread(self) -> bool:
        """Whether the caller runs on this loop's thread, where waiting would never end."""
        return threading.current_thread() is self._thread

    def call_soon(self, function: Callable[..., object], *args: Any) -> None:
        """Call `function` on the loop soon; return at once."""
        self._loop.call_soon_threadsafe(function, *args)

    def submit(self, coroutine: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        """Run `coroutine` on the loop and return the future of its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel all tasks, give them a moment to end, and stop the thread."""
        if self._thread.is_alive() and not self.is_current_thread:
            self.call_soon(self._loop.stop)
            self._thread.join(SHUTDOWN_TIMEOUT_S)


_lock = threading.Lock()
_shared: EventLoop | None = None


def shared() -> EventLoop:
    """Return this process's loop, started at the first call."""
    global _shared
    with _lock:
        if _shared is None:
            _shared = EventLoop()
            atexit.register(_shared.close)
        return _shared


def run(coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run `coroutine` on this process's loop and return its result; not for the loop's thread."""
    return shared().submit(coroutine).result()


def _reset_after_fork() -> None:
    # A forked child has its parent's memory, but not its threads: it needs a new loop.
    global _lock, _shared
    _lock, _shared = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
