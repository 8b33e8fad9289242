"""The identity of this notebook, its kernel and the running cell, as far as they are known."""

from __future__ import annotations

import os
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell

# The random part distinguishes processes of different containers with the same process id.
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
