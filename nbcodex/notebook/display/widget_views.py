"""The panel of a request and the progress of a map as Jupyter widgets.

The page (`static/panel.js`) gets the trait ``data``, a dictionary of everything but the answer's
text, and messages ``{type: "text", seq, text, whole, changes}``. `whole` is true if `text` is all
of the text so far, else it is to be appended. `seq` counts the messages: if a number is missing,
the page asks for the whole text. `changes` are entries of ``data`` that changed while text arrived,
so that one rendering is one message.
"""

from __future__ import annotations

import _thread
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from nbcodex.errors import shorten
from nbcodex.notebook.display import panel
from nbcodex.notebook.display.map_panel import MapState, map_data
from nbcodex.notebook.display.panel import ACTIONS, ActionName, GrowingText, PanelState
from nbcodex.notebook.display.text_views import MAX_LIVE_CHARS, MapView, OutputSlot, RequestView
from nbcodex.notebook.widget_base import CodexWidget
from nbcodex.rendering.figures import join_figures
from nbcodex.rendering.formats import MimeBundle
from nbcodex.runtime.clock import Clock, format_duration, format_time

# For ten messages a second. A little less than their distance, as the caller's timer is not exact.
MIN_MESSAGE_INTERVAL_S = 0.09

# Ten times as fast as people read. Text beyond that is sent when the answer pauses; if the answer
# ends before, its output holds the whole text.
MAX_CHARS_PER_S = 4_000

# `render` is called at least twice a second. A gap of this length means that the machine slept; the
# browser's clock stood still meanwhile, and so did its countdown.
SLEEP_GAP_S = 3.0

# Widgets stay open when they end, and say where the result is: a cell that was pasted and a page
# that was reloaded do not get the final output. If more of them have ended, the oldest are closed.
MAX_ENDED_WIDGETS = 100

# Characters of the latest reasoning that are shown while a model thinks.
REASONING_PREVIEW_CHARS = 160

# These entries of the data change with every delta, and are sent together with its text.
_LIVE_FIGURES = {"tokens_in", "tokens_out", "speed", "cost"}

_ended_widgets: deque[CodexWidget] = deque()


def _end_widget(widget: CodexWidget | None, line: str) -> None:
    """Let a widget show only `line` from now on."""
    if widget is not None:
        widget.on_action = widget.on_sync = None
        widget.data = {**widget.data, "phase": "ended", "line": line}
        _ended_widgets.append(widget)
        if len(_ended_widgets) > MAX_ENDED_WIDGETS:
            _ended_widgets.popleft().close()


class WidgetView(RequestView):
    """Shows a request as a widget, which the answer replaces at the end."""

    renders_markdown = True
    render_interval_s: float | None = 0.5

    def __init__(self, on_action: Callable[[ActionName], None], clock: Clock) -> None:
        self._on_action = on_action  # called in another thread than the one that renders
        self._clock = clock
        self._slot = OutputSlot()
        self._widget: CodexWidget | None = None
        self._state = PanelState()
        self._text = GrowingText()  # what the page has, or will have once `_unsent` is sent
        self._unsent = ""
        self._seq = 0
        self._data_lack_seq = False  # no data with the number of the last text were sent
        self._rendered_at = 0.0
        # The thread that follows the request and the one that receives the page's messages both
        # send texts, which must arrive in the order of their numbers.
        self._send_lock = threading.RLock()

    def prepare(self, state: PanelState) -> None:
        """Create the widget while the network is awaited: it takes some milliseconds."""
        self._state, self._rendered_at = state, self._clock.now()
        self._widget = CodexWidget("panel", self._current_data(), self._act, self._sync)

    def open(self, state: PanelState) -> None:
        """Show the panel below the cell."""
        if self._widget is None:
            self.prepare(state)
        self._slot.show(self._widget, raw=False)
        self.render(state)

    def render(self, state: PanelState) -> None:
        """Send what changed; nothing if a message was just sent, unless the phase is new."""
        now = self._clock.now()
        interval, is_new_phase = now - self._rendered_at, state.phase != self._state.phase
        if self._widget is None or (interval < MIN_MESSAGE_INTERVAL_S and not is_new_phase):
            return
        with self._send_lock:
            before, self._state, self._rendered_at = self._state, state, now
            old, new = panel_data(before), panel_data(state)
            changes = {name: value for name, value in new.items() if value != old[name]}
            countdown_is_right = before.resume_at == state.resume_at and interval <= SLEEP_GAP_S
            only_figures = countdown_is_right and changes.keys() <= _LIVE_FIGURES
            max_chars = MAX_LIVE_CHARS
            if state.phase == "streaming":
                max_chars = round(MAX_CHARS_PER_S * min(1.0, interval))
            sent_text = self._send_text(
                state.text, changes=changes if only_figures else None, max_chars=max_chars
            )
            if only_figures and sent_text:
                # The page notices a lost text when the next one arrives. If the answer pauses, it
                # does so only by the number in the data.
                self._data_lack_seq = True
            elif not only_figures or changes or self._data_lack_seq:
                self._widget.data = self._current_data()
                self._data_lack_seq = False

    def close(self, bundle: MimeBundle) -> None:
        """Leave the final MIME bundle instead of the panel."""
        widget, self._widget = self._widget, None
        try:
            # In the background, a new output would land below the cell that runs by then.
            self._slot.finish(bundle, as_update=self.in_background)
        finally:
            line = f"If no answer is shown here, `%codex journal {self._state.id}` prints it."
            _end_widget(widget, line)

    def discard(self) -> None:
        """Close the widget."""
        if self._widget is not None:
            self._widget.close()
            self._widget = None

    def _send_text(
        self,
        text: GrowingText,
        *,
        whole: bool = False,
        changes: dict[str, Any] | None = None,
        max_chars: int = MAX_LIVE_CHARS,
    ) -> bool:
        """Send up to `max_chars` that the page lacks, or the `whole` text; return if it did."""
        unchanged = text is self._text or not (text.chunk_count or self._text.chunk_count)
        if self._widget is None or (unchanged and not self._unsent and not whole):
            return False
        whole = whole or not text.extends(self._text)
        new = str(text) if whole else self._unsent + text.text_after(self._text.chunk_count)
        if len(new) > MAX_LIVE_CHARS:
            whole, new = True, f"…{new[-MAX_LIVE_CHARS:]}"
            max_chars = len(new)
        self._text = text
        new, self._unsent = new[:max_chars], new[max_chars:]
        self._seq += 1
        message = {"type": "text", "seq": self._seq, "text": new, "whole": whole}
        self._widget.send(message | ({"changes": changes} if changes else {}))
        return True

    def _current_data(self) -> dict[str, Any]:
        times = time_data(self._state, self._clock.now(), self._clock.wall())
        return panel_data(self._state) | times | {"seq": self._seq}

    def _act(self, action: str, _request_id: str) -> None:
        if action in ACTIONS:
            self._on_action(action)

    def _sync(self) -> None:
        with self._send_lock:
            self._send_text(self._text, whole=True)
            # Another thread ends the request, and sets the widget to None.
            if (widget := self._widget) is not None:
                widget.data = self._current_data()


