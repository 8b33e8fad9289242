"""Virtual time: an event loop on which an hour passes in no time, and a clock that reads it.

Instead of sleeping, the loop adds the wait to its own time. It waits in real time for functions
that run in its executor (`asyncio.to_thread`), and for a journal's thread after
`stop_time_for_journal`. It does not know of other threads, nor of sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar

from nbcodex.journal.journal import Journal

ResultT = TypeVar("ResultT")

# The loop's first instant: not zero, so that a duration and an instant are never equal by chance.
START = 5_000.0
# Seconds since the epoch at the loop's instant 0.
EPOCH = 1_790_000_000.0
# Real seconds without an event or a timer after which the loop raises `StuckError`.
STUCK_TIMEOUT_S = 10.0


class StuckError(RuntimeError):
    """All tasks wait, and no timer is set."""


class JumpingSelector(selectors.BaseSelector):
    """A selector that advances its loop's time instead of sleeping."""

    def __init__(self) -> None:
        self._real = selectors.DefaultSelector()
        self.at = START
        self.threads = 0

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Register `fileobj` with the real selector."""
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Unregister `fileobj` from the real selector."""
        return self._real.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """Return the keys of the real selector."""
        return self._real.get_map()

    def close(self) -> None:
        """Close the real selector."""
        self._real.close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready; if nothing is, advance the time by `timeout`."""
        if self.threads or timeout is None:
            return self._select_in_real_time(timeout)
        ready = self._real.select(0)
        if not ready and timeout > 0:
            self.at += timeout
        return ready

    def _select_in_real_time(
        self, timeout: float | None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0 if timeout == 0 else STUCK_TIMEOUT_S)
        if not ready and timeout is None:
            raise StuckError(f"nothing happened for {STUCK_TIMEOUT_S:g} s, and no timer is set")
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
        """Run `func` in a thread; virtual time stops until it is done."""
        future = super().run_in_executor(executor, func, *args)
        self._jumping.threads += 1
        future.add_done_callback(self._thread_is_done)
        return future

    @contextmanager
    def stopped_time(self) -> Iterator[None]:
        """Stop virtual time, while the body waits for a thread."""
        self._jumping.threads += 1
        try:
            yield
        finally:
            self._jumping.threads -= 1

    def _thread_is_done(self, _: asyncio.Future[Any]) -> None:
        self._jumping.threads -= 1

    async def shutdown_default_executor(self, *args: Any) -> None:
        """Join the threads; virtual time stops meanwhile."""
        self._jumping.threads += 1
        try:
            await super().shutdown_default_executor(*args)
        finally:
            self._jumping.threads -= 1


class LoopClock:
    """A `Clock` that reads the time of the running loop, which is virtual on a `VirtualLoop`."""

    def now(self) -> float:
        """Return the running loop's time."""
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        """Return `EPOCH` and the running loop's time."""
        return EPOCH + self.now()

    async def wait(self, until: float, *, unless: asyncio.Event | None = None) -> bool:
        """Wait for `until`; return True as soon as `unless` is set."""
        unless = unless or asyncio.Event()
        while (left := until - self.now()) > 0 and not unless.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await unless.wait()
        return unless.is_set()


def stop_time_for_journal(journal: Journal) -> None:
    """Stop virtual time whenever the journal's thread is waited for."""
    run = journal._worker.run

    async def run_in_stopped_time(*args: Any, **options: Any) -> Any:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        with loop.stopped_time():
            return await run(*args, **options)

    journal._worker.run = run_in_stopped_time  # type: ignore[method-assign]


def run_virtual(main: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run `main` in virtual time, otherwise as `asyncio.run` does, and return its result."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
