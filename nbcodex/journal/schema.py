"""What a journal's database looks like, and how it is opened: as a file, or in memory.

Owns the tables, the migrations and the pragmas. Must not know what is read or written. The
extension imports `may_have_unfinished` whenever it is loaded, so this module imports little.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

from nbcodex.journal.owner import Connection
from nbcodex.runtime import sqlite_files
from nbcodex.runtime.sqlite_files import primary_code, wait_for_lock
from nbcodex.settings import JOURNAL_FILENAME

DAMAGED = "{path} is damaged. To begin a new journal, move it away."

# SQLite's application id: "nbcx".
APPLICATION_ID = 0x6E626378

# The version that SCHEMA creates. Files of versions 1 to 5 exist on developers' machines only.
SCHEMA_VERSION = 6

# In `entries`: `batch` and `item` are a map and the row's index in it, `part` is its batch job;
# `listed` is set for the row that represents its map in a list; `place` is a turn's number in its
# chapter, `begins` whether a new conversation starts with it; `limits` is not used. In `owners`:
# `space` is the pid namespace, `start` the start of the process in ticks since boot; `beat_at` and
# `beat_now` are the instant of the last heartbeat by the wall clock and by the boot clock. `book`
# shows entries with their owners. The salt makes the keys useless outside of this file.
SCHEMA = [
    """CREATE TABLE entries (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL,
        owner INTEGER, notebook TEXT, cell TEXT, variable TEXT, key BLOB,
        added_at REAL NOT NULL, updated_at REAL NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
        resume_at REAL, limits TEXT, error TEXT, response_id TEXT, sequence INTEGER,
        request TEXT NOT NULL, reply TEXT, text TEXT NOT NULL DEFAULT '',
        batch TEXT, item INTEGER, listed INTEGER NOT NULL DEFAULT 1,
        thread TEXT, chapter INTEGER NOT NULL DEFAULT 0, place INTEGER,
        begins INTEGER NOT NULL DEFAULT 0, part TEXT
    )""",
    # Partial indexes, because the open entries are few among very many.
    """CREATE INDEX entries_open ON entries (status, seq)
        WHERE status IN ('pending', 'running', 'waiting', 'parked')""",
    "CREATE INDEX entries_answered ON entries (key) WHERE status = 'done' AND key IS NOT NULL",
    "CREATE INDEX entries_age ON entries (added_at)",
    "CREATE INDEX entries_notebook ON entries (notebook)",
    "CREATE INDEX entries_listed ON entries (seq) WHERE listed = 1",
    """CREATE INDEX entries_batch ON entries (batch, status, owner, item)
        WHERE batch IS NOT NULL""",
    """CREATE INDEX entries_thread
        ON entries (thread, notebook, seq, chapter, place, cell, status, begins)
        WHERE thread IS NOT NULL""",
    "CREATE INDEX entries_part ON entries (part) WHERE part IS NOT NULL",
    """CREATE INDEX entries_away ON entries (key)
        WHERE part IS NOT NULL AND status IN ('waiting', 'parked')""",
    """CREATE TABLE owners (
        id INTEGER PRIMARY KEY, host TEXT NOT NULL, boot TEXT NOT NULL, space TEXT NOT NULL,
        pid INTEGER NOT NULL, start INTEGER NOT NULL, beat_at REAL NOT NULL, beat_now REAL NOT NULL
    )""",
    """CREATE VIEW book AS
        SELECT e.*, o.host, o.boot, o.space, o.pid, o.start, o.beat_at, o.beat_now
        FROM entries AS e LEFT JOIN owners AS o ON o.id = e.owner""",
    """CREATE TABLE chapters (
        id INTEGER PRIMARY KEY AUTOINCREMENT, notebook TEXT, thread TEXT NOT NULL,
        begun_at REAL NOT NULL
    )""",
    "CREATE TABLE parts (tag TEXT PRIMARY KEY, base_url TEXT NOT NULL, file TEXT, remote TEXT)",
    # Kept as sums, so that they outlive deleted entries and cost nothing to read.
    """CREATE TABLE totals (
        requests INTEGER NOT NULL DEFAULT 0, answers INTEGER NOT NULL DEFAULT 0,
        input_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0,
        output_tokens INTEGER NOT NULL DEFAULT 0, reasoning_tokens INTEGER NOT NULL DEFAULT 0,
        cost REAL NOT NULL DEFAULT 0, waited REAL NOT NULL DEFAULT 0,
        unknown INTEGER NOT NULL DEFAULT 0, unpriced INTEGER NOT NULL DEFAULT 0,
        estimated INTEGER NOT NULL DEFAULT 0
    )""",
    "INSERT INTO totals DEFAULT VALUES",
    "CREATE TABLE spending (day TEXT PRIMARY KEY, tokens INTEGER NOT NULL, dollars REAL NOT NULL)",
    "CREATE TABLE budget (text TEXT NOT NULL)",
    # Reservations: the most that running requests may use of a budget that all kernels share.
    """CREATE TABLE asides (
        id TEXT PRIMARY KEY, owner INTEGER NOT NULL, tokens INTEGER NOT NULL, dollars REAL NOT NULL
    )""",
    "CREATE TABLE salt (value BLOB NOT NULL)",
    "INSERT INTO salt VALUES (randomblob(32))",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
]

# What was released is never edited: each change is one more list of statements at the end, the
# last of which sets `user_version`.
MIGRATIONS: list[list[str]] = []

# Memory numbers its entries and chapters beyond those of the file that it replaces. So a
# number from before the file failed never names another entry in memory, and entries keep their
# numbers when they return to the file.
MEMORY_FIRST_NUMBER = 2**40

_NO_SHARED_MEMORY_CODES = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}


class UnusableFileError(Exception):
    """The journal's file cannot be used; says why, in a sentence for the user."""

    def __init__(self, message: str, *, is_permanent: bool = False) -> None:
        super().__init__(message)
        self.is_permanent = is_permanent  # whether it is pointless to try the file again


