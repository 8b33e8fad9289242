"""How one request or one map is shown below its cell, and what stays there.

Owns the choice between widgets, text and a terminal. Everything that imports ipywidgets is imported
only when a widget is about to be shown.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from nbcodex.errors import shorten

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.notebook.display.map import MapView
    from nbcodex.notebook.display.panel import ActionName
    from nbcodex.notebook.display.text import RequestView
    from nbcodex.runtime.clock import Clock

MAX_HEADING_CHARS = 80

log = logging.getLogger(__name__)


def can_show_widgets(shell: InteractiveShell | None, choice: str) -> bool:
    """Return whether the user wants widgets and the front end is known to show them.

    `choice` is the setting `Codex.display`: "auto", "widget" or "text".
    """
    if shell is None or not hasattr(shell, "kernel"):
        return False
    # A kernel cannot ask what its front end can show. These three say who they are: Jupyter's
    # server (nbclient and papermill have none), VS Code, Colab.
    known = (
        "JPY_SESSION_NAME" in os.environ
        or "__vsc_ipynb_file__" in shell.user_ns
        or "google.colab" in sys.modules
    )
    return choice == "widget" or (choice == "auto" and known)


def choose_request_view(
    shell: InteractiveShell,
    clock: Clock,
    *,
    choice: str,
    on_action: Callable[[str], None],
    buttons: Collection[ActionName],
    heading: str = "",
    background: bool = False,
) -> RequestView:
    """Return the view of a request that suits the front end; `choice` as in `can_show_widgets`.

    `on_action` is called with the name of a button that was pressed, in another thread. With
    `background`, other cells may run before the answer arrives.
    """
    from nbcodex.notebook.display import terminal, text

    if not hasattr(shell, "kernel"):
        if background:
            return terminal.BackgroundTerminalView()
        return terminal.TerminalView(clock, shorten(heading, MAX_HEADING_CHARS))
    if can_show_widgets(shell, choice):
        try:
            from nbcodex.notebook.display.widget_views import WidgetView

            return WidgetView(on_action, clock, buttons=buttons)
        except Exception:
            log.exception("widgets are not available")
    return text.TextView(clock)


def choose_map_view(shell: InteractiveShell, choice: str) -> MapView:
    """Return the view of a map that suits the front end; `choice` as in `can_show_widgets`."""
    from nbcodex.notebook.display import terminal, text

    if not hasattr(shell, "kernel"):
        return terminal.TerminalMapView()
    if can_show_widgets(shell, choice):
        try:
            from nbcodex.notebook.display.widget_views import WidgetMapView

            return WidgetMapView()
        except Exception:
            log.exception("widgets are not available")
    return text.TextMapView()
