"""`%load_ext nbcodex`: the magics `%%codex` and `%codex`, and their registration in a shell.

It is loaded at the start of every notebook, so slow modules are imported when a magic runs.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, cast

from IPython import get_ipython
from IPython.core.error import UsageError
from IPython.core.interactiveshell import ExecutionResult, InteractiveShell
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand
from traitlets import TraitError

from nbcodex.errors import ConfigurationError, Stopped
from nbcodex.journal.schema import may_have_unfinished
from nbcodex.notebook import completion
from nbcodex.notebook.config import Codex
from nbcodex.notebook.identity import notebook_id
from nbcodex.settings import JOURNAL_FILENAME, data_folder

# At most one, the settings before the last unload: `%reload_ext` must not lose typed keys.
_config_before_unload: list[Any] = []


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
        from nbcodex.notebook.session import Session
        from nbcodex.notebook.variables import caller_scope

        args = cell_options.parse_options(line)
        if not cell.strip():
            raise UsageError("%%codex: the prompt is empty: write it below the first line")
        try:
            # Settings are read for each cell: `%config` and the environment may change between two.
            session = Session(self._shell, self._config, caller_scope(self._shell))
            if args.map:
                from nbcodex.notebook import map_cells

                map_cells.run_map_cell(session, args, cell)
            else:
                session.run_cell(args, cell)
        except Stopped:
            raise
        except KeyboardInterrupt:  # while variables were evaluated, or the journal opened
            raise Stopped("Stopped before anything was sent.") from None

    ask.getdoc = _option_help  # type: ignore[assignment]  # what IPython shows for `%%codex?`

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


def load(shell: InteractiveShell) -> None:
    """Register the magics and `%config Codex`."""
    # `%load_ext` after an upgrade in the same kernel must not leave the old magics registered.
    unload(shell)
    config = _create_config(shell)
    if _config_before_unload:
        config.copy_state(_config_before_unload.pop())
    shell.configurables.append(config)  # type: ignore[arg-type]  # annotated as a list of shells
    shell.register_magics(CodexMagics(shell, config))
    shell.events.register("post_run_cell", _record_error)
    completion.install(shell, config)
    if config.journal:
        path = data_folder(config.settings()) / JOURNAL_FILENAME
        if may_have_unfinished(path, notebook_id(shell)):
            from nbcodex.notebook.session import Session

            Session(shell, config).report_unfinished()


def _record_error(result: ExecutionResult) -> None:
    """Keep a cell's error, for ``{Err[3]}`` in a prompt."""
    if not result.success:
        from nbcodex.notebook.cell_errors import cell_errors

        cell_errors.record(result)


def _create_config(shell: InteractiveShell) -> Codex:
    try:
        return Codex(parent=shell)
    except TraitError as error:
        if not _config_before_unload:
            raise ConfigurationError(
                f"A setting of Codex is not valid: {error}",
                advice="Correct it in ipython_config.py.",
            ) from None
    # `%config` leaves a value that a trait rejected in the shell's configuration, where a reload
    # finds it again. The value before it stays in force.
    configured: Any = shell.config.Codex
    for name in configured:
        try:
            Codex(**{name: configured[name]})
        except TraitError:
            configured[name] = getattr(_config_before_unload[0], name)
    return Codex(parent=shell)


def connect_host() -> None:
    """Make the notebook that loaded the extension the host of `nbcodex.ask`."""
    shell = get_ipython()
    configs = [c for c in getattr(shell, "configurables", ()) if type(c).__name__ == "Codex"]
    if shell is not None and configs:
        from nbcodex.notebook.session import Session

        with contextlib.suppress(ConfigurationError):  # the next request reports it
            Session(shell, cast("Codex", configs[0]))  # changes `host.current`


def unload(shell: InteractiveShell) -> None:
    """Remove the magics and the settings; running requests continue to their ends."""
    # Compared by name: after a reload, this module's function and class are other objects than the
    # registered ones.
    for callback in list(shell.events.callbacks["post_run_cell"]):
        if getattr(callback, "__qualname__", "") == _record_error.__name__:
            shell.events.unregister("post_run_cell", callback)
    completion.uninstall(shell)
    for magic_kind in ("line", "cell"):
        shell.magics_manager.magics[magic_kind].pop("codex", None)
    configs = [c for c in shell.configurables if type(c).__name__ == "Codex"]
    _config_before_unload[:] = configs or _config_before_unload
    shell.configurables[:] = [c for c in shell.configurables if type(c).__name__ != "Codex"]
