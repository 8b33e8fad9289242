"""Where an event loop deals with a ledger.

Owns on which thread the ledger's deeds are done, and what becomes of a store that fails. Must not
know what the deeds do.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nbcodex.errors import ConfigurationError
from nbcodex.ratelimit.limiter import Limiter, Operation
from nbcodex.ratelimit.stores import MemoryStore, Store, StoreError
from nbcodex.runtime.clock import Clock
from nbcodex.settings import Secret

T = TypeVar("T")

BEAT = 1.0
"""Seconds between two signs of life, while anything is under way."""
RETRY = 60.0
"""Seconds after which a store that failed is tried again, at first."""
LINGER = 0.004
"""Seconds that a deed may wait for others which nobody waits for: to wake the thread costs more."""
GATHER = 0.004
"""Seconds between two transactions, while several deeds are waited for at once: one for all of them
spares their thread's quarrel with the event loop's over the interpreter."""
JOIN = 2.0
"""Seconds for which `SharedLimiter.close` waits for what is being done."""

_ALONE = "{} So the pace is this kernel's own: others on the same key are not reckoned with."


@dataclass(slots=True)
class _Job:
    deed: Operation[Any]
    future: asyncio.Future[Any] | None
    result: Any = None
    error: Exception | None = None

    def settle(self) -> None:
        """Hand over what came of it, on the loop."""
        if self.future is None or self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


@dataclass(slots=True)
class _Post:
    """What the thread has for the loop: one call brings all of it."""

    jobs: list[_Job] = field(default_factory=list)
    wakes: list[asyncio.Event] = field(default_factory=list)

    def deliver(self) -> None:
        for job in self.jobs:
            job.settle()
        for event in self.wakes:
            event.set()


class SharedLimiter(Limiter):
    """A ledger that is shared with other processes, on a thread of its own: its store may block.

    Made on the event loop that it serves. A store that fails is replaced by memory, and tried
    again after a minute.

    Parameters
    ----------
    opening : callable
        Opens the store.
    clock : Clock
        Dates the signs of life; read on the thread.
    on_problem : callable
        Told once, on the thread, why nothing is shared.
    """

    def __init__(
        self, opening: Callable[[], Store], *, clock: Clock, on_problem: Callable[[str], None]
    ) -> None:
        super().__init__()
        self._opening, self._clock, self._on_problem = opening, clock, on_problem
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[list[_Job] | None] = queue.SimpleQueue()
        self._later: list[_Job] = []
        self._lingering: asyncio.TimerHandle | None = None
        self._post = _Post()
        self._store: Store | None = None
        self._retry_at, self._retry_after = 0.0, RETRY
        self._beat_at: float | None = None
        self._not_before = 0.0
        self._thread = threading.Thread(target=self._serve, name="nbcodex-ledger", daemon=True)
        self._thread.start()

    async def salt(self) -> bytes:
        """Return what makes the buckets' names the same for all who share the ledger."""
        if self._store is None and self.sharing_problem is None:
            await self.run(lambda _: None)
        return self._core.salt

    async def run(self, deed: Operation[T]) -> T:
        """Do a deed on the thread and return what it returns."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._later.append(_Job(deed, future))
        self._send()
        return await future

    def post(self, deed: Operation[object]) -> None:
        """Do a deed on the thread within moments, and wait for nothing."""
        if not self._later:
            self._lingering = self._loop.call_later(LINGER, self._send)
        self._later.append(_Job(deed, None))

    def _send(self) -> None:
        """Have the thread do what has gathered."""
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        if self._later:
            later, self._later = self._later, []
            self._jobs.put(later)

    def waker(self, event: asyncio.Event) -> Callable[[], None]:
        """Return what sets `event` on the loop, for the ledger to call on the thread."""
        return lambda: self._post.wakes.append(event)

    def close(self) -> None:
        """Leave this process's part to the others, and close the store."""
        self._send()
        self._jobs.put(None)
        self._thread.join(JOIN)

    # On the thread.

    def _serve(self) -> None:
        self._open()
        while (jobs := self._next()) is not None:
            self._perform_all(jobs)
            self._hand_over()
            crowded = sum(job.future is not None for job in jobs) > 1
            self._not_before = time.monotonic() + GATHER if crowded else 0.0
        self._leave()

    def _next(self) -> list[_Job] | None:
        """Return jobs; none where it is time for a sign of life, None at the end."""
        wait = None if self._beat_at is None else max(0.0, self._beat_at - self._clock.now())
        try:
            taken = self._jobs.get(timeout=wait)
        except queue.Empty:
            return []
        if (rest := self._not_before - time.monotonic()) > 0:
            time.sleep(rest)
        while taken is not None and not self._jobs.empty():
            more = self._jobs.get()
            if more is None:
                self._jobs.put(None)  # the end comes next
                break
            taken += more
        return taken

    def _perform_all(self, jobs: list[_Job]) -> None:
        store = self._store
        try:
            with contextlib.nullcontext() if store is None else store.batch():
                for job in jobs:
                    self._perform(job)
                self._beat()
        except StoreError as error:
            if store is self._store:
                self._fall_back(error)

    def _perform(self, job: _Job) -> None:
        now = self._clock.now()
        if self._store is None and now >= self._retry_at:
            self._open()
        try:
            job.result = self._surely(job.deed)
        except Exception as error:  # whatever it is, the thread goes on
            job.error = error
        self._post.jobs.append(job)
        self._beat_at = self._beat_at or now + BEAT

    def _surely(self, deed: Operation[T]) -> T:
        try:
            return deed(self._core)
        except StoreError as error:
            self._fall_back(error)
            return deed(self._core)

    def _beat(self) -> None:
        """Give a sign of life, if one is due; where nothing is under way, none is due any more."""
        if self._beat_at is None or (now := self._clock.now()) < self._beat_at:
            return
        beat = _Job(lambda ledger: ledger.heartbeat(now), None)
        self._perform(beat)
        self._beat_at = now + BEAT if beat.result else None

    def _hand_over(self) -> None:
        post, self._post = self._post, _Post()
        if post.wakes or any(job.future for job in post.jobs):
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                self._loop.call_soon_threadsafe(post.deliver)

    def _open(self) -> None:
        try:
            self._store = self._opening()
        except StoreError as error:
            self._fall_back(error)
        except Exception as error:  # or the thread would end, and everybody wait for ever
            self._fall_back(StoreError(f"The ledger cannot be opened ({type(error).__name__})."))
        else:
            self._core.use_store(self._store)
            self.sharing_problem, self._retry_after = None, RETRY

    def _fall_back(self, error: StoreError) -> None:
        """Go on in memory."""
        store, self._store = self._store, None
        if store is not None:
            with contextlib.suppress(Exception):
                store.close()
        self._core.use_store(MemoryStore())
        self._retry_at = self._clock.now() + self._retry_after
        self._retry_after *= 2  # each try may block those who wait
        if self.sharing_problem is None:
            self.sharing_problem = _ALONE.format(error)
            self._on_problem(self.sharing_problem)

    def _leave(self) -> None:
        if self._store is not None:
            with contextlib.suppress(StoreError):
                self._core.withdraw()
            with contextlib.suppress(Exception):
                self._store.close()


def open_store(
    folder: Path, *, redis_url: Secret | None = None, notify: Callable[[str], None] = lambda _: None
) -> Store:
    """Return the store of all processes that have a folder, or a Redis, in common; it may block.

    Parameters
    ----------
    folder : Path
        Where this machine's buckets are kept.
    redis_url : Secret or None
        The Redis of several hosts; where it cannot be used, this machine's own store stands in.
    notify : callable
        Hears, on the thread that uses the store, that Redis is gone or back.

    Raises
    ------
    StoreError
        If it cannot be used.
    """
    from nbcodex.ratelimit.stores.sqlite import open_in

    if not redis_url:
        return open_in(folder)
    from nbcodex.ratelimit.stores import MemoryStore
    from nbcodex.ratelimit.stores.fallback import Fallback
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
    return Fallback(shared, local, notify=notify)
