"""`%load_ext nbcodex`: registers the magics and the settings.

It imports no slow module, because it is loaded at the start of every notebook.
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

# The settings of before the last unload: `%reload_ext` must not lose typed keys and aliases.
_config_before_unload: list[Any] = []


def load(shell: InteractiveShell) -> None:
    """Register the magics and `%config Codex`."""
    # `%load_ext` after an upgrade in the same kernel must not leave the old magics in place.
    unload(shell)
    config = _create_config(shell)
    if _config_before_unload:
        config.copy_state(_config_before_unload.pop())
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


def _create_config(shell: InteractiveShell) -> Codex:
    try:
        return Codex(parent=shell)
    except TraitError as error:
        if not _config_before_unload:
            raise ConfigurationError(
                f"A setting of Codex is not valid: {error}",
                advice="Correct it in ipython_config.py.",
            ) from None
    # `%config` leaves a value that a trait refused in the shell's configuration, where a reload
    # finds it again. The earlier value stays in force.
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
            Session(shell, cast("Codex", configs[0]))


def _report_unfinished(shell: InteractiveShell, config: Codex) -> None:
    """Print in one line which requests and maps of this notebook can be resumed; send nothing."""
    path = data_folder(config.settings()) / JOURNAL_FILENAME
    if not may_have_unfinished(path, notebook_id(shell)):
        return
    from nbcodex.notebook.session import Session

    journal, notebook = Session(shell, config).journal, notebook_id(shell)
    ids = [entry.id for entry in journal.resumable_entries(notebook=notebook)]
    ids += [f"map {map_run.id}" for map_run in journal.maps.unfinished(notebook=notebook)]
    if ids:
        listed = ", ".join(ids[:3]) + (" …" if len(ids) > 3 else "")
        print(
            f"{len(ids)} parked or abandoned here ({listed}): `%codex resume` resumes them, "
            "`%codex journal` lists them."
        )
    elif journal.problem:
        print(journal.problem)  # because entries may exist that could not be read


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
