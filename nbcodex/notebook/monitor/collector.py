"""The ears and eyes of the monitor: hears every event, and looks up what no event tells.

Owns the state of `monitor` and when it is brought up to date. Knows no widget.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from nbcodex import events
from nbcodex.models import LimitSnapshot
from nbcodex.notebook.monitor.state import (
    Grown,
    Limits,
    Line,
    Lines,
    MonitorState,
    Observed,
    reduce,
)
from nbcodex.ratelimit.rate_limiter import Cooldown
from nbcodex.runtime import event_loop

if TYPE_CHECKING:
    from nbcodex.client import Client
    from nbcodex.ratelimit.sharing import LimitState
    from nbcodex.settings import Settings

LOOK = 5.0
"""Seconds between two looks at the journal, where other kernels are seen."""

Heard = events.Event | Observed
MANY = 4096
"""Events after which the state is brought up to date, even if nobody looks."""


class Watch:
    """A client's listener, from its first request on: it costs a dictionary look-up per delta.

    Parameters
    ----------
    client : Client
        Whose requests it hears of.
    """

    def __init__(self, client: Client) -> None:
        self.changed = threading.Event()
        self._client = client
        self._state = MonitorState()
        self._heard: list[Heard] = []
        self._sizes: dict[tuple[str, bool, bool], int] = {}
        self._looked_at = float("-inf")

    def __call__(self, event: events.Event) -> None:
        """Hear an event, on the loop's thread."""
        if isinstance(event, events.Delta):
            key = (event.request_id, event.reasoning, event.simulated)
            self._sizes[key] = self._sizes.get(key, 0) + len(event.text.encode(errors="replace"))
        else:
            self._heard += self._grown(event.at)
            self._heard.append(event)
        if len(self._heard) > MANY:
            self._catch_up()
        if not self.changed.is_set():
            self.changed.set()

    def look(self, settings: Settings) -> MonitorState:
        """Return the state as it is now; called in any thread; it waits for the loop's.

        The journal is asked every `LOOK` seconds at most, in the calling thread.
        """
        seen, here = self._seen(settings), event_loop.shared()
        if here.is_current_thread:
            return self._looked(seen)
        return here.submit(self._on_loop(seen, settings)).result()

    async def _on_loop(self, seen: Observed, settings: Settings) -> MonitorState:
        known = await self._client.limits(settings)
        budgets = tuple(map(str, await self._client.cap_usages(settings)))
        now = self._client.clock.now()
        return self._looked(
            replace(seen, limits=_limits(known, now), lines=_lines(known), budgets=budgets)
        )

    def _looked(self, seen: Observed) -> MonitorState:
        client, now = self._client, self._client.clock.now()
        here = replace(seen, at=now, session=client.totals.total)
        self._heard += [*self._grown(now), here]
        self._catch_up()
        return self._state

    def _catch_up(self) -> None:
        heard, self._heard = self._heard, []
        self._state = reduce(self._state, heard)

    def _grown(self, at: float) -> list[Heard]:
        sizes, self._sizes = self._sizes, {}
        return [
            Grown(request_id=id_, at=at, size=size, reasoning=reasoning, simulated=simulated)
            for (id_, reasoning, simulated), size in sizes.items()
        ]

    def _seen(self, settings: Settings) -> Observed:
        now = self._client.clock.now()
        if time.monotonic() - self._looked_at < LOOK:
            return Observed(at=now)
        self._looked_at = time.monotonic()
        journal = self._client.journal(settings)
        return Observed(at=now, ever=journal.read_totals(), elsewhere=journal.other_kernels())


def watch_of(client: Client) -> Watch:
    """Return the client's watch; it hears what is asked from the first call on."""
    for listener in client.listeners:
        if isinstance(listener, Watch):
            return listener
    watch = Watch(client)
    client.listeners.append(watch)
    return watch


def _limits(known: Mapping[str, LimitState], now: float) -> Limits:
    """Return what is known of the limits as it stands at an instant."""
    found: dict[str, tuple[LimitSnapshot | None, Cooldown | None]] = {}
    for label, each in known.items():
        snapshot = LimitSnapshot(at=now, tokens=each.tokens, requests=each.requests)
        hold = None if each.closed_until is None else Cooldown(each.closed_until, each.limit)
        found[_name(label)] = snapshot, hold
    return found


def _lines(known: Mapping[str, LimitState]) -> Lines:
    """Return who waits for the buckets."""
    return {
        _name(label): Line(
            waiting=each.waiting,
            asked=each.waiting_tokens,
            kept=each.policy == "kept" and each.declared,
        )
        for label, each in known.items()
    }


def _name(label: str) -> str:
    model, _, server = label.rpartition(" at ")
    return f"{server} {model}"
