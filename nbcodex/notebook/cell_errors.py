"""The errors of the notebook's cells as text for a prompt: for ``{Err[3]}`` and for `%codex fix`.

Only text is stored: an exception would keep every variable in its frames alive.
"""

from __future__ import annotations

import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import IPython
from IPython.core.error import UsageError
from IPython.core.interactiveshell import ExecutionResult, InteractiveShell

from nbcodex.errors import NbcodexError, Stopped
from nbcodex.rendering.markdown import code_fence

MAX_KEPT_ERRORS = 50  # a notebook that fails in a loop must not fill the memory
MAX_ERROR_CHARS = 10_000  # of one traceback, and of one cell's code; the middle is left out
MAX_FRAMES = 30  # of one traceback, counted from the place of the error

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # terminal codes: ``\x1b[31m`` begins red text
_FILE = re.compile(r'File "([^"\n]+)", line')  # ``File "/tmp/ipykernel_7/12.py", line``
_IPYTHON_FOLDER = str(Path(IPython.__file__).parent)


class CellErrors(dict[int, str]):
    """Errors by the number of their cell; ``-1`` stands for the newest error."""

    def record(self, result: ExecutionResult) -> None:
        """Store the error of a cell that has run, if it raised one."""
        error = result.error_before_exec or result.error_in_exec
        if error is None or result.execution_count is None:
            return
        code = result.info.raw_cell if result.info else ""
        # After `%reset`, cell numbers begin again, and the newest error must be the last key.
        self.pop(result.execution_count, None)
        self[result.execution_count] = f"{_cut_middle(code)}\n\n{format_traceback(error)}".strip()
        while len(self) > MAX_KEPT_ERRORS:
            del self[next(iter(self))]

    def __missing__(self, number: object) -> str:
        if isinstance(number, int) and -len(self) <= number < 0:
            return list(self.values())[number]
        raise KeyError(f"no error of cell {number} is known")


cell_errors = CellErrors()  # of this process's shell; `%reload_ext` must not lose them


@dataclass(frozen=True, slots=True, kw_only=True)
class LastError:
    """The user's last error, for `%codex fix`."""

    cell_number: int | None  # as in ``In[3]``; None for an error outside of cells
    code: str  # source of the cells that the error passed through
    traceback: str  # Python's traceback without colours

    def as_prompt(self) -> str:
        """Return the prompt that asks for an explanation and a corrected cell."""
        code, error = code_fence(self.code, "python"), code_fence(self.traceback, "text")
        cell = f"This cell of a Jupyter notebook raised an error.\n\n{code}\n\n"
        return (
            f"{cell if self.code else ''}The error:\n\n{error}\n\nExplain its cause in a few "
            "sentences, without quoting code blocks. Then give the corrected cell, all of it, as "
            "the only fenced block."
        )


def last_error(shell: InteractiveShell) -> LastError | None:
    """Return the last error that the user saw; None if there is none or nbcodex raised it."""
    error = getattr(sys, "last_value", None)
    if not isinstance(error, BaseException) or isinstance(error, NbcodexError | Stopped):
        return None
    if isinstance(error, UsageError) and str(error).lstrip("%").startswith("codex"):
        return None
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        files.append(error.filename)  # its cell never ran, so no frame names it
    # IPython has no public way from a compiled file's name to its cell. Where this attribute is
    # missing, the prompt only lacks the code.
    number_by_file = getattr(shell.compile, "_filename_map", {})
    numbers = [n for n in dict.fromkeys(map(number_by_file.get, files)) if isinstance(n, int)]
    inputs = getattr(shell.history_manager, "input_hist_raw", [])
    code = "\n\n".join(str(inputs[n]) for n in numbers if n < len(inputs) and inputs[n])
    if not code and isinstance(error, SyntaxError):
        code = error.text or ""
    return LastError(
        cell_number=numbers[0] if numbers else None,
        code=_cut_middle(code),
        traceback=format_traceback(error),
    )


def format_traceback(error: BaseException) -> str:
    """Return an error's traceback as text for a prompt, with cell numbers instead of file names."""
    render: Any = getattr(error, "_render_traceback_", None)  # a protocol of IPython
    try:
        if callable(render):
            text = "\n".join(render())
        elif isinstance(error, UsageError):  # as IPython shows it
            text = f"UsageError: {error}"
        else:
            formatted = traceback.TracebackException.from_exception(error)
            # Without this, IPython's own frames would make up most of a short traceback.
            frames = [f for f in formatted.stack if not f.filename.startswith(_IPYTHON_FOLDER)]
            formatted.stack = traceback.StackSummary.from_list(frames[-MAX_FRAMES:])
            text = _FILE.sub(_name_cell, "".join(formatted.format()))
    except Exception:  # the `__str__` of a user's own exception may raise
        return type(error).__name__
    return _cut_middle(_ANSI.sub("", text))


def _name_cell(line: re.Match[str]) -> str:
    """Return ``Cell In[3], line`` for a match of `_FILE` that is a cell."""
    shell: Any = IPython.get_ipython()
    words = shell and shell.compile.format_code_name(line[1])  # such as ("Cell", "In[3]")
    return f"{words[0]} {words[1]}, line" if words else line[0]


def _cut_middle(text: str) -> str:
    text = text.strip()
    if len(text) <= MAX_ERROR_CHARS:
        return text
    half = MAX_ERROR_CHARS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"
