"""Limit models of all processes of one machine, in a SQLite file: one row a model.

Blocks, so it is used off the event loop. Owns what becomes of the file in a forked child.
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
from typing import Any

from nbcodex.ratelimit.sharing import SharedModel, model_after_reboot
from nbcodex.ratelimit.stores import DAMAGE, ResultT, StoreError, pack, unpack
from nbcodex.runtime import fork_safety
from nbcodex.runtime.clock import boot_id
from nbcodex.runtime.paths import UnsafePathError, on_network, prepare
from nbcodex.settings import LIMITER_FILENAME

# For another process's transaction; and for a running one, before a fork.
BUSY_TIMEOUT_S = 2.0
FORK_WAIT_S = 2.0

# The table's name stands for the stored form. Versions that keep other numbers must use another
# name, so that they do not disturb each other when they run side by side.
TABLE = "bucket_dcb40d47"
_SCHEMA = (
    f"CREATE TABLE IF NOT EXISTS {TABLE} (name TEXT PRIMARY KEY, boot TEXT, state TEXT)",
    "CREATE TABLE IF NOT EXISTS salt (one INTEGER PRIMARY KEY, value BLOB NOT NULL)",
    "INSERT OR IGNORE INTO salt VALUES (1, randomblob(16))",
)
_SELECT = f"SELECT boot, state FROM {TABLE} WHERE name = ?"  # noqa: S608 - a constant
_WRITE = (
    f"INSERT INTO {TABLE} VALUES (?, ?, ?) ON CONFLICT (name) "  # noqa: S608 - the same
    "DO UPDATE SET boot = excluded.boot, state = excluded.state"
)
_encode = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode
_BUSY_CODES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}


def open_in(folder: Path) -> SqliteStore:
    """Return the store in `folder`, which is created where it does not exist."""
    try:
        path = prepare(folder, LIMITER_FILENAME)
        if on_network(folder):
            # Locks cannot be trusted there.
            raise StoreError(f"{folder} is on a network file system.")
        return SqliteStore(path, boot=boot_id())
    except UnsafePathError as error:
        raise StoreError(str(error)) from None
    except OSError as error:
        raise StoreError(f"{folder} cannot be used: {error.strerror or 'input failed'}.") from None


class SqliteStore:
    """Keeps models in a file on a local file system that several processes use at once.

    `boot` names this run of the machine: instants of another one mean nothing, so of what was kept
    then only the history counts.
    """

    def __init__(self, path: Path, *, boot: str) -> None:
        self._path, self._boot = path, boot
        self._lock = threading.RLock()
        self._in_batch = False
        self._models: dict[str, SharedModel] = {}  # as read, until another process writes
        self._changed: dict[str, Any] = {}
        self._version: int | None = None
        try:
            self._connection = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            # With synchronous=OFF, a power cut loses the last moments, which then mean nothing:
            # the boot id changes.
            for order in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=OFF", *_SCHEMA):
                self._execute_patiently(order)
            (salt,) = self._connection.execute("SELECT value FROM salt").fetchone()
            self.salt = bytes(salt)
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        fork_safety.register(self)

    def _execute_patiently(self, order: str) -> list[Any]:
        # SQLite does not ask its busy handler while the journal mode of a new file changes.
        give_up_at = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                return self._connection.execute(order).fetchall()
            except sqlite3.OperationalError as error:
                code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
                if code not in _BUSY_CODES or time.monotonic() >= give_up_at:
                    raise
            time.sleep(random.uniform(0.001, 0.02))  # noqa: S311 - spreads processes

    def transaction(self, name: str, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        """Let `operation` read and change the model `name`, and return its result."""
        with self.batch():
            try:
                shared = self._current(name)
                result = operation(shared)
            except BaseException as error:
                self._models.pop(name, None)  # with what a failed operation has done to it
                if name in self._changed:
                    self._models[name] = unpack(SharedModel, self._changed[name])
                if isinstance(error, sqlite3.Error):
                    raise self._unusable(error) from None
                raise
            self._changed[name] = pack(shared)
        return result

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Let the operations within be one transaction; one that fails is undone by itself."""
        with self._lock:
            if self._in_batch:
                yield
                return
            self._in_batch = True
            try:
                yield
                for name, packed in self._changed.items():
                    self._connection.execute(_WRITE, (name, self._boot, _encode(packed)))
                if self._connection.in_transaction:
                    self._connection.execute("COMMIT")
            except BaseException as error:
                self._models.clear()
                with contextlib.suppress(sqlite3.Error):
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise self._unusable(error) from None
                raise
            finally:
                self._in_batch = False
                self._changed.clear()

    def _current(self, name: str) -> SharedModel:
        """Return a model; it is read again only if another process has written meanwhile."""
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
            if version != self._version:
                self._version = version
                self._models.clear()
        if name not in self._models:
            self._models[name] = self._load(name)
        return self._models[name]

    def _load(self, name: str) -> SharedModel:
        boot, state = self._connection.execute(_SELECT, (name,)).fetchone() or (None, None)
        if state is None:
            return SharedModel()
        try:
            shared = unpack(SharedModel, json.loads(state))
            if boot == self._boot:
                return shared
            return SharedModel(model=model_after_reboot(shared.model))
        except DAMAGE:
            return SharedModel()  # what was learned is learned again

    def _unusable(self, error: sqlite3.Error) -> StoreError:
        return StoreError(f"{self._path} cannot be used: {error}.")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def before_fork(self) -> bool:
        """Before a fork: wait until no operation is being done, and let none begin."""
        return self._lock.acquire(timeout=FORK_WAIT_S)

    def after_fork_in_parent(self) -> None:
        """After a fork, in the parent: the end of a `pause` that succeeded."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """After a fork, in the child: leak the connection, as closing it breaks the parent's."""
        # POSIX locks of a process go with any descriptor that is closed: "How To Corrupt An SQLite
        # Database File", section 2.6 (https://www.sqlite.org/howtocorrupt.html).
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
