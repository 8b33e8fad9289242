"""Those who wait for one bucket: the order in which they go, and what they are told.

Decides nothing about limits. One who is refused keeps its place; only the first is told a moment,
and the others are woken when it is their turn, so nobody wakes as a herd.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from nbcodex.errors import TooLargeError
from nbcodex.models import Limit, LimitSnapshot, Usage
from nbcodex.ratelimit.charge_policy import Cost, Permit
from nbcodex.ratelimit.schedule import after_gap, never, used_up
from nbcodex.ratelimit.sharing import (
    LimitHistory,
    LimitState,
    SharedModel,
    limit_state,
    model_from_history,
)
from nbcodex.ratelimit.stores import MemoryStore, Store

WORTH = 1.0
"""Seconds that a bucket must be closed for before those far back in the row hear of it."""
LONG, END, LARGE = 8.0, 4.0, 0.05
"""In limits: a row that was `LONG` and has shrunk to its `END` is arranged anew, but for what is
`LARGE`."""
RECENT = 32
"""How many of the last sends an answer's end may still be on the way with."""


@dataclass(frozen=True, slots=True)
class Wait:
    """No permit yet, as the limit is used fully and others come first: ask again at `until`.

    `due_at` is when there is capacity, as it is reckoned now; None where that is unknown.
    """

    until: float
    due_at: float | None = None


@dataclass(frozen=True, slots=True)
class Cooldown:
    """The model is closed until an instant, because of a limit.

    `inherited` means that this process has not met the limit itself; `inferred`, that no process
    has met it lately: a limit over hours is used up, by what is known of it.
    """

    until: float
    limit: Limit | None = None
    inherited: bool = False
    inferred: bool = False


@dataclass(slots=True)
class QueueEntry:
    """A place in the row of a bucket. One who is refused keeps it, and so comes first again."""

    bucket: str
    cost: Cost
    wake: Callable[[], None]
    place: int
    rank: float = 0.0
    waiting: bool = False


@dataclass(slots=True)
class WaitQueue:
    """Those who wait here for one bucket, and what is under way.

    `promised`: the server has said when it lets one in, which goes then, whatever is reckoned.
    `probes`: how many under way go through a hold.
    """

    heap: list[tuple[float, int, QueueEntry]] = field(default_factory=list)
    asked: float = 0.0
    longest: float = 0.0
    rank: float = 0.0
    hold: Cooldown | None = None
    under_way: int = 0
    promised: bool = False
    probes: int = 0
    met_until: float = -math.inf
    recent: deque[Permit] = field(default_factory=lambda: deque(maxlen=RECENT))

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(ticket.waiting for *_, ticket in self.heap)

    def head(self) -> QueueEntry | None:
        """Return the first of those who wait."""
        while self.heap and not self.heap[0][-1].waiting:
            heapq.heappop(self.heap)
        return self.heap[0][-1] if self.heap else None

    def enter(self, ticket: QueueEntry) -> None:
        """Let one wait in its place."""
        if not ticket.waiting:
            ticket.waiting = True
            self.asked += ticket.cost.tokens + ticket.cost.output
            self.longest = max(self.longest, self.asked)
            heapq.heappush(self.heap, (ticket.rank, ticket.place, ticket))

    def leave(self, ticket: QueueEntry) -> None:
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

    def close(self, hold: Cooldown, now: float) -> None:
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


T = TypeVar("T")

FAR = 60.0
"""Seconds after which one who waits behind others looks again, though it is woken before."""


