"""The base of all widgets: the traits that Python and the page share, and messages of the page.

It also sends JavaScript and CSS to the page. It imports anywidget, which is slow, and is therefore
imported only when a widget is about to be shown.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import anywidget
import ipywidgets  # type: ignore[import-untyped]
import traitlets
from IPython.core.getipython import get_ipython

from nbcodex.notebook.identity import kernel_id

STATIC_FOLDER = Path(__file__).parent / "static"
# The panel of one request, the progress of a map, and the monitor. Each has files of its own.
Kind = Literal["panel", "map", "monitor"]


def _read_static(*names: str) -> str:
    return "\n".join((STATIC_FOLDER / name).read_text(encoding="utf-8") for name in names)


class WidgetSource(ipywidgets.Widget):  # type: ignore[misc]
    """The JavaScript and CSS of one kind of widget, as a model that all widgets of it refer to."""

    # anywidget would send `_esm` and `_css` with every widget: 30 kB for each answer. A model is
    # sent once for each kernel, and a page that is reloaded asks the kernel for it.
    # The page loads the JavaScript from a blob URL, from which no other file can be imported:
    # so `js` begins with what all kinds of widget share.
    js = traitlets.Unicode().tag(sync=True)
    css = traitlets.Unicode().tag(sync=True)

    def __init__(self, kind: Kind) -> None:
        super().__init__(
            js=_read_static("common.js", f"{kind}.js"),
            css=_read_static("common.css", f"{kind}.css"),
        )
        self.is_loaded = False  # whether a page has certainly loaded it
        # A widget that is given no layout creates one: a second model and another message for each.
        self.layout = ipywidgets.Layout()


class CodexWidget(anywidget.AnyWidget):
    """A widget that shows `data`, and calls a function for each click in a page."""

    _esm = _read_static("load_source.js")
    _sources: ClassVar[dict[Kind, WidgetSource]] = {}  # the latest of each kind

    # What is shown. Its "text" is for files and front ends without widgets, which keep the text of
    # the moment when the widget was displayed.
    data = traitlets.Dict().tag(sync=True)
    # The id by which the Jupyter server can interrupt this kernel; the page checks its form.
    kernel_id = traitlets.Unicode().tag(sync=True)
    source = traitlets.Unicode().tag(sync=True)  # the id of the `WidgetSource`

    def __init__(
        self,
        kind: Kind,
        data: dict[str, Any],
        on_action: Callable[[str, str], None],
        on_sync: Callable[[], None] | None = None,
    ) -> None:
        self._kind: Kind = kind
        source = self._sources.get(kind)
        # The Jupyter server drops messages beyond a rate. A page that did not get the source cannot
        # show any of these widgets, and sends nothing: so a new one is made until a page answers.
        # Earlier ones stay open, because a page may be loading one of them.
        if source is None or source.comm is None or not source.is_loaded:
            source = self._sources[kind] = WidgetSource(kind)
        super().__init__(
            data=data,
            kernel_id=kernel_id(get_ipython()),
            source=source.model_id,
            layout=source.layout,
        )
        self.receive_while_blocked()
        # Both are called in the subshell's thread, or else in the main thread: the first with a
        # button's action and a request's id, the second when a page has loaded the widget. Both
        # are None once the request or map has ended: only a line about it is shown then.
        self.on_action: Callable[[str, str], None] | None = on_action
        self.on_sync = on_sync
        self.on_msg(self._receive)

    def receive_while_blocked(self) -> None:
        """Receive the page's messages while a cell blocks the kernel."""
        # ipykernel 7.4 routes incoming messages of a comm to the shell that last sent on it, which
        # is the blocked one. This restores what 7.0 to 7.3 do: the page chooses a subshell. The
        # attribute is private, so it may be missing.
        if hasattr(self.comm, "_reply_subshell_for"):
            self.comm._reply_subshell_for = lambda _data, default: default

    def _receive(self, _widget: object, content: object, _buffers: object) -> None:
        self._sources[self._kind].is_loaded = True
        on_action, on_sync = self.on_action, self.on_sync  # another thread sets both to None
        match content:
            case {"type": "action", "name": str(name), "id": int(number), **rest} if on_action:
                # Before the action: a map's Stop may raise a KeyboardInterrupt in this thread.
                self.send({"type": "received", "id": number})
                on_action(name, str(rest.get("request", "")))
            case {"type": "sync"} if on_action:
                self.send({"type": "received", "id": 0})  # the numbers of actions begin with 1
                if on_sync is not None:
                    on_sync()

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:
            bundle[0]["text/plain"] = self.data.get("text", "")
        return bundle
