"""The last error of the notebook, as a prompt tells it: the cell, and the plain traceback."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from IPython.core.error import UsageError

from nbcodex.errors import NbcodexError, Stopped
from nbcodex.notebook.mishaps import by_cell

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

LONGEST = 12_000
"""Characters of a traceback, and of a cell; the beginning and the end tell most."""

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error, and where it arose.

    Parameters
    ----------
    count : int or None
        Number of the cell, as in ``In[3]``.
    code : str
        The cell.
    traceback : str
        What Python says, without colours.
    """

    count: int | None
    code: str
    traceback: str


def last(shell: InteractiveShell) -> Failure | None:
    """Return the last error that reached the user; None if there is none, or it is our own."""
    error = getattr(sys, "last_value", None)
    if not isinstance(error, BaseException) or isinstance(error, NbcodexError | Stopped):
        return None
    if isinstance(error, UsageError) and str(error).lstrip("%").startswith("codex"):
        return None
    return of_error(shell, error)


def of_error(shell: InteractiveShell, error: BaseException) -> Failure:
    """Return what there is to tell of an error: the cells that it went through."""
    counts = list(dict.fromkeys(n for name in _files(error) if (n := _cell(shell, name))))
    code = "\n\n".join(filter(None, (_source(shell, count) for count in counts)))
    if not code and isinstance(error, SyntaxError):
        code = error.text or ""
    frames = traceback.TracebackException.from_exception(error)
    _leave_out_ipython(frames)
    told = by_cell(_ANSI.sub("", "".join(frames.format())))
    count = counts[0] if counts else None
    return Failure(count=count, code=_shortened(code), traceback=_shortened(told))


def prompt(failure: Failure) -> str:
    """Return what is asked about a failure."""
    code, told = _fenced(failure.code, "python"), _fenced(failure.traceback, "text")
    cell = f"This cell of a Jupyter notebook raised an error.\n\n{code}\n\n" if failure.code else ""
    return (
        f"{cell}The error:\n\n{told}\n\nExplain its cause in a few sentences, without quoting code "
        "blocks. Then give the corrected cell, all of it, as the only fenced block."
    )


def _files(error: BaseException) -> Iterator[str]:
    """Yield the names of the files that an error came through, the outermost first."""
    yield from (frame.filename for frame in traceback.extract_tb(error.__traceback__))
    if isinstance(error, SyntaxError) and error.filename:
        yield error.filename


def _cell(shell: InteractiveShell, filename: str) -> int | None:
    """Return the number of the cell that a file's name stands for."""
    number = getattr(shell.compile, "_filename_map", {}).get(filename)
    return number if isinstance(number, int) else None


def _source(shell: InteractiveShell, count: int) -> str:
    """Return a cell as it was typed."""
    typed = getattr(shell.history_manager, "input_hist_raw", [])
    return str(typed[count]) if count < len(typed) else ""


def _leave_out_ipython(told: traceback.TracebackException) -> None:
    """Take away the frames of what runs cells: they are not the user's."""
    kept = [f for f in told.stack if "/IPython/core/" not in f.filename.replace("\\", "/")]
    told.stack = traceback.StackSummary.from_list(kept)


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text.strip("\n")
    half = LONGEST // 2
    return f"{text[:half]}\n[… {len(text) - LONGEST:,} characters left out …]\n{text[-half:]}"


def _fenced(text: str, info: str) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{info}\n{text}\n{fence}"
