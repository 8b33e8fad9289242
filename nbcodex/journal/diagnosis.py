"""What makes a journal's file unusable, and how that is said.

Owns the sentences. Must not know what was to be written.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

DAMAGED = "{path} is damaged. To begin a new journal, move it away."
_SENTENCES = {
    sqlite3.SQLITE_FULL: "The disk that holds {path} is full.",
    sqlite3.SQLITE_BUSY: "Another program keeps {path} locked.",
    sqlite3.SQLITE_LOCKED: "Another program keeps {path} locked.",
    sqlite3.SQLITE_PROTOCOL: "Another program keeps {path} locked.",
    sqlite3.SQLITE_READONLY: "{path} can only be read, not written.",
    sqlite3.SQLITE_PERM: "{path} can only be read, not written.",
    sqlite3.SQLITE_CANTOPEN: "{path} cannot be opened.",
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_NOTADB: DAMAGED,
    sqlite3.SQLITE_ERROR: DAMAGED,
}
_LASTING = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
_OF_THE_DATA = {sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}

RETRY = 60.0
"""Seconds after which a file that failed is tried again."""

FOR_GOOD = "Prompts work, but this kernel keeps them in memory only, until it ends."
FOR_NOW = "Prompts work, but are kept in memory only; the file is tried again every minute."


class UnusableFileError(Exception):
    """The file cannot serve.

    Parameters
    ----------
    message : str
        Why, in a sentence for the user.
    lasting : bool
        Whether trying again within this process is pointless.
    """

    retry = RETRY

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting

    @property
    def consequence(self) -> str:
        """What follows for the user, in another sentence."""
        return FOR_GOOD if self.lasting else FOR_NOW


class FileVanishedError(UnusableFileError):
    """The file was deleted or replaced while it was open: a new one may serve at once."""

    retry = 0.0


def diagnose(error: Exception, *, path: Path) -> UnusableFileError | None:
    """Return what `error` says about the file at `path`; None where the file is not to blame."""
    match error:
        case UnusableFileError():
            return error
        case sqlite3.ProgrammingError() | sqlite3.InterfaceError() | sqlite3.DataError():
            return None
        case sqlite3.Error():
            return _sqlite(error, path=path)
        case UnicodeDecodeError() | IndexError():  # the damage is in the names of columns
            return UnusableFileError(DAMAGED.format(path=path), lasting=True)
        case OSError():
            return UnusableFileError(
                f"{path} cannot be used: {error.strerror or 'input or output failed'}."
            )
        case _:
            return None


def _sqlite(error: sqlite3.Error, *, path: Path) -> UnusableFileError | None:
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in _OF_THE_DATA:
        return None
    sentence = _SENTENCES.get(code, "{path} cannot be read or written.")
    return UnusableFileError(sentence.format(path=path), lasting=code in _LASTING)
