"""Words about code: of an answer into a cell, and of a cell that failed to one that does not."""

from __future__ import annotations

from IPython.core.error import UsageError
from IPython.display import display

from nbcodex.client import current
from nbcodex.errors import NbcodexError
from nbcodex.notebook import identity
from nbcodex.notebook.commands.base import CommandGroup, print_line
from nbcodex.notebook.session import View
from nbcodex.rendering import formats, html
from nbcodex.requests.options import build_request


class Code(CommandGroup):
    """Code from answers. Nothing of it is ever run."""

    def insert(self, number: str = "1") -> None:
        """Put a block of code of the last answer into a new cell, not run: insert [N]."""
        last = self._config.last
        if last is None:
            raise NbcodexError("There is no answer yet.", advice="Ask with `%%codex -f code`.")
        if last.status == "running":
            raise NbcodexError(f"{last.id} is under way.", advice="Insert when it is there.")
        blocks = formats.extract_code(last.text)
        if not blocks:
            raise NbcodexError("The last answer holds no code.", advice="Ask with `-f code`.")
        if not number.isdecimal() or not 1 <= int(number) <= len(blocks):
            raise UsageError(f"%codex insert: a number from 1 to {len(blocks)}, not {number[:20]}")
        code = blocks[int(number) - 1]
        self._session.shell.set_next_input(code, replace=False)
        if not hasattr(self._session.shell, "kernel"):
            print_line(html.printable(code))
            return
        # Front ends that put nothing into cells, such as VS Code and Colab, still let it be copied.
        shown = {"text/html": html.code_listing([code]), "text/plain": html.printable(code)}
        display(shown, raw=True)  # type: ignore[no-untyped-call]

    def fix(self, cell: str = "") -> None:
        """Have the last error explained, and the mended cell put below, not run: fix [CELL]."""
        found = self._config.last_error
        if found is None:
            raise NbcodexError(
                "There is no error to explain.",
                advice="`%codex fix` takes the last one that a cell raised.",
            )
        if cell and cell != str(found.cell_number):
            raise UsageError(f"%codex fix: the last error is that of cell {found.cell_number}")
        origin = identity.current_origin(self._session.shell)
        request = build_request(found.as_prompt(), self._settings, origin=origin)
        where = f" in cell {found.cell_number}" if found.cell_number else ""
        error = found.traceback.rpartition("\n")[2]
        view = View(form="fix", heading=f"{error}{where}")
        reply = self._session.answer(current().handle(request, self._settings), view)
        self._session.insert_code(reply, view)
