"""Shows one request below its cell while it runs, and leaves the answer there.

Owns that the answer arrives even if the view fails. Must not know which view it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import replace

from nbcodex.errors import shorten
from nbcodex.events import Event
from nbcodex.models import Reply
from nbcodex.notebook.display import MAX_HEADING_CHARS
from nbcodex.notebook.display.panel import PanelState, apply_event
from nbcodex.notebook.display.text import Bundle, OutputSlot, RequestView
from nbcodex.rendering import formats
from nbcodex.rendering.figures import figures_line
from nbcodex.rendering.formats import Format
from nbcodex.requests.structured_output import NOTE_MISMATCH

# Creating a widget takes some milliseconds of the interpreter, which the thread that sends the
# request needs first: so the view is prepared this long after the request was handed over …
SEND_TIME_S = 0.0015
# … and opened if there is no answer after this time; a faster one needs no panel.
OPEN_DELAY_S = 0.05
# A request that is not even sent by then is shown all the same: a setting may be wrong.
MAX_UNSENT_S = 1.0

# Front ends take seconds to render more than this. The `Reply` holds all of it.
MAX_RENDERED_CHARS = 200_000

# Characters of the plain text beside rendered Markdown: all of it would double what is sent to the
# page and what the file holds.
PLAIN_TEXT_CHARS = 1_000

# In these formats the beginning of an answer is of no use.
_INDIVISIBLE = ("json", "html", "code", "math")
# These formats leave more than one output.
_TWO_OUTPUTS = ("json", "image", "fix")

log = logging.getLogger(__name__)


class CellOutput:
    """Renders one request's events in a view, and replaces the view with the answer.

    With `only_if_waiting`, nothing is shown unless the request has to wait. With `background`,
    other cells may run before the answer arrives. `notes` are added to the line of figures.
    """

    def __init__(
        self,
        view: RequestView,
        *,
        answer_format: Format = "markdown",
        only_if_waiting: bool = False,
        remote_images: bool = False,
        notes: Collection[str] = (),
        heading: str = "",
        started_at: float = 0.0,
        background: bool = False,
    ) -> None:
        self._view = view
        self._format, self._only_if_waiting = answer_format, only_if_waiting
        self._remote_images = remote_images
        # Once other cells run, new outputs land below those. So a second output is added at once,
        # empty, and replaced at the end.
        two_outputs = background and answer_format in _TWO_OUTPUTS and not view.is_plain_text
        self._second_slot = OutputSlot() if two_outputs else None
        self._notes, self._heading = list(notes), heading
        self._state = PanelState(phase_started_at=started_at, started_at=started_at)
        self._is_open = self._is_prepared = False
        self._background, self._failure = background, ""
        self._created_at = time.monotonic()

    @property
    def render_interval_s(self) -> float | None:
        """How often to call `on_events` without one; None: only with events."""
        if self._is_open:
            return self._view.render_interval_s
        if self._only_if_waiting:
            return None
        if self._is_prepared or self._state.phase != "sending":
            return OPEN_DELAY_S
        return SEND_TIME_S

    def show(self) -> None:
        """Show the view, even if nothing has happened yet."""
        self._is_open = True
        self._call_view(self._view.open)
        if self._second_slot:
            self._second_slot.show({"text/plain": ""})

    def add_note(self, note: str) -> None:
        """Add `note` to the line of figures."""
        self._notes.append(note)

    def on_events(self, events: tuple[Event, ...]) -> None:
        """Show what `events` change; without any, open a view that is due."""
        for event in events:
            self._state = apply_event(self._state, event)
            if self._background and (error := getattr(event, "error", None)) and self._state.ended:
                # No cell raises this error, so the output is the only place that shows it.
                self._failure = f"{error.title}: {error}"
        if self._state.ended:
            return
        if self._is_open:
            self._call_view(self._view.render)
        elif self._state.phase == "sending" and not (
            self._only_if_waiting or self._is_prepared or events
        ):
            self._is_prepared = True
            self._call_view(self._view.prepare)
        elif self._state.is_waiting or (not self._only_if_waiting and self._is_due(events)):
            self.show()

    def _is_due(self, events: tuple[Event, ...]) -> bool:
        match self._state.phase:
            case "queued":
                return time.monotonic() - self._created_at > MAX_UNSENT_S
            case "sending":
                return not events
        return True

    def close(self) -> None:
        """Replace the view with the answer, or with what there is of it."""
        reply = self._state.reply
        if reply is None or not (
            self._is_open or ((reply or reply.text) and not self._only_if_waiting)
        ):
            self._view.discard()
            return
        bundle, *more = self.bundles(reply)
        try:
            self._view.close(bundle)
        except Exception:
            log.exception("the view failed at its end")
            OutputSlot().show(bundle)
        if self._second_slot:
            second, more = more[:1] or [{"text/plain": ""}], more[1:]
            self._second_slot.show(second[0])
        for each in more:
            OutputSlot().show(each)

    def bundles(self, reply: Reply) -> tuple[Bundle, ...]:
        """Return what stays in the notebook: the answer, and one line of figures."""
        line = self._final_line(reply)
        form, excess = self._format, len(reply.text) - MAX_RENDERED_CHARS
        if excess > 0:
            line = f"{excess:,} more characters: the Reply's text holds them all · {line}"
            reply = replace(reply, text=reply.text[:MAX_RENDERED_CHARS])
            form = "text" if form in _INDIVISIBLE else form
        sheet = formats.AnswerOutput(
            reply=reply,
            line=line,
            heading=shorten(self._heading, MAX_HEADING_CHARS),
            remote_images=self._remote_images,
            reasoning=str(self._state.reasoning),
            max_plain_chars=PLAIN_TEXT_CHARS if self._view.renders_markdown else None,
        )
        if self._only_if_waiting:
            return ({"text/plain": sheet.line},)
        if self._view.is_plain_text:
            images = formats.image_hints(reply)
            return ({"text/plain": replace(sheet, line=" · ".join([line, *images])).plain_text},)
        try:
            return formats.render_answer(sheet, form)
        except Exception:
            log.exception("an answer could not be shown as %s", form)
            return formats.render_answer(sheet, "text")

    def _final_line(self, reply: Reply) -> str:
        line = figures_line(reply)
        if not reply and reply.text and NOTE_MISMATCH not in reply.notes:
            line = f"{reply.status}, this is not the whole answer · {line}"
        return " · ".join(filter(None, [line, *map(shorten, [self._failure, *self._notes])]))

    def _call_view(self, method: Callable[[PanelState], None]) -> None:
        # A view that fails must not lose the answer.
        try:
            method(self._state)
        except Exception:
            log.exception("the view failed")
