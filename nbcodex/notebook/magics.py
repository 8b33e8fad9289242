"""The magics `%%codex` and `%codex`: a cell's way from its text to what stays below it."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand

from nbcodex.errors import Stopped

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.notebook.config import Codex


def _documented(magic: Callable[[CodexMagics, str, str], None]) -> Callable[..., None]:
    """Give the magic the help of its options, made when somebody asks for it: ``%%codex?``."""

    def help_of_options() -> str:
        from nbcodex.notebook import options

        return options.parser().format_help()

    magic.getdoc = help_of_options  # type: ignore[attr-defined]  # where IPython looks first
    return magic


@magics_class
class CodexMagics(Magics):
    """The magics of one shell."""

    def __init__(self, shell: InteractiveShell, config: Codex) -> None:
        super().__init__(shell)
        self._shell, self._config = shell, config

    @no_var_expand
    @cell_magic("codex")  # type: ignore[arg-type]  # IPython annotates it too narrowly
    @_documented
    def ask(self, line: str, cell: str) -> None:  # noqa: D102 - its options document it
        __tracebackhide__ = True  # of an error in a cell that --eval runs, only that cell is shown
        self._remember_failure()
        from nbcodex.notebook import options

        chosen = options.read(line)
        if not cell.strip():
            raise UsageError("%%codex: the prompt is empty: write it below the first line")
        try:
            self._ask(chosen, cell)
        except Stopped:
            raise
        except KeyboardInterrupt:
            raise Stopped("Stopped before anything was sent.") from None

    def _ask(self, chosen: Namespace, cell: str) -> None:
        __tracebackhide__ = True
        from nbcodex.client import current
        from nbcodex.notebook import identity, options, variables
        from nbcodex.notebook.session import Session, View
        from nbcodex.requests.conversation import MAIN_THREAD
        from nbcodex.requests.options import build_request

        session = Session(self._shell, self._config)
        if chosen.map:
            from nbcodex.notebook import map_cells

            map_cells.ask(session, chosen, cell.removesuffix("\n"))
            return
        text = cell.removesuffix("\n")
        if chosen.eval:
            prompt = variables.run_for_prompt(self._shell, cell)
        elif chosen.raw:
            prompt = variables.FilledPrompt(text)
        else:
            prompt = variables.fill(text, variables.variables(self._shell, text))
        output = options.output_spec(chosen, self._shell.user_ns)
        request = build_request(
            prompt.text,
            session.settings,
            model=chosen.model,
            system=output.system,
            max_output=chosen.max_output,
            effort=chosen.effort,
            params=output.params,
            patience=chosen.patience,
            api=output.api,
            schema=output.schema,
            api_base=chosen.api_base,
            reuse=chosen.reuse or None,
            durable=chosen.durable,
            origin=identity.current_origin(self._shell, variable=chosen.out),
            thread=None if chosen.no_history else chosen.thread or MAIN_THREAD,
            images=[*prompt.images, *variables.images_of(chosen.image, self._shell)],
        )
        joined = current().join(request, session.settings, anew=chosen.new)
        view = View(format=output.format, notes=[*prompt.notes, *joined.notes, *output.notes])
        if chosen.dry_run:
            session.dry_run(joined.request, view.notes)
            return
        handle = current().handle(joined.request, session.settings)
        if chosen.background:
            session.answer_in_background(handle, view)
        else:
            session.insert_code(session.show_answer(handle, view), view)

    @no_var_expand
    @line_magic("codex")  # type: ignore[arg-type]
    def command(self, line: str) -> None:
        """Look after requests, limits and settings; `%codex help` lists how."""
        from nbcodex.notebook import commands
        from nbcodex.notebook.session import Session

        self._remember_failure()
        commands.run(Session(self._shell, self._config), line)

    def _remember_failure(self) -> None:
        """Keep the user's last error for `%codex fix`, before one of ours takes its place."""
        if getattr(sys, "last_value", None) is not None:
            from nbcodex.notebook.cell_errors import last_error

            self._config.last_error = last_error(self._shell) or self._config.last_error
