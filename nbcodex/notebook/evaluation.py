"""A cell that is run so that what it tells becomes the prompt: `--eval`.

It is the user's own cell, run as IPython would run it, but for `await` at its top level. No answer
ever comes here.
"""

from __future__ import annotations

import ast
import io
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError

from nbcodex.notebook.prompt import Filled, fill

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


def told(shell: InteractiveShell, cell: str) -> Filled:
    """Return what `cell` prints, and the value of its last expression, as a prompt.

    Raises
    ------
    Exception
        Whatever the cell raises; nothing is to be sent then.
    UsageError
        If it says nothing.
    """
    __tracebackhide__ = True
    with redirect_stdout(io.StringIO()) as printed:
        value = _run(shell, cell)
    last = Filled("") if value is None else fill("{value}", {"value": value})
    text = printed.getvalue() + last.text
    if not text.strip():
        raise UsageError("%%codex --eval: the cell printed nothing, so there is nothing to ask")
    return Filled(text.removesuffix("\n"), images=last.images)


def _run(shell: InteractiveShell, cell: str) -> Any:
    """Run a cell in the notebook's namespace; return its last expression's value, if it has one."""
    __tracebackhide__ = True
    source = shell.transform_cell(cell)  # type: ignore[no-untyped-call]
    # Under a name of the compiler's own, a traceback shows the cell's lines.
    name = shell.compile.cache(source, len(shell.user_ns["In"]) - 1, raw_code=cell)
    tree = shell.transform_ast(ast.parse(source, name))  # type: ignore[no-untyped-call]
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    flags = shell.compile.flags
    exec(compile(tree, name, "exec", flags), shell.user_ns)  # noqa: S102 - the user's own cell
    if last is None:
        return None
    expression = compile(ast.Expression(last.value), name, "eval", flags)
    return eval(expression, shell.user_ns)  # noqa: S307 - the same
