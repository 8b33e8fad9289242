"""The errors of the cells that ran last, for ``{Err[3]}`` in a prompt.

Owns how a failure reads in a prompt: the cell's code, then the traceback from the cell on. Keeps
text alone, for an exception would keep every variable alive that its frames held.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import IPython

if TYPE_CHECKING:
    from IPython.core.interactiveshell import ExecutionResult

KEPT = 50
"""Cells whose errors are kept."""

LONGEST = 10_000
"""Characters of one traceback, and of one cell's code; the middle of a longer one is left out."""

FRAMES = 30
"""Frames of one traceback, counted from the place of the error."""

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_FILE = re.compile(r'File "([^"\n]+)", line')
_SHELL = str(Path(IPython.__file__).parent)


class Mishaps(dict[int, str]):
    """What went wrong, by the number of the cell; ``-1`` is the last failure."""

    def note(self, result: ExecutionResult) -> None:
        """Hear what came of a cell."""
        error = result.error_before_exec or result.error_in_exec
        if error is None or result.execution_count is None:
            return
        self.pop(result.execution_count, None)
        self[result.execution_count] = told(error, code=result.info.raw_cell if result.info else "")
        while len(self) > KEPT:
            del self[next(iter(self))]

    def __missing__(self, number: object) -> str:
        if isinstance(number, int) and -len(self) <= number < 0:
            return list(self.values())[number]
        raise KeyError(f"no error of cell {number} is known")


heard = Mishaps()
"""Those of this process's shell, kept through a `%reload_ext`."""


def told(error: BaseException, *, code: str) -> str:
    """Return a failure as it reads in a prompt, without colours."""
    return f"{_cut(code.strip())}\n\n{_cut(_traceback(error))}".strip()


def _traceback(error: BaseException) -> str:
    own: Callable[[], list[str]] | None = getattr(error, "_render_traceback_", None)
    try:
        if callable(own):
            return _ANSI.sub("", "\n".join(own()))
        if type(error).__name__ == "UsageError":  # of a magic, which IPython shows as one line
            return f"UsageError: {error}"
        return _formatted(error)
    except Exception:  # an exception of the user's own may fail to say what it is
        return type(error).__name__


def _formatted(error: BaseException) -> str:
    frames: Any = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename.startswith(_SHELL):
        frames = frames.tb_next
    lines = traceback.format_exception(type(error), error, frames, limit=-FRAMES)
    return by_cell("".join(lines).rstrip())


def by_cell(text: str) -> str:
    """Return a traceback with its cells' numbers in the place of their files."""
    return _FILE.sub(_cell_of, text)


def _cell_of(line: re.Match[str]) -> str:
    """Return the place of a frame: a cell by its number, whose file is another in each kernel."""
    shell: Any = IPython.get_ipython()
    name = shell and shell.compile.format_code_name(line[1])
    return f"{name[0]} {name[1]}, line" if name else line[0]


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]}\n…\n{text[-LONGEST // 2 :]}"
