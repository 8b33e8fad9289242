"""`nbcodex.monitor()`: one per process, shown wherever it is asked for; all views agree.

Owns when the widget is told something, and what its buttons do. Everything that it shows is decided
in `monitor` and `overview`. The widget is made when it is first to be shown where widgets are.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from IPython.core.getipython import get_ipython

from nbcodex import host
from nbcodex.client import current
from nbcodex.mapping.map_runner import OUTCOME_BY_ACTION, active_runners
from nbcodex.notebook.display import cell_output
from nbcodex.notebook.display.panel import ACTIONS
from nbcodex.notebook.monitor.collector import LOOK, watch_of
from nbcodex.notebook.monitor.view import picture, status

if TYPE_CHECKING:
    from nbcodex.client import Client
    from nbcodex.notebook.widget_base import Board
    from nbcodex.requests.handle import Handle

PACE = 0.5
"""Seconds between two messages to the browser, where everything that ticks does so by itself."""

ALL = "all"
"""In place of a request's id: every one that is open here."""

log = logging.getLogger(__name__)


class Monitor:
    """All requests of this process, live: as a widget, and in lines of text elsewhere."""

    def __init__(self, client: Client) -> None:
        self._client, self._watch = client, watch_of(client)
        self._board: Board | None = None
        self._sent: dict[str, Any] = {}
        self._making = threading.Lock()

    def __str__(self) -> str:
        clock = self._client.clock
        return status(self._watch.look(host.current.settings()), clock.now(), clock.wall())

    __repr__ = __str__

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        text = {"text/plain": str(self)}
        if not cell_output.shows_widgets(get_ipython(), host.current.settings().display):
            return text
        data, metadata = self._shown()._repr_mimebundle_(**kwargs) or ({}, {})
        return data | text, metadata

    def _shown(self) -> Board:
        """Return the widget, which is kept up to date from now on."""
        with self._making:
            if self._board is None or self._board.comm is None:
                from nbcodex.notebook.widget_base import Board

                self._board = board = Board(view=self._view())
                board.hear_while_blocked()
                board.on_msg(self._hear)
                keeper = threading.Thread(
                    target=self._keep_up, args=(board,), name="codex-monitor", daemon=True
                )
                keeper.start()
            return self._board

    def _view(self) -> dict[str, Any]:
        state, clock = self._watch.look(host.current.settings()), self._client.clock
        now, wall = clock.now(), clock.wall()
        self._sent = picture(state, now, wall)
        return self._sent | {"now": round(now * 1000), "wall": round(wall * 1000)}

    def _keep_up(self, board: Board) -> None:
        """Send what has changed, as long as the widget lives."""
        while board.comm is not None and current() is self._client:
            self._watch.changed.wait(LOOK)
            self._watch.changed.clear()
            try:
                self._send_news(board)
            except Exception:
                log.exception("the monitor failed")
            time.sleep(PACE)

    def _send_news(self, board: Board) -> None:
        before = self._sent
        view = self._view()
        if self._sent != before:
            board.view = view

    def _hear(self, board: Board, content: object, _buffers: object) -> None:
        """Take a message from the browser, in whatever thread the kernel has for it."""
        match content:
            case {"type": "action", "name": str(name), "request": str(id_), "id": int(number)}:
                if id_ == ALL and name in OUTCOME_BY_ACTION:
                    # A map ends before its rows do; otherwise it would start the next ones.
                    for runner in active_runners():
                        runner.end(name)
                for handle in self._meant(name, id_):
                    _deeds(handle)[name]()
                board.send({"type": "heard", "id": number})
            case {"type": "sync"}:
                board.send({"type": "heard", "id": 0})
                board.view = self._view()

    def _meant(self, name: str, id_: str) -> list[Handle]:
        """Return whom a click is about; probes of all at once would only meet the limit again."""
        if name not in ACTIONS or (id_ == ALL and name == "retry"):
            return []
        return [h for h in self._client.active_handles() if id_ in (h.request.id, ALL)]


def _deeds(handle: Handle) -> dict[str, Any]:
    return {
        "cancel": handle.cancel,
        "retry": handle.retry_now,
        "park": handle.park,
    }


_monitor: Monitor | None = None


def monitor() -> Monitor:
    """Return this process's monitor: gauges, totals, open requests with their buttons, retries.

    In a notebook that shows widgets it is a live widget, elsewhere lines of text.
    """
    global _monitor
    if _monitor is None or _monitor._client is not current():
        _monitor = Monitor(current())
    return _monitor
