"""Those who wait for one bucket: the order in which they go, and what they are told.

Decides nothing about limits. One who is refused keeps its place; only the first is told a moment,
and the others are woken when it is their turn, so nobody wakes as a herd.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from nbcodex.models import Limit
from nbcodex.ratelimit.reservation import Cost, Reservation

WORTH = 1.0
"""Seconds that a bucket must be closed for before those far back in the row hear of it."""
LONG, END, LARGE = 8.0, 4.0, 0.05
"""In limits: a row that was `LONG` and has shrunk to its `END` is arranged anew, but for what is
`LARGE`."""
RECENT = 32
"""How many of the last sends an answer's end may still be on the way with."""


@dataclass(frozen=True, slots=True)
class Hold:
    """No leave to send yet: when to come back, and the limit that closes the bucket.

    `queued` means that it is nobody's fault: the limit is used fully, and others come first.
    `due_at` is when there is capacity, as it is reckoned now; None where nobody can say.
    `inherited` means that this process has not met the limit itself; `reckoned`, that nobody has
    met it lately: it is a limit over hours that is used up, as far as is known.
    """

    until: float
    limit: Limit | None = None
    queued: bool = False
    due_at: float | None = None
    inherited: bool = False
    reckoned: bool = False


@dataclass(slots=True)
class Ticket:
    """A place in the row of a bucket. One who is refused keeps it, and so comes first again."""

    bucket: str
    cost: Cost
    wake: Callable[[], None]
    place: int
    rank: float = 0.0
    waiting: bool = False


@dataclass(slots=True)
class Row:
    """Those who wait here for one bucket, and what is under way.

    `promised`: the server has said when it lets one in, which goes then, whatever is reckoned.
    `probes`: how many under way go through a hold.
    """

    heap: list[tuple[float, int, Ticket]] = field(default_factory=list)
    asked: float = 0.0
    longest: float = 0.0
    rank: float = 0.0
    hold: Hold | None = None
    under_way: int = 0
    promised: bool = False
    probes: int = 0
    met_until: float = -math.inf
    recent: deque[Reservation] = field(default_factory=lambda: deque(maxlen=RECENT))

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(ticket.waiting for *_, ticket in self.heap)

    def head(self) -> Ticket | None:
        """Return the first of those who wait."""
        while self.heap and not self.heap[0][-1].waiting:
            heapq.heappop(self.heap)
        return self.heap[0][-1] if self.heap else None

    def enter(self, ticket: Ticket) -> None:
        """Let one wait in its place."""
        if not ticket.waiting:
            ticket.waiting = True
            self.asked += ticket.cost.tokens + ticket.cost.output
            self.longest = max(self.longest, self.asked)
            heapq.heappush(self.heap, (ticket.rank, ticket.place, ticket))

    def leave(self, ticket: Ticket) -> None:
        """Let one wait no longer."""
        if ticket.waiting:
            ticket.waiting = False
            self.asked -= ticket.cost.tokens + ticket.cost.output

    def ends(self, limit: float) -> bool:
        """Return whether this is the end of a long job, not yet arranged."""
        return self.longest > LONG * limit and self.asked < END * limit

    def arrange(self, limit: float) -> None:
        """Let the end of a long job go by size, the smallest first.

        Where the server refunds: fewer answers are then under way at the very end, when nobody is
        left to use what they give back. Nobody is passed by more than `END`, after having waited
        for as much: at most, a wait is doubled. What is large keeps its place, and who comes later
        goes last.
        """
        self.longest, self.rank = 0.0, math.inf
        for *_, ticket in self.heap:
            large = ticket.cost.tokens + ticket.cost.output > LARGE * limit
            ticket.rank = 0.0 if large else ticket.cost.tokens
        self.heap = sorted((t.rank, t.place, t) for *_, t in self.heap if t.waiting)

    def wake(self) -> None:
        """Let the first look again."""
        if head := self.head():
            head.wake()

    def close(self, hold: Hold, now: float) -> None:
        """Let everybody know who waits, if it is for long enough to be worth a word."""
        longer = hold.until > max(now + WORTH, self.hold.until if self.hold else now)
        news = longer or (self.hold is not None and self.hold.inherited)
        self.hold = hold
        if news:
            for *_, ticket in self.heap:
                if ticket.waiting:
                    ticket.wake()

    def open(self) -> None:
        """Let everybody look again who was told of a hold."""
        if self.hold is not None:
            self.hold = None
            for *_, ticket in self.heap:
                if ticket.waiting:
                    ticket.wake()
