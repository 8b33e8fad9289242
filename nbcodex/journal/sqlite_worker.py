"""The thread of a journal's database: all statements run there, and many share a commit.

Owns the thread, the queue, which jobs share a transaction, and what happens at exit and in a forked
child. Must not know any SQL: jobs use the connection, and the database commits them.
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
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar

from nbcodex.journal.owner import Connection
from nbcodex.runtime.sqlite_files import register_for_forks

if TYPE_CHECKING:
    from nbcodex.journal.database import JournalDatabase

ResultT = TypeVar("ResultT")
DefaultT = TypeVar("DefaultT")

MAX_JOBS_PER_COMMIT = 256

# The least time between two commits while jobs arrive in quick succession: one commit for all of
# them saves the disk's work, and keeps this thread from competing with the event loop for the
# interpreter's lock.
GROUP_INTERVAL_S = 0.008

# After an interval in which no second job arrived, writes are not delayed for this long: a caller
# that awaits one write after another would otherwise wait each time.
INTERVAL_PAUSE_S = 0.25

CLOSE_TIMEOUT_S = 30.0


class Level(IntEnum):
    """What a job needs. Of several jobs in one transaction the highest level counts."""

    READ = 0
    WRITE = 1  # survives the end of the process
    SAFE = 2  # survives a power failure as well
    NO_TRANSACTION = 3  # runs by itself, outside of a transaction


@dataclass(frozen=True, slots=True)
class Job:
    """A function to run on the worker thread, and the receiver of its result or error."""

    work: Callable[[Connection], Any]
    level: Level
    default: Any
    resolve: Callable[[Any, Exception | None], None]


# A future, and its result or error.
_Outcome = tuple[Any, Any, Exception | None]

# Jobs in order; None stops the thread that reads this queue.
JobQueue = queue.SimpleQueue[Job | None]


class SqliteWorker:
    """The thread of a database; it starts when it is first needed."""

    def __init__(self, database: JournalDatabase) -> None:
        self._database = database
        self._reset()
        _workers.add(self)
        register_for_forks(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._jobs: JobQueue = queue.SimpleQueue()
        self.fork_lock = threading.Lock()  # held by the thread while it is in SQLite
        self._outcomes: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}

    async def run(
        self, work: Callable[[Connection], ResultT], *, level: Level = Level.WRITE, default: ResultT
    ) -> ResultT:
        """Run `work` and return its result once it is committed.

        It runs even if the waiting task is cancelled, and before any job that is submitted later.
        Where the database fails, this returns `default`; only errors of this package are raised.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultT] = loop.create_future()

        def resolve(result: ResultT, error: Exception | None) -> None:
            self._outcomes.setdefault(loop, []).append((future, result, error))

        if not self._submit(Job(work, level, default, resolve)):
            return default
        return await future

    def post(self, work: Callable[[Connection], None]) -> None:
        """Run `work` in its turn, without waiting for it."""
        self._submit(Job(work, Level.WRITE, None, lambda *_: None))

    def call(
        self, work: Callable[[Connection], ResultT], *, default: DefaultT, level: Level = Level.READ
    ) -> ResultT | DefaultT:
        """Run `work` while the calling thread waits; needs no event loop."""
        future: Future[ResultT | DefaultT] = Future()
        job = Job(work, level, default, lambda *outcome: _resolve([(future, *outcome)]))
        return future.result() if self._submit(job) else default

    def close(self) -> None:
        """Finish the submitted jobs and close the connection. A later job opens it again."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._jobs.put(None)
            self._jobs = queue.SimpleQueue()
        if thread is not None:
            thread.join(CLOSE_TIMEOUT_S)

    def after_fork_in_child(self) -> None:
        """In a forked child: leave the connection to the parent, and start again when used."""
        self._database.abandon()
        self._reset()

    def _submit(self, job: Job) -> bool:
        """Put a job into the queue; False if no thread can be started any more."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(
                    target=self._serve, args=(self._jobs,), name="nbcodex-journal", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # the interpreter is shutting down
                    return False
                self._thread = thread
            self._jobs.put(job)
        return True

    def _serve(self, jobs: JobQueue) -> None:
        wait: float | None = None
        not_before = ended_at = paused_until = 0.0
        while True:
            taken = take_jobs(jobs, wait, not_before=not_before)
            began_at = time.monotonic()
            if len(taken) == 1 and not_before <= began_at < not_before + GROUP_INTERVAL_S / 4:
                # No second job arrived during the interval.
                paused_until = began_at + INTERVAL_PAUSE_S
            back_to_back = paused_until <= began_at < ended_at + 2 * GROUP_INTERVAL_S
            with self.fork_lock:
                for group in split_into_transactions([job for job in taken if job is not None]):
                    self._database.perform(group)
                    # Each loop gets the outcomes of its jobs with one wake-up for all of them.
                    outcomes, self._outcomes = self._outcomes, {}
                    for loop, of_loop in outcomes.items():
                        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                            loop.call_soon_threadsafe(_resolve, of_loop)
                if None in taken:
                    return self._database.disconnect()
                wait = self._database.maintain()
            ended_at = time.monotonic()
            is_busy = len(taken) > 1 or back_to_back
            delays_next = is_busy and self._database.groups_commits
            not_before = ended_at + GROUP_INTERVAL_S if delays_next else 0.0


def take_jobs(jobs: JobQueue, wait: float | None, *, not_before: float) -> list[Job | None]:
    """Return the jobs in the queue, after at most `wait` seconds.

    Before the instant `not_before` (of `time.monotonic`) no write is begun, so that more of them
    share a transaction. A read never waits, and takes the jobs behind it along.
    """
    taken: list[Job | None] = []
    with contextlib.suppress(queue.Empty):
        taken.append(first := jobs.get(timeout=wait))
        is_write = first is not None and first.level is not Level.READ
        if is_write and (rest := not_before - time.monotonic()) > 0:
            time.sleep(rest)
        while taken[-1] is not None and len(taken) < MAX_JOBS_PER_COMMIT:
            taken.append(jobs.get_nowait())
    return taken


def split_into_transactions(jobs: list[Job]) -> list[list[Job]]:
    """Return the jobs in order, grouped by the transaction that they share."""
    groups: list[list[Job]] = []
    for job in jobs:
        alone = job.level is Level.NO_TRANSACTION
        if not groups or alone or groups[-1][-1].level is Level.NO_TRANSACTION:
            groups.append([])
        groups[-1].append(job)
    return groups


def _resolve(outcomes: list[_Outcome]) -> None:
    """Resolve futures, of asyncio or of a thread, unless they were cancelled meanwhile."""
    for future, result, error in outcomes:
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


_workers: weakref.WeakSet[SqliteWorker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for worker in list(_workers):
        worker.close()
