"""Where the journal lies. Must not know what is in the file."""

from __future__ import annotations

from pathlib import Path

from nbcodex.journal.trouble import UnusableError
from nbcodex.runtime import paths as folders
from nbcodex.runtime.paths import on_network
from nbcodex.settings import JOURNAL_FILENAME

__all__ = ["on_network", "prepare"]


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
        return folders.prepare(folder, JOURNAL_FILENAME)
    except folders.UnsafePathError as error:
        raise UnusableError(str(error)) from None