class RateLimiter:
    """Who may send, and when: one row and one observed bucket for each model and account.

    Parameters
    ----------
    store : Store or None
        Where the buckets are kept; None: in memory.
    holder : str
        Names this process among those that share the store.
    """

    def __init__(self, store: Store | None = None, *, holder: str = "") -> None:
        self._store = store or MemoryStore()
        self._holder = holder
        self._rows: dict[str, WaitQueue] = {}
        self._places = itertools.count()

    @property
    def salt(self) -> bytes:
        """What makes the buckets' names, the same for all who share the store."""
        return self._store.salt

    def _row(self, name: str) -> WaitQueue:
        return self._rows.setdefault(name, WaitQueue())

    def enqueue(self, name: str, cost: Cost, wake: Callable[[], None]) -> QueueEntry:
        """Take a place in the row; `wake` is called when it is worth asking."""
        row = self._row(name)
        if row.head() is None:
            row.rank = row.longest = 0.0
        ticket = QueueEntry(name, cost, wake, next(self._places), row.rank)
        row.enter(ticket)
        return ticket

    def requeue(self, ticket: QueueEntry) -> None:
        """Take the old place in the row once more."""
        self._row(ticket.bucket).enter(ticket)

    def dequeue(self, ticket: QueueEntry) -> None:
        """Give the place up."""
        row = self._row(ticket.bucket)
        first = row.head() is ticket
        row.leave(ticket)
        if first:
            row.wake()

    def try_acquire(
        self, ticket: QueueEntry, now: float, *, may_probe: bool = False
    ) -> Permit | Wait | Cooldown:
        """Return leave to send now, or when to come back.

        Who is `may_probe` wants to know whether a hold that others have met is over: while another
        one finds out, it waits.

        Raises
        ------
        TooLargeError
            If the request is larger than the limit and can never be sent.
        """
        row = self._row(ticket.bucket)
        if row.head() is not ticket:
            hold = row.hold if row.hold is not None and row.hold.until > now else None
            if hold is None or (may_probe and hold.inherited):
                return Wait(now + FAR)
            return hold
        answer = self._store.transaction(
            ticket.bucket, lambda s: self._reserve(s, row, ticket, now)
        )
        if isinstance(answer, Permit):
            if row.hold is not None and row.hold.inferred:
                row.hold = None
            self._sent(row, ticket, answer)
        elif may_probe and isinstance(answer, Cooldown) and answer.inherited and row.probes:
            return Wait(now + FAR)
        elif row.head() is not ticket:
            row.wake()
        return answer

    def _reserve(
        self, shared: SharedModel, row: WaitQueue, ticket: QueueEntry, now: float
    ) -> Permit | Wait | Cooldown:
        bucket, cost = shared.bucket, ticket.cost
        limit = never(bucket, cost, now)
        if limit is not None:
            raise _too_large(cost.tokens * min(1.0, bucket.fit), limit)
        if bucket.tokens.policy == "refunded" and row.ends(bucket.tokens.tank.limit):
            row.arrange(bucket.tokens.tank.limit)
            if row.head() is not ticket:
                return Wait(now + FAR)
        moment = shared.earliest_start(self._holder, cost, now, asked=row.asked)
        if row.promised or shared.inherits(self._holder, cost):
            moment = min(moment, after_gap(bucket, now))
        if moment <= now:
            return shared.take(ticket.bucket, self._holder, cost, now)
        if bucket.until > now:
            # What comes after it is reckoned then: who goes first may find more than was thought.
            inherited = bucket.until > row.met_until
            row.hold = Cooldown(bucket.until, bucket.limit, inherited=inherited)
            return row.hold
        if row.hold is not None and row.hold.inferred:
            row.hold = None
        if closed := used_up(bucket, cost, now):
            row.hold = Cooldown(*closed, inherited=True, inferred=True)
            return row.hold
        return Wait(shared.look_at(moment, now), due_at=moment)

    def probe(self, ticket: QueueEntry, now: float) -> Permit:
        """Return leave to send through whatever hold there is; a refusal will not change it."""
        name, cost = ticket.bucket, ticket.cost
        reservation = self._store.transaction(
            name, lambda shared: shared.take(name, self._holder, cost, now, probe=True)
        )
        row = self._row(name)
        row.probes += 1
        self._sent(row, ticket, reservation)
        return reservation

    def _sent(self, row: WaitQueue, ticket: QueueEntry, reservation: Permit) -> None:
        row.promised = False
        row.recent.append(reservation)
        row.under_way += 1
        row.leave(ticket)
        row.wake()

    def refuse(
        self,
        reservation: Permit,
        *,
        until: float,
        limit: Limit | None,
        snapshot: LimitSnapshot | None,
        now: float,
    ) -> Cooldown:
        """A limit refused the request: close the bucket until an instant, and return the hold."""

        def deed(shared: SharedModel) -> Cooldown:
            shared.bucket.refuse(reservation, until=until, limit=limit, snapshot=snapshot, now=now)
            if not reservation.probe and shared.bucket.until > now:
                shared.keep_promise(self._holder, reservation.cost)
            return Cooldown(shared.bucket.until, shared.bucket.limit)

        hold = self._follow(reservation, deed, now)
        row = self._row(reservation.bucket)
        row.promised = row.promised or hold.until > now
        row.met_until = max(row.met_until, hold.until)
        row.close(hold, now)
        return hold

    def observe(self, reservation: Permit, snapshot: LimitSnapshot | None, now: float) -> None:
        """The server let the request in: learn from its headers. A probe ends the hold for all."""
        if reservation.probe:
            self._row(reservation.bucket).open()
        self._follow(reservation, lambda s: s.bucket.admit(reservation, snapshot, now), now)

    def settle(self, reservation: Permit, usage: Usage, now: float) -> None:
        """The answer is complete."""

        def deed(shared: SharedModel) -> tuple[float, tuple[float, ...]]:
            back = shared.bucket.settle(reservation, usage, now)
            return shared.bucket.rtt, back

        rtt, back = self._follow(reservation, deed, now)
        # The server had it before those requests came in that were on their way meanwhile.
        since = now - (rtt if rtt < math.inf else 0.0)
        for other in self._row(reservation.bucket).recent:
            if other.sent_at > since and not other.heard:
                other.shift(back)

    def release(self, reservation: Permit, now: float) -> None:
        """The request ended without a verdict."""
        self._follow(reservation, lambda s: s.bucket.cancel(reservation, now), now)

    def start_from(self, name: str, prior: LimitHistory) -> None:
        """Let a bucket of which nothing is known begin with what was learnt earlier."""

        def deed(shared: SharedModel) -> None:
            if not shared.bucket.sent:
                shared.bucket = model_from_history(prior)

        self._store.transaction(name, deed)

    def limit_states(self, now: float, *more: str) -> dict[str, LimitState]:
        """Return what is known of each bucket that was used here, and of `more`, for people."""

        def deed(shared: SharedModel) -> LimitState:
            return limit_state(shared.bucket, now, others=shared.others(self._holder, now))

        found = {}
        for name in {**self._rows, **dict.fromkeys(more)}:
            row = self._rows.get(name, WaitQueue())
            there = self._store.transaction(name, deed)
            found[name] = replace(there, waiting=row.waiting, waiting_tokens=row.asked)
        return found

    def heartbeat(self, now: float) -> bool:
        """Give a sign of life, due every second or two; return whether anything is under way.

        Who waits for a hold's end hears of one that another process has found to be over.
        """
        busy = [(name, row) for name, row in self._rows.items() if row.under_way or row.head()]
        for name, row in busy:
            deed = partial(
                SharedModel.beat, holder=self._holder, now=now, waits=row.head() is not None
            )
            until = self._store.transaction(name, deed)
            if row.hold is None or not until <= now < row.hold.until:
                continue
            if row.hold.inferred:  # the first in the row looks whether it still is used up
                row.wake()
            else:
                row.open()
        return bool(busy)

    def use_store(self, store: Store) -> None:
        """Go on with another store: what is under way is counted there, too, when it ends."""
        self._store = store

    def withdraw(self) -> None:
        """The process ends, and leaves its part to the others."""
        for name in self._rows:
            self._store.transaction(name, lambda shared: shared.leave(self._holder))

    def _follow(self, reservation: Permit, deed: Callable[[SharedModel], T], now: float) -> T:
        """Do a deed that a reservation's fate asks for, and let the first in the row look again."""
        before = replace(reservation)

        def whole(shared: SharedModel) -> T:
            reservation.become(before)  # a store may do a deed again, on other numbers
            shared.revive(self._holder, reservation, now)
            was = reservation.heard, reservation.closed
            result = deed(shared)
            shared.follow(self._holder, reservation, was)
            return result

        row, ended = self._row(reservation.bucket), reservation.closed
        heard = reservation.heard
        result = self._store.transaction(reservation.bucket, whole)
        row.probes -= reservation.probe and reservation.heard and not heard
        row.under_way -= reservation.closed and not ended
        row.wake()
        return result


def _too_large(need: float, limit: float) -> TooLargeError:
    return TooLargeError(
        f"The prompt has about {need:,.0f} tokens, {need - limit:,.0f} more than the {limit:,.0f} "
        "tokens per minute that the model allows.",
        advice="Shorten the prompt, or take a model with a larger limit.",
    )
