"""The identity of this notebook, its kernel and the running cell, as far as they are known."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.models import Origin

# The random part distinguishes processes of different containers that have the same number.
_TERMINAL_ID = f"{os.getpid()}-{os.urandom(4).hex()}"


def notebook_id(shell: InteractiveShell) -> str:
    """Return the notebook's path, or else a name for this kernel or terminal."""
    # Jupyter Server sets the variable, VS Code the name in the namespace; others set neither.
    if path := os.environ.get("JPY_SESSION_NAME") or shell.user_ns.get("__vsc_ipynb_file__"):
        return str(path)
    return f"kernel {kernel_id(shell) or _TERMINAL_ID}"


def kernel_id(shell: InteractiveShell | None) -> str:
    """Return the id by which a Jupyter server knows this kernel; empty in a terminal."""
    # Jupyter's messages do not contain the id, but Jupyter Server names the connection file after
    # it: ``kernel-ID.json``.
    file = getattr(getattr(getattr(shell, "kernel", None), "parent", None), "connection_file", "")
    return Path(file).stem.removeprefix("kernel-")


def cell_number(shell: InteractiveShell | None) -> int:
    """Return the running cell's number, as in ``In[3]``; 0 outside of IPython."""
    # Since IPython 9, `execution_count` is the number of the next cell already.
    return 0 if shell is None else len(shell.user_ns["In"]) - 1


def current_origin(shell: InteractiveShell, *, variable: str | None = None) -> Origin:
    """Return the origin of a request that the running cell makes."""
    from nbcodex.models import Origin

    # JupyterLab and Notebook send the cell's id with the code; most other front ends do not.
    parent = getattr(shell, "parent_header", None)
    cell = parent.get("metadata", {}).get("cellId") if isinstance(parent, dict) else None
    return Origin(notebook=notebook_id(shell), cell=str(cell) if cell else None, variable=variable)
