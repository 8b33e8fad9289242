"""nbcodex: a ``%%codex`` cell magic that survives every rate limit.

``%load_ext nbcodex`` adds the magics; `ask`, `aask`, `map`, `amap` and `monitor` are for Python
code. A public name is imported from its module when it is first used, so that importing the package
takes no time.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.api import aask, amap, ask, map  # noqa: A004 - it is nbcodex.map
    from nbcodex.errors import NbcodexError
    from nbcodex.models import Reply, Usage
    from nbcodex.notebook.monitor import monitor

__all__ = ["NbcodexError", "Reply", "Usage", "aask", "amap", "ask", "map", "monitor"]
__version__ = "0.1.0"

_MODULES = {
    **dict.fromkeys(("aask", "amap", "ask", "map"), "nbcodex.api"),
    **dict.fromkeys(("Reply", "Usage"), "nbcodex.models"),
    "NbcodexError": "nbcodex.errors",
    "monitor": "nbcodex.notebook.monitor",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'nbcodex' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    extension = sys.modules.get("nbcodex.notebook.extension")
    if extension and _MODULES[name] == "nbcodex.api":
        # A notebook that has run no `%%codex` yet: its settings and display apply to `ask` as well.
        extension.connect_host()
    return value


def __dir__() -> list[str]:
    return list(__all__)


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Add the magics to `shell`; ``%load_ext nbcodex`` calls this."""
    from nbcodex.notebook.extension import load

    load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Remove the magics; ``%unload_ext nbcodex`` calls this."""
    from nbcodex.notebook.extension import unload

    unload(shell)
