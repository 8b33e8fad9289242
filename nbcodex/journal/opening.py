"""How a journal's database is opened: file or memory, with the same tables and the same settings.

Owns the pragmas, and the choice between write-ahead log and rollback journal. Must not know what
is done with the connection.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nbcodex.journal.diagnosis import DAMAGED, UnusableFileError
from nbcodex.journal.schema import migrate
from nbcodex.runtime import paths
from nbcodex.runtime.paths import on_network
from nbcodex.settings import JOURNAL_FILENAME

T = TypeVar("T")

FAR = 2**40
"""Where memory begins to number entries and chapters, at the least, beyond those of files: a number
from before a file failed, or served again, then names nothing of anybody else's. Each memory begins
elsewhere, as several kernels may fall back at once."""

_SIZES = ("count", "size")
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_NO_SHARED_MEMORY = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}


def open_file(folder: Path, *, patience: float) -> sqlite3.Connection:
    """Return a connection to the journal in `folder`, which is made where there is none.

    Parameters
    ----------
    patience : float
        Seconds to wait, at most, for others who hold it locked.

    Raises
    ------
    UnusableError, sqlite3.Error, OSError
        If the folder or the file cannot serve.
    """
    path = prepare(folder)
    connection = _connect(str(path), patience=patience)
    try:
        # SQLite's own busy handler is not asked while the mode of a new file changes.
        wait_for(lambda: _choose_mode(connection, network=on_network(folder)), patience=patience)
        wait_for(lambda: _check_length(connection, path), patience=patience)
        wait_for(lambda: migrate(connection), patience=patience)
    except BaseException:
        connection.close()
        raise
    return connection


def open_memory() -> sqlite3.Connection:
    """Return a connection to a new journal that ends with it."""
    connection = _connect(":memory:", patience=0.0)
    migrate(connection)
    begin = FAR + (secrets.randbits(20) << 20)
    numbered = [("entries", begin), ("chapters", begin)]
    connection.executemany("INSERT INTO sqlite_sequence VALUES (?, ?)", numbered)
    return connection


def wait_for(step: Callable[[], T], *, patience: float) -> T:
    """Return what `step` returns, as soon as nobody keeps the database locked."""
    give_up = time.monotonic() + patience
    while True:
        try:
            return step()
        except sqlite3.OperationalError as error:
            if primary(error) not in _BUSY or time.monotonic() >= give_up:
                raise
        time.sleep(random.uniform(0.001, 0.02))  # noqa: S311 - spreads processes, hides nothing


def primary(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code."""
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF


def _connect(target: str, *, patience: float) -> sqlite3.Connection:
    connection = sqlite3.connect(target, timeout=patience, isolation_level=None)
    connection.row_factory = sqlite3.Row
    connection.create_function("salted", 2, _salted, deterministic=True)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def _salted(key: bytes | None, salt: bytes) -> bytes | None:
    """Do what `salted` does in SQL: a statement of its own costs more than the hash."""
    if key is None:
        return None
    return hashlib.blake2b(key, key=salt[:64], digest_size=32).digest()


def _choose_mode(connection: sqlite3.Connection, *, network: bool) -> None:
    """Use a write-ahead log, except where the file system cannot share memory."""
    if network:
        connection.execute("PRAGMA journal_mode = DELETE").fetchone()
        return
    try:
        connection.execute("PRAGMA journal_mode = WAL").fetchone()
    except sqlite3.OperationalError as error:
        if primary(error) not in _NO_SHARED_MEMORY:
            raise
        connection.execute("PRAGMA journal_mode = DELETE").fetchone()


def _check_length(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse a file that lost its end: SQLite would read the missing part as zeros."""
    log = path.with_name(path.name + "-wal")

    def logged() -> bool:
        return log.exists() and log.stat().st_size > 0

    if not logged():
        pages, size = (connection.execute(f"PRAGMA page_{what}").fetchone()[0] for what in _SIZES)
        # A commit by another process meanwhile adds pages that are in its log only.
        if path.stat().st_size < pages * size and not logged():
            raise UnusableFileError(DAMAGED.format(path=path), lasting=True)


def prepare(folder: Path) -> Path:
    """Return the journal's path in `folder`; both exist, and are the user's alone.

    Raises
    ------
    UnusableError
        If somebody else owns the folder or the file, or can write to the folder.
    OSError
        If it cannot be created.
    """
    try:
        return paths.prepare(folder, JOURNAL_FILENAME)
    except paths.UnsafePathError as error:
        raise UnusableFileError(str(error)) from None
