"""Virtual time: an event loop on which an hour passes in no time, and a clock that reads it.

The loop never sleeps: where it would, it adds the wait to its own time. It does wait, in real
time, for what `loop.run_in_executor` (so `asyncio.to_thread`) has under way, and for a journal's
thread if `let_time_wait` was told of it. It cannot know about other threads, nor about sockets.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar

from nbcodex.journal.journal import Journal
from nbcodex.runtime.clock import sleep_unless

T = TypeVar("T")

START = 5_000.0
"""The loop's first instant, not zero, so that a forgotten origin shows."""
EPOCH = 1_790_000_000.0
"""The wall clock's reading at the loop's instant 0."""
STUCK = 10.0
"""Real seconds of silence, with no timer set, after which the loop gives up."""


class StuckError(RuntimeError):
    """Everybody waits, and no timer will ever wake anybody."""


class JumpingSelector(selectors.BaseSelector):
    """A selector that moves its loop's time on instead of sleeping."""

    def __init__(self) -> None:
        self._real = selectors.DefaultSelector()
        self.at = START
        self.threads = 0

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Listen to `fileobj`, as the real selector does."""
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Listen to `fileobj` no longer."""
        return self._real.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """Return what is listened to."""
        return self._real.get_map()

    def close(self) -> None:
        """Close the real selector."""
        self._real.close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready; if nothing is, let `timeout` pass at once."""
        if self.threads or timeout is None:
            return self._listen(timeout)
        ready = self._real.select(0)
        if not ready and timeout > 0:
            self.at += timeout
        return ready

    def _listen(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0 if timeout == 0 else STUCK)
        if not ready and timeout is None:
            raise StuckError(f"nothing happened for {STUCK:g} s, and no timer is set")
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is a number."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)
        # Sums of floats miss a timer by less than this, which must not become a wait of its own.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        """Return the loop's own time in seconds."""
        return self._jumping.at

    def run_in_executor(self, executor: Executor | None, func: Any, *args: Any) -> Any:
        """Run `func` in a thread; time stands still until it is done."""
        future = super().run_in_executor(executor, func, *args)
        self._jumping.threads += 1
        future.add_done_callback(self._thread_is_done)
        return future

    @contextmanager
    def stands_still(self) -> Iterator[None]:
        """Let time stand still while a thread of somebody's own is waited for."""
        self._jumping.threads += 1
        try:
            yield
        finally:
            self._jumping.threads -= 1

    def _thread_is_done(self, _: asyncio.Future[Any]) -> None:
        self._jumping.threads -= 1

    async def shutdown_default_executor(self, *args: Any) -> None:
        """Join the threads; time stands still meanwhile."""
        self._jumping.threads += 1
        try:
            await super().shutdown_default_executor(*args)
        finally:
            self._jumping.threads -= 1


class LoopClock:
    """A `nbcodex.runtime.clock.Clock` that reads the running loop: virtual on a virtual loop."""

    def now(self) -> float:
        """Return the running loop's time."""
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        """Return `EPOCH` and the running loop's time."""
        return EPOCH + self.now()

    async def wait(self, until: float, *, unless: asyncio.Event | None = None) -> bool:
        """Wait for `until`; return True as soon as `unless` is set."""
        while (left := until - self.now()) > 0:
            if await sleep_unless(left, unless):
                return True
        return unless is not None and unless.is_set()


def let_time_wait(journal: Journal) -> None:
    """Let virtual time stand still whenever a journal's thread is waited for."""
    run = journal._worker.run

    async def awaited(*args: Any, **options: Any) -> Any:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        with loop.stands_still():
            return await run(*args, **options)

    journal._worker.run = awaited  # type: ignore[method-assign]


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` in virtual time and return what it returns; like `asyncio.run` otherwise."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
