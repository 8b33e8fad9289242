"""How one request or one map is shown below its cell, and what stays there.

A view is chosen for the front end: widgets, text or a terminal. If it fails, the answer is shown
all the same. `widget_views` imports ipywidgets, which is slow, and is imported only where needed.
"""

from __future__ import annotations

import contextvars
import logging
import os
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from IPython.core.interactiveshell import InteractiveShell

from nbcodex.errors import shorten
from nbcodex.events import Event
from nbcodex.models import MapStats, Reply
from nbcodex.notebook.display import text_views
from nbcodex.notebook.display.map_panel import MapState, apply_stats, failure_lines, summary_line
from nbcodex.notebook.display.panel import PanelState, apply_event
from nbcodex.notebook.display.text_views import MapView, OutputSlot, RequestView
from nbcodex.rendering import formats
from nbcodex.rendering.figures import figures_line, join_figures
from nbcodex.rendering.formats import Format, MimeBundle
from nbcodex.rendering.markdown import escape_inline
from nbcodex.requests.structured_output import NOTE_DECLINED, NOTE_MISMATCH
from nbcodex.runtime.clock import Clock

# Creating a widget keeps the GIL for some milliseconds, which would delay the thread that sends the
# request. So the view is prepared this much later.
PREPARE_DELAY_S = 0.0015
# An answer that arrives within this time after the view was prepared is shown without a panel.
OPEN_DELAY_S = 0.05
# After this time a request is shown even if it was not sent: a wrong setting may prevent that.
MAX_UNSENT_S = 1.0

# Front ends take seconds to render a longer text. The `Reply` holds all of it.
MAX_RENDERED_CHARS = 200_000

# Characters of the plain text beside rendered Markdown: all of it would double what is sent to the
# page and what the file holds.
PLAIN_TEXT_CHARS = 1_000

# A request of `nbcodex.ask` is shown if it is queued for so long.
MIN_SHOWN_QUEUE_S = 3.0

