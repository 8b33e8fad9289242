"""Where an event loop deals with a ledger.

Owns on which thread the ledger's deeds are done, and what becomes of a store that fails. Must not
know what the deeds do.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nbcodex.ratelimit.ledger import Ledger
from nbcodex.ratelimit.prior import Known
from nbcodex.ratelimit.stores import Store, StoreError
from nbcodex.ratelimit.stores.memory import MemoryStore
from nbcodex.runtime.clock import Clock

T = TypeVar("T")
Deed = Callable[[Ledger], T]

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
"""Seconds for which `SharedDesk.close` waits for what is being done."""

_ALONE = "{} So the pace is this kernel's own: others on the same key are not reckoned with."


class Desk:
    """A ledger in memory, whose deeds are done at once.

    Attributes
    ----------
    labels : dict
        What people call the buckets, by name.
    trouble : str or None
        Why nothing is shared with other processes, where it should be.
    """

    def __init__(self) -> None:
        self._ledger = Ledger(MemoryStore(), holder=secrets.token_hex(8))
        self.labels: dict[str, str] = {}
        self.trouble: str | None = None

    async def salt(self) -> bytes:
        """Return what makes the buckets' names the same for all who share the ledger."""
        return self._ledger.salt

    async def do(self, deed: Deed[T]) -> T:
        """Do a deed and return what it returns. It is done even if the waiting task is cancelled.

        Deeds are done in the order in which they come.
        """
        return deed(self._ledger)

    def post(self, deed: Deed[object]) -> None:
        """Do a deed in its turn, and wait for nothing."""
        deed(self._ledger)

    def waker(self, event: asyncio.Event) -> Callable[[], None]:
        """Return what sets `event`, for the ledger to call."""
        return event.set

    async def known(self, now: float, *more: str) -> dict[str, Known]:
        """Return what is known of the buckets that were used here, and of `more`, by label."""
        known = await self.do(lambda ledger: ledger.known(now, *more))
        return {self.labels.get(name, name): each for name, each in known.items()}

    def close(self) -> None:
        """Let go of what is open."""


@dataclass(slots=True)
class _Job:
    deed: Deed[Any]
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


class SharedDesk(Desk):
    """A ledger that is shared with other processes, on a thread of its own: its store may block.

    Made on the event loop that it serves. A store that fails is replaced by memory, and tried
    again after a minute.

    Parameters
    ----------
    opening : callable
        Opens the store.
    clock : Clock
        Dates the signs of life; read on the thread.
    tell : callable
        Told once, on the thread, why nothing is shared.
    """

    def __init__(
        self, opening: Callable[[], Store], *, clock: Clock, tell: Callable[[str], None]
    ) -> None:
        super().__init__()
        self._opening, self._clock, self._tell = opening, clock, tell
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
        if self._store is None and self.trouble is None:
            await self.do(lambda _: None)
        return self._ledger.salt

    async def do(self, deed: Deed[T]) -> T:
        """Do a deed on the thread and return what it returns."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._later.append(_Job(deed, future))
        self._send()
        return await future

    def post(self, deed: Deed[object]) -> None:
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
            with contextlib.nullcontext() if store is None else store.together():
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

    def _surely(self, deed: Deed[T]) -> T:
        try:
            return deed(self._ledger)
        except StoreError as error:
            self._fall_back(error)
            return deed(self._ledger)

    def _beat(self) -> None:
        """Give a sign of life, if one is due; where nothing is under way, none is due any more."""
        if self._beat_at is None or (now := self._clock.now()) < self._beat_at:
            return
        beat = _Job(lambda ledger: ledger.beat(now), None)
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
            self._ledger.use(self._store)
            self.trouble, self._retry_after = None, RETRY

    def _fall_back(self, error: StoreError) -> None:
        """Go on in memory."""
        store, self._store = self._store, None
        if store is not None:
            with contextlib.suppress(Exception):
                store.close()
        self._ledger.use(MemoryStore())
        self._retry_at = self._clock.now() + self._retry_after
        self._retry_after *= 2  # each try may block those who wait
        if self.trouble is None:
            self.trouble = _ALONE.format(error)
            self._tell(self.trouble)

    def _leave(self) -> None:
        if self._store is not None:
            with contextlib.suppress(StoreError):
                self._ledger.leave_all()
            with contextlib.suppress(Exception):
                self._store.close()
