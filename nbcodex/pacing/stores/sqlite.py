"""Observed buckets of all processes of one machine and key, in a SQLite file.

A deed is one `BEGIN IMMEDIATE` transaction over one row. Blocks, so it is used off the event loop,
and from one thread.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nbcodex.pacing.packing import pack, unpack
from nbcodex.pacing.shares import Shared

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds that SQLite waits for another process's transaction."""

_SCHEMA = "CREATE TABLE IF NOT EXISTS bucket (name TEXT PRIMARY KEY, boot TEXT, state TEXT)"


class SqliteStore:
    """Keeps buckets in a file that several processes use at once.

    Parameters
    ----------
    path : Path
        The file; on a local file system, as locks on others lie.
    boot : str
        Names this run of the machine: instants of another one mean nothing, so what was kept then
        is forgotten.
    """

    def __init__(self, path: Path, *, boot: str) -> None:
        self._boot = boot
        self._connection = sqlite3.connect(
            path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
        )
        # Losing the last moments to a power cut costs nothing: boot changes then.
        for order in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=OFF", _SCHEMA):
            self._connection.execute(order)

    def deal(self, name: str, deed: Callable[[Shared], T]) -> T:
        """Let `deed` read and change the bucket `name`, and return what it returns.

        Raises
        ------
        sqlite3.Error
            If the file cannot be used; nothing has changed then.
        """
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        try:
            shared = self._load(name)
            result = deed(shared)
            state = json.dumps(pack(shared))
            run("INSERT OR REPLACE INTO bucket VALUES (?, ?, ?)", (name, self._boot, state))
        except BaseException:
            run("ROLLBACK")
            raise
        run("COMMIT")
        return result

    def _load(self, name: str) -> Shared:
        query = "SELECT state FROM bucket WHERE name = ? AND boot = ?"
        row = self._connection.execute(query, (name, self._boot)).fetchone()
        try:
            return unpack(Shared, json.loads(row[0])) if row else Shared()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            # Another version's row, or a damaged one: what was learnt is learnt again.
            return Shared()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
