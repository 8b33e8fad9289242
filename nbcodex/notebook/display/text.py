"""Views that are one output of the cell, updated in place; the base class of all request views.

Used in front ends that may not show widgets: nbclient, papermill, unknown ones. Must not know what
the answer becomes.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from IPython.display import display, update_display

from nbcodex.notebook.display.map import MapState
from nbcodex.notebook.display.map import status_line as map_status_line
from nbcodex.notebook.display.panel import PanelState, status_line
from nbcodex.rendering.html import printable
from nbcodex.runtime.clock import Clock

Bundle = dict[str, Any]

# While a longer answer arrives, only its end is shown. The reply holds all of it.
MAX_LIVE_CHARS = 400_000


class OutputSlot:
    """One output below the cell: the first `show` adds it, each further one replaces it."""

    def __init__(self) -> None:
        self._display_id = uuid.uuid4().hex
        self._added = False

    def show(self, content: object, *, raw: bool = True) -> None:
        """Show a MIME bundle, or with ``raw=False`` an object that IPython renders."""
        # update_display for an id that was never displayed shows nothing, without an error.
        show = update_display if self._added else display
        show(content, raw=raw, display_id=self._display_id)  # type: ignore[no-untyped-call]
        self._added = True


class RequestView:
    """Shows one request while it runs. A subclass overrides what its front end can do."""

    # How often to call `render` without an event; None: only with events.
    render_interval_s: float | None = None
    # Everything is printed, so the answer can be only one text.
    is_plain_text = False
    # Markdown is certainly rendered, so the plain text beside it can be short.
    renders_markdown = False

    def prepare(self, state: PanelState) -> None:
        """Do what takes time before `open`, while the network is awaited; show nothing."""

    def open(self, state: PanelState) -> None:
        """Show `state` for the first time."""

    def render(self, state: PanelState) -> None:
        """Show `state`."""

    def close(self, bundle: Bundle) -> None:
        """Replace the view with the final MIME bundle."""

    def discard(self) -> None:
        """Release what was prepared: nothing will be shown."""


class TextView(RequestView):
    """The text so far and a line of status, as plain text."""

    render_interval_s: float | None = 1.0
    min_interval_s = 0.5

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._slot = OutputSlot()
        self._phase, self._next_at = "", 0.0

    def open(self, state: PanelState) -> None:
        """Show the first line."""
        self._show(state)

    def render(self, state: PanelState) -> None:
        """Show the text so far, at most twice a second; a new phase at once."""
        now = time.monotonic()
        if state.phase == self._phase and now < self._next_at:
            return
        # Each update sends the whole text, which would be quadratic: the longer it is, the rarer.
        interval = max(self.min_interval_s, state.text.bytes / 50_000)
        self._phase, self._next_at = state.phase, now + interval
        self._show(state)

    def close(self, bundle: Bundle) -> None:
        """Replace the text with the answer."""
        self._slot.show(bundle)

    def _show(self, state: PanelState) -> None:
        line = status_line(state, self._clock.now(), self._clock.wall())
        text = str(state.text)
        if len(text) > MAX_LIVE_CHARS:
            text = f"…{text[-MAX_LIVE_CHARS:]}"
        self._slot.show({"text/plain": f"{printable(text)}\n\n[{line}]".lstrip()})


class TextMapView:
    """The status of a map in one line of text."""

    def __init__(self) -> None:
        self._slot, self._line = OutputSlot(), ""

    def render(self, state: MapState, wall: float) -> None:
        """Show the line if it has changed."""
        if (line := f"[{map_status_line(state, wall)}]") != self._line:
            self._line = line
            self._slot.show({"text/plain": line})

    def close(self, bundle: Bundle) -> None:
        """Replace the line with the final MIME bundle."""
        self._slot.show(bundle)
