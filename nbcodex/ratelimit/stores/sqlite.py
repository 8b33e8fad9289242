"""`SharedModel`s of all processes of one machine, in a SQLite file with one row for each.

Blocks, so it is used off the event loop. Owns what happens to the file in a forked child.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from nbcodex.ratelimit.sharing import SharedModel, model_after_reboot
from nbcodex.ratelimit.stores import DAMAGE, ResultT, Store, StoreError, decode, encode
from nbcodex.runtime import sqlite_files
from nbcodex.runtime.clock import boot_id
from nbcodex.settings import LIMITER_FILENAME

BUSY_TIMEOUT_S = 2.0  # how long another process's transaction is waited for

# A row is one model: the hashed name of its limits, the boot of the machine during which it was
# written, and its stored form. The table is named after that form: a version with another one uses
# another table, so that both can run side by side. Release 0.1 stored two more values at the end.
TABLE, EARLIER_TABLES = "model_9de2eb31", ("model_5f397cbb", "bucket_dcb40d47")
TABLES = (TABLE, *EARLIER_TABLES)
_SCHEMA = (
    *(
        f"CREATE TABLE IF NOT EXISTS {table} (name TEXT PRIMARY KEY, boot TEXT, state TEXT)"
        for table in TABLES
    ),
    "CREATE TABLE IF NOT EXISTS salt (one INTEGER PRIMARY KEY, value BLOB NOT NULL)",
    "INSERT OR IGNORE INTO salt VALUES (1, randomblob(16))",
)
_SELECT = " UNION ALL ".join(
    f"SELECT boot, state FROM {table} WHERE name = :name"  # noqa: S608 - constants
    for table in TABLES
)
_WRITE = f"INSERT OR REPLACE INTO {TABLE} VALUES (?, ?, ?)"  # noqa: S608 - the same


def open_in(folder: Path) -> SqliteStore:
    """Return the store in `folder`, which is created where it does not exist."""
    try:
        path = sqlite_files.prepare_file(folder, LIMITER_FILENAME)
        if sqlite_files.is_on_network(folder):
            raise StoreError(f"{folder} is on a network file system.")  # its locks are unreliable
        return SqliteStore(path, boot=boot_id())
    except sqlite_files.UnsafePathError as error:
        raise StoreError(str(error)) from None
    except OSError as error:
        raise StoreError(f"{folder} cannot be used: {error.strerror or 'input failed'}.") from None


class SqliteStore(Store):
    """Keeps models in a file on a local file system that several processes use at once.

    `boot` is the id of this boot of the machine. Instants of another boot mean nothing, so only the
    limit is kept of the models that were stored then.
    """

    def __init__(self, path: Path, *, boot: str) -> None:
        self._path, self._boot = path, boot
        self.fork_lock = threading.RLock()
        self._in_batch = False
        self._models: dict[str, SharedModel] = {}  # valid until another process writes
        self._changed: dict[str, str] = {}  # the models of this batch, encoded
        self._data_version: int | None = None  # SQLite's: it changes when another process writes
        try:
            self._connection = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            # With synchronous=OFF a power cut loses the last transactions, whose instants mean
            # nothing after the reboot anyway.
            for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=OFF", *_SCHEMA):
                execute = partial(self._connection.execute, statement)
                sqlite_files.retry_while_locked(execute, timeout=BUSY_TIMEOUT_S)
            (salt,) = self._connection.execute("SELECT value FROM salt").fetchone()
            self.salt = bytes(salt)
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        sqlite_files.register_for_forks(self)

    def transaction(self, name: str, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        """Let `operation` read and change the model `name`, and return its result."""
        with self.batch():
            try:
                shared = self._read(name)
                result = operation(shared)
            except BaseException as error:
                # Undo what the failed operation may have changed.
                self._models.pop(name, None)
                if name in self._changed:
                    self._models[name] = decode(SharedModel, json.loads(self._changed[name]))
                if isinstance(error, sqlite3.Error):
                    raise self._unusable(error) from None
                raise
            self._changed[name] = encode(shared)
        return result

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Commit the transactions within at once; one that fails is undone alone."""
        with self.fork_lock:
            if self._in_batch:
                yield
                return
            self._in_batch = True
            try:
                yield
                for name, state in self._changed.items():
                    self._connection.execute(_WRITE, (name, self._boot, state))
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

    def _read(self, name: str) -> SharedModel:
        """Return a model; the file is read only if another process has written to it."""
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
            if version != self._data_version:
                self._data_version = version
                self._models.clear()
        if name in self._models:
            return self._models[name]
        shared = SharedModel()
        if row := self._connection.execute(_SELECT, {"name": name}).fetchone():
            boot, state = row
            try:
                shared = decode(SharedModel, json.loads(state)[:4])  # the rest is release 0.1's
            except DAMAGE:
                self.on_damage()
            if boot != self._boot:
                shared = SharedModel(model=model_after_reboot(shared.model))
        self._models[name] = shared
        return shared

    def _unusable(self, error: sqlite3.Error) -> StoreError:
        return StoreError(f"{self._path} cannot be used: {error}.")

    def close(self) -> None:
        """Close the file."""
        with self.fork_lock:
            self._connection.close()

    def after_fork_in_child(self) -> None:
        """Keep the parent's connection open; this store is not used in the child."""
        sqlite_files.leak_connection(self._connection)
