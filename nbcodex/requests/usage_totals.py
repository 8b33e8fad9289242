"""Running totals of a session: what was asked, paid and waited for. A listener of events."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from nbcodex.events import BackingOff, Ending, Event, Finished
from nbcodex.models import Reply


@dataclass(slots=True)
class Total:
    """Sums for one model. Unknown figures are counted in `unknown`, never taken for zero.

    Those that are estimates are counted in `estimated`.
    """

    requests: int = 0
    finished: int = 0
    attempts: int = 0
    limits: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    unknown: int = 0
    cost: float = 0.0
    unpriced: int = 0
    waited: float = 0.0
    estimated: int = 0

    def add(self, reply: Reply) -> None:
        """Add what one request came to."""
        usage = reply.usage
        self.requests += 1
        self.finished += bool(reply)
        self.attempts += reply.attempts
        self.waited += reply.waited
        self.input_tokens += usage.input_tokens or 0
        self.cached_tokens += usage.cached_tokens or 0
        self.output_tokens += usage.output_tokens or 0
        self.reasoning_tokens += usage.reasoning_tokens or 0
        self.unknown += usage.total_tokens is None
        self.cost += reply.cost or 0.0
        self.unpriced += reply.cost is None and not reply.simulated and usage.total_tokens != 0
        self.estimated += usage.estimated


class Totals:
    """The totals of this session by model, and the last reply."""

    def __init__(self) -> None:
        self.by_model: dict[str, Total] = defaultdict(Total)
        self.last: Reply | None = None
        self._limits: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        if isinstance(event, BackingOff) and event.limit is not None:
            self._limits[event.request_id] = self._limits.get(event.request_id, 0) + 1
        elif isinstance(event, Ending) and event.reply.attempts:
            total = self.by_model[event.reply.model or "unknown"]
            total.add(event.reply)
            total.limits += self._limits.pop(event.request_id, 0)
            if isinstance(event, Finished):
                self.last = event.reply
