"""The magics: `%%codex` sends a cell's text as a prompt, `%codex` runs a command.

The modules that requests need are imported when a magic runs, because `%load_ext` has to be fast.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from typing import TYPE_CHECKING

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand

from nbcodex.errors import Stopped

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.notebook.config import Codex


def _option_help() -> str:
    from nbcodex.notebook import cell_options

    return cell_options.parser().format_help()


@magics_class
class CodexMagics(Magics):
    """The magics of one shell."""

    def __init__(self, shell: InteractiveShell, config: Codex) -> None:
        super().__init__(shell)
        self._shell, self._config = shell, config

    @no_var_expand  # IPython would expand braces and `$` in prompts by rules of its own
    @cell_magic("codex")  # type: ignore[arg-type]  # IPython annotates it too narrowly
    def ask(self, line: str, cell: str) -> None:  # noqa: D102 - its options document it
        # With `--eval`, the traceback of an error in the user's cell then shows that cell only.
        __tracebackhide__ = True
        self._remember_error()
        from nbcodex.notebook import cell_options

        chosen = cell_options.parse_options(line)
        if not cell.strip():
            raise UsageError("%%codex: the prompt is empty: write it below the first line")
        try:
            self._ask(chosen, cell)
        except Stopped:
            raise
        except KeyboardInterrupt:  # while variables were evaluated, or the journal opened
            raise Stopped("Stopped before anything was sent.") from None

    ask.getdoc = _option_help  # type: ignore[assignment]  # what IPython shows for `%%codex?`

    def _ask(self, chosen: Namespace, cell: str) -> None:
        __tracebackhide__ = True
        from nbcodex.client import current
        from nbcodex.notebook import cell_options, identity, variables
        from nbcodex.notebook.display import OutputOptions
        from nbcodex.notebook.session import Session
        from nbcodex.requests.conversation import MAIN_THREAD
        from nbcodex.requests.options import build_request

        # Settings are read for each cell: `%config` and the environment may change between two.
        scope = variables.caller_scope(self._shell)
        session = Session(self._shell, self._config, scope)
        text = cell.removesuffix("\n")
        names = variables.user_variables(self._shell, scope)
        option_notes = cell_options.fill_options(chosen, names)
        if chosen.map:
            from nbcodex.notebook import map_cells

            map_cells.run_map_cell(session, chosen, text)
            return
        if chosen.eval:
            prompt = variables.run_for_prompt(self._shell, cell, scope)
        elif chosen.raw:
            prompt = variables.FilledPrompt(text)
        else:
            prompt = variables.fill(text, variables.user_variables(self._shell, scope, text))
        options, format_ = cell_options.request_options(chosen, session.variables)
        thread = MAIN_THREAD if chosen.thread is None else chosen.thread
        request = build_request(
            prompt.text,
            session.settings,
            replace(
                options,
                thread=None if chosen.no_history else thread,
                images=[*prompt.images, *variables.images_of(chosen.image, self._shell, scope)],
            ),
            origin=identity.current_origin(self._shell, variable=chosen.out),
        )
        # Joined last: a prompt that fails before must leave the conversation as it is.
        request, turn_notes = current().join(request, session.settings, start_new=chosen.new)
        notes = [*option_notes, *prompt.notes, *turn_notes]
        output = OutputOptions(format=format_, notes=notes)
        if chosen.dry_run:
            session.dry_run(request, notes)
            return
        handle = current().handle(request, session.settings)
        if chosen.background:
            session.answer_in_background(handle, output)
        else:
            session.show_answer(handle, output)

    @no_var_expand
    @line_magic("codex")  # type: ignore[arg-type]
    def command(self, line: str) -> None:
        """Manage requests, limits and settings; `%codex help` lists the commands."""
        from nbcodex.notebook import commands
        from nbcodex.notebook.session import Session

        self._remember_error()
        commands.run(Session(self._shell, self._config), line)

    def _remember_error(self) -> None:
        # Python keeps one last error only, and an error of this magic would replace the user's,
        # which `%codex fix` is about.
        if getattr(sys, "last_value", None) is not None:
            from nbcodex.notebook.cell_errors import last_error

            self._config.last_error = last_error(self._shell) or self._config.last_error
