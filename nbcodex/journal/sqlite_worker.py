"""The thread of a journal's database: all statements run there, and many share a commit.

Decides which jobs share a transaction, and what happens at exit and in a forked child. The jobs
contain the SQL, and `JournalDatabase` commits it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from enum import IntEnum
from types import NoneType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from nbcodex.journal.owner import Connection
from nbcodex.runtime.sqlite_files import register_for_forks

if TYPE_CHECKING:
    from nbcodex.journal.database import JournalDatabase

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")
DefaultT = TypeVar("DefaultT")
Work = Callable[[Connection], ResultT]  # what a job does

MAX_JOBS_PER_COMMIT = 256

# The least time between two commits while jobs arrive in quick succession: one commit for all of
# them saves the disk's work, and keeps this thread from competing with the event loop for the
# interpreter's lock.
GROUP_INTERVAL_S = 0.008

# After such an interval in which no second job arrived, commits are not delayed for this long: a
# caller that awaits one write after another would otherwise wait each time.
UNDELAYED_PERIOD_S = 0.25

CLOSE_TIMEOUT_S = 30.0


class Commit(IntEnum):
    """Levels: what a commit must survive; of several jobs in a transaction, the highest counts."""

    READ_ONLY = 0  # nothing is written to the database
    PROCESS_SAFE = 1  # survives the end of the process
    POWER_SAFE = 2  # survives a power failure as well
    NO_TRANSACTION = 3  # runs outside of a transaction: the database's own maintenance


@dataclass(slots=True)
class Job:
    """A function to run on the worker thread, and its outcome, which the database sets."""

    work: Work[Any]
    level: Commit
    default: Any = None  # the result if the database fails
    future: asyncio.Future[Any] | Future[Any] | None = None  # None if nothing waits for it
    result: Any = None
    error: Exception | None = None


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

    async def run(
        self, work: Work[ResultT], *, default: ResultT, level: Commit = Commit.READ_ONLY
    ) -> ResultT:
        """Run `work` and return its result once it is committed.

        It runs even if the waiting task is cancelled, and before any job that is submitted later.
        Where the database fails, this returns `default`; only errors of this package are raised.
        """
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        return await future if self._submit(Job(work, level, default, future)) else default

    def post(self, work: Work[None]) -> None:
        """Run `work` after the jobs before it; return at once."""
        self._submit(Job(work, Commit.PROCESS_SAFE))

    def call(
        self, work: Work[ResultT], *, default: DefaultT, level: Commit = Commit.READ_ONLY
    ) -> ResultT | DefaultT:
        """Run `work` as `run` does, while the calling thread waits instead of an event loop."""
        future: Future[ResultT | DefaultT] = Future()
        return future.result() if self._submit(Job(work, level, default, future)) else default

    def close(self) -> None:
        """Finish the submitted jobs and close the connection; a later job opens it again."""
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
        timeout: float | None = None  # seconds until the database needs maintenance
        not_before = ended_at = undelayed_until = 0.0  # instants of `time.monotonic`
        while True:
            taken = take_jobs(jobs, timeout, not_before=not_before)
            began_at = time.monotonic()
            # A job that begins at `not_before`, or a little later, has waited for that instant.
            if len(taken) == 1 and not_before <= began_at < not_before + GROUP_INTERVAL_S / 4:
                undelayed_until = began_at + UNDELAYED_PERIOD_S
            # Twice the interval, because a caller needs some time between two writes of its own.
            follows_closely = undelayed_until <= began_at < ended_at + 2 * GROUP_INTERVAL_S
            with self.fork_lock:
                if runnable := [job for job in taken if job is not None]:
                    self._database.perform(runnable)
                    _resolve_all(runnable)
                if None in taken:
                    return self._database.disconnect()
                timeout = self._database.maintain()
            ended_at = time.monotonic()
            is_busy = len(taken) > 1 or follows_closely
            delays_next = is_busy and self._database.groups_commits
            not_before = ended_at + GROUP_INTERVAL_S if delays_next else 0.0


def take_jobs(jobs: JobQueue, timeout: float | None, *, not_before: float) -> list[Job | None]:
    """Return the jobs in the queue; wait at most `timeout` seconds for the first.

    A write waits for the instant `not_before`, so that more of them share a transaction. If the
    first job is a read, it and the jobs behind it do not wait.
    """
    taken: list[Job | None] = []
    with contextlib.suppress(queue.Empty):
        taken.append(first := jobs.get(timeout=timeout))
        is_write = first is not None and first.level is not Commit.READ_ONLY
        if is_write and (delay := not_before - time.monotonic()) > 0:
            time.sleep(delay)
        while taken[-1] is not None and len(taken) < MAX_JOBS_PER_COMMIT:
            taken.append(jobs.get_nowait())
    return taken


def _resolve_all(jobs: list[Job]) -> None:
    """Resolve the futures of jobs, each where it has to be done."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Job]] = {}
    for job in jobs:
        if isinstance(job.future, asyncio.Future):
            by_loop.setdefault(job.future.get_loop(), []).append(job)
        else:
            _resolve([job])
    # Each loop gets the outcomes of its jobs with one wake-up for all of them.
    for loop, of_loop in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(_resolve, of_loop)


def _resolve(jobs: list[Job]) -> None:
    for job in jobs:
        if job.future is None or job.future.done():  # it may have been cancelled meanwhile
            continue
        if job.error is None:
            job.future.set_result(job.result)
        else:
            job.future.set_exception(job.error)


# Methods of a class with a `_worker`, before and after they are decorated.
_Method = Callable[Concatenate[Any, Connection, ParamsT], ResultT]
_CallerMethod = Callable[Concatenate[Any, ParamsT], ResultT]


def transaction(
    level: Commit, *, on_failure: Callable[[], Any] = NoneType
) -> Callable[[_Method[ParamsT, ResultT]], _CallerMethod[ParamsT, Coroutine[Any, Any, ResultT]]]:
    """Run a method on the worker's thread, with the connection; callers await its commit.

    Where the database fails, they get what `on_failure` returns, such as an empty `list`.
    """
    return _on_worker(lambda worker: worker.run, level, on_failure)


def blocking_transaction(
    level: Commit = Commit.READ_ONLY, *, on_failure: Callable[[], Any] = NoneType
) -> Callable[[_Method[ParamsT, ResultT]], _CallerMethod[ParamsT, ResultT]]:
    """Do the same as `transaction` for callers that wait in their own thread."""
    return _on_worker(lambda worker: worker.call, level, on_failure)


def _on_worker(
    submit_of: Callable[[SqliteWorker], Any], level: Commit, on_failure: Callable[[], Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            def work(connection: Connection) -> Any:
                return method(self, connection, *args, **kwargs)

            return submit_of(self._worker)(work, level=level, default=on_failure())

        return call

    return decorate


_workers: weakref.WeakSet[SqliteWorker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for worker in list(_workers):
        worker.close()
