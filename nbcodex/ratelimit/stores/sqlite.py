"""Observed buckets of all processes of one machine and key, in a SQLite file.

Deeds are done in `BEGIN IMMEDIATE` transactions, one row a bucket. Blocks, so it is used off the
event loop, and from one thread. Owns what becomes of the file in a forked child.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from nbcodex.ratelimit.sharing import SharedModel, successor
from nbcodex.ratelimit.stores import StoreError, pack, unpack
from nbcodex.runtime import fork_safety
from nbcodex.runtime.clock import boot
from nbcodex.runtime.paths import UnsafePathError, on_network, prepare
from nbcodex.settings import LIMITER_FILENAME

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds that SQLite waits for another process's transaction."""
PAUSE = 2.0
"""Seconds that a fork waits for a deed to end, at most."""

_TABLE = "bucket_dcb40d47"
"""Versions that keep other numbers have another table, and do not disturb each other."""
_SCHEMA = (
    f"CREATE TABLE IF NOT EXISTS {_TABLE} (name TEXT PRIMARY KEY, boot TEXT, state TEXT)",
    "CREATE TABLE IF NOT EXISTS salt (one INTEGER PRIMARY KEY, value BLOB NOT NULL)",
    "INSERT OR IGNORE INTO salt VALUES (1, randomblob(16))",
)
_SELECT = f"SELECT boot, state FROM {_TABLE} WHERE name = ?"  # noqa: S608 - a constant
_WRITE = (
    f"INSERT INTO {_TABLE} VALUES (?, ?, ?) ON CONFLICT (name) "  # noqa: S608 - the same
    "DO UPDATE SET boot = excluded.boot, state = excluded.state"
)
_encoded = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}


def open_in(folder: Path) -> SqliteStore:
    """Return the store in `folder`, which is made where there is none.

    Raises
    ------
    StoreError
        If the folder or the file cannot serve, or lies on a network: locks lie there.
    """
    try:
        path = prepare(folder, LIMITER_FILENAME)
        if on_network(folder):
            raise StoreError(f"{folder} lies on a network file system.")
        return SqliteStore(path, boot=boot())
    except UnsafePathError as error:
        raise StoreError(str(error)) from None
    except OSError as error:
        raise StoreError(f"{folder} cannot be used: {error.strerror or 'input failed'}.") from None


class SqliteStore:
    """Keeps buckets in a file that several processes use at once.

    Parameters
    ----------
    path : Path
        The file; on a local file system, as locks on others lie.
    boot : str
        Names this run of the machine: instants of another one mean nothing, so of what was kept
        then only what was learnt counts.

    Raises
    ------
    StoreError
        If the file cannot be used.
    """

    def __init__(self, path: Path, *, boot: str) -> None:
        self._path, self._boot = path, boot
        self._at_work = threading.RLock()
        self._is_open = False
        self._read: dict[str, SharedModel] = {}
        self._changed: dict[str, Any] = {}
        self._version: int | None = None
        try:
            self._connection = sqlite3.connect(
                path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
            )
            self.salt = self._begin()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        fork_safety.attend(self)

    def _begin(self) -> bytes:
        # Losing the last moments to a power cut costs nothing: boot changes then. SQLite's own busy
        # handler is not asked while the mode of a new file changes.
        for order in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=OFF", *_SCHEMA):
            _insist(lambda order=order: self._connection.execute(order).fetchall())  # type: ignore[misc]
        (salt,) = self._connection.execute("SELECT value FROM salt").fetchone()
        return bytes(salt)

    def transaction(self, name: str, deed: Callable[[SharedModel], T]) -> T:
        """Let `deed` read and change the bucket `name`, and return what it returns.

        Raises
        ------
        StoreError
            If the file cannot be used; nothing has changed then.
        """
        with self.batch():
            try:
                shared = self._current(name)
                result = deed(shared)
            except BaseException as error:
                self._undo(name)
                if isinstance(error, sqlite3.Error):
                    raise self._unusable(error) from None
                raise
            self._changed[name] = pack(shared)
        return result

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Let the deeds within be one transaction; one that fails is undone by itself.

        Raises
        ------
        StoreError
            At the end, if the file cannot be used: none of them is kept then.
        """
        with self._at_work:
            if self._is_open:
                yield
                return
            self._is_open = True
            try:
                yield
                self._commit()
            except BaseException as error:
                self._roll_back()
                if isinstance(error, sqlite3.Error):
                    raise self._unusable(error) from None
                raise
            finally:
                self._is_open = False
                self._changed.clear()

    def _commit(self) -> None:
        for name, packed in self._changed.items():
            self._connection.execute(_WRITE, (name, self._boot, _encoded(packed)))
        if self._connection.in_transaction:
            self._connection.execute("COMMIT")

    def _roll_back(self) -> None:
        self._read.clear()
        with contextlib.suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def _undo(self, name: str) -> None:
        """Forget what a deed that failed has done to a bucket."""
        self._read.pop(name, None)
        if name in self._changed:
            self._read[name] = unpack(SharedModel, self._changed[name])

    def _current(self, name: str) -> SharedModel:
        """Return a bucket; it is read again only if another process has written meanwhile."""
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
            if version != self._version:
                self._version = version
                self._read.clear()
        if name not in self._read:
            self._read[name] = self._load(name)
        return self._read[name]

    def _load(self, name: str) -> SharedModel:
        boot, state = self._connection.execute(_SELECT, (name,)).fetchone() or (None, None)
        if state is None:
            return SharedModel()
        try:
            shared = unpack(SharedModel, json.loads(state))
            # What was learnt before the machine was started outlives it.
            return shared if boot == self._boot else SharedModel(bucket=successor(shared.bucket))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            # A damaged row: what was learnt is learnt again.
            return SharedModel()

    def _unusable(self, error: sqlite3.Error) -> StoreError:
        return StoreError(f"{self._path} cannot be used: {error}.")

    def close(self) -> None:
        """Close the file."""
        with self._at_work:
            self._connection.close()

    def pause(self) -> bool:
        """Before a fork: wait until no deed is being done, and let none begin."""
        return self._at_work.acquire(timeout=PAUSE)

    def go_on(self) -> None:
        """After a fork, in the parent: the end of a `pause` that succeeded."""
        self._at_work.release()

    def forsake(self) -> None:
        """In a forked child: never close what is the parent's (SQLite's "How To Corrupt", 2.6)."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))


def _insist(step: Callable[[], object]) -> None:
    """Do a step, as soon as nobody keeps the file locked."""
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            step()
        except sqlite3.OperationalError as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            if code not in _BUSY or time.monotonic() >= give_up:
                raise
        else:
            return
        time.sleep(random.uniform(0.001, 0.02))  # noqa: S311 - spreads processes, hides nothing
