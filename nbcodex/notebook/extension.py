"""`%load_ext nbcodex`: registers the magics and the settings.

Must not import what takes time: the extension is loaded at the start of every notebook.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

from IPython import get_ipython
from traitlets import TraitError

from nbcodex.errors import ConfigurationError
from nbcodex.journal.schema import may_have_unfinished
from nbcodex.notebook import completion
from nbcodex.notebook.config import Codex
from nbcodex.notebook.identity import notebook_id
from nbcodex.notebook.magics import CodexMagics
from nbcodex.settings import JOURNAL_FILENAME, data_folder

if TYPE_CHECKING:
    from IPython.core.interactiveshell import ExecutionResult, InteractiveShell

# The settings before an unload: `%reload_ext` must not lose keys and aliases that were typed in.
_unloaded: list[Any] = []


def load(shell: InteractiveShell) -> None:
    """Register the magics and `%config Codex`."""
    # `%load_ext` after an upgrade in the same kernel must not leave the old magics in place.
    unload(shell)
    config = _configured(shell)
    if _unloaded:
        config.copy_state(_unloaded.pop())
    shell.configurables.append(config)  # type: ignore[arg-type]  # annotated as a list of shells
    shell.register_magics(CodexMagics(shell, config))
    shell.events.register("post_run_cell", _record_error)
    completion.install(shell, config)
    if config.journal:
        _report_unfinished(shell, config)


def _record_error(result: ExecutionResult) -> None:
    """Keep a cell's error, for ``{Err[3]}`` in a prompt."""
    if not result.success:
        from nbcodex.notebook.cell_errors import cell_errors

        cell_errors.record(result)


def _configured(shell: InteractiveShell) -> Codex:
    try:
        return Codex(parent=shell)
    except TraitError as error:
        if not _unloaded:
            raise ConfigurationError(
                f"A setting of Codex is not valid: {error}",
                advice="Correct it in ipython_config.py.",
            ) from None
    # `%config` leaves a value that a trait refused in the shell's configuration, where a reload
    # finds it again. The earlier value stays in force.
    chosen: Any = shell.config.Codex
    for name in chosen:
        try:
            Codex(**{name: chosen[name]})
        except TraitError:
            chosen[name] = getattr(_unloaded[0], name)
    return Codex(parent=shell)


def connect_host() -> None:
    """Make the notebook that loaded the extension the host of `nbcodex.ask`."""
    shell = get_ipython()
    config = [c for c in getattr(shell, "configurables", ()) if type(c).__name__ == "Codex"]
    if shell is not None and config:
        from nbcodex.notebook.session import Session

        with contextlib.suppress(ConfigurationError):  # the next request reports it
            Session(shell, cast("Codex", config[0]))


def _report_unfinished(shell: InteractiveShell, config: Codex) -> None:
    """Print in one line what can be resumed in this notebook; nothing is sent by itself."""
    path = data_folder(config.settings()) / JOURNAL_FILENAME
    if not may_have_unfinished(path, notebook_id(shell)):
        return
    from nbcodex.notebook.session import Session

    journal, notebook = Session(shell, config).journal, notebook_id(shell)
    found = [entry.id for entry in journal.resumable_entries(notebook=notebook)]
    found += [f"map {batch.id}" for batch in journal.maps.unfinished(notebook=notebook)]
    if found:
        ids = ", ".join(found[:3]) + (" …" if len(found) > 3 else "")
        print(
            f"{len(found)} parked or abandoned here ({ids}): `%codex resume` resumes them, "
            "`%codex journal` lists them."
        )
    elif journal.problem:
        print(journal.problem)  # then entries may exist that could not be read


def unload(shell: InteractiveShell) -> None:
    """Remove the magics and the settings; running requests continue to their ends."""
    # Found by name, because a reloaded module has another function and another class.
    for callback in list(shell.events.callbacks["post_run_cell"]):
        if getattr(callback, "__qualname__", "") == _record_error.__name__:
            shell.events.unregister("post_run_cell", callback)
    completion.uninstall(shell)
    for kind in ("line", "cell"):
        shell.magics_manager.magics[kind].pop("codex", None)
    _unloaded[:] = [c for c in shell.configurables if type(c).__name__ == "Codex"] or _unloaded
    shell.configurables[:] = [c for c in shell.configurables if type(c).__name__ != "Codex"]
