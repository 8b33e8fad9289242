"""The panel as a Jupyter widget: its wire format, and its place in the cell's output.

Owns the messages of `static/panel.js`, their pace and the display id. What they mean is decided in
`panel`. Imports anywidget, and is therefore imported only when a widget is to be shown.

The trait ``view`` holds everything but the text, which travels as messages ``{type: "text", seq,
text, whole, news}``: the browser asks for the whole when one is missing. In mid-answer `news` are
the entries of ``view`` that have changed, so that each painting is one message. Figures that only
time moves (countdown, elapsed) are sent once, and tick in the browser.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Collection
from typing import Any

from IPython.display import display, update_display

from nbcodex.errors import shorten
from nbcodex.notebook import widget_base
from nbcodex.notebook.display.growing_text import Text
from nbcodex.notebook.display.panel import ACTIONS, ActionName, PanelState, refusal, status
from nbcodex.notebook.display.text import MOST, Display
from nbcodex.notebook.widget_base import Panel
from nbcodex.runtime.clock import Clock, format_duration, format_time

PACE = 0.09
"""Seconds between two messages of one phase: ten a second, and a painter need not be exact."""

FIGURES = {"tokens_in", "tokens_out", "speed", "cost"}
"""What changes with every piece of an answer, and travels with its text."""

FAST = 4_000
"""Characters of an answer that are sent in a second, at most: nobody reads a tenth as fast. What is
held back comes when the answer pauses, or stays below the cell anyway when it ends."""

ASLEEP = 3.0
"""Seconds without painting, though that is wanted twice in one, from which on the machine slept: a
browser's clock stood still meanwhile, and its countdown with it."""

THOUGHT = 160
"""Characters of its latest thought that a thinking model is shown with."""


class WidgetDisplay(Display):
    """A `Panel` in a cell's output, painted from a `PanelState` and replaced by the answer.

    Parameters
    ----------
    on_action : callable
        Called with the name of the button that was pressed, in another thread.
    clock : Clock
        The clock of the events.
    offers : collection of {"cancel", "retry", "park"}
        The buttons to show.
    """

    renders = True
    tick: float | None = 0.5
    """Seconds after which it wants to be painted anew: for what came too soon to be sent."""

    def __init__(
        self,
        on_action: Callable[[str], None],
        clock: Clock,
        *,
        offers: Collection[str] = ("cancel",),
    ) -> None:
        self._on_action = on_action
        self._clock = clock
        self._offers: list[ActionName] = [name for name in ACTIONS if name in offers]
        self._display_id = uuid.uuid4().hex
        self._shown = False
        self._panel: Panel | None = None
        self._state = PanelState()
        self._text = Text()
        self._unsent = ""
        self._seq = 0
        self._uncounted = False
        self._painted_at = float("-inf")
        # The painter and the thread that hears the browser both send; the browser counts.
        self._sending = threading.RLock()

    def prepare(self, state: PanelState) -> None:
        """Make the widget, while there is nothing to be shown yet and the network is waited for."""
        self._state = state
        self._panel = Panel(
            view=self._view(), kernel_id=widget_base.kernel_id(), layout=widget_base.layout()
        )
        self._panel.hear_while_blocked()
        self._panel.on_msg(self._hear)

    def open(self, state: PanelState) -> None:
        """Show the panel below the cell."""
        if self._panel is None:
            self.prepare(state)
        else:
            before, self._state = self._state, state
            # Times that the page has, it counts on by itself.
            if state.resume_at is not None or self._shows(before) != self._shows(state):
                self._panel.view = self._view()
        display(self._panel, display_id=self._display_id)  # type: ignore[no-untyped-call]
        self._shown = True

    def paint(self, state: PanelState) -> None:
        """Send what has changed; too soon after the last time, nothing, unless the phase is new."""
        now = self._clock.now()
        if self._panel is None or (
            state.phase == self._state.phase and now - self._painted_at < PACE
        ):
            return
        with self._sending:
            before, self._state = self._state, state
            passed = PACE if self._painted_at == float("-inf") else now - self._painted_at
            slept = passed > ASLEEP
            self._painted_at = now
            old, new = self._shows(before), self._shows(state)
            news = {name: value for name, value in new.items() if value != old[name]}
            calm = news.keys() <= FIGURES and before.resume_at == state.resume_at and not slept
            texts = self._seq
            most = round(FAST * min(1.0, passed)) if state.phase == "streaming" else MOST
            self._send_text(state.text, news=news if calm else None, most=most)
            told = self._seq != texts
            # Nobody misses the last text but by a view that counts it.
            if not calm or (not told and (news or self._uncounted)):
                self._panel.view = self._view()
                told = False
            self._uncounted = told

    def close(self, bundle: dict[str, Any]) -> None:
        """Put the MIME bundle in the panel's place, and let go of the widget."""
        try:
            # Only a display that is there can be updated.
            show = update_display if self._shown else display
            show(bundle, raw=True, display_id=self._display_id)  # type: ignore[no-untyped-call]
        finally:
            self.leave()

    def leave(self) -> None:
        """Let go of the widget."""
        if self._panel is not None:
            self._panel.close()
            self._panel = None

    def _send_text(
        self,
        text: Text,
        *,
        whole: bool = False,
        news: dict[str, Any] | None = None,
        most: int = MOST,
    ) -> None:
        """Send at most so much of what the browser has not got, or the whole."""
        nothing_new = not self._unsent and (
            text is self._text or not (len(text) or len(self._text))
        )
        if self._panel is None or (nothing_new and not whole):
            return
        whole = whole or not text.grew_from(self._text)
        more = str(text) if whole else self._unsent + text.since(len(self._text))
        if len(more) > MOST:
            whole, more = True, f"…{more[-MOST:]}"
            most = len(more)
        self._text = text
        more, self._unsent = more[:most], more[most:]
        self._seq += 1
        message = {"type": "text", "seq": self._seq, "text": more, "whole": whole}
        self._panel.send(message | ({"news": news} if news else {}))

    def _shows(self, state: PanelState) -> dict[str, Any]:
        return _picture(state, self._offers)

    def _view(self) -> dict[str, Any]:
        now, wall = self._clock.now(), self._clock.wall()
        return self._shows(self._state) | _moving(self._state, now, wall) | {"seq": self._seq}

    def _hear(self, _panel: object, content: object, _buffers: object) -> None:
        """Take a message from the browser, in whatever thread the kernel has for it."""
        match content:
            case {"type": "action", "name": str(name), "id": int(number)} if name in self._offers:
                self._on_action(name)
                self._answer({"type": "heard", "id": number})
            case {"type": "sync"}:
                self._answer({"type": "heard", "id": 0})
                with self._sending:
                    self._send_text(self._text, whole=True)
                    if self._panel is not None:
                        self._panel.view = self._view()

    def _answer(self, content: dict[str, Any]) -> None:
        panel = self._panel
        if panel is not None:
            panel.send(content)


