"""The journal's database: a file as long as it can be used, otherwise memory.

Holds the connection, and runs jobs in transactions; sends heartbeats, deletes expired entries,
continues in memory if the file fails, and copies what memory holds back to the file. All of it
runs on the worker thread.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nbcodex.errors import NbcodexError
from nbcodex.journal import spending
from nbcodex.journal.codec import decode, encode
from nbcodex.journal.conversations import compact_turns, resolve_turns
from nbcodex.journal.owner import HEARTBEAT_INTERVAL_S, Connection, Owner, write_heartbeat
from nbcodex.journal.schema import DAMAGED, FILE_RETRY_S, UnusableFileError, open_file, open_memory
from nbcodex.journal.spending import SpendAmount
from nbcodex.journal.sqlite_worker import Commit, Job
from nbcodex.models import DAY, Request
from nbcodex.runtime.clock import CLOCK_RECHECK_S, Clock
from nbcodex.runtime.sqlite_files import BUSY_CODES, leak_connection, primary_code
from nbcodex.settings import JOURNAL_FILENAME

Insertion = Callable[[Connection], None]  # inserts one entry

# Longest waits for other processes' locks: usually, to copy memory back, and where failing does no
# harm.
LOCK_TIMEOUT_S, RETURN_LOCK_TIMEOUT_S, SHORT_LOCK_TIMEOUT_S = 10.0, 1.0, 0.1
# Deleting so many entries takes milliseconds: jobs that wait behind it are not delayed noticeably.
EXPIRED_PER_STEP = 100
CHECKPOINT_RETRY_S = 1.0
RETENTION_S = 90.0 * DAY  # after an entry's last change; README, docs and client.py name it, too
OWNER_RETENTION_S = 1.0 * DAY  # of owners without open entries

_PERMANENT = "Prompts work, but this kernel keeps them in memory only, until it ends."
_TEMPORARY = "Prompts work, but are kept in memory only; the file is tried again every minute."

_CAUSES = {
    sqlite3.SQLITE_FULL: "The disk that holds {path} is full.",
    **dict.fromkeys(BUSY_CODES, "Another program keeps {path} locked."),
    sqlite3.SQLITE_READONLY: "{path} can only be read, not written.",
    sqlite3.SQLITE_PERM: "{path} can only be read, not written.",
    sqlite3.SQLITE_CANTOPEN: "{path} cannot be opened.",
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_NOTADB: DAMAGED,
    sqlite3.SQLITE_ERROR: DAMAGED,  # a table or a column is missing
}
# Caused by the values that are written, not by the file.
_DATA_CODES = {sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}


class JournalDatabase:
    """Runs the worker's jobs on a file in `folder`, or in memory; opened by the first job."""

    def __init__(self, folder: Path | None, clock: Clock) -> None:
        self.folder, self._clock = folder, clock
        self.groups_commits = folder is not None  # whether writes wait to share commits to a disk
        self._reset()

    def _reset(self) -> None:
        self.problem: str | None = None  # why the file is not used, and what follows from it
        self.is_fallback = False  # whether memory replaces the file
        self._connection: Connection | None = None
        self._owner: Owner | None = None
        self._inode: tuple[int, int] | None = None  # device and inode of the open file
        self._synchronous = Commit.READ_ONLY  # for which level `PRAGMA synchronous` is set
        self._retry_at = math.inf  # when the file that failed is tried again
        # The ids of entries, maps and batch jobs for whose sake heartbeats are written. An entry
        # has the function that inserts it: memory needs that if the file cannot be read.
        self._active: dict[str, Insertion | None] = {}
        self._heartbeat_at = 0.0  # when the next one is due
        self._is_expiring = False  # whether expired entries may be left
        self.checkpoint_at = math.inf  # when it is due
        # The budget, and the spending by day, when memory replaced the file.
        self._budget_at_fallback: tuple[str, dict[str, SpendAmount]] = "", {}

    def perform(self, jobs: list[Job]) -> None:
        """Run jobs in one transaction, or each alone if one of them fails; set their outcomes."""
        try:
            if self._clock.now() >= self._retry_at:
                self._retry_at = self._clock.now() + FILE_RETRY_S
                self._return_to_file()
            self._transact(jobs)
        except Exception as error:  # requests continue without a journal
            self._heartbeat_at = 0.0  # the last heartbeat may have been rolled back
            if self._fall_back(error):
                self.perform(jobs)
            elif len(jobs) > 1:
                # A job that fails must not roll back the others.
                for job in jobs:
                    self.perform([job])
            elif isinstance(error, NbcodexError):
                jobs[0].error = error
            else:
                self.problem = self.problem or (
                    f"Something could not be written to the journal ({type(error).__name__})."
                )
                jobs[0].result = jobs[0].default

    def _transact(self, jobs: list[Job]) -> None:
        level = max(job.level for job in jobs)
        connection = self._connection or self._open()
        connection.owner_is_gone = {}  # looked up again in each transaction
        if level is Commit.NO_TRANSACTION:  # such a job is passed alone
            jobs[0].result = jobs[0].work(connection)
            return
        is_safe = level is Commit.POWER_SAFE
        if is_safe and not self.is_fallback and self._found_inode() != self._inode:
            # SQLite would continue with a file that no other process can open any more.
            message = f"The journal in {self.folder} was deleted while it was open."
            raise UnusableFileError(message, retry_in=0.0)
        # NORMAL survives the process; FULL waits for the disk, and so survives a power failure.
        if level > Commit.READ_ONLY and level is not self._synchronous:
            mode = "FULL" if is_safe else "NORMAL"
            connection.execute(f"PRAGMA synchronous = {mode}")
            self._synchronous = level
        with connection:  # commits, or after an error rolls back
            # If a transaction that began as a read wrote, SQLite would not wait for a lock.
            connection.execute("BEGIN" if level is Commit.READ_ONLY else "BEGIN IMMEDIATE")
            for job in jobs:
                job.result = job.work(connection)

    def _open(self) -> Connection:
        if self.folder is None:
            connection = open_memory()
        else:
            connection = open_file(self.folder, lock_timeout=LOCK_TIMEOUT_S)
        self._use(connection)
        self._start_maintenance(connection)
        return connection

    def _use(self, connection: Connection, *, problem: str | None = None) -> None:
        """Use a new connection; it is to memory if there is a `problem` with the file."""
        # The owner stays the same until `disconnect`, in the file and in memory.
        self._owner = connection.owner = self._owner or Owner.of_this_process()
        connection.clock = self._clock
        _set_lock_timeout(connection, LOCK_TIMEOUT_S)
        self._connection, self._synchronous = connection, Commit.READ_ONLY
        self._inode = self._found_inode()
        self.problem, self.is_fallback, self._retry_at = problem, problem is not None, math.inf

    def _found_inode(self) -> tuple[int, int] | None:
        """Return device and inode of the file that is at the journal's path now."""
        with contextlib.suppress(OSError):
            if self.folder is not None:
                found = (self.folder / JOURNAL_FILENAME).stat()
                return found.st_dev, found.st_ino
        return None

    def disconnect(self) -> None:
        """Close the connection; the next job opens another, as another owner."""
        if self._retry_at < math.inf:  # the last chance for what is in memory only
            self._return_to_file()
        problem = self.problem
        if (connection := self._connection) is not None:
            # So other kernels see at once that the entries which are open here are abandoned.
            with contextlib.suppress(sqlite3.Error), contextlib.closing(connection):
                connection.execute("DELETE FROM owners WHERE id = ?", (connection.owner.id,))
        self._reset()
        self.problem = problem

    def abandon(self) -> None:
        """In a forked child: give up the parent's connection without closing it."""
        if self._connection is not None:
            leak_connection(self._connection)
        self._reset()

    def begin_heartbeats(
        self, connection: Connection, id_: str, *, insert: Insertion | None = None
    ) -> None:
        """Keep writing heartbeats for this entry, map or batch job until `end_heartbeats`."""
        self._active[id_] = insert
        self.ensure_heartbeat(connection)

    def end_heartbeats(self, id_: str) -> None:
        """Note that the entry, map or batch job needs no more heartbeats."""
        self._active.pop(id_, None)

    def ensure_heartbeat(self, connection: Connection) -> None:
        """Write a heartbeat if one is due."""
        if self._clock.now() >= self._heartbeat_at:
            write_heartbeat(connection)
            self._heartbeat_at = self._clock.now() + HEARTBEAT_INTERVAL_S

    def maintain(self) -> float | None:
        """Do a step of what is due; return seconds until the next one, None if none is due."""
        if self._due_in() <= 0:
            self.perform([Job(self._maintain, Commit.NO_TRANSACTION)])
        due = max(0.0, self._due_in())
        # A laptop's sleep stops timers, so a long wait is taken in steps.
        return None if due == math.inf else min(due, CLOCK_RECHECK_S)

    def _due_in(self) -> float:
        """Return seconds until a heartbeat, a checkpoint or a deletion is due."""
        if self._is_expiring:
            return 0.0
        heartbeat_at = self._heartbeat_at if self._active else math.inf
        return min(heartbeat_at, self.checkpoint_at) - self._clock.now()

    def _maintain(self, connection: Connection) -> None:
        if self._active:
            self.ensure_heartbeat(connection)
        if self._clock.now() >= self.checkpoint_at:
            self._checkpoint(connection)
        if self._is_expiring:
            before = self._clock.wall() - RETENTION_S
            connection.execute("DELETE FROM chapters WHERE begun_at < ?", (before,))
            # `added_at` is indexed, and is hardly ever later than `updated_at`.
            deleted = connection.execute(
                """DELETE FROM entries WHERE seq IN (SELECT seq FROM entries WHERE
                added_at < :before AND updated_at < :before ORDER BY added_at LIMIT :limit)""",
                {"before": before, "limit": EXPIRED_PER_STEP},
            ).rowcount
            self._is_expiring = deleted == EXPIRED_PER_STEP
            if deleted and not self._is_expiring:
                self._checkpoint(connection)

    def _checkpoint(self, connection: Connection) -> None:
        """Write the log back to the file and truncate it: it still holds deleted text."""
        _set_lock_timeout(connection, SHORT_LOCK_TIMEOUT_S)
        try:
            blocked = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        finally:
            _set_lock_timeout(connection, LOCK_TIMEOUT_S)
        # A reader in another process may block it. It is tried again until it succeeds.
        self.checkpoint_at = self._clock.now() + CHECKPOINT_RETRY_S if blocked else math.inf

    def _start_maintenance(self, connection: Connection) -> None:
        """Delete old owners; let `maintain` delete expired entries."""
        connection.execute(
            """DELETE FROM owners WHERE beat_at < ? AND id NOT IN (SELECT owner FROM entries
            WHERE status IN ('pending', 'running', 'waiting', 'parked') AND owner IS NOT NULL)""",
            (self._clock.wall() - OWNER_RETENTION_S,),
        )
        self._is_expiring, self._heartbeat_at = True, 0.0

    # The change from the file to memory, and back. Without copying, a failure of the file would
    # lose parked prompts and the budget of the day, and answered entries would be paid for twice.

    def _fall_back(self, error: Exception) -> bool:
        """Continue in memory if `error` is the file's fault; return whether it is."""
        if self.folder is None or self.is_fallback:
            return False
        if (cause := _diagnose(error, path=self.folder / JOURNAL_FILENAME)) is None:
            return False
        file, self._connection = self._connection, None
        # Numbers in memory are larger than any in the file: they are unique when copied back.
        last_number = 0
        with contextlib.suppress(sqlite3.Error):
            if file is not None:
                (last,) = file.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()
                last_number = int(last or 0)
        memory = open_memory(after=last_number)
        outlook = _PERMANENT if cause.retry_in == math.inf else _TEMPORARY
        self._use(memory, problem=f"{cause} {outlook}")
        self._retry_at = self._clock.now() + cause.retry_in
        if file is not None:
            with contextlib.suppress(sqlite3.Error), contextlib.closing(file):
                _set_lock_timeout(file, SHORT_LOCK_TIMEOUT_S)
                self._copy_to_memory(file, memory)
        self._start_maintenance(memory)
        return True

    def _copy_to_memory(self, file: Connection, memory: Connection) -> None:
        """Copy this owner's unanswered entries, and the budget, as far as the file is readable."""
        self._budget_at_fallback = "", {}
        with contextlib.suppress(sqlite3.Error):
            budget = spending.read_budget(file)
            self._budget_at_fallback = budget, spending.spending_by_day(file)
            spending.set_budget(memory, budget)
            for table in ("spending", "asides", "owners"):  # asides: what is reserved of the budget
                _copy_rows(file, memory, table)
        with contextlib.suppress(sqlite3.Error):
            # With another salt in `equality_key`, no copied entry would be found again.
            salt = file.execute("SELECT value FROM salt").fetchone()
            memory.execute("UPDATE salt SET value = ?", salt)
            _copy_rows(file, memory, "chapters")
            _copy_rows(file, memory, "parts")  # the batch jobs
            _copy_entries(file, memory, f"owner = {memory.owner.id:d} AND status <> 'done'")
        for insert in filter(None, self._active.values()):
            insert(memory)

    def _return_to_file(self) -> None:
        """Use the file again, if it can be used, and copy to it what was written in memory."""
        if self.folder is None or (memory := self._connection) is None:
            return
        try:
            file = open_file(self.folder, lock_timeout=RETURN_LOCK_TIMEOUT_S)
        except (sqlite3.Error, OSError, UnusableFileError):
            return
        file.owner, file.clock = memory.owner, memory.clock
        # Memory is dropped only once everything is committed.
        try:
            with file:
                file.execute("BEGIN IMMEDIATE")
                self._copy_to_file(memory, file)
        except sqlite3.Error:
            file.close()
            return
        memory.close()
        self._use(file)

    def _copy_to_file(self, memory: Connection, file: Connection) -> None:
        """Copy back what was written in memory, without entries that other owners have claimed."""
        _copy_rows(memory, file, "chapters")
        _copy_rows(memory, file, "parts")
        _copy_entries(memory, file)
        budget_then, spending_then = self._budget_at_fallback
        if (budget := spending.read_budget(memory)) != budget_then:
            spending.set_budget(file, budget)
        for day, amount in spending.spending_by_day(memory).items():
            spending.spend(file, amount - spending_then.get(day, SpendAmount()), day=day)
        file.execute("DELETE FROM asides WHERE owner = ?", (memory.owner.id,))
        _copy_rows(memory, file, "asides", f"owner = {memory.owner.id:d}")
        spending.add_to_totals(file, spending.read_totals(memory))
        self._heartbeat_at = 0.0
        if self._active:
            self.ensure_heartbeat(file)


