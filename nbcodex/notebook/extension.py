"""What `%load_ext nbcodex` does: magics and settings, and nothing that takes time."""

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

_before: list[Any] = []
"""The settings of the time before an unload: `%reload_ext` forgets nothing that was typed in."""

_NAMES = {"line": "codex", "cell": "codex"}


def load(shell: InteractiveShell) -> None:
    """Register the magics and `%config Codex`."""
    unload(shell)
    config = _configured(shell)
    if _before:
        config.take_over(_before.pop())
    shell.configurables.append(config)  # type: ignore[arg-type]  # typed as shells alone
    shell.register_magics(CodexMagics(shell, config))
    shell.events.register("post_run_cell", _note)
    completion.install(shell, config)
    if config.journal:
        _tell_of_the_unfinished(shell, config)


def _note(result: ExecutionResult) -> None:
    """Keep what went wrong in a cell, for ``{Err[3]}``."""
    if not result.success:
        from nbcodex.notebook.cell_errors import cell_errors

        cell_errors.record(result)


def _configured(shell: InteractiveShell) -> Codex:
    try:
        return Codex(parent=shell)
    except TraitError as error:
        if not _before:
            raise ConfigurationError(
                f"A setting of Codex is wrong: {error}", advice="Mend it in ipython_config.py."
            ) from None
    # `%config` leaves in the shell's configuration what we have refused: what held, holds on.
    chosen: Any = shell.config.Codex
    for name in chosen:
        try:
            Codex(**{name: chosen[name]})
        except TraitError:
            chosen[name] = getattr(_before[0], name)
    return Codex(parent=shell)


def surround() -> None:
    """Let `nbcodex.ask` know the notebook that loaded us, and its settings."""
    shell = get_ipython()
    config = [c for c in getattr(shell, "configurables", ()) if type(c).__name__ == "Codex"]
    if shell is not None and config:
        from nbcodex.notebook.session import Session

        with contextlib.suppress(ConfigurationError):  # which is for whoever asks to hear
            Session(shell, cast("Codex", config[0]))


def _tell_of_the_unfinished(shell: InteractiveShell, config: Codex) -> None:
    """Say in one line what this notebook left behind; nothing is sent by itself."""
    path = data_folder(config.settings()) / JOURNAL_FILENAME
    if not may_have_unfinished(path, notebook_id(shell)):
        return
    from nbcodex.notebook.session import Session

    session = Session(shell, config)
    left = [entry.id for entry in session.journal.resumable_entries(notebook=session.notebook)]
    left += [
        f"map {batch.id}" for batch in session.journal.maps.unfinished(notebook=session.notebook)
    ]
    if left:
        ids = ", ".join(left[:3]) + (" …" if len(left) > 3 else "")
        print(  # noqa: T201 - what loading has to say
            f"{len(left)} parked or abandoned here ({ids}): `%codex resume` goes on with them, "
            "`%codex journal` lists them."
        )
    elif trouble := session.journal.problem:
        print(trouble)  # noqa: T201 - else nobody would know of what is parked in the file


def unload(shell: InteractiveShell) -> None:
    """Take them away again; requests on their way go on to their ends."""
    notes = [n for n in shell.events.callbacks["post_run_cell"] if n.__qualname__ == _note.__name__]
    for note in notes:
        shell.events.unregister("post_run_cell", note)
    completion.uninstall(shell)
    for kind, name in _NAMES.items():
        shell.magics_manager.magics[kind].pop(name, None)
    _before[:] = [c for c in shell.configurables if type(c).__name__ == "Codex"] or _before
    shell.configurables[:] = [c for c in shell.configurables if type(c).__name__ != "Codex"]
