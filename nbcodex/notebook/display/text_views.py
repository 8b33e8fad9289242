"""Views without widgets: outputs of a notebook that are updated, and a terminal's lines."""

from __future__ import annotations

import os
import sys
import time
import uuid

from IPython.core.getipython import get_ipython
from IPython.display import display, update_display

from nbcodex.notebook.display.map_panel import MapState
from nbcodex.notebook.display.map_panel import status_line as map_status_line
from nbcodex.notebook.display.panel import GrowingText, PanelState, stale_output_hint, status_line
from nbcodex.notebook.identity import cell_number
from nbcodex.rendering.figures import join_figures
from nbcodex.rendering.formats import MimeBundle
from nbcodex.rendering.html import printable
from nbcodex.runtime.clock import Clock

# While an answer arrives, only its last characters are shown. The reply holds all of it.
MAX_LIVE_CHARS = 400_000

# A front end renders each update anew: more than two a second would flicker.
MIN_TEXT_INTERVAL_S = 0.5
# Each update sends the whole text. So that long answers do not send ever more a second, the
# interval grows with the text.
MAX_TEXT_BYTES_PER_S = 50_000

# What is left of an output that has ended. It takes no room in the page, while nbconvert warns of
# an output without any data.
EMPTY_BUNDLE: MimeBundle = {"text/plain": ""}

# ANSI: back to the start of the line, erase to its end.
_CLEAR_LINE = "\r\x1b[K"


class OutputSlot:
    """One output below the cell: the first `show` adds it, each further one replaces it."""

    def __init__(self) -> None:
        self._display_id = uuid.uuid4().hex
        self._cell: int | None = None  # the number of the cell that was running at the first `show`

    def show(self, content: object, *, raw: bool = True) -> None:
        """Show a MIME bundle, or with ``raw=False`` an object that IPython renders."""
        # update_display for an id that was never displayed shows nothing, without an error.
        show = display if self._cell is None else update_display
        show(content, raw=raw, display_id=self._display_id)  # type: ignore[no-untyped-call]
        if self._cell is None:
            self._cell = cell_number(get_ipython())

    def finish(self, bundle: MimeBundle, *, as_update: bool) -> None:
        """Leave `bundle` as a new output and empty this one, or as an update of this one."""
        # Consoles, `ipywidgets.Output`, and a cell that was moved or pasted ignore updates of an
        # output, but show new ones. Once another cell runs, however, a new one lands below that;
        # for a request in the background (`as_update`), this may happen at any moment.
        if not as_update and self._cell == cell_number(get_ipython()):
            self.show(EMPTY_BUNDLE)
            self._cell, self._display_id = None, uuid.uuid4().hex
        self.show(bundle)


class RequestView:
    """Shows one request while it runs. A subclass overrides what its front end can do."""

    # Seconds between two calls of `render` if no event arrives; None: no such calls.
    render_interval_s: float | None = None
    # Everything is printed: the answer is one text, without pictures and Markdown.
    is_plain_text = False
    # Markdown is certainly rendered, so the plain text beside it can be short.
    renders_markdown = False
    # Other cells may run before the answer arrives.
    in_background = False

    def prepare(self, state: PanelState) -> None:
        """Do what takes time before `open`, while the network is awaited; show nothing."""

    def open(self, state: PanelState) -> None:
        """Show `state` for the first time."""
        self.render(state)

    def render(self, state: PanelState) -> None:
        """Show `state`."""

    def close(self, bundle: MimeBundle) -> None:
        """End the view, and leave the final MIME bundle."""

    def discard(self) -> None:
        """Release what was prepared, and will not be shown."""


class TextView(RequestView):
    """Shows the text so far and a line of status, as plain text in one output of the cell."""

    render_interval_s: float | None = 1.0

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._slot = OutputSlot()
        self._shown_phase, self._next_render_at = "", 0.0

    def render(self, state: PanelState) -> None:
        """Show the text so far, at most twice a second; a new phase at once."""
        now = time.monotonic()
        if state.phase == self._shown_phase and now < self._next_render_at:
            return
        interval = max(MIN_TEXT_INTERVAL_S, state.text.utf8_bytes / MAX_TEXT_BYTES_PER_S)
        self._shown_phase, self._next_render_at = state.phase, now + interval
        status = status_line(state, self._clock.now(), self._clock.wall())
        line = join_figures(status, stale_output_hint(state.id))
        text = str(state.text)
        if len(text) > MAX_LIVE_CHARS:
            text = f"…{text[-MAX_LIVE_CHARS:]}"
        # `jupyter run` adds no line break between two outputs.
        self._slot.show({"text/plain": f"{printable(text)}\n\n[{line}]\n".lstrip()})

    def close(self, bundle: MimeBundle) -> None:
        """Leave the answer instead of the text."""
        self._slot.finish(bundle, as_update=self.in_background)


