"""The journal's database: a file as long as it can be used, otherwise memory.

Owns the connection, the transactions, the way to memory and back, and the sentences that say why.
All of it is called on the worker thread. Knows nothing of what a job does.
"""

from __future__ import annotations

import contextlib
import ctypes
import sqlite3
from pathlib import Path
from typing import Any

from nbcodex.errors import NbcodexError
from nbcodex.journal.maintenance import Maintenance
from nbcodex.journal.schema import DAMAGED, UnusableFileError, open_file, open_memory, primary_code
from nbcodex.runtime.clock import CLOCK_RECHECK_S, Clock
from nbcodex.runtime.sqlite_worker import Job, Level
from nbcodex.settings import JOURNAL_FILENAME

Connection = sqlite3.Connection

FILE_RETRY_S = 60.0

# In a transaction that returns to the file, and at exit, other processes are waited for no longer.
RETURN_PATIENCE_S = 1.0

_PERMANENT = "Prompts work, but this kernel keeps them in memory only, until it ends."
_TEMPORARY = "Prompts work, but are kept in memory only; the file is tried again every minute."

_CAUSES = {
    sqlite3.SQLITE_FULL: "The disk that holds {path} is full.",
    sqlite3.SQLITE_BUSY: "Another program keeps {path} locked.",
    sqlite3.SQLITE_LOCKED: "Another program keeps {path} locked.",
    sqlite3.SQLITE_PROTOCOL: "Another program keeps {path} locked.",
    sqlite3.SQLITE_READONLY: "{path} can only be read, not written.",
    sqlite3.SQLITE_PERM: "{path} can only be read, not written.",
    sqlite3.SQLITE_CANTOPEN: "{path} cannot be opened.",
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_NOTADB: DAMAGED,
    sqlite3.SQLITE_ERROR: DAMAGED,
}
_PERMANENT_CODES = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
# These are the fault of what was to be written.
_DATA_CODES = {sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}


class FileVanishedError(UnusableFileError):
    """The file was deleted or replaced while it was open; a new one can be used at once."""


