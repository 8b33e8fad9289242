"""Where a map is shown while it goes on, and what it leaves in the notebook.

Owns the places: one updatable text, one line of a terminal, or the widget of `meter`. What they
show is decided in `progress`.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from IPython.display import display, update_display

from nbcodex.errors import shorten
from nbcodex.models import MapStats
from nbcodex.notebook.display.cell_output import shows_widgets
from nbcodex.notebook.display.map import MapState, failures, reduce, status, summary
from nbcodex.rendering.markdown import escape_inline
from nbcodex.runtime.clock import Clock

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

log = logging.getLogger(__name__)


class Place(Protocol):
    """A place where a map is shown."""

    def paint(self, state: MapState, wall: float) -> None:
        """Show `state`."""
        ...

    def close(self, bundle: dict[str, Any]) -> None:
        """Put a MIME bundle in its stead."""
        ...


class Chart:
    """Hears how far a map has come, paints it, and leaves a line of figures.

    Parameters
    ----------
    place : Place
        Where to paint.
    clock : Clock
        Tells the time of day.
    preview : callable
        Returns what stands above the figures in the end: as plain text, or else as Markdown.
    news : callable
        Returns what the user has to be told besides.
    """

    def __init__(
        self,
        place: Place,
        clock: Clock,
        *,
        preview: Callable[[bool], str] = lambda _: "",
        news: Callable[[], str] = lambda: "",
    ) -> None:
        self._place, self._clock, self._preview, self._news = place, clock, preview, news
        self._state: MapState | None = None

    def __call__(self, progress: MapStats) -> None:
        """Hear of progress; whatever fails in a display, the map goes on."""
        self._state = reduce(self._state, progress)
        try:
            if progress.outcome:
                self._place.close(self._bundle(self._state))
            else:
                self._place.paint(self._state, self._clock.wall())
        except Exception:
            log.exception("the display failed")

    def _bundle(self, state: MapState) -> dict[str, Any]:
        line = " · ".join(filter(None, (summary(state), shorten(self._news()))))
        lines = failures(state.now)
        done = state.now.outcome == "done"
        plain, above = (self._preview(as_text) if done else "" for as_text in (True, False))
        gap = "\n\n" if above else ""
        listed = "".join(f"\n- {escape_inline(each)}" for each in lines)
        return {
            "text/plain": "\n".join([f"{plain}{gap}{line}", *(f"  {each}" for each in lines)]),
            "text/markdown": f"{above}{gap}<sub>{escape_inline(line)}</sub>\n{listed}".rstrip(),
        }


class TextPlace:
    """One output that is updated."""

    def __init__(self) -> None:
        self._display_id, self._shown, self._line = uuid.uuid4().hex, False, ""

    def paint(self, state: MapState, wall: float) -> None:
        """Show the line, if it is another."""
        if (line := f"[{status(state, wall)}]") != self._line:
            self._line = line
            self._put({"text/plain": line})

    def close(self, bundle: dict[str, Any]) -> None:
        """Put what stays in its place."""
        self._put(bundle)

    def _put(self, bundle: dict[str, Any]) -> None:
        show = update_display if self._shown else display
        show(bundle, raw=True, display_id=self._display_id)  # type: ignore[no-untyped-call]
        self._shown = True


class TerminalPlace:
    """A line that is rewritten; where that cannot be, nothing before the end."""

    def __init__(self) -> None:
        self._lives, self._line = sys.stdout.isatty(), ""

    def paint(self, state: MapState, wall: float) -> None:
        """Rewrite the line."""
        if not self._lives:
            return
        width = max(os.get_terminal_size().columns - 1, 20)
        line = status(state, wall)[:width]
        if line != self._line:
            self._line = line
            sys.stdout.write(f"\r\x1b[K{line}")
            sys.stdout.flush()

    def close(self, bundle: dict[str, Any]) -> None:
        """Print what stays."""
        wipe = "\r\x1b[K" if self._line else ""
        sys.stdout.write(f"{wipe}{bundle['text/plain']}\n")
        sys.stdout.flush()


def place(shell: InteractiveShell, choice: str) -> Place:
    """Return the place for where this code runs."""
    if not hasattr(shell, "kernel"):
        return TerminalPlace()
    if shows_widgets(shell, choice):
        try:
            from nbcodex.notebook.display.map_widget import MeterPlace

            return MeterPlace()
        except Exception:
            log.exception("widgets cannot be had")
    return TextPlace()