def _picture(state: PanelState, offers: Collection[ActionName]) -> dict[str, Any]:
    """Return what the browser shows, apart from the text and from what time alone moves."""
    usage = state.usage
    about = "~" if usage.estimated else ""
    return {
        "id": state.id,
        "phase": state.phase,
        "ended": state.ended,
        "stale": state.stale,
        "model": _named(state),
        "cause": _cause(state),
        "attempt": state.attempt,
        "patience": f"{format_duration(state.patience).removesuffix(' 00 s')} patience",
        "tokens_in": "" if usage.input_tokens is None else f"{about}{usage.input_tokens:,}",
        "tokens_out": "" if usage.output_tokens is None else f"{about}{usage.output_tokens:,}",
        "speed": f"~{state.speed:.0f}" if state.speed else "",
        "cost": state.price,
        "thought": _latest(state.thought) if state.phase == "thinking" else "",
        "actions": [{"name": name, "refusal": refusal(state, name)} for name in offers],
    }


def _named(state: PanelState) -> str:
    model = shorten(state.model, 80) if state.model else ""
    return " · ".join(filter(None, (model, "simulated" if state.simulated else "")))


def _moving(state: PanelState, now: float, wall: float) -> dict[str, Any]:
    """Return what time moves, in ms as of this instant, the deadline in ms since the epoch."""
    left = state.left(now)
    ending = state.since if state.ended else now
    return {
        "line": status(state, now, wall),
        "elapsed_ms": round((ending - state.began) * 1000),
        "waited_ms": round(state.waited_by(now) * 1000),
        "waits": state.waits_from is not None,
        "remaining_ms": None if left is None else round(left * 1000),
        "deadline_ms": None if left is None else round((wall + left) * 1000),
        "total_ms": None if left is None else round((left + now - state.since) * 1000),
        "until": "" if left is None else format_time(wall + left, now=wall),
    }


def _cause(state: PanelState) -> dict[str, Any] | None:
    """Return why the request waits or ended; with the limit's numbers, where it is one."""
    if (limit := state.limit) is None:
        name, _, told = state.reason.partition(": ")
        return {"name": name, "figures": told} if name else None
    return {
        "name": limit.name,
        "resource": limit.resource,
        "figures": limit.figures,
        "limit": limit.limit,
        "used": limit.used,
        "requested": limit.requested,
    }


def _latest(thought: Text) -> str:
    """Return the end of a thought, cut at a word."""
    tail = " ".join(thought.since(max(0, len(thought) - THOUGHT)).split())
    return tail if len(tail) <= THOUGHT else "…" + tail[-THOUGHT:].partition(" ")[2]
