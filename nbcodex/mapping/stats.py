"""Sums over the rows of one map, kept up to date as the events of its rows arrive.

Owns what each event adds. The listener runs on the event loop's thread; the thread that executes
the map reads `stats`. Must not know displays.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nbcodex.events import (
    BackingOff,
    Cancelled,
    CoolingDown,
    Ending,
    Event,
    Failed,
    Finished,
    Interrupted,
    Parked,
    Sent,
)
from nbcodex.models import MapStats, UsageTotals


class StatsCounter:
    """An event listener that counts.

    Attributes
    ----------
    stats : MapStats
        The sums so far. Replaced as a whole by each event, so that another thread never reads a
        mixture of two states.
    cancelled : int
        Rows that were cancelled: failures, unless the whole map was cancelled.
    """

    def __init__(self, map_id: str) -> None:
        self.stats = MapStats(map_id=map_id, at=0.0)
        self.cancelled = 0
        self._sent: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Count an event of one of the map's rows."""
        match event:
            case Sent():
                self._sent.add(event.request_id)
                self._update(sent=len(self._sent), model=event.model or self.stats.model)
            case BackingOff() | CoolingDown():
                self._sent.discard(event.request_id)
                self._update(sent=len(self._sent))
                if event.limit is not None:
                    self._update(closed_until=event.resume_at, limit=event.limit)
            case Finished() | Parked() | Interrupted() | Cancelled() | Failed():
                self._sent.discard(event.request_id)
                self._count_ending(event)

    def _count_ending(self, event: Ending) -> None:
        stats, reply = self.stats, event.reply
        match event:
            case Finished():
                counts = {"done": stats.done + 1, "reused": stats.reused + reply.reused}
            case Parked():
                counts = {"parked": stats.parked + 1}
            case Cancelled():
                counts = {}
                self.cancelled += 1
            case _:
                counts = {"failed": stats.failed + 1}
        self._update(
            sent=len(self._sent),
            totals=stats.totals.plus(UsageTotals.of(reply)),
            model=reply.model or stats.model,
            simulated=stats.simulated or reply.simulated,
            **counts,
        )

    def count_known(self) -> None:
        """Count a row whose answer is known from an earlier execution."""
        self._update(done=self.stats.done + 1, reused=self.stats.reused + 1)

    def reset_unanswered(self) -> None:
        """Start over with the rows that have no answer: the map is resumed."""
        self.cancelled = 0
        self._update(failed=0, parked=0)

    def _update(self, **changes: Any) -> None:
        self.stats = replace(self.stats, **changes)