class JournalDatabase:
    """A `WorkerDatabase` that opens itself when it is first used, in `folder` or in memory.

    Attributes
    ----------
    problem : str or None
        Why the file is not used, and what follows from it.
    is_fallback : bool
        Whether memory stands in for the file.
    """

    def __init__(
        self, folder: Path | None, *, clock: Clock, maintenance: Maintenance, patience: float
    ) -> None:
        self.folder = folder
        self._clock, self._maintenance, self._patience = clock, maintenance, patience
        self._reset()

    def _reset(self) -> None:
        self.problem: str | None = None
        self.is_fallback = False
        self._connection: Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._synchronous = Level.READ
        self._retry_at: float | None = None

    @property
    def groups_commits(self) -> bool:
        """Whether a commit costs a disk's work."""
        return self.folder is not None

    def maintain(self) -> float | None:
        """Do what is due; return how long the thread may sleep."""
        due = self._maintenance.due_in()
        if due is not None and due <= 0:
            self.perform([Job(self._maintenance.step, Level.ALONE, None, lambda *_: None)])
            due = self._maintenance.due_in()
        return None if due is None else min(due, CLOCK_RECHECK_S)

    def perform(self, jobs: list[Job]) -> None:
        """Run jobs in one transaction; if one of them fails, each in its own."""
        try:
            if self._retry_at is not None and self._clock.now() >= self._retry_at:
                self._retry_at = self._clock.now() + FILE_RETRY_S
                self._return_to_file()
            results = self._transact(jobs)
        except Exception as error:  # requests continue without a journal
            self._maintenance.rolled_back()
            if self._fall_back(error):
                self.perform(jobs)
            elif len(jobs) > 1:
                # One bad job must not undo its neighbours' work.
                for job in jobs:
                    self.perform([job])
            else:
                self._reject(jobs[0], error)
        else:
            for job, result in zip(jobs, results, strict=True):
                job.resolve(result, None)

    def disconnect(self) -> None:
        """Close the connection; the next job opens another."""
        if self._retry_at is not None:  # the last chance for what is in memory only
            self._return_to_file()
        connection, self._connection = self._connection, None
        self.is_fallback, self._retry_at = False, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._maintenance.disconnecting(connection)
            with contextlib.suppress(sqlite3.Error):
                connection.close()
        self._maintenance.reset()

    def abandon(self) -> None:
        """In a forked child: give up the parent's connection without closing it."""
        if self._connection is not None:
            # Closing it, or letting it be collected, would end the parent's locks (2.6 of
            # https://sqlite.org/howtocorrupt.html): it stays, unused, to the end of the child.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
        self._reset()
        self._maintenance.reset()

    def _transact(self, jobs: list[Job]) -> list[Any]:
        level = max(job.level for job in jobs)
        connection = self._connect()
        if level is Level.ALONE:
            return [job.work(connection) for job in jobs]
        if level is Level.SAFE and not self.is_fallback and self._found_inode() != self._inode:
            # SQLite would continue with a file that no other process can open any more.
            raise FileVanishedError(f"{self.folder} has lost its journal while it was open.")
        # NORMAL survives the process; FULL waits for the disk, and so survives a power failure.
        if level > Level.READ and level is not self._synchronous:
            mode = "FULL" if level is Level.SAFE else "NORMAL"
            connection.execute(f"PRAGMA synchronous = {mode}")
            self._synchronous = level
        # A write that began as a read could not wait for a lock: SQLite fails it at once.
        connection.execute("BEGIN" if level is Level.READ else "BEGIN IMMEDIATE")
        try:
            results = [job.work(connection) for job in jobs]
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
        return results

    def _connect(self) -> Connection:
        if self._connection is not None:
            return self._connection
        if self.folder is None:
            connection = open_memory()
        else:
            connection = open_file(self.folder, patience=self._patience)
        self._use(connection)
        self._maintenance.connected(connection)
        return connection

    def _use(self, connection: Connection) -> None:
        self._connection, self._synchronous = connection, Level.READ
        self._inode = self._found_inode()
        self.problem, self.is_fallback, self._retry_at = None, False, None

    def _found_inode(self) -> tuple[int, int] | None:
        """Return which file is at our path."""
        with contextlib.suppress(OSError):
            if self.folder is not None:
                found = (self.folder / JOURNAL_FILENAME).stat()
                return found.st_dev, found.st_ino
        return None

    def _fall_back(self, error: Exception) -> bool:
        """Go on in memory if `error` is the file's fault; return whether it is."""
        if self.folder is None or self.is_fallback:
            return False
        if (cause := diagnose(error, path=self.folder / JOURNAL_FILENAME)) is None:
            return False
        # Numbers in memory are larger than any in the file, so that they stay unique when the rows
        # return to it.
        file, self._connection = self._connection, None
        memory = open_memory(after=_last_number(file))
        self._connection, self.is_fallback = memory, True
        self.problem = f"{cause} {_PERMANENT if cause.is_permanent else _TEMPORARY}"
        wait = 0.0 if isinstance(cause, FileVanishedError) else FILE_RETRY_S
        self._retry_at = None if cause.is_permanent else self._clock.now() + wait
        if file is not None:
            with contextlib.suppress(sqlite3.Error):
                file.execute("PRAGMA busy_timeout = 100")  # a lock was waited for already
                self._maintenance.copy_to_memory(file, memory)
            with contextlib.suppress(sqlite3.Error):
                file.close()
        self._maintenance.connected(memory)
        return True

    def _return_to_file(self) -> None:
        """Use the file again, if it can be used, and copy to it what was written in memory."""
        if self.folder is None or (memory := self._connection) is None:
            return
        try:
            file = open_file(self.folder, patience=RETURN_PATIENCE_S)
        except (sqlite3.Error, OSError, UnusableFileError):
            return
        # All or nothing: memory is dropped only once everything is committed.
        try:
            file.execute("BEGIN IMMEDIATE")
            self._maintenance.copy_to_file(memory, file)
            file.execute("COMMIT")
        except sqlite3.Error:
            file.close()
            return
        memory.close()
        self._use(file)

    def _reject(self, job: Job, error: Exception) -> None:
        """Return an error of this package to the caller; report any other, and return a default."""
        if isinstance(error, NbcodexError):
            job.resolve(None, error)
        else:
            self.problem = self.problem or (
                f"Something could not be written to the journal ({type(error).__name__})."
            )
            job.resolve(job.default, None)


def diagnose(error: Exception, *, path: Path) -> UnusableFileError | None:
    """Return what `error` says about the file at `path`; None if the file is not at fault."""
    match error:
        case UnusableFileError():
            return error
        case sqlite3.ProgrammingError() | sqlite3.InterfaceError() | sqlite3.DataError():
            return None
        case sqlite3.Error():
            code = primary_code(error)
            if code in _DATA_CODES:
                return None
            cause = _CAUSES.get(code, "{path} cannot be read or written.")
            return UnusableFileError(cause.format(path=path), is_permanent=code in _PERMANENT_CODES)
        case UnicodeDecodeError() | IndexError():  # names of columns are damaged
            return UnusableFileError(DAMAGED.format(path=path), is_permanent=True)
        case OSError():
            reason = error.strerror or "input or output failed"
            return UnusableFileError(f"{path} cannot be used: {reason}.")
        case _:
            return None


def _last_number(file: Connection | None) -> int:
    """Return the largest number of an entry or chapter in a file, as far as it can be read."""
    with contextlib.suppress(sqlite3.Error):
        if file is not None:
            (last,) = file.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()
            return int(last or 0)
    return 0
