"""`nbcodex.monitor()`: all requests of this process, shown as a widget or as lines of text."""

from __future__ import annotations

import functools
import logging
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from IPython.core.getipython import get_ipython

from nbcodex import events, host
from nbcodex.client import Client, get_client
from nbcodex.notebook import display
from nbcodex.notebook.display.panel import ACTIONS
from nbcodex.notebook.monitor.state import MonitorState, apply_events
from nbcodex.notebook.monitor.view import monitor_data, monitor_text
from nbcodex.runtime import event_loop
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from nbcodex.notebook.widget_base import CodexWidget

# Between two reads of other kernels' requests and of all time's totals, which take milliseconds.
JOURNAL_INTERVAL_S = 5.0
# With more pending events than this, they are applied though no monitor asks for the state: those
# of a long map or answer would otherwise fill the memory.
MAX_PENDING_EVENTS = 4096
# Countdowns and gauges move in the page by themselves, so updates need not be frequent.
MIN_UPDATE_INTERVAL_S = 0.5
ALL_REQUESTS = "all"  # what the page sends instead of an id, for all open requests of this kernel

log = logging.getLogger(__name__)


class MonitorCollector:
    """Listens to all events of a client, from its first request on."""

    def __init__(self, client: Client) -> None:
        self.changed = threading.Event()  # set by each event; `Monitor` clears it
        self._client = client
        self._state = MonitorState()
        self._pending: list[events.Event] = []
        self._unapplied_count = 0  # of the events since `_pending` was last applied
        # The deltas since the last event, by (request id, reasoning, simulated). All of a list are
        # joined to one when the state is asked for.
        self._deltas: dict[tuple[str, bool, bool], list[events.Delta]] = {}
        self._journal_read_at = float("-inf")

    def __call__(self, event: events.Event) -> None:
        """Receive an event, on the thread of the event loop."""
        if isinstance(event, events.Delta):
            key = (event.request_id, event.reasoning, event.simulated)
            self._deltas.setdefault(key, []).append(event)
        else:
            # The text that came before this event has to be applied before it.
            self._join_deltas(event.at)
            self._pending.append(event)
        self._unapplied_count += 1
        if self._unapplied_count > MAX_PENDING_EVENTS:
            self._apply_pending(event.at)
        # Setting an event takes a lock, and a stream has hundreds of deltas a second.
        if not self.changed.is_set():
            self.changed.set()

    def state(self, settings: Settings) -> MonitorState:
        """Return the present state. Can be called in any thread; it waits for the event loop."""
        fields: dict[str, Any] = {}  # of `MonitorState`
        if time.monotonic() - self._journal_read_at >= JOURNAL_INTERVAL_S:
            self._journal_read_at = time.monotonic()
            journal = self._client.journal(settings)
            fields["all_time"] = journal.read_totals()
            fields["other_kernels"] = journal.other_kernels()
        if event_loop.shared().is_current_thread:
            # The limits have to be awaited, and the loop's own thread must not block for them.
            return self._update(fields)
        return event_loop.run(self._read_limits(settings, fields))

    async def _read_limits(self, settings: Settings, fields: dict[str, Any]) -> MonitorState:
        limits = await self._client.limits(settings)
        budgets = tuple(await self._client.budget_usage(settings))
        limits_at = self._client.clock.now()
        return self._update(fields | {"limits": limits, "limits_at": limits_at, "budgets": budgets})

    def _update(self, fields: dict[str, Any]) -> MonitorState:
        self._apply_pending(self._client.clock.now())
        self._state = replace(self._state, session=self._client.totals.total, **fields)
        return self._state

    def _apply_pending(self, at: float) -> None:
        self._join_deltas(at)
        pending, self._pending, self._unapplied_count = self._pending, [], 0
        self._state = apply_events(self._state, pending)

    def _join_deltas(self, at: float) -> None:
        deltas, self._deltas = self._deltas, {}
        for parts in deltas.values():
            text = "".join(each.text for each in parts)
            self._pending.append(replace(parts[0], at=at, text=text))


def collector_of(client: Client) -> MonitorCollector:
    """Return the client's collector; the first call makes it listen."""
    for listener in client.listeners:
        if isinstance(listener, MonitorCollector):
            return listener
    collector = MonitorCollector(client)
    client.listeners.append(collector)
    return collector


class Monitor:
    """All requests of this process, live: as a widget, or as lines of text."""

    def __init__(self, client: Client) -> None:
        self.client, self._collector = client, collector_of(client)
        self._widget: CodexWidget | None = None
        self._creation_lock = threading.Lock()

    def __str__(self) -> str:
        clock = self.client.clock
        state = self._collector.state(host.current.settings())
        return monitor_text(state, clock.now(), clock.wall())

    __repr__ = __str__

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        text = {"text/plain": str(self)}
        if not display.can_show_widgets(get_ipython(), host.current.settings().display):
            return text
        data, metadata = self._live_widget()._repr_mimebundle_(**kwargs) or ({}, {})
        return data | text, metadata

    def _live_widget(self) -> CodexWidget:
        """Return the one widget of this process, so that the monitor is the same in all outputs."""
        with self._creation_lock:
            if self._widget is None or self._widget.comm is None:
                from nbcodex.notebook.widget_base import CodexWidget

                self._widget = CodexWidget("monitor", self._current_data(), self._act, self._sync)
                threading.Thread(
                    target=self._refresh, args=(self._widget,), name="codex-monitor", daemon=True
                ).start()
            return self._widget

    def _current_data(self) -> dict[str, Any]:
        state, clock = self._collector.state(host.current.settings()), self.client.clock
        now, wall = clock.now(), clock.wall()
        clocks = {"now": round(now * 1000), "wall": round(wall * 1000)}
        return monitor_data(state, now, wall) | clocks

    def _refresh(self, widget: CodexWidget) -> None:
        while widget.comm is not None and get_client() is self.client:
            # Without events, other kernels are still looked up in the journal.
            self._collector.changed.wait(JOURNAL_INTERVAL_S)
            self._collector.changed.clear()
            try:
                self._send_changes(widget)
            except Exception:
                log.exception("the monitor could not be updated")
            time.sleep(MIN_UPDATE_INTERVAL_S)

    def _send_changes(self, widget: CodexWidget) -> None:
        data = self._current_data()
        # The clocks always differ, and are no reason to send it.
        if data != widget.data | {name: data[name] for name in ("now", "wall")}:
            widget.data = data

    def _sync(self) -> None:
        """Send what is shown to a page that has just loaded the widget."""
        if self._widget is not None:
            self._widget.data = self._current_data()

    def _act(self, action: str, id_: str) -> None:
        """Do what a button asks for, for the request with this id, or for ALL_REQUESTS."""
        if action not in ACTIONS:
            return
        # Imported here: at the top, this would delay the first prompt, which needs no maps.
        from nbcodex.mapping.map_runner import active_runners

        if id_ == ALL_REQUESTS:
            if action == "retry":
                return  # all requests sent at once would only reach the limit again
            # A map ends before its rows do; otherwise it would start the next ones.
            for runner in active_runners():
                runner.end(action)
        for handle in self.client.active_handles():
            if id_ in {ALL_REQUESTS, handle.request.id}:
                handle.retry_now() if action == "retry" else handle.end(action)


# A fork and `%reload_ext` create another client.
_monitor_of = functools.lru_cache(maxsize=1)(Monitor)


def monitor() -> Monitor:
    """Return the live view of this process: limits, totals, open requests, retries."""
    return _monitor_of(get_client())
