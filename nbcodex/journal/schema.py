"""The tables, as an append-only list of migrations.

Owns what a journal's file looks like. A migration that was released is never edited: a change is a
further entry at the end.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from nbcodex.journal.diagnosis import UnusableFileError

APPLICATION = 0x6E626378
"""SQLite's application id: ``nbcx``."""

MIGRATIONS: list[list[str]] = [
    [
        """CREATE TABLE entries (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            status TEXT NOT NULL,
            owner INTEGER,
            notebook TEXT,
            cell TEXT,
            variable TEXT,
            key BLOB,
            added_at REAL NOT NULL,
            updated_at REAL NOT NULL,
            attempts INTEGER NOT NULL DEFAULT 0,
            resume_at REAL,
            limits TEXT,
            error TEXT,
            response_id TEXT,
            sequence INTEGER,
            request TEXT NOT NULL,
            reply TEXT,
            text TEXT NOT NULL DEFAULT ''
        )""",
        """CREATE INDEX entries_open ON entries (status, seq)
            WHERE status IN ('pending', 'running', 'waiting', 'parked')""",
        """CREATE INDEX entries_answered ON entries (key)
            WHERE status = 'done' AND key IS NOT NULL""",
        "CREATE INDEX entries_age ON entries (added_at)",
        "CREATE INDEX entries_notebook ON entries (notebook)",
        """CREATE TABLE owners (
            id INTEGER PRIMARY KEY,
            host TEXT NOT NULL,
            boot TEXT NOT NULL,
            space TEXT NOT NULL,
            pid INTEGER NOT NULL,
            start INTEGER NOT NULL,
            beat_at REAL NOT NULL,
            beat_now REAL NOT NULL
        )""",
        """CREATE VIEW book AS
            SELECT e.*, o.host, o.boot, o.space, o.pid, o.start, o.beat_at, o.beat_now
            FROM entries AS e LEFT JOIN owners AS o ON o.id = e.owner""",
        """CREATE TABLE totals (
            requests INTEGER NOT NULL DEFAULT 0,
            answers INTEGER NOT NULL DEFAULT 0,
            input_tokens INTEGER NOT NULL DEFAULT 0,
            cached_tokens INTEGER NOT NULL DEFAULT 0,
            output_tokens INTEGER NOT NULL DEFAULT 0,
            reasoning_tokens INTEGER NOT NULL DEFAULT 0,
            cost REAL NOT NULL DEFAULT 0,
            waited REAL NOT NULL DEFAULT 0
        )""",
        "INSERT INTO totals DEFAULT VALUES",
        "CREATE TABLE salt (value BLOB NOT NULL)",
        "INSERT INTO salt VALUES (randomblob(32))",
        "PRAGMA application_id = 1851941752",
        "PRAGMA user_version = 1",
    ],
    [
        """CREATE TABLE spending (
            day TEXT PRIMARY KEY,
            tokens INTEGER NOT NULL,
            dollars REAL NOT NULL
        )""",
        "CREATE TABLE budget (text TEXT NOT NULL)",
        "PRAGMA user_version = 2",
    ],
    [
        "ALTER TABLE entries ADD COLUMN batch TEXT",
        "ALTER TABLE entries ADD COLUMN item INTEGER",
        # Of a map, the row that was added first stands for all in a list.
        "ALTER TABLE entries ADD COLUMN listed INTEGER NOT NULL DEFAULT 1",
        "CREATE INDEX entries_listed ON entries (seq) WHERE listed = 1",
        """CREATE INDEX entries_batch ON entries (batch, status, owner, item)
            WHERE batch IS NOT NULL""",
        "PRAGMA user_version = 3",
    ],
    [
        "ALTER TABLE entries ADD COLUMN thread TEXT",
        "ALTER TABLE entries ADD COLUMN chapter INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE entries ADD COLUMN place INTEGER",
        "ALTER TABLE entries ADD COLUMN begins INTEGER NOT NULL DEFAULT 0",
        """CREATE INDEX entries_thread
            ON entries (thread, notebook, seq, chapter, place, cell, status, begins)
            WHERE thread IS NOT NULL""",
        """CREATE TABLE chapters (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            notebook TEXT,
            thread TEXT NOT NULL,
            begun_at REAL NOT NULL
        )""",
        "DROP VIEW book",
        """CREATE VIEW book AS
            SELECT e.*, o.host, o.boot, o.space, o.pid, o.start, o.beat_at, o.beat_now
            FROM entries AS e LEFT JOIN owners AS o ON o.id = e.owner""",
        "PRAGMA user_version = 4",
    ],
    [
        # The part of a map with which a row went to a provider's Batch API.
        "ALTER TABLE entries ADD COLUMN part TEXT",
        "CREATE INDEX entries_part ON entries (part) WHERE part IS NOT NULL",
        """CREATE INDEX entries_away ON entries (key)
            WHERE part IS NOT NULL AND status IN ('waiting', 'parked')""",
        """CREATE TABLE parts (
            tag TEXT PRIMARY KEY,
            base_url TEXT NOT NULL,
            file TEXT,
            remote TEXT
        )""",
        "DROP VIEW book",
        """CREATE VIEW book AS
            SELECT e.*, o.host, o.boot, o.space, o.pid, o.start, o.beat_at, o.beat_now
            FROM entries AS e LEFT JOIN owners AS o ON o.id = e.owner""",
        "PRAGMA user_version = 5",
    ],
    [
        # What is set aside for requests under way, where a cap is kept for all kernels.
        """CREATE TABLE asides (
            id TEXT PRIMARY KEY,
            owner INTEGER NOT NULL,
            tokens INTEGER NOT NULL,
            dollars REAL NOT NULL
        )""",
        "ALTER TABLE totals ADD COLUMN unknown INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE totals ADD COLUMN unpriced INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE totals ADD COLUMN estimated INTEGER NOT NULL DEFAULT 0",
        "PRAGMA user_version = 6",
    ],
]


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the file up to date; of several processes that try at once, one does it.

    Raises
    ------
    UnusableError
        If a newer nbcodex wrote the file, or another program.
    """
    with _transaction(connection, "BEGIN"):  # of one moment: another process may be at it
        pending = _pending(connection)
    if pending:
        with _transaction(connection, "BEGIN IMMEDIATE"):
            for statement in [s for step in _pending(connection) for s in step]:
                connection.execute(statement)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _pending(connection: sqlite3.Connection) -> list[list[str]]:
    """Return the migrations that the file still lacks."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    application = int(connection.execute("PRAGMA application_id").fetchone()[0])
    if version > len(MIGRATIONS) and application == APPLICATION:
        raise UnusableFileError(
            "The journal was written by a newer nbcodex: update this one.", lasting=True
        )
    tables = int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    if application != APPLICATION and (version or application or tables):
        raise UnusableFileError("The journal's file belongs to another program.", lasting=True)
    return MIGRATIONS[max(version, 0) :]


_UNDER_WAY = """SELECT 1 FROM entries
WHERE status IN ('pending', 'running', 'waiting', 'parked') AND notebook = ? LIMIT 1"""
"""The condition of the partial index `entries_open`, to the letter."""


def may_have_unfinished(path: Path, notebook: str) -> bool:
    """Return whether a notebook may have parked or abandoned requests in the file at `path`.

    True if that cannot be told: whoever opens the journal properly will say why.
    """
    if not path.exists():
        return False
    try:
        with closing(sqlite3.connect(path, timeout=0.05)) as connection:
            connection.execute("PRAGMA query_only = 1")
            return connection.execute(_UNDER_WAY, (notebook,)).fetchone() is not None
    except (sqlite3.Error, UnicodeDecodeError):  # names of tables that are no text any more
        return True