def panel_data(state: PanelState) -> dict[str, Any]:
    """Return what the page shows, apart from the text and from what only time changes."""
    usage, speed = state.usage, state.tokens_per_second
    about = "~" if usage.estimated else ""
    cause = None  # why the request waits
    if state.limit is not None:
        attributes = ("name", "resource", "figures", "limit", "used", "requested")
        cause = {name: getattr(state.limit, name) for name in attributes}
    elif state.phase == "queued" and state.reason:
        cause = {"name": "Queued for capacity", "figures": state.reason}
    elif state.reason:
        title, _, message = state.reason.partition(": ")
        cause = {"name": title, "figures": message}
    reasoning = ""
    if state.phase == "thinking":
        # The last chunks suffice: hardly any is shorter than a character.
        start = max(0, state.reasoning.chunk_count - REASONING_PREVIEW_CHARS)
        reasoning = " ".join(state.reasoning.text_after(start).split())
    if len(reasoning) > REASONING_PREVIEW_CHARS:
        # The end of the reasoning, cut at a word.
        reasoning = "…" + reasoning[-REASONING_PREVIEW_CHARS:].partition(" ")[2]
    return {
        "id": state.id,
        # In place of the widget, where no kernel updates it.
        "text": f"Codex request {state.id} · {panel.stale_output_hint(state.id)}",
        "phase": state.phase,
        "stale": state.stale,  # whether the text shown comes from a failed attempt
        "model": join_figures(shorten(state.model or "", 80), "simulated" * state.simulated),
        "cause": cause,
        "attempt": state.attempt,
        "patience": f"{format_duration(state.patience).removesuffix(' 00 s')} patience",
        "tokens_in": "" if usage.input_tokens is None else f"{about}{usage.input_tokens:,}",
        "tokens_out": "" if usage.output_tokens is None else f"{about}{usage.output_tokens:,}",
        "speed": f"~{speed:.0f}" if speed else "",
        "cost": state.cost_text,
        "reasoning": reasoning,
        "actions": [{"name": n, "disabled": panel.disabled_reason(state, n)} for n in ACTIONS],
    }


def time_data(state: PanelState, now: float, wall: float) -> dict[str, Any]:
    """Return what changes with time, in ms. From here on the page counts by its own clock."""
    left = state.seconds_left(now)
    return {
        "line": panel.status_line(state, now, wall),
        "elapsed_ms": round((now - state.started_at) * 1000),
        "waited_ms": round(state.total_waited(now) * 1000),
        "waits": state.wait_started_at is not None,  # whether `waited_ms` grows
        # The remaining time does not depend on the page's clock; the deadline, in ms since the
        # epoch, keeps a panel that is drawn later from starting the countdown again.
        "remaining_ms": None if left is None else round(left * 1000),
        "deadline_ms": None if left is None else round((wall + left) * 1000),
        "total_ms": None if left is None else round((left + now - state.phase_started_at) * 1000),
        "until": "" if left is None else format_time(wall + left, now=wall),
    }


class WidgetMapView(MapView):
    """Shows a map as a widget, which the final MIME bundle replaces."""

    _widget: CodexWidget | None = None

    def render(self, state: MapState, wall: float) -> None:
        """Send the figures."""
        if self._widget is not None:
            self._widget.data = map_data(state, wall)
            return
        self._widget = CodexWidget("map", map_data(state, wall), self._act)
        self._slot.show(self._widget, raw=False)

    def close(self, bundle: MimeBundle) -> None:
        """Leave the final MIME bundle instead of the widget."""
        widget, self._widget = self._widget, None
        try:
            self._slot.finish(bundle, as_update=False)  # the map's own cell still runs
        finally:
            _end_widget(widget, "If no result is shown here, `nbcodex.map.last` is the result.")

    def _act(self, action: str, _request_id: str) -> None:
        # The cell blocks the main thread: this is what the notebook's own Stop does to it. Once the
        # map has ended, however, another cell may run in the main thread.
        if action == "stop" and self._widget is not None:
            _thread.interrupt_main()
