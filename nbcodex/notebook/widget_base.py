"""What Python and a page share of our widgets: their traits, and nothing else.

Owns how the browser's side gets there, and how its clicks come back. Imports anywidget, and is
therefore imported only when a widget is to be shown.
"""

from __future__ import annotations

import contextlib
import json
import uuid
import zlib
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from ipywidgets import Layout  # type: ignore[import-untyped]

STATIC = Path(__file__).parent / "static"


def _read(*names: str) -> str:
    """Return these files as one: a widget's module has no address to import others from."""
    return "\n".join((STATIC / name).read_text(encoding="utf-8") for name in names)


def _packed(name: str) -> bytes:
    """Return the browser's side of a widget, as `static/loader.js` unpacks it."""
    sources = {"css": _read("parts.css", f"{name}.css"), "js": _read("parts.js", f"{name}.js")}
    return zlib.compress(json.dumps(sources).encode(), 9)


class Bridge(anywidget.AnyWidget):
    """A widget of ours.

    Parameters
    ----------
    view : dict
        What is shown; its ``line`` is the text twin.
    kernel_id : str
        The kernel's id at the server, which a click can have it interrupted by; empty where
        unknown.
    packed : bytes
        The browser's side.
    """

    _esm = _read("loader.js")

    view = traitlets.Dict().tag(sync=True)
    kernel_id = traitlets.Unicode().tag(sync=True)
    packed = traitlets.Bytes().tag(sync=True)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:
            bundle[0]["text/plain"] = self.view.get("line", "")
        return bundle

    def hear_while_blocked(self) -> None:
        """Have clicks served beside the blocked cell.

        ipykernel 7.4 routes a comm's incoming messages to the shell that last sent on it, which is
        the blocked one; 7.0 to 7.3 leave them on the subshell that the browser chose, as this does.
        """
        if hasattr(self.comm, "_reply_subshell_for"):
            self.comm._reply_subshell_for = lambda _data, default: default


class Panel(Bridge):
    """A request's panel."""

    packed = traitlets.Bytes(_packed("panel")).tag(sync=True)


class Board(Bridge):
    """The monitor: `view` is what `overview.picture` returns, and the kernel's clocks."""

    packed = traitlets.Bytes(_packed("monitor")).tag(sync=True)


class Meter(Bridge):
    """A map's progress: `view` is what `progress.view` returns."""

    packed = traitlets.Bytes(_packed("progress")).tag(sync=True)


_shared: Layout | None = None


def layout() -> Layout:
    """Return the layout that all widgets share: with one of its own, each would be two."""
    global _shared
    if _shared is None or _shared.comm is None:
        _shared = Layout()
    return _shared


def kernel_id() -> str:
    """Return the id that the Jupyter server knows this kernel by; empty where nobody can say."""
    with contextlib.suppress(Exception):
        from ipykernel.connect import get_connection_file

        return str(uuid.UUID(Path(get_connection_file()).stem.removeprefix("kernel-")))
    return ""
