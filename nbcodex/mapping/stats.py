"""The figures of a map, counted as its rows' events come, on the loop's thread.

A delta costs it one look. Whoever reads it in another thread sees each figure as it was a moment
ago. Must not know displays.
"""

from __future__ import annotations

from nbcodex.events import (
    BackingOff,
    Cancelled,
    CoolingDown,
    Delta,
    Ending,
    Event,
    Failed,
    Finished,
    Interrupted,
    Parked,
    Sent,
)
from nbcodex.models import Limit, Reply, UsageTotals


class StatsCounter:
    """A listener that counts.

    Attributes
    ----------
    ended : int
        Rows whose last event has come.
    """

    def __init__(self) -> None:
        self.ended = self.done = self.reused = self.failed = self.parked = self.cancelled = 0
        self.totals = UsageTotals()
        self.model: str | None = None
        self.simulated = False
        self.closed_until: float | None = None
        self.limit: Limit | None = None
        self._sent: set[str] = set()

    def take_up(self) -> None:
        """Begin again with what had no answer."""
        self.failed = self.parked = self.cancelled = 0

    def know(self) -> None:
        """Count a row whose answer is known from before."""
        self.done += 1
        self.reused += 1

    @property
    def sent(self) -> int:
        """Rows at the server."""
        return len(self._sent)

    def __call__(self, event: Event) -> None:
        """Hear an event of one of the map's rows."""
        match event:
            case Delta():
                pass
            case Sent():
                self._sent.add(event.request_id)
                self.model = event.model or self.model
            case BackingOff() | CoolingDown():
                self._sent.discard(event.request_id)
                if event.limit is not None:
                    self.closed_until, self.limit = event.resume_at, event.limit
            case Finished() | Parked() | Interrupted() | Cancelled() | Failed():
                self._sent.discard(event.request_id)
                self.ended += 1
                self._count(event)

    def _count(self, event: Ending) -> None:
        reply = event.reply
        match event:
            case Finished():
                self.done += 1
                self.reused += reply.reused
            case Parked():
                self.parked += 1
            case Cancelled():
                self.cancelled += 1
            case _:
                self.failed += 1
        self.charge(reply)

    def charge(self, reply: Reply) -> None:
        """Add what a row has used."""
        self.totals = self.totals.plus(UsageTotals.of(reply))
        self.model, self.simulated = reply.model or self.model, self.simulated or reply.simulated