class MapView:
    """Shows a map while it runs: here, as one line of text in one output of the cell."""

    def __init__(self) -> None:
        self._slot, self._status = OutputSlot(), ""

    def render(self, state: MapState, wall: float) -> None:
        """Show `state` if it has changed; `wall` is in seconds since the epoch."""
        if (line := map_status_line(state, wall)) != self._status:
            self._status = line
            line = join_figures(line, stale_output_hint(state.stats.map_id))
            self._slot.show({"text/plain": f"[{line}]\n"})

    def close(self, bundle: MimeBundle) -> None:
        """End the view, and leave the final MIME bundle."""
        self._slot.finish(bundle, as_update=False)


# The views of a terminal. Text of servers and models passes `printable` before it is written,
# because escape sequences in it could take over the terminal.


def _rewrite_line(line: str) -> None:
    # A line of the full width would wrap, and the next rewrite would leave its first half behind.
    width = max(os.get_terminal_size().columns - 1, 20)
    print(_CLEAR_LINE + line[:width], end="", flush=True)


class TerminalView(RequestView):
    """Rewrites one line of status, then prints the answer; in the background, only the answer."""

    is_plain_text = True

    def __init__(self, clock: Clock, heading: str = "") -> None:
        self._clock = clock
        self._heading = f"{heading}\n\n" if heading else ""
        self._printed = GrowingText()
        self._status = ""  # the line of status that is shown now, or was printed last
        self._is_at_line_start = True
        # In a pipe or a file nothing can be rewritten.
        self._is_tty = sys.stdout.isatty()
        self.render_interval_s: float | None = 0.2 if self._is_tty else None

    def render(self, state: PanelState) -> None:
        """Print the text that is new, or else refresh the line of status."""
        if self.in_background:  # the user is typing something else meanwhile
            self.render_interval_s = None
            return
        if self._printed.chunk_count and not state.text.extends(self._printed):
            self._clear_status()
            self._print_line("the answer starts again")
            self._printed = GrowingText()
        if more := state.text.text_after(self._printed.chunk_count):
            self._clear_status()
            self._print(("" if self._printed.chunk_count else self._heading) + printable(more))
            self._printed = state.text
        elif state.phase != "streaming":
            line = status_line(state, self._clock.now(), self._clock.wall())
            if self._is_tty:
                if not self._status and not self._is_at_line_start:
                    print(flush=True)
                _rewrite_line(line)
            elif line.split(" ", 1)[0] != self._status.split(" ", 1)[0]:
                # The line starts with the phase. Without rewriting, only a new phase is printed.
                self._print_line(line)
            self._status = line

    def close(self, bundle: MimeBundle) -> None:
        """Print the rest of the answer, and the figures."""
        self._clear_status()
        text, printed = bundle["text/plain"], ""
        if self.in_background:
            print(flush=True)
        if self._printed.chunk_count:
            printed = self._heading + printable(str(self._printed))
        if len(printed) > len(text):
            # The bundle holds only the beginning of a very long answer, which is printed already:
            # its last paragraph is the line of figures.
            text, printed = "\n\n" + text.rpartition("\n\n")[2], ""
        elif not text.startswith(printed):
            # Another text than what was printed: it follows as a whole.
            printed = ""
            self._print("" if self._is_at_line_start else "\n\n")
        self._print(text[len(printed) :] + "\n")

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)
        self._is_at_line_start = text.endswith("\n")

    def _print_line(self, line: str) -> None:
        self._print(("" if self._is_at_line_start else "\n") + f"[{line}]\n")

    def _clear_status(self) -> None:
        if self._is_tty and self._status:
            print(_CLEAR_LINE, end="", flush=True)
            self._status, self._is_at_line_start = "", True


class TerminalMapView(MapView):
    """Rewrites one line of status; in a pipe or a file it prints nothing before the end."""

    def render(self, state: MapState, wall: float) -> None:
        """Rewrite the line if it has changed."""
        line = map_status_line(state, wall)
        if sys.stdout.isatty() and line != self._status:
            self._status = line
            _rewrite_line(line)

    def close(self, bundle: MimeBundle) -> None:
        """Print the final text."""
        print(f"{_CLEAR_LINE if self._status else ''}{bundle['text/plain']}", flush=True)
