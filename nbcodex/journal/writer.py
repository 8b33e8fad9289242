"""The one thread on which a journal's database lives; jobs come from any loop and any thread.

Owns the thread, and what becomes of it at exit and in a forked child. Must not know what a job
does, nor what it is done to.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from nbcodex.journal.database import Connection, Database
from nbcodex.journal.jobs import Job, Jobs, Level, groups_of, resolve, take
from nbcodex.runtime import fork_safety

T = TypeVar("T")
Outcomes = dict[asyncio.AbstractEventLoop, list[tuple[Any, Any, Exception | None]]]

JOIN = 30.0
"""Seconds for which `Writer.close` waits at most for what is in the queue."""

GATHER = 0.008
"""Seconds between two transactions of a file while jobs come thick and fast: one for all of them
saves the disk's work, and their thread's quarrel with the event loop's over the interpreter. Who
comes alone, or only reads, waits for nobody."""

IN_VAIN = 0.25
"""Seconds for which a file does not rest again when nothing has come while it did: whoever writes
one after another would wait each time."""

PAUSE = 2.0
"""Seconds for which a fork waits at most: longer only if another process holds the file locked."""


class Writer:
    """The thread of a database. It starts when it is first needed."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._reset()
        _writers.add(self)
        fork_safety.attend(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._jobs: Jobs = queue.SimpleQueue()
        self._at_work = threading.Lock()
        self._outcomes: Outcomes = {}

    async def run(
        self, work: Callable[[Connection], T], *, level: Level = Level.WRITE, default: T
    ) -> T:
        """Do `work` on the writer thread and return its result, once that is committed.

        It is done even if the waiting task is cancelled. Where even memory fails it returns
        `default`, and `trouble` says why; only errors of ours are raised.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T, error: Exception | None) -> None:
            self._outcomes.setdefault(loop, []).append((future, result, error))

        if not self._put(Job(work, level, default, settle)):
            return default
        return await future

    def post(self, work: Callable[[Connection], None]) -> None:
        """Do `work` on the writer thread, in its turn, and wait for nothing."""
        self._put(Job(work, Level.WRITE, None, lambda *_: None))

    def ask(self, work: Callable[[Connection], T], *, default: T, level: Level = Level.READ) -> T:
        """Have it done on the writer thread while the calling thread waits; no loop is needed."""
        future: Future[T] = Future()
        job = Job(work, level, default, lambda *outcome: resolve(future, *outcome))
        return future.result() if self._put(job) else default

    def close(self) -> None:
        """Finish what is waiting, and let the file go. A later call opens it again."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._jobs.put(None)
            self._jobs = queue.SimpleQueue()
        if thread is not None:
            thread.join(JOIN)

    def pause(self) -> bool:
        """Before a fork: wait until the thread is out of SQLite, and keep it out."""
        return self._at_work.acquire(timeout=PAUSE)

    def go_on(self) -> None:
        """After a fork, in the parent: the end of a `pause` that succeeded."""
        self._at_work.release()

    def forsake(self) -> None:
        """In a forked child: leave everything to the parent, and begin anew when used."""
        self._database.forsake()
        self._reset()

    def _put(self, job: Job) -> bool:
        """Hand a job to the thread; False where there can be none any more."""
        with self._lock:
            if self._thread is None and not self._start():
                return False
            self._jobs.put(job)
        return True

    def _start(self) -> bool:
        """Start the thread; False once the interpreter is shutting down."""
        thread = threading.Thread(
            target=self._serve, args=(self._jobs,), name="nbcodex-journal", daemon=True
        )
        with contextlib.suppress(RuntimeError):
            thread.start()
            self._thread = thread
        return self._thread is not None

    def _serve(self, jobs: Jobs) -> None:
        wait: float | None = None
        not_before = ended_at = rests_from = 0.0
        while True:
            taken = take(jobs, wait, not_before=not_before)
            began_at = time.monotonic()
            if len(taken) == 1 and not_before <= began_at < not_before + GATHER / 4:
                rests_from = began_at + IN_VAIN
            in_row = rests_from <= began_at < ended_at + 2 * GATHER
            crowded = len(taken) > 1 or in_row
            with self._at_work:
                for group in groups_of([job for job in taken if job is not None]):
                    self._database.perform(group)
                    self._hand_over()
                if None in taken:
                    return self._database.leave()
                wait = self._database.look_after()
            ended_at = time.monotonic()
            gathers = crowded and self._database.folder is not None
            not_before = ended_at + GATHER if gathers else 0.0

    def _hand_over(self) -> None:
        """Give each loop what came of its jobs, in one call."""
        outcomes, self._outcomes = self._outcomes, {}
        for loop, settled in outcomes.items():
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(_deliver, settled)


def _deliver(settled: list[tuple[Any, Any, Exception | None]]) -> None:
    for outcome in settled:
        resolve(*outcome)


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


def _close_all() -> None:
    for writer in list(_writers):
        writer.close()


atexit.register(_close_all)
