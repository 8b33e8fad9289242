"""What a request leaves in the notebook, and the choice of the place where it is shown meanwhile.

Owns the final answer: displays may fail as they like, it still arrives.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from IPython.display import display

from nbcodex.clock import Clock
from nbcodex.errors import brief
from nbcodex.events import Event
from nbcodex.markdown import harmless, inline
from nbcodex.notebook.display import (
    Bundle,
    Display,
    NoticeDisplay,
    TerminalDisplay,
    TextDisplay,
    printable,
)
from nbcodex.notebook.figures import figures
from nbcodex.notebook.panel import PanelState, reduce
from nbcodex.records import Reply

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.notebook.panel import ActionName

SOON = 0.05
"""Seconds after which a request that nobody has answered yet is shown all the same."""

BREATH = 0.0015
"""Seconds that the thread which sends a request needs for it, undisturbed."""

LATE = 1.0
"""Seconds after which it is shown even if it is not sent yet: its settings may prove wrong."""

RENDERED = 200_000
"""Characters of an answer that stay below its cell: rendering takes time, and the page's patience.
The `Reply` holds it all."""

log = logging.getLogger(__name__)


class Screen:
    """Paints one request's events on a display, and leaves the answer in its place.

    Parameters
    ----------
    place : Display
        Where to paint.
    as_text : bool
        Whether the answer stays as plain text, not as Markdown.
    lazily : bool
        Whether to show nothing at all unless the request has to wait.
    remote_images : bool
        Whether images in the answer may be fetched.
    notes : collection of str
        What is said beside the figures.
    heading : str
        What stands above the answer.
    began : float
        The instant at which it was asked.
    """

    def __init__(
        self,
        place: Display,
        *,
        as_text: bool = False,
        lazily: bool = False,
        remote_images: bool = False,
        notes: Collection[str] = (),
        heading: str = "",
        began: float = 0.0,
    ) -> None:
        self._place = place
        self._as_text, self._lazily, self._remote_images = as_text, lazily, remote_images
        self._notes, self._heading = list(notes), heading
        self._state = PanelState(since=began, began=began)
        self._open = self._prepared = False
        self._made_at = time.monotonic()

    @property
    def tick(self) -> float | None:
        """Seconds after which `paint` wants to be called, even without events."""
        if self._open:
            return self._place.tick
        if self._lazily:
            return None
        return SOON if self._prepared or self._state.phase != "sending" else BREATH

    def open(self) -> None:
        """Take up the place, even if there is nothing to be told yet."""
        self._open = True
        self._try(self._place.open, self._state)

    def note(self, what: str) -> None:
        """Say something beside the figures, at the end."""
        self._notes.append(what)

    def paint(self, events: tuple[Event, ...]) -> None:
        """Show what `events` change."""
        for event in events:
            self._state = reduce(self._state, event)
        if self._state.ended:
            return
        if self._open:
            self._try(self._place.paint, self._state)
        elif self._state.phase == "sending" and not (self._lazily or self._prepared or events):
            self._prepared = True
            self._try(self._place.prepare, self._state)
        elif self._state.waits or (not self._lazily and self._is_news(events)):
            self.open()

    def _is_news(self, events: tuple[Event, ...]) -> bool:
        """Whether there is something to show: not at once that nothing has come yet.

        To open a display takes time from the thread that is just sending the request.
        """
        match self._state.phase:
            case "queued":
                return time.monotonic() - self._made_at > LATE
            case "sending":
                return not events
        return True

    def close(self) -> None:
        """Leave in place what came of the request."""
        reply = self._state.reply
        if reply is None or not (self._open or ((reply or reply.text) and not self._lazily)):
            self._place.leave()
            return
        bundle = self.bundle(reply)
        if self._lazily:
            bundle = {"text/plain": bundle["text/plain"].rpartition("\n\n")[2]}
        try:
            self._place.close(bundle)
        except Exception:
            log.exception("the display failed at its end")
            display(bundle, raw=True)  # type: ignore[no-untyped-call]

    def bundle(self, reply: Reply) -> Bundle:
        """Return what stays in the notebook: the answer, and one line of figures."""
        line = " · ".join([self._told(reply), *map(brief, self._notes)])
        heading, gap = brief(self._heading, 80), "\n\n" if self._heading else ""
        shown, rest = reply.text[:RENDERED], len(reply.text) - RENDERED
        if rest > 0:
            line = f"{rest:,} more characters: the Reply's text holds them all · {line}"
        plain = f"{heading}{gap}{printable(shown)}\n\n{line}".lstrip()
        if self._as_text:
            return {"text/plain": plain}
        text = harmless(shown, remote_images=self._remote_images)
        return {
            "text/markdown": f"{inline(heading)}{gap}{text}\n\n<sub>{inline(line)}</sub>".lstrip(),
            "text/plain": plain,
        }

    def _told(self, reply: Reply) -> str:
        if reply or not reply.text:
            return figures(reply)
        return f"{reply.status}, this is not the whole answer · {figures(reply)}"

    def _try(self, deed: Callable[[PanelState], None], state: PanelState) -> None:
        try:
            deed(state)
        except Exception:
            log.exception("the display failed")


def place(
    shell: InteractiveShell,
    clock: Clock,
    *,
    choice: str,
    on_action: Callable[[str], None],
    offers: Collection[ActionName],
    later: bool = False,
) -> Display:
    """Return the display for where this code runs.

    Parameters
    ----------
    shell : InteractiveShell
        The shell that runs the cell.
    clock : Clock
        The clock of the events.
    choice : {"auto", "widget", "text"}
        What the user has set.
    on_action : callable
        Called with the name of a button that was pressed, in another thread.
    offers : collection of str
        The buttons to show.
    later : bool
        Whether the answer comes while the user does something else.
    """
    if not hasattr(shell, "kernel"):
        return NoticeDisplay() if later else TerminalDisplay(clock)
    if shows_widgets(shell, choice):
        try:
            from nbcodex.notebook.widgets import WidgetDisplay

            return WidgetDisplay(on_action, clock, offers=offers)
        except Exception:
            log.exception("widgets cannot be had")
    return TextDisplay(clock)


def shows_widgets(shell: InteractiveShell | None, choice: str) -> bool:
    """Whether widgets are wanted, and the front end is one of those that are known to show them.

    Parameters
    ----------
    shell : InteractiveShell or None
        The shell that runs the cell.
    choice : {"auto", "widget", "text"}
        What the user has set.
    """
    if shell is None or not hasattr(shell, "kernel"):
        return False
    known = (
        "JPY_SESSION_NAME" in os.environ
        or "__vsc_ipynb_file__" in shell.user_ns
        or "google.colab" in sys.modules
    )
    return choice == "widget" or (choice == "auto" and known)