def open_file(folder: Path, *, patience: float) -> Connection:
    """Connect to the journal in `folder`; create it if there is none, raise if it is unusable."""
    try:
        path = sqlite_files.prepare(folder, JOURNAL_FILENAME)
    except sqlite_files.UnsafePathError as error:
        raise UnusableFileError(str(error)) from None
    network = sqlite_files.on_network(folder)
    connection = _connect(str(path), patience=patience)
    try:
        wait_for_lock(partial(_set_journal_mode, connection, network=network), patience=patience)
        wait_for_lock(partial(_check_length, connection, path), patience=patience)
        wait_for_lock(partial(migrate, connection), patience=patience)
    except BaseException:
        connection.close()
        raise
    return connection


def open_memory(*, after: int = 0) -> Connection:
    """Return a connection to a new journal in memory, whose numbers are larger than `after`."""
    connection = _connect(":memory:", patience=0.0)
    migrate(connection)
    # Several kernels may fall back at once, and return to one file: each begins elsewhere.
    first = max(after, MEMORY_FIRST_NUMBER) + ((1 + secrets.randbits(20)) << 20)
    connection.executemany(
        "INSERT INTO sqlite_sequence VALUES (?, ?)", [("entries", first), ("chapters", first)]
    )
    return connection


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the tables up to date; of several processes that try at once, one does it."""
    # `with connection` commits, or rolls back what an error has interrupted.
    with connection:
        connection.execute("BEGIN")  # one state, even while another process migrates
        pending = _pending_statements(connection)
    if pending:
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            for statement in _pending_statements(connection):
                connection.execute(statement)


def may_have_unfinished(path: Path, notebook: str) -> bool:
    """Return whether a notebook may have parked or abandoned requests in the file at `path`.

    Runs whenever the extension is loaded, so it opens the file without checks. True if the file
    cannot be read: the journal itself then says why.
    """
    if not path.exists():
        return False
    # The condition has to repeat that of the index `entries_open` to the letter to use it.
    query = """SELECT 1 FROM entries
        WHERE status IN ('pending', 'running', 'waiting', 'parked') AND notebook = ? LIMIT 1"""
    try:
        with closing(sqlite3.connect(path, timeout=0.05)) as connection:
            connection.execute("PRAGMA query_only = 1")
            return connection.execute(query, (notebook,)).fetchone() is not None
    except (sqlite3.Error, UnicodeDecodeError):  # of a table's name, in a damaged file
        return True


def _connect(target: str, *, patience: float) -> Connection:
    connection = sqlite3.connect(target, timeout=patience, isolation_level=None, factory=Connection)
    connection.row_factory = sqlite3.Row
    # An SQL function, because a separate query for the salt costs more than the hash.
    connection.create_function("salted", 2, _salted, deterministic=True)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    connection.execute("PRAGMA secure_delete = ON")  # `forget` overwrites with zeros
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def _salted(key: bytes | None, salt: bytes) -> bytes | None:
    return None if key is None else hashlib.blake2b(key, key=salt[:64], digest_size=32).digest()


def _set_journal_mode(connection: sqlite3.Connection, *, network: bool) -> None:
    # A write-ahead log needs memory that all processes share (https://sqlite.org/wal.html).
    mode = "DELETE" if network else "WAL"
    try:
        connection.execute(f"PRAGMA journal_mode = {mode}").fetchone()
    except sqlite3.OperationalError as error:
        if network or primary_code(error) not in _NO_SHARED_MEMORY_CODES:
            raise
        connection.execute("PRAGMA journal_mode = DELETE").fetchone()


def _check_length(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse a file that lost its end: SQLite would read the missing part as zeros."""
    log = path.with_name(path.name + "-wal")

    def has_log() -> bool:
        return log.exists() and log.stat().st_size > 0

    if not has_log():
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        # Pages that another process has added meanwhile are in its log only.
        if path.stat().st_size < pages * size and not has_log():
            raise UnusableFileError(DAMAGED.format(path=path), is_permanent=True)


def _pending_statements(connection: sqlite3.Connection) -> list[str]:
    """Return the statements that bring the file up to date."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    application = int(connection.execute("PRAGMA application_id").fetchone()[0])
    tables = int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    refusal = ""
    if application != APPLICATION_ID:
        if not (version or application or tables):
            return [*SCHEMA, *(statement for step in MIGRATIONS for statement in step)]
        refusal = "The journal's file belongs to another program."
    elif version > SCHEMA_VERSION + len(MIGRATIONS):
        refusal = "The journal was written by a newer nbcodex: update this one."
    elif version < SCHEMA_VERSION:
        refusal = (
            "The journal was written by an nbcodex from before its first release. "
            "To begin a new journal, move its file away."
        )
    if refusal:
        raise UnusableFileError(refusal, is_permanent=True)
    return [statement for step in MIGRATIONS[version - SCHEMA_VERSION :] for statement in step]