def _diagnose(error: Exception, *, path: Path) -> UnusableFileError | None:
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
            retry_in = math.inf if cause == DAMAGED else FILE_RETRY_S
            return UnusableFileError(cause.format(path=path), retry_in=retry_in)
        case UnicodeDecodeError() | IndexError():  # the names of columns are damaged
            return UnusableFileError(DAMAGED.format(path=path), retry_in=math.inf)
        case OSError():
            reason = error.strerror or "input or output failed"
            return UnusableFileError(f"{path} cannot be used: {reason}.")
        case _:
            return None


def _set_lock_timeout(connection: Connection, seconds: float) -> None:
    connection.execute(f"PRAGMA busy_timeout = {seconds * 1000:.0f}")


def _copy_rows(source: Connection, target: Connection, table: str, where: str = "TRUE") -> None:
    """Copy rows that the target lacks; of batch jobs (`parts`) that it has, the provider's ids."""
    rows = [dict(r) for r in source.execute(f"SELECT * FROM {table} WHERE {where}")]  # noqa: S608
    for row in rows:
        names, places = ", ".join(row), ", ".join(f":{name}" for name in row)
        target.execute(f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({places})", row)  # noqa: S608
    if table == "parts":
        target.executemany(
            """UPDATE parts SET file = coalesce(:file, file), remote = coalesce(:remote, remote),
            owner = coalesce(:owner, owner) WHERE tag = :tag""",
            rows,
        )


def _copy_entries(source: Connection, target: Connection, where: str = "TRUE") -> None:
    query = f"SELECT * FROM entries WHERE {where} ORDER BY seq"  # noqa: S608 - from this module
    for row in source.execute(query):
        values = dict(row)
        # An entry replaces its older state in the target, unless another owner has claimed it
        # meanwhile; an answer is copied even then, unless the target has one.
        updated = target.execute(
            """UPDATE entries SET status = :status, updated_at = :updated_at, attempts = :attempts,
            resume_at = :resume_at, error = :error, response_id = :response_id,
            sequence = :sequence, reply = :reply, text = :text, part = :part
            WHERE id = :id AND (owner = :owner OR (:status = 'done' AND status <> 'done'))""",
            values,
        )
        if updated.rowcount:
            continue
        if row["batch"] is None:  # no map run: the rows of a map have no turns
            request = decode(Request, row["request"])
            if request and request.turns and isinstance(request.turns, tuple):
                # The target may lack earlier turns, which the request then holds in full.
                turns = compact_turns(target, resolve_turns(source, request.turns))
                values["request"] = encode(replace(request, turns=turns))
        columns = [name for name in values if name != "seq"]
        # An entry keeps its number, by which turns refer to it, unless another entry has it: that
        # can happen in a new file, after the old one was deleted.
        target.execute(
            f"""INSERT INTO entries (seq, {", ".join(columns)})
            SELECT CASE WHEN NOT EXISTS (SELECT 1 FROM entries WHERE seq = :seq) THEN :seq END,
            {", ".join(f":{name}" for name in columns)}
            WHERE NOT EXISTS (SELECT 1 FROM entries WHERE id = :id)""",  # noqa: S608 - columns
            values,
        )
