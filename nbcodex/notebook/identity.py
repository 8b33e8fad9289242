"""Which notebook and which cell this is, as far as anybody can tell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.models import Origin


_TERMINAL = f"{os.getpid()}-{os.urandom(4).hex()}"
"""Stands for this process: its number alone will be another's one day, in a container soon."""


def notebook_id(shell: InteractiveShell) -> str:
    """Return the notebook's path, or else a name for this kernel or terminal."""
    path = os.environ.get("JPY_SESSION_NAME") or shell.user_ns.get("__vsc_ipynb_file__")
    return str(path) if path else f"kernel {kernel_id(shell) or _TERMINAL}"


def kernel_id(shell: InteractiveShell) -> str:
    """Return the kernel's id at its server: the end of its connection file's name."""
    file = getattr(getattr(getattr(shell, "kernel", None), "parent", None), "connection_file", "")
    return Path(file).stem.removeprefix("kernel-")


def cell_id(shell: InteractiveShell) -> str | None:
    """Return the id of the cell that runs, where the front end sends it (Lab and Notebook do)."""
    parent = getattr(shell, "parent_header", None)
    if not isinstance(parent, dict):
        return None
    found = parent.get("metadata", {}).get("cellId")
    return str(found) if found else None


def cell_number(shell: InteractiveShell) -> int:
    """Return the number of the cell that runs, as in ``In[3]``."""
    # `execution_count` is that of the next cell already, since IPython 9.
    return len(shell.user_ns["In"]) - 1


def current_origin(shell: InteractiveShell, *, variable: str | None = None) -> Origin:
    """Return where the request that is asked now comes from."""
    from nbcodex.models import Origin

    return Origin(notebook=notebook_id(shell), cell=cell_id(shell), variable=variable)
