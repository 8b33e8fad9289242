"""What a request leaves in the notebook, and the choice of the place where it is shown meanwhile.

Owns the final answer: displays may fail as they like, it still arrives.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from IPython.display import display, update_display

from nbcodex.errors import shorten
from nbcodex.events import Event
from nbcodex.models import Reply
from nbcodex.notebook.display.panel import PanelState, reduce
from nbcodex.notebook.display.text import (
    Bundle,
    Display,
    NoticeDisplay,
    TerminalDisplay,
    TextDisplay,
)
from nbcodex.rendering import formats
from nbcodex.rendering.figures import figures_line
from nbcodex.rendering.formats import Format
from nbcodex.requests.fitting import UNFIT
from nbcodex.runtime.clock import Clock

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.notebook.display.panel import ActionName

SOON = 0.05
"""Seconds after which a request that nobody has answered yet is shown all the same."""

BREATH = 0.0015
"""Seconds that the thread which sends a request needs for it, undisturbed."""

LATE = 1.0
"""Seconds after which it is shown even if it is not sent yet: its settings may prove wrong."""

RENDERED = 200_000
"""Characters of an answer that stay below its cell: rendering takes time, and the page's patience.
The `Reply` holds it all."""

TWIN = 1_000
"""Characters of an answer's text twin, where its Markdown is shown: else all of it would travel to
the page with it, and into the file."""

_WHOLE = ("json", "html", "code", "math")
"""Formats that make no sense of a part."""
_APART = ("json", "image", "fix")
"""Formats of which more than one output stays."""

log = logging.getLogger(__name__)


class Screen:
    """Paints one request's events on a display, and leaves the answer in its place.

    Parameters
    ----------
    place : Display
        Where to paint.
    form : Format
        What the answer stays as.
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
    later : bool
        Whether the answer comes while the user does something else.
    """

    def __init__(
        self,
        place: Display,
        *,
        form: Format = "markdown",
        lazily: bool = False,
        remote_images: bool = False,
        notes: Collection[str] = (),
        heading: str = "",
        began: float = 0.0,
        later: bool = False,
    ) -> None:
        self._place = place
        self._form, self._lazily, self._remote_images = form, lazily, remote_images
        # What comes when other cells run can only replace what stands below this one already.
        self._below = uuid.uuid4().hex if later and form in _APART and not place.single else None
        self._notes, self._heading = list(notes), heading
        self._state = PanelState(since=began, began=began)
        self._open = self._prepared = False
        self._later, self._why = later, ""
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
        if self._below:
            _show({"text/plain": ""}, display_id=self._below)

    def note(self, what: str) -> None:
        """Say something beside the figures, at the end."""
        self._notes.append(what)

    def paint(self, events: tuple[Event, ...]) -> None:
        """Show what `events` change."""
        for event in events:
            self._state = reduce(self._state, event)
            if self._later and (error := getattr(event, "error", None)) and self._state.ended:
                # No cell fails of it: its place is where it is said.
                self._why = f"{error.title}: {error}"
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
        bundle, *below = self.bundles(reply)
        try:
            self._place.close(bundle)
        except Exception:
            log.exception("the display failed at its end")
            _show(bundle)
        if self._below:
            slot, below = below[:1] or [{"text/plain": ""}], below[1:]
            update_display(slot[0], raw=True, display_id=self._below)  # type: ignore[no-untyped-call]
        for more in below:
            _show(more)

    def bundles(self, reply: Reply) -> tuple[Bundle, ...]:
        """Return what stays in the notebook: the answer, and one line of figures."""
        line = " · ".join(
            filter(None, [self._told(reply), *map(shorten, [self._why, *self._notes])])
        )
        form, rest = self._form, len(reply.text) - RENDERED
        if rest > 0:
            line = f"{rest:,} more characters: the Reply's text holds them all · {line}"
            reply = replace(reply, text=reply.text[:RENDERED])
            form = "text" if form in _WHOLE else form
        sheet = formats.AnswerOutput(
            reply=reply,
            line=line,
            heading=shortened(self._heading),
            remote_images=self._remote_images,
            thought=str(self._state.thought),
            twin=TWIN if self._place.renders else None,
        )
        if self._lazily:
            return ({"text/plain": sheet.line},)
        if self._place.single:
            unseen = formats.image_hints(reply)
            return ({"text/plain": replace(sheet, line=" · ".join([line, *unseen])).plain},)
        try:
            return formats.render_answer(sheet, form)
        except Exception:
            log.exception("an answer could not be shown as %s", form)
            return formats.render_answer(sheet, "text")

    def _told(self, reply: Reply) -> str:
        if reply or not reply.text or UNFIT in reply.notes:
            return figures_line(reply)
        return f"{reply.status}, this is not the whole answer · {figures_line(reply)}"

    def _try(self, deed: Callable[[PanelState], None], state: PanelState) -> None:
        try:
            deed(state)
        except Exception:
            log.exception("the display failed")


def shortened(heading: str) -> str:
    """Return what stands above an answer, on one line."""
    return shorten(heading, 80)


def _show(bundle: Bundle, **where: str) -> None:
    display(bundle, raw=True, **where)  # type: ignore[no-untyped-call]


def place(
    shell: InteractiveShell,
    clock: Clock,
    *,
    choice: str,
    on_action: Callable[[str], None],
    offers: Collection[ActionName],
    heading: str = "",
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
    heading : str
        What stands above the answer.
    later : bool
        Whether the answer comes while the user does something else.
    """
    if not hasattr(shell, "kernel"):
        return NoticeDisplay() if later else TerminalDisplay(clock, shortened(heading))
    if shows_widgets(shell, choice):
        try:
            from nbcodex.notebook.display.widget import WidgetDisplay

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
