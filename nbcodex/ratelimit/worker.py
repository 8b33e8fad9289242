"""A limiter shared with other processes; its store may block, so it runs on a worker thread."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from nbcodex.ratelimit.limiter import Limiter, Operation, ResultT
from nbcodex.ratelimit.stores import MemoryStore, Store, StoreError
from nbcodex.runtime.clock import Clock
from nbcodex.settings import Secret

HEARTBEAT_INTERVAL_S = 1.0  # while any request is active
STORE_RETRY_S = 60.0  # until a store that failed is opened again; doubled after each failure
# No task waits for a posted operation, so it may be delayed to share a wake-up of the thread, which
# costs more than the operation itself.
POST_DELAY_S = 0.004
# The time between two transactions while several tasks wait. One transaction for all of them
# reduces the competition for the interpreter's lock, which each SQLite statement releases and has
# to acquire again.
TRANSACTION_INTERVAL_S = 0.004
CLOSE_TIMEOUT_S = 2.0

DAMAGE_NOTICE = "Shared limits that cannot be read were dropped: they are learned again."

_NOT_SHARED = "{} Requests are paced for this kernel alone, not across kernels that share its key."


@dataclass(slots=True)
class _Job:  # an operation for the thread, and its result
    operation: Operation[Any]
    future: asyncio.Future[Any] | None = None  # None if no task waits for it
    result: Any = None
    error: Exception | None = None


def _deliver(jobs: list[_Job], wakes: list[asyncio.Event]) -> None:
    for job in jobs:
        if job.future is None or job.future.done():
            continue
        if job.error is None:
            job.future.set_result(job.result)
        else:
            job.future.set_exception(job.error)
    for event in wakes:
        event.set()


class SharedLimiter(Limiter):
    """Rate limits that are shared with other processes. Created on the event loop that it serves.

    A store that fails is replaced by memory, and `open_store` is called again after a minute;
    `on_problem` is called once, on the thread, with the reason.
    """

    def __init__(
        self, open_store: Callable[[], Store], *, clock: Clock, on_problem: Callable[[str], None]
    ) -> None:
        super().__init__()
        self._open_store, self._clock, self._on_problem = open_store, clock, on_problem
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[list[_Job] | None] = queue.SimpleQueue()  # None: close
        self._unsent: list[_Job] = []  # jobs that are not in the queue yet
        self._timer: asyncio.TimerHandle | None = None  # calls `_send`
        # Used on the thread only.
        self._done: list[_Job] = []  # results that the loop has not received yet
        self._wakes: list[asyncio.Event] = []  # to be set on the loop
        self._store: Store | None = None  # None while memory replaces it
        self._retry_at, self._retry_after = 0.0, STORE_RETRY_S
        self._heartbeat_at: float | None = None  # None while no request is active
        self._next_transaction_at = 0.0  # of `time.monotonic`
        self._thread = threading.Thread(target=self._serve, name="nbcodex-limiter", daemon=True)
        self._thread.start()

    async def salt(self) -> bytes:
        """Return the salt of the limits ids, which all processes share."""
        if self._store is None and self.sharing_problem is None:
            await self.run_operation(lambda _: None)  # waits until the store is open
        return self._core.store.salt

    async def run_operation(self, operation: Operation[ResultT]) -> ResultT:
        """Run an operation on the thread and return its result."""
        future: asyncio.Future[ResultT] = self._loop.create_future()
        self._unsent.append(_Job(operation, future))
        self._send()
        return await future

    def post(self, operation: Operation[object]) -> None:
        """Run an operation on the thread within milliseconds, without waiting for it."""
        if not self._unsent:
            self._timer = self._loop.call_later(POST_DELAY_S, self._send)
        self._unsent.append(_Job(operation))

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._unsent:
            jobs, self._unsent = self._unsent, []
            self._queue.put(jobs)

    def waker(self, event: asyncio.Event) -> Callable[[], None]:
        """Return a function that sets `event` on the loop, for operations to call on the thread."""
        return lambda: self._wakes.append(event)

    def close(self) -> None:
        """Remove this process from the shared limit models and close the store."""
        self._send()
        self._queue.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)

    # The methods below run on the thread.

    def _serve(self) -> None:
        self._open()
        while (jobs := self._next_jobs()) is not None:
            self._perform_all(jobs)
            done, self._done = [job for job in self._done if job.future], []
            wakes, self._wakes = self._wakes, []
            if done or wakes:  # in one call, because each call wakes the loop
                with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                    self._loop.call_soon_threadsafe(_deliver, done, wakes)
            is_busy = sum(job.future is not None for job in jobs) > 1
            # A single operation is not delayed for others to join: it takes 0.2 ms instead of 3.
            self._next_transaction_at = time.monotonic() + TRANSACTION_INTERVAL_S * is_busy
        if self._store is not None:
            with contextlib.suppress(StoreError):
                self._core.remove_process()
            with contextlib.suppress(Exception):
                self._store.close()

    def _next_jobs(self) -> list[_Job] | None:
        """Return jobs; an empty list if a heartbeat is due, and None to end."""
        due_at = self._heartbeat_at
        timeout = None if due_at is None else max(0.0, due_at - self._clock.now())
        try:
            jobs = self._queue.get(timeout=timeout)
        except queue.Empty:
            return []
        # Even a sleep of 0 s releases the interpreter's lock, which costs 0.1 ms.
        if (pause := self._next_transaction_at - time.monotonic()) > 0:
            time.sleep(pause)
        while jobs is not None and not self._queue.empty():
            more = self._queue.get()
            if more is None:
                self._queue.put(None)  # the next call returns it
                break
            jobs += more
        return jobs

    def _perform_all(self, jobs: list[_Job]) -> None:
        store = self._store  # an operation may replace it
        try:
            with contextlib.nullcontext() if store is None else store.batch():
                for job in jobs:
                    self._perform(job)
                now = self._clock.now()
                if self._heartbeat_at is not None and now >= self._heartbeat_at:
                    renewal = _Job(lambda core: core.heartbeat(now))
                    self._perform(renewal)
                    self._heartbeat_at = now + HEARTBEAT_INTERVAL_S if renewal.result else None
        except StoreError as error:
            if store is self._store:
                self._fall_back(error)

    def _perform(self, job: _Job) -> None:
        now = self._clock.now()
        if self._store is None and now >= self._retry_at:
            self._open()
        try:
            try:
                job.result = job.operation(self._core)
            except StoreError as error:
                self._fall_back(error)
                job.result = job.operation(self._core)
        except Exception as error:  # a defect in one operation must not end the thread
            job.error = error
        self._done.append(job)
        self._heartbeat_at = self._heartbeat_at or now + HEARTBEAT_INTERVAL_S

    def _open(self) -> None:
        try:
            self._store = self._open_store()
        except Exception as error:  # if the thread ended here, all requests would wait for ever
            if not isinstance(error, StoreError):
                error = StoreError(f"The shared limits cannot be opened ({type(error).__name__}).")
            self._fall_back(error)
        else:
            self._core.store = self._store
            self.sharing_problem, self._retry_after = None, STORE_RETRY_S

    def _fall_back(self, error: StoreError) -> None:
        store, self._store = self._store, None
        if store is not None:
            with contextlib.suppress(Exception):
                store.close()
        self._core.store = MemoryStore()
        self._retry_at = self._clock.now() + self._retry_after
        self._retry_after *= 2  # opening may block, while requests wait
        if self.sharing_problem is None:
            self.sharing_problem = _NOT_SHARED.format(error)
            self._on_problem(self.sharing_problem)


def open_store(
    folder: Path, *, redis_url: Secret | None = None, notify: Callable[[str], None] = lambda _: None
) -> Store:
    """Return the store in a folder, or in Redis, that other processes share; this may block.

    While Redis cannot be used, the folder's store replaces it. `notify` is called when Redis is
    lost or back, and once when a damaged limit model is dropped. Raises `StoreError` if no store
    can be opened.
    """
    from nbcodex.ratelimit.stores.sqlite import open_in

    report_damage = cache(partial(notify, DAMAGE_NOTICE))  # its second call does nothing
    local: Store = MemoryStore()
    try:
        local = open_in(folder)
    except StoreError:
        if not redis_url:
            raise
    local.on_damage = report_damage
    if not redis_url:
        return local
    from nbcodex.ratelimit.stores.redis import FallbackStore, RedisStore

    shared = RedisStore(redis_url)
    shared.on_damage = report_damage
    return FallbackStore(shared, local, notify=notify)
