"""Commands that write new cells from answers, or decide which earlier turns a cell sends."""

from __future__ import annotations

from IPython.core.error import UsageError
from IPython.display import display

from nbcodex.client import current
from nbcodex.errors import NbcodexError, shorten
from nbcodex.notebook import identity
from nbcodex.notebook.commands.base import CommandGroup, print_line
from nbcodex.notebook.session import View
from nbcodex.openai_api import pricing
from nbcodex.rendering import formats, html
from nbcodex.requests.conversation import MAIN_THREAD
from nbcodex.requests.options import build_request


class CodeCommands(CommandGroup):
    """Code from answers. It is never run."""

    def insert(self, number: str = "1") -> None:
        """Put a code block of the last answer into a new cell, without running it: insert [N]."""
        last = self._config.last
        if last is None:
            raise NbcodexError("There is no answer yet.", advice="Ask with `%%codex -f code`.")
        if last.status == "running":
            raise NbcodexError(
                f"{last.id} is still running.", advice="Try again when it has finished."
            )
        blocks = formats.code_of(last)
        if not blocks:
            raise NbcodexError("The last answer contains no code.", advice="Ask with `-f code`.")
        if not number.isdecimal() or not 1 <= int(number) <= len(blocks):
            raise UsageError(f"%codex insert: a number from 1 to {len(blocks)}, not {number[:20]}")
        block = blocks[int(number) - 1]
        if block.problem:
            raise NbcodexError(
                f"The code of block {number} may be incomplete: {block.problem}.",
                advice="Copy it from the answer if you want it all the same.",
            )
        code = block.code
        self._session.shell.set_next_input(code, replace=False)
        if block.warning:
            print_line(f"Read the code before you run it: {block.warning}.")
        if not hasattr(self._session.shell, "kernel"):
            print_line(code)
            return
        # VS Code and Colab ignore `set_next_input`: there the code can at least be copied.
        shown = {"text/html": html.code_listing([code]), "text/plain": code}
        display(shown, raw=True)  # type: ignore[no-untyped-call]

    def fix(self, cell: str = "") -> None:
        """Explain the last error and put a corrected cell below, without running it: fix [CELL]."""
        found = self._config.last_error
        if found is None:
            raise NbcodexError(
                "There is no error to explain.",
                advice="`%codex fix` explains the last error that a cell raised.",
            )
        if cell and cell != str(found.cell_number):
            where = f"in cell {found.cell_number}" if found.cell_number else "not in a cell"
            raise UsageError(
                f"%codex fix: only the last error can be explained, and it was {where}. "
                f"{{Err[{cell[:10]}]}} in a prompt is the error of another cell"
            )
        # No thread: a question about an error does not belong to the conversation.
        origin = identity.current_origin(self._session.shell)
        request = build_request(found.as_prompt(), self._settings, origin=origin)
        where = f" in cell {found.cell_number}" if found.cell_number else ""
        message = found.traceback.rpartition("\n")[2]
        # The prompt is long and not the user's, so the error itself stands above the answer.
        view = View(format="fix", heading=f"{message}{where}")
        reply = self._session.show_answer(current().handle(request, self._settings), view)
        self._session.insert_code(reply, view)


class ConversationCommands(CommandGroup):
    """The conversation of this notebook."""

    def new(self, thread: str = MAIN_THREAD) -> None:
        """Start the conversation afresh: new [THREAD] (also reset)."""
        session = self._session
        current().conversations.start_chapter(
            session.notebook, thread, session.journal.conversations
        )
        print_line(
            f"The conversation{_suffix(thread)} starts afresh: earlier turns are not sent again."
        )

    reset = new

    def history(self, thread: str = MAIN_THREAD) -> None:
        """Show the turns that the next cell sends along: history [THREAD]."""
        session = self._session
        turns = current().conversations.next_turns(
            session.notebook,
            thread,
            session.journal.conversations,
            limit=self._settings.max_history,
        )
        for number, turn in enumerate(turns, start=1):
            images = f" [{len(turn.images)} images]" if turn.images else ""
            prompt, answer = shorten(turn.prompt, 70), shorten(turn.answer, 70)
            print_line(f"{number:>3}  {prompt}{images}\n     → {answer}")
        within = f" in the conversation{_suffix(thread)}" if thread != MAIN_THREAD else ""
        if not turns:
            print_line(f"There are no turns{within} yet: the next cell sends its prompt alone.")
            return
        size, count = sum(map(pricing.estimate_turn_tokens, turns)), len(turns)
        print_line(
            f"{count} turn{'s' * (count > 1)}{within}, about {size:,} tokens; "
            f"`%codex new{_suffix(thread)}` starts afresh."
        )


def _suffix(thread: str) -> str:
    return "" if thread == MAIN_THREAD else f" {shorten(thread, 60)}"
