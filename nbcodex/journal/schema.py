"""How a journal's database is created (see schema.sql), migrated and opened.

The extension imports `may_have_unfinished` whenever it is loaded, so this module imports little.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import sqlite3
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path

from nbcodex.journal.owner import Connection
from nbcodex.runtime import sqlite_files
from nbcodex.runtime.sqlite_files import primary_code, retry_while_locked
from nbcodex.settings import JOURNAL_FILENAME

FILE_RETRY_S = 60.0
DAMAGED = "{path} is damaged. To begin a new journal, move it away."

# `application_id` and `user_version` of a new file, as schema.sql sets them. The first is "nbcx" in
# ASCII. Files of versions 1 to 5 exist on developers' machines only.
APPLICATION_ID, SCHEMA_VERSION = 0x6E626378, 6

# Read at import: a journal falls back to memory where no further file can be opened.
_SCHEMA_STATEMENTS = Path(__file__).with_name("schema.sql").read_text("utf-8").split(";\n")

# Each change after a release is one more list of statements, the last of which sets `user_version`.
MIGRATIONS: list[list[str]] = [
    # Of a batch job: `owners.id` of the kernel that waits for it.
    ["ALTER TABLE parts ADD COLUMN owner INTEGER", "PRAGMA user_version = 7"],
]

# In memory, entries and chapters have larger numbers than in the file that memory replaces: each
# number names one entry only, also when the entries are copied to the file.
MEMORY_FIRST_NUMBER = 2**40

# What SQLite raises where a write-ahead log cannot have the memory that processes share.
_NO_SHARED_MEMORY_CODES = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}


class UnusableFileError(Exception):
    """The journal's file cannot be used; the message says why, in a sentence for the user."""

    def __init__(self, message: str, *, retry_in: float = FILE_RETRY_S) -> None:
        super().__init__(message)
        self.retry_in = retry_in  # seconds until the file is tried again


def open_file(folder: Path, *, lock_timeout: float) -> Connection:
    """Open or create the journal in `folder`; raise if that fails, or if it is unusable."""
    try:
        path = sqlite_files.prepare_file(folder, JOURNAL_FILENAME)
    except sqlite_files.UnsafePathError as error:
        raise UnusableFileError(str(error)) from None
    connection = _connect(str(path), timeout=lock_timeout)
    try:
        for step in (
            partial(_set_journal_mode, connection, on_network=sqlite_files.is_on_network(folder)),
            partial(_check_length, connection, path),
            partial(migrate, connection),
        ):
            retry_while_locked(step, timeout=lock_timeout)
    except BaseException:
        connection.close()
        raise
    return connection


def open_memory(*, after: int = 0) -> Connection:
    """Return a connection to a new journal in memory, whose numbers are larger than `after`."""
    connection = _connect(":memory:", timeout=0.0)
    migrate(connection)
    # Several kernels may fall back at once, and return to one file: each gets a million numbers.
    first = max(after, MEMORY_FIRST_NUMBER) + ((1 + secrets.randbits(20)) << 20)
    connection.executemany(
        "INSERT INTO sqlite_sequence VALUES (?, ?)", [("entries", first), ("chapters", first)]
    )
    return connection


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the tables up to date; of several processes that try at once, one does it."""
    with connection:  # commits, or after an error rolls back
        # A transaction reads one state of the file, even while another process migrates it.
        connection.execute("BEGIN")
        pending = _pending_statements(connection)
    if pending:
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            for statement in _pending_statements(connection):
                connection.execute(statement)


def may_have_unfinished(path: Path, notebook: str) -> bool:
    """Return whether a notebook may have parked or abandoned requests in the file at `path`.

    Runs whenever the extension is loaded, so it opens the file without checks. True if the file
    cannot be read: `Journal.problem` then says why.
    """
    if not path.exists():
        return False
    # SQLite uses the index `entries_open` only if its condition is repeated word for word.
    query = """SELECT 1 FROM entries
        WHERE status IN ('pending', 'running', 'waiting', 'parked') AND notebook = ? LIMIT 1"""
    try:
        with closing(sqlite3.connect(path, timeout=0.05)) as connection:
            connection.execute("PRAGMA query_only = 1")
            return connection.execute(query, (notebook,)).fetchone() is not None
    except (sqlite3.Error, UnicodeDecodeError):  # of a table's name, in a damaged file
        return True


def _connect(target: str, *, timeout: float) -> Connection:
    connection = sqlite3.connect(target, timeout=timeout, isolation_level=None, factory=Connection)
    connection.row_factory = sqlite3.Row
    # Hashes a key with the file's salt, so that keys are useless outside of this file. An SQL
    # function, because a separate query for the salt costs more than the hash.
    connection.create_function("salted", 2, _salted, deterministic=True)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    connection.execute("PRAGMA secure_delete = ON")  # `forget` overwrites with zeros
    connection.execute("PRAGMA cell_size_check = ON")  # finds damaged pages
    connection.execute("PRAGMA trusted_schema = OFF")  # a file must not call SQL functions
    return connection


def _salted(key: bytes | None, salt: bytes) -> bytes | None:
    return None if key is None else hashlib.blake2b(key, key=salt[:64], digest_size=32).digest()


def _set_journal_mode(connection: sqlite3.Connection, *, on_network: bool) -> None:
    # A write-ahead log needs memory that all processes share (https://sqlite.org/wal.html).
    mode = "DELETE" if on_network else "WAL"
    try:
        connection.execute(f"PRAGMA journal_mode = {mode}").fetchone()
    except sqlite3.OperationalError as error:
        if on_network or primary_code(error) not in _NO_SHARED_MEMORY_CODES:
            raise
        connection.execute("PRAGMA journal_mode = DELETE").fetchone()


def _check_length(connection: sqlite3.Connection, path: Path) -> None:
    """Raise an error if the file was truncated: SQLite would read the missing part as zeros."""
    log = path.with_name(path.name + "-wal")

    def has_log() -> bool:
        return log.exists() and log.stat().st_size > 0

    if not has_log():
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        # Pages that another process has added meanwhile are in its log only.
        if path.stat().st_size < pages * size and not has_log():
            raise UnusableFileError(DAMAGED.format(path=path), retry_in=math.inf)


def _pending_statements(connection: sqlite3.Connection) -> list[str]:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    application = int(connection.execute("PRAGMA application_id").fetchone()[0])
    table_count = int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    if not (version or application or table_count):  # a new file
        return [*_SCHEMA_STATEMENTS, *chain.from_iterable(MIGRATIONS)]
    problem = ""
    if application != APPLICATION_ID:
        problem = "The journal's file belongs to another program."
    elif version > SCHEMA_VERSION + len(MIGRATIONS):
        problem = "The journal was written by a newer nbcodex: update this one."
    elif version < SCHEMA_VERSION:
        problem = (
            "The journal was written by an nbcodex from before its first release. "
            "To begin a new journal, move its file away."
        )
    if problem:
        raise UnusableFileError(problem, retry_in=math.inf)
    return [*chain.from_iterable(MIGRATIONS[version - SCHEMA_VERSION :])]
