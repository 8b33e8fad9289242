"""Collects what the monitor shows: a listener of all events, and what it looks up besides.

Owns the state of the monitor and when it is brought up to date. Must not know widgets.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nbcodex import events
from nbcodex.notebook.monitor.state import MonitorState, TextGrew, apply_events
from nbcodex.runtime import event_loop

if TYPE_CHECKING:
    from nbcodex.client import Client
    from nbcodex.settings import Settings

# The journal shows other kernels and the totals of all time; a look takes milliseconds.
JOURNAL_INTERVAL_S = 5.0

# With this many pending events the state is brought up to date without being asked for: a map
# without a monitor would otherwise fill the memory.
MAX_PENDING_EVENTS = 4096


class MonitorCollector:
    """Listens to all events of a client, from its first request on.

    A delta costs a dictionary look-up: only sizes are added up until the state is asked for.
    """

    def __init__(self, client: Client) -> None:
        self.changed = threading.Event()
        self._client = client
        self._state = MonitorState()
        self._pending: list[events.Event] = []
        # Bytes of the deltas since the last event, by request id, reasoning and simulated.
        self._sizes: dict[tuple[str, bool, bool], int] = {}
        self._journal_read_at = float("-inf")

    def __call__(self, event: events.Event) -> None:
        """Receive an event, on the thread of the event loop."""
        if isinstance(event, events.Delta):
            key = (event.request_id, event.reasoning, event.simulated)
            self._sizes[key] = self._sizes.get(key, 0) + len(event.text.encode(errors="replace"))
        else:
            # The text before this event has to be counted before it.
            self._add_growth(event.at)
            self._pending.append(event)
        if len(self._pending) > MAX_PENDING_EVENTS:
            self._apply_pending()
        # Setting an event takes a lock, and a stream has hundreds of deltas a second.
        if not self.changed.is_set():
            self.changed.set()

    def state(self, settings: Settings) -> MonitorState:
        """Return the present state. Can be called in any thread; it waits for the event loop.

        The journal is read in the calling thread, at most every `JOURNAL_INTERVAL_S` seconds.
        """
        found: dict[str, Any] = {}
        if time.monotonic() - self._journal_read_at >= JOURNAL_INTERVAL_S:
            self._journal_read_at = time.monotonic()
            journal = self._client.journal(settings)
            found["all_time"] = journal.read_totals()
            found["other_kernels"] = journal.other_kernels()
        if event_loop.shared().is_current_thread:
            # The limiter would have to be awaited, which the loop cannot do for itself.
            return self._update(found)
        return event_loop.run(self._look_up(settings, found))

    async def _look_up(self, settings: Settings, found: dict[str, Any]) -> MonitorState:
        limits = await self._client.limits(settings)
        budgets = tuple(await self._client.budget_usage(settings))
        limits_at = self._client.clock.now()
        return self._update(found | {"limits": limits, "limits_at": limits_at, "budgets": budgets})

    def _update(self, found: dict[str, Any]) -> MonitorState:
        self._add_growth(self._client.clock.now())
        self._apply_pending()
        self._state = replace(self._state, session=self._client.totals.total, **found)
        return self._state

    def _apply_pending(self) -> None:
        pending, self._pending = self._pending, []
        self._state = apply_events(self._state, pending)

    def _add_growth(self, at: float) -> None:
        sizes, self._sizes = self._sizes, {}
        self._pending += [
            TextGrew(request_id=id_, at=at, size=size, reasoning=reasoning, simulated=simulated)
            for (id_, reasoning, simulated), size in sizes.items()
        ]


def collector_of(client: Client) -> MonitorCollector:
    """Return the client's collector; the first call makes it listen."""
    for listener in client.listeners:
        if isinstance(listener, MonitorCollector):
            return listener
    collector = MonitorCollector(client)
    client.listeners.append(collector)
    return collector
