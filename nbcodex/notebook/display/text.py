"""The places where a request can be shown: one updatable text, the lines of a terminal.

Owns how a state looks there; the panel is in `widgets`. Must not know what the answer becomes.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from typing import Any

from IPython.display import display, update_display

from nbcodex.notebook.display.growing_text import Text
from nbcodex.notebook.display.panel import PanelState, status
from nbcodex.rendering.html import printable
from nbcodex.runtime.clock import Clock

Bundle = dict[str, Any]

MOST = 400_000
"""Characters of its end that a long answer is shown with while it arrives; the rest is not lost."""


class Display:
    """A place where a request is shown; what a place has no use for, it leaves as it is here."""

    tick: float | None = None
    """Seconds after which it wants to be painted anew, even if nothing has happened."""

    single = False
    """Whether all that stays is one text, printed."""

    renders = False
    """Whether Markdown is surely shown as such there, so that nobody depends on its text twin."""

    def prepare(self, state: PanelState) -> None:
        """Make ready what takes time to make, while the network is waited for; show nothing."""

    def leave(self) -> None:
        """Let go of what was made ready: nothing will be shown."""

    def open(self, state: PanelState) -> None:
        """Take up the place."""

    def paint(self, state: PanelState) -> None:
        """Show `state`."""

    def close(self, bundle: Bundle) -> None:
        """Put the MIME bundle in its stead."""


class TextDisplay(Display):
    """One output that is updated, for front ends that nobody knows, nbclient and papermill."""

    tick: float | None = 1.0
    pace = 0.5

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._display_id = uuid.uuid4().hex
        self._phase, self._due = "", 0.0
        self._shown = False

    def open(self, state: PanelState) -> None:
        """Show the first line."""
        self._put({"text/plain": self._twin(state)})

    def paint(self, state: PanelState) -> None:
        """Show the text so far and a line of status, twice a second at the most."""
        now = time.monotonic()
        if state.phase == self._phase and now < self._due:
            return
        # The whole text is sent each time: the longer it is, the less often.
        self._phase, self._due = state.phase, now + max(self.pace, state.text.size / 50_000)
        self._put({"text/plain": self._twin(state)})

    def close(self, bundle: Bundle) -> None:
        """Put the answer in place."""
        self._put(bundle)

    def _put(self, bundle: Bundle) -> None:
        show = update_display if self._shown else display
        show(bundle, raw=True, display_id=self._display_id)  # type: ignore[no-untyped-call]
        self._shown = True

    def _twin(self, state: PanelState) -> str:
        line = status(state, self._clock.now(), self._clock.wall())
        text = str(state.text)
        text = text if len(text) <= MOST else f"…{text[-MOST:]}"
        return f"{printable(text)}\n\n[{line}]".lstrip()


class TerminalDisplay(Display):
    """The lines of a terminal: the answer as it comes, and one line that counts down."""

    single = True

    def __init__(self, clock: Clock, heading: str = "") -> None:
        self._clock = clock
        self._heading = f"{heading}\n\n" if heading else ""
        self._text = Text()
        self._line = ""
        self._at_start = True
        self._lives = sys.stdout.isatty()
        self.tick: float | None = 0.2 if self._lives else None

    def open(self, state: PanelState) -> None:
        """Show the first line of status."""
        self.paint(state)

    def paint(self, state: PanelState) -> None:
        """Print what has come, or refresh the line of status."""
        if len(self._text) and not state.text.grew_from(self._text):
            self._wipe()
            self._write(("" if self._at_start else "\n") + "[the answer starts anew]\n")
            self._text = Text()
        if more := state.text.since(len(self._text)):
            self._wipe()
            self._write(("" if len(self._text) else self._heading) + printable(more))
            self._text = state.text
        elif state.phase != "streaming" and not state.ended:
            self._show(status(state, self._clock.now(), self._clock.wall()))

    def close(self, bundle: Bundle) -> None:
        """Print what the answer lacks, and the figures."""
        self._wipe()
        text = bundle["text/plain"]
        printed = self._heading + printable(str(self._text)) if len(self._text) else ""
        if len(printed) > len(text):  # the bundle holds only the beginning of a very long answer
            text, printed = "\n\n" + text.rpartition("\n\n")[2], ""
        elif not text.startswith(printed):
            printed = ""
            self._write("" if self._at_start else "\n\n")
        self._write(text[len(printed) :] + "\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._at_start = text.endswith("\n")

    def _show(self, line: str) -> None:
        if not self._lives:
            # Where lines cannot be rewritten, only a change of what is going on is news.
            if line.split(" ", 1)[0] != self._line.split(" ", 1)[0]:
                self._write(("" if self._at_start else "\n") + f"[{line}]\n")
            self._line = line
            return
        if not self._line and not self._at_start:
            self._write("\n")
        width = max(os.get_terminal_size().columns - 1, 20)
        sys.stdout.write("\r\x1b[K" + line[:width])
        sys.stdout.flush()
        self._line = line

    def _wipe(self) -> None:
        if self._lives and self._line:
            sys.stdout.write("\r\x1b[K")
            self._line, self._at_start = "", True


class NoticeDisplay(Display):
    """A terminal whose user does something else: only the answer is printed."""

    single = True

    def close(self, bundle: Bundle) -> None:
        """Print the answer."""
        sys.stdout.write(f"\n{bundle['text/plain']}\n")
        sys.stdout.flush()