# Returns what stands above the final figures of a map, as plain text and as Markdown.
MapPreview = Callable[[], tuple[str, str]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """How a request and its answer are shown."""

    format: Format = "markdown"
    only_if_waiting: bool = False  # show nothing unless the request has to wait
    background: bool = False  # other cells may run before the answer arrives
    remote_images: bool = False  # images in the answer may be loaded from other servers
    notes: Collection[str] = ()  # follow the figures, in the line below the answer
    heading: str = ""  # stands above an answer whose prompt is not in the cell


def can_show_widgets(shell: InteractiveShell | None, display_setting: str) -> bool:
    """Return whether `Codex.display` permits widgets, and the front end is known to show them."""
    if shell is None or not hasattr(shell, "kernel"):
        return False
    # A kernel cannot ask what its front end can show. These three show widgets and can be
    # recognised: Jupyter's server (nbclient and papermill have none), VS Code, Colab.
    is_recognised = (
        "JPY_SESSION_NAME" in os.environ
        or "__vsc_ipynb_file__" in shell.user_ns
        or "google.colab" in sys.modules
    )
    if display_setting != "widget" and not (display_setting == "auto" and is_recognised):
        return False
    try:
        import nbcodex.notebook.widget_base  # noqa: F401
    except Exception:
        log.exception("widgets are not available")
        return False
    return True


class CellOutput:
    """Shows one request's events in a view, and at its end the answer instead of the view."""

    def __init__(self, view: RequestView, options: OutputOptions, state: PanelState) -> None:
        self._view, self._options, self._state = view, options, state
        view.in_background = self._options.background
        # Once other cells run, new outputs land below those. So the second output of these formats
        # (figures below JSON or an image, a corrected cell below its explanation) is added at once,
        # empty, and replaced when the request ends.
        has_two = self._options.format in {"json", "image", "fix"} and not view.is_plain_text
        self._second_slot = OutputSlot() if has_two and self._options.background else None
        self._notes = list(self._options.notes)
        self._is_open = self._is_prepared = False
        self._created_at = time.monotonic()
        # ipykernel 7 takes the cell from the context; in an empty one, it takes the last cell.
        self._cell_context = contextvars.copy_context()

    def max_idle(self) -> float | None:
        """Return the seconds without an event after which `on_events` is called; None: never."""
        if self._is_open:
            return self._view.render_interval_s
        if self._options.only_if_waiting:
            return MIN_SHOWN_QUEUE_S
        if self._is_prepared or self._state.phase != "sending":
            return OPEN_DELAY_S
        return PREPARE_DELAY_S

    def show(self) -> None:
        """Show the view, even if nothing has happened yet."""
        self._is_open = True
        self._call_view(self._view.open)
        if self._second_slot:
            self._second_slot.show(text_views.EMPTY_BUNDLE)

    def on_events(self, events: tuple[Event, ...]) -> None:
        """Show what `events` change; without any, prepare or open the view if it is time to."""
        for event in events:
            self._state = apply_event(self._state, event)
        if self._state.reply is not None:
            error = getattr(events[-1], "error", None) if events else None
            if self._options.background and error:
                # No cell raises this error, so the output is the only place that shows it.
                self._notes.insert(0, f"{error.title}: {error}")
            return
        if self._is_open:
            self._call_view(self._view.render)
        elif self._state.is_waiting:
            self.show()
        elif self._options.only_if_waiting:
            # Without an event, `max_idle()` has passed in the queue.
            left = self._state.seconds_left(events[-1].at) if events else MIN_SHOWN_QUEUE_S
            # The reason is set while a request is in the queue for capacity.
            is_queued = self._state.phase == "queued" and self._state.reason
            if is_queued and (left or 0.0) >= MIN_SHOWN_QUEUE_S:
                self.show()
        elif self._state.phase == "queued":
            if time.monotonic() - self._created_at > MAX_UNSENT_S:
                self.show()
        elif self._state.phase != "sending" or (self._is_prepared and not events):
            self.show()
        elif not events:
            self._is_prepared = True
            self._call_view(self._view.prepare)

    def close(self, take_notice: Callable[[], str] = lambda: "") -> None:
        """End the view, and leave the answer, or what arrived, with `take_notice`'s text."""
        reply = self._state.reply
        if reply is None or not self._is_open:
            self._view.discard()  # it gets no answer, or was prepared and never shown
            if reply is None or self._options.only_if_waiting or not (reply or reply.text):
                return
        bundle, *others = self.final_bundles(reply, take_notice())
        try:
            self._view.close(bundle)
        except Exception:
            log.exception("the view could not show the answer")
            self._cell_context.run(OutputSlot().show, bundle)
        if self._second_slot:
            self._second_slot.show(others.pop(0) if others else text_views.EMPTY_BUNDLE)
        for other in others:
            self._cell_context.run(OutputSlot().show, other)

    def final_bundles(self, reply: Reply, note: str = "") -> tuple[MimeBundle, ...]:
        """Return the outputs that stay in the notebook: the answer, and one line of figures."""
        line = figures_line(reply)
        # The model itself ended an answer that declines or does not fit its schema. Of an answer
        # that was cut, the figures say so.
        is_explained = reply.cut or not {NOTE_MISMATCH, NOTE_DECLINED}.isdisjoint(reply.notes)
        if not reply and reply.text and not is_explained:
            line = f"{reply.status}, this is not the whole answer · {line}"
        line = join_figures(line, *map(shorten, (*self._notes, note)))
        format_, excess = self._options.format, len(reply.text) - MAX_RENDERED_CHARS
        if excess > 0:
            line = f"{excess:,} more characters: the Reply's text holds them all · {line}"
            reply = replace(reply, text=reply.text[:MAX_RENDERED_CHARS])
            # In these formats the beginning of an answer cannot be rendered.
            format_ = "text" if format_ in {"json", "html", "code", "math"} else format_
        if self._options.only_if_waiting:
            return ({"text/plain": line},)
        if self._view.is_plain_text:
            format_, line = "text", join_figures(line, *formats.image_hints(reply))
        answer = formats.AnswerOutput(
            reply=reply,
            figures_line=line,
            heading=self._options.heading,
            remote_images=self._options.remote_images,
            reasoning=str(self._state.reasoning),
            max_plain_chars=PLAIN_TEXT_CHARS if self._view.renders_markdown else None,
        )
        try:
            return formats.render_answer(answer, format_)
        except Exception:
            log.exception("an answer could not be shown as %s", format_)
            return formats.render_answer(answer, "text")

    def _call_view(self, method: Callable[[PanelState], None]) -> None:
        try:
            method(self._state)
        except Exception:
            log.exception("the view failed")


@dataclass(eq=False)
class MapOutput:
    """Shows the figures of a map in a view, and at its end the map's result instead of the view."""

    view: MapView
    clock: Clock
    preview: MapPreview
    take_notice: Callable[[], str]  # returns what follows the figures: a problem, or ""
    _state: MapState | None = None

    def __call__(self, stats: MapStats) -> None:
        """Show `stats`. A view that fails is logged: the map must continue."""
        self._state = apply_stats(self._state, stats)
        try:
            if stats.outcome:
                self.view.close(self._final_bundle(self._state))
            else:
                self.view.render(self._state, self.clock.wall())
        except Exception:
            log.exception("the map could not be shown")

    def _final_bundle(self, state: MapState) -> MimeBundle:
        line = join_figures(summary_line(state), shorten(self.take_notice()))
        failures = failure_lines(state.stats)
        plain, markdown = line, f"<sub>{escape_inline(line)}</sub>\n"
        # A preview of a map that was stopped would look like its result.
        if state.stats.outcome == "done" and any(previews := self.preview()):
            plain, markdown = f"{previews[0]}\n\n{plain}", f"{previews[1]}\n\n{markdown}"
        items = "".join(f"\n- {escape_inline(failure)}" for failure in failures)
        return {
            "text/plain": "\n".join([plain, *(f"  {failure}" for failure in failures)]),
            "text/markdown": f"{markdown}{items}".rstrip(),
        }
