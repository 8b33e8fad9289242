"""A glance at the journal's file: whether it is worth opening at all.

Owns one question, asked whenever the extension is loaded, which is to take no time: so it imports
none of the rest, and decides nothing of what it sees.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

_UNDER_WAY = """SELECT 1 FROM entries
WHERE status IN ('pending', 'running', 'waiting', 'parked') AND notebook = ? LIMIT 1"""
"""The condition of the partial index `entries_open`, to the letter."""


def may_be_unfinished(path: Path, notebook: str) -> bool:
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
