"""The database that jobs are done on: a file as long as it serves, else memory.

Owns the connection, the transactions, and the way to memory and back. All of it is called on the
writer thread only. Must not know what a job does.
"""

from __future__ import annotations

import contextlib
import ctypes
import sqlite3
from pathlib import Path
from typing import Any, Protocol

from nbcodex.errors import NbcodexError
from nbcodex.journal.diagnosis import RETRY, FileVanishedError, UnusableFileError, diagnose
from nbcodex.journal.jobs import Job, Level
from nbcodex.journal.opening import open_file, open_memory
from nbcodex.runtime.clock import CLOCK_RECHECK_S, Clock
from nbcodex.settings import JOURNAL_FILENAME

Connection = sqlite3.Connection


class Keeper(Protocol):
    """Who knows what is in the database, and looks after it between the jobs."""

    def opened(self, connection: Connection) -> None:
        """Begin with a connection."""

    def undone(self) -> None:
        """Hear that the last transaction was rolled back."""

    def due(self) -> float | None:
        """Return seconds until `step` is wanted; None for never."""

    def step(self, connection: Connection) -> None:
        """Do what is due."""

    def to_memory(self, file: Connection, memory: Connection) -> None:
        """Save what can be saved from a file that fails."""

    def to_file(self, memory: Connection, file: Connection) -> None:
        """Bring back what was kept in memory."""

    def leave(self, connection: Connection) -> None:
        """End with a connection."""

    def reset(self) -> None:
        """Forget who we are."""


class Database:
    """A SQLite database that opens itself when it is first used.

    Parameters
    ----------
    folder : Path or None
        Where the file lies; None keeps everything in memory.
    clock : Clock
        Says when the keeper's work and another try are due.
    keeper : Keeper
        Looks after the contents.
    patience : float
        Seconds to wait for other processes that hold the file locked.

    Attributes
    ----------
    trouble : str or None
        What is wrong, and what follows from it.
    fallen : bool
        Whether a file that fails was given up for memory.
    """

    def __init__(
        self, folder: Path | None, *, clock: Clock, keeper: Keeper, patience: float = 10.0
    ) -> None:
        self.folder = folder
        self._clock = clock
        self._keeper = keeper
        self._patience = patience
        self._reset()

    def _reset(self) -> None:
        self.trouble: str | None = None
        self.fallen = False
        self._connection: Connection | None = None
        self._place: tuple[int, int] | None = None
        self._synchronous = Level.READ
        self._retry_at: float | None = None

    def look_after(self) -> float | None:
        """Let the keeper do its part; return how long the thread may sleep."""
        due = self._keeper.due()
        if due is not None and due <= 0:
            self.perform([Job(self._keeper.step, Level.BARE, None, lambda *_: None)])
            due = self._keeper.due()
        return None if due is None else min(due, CLOCK_RECHECK_S)

    def perform(self, jobs: list[Job]) -> None:
        """Do `jobs` in one transaction; if one of them fails, each in its own."""
        try:
            self._try_again()
            results = self._transact(jobs)
        except Exception as error:  # whatever it is, the engine goes on
            self._keeper.undone()
            if self._fall_back(error):
                self.perform(jobs)
            elif len(jobs) > 1:
                for job in jobs:
                    self.perform([job])
            else:
                self._refuse(jobs[0], error)
        else:
            for job, result in zip(jobs, results, strict=True):
                job.settle(result, None)

    def _transact(self, jobs: list[Job]) -> list[Any]:
        level = max(job.level for job in jobs)
        connection = self._connect()
        if level is Level.BARE:
            return [job.work(connection) for job in jobs]
        if level is Level.SAFE:
            self._check_place()
        self._set_synchronous(connection, level)
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
        self._adopt(connection)
        self._keeper.opened(connection)
        return connection

    def _adopt(self, connection: Connection) -> None:
        """Work on `connection` from now on, as it ought to be."""
        self._connection, self._synchronous = connection, Level.READ
        self._place = self._found()
        self.trouble, self.fallen, self._retry_at = None, False, None

    def _set_synchronous(self, connection: Connection, level: Level) -> None:
        if level > Level.READ and level is not self._synchronous:
            mode = "FULL" if level is Level.SAFE else "NORMAL"
            connection.execute(f"PRAGMA synchronous = {mode}")
            self._synchronous = level

    def _found(self) -> tuple[int, int] | None:
        """Return which file lies at our path now."""
        with contextlib.suppress(OSError):
            if self.folder is not None:
                found = (self.folder / JOURNAL_FILENAME).stat()
                return found.st_dev, found.st_ino
        return None

    def _check_place(self) -> None:
        """Refuse to write to a file that was deleted or replaced: what it gets would be lost."""
        if not self.fallen and self._found() != self._place:
            raise FileVanishedError(f"{self.folder} has lost its journal while it was open.")

    def _fall_back(self, error: Exception) -> bool:
        """Go on in memory if the file is to blame for `error`; return whether so."""
        if self.folder is None or self.fallen:
            return False
        if (cause := diagnose(error, path=self.folder / JOURNAL_FILENAME)) is None:
            return False
        file, self._connection = self._connection, open_memory()
        self.fallen = True
        self._retry_at = None if cause.lasting else self._clock.now() + cause.retry
        self.trouble = f"{cause} {cause.consequence}"
        if file is not None:
            with contextlib.suppress(sqlite3.Error):
                file.execute("PRAGMA busy_timeout = 100")  # whoever holds it had his time
                self._keeper.to_memory(file, self._connection)
            with contextlib.suppress(sqlite3.Error):
                file.close()
        self._keeper.opened(self._connection)
        return True

    def _try_again(self) -> None:
        """After a while, see whether the file serves again, and bring everything back to it."""
        if self._retry_at is not None and self._clock.now() >= self._retry_at:
            self._retry_at = self._clock.now() + RETRY
            self._recover(patience=1.0)

    def _recover(self, *, patience: float) -> None:
        if self.folder is None or (memory := self._connection) is None:
            return
        try:
            file = open_file(self.folder, patience=patience)
        except (sqlite3.Error, OSError, UnusableFileError):
            return
        try:
            file.execute("BEGIN IMMEDIATE")
            self._keeper.to_file(memory, file)
            file.execute("COMMIT")
        except sqlite3.Error:
            file.close()
            return
        memory.close()
        self._adopt(file)

    def _refuse(self, job: Job, error: Exception) -> None:
        """Hand back an error of ours; of any other, say that something was not kept."""
        if isinstance(error, NbcodexError):
            job.settle(None, error)
        else:
            self.trouble = self.trouble or (
                f"Something could not be written to the journal ({type(error).__name__})."
            )
            job.settle(job.default, None)

    def leave(self) -> None:
        """Let the connection go; the next job opens another."""
        if self._retry_at is not None:
            self._recover(patience=1.0)
        connection, self._connection = self._connection, None
        self.fallen, self._retry_at = False, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._keeper.leave(connection)
            with contextlib.suppress(sqlite3.Error):
                connection.close()
        self._keeper.reset()

    def forsake(self) -> None:
        """In a forked child: leave everything to the parent, and begin anew when used.

        Closing the connection here, or letting it be collected, would end the parent's locks
        (SQLite's "How To Corrupt", 2.6): it must stay, unused, to the end of the child.
        """
        if self._connection is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
        self._reset()
        self._keeper.reset()
