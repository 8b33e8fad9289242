"""nbcodex: a ``%%codex`` cell magic that survives every rate limit.

``%load_ext nbcodex`` adds the magics; `ask`, `aask`, `map`, `amap`, `monitor` and `Reply` serve
plain Python. Everything heavy is imported when it is first needed.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.api import aask, ask
    from nbcodex.errors import NbcodexError
    from nbcodex.mapping.map_api import amap, map  # noqa: A004 - it is nbcodex.map
    from nbcodex.models import Reply, Usage
    from nbcodex.notebook.monitor.widget import monitor

__all__ = ["NbcodexError", "Reply", "Usage", "aask", "amap", "ask", "map", "monitor"]
__version__ = "0.1.0"

_HOMES = {
    "NbcodexError": "nbcodex.errors",
    "Reply": "nbcodex.models",
    "Usage": "nbcodex.models",
    "aask": "nbcodex.api",
    "amap": "nbcodex.mapping.map_api",
    "ask": "nbcodex.api",
    "map": "nbcodex.mapping.map_api",
    "monitor": "nbcodex.notebook.monitor.widget",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nbcodex' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    extension = sys.modules.get("nbcodex.notebook.extension")
    if extension and _HOMES[name] in {"nbcodex.api", "nbcodex.mapping.map_api"}:
        # Python asks before any cell did: it is to know the notebook and its settings all the same.
        extension.connect_host()
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Add the magics to `shell`: what ``%load_ext nbcodex`` calls."""
    from nbcodex.notebook.extension import load

    load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take the magics away again: what ``%unload_ext nbcodex`` calls."""
    from nbcodex.notebook.extension import unload

    unload(shell)
