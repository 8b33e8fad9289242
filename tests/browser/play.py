"""Play the events of a request on a panel, in real time, and block the cell as the magic does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from nbcodex.errors import LimitError
from nbcodex.events import BackingOff, CoolingDown, Delta, Event, Queued, Sent
from nbcodex.models import Limit, Reply, Usage
from nbcodex.notebook.display.panel import PanelState, apply_event
from nbcodex.notebook.display.widget_views import WidgetView
from nbcodex.rendering.figures import figures_line
from nbcodex.runtime.clock import BootClock

LIMIT = Limit(
    resource="tokens", window=60.0, limit=30_000, used=22_999, requested=12_528, model="gpt-5.6-sol"
)
REPLY = Reply(
    id="3f2a",
    model="gpt-5.6-sol",
    usage=Usage(input_tokens=812, cached_tokens=512, output_tokens=431),
    cost=0.0052,
    attempts=2,
    waited=7.4,
    seconds=11.3,
)
Step = tuple[float, Callable[[float], Event]]


def queued() -> Step:
    """The request exists."""
    return 0.0, lambda at: Queued(request_id="3f2a", at=at, model="gpt-5.6-sol", patience=600.0)


def sent(attempt: int = 1, after: float = 0.0) -> Step:
    """An attempt begins."""
    return after, lambda at: Sent(
        request_id="3f2a", at=at, attempt=attempt, model="gpt-5.6-sol", input_tokens=812
    )


def refused(seconds: float, after: float = 0.1) -> Step:
    """The limit refuses an attempt, for so many seconds."""
    error = LimitError("Too many tokens.", limit=LIMIT)
    return after, lambda at: BackingOff(
        request_id="3f2a", at=at, error=error, attempt=1, resume_at=at + seconds, waited=0.0
    )


def cooldown(seconds: float, after: float = 0.1) -> Step:
    """Another request has met the limit, for so many seconds."""
    return after, lambda at: CoolingDown(
        request_id="3f2a", at=at, limit=LIMIT, resume_at=at + seconds, waited=0.0
    )


def delta(text: str, after: float = 0.0, *, reasoning: bool = False) -> Step:
    """More of the answer."""
    return after, lambda at: Delta(request_id="3f2a", at=at, text=text, reasoning=reasoning)


def play(steps: Iterable[Step]) -> list[str]:
    """Play `steps` and block; return the names of the buttons that were pressed."""
    clock, pressed, cancelled = BootClock(), [], threading.Event()

    def act(name: str) -> None:
        pressed.append(name)
        if name == "cancel":
            cancelled.set()

    view, state = WidgetView(act, clock), PanelState()
    opened, updated_at = False, 0.0
    for after, make in steps:
        end = time.monotonic() + after
        while time.monotonic() < end and not cancelled.is_set():
            time.sleep(0.02)
            if opened and time.monotonic() > updated_at + (view.render_interval_s or 0.0):
                updated_at = time.monotonic()
                view.render(state)
        if cancelled.is_set():
            break
        state = apply_event(state, make(clock.now()))
        (view.render if opened else view.open)(state)
        opened, updated_at = True, time.monotonic()
    text = str(state.text)
    reply = Reply(id="3f2a", text=text, status="cancelled") if cancelled.is_set() else REPLY
    view.close({"text/markdown": f"{text}\n\n<sub>{figures_line(reply)}</sub>", "text/plain": text})
    return pressed
