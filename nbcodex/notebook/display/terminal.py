"""Views in a terminal: the answer as it arrives, and one line that counts down.

Must not know what the answer becomes. Text of servers and models passes `printable` before it is
written, because escape sequences in it could take over the terminal.
"""

from __future__ import annotations

import os
import sys

from nbcodex.notebook.display.map import MapState
from nbcodex.notebook.display.map import status_line as map_status_line
from nbcodex.notebook.display.panel import GrowingText, PanelState, status_line
from nbcodex.notebook.display.text import Bundle, RequestView
from nbcodex.rendering.html import printable
from nbcodex.runtime.clock import Clock

# ANSI: back to the start of the line, erase to its end.
_CLEAR_LINE = "\r\x1b[K"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _rewrite_line(line: str) -> None:
    # A line of the full width would wrap, and the next rewrite would leave its first half behind.
    width = max(os.get_terminal_size().columns - 1, 20)
    _write(_CLEAR_LINE + line[:width])


class TerminalView(RequestView):
    """Prints the answer as it arrives, and rewrites one line of status until then."""

    is_plain_text = True

    def __init__(self, clock: Clock, heading: str = "") -> None:
        self._clock = clock
        self._heading = f"{heading}\n\n" if heading else ""
        self._text = GrowingText()
        self._line = ""
        self._at_line_start = True
        # In a pipe or a file nothing can be rewritten.
        self._is_tty = sys.stdout.isatty()
        self.render_interval_s: float | None = 0.2 if self._is_tty else None

    def open(self, state: PanelState) -> None:
        """Show the first line of status."""
        self.render(state)

    def render(self, state: PanelState) -> None:
        """Print the text that is new, or else refresh the line of status."""
        if len(self._text) and not state.text.extends(self._text):
            self._clear()
            self._print(("" if self._at_line_start else "\n") + "[the answer starts again]\n")
            self._text = GrowingText()
        if more := state.text.text_after(len(self._text)):
            self._clear()
            self._print(("" if len(self._text) else self._heading) + printable(more))
            self._text = state.text
        elif state.phase != "streaming" and not state.ended:
            self._show_status(status_line(state, self._clock.now(), self._clock.wall()))

    def close(self, bundle: Bundle) -> None:
        """Print the rest of the answer, and the figures."""
        self._clear()
        text = bundle["text/plain"]
        printed = self._heading + printable(str(self._text)) if len(self._text) else ""
        if len(printed) > len(text):
            # The bundle holds only the beginning of a very long answer, which is printed already:
            # its last paragraph is the line of figures.
            text, printed = "\n\n" + text.rpartition("\n\n")[2], ""
        elif not text.startswith(printed):
            printed = ""
            self._print("" if self._at_line_start else "\n\n")
        self._print(text[len(printed) :] + "\n")

    def _print(self, text: str) -> None:
        _write(text)
        self._at_line_start = text.endswith("\n")

    def _show_status(self, line: str) -> None:
        if self._is_tty:
            if not self._line and not self._at_line_start:
                _write("\n")
            _rewrite_line(line)
        elif line.split(" ", 1)[0] != self._line.split(" ", 1)[0]:
            # The line starts with the phase. Without rewriting, only a new phase is worth a line.
            self._print(("" if self._at_line_start else "\n") + f"[{line}]\n")
        self._line = line

    def _clear(self) -> None:
        if self._is_tty and self._line:
            _write(_CLEAR_LINE)
            self._line, self._at_line_start = "", True


class BackgroundTerminalView(RequestView):
    """Prints only the answer, because the user is typing something else meanwhile."""

    is_plain_text = True

    def close(self, bundle: Bundle) -> None:
        """Print the answer."""
        _write(f"\n{bundle['text/plain']}\n")


class TerminalMapView:
    """Rewrites one line of status; in a pipe or a file it prints nothing before the end."""

    def __init__(self) -> None:
        self._is_tty, self._line = sys.stdout.isatty(), ""

    def render(self, state: MapState, wall: float) -> None:
        """Rewrite the line if it has changed."""
        line = map_status_line(state, wall)
        if self._is_tty and line != self._line:
            self._line = line
            _rewrite_line(line)

    def close(self, bundle: Bundle) -> None:
        """Print the final text."""
        _write(f"{_CLEAR_LINE if self._line else ''}{bundle['text/plain']}\n")
