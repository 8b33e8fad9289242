"""The ledger: who may send, and when, first come, first served.

Decides and never waits. Those who wait hold a ticket each; only the first in the row is told a
moment, and the others are woken when it is their turn, so nobody wakes as a herd.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from nbcodex.errors import TooLargeError
from nbcodex.models import Limit, Snapshot, Usage
from nbcodex.ratelimit.moment import after_gap, never, used_up
from nbcodex.ratelimit.prior import Known, Prior, begin, known
from nbcodex.ratelimit.reservation import Cost, Reservation
from nbcodex.ratelimit.row import Hold, Row, Ticket
from nbcodex.ratelimit.shares import Shared
from nbcodex.ratelimit.stores import Store
from nbcodex.ratelimit.stores.memory import MemoryStore

T = TypeVar("T")

FAR = 60.0
"""Seconds after which one who waits behind others looks again, though it is woken before."""


class Ledger:
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
        self._rows: dict[str, Row] = {}
        self._places = itertools.count()

    @property
    def salt(self) -> bytes:
        """What makes the buckets' names, the same for all who share the store."""
        return self._store.salt

    def _row(self, name: str) -> Row:
        return self._rows.setdefault(name, Row())

    def listen(self, name: str, cost: Cost, wake: Callable[[], None]) -> Ticket:
        """Take a place in the row; `wake` is called when it is worth asking."""
        row = self._row(name)
        if row.head() is None:
            row.rank = row.longest = 0.0
        ticket = Ticket(name, cost, wake, next(self._places), row.rank)
        row.enter(ticket)
        return ticket

    def again(self, ticket: Ticket) -> None:
        """Take the old place in the row once more."""
        self._row(ticket.bucket).enter(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Give the place up."""
        row = self._row(ticket.bucket)
        first = row.head() is ticket
        row.leave(ticket)
        if first:
            row.wake()

    def reserve(self, ticket: Ticket, now: float, *, hopeful: bool = False) -> Reservation | Hold:
        """Return leave to send now, or when to come back.

        Who is `hopeful` wants to know whether a hold that others have met is over: while another
        one finds out, it waits.

        Raises
        ------
        TooLargeError
            If the request is larger than the limit and can never be sent.
        """
        row = self._row(ticket.bucket)
        if row.head() is not ticket:
            hold = row.hold if row.hold is not None and row.hold.until > now else None
            if hold is None or (hopeful and hold.inherited):
                return Hold(now + FAR, queued=True)
            return hold
        answer = self._store.deal(ticket.bucket, lambda s: self._reserve(s, row, ticket, now))
        if isinstance(answer, Reservation):
            if row.hold is not None and row.hold.reckoned:
                row.hold = None
            self._sent(row, ticket, answer)
        elif hopeful and answer.inherited and row.probes:
            return Hold(now + FAR, queued=True)
        elif row.head() is not ticket:
            row.wake()
        return answer

    def _reserve(self, shared: Shared, row: Row, ticket: Ticket, now: float) -> Reservation | Hold:
        bucket, cost = shared.bucket, ticket.cost
        limit = never(bucket, cost, now)
        if limit is not None:
            raise _too_large(cost.tokens * min(1.0, bucket.fit), limit)
        if bucket.tokens.policy == "refunded" and row.ends(bucket.tokens.tank.limit):
            row.arrange(bucket.tokens.tank.limit)
            if row.head() is not ticket:
                return Hold(now + FAR, queued=True)
        moment = shared.moment(self._holder, cost, now, asked=row.asked)
        if row.promised or shared.inherits(self._holder, cost):
            moment = min(moment, after_gap(bucket, now))
        if moment <= now:
            return shared.take(ticket.bucket, self._holder, cost, now)
        if bucket.until > now:
            # What comes after it is reckoned then: who goes first may find more than was thought.
            inherited = bucket.until > row.met_until
            row.hold = Hold(bucket.until, bucket.limit, inherited=inherited)
            return row.hold
        if row.hold is not None and row.hold.reckoned:
            row.hold = None
        if closed := used_up(bucket, cost, now):
            row.hold = Hold(*closed, inherited=True, reckoned=True)
            return row.hold
        return Hold(shared.look_at(moment, now), queued=True, due_at=moment)

    def probe(self, ticket: Ticket, now: float) -> Reservation:
        """Return leave to send through whatever hold there is; a refusal will not change it."""
        name, cost = ticket.bucket, ticket.cost
        reservation = self._store.deal(
            name, lambda shared: shared.take(name, self._holder, cost, now, probe=True)
        )
        row = self._row(name)
        row.probes += 1
        self._sent(row, ticket, reservation)
        return reservation

    def _sent(self, row: Row, ticket: Ticket, reservation: Reservation) -> None:
        row.promised = False
        row.recent.append(reservation)
        row.under_way += 1
        row.leave(ticket)
        row.wake()

    def refuse(
        self,
        reservation: Reservation,
        *,
        until: float,
        limit: Limit | None,
        snapshot: Snapshot | None,
        now: float,
    ) -> Hold:
        """A limit refused the request: close the bucket until an instant, and return the hold."""

        def deed(shared: Shared) -> Hold:
            shared.bucket.refuse(reservation, until=until, limit=limit, snapshot=snapshot, now=now)
            if not reservation.probe and shared.bucket.until > now:
                shared.keep_promise(self._holder, reservation.cost)
            return Hold(shared.bucket.until, shared.bucket.limit)

        hold = self._follow(reservation, deed, now)
        row = self._row(reservation.bucket)
        row.promised = row.promised or hold.until > now
        row.met_until = max(row.met_until, hold.until)
        row.close(hold, now)
        return hold

    def admit(self, reservation: Reservation, snapshot: Snapshot | None, now: float) -> None:
        """The server let the request in: learn from its headers. A probe ends the hold for all."""
        if reservation.probe:
            self._row(reservation.bucket).open()
        self._follow(reservation, lambda s: s.bucket.admit(reservation, snapshot, now), now)

    def settle(self, reservation: Reservation, usage: Usage, now: float) -> None:
        """The answer is complete."""

        def deed(shared: Shared) -> tuple[float, tuple[float, ...]]:
            back = shared.bucket.settle(reservation, usage, now)
            return shared.bucket.rtt, back

        rtt, back = self._follow(reservation, deed, now)
        # The server had it before those requests came in that were on their way meanwhile.
        since = now - (rtt if rtt < math.inf else 0.0)
        for other in self._row(reservation.bucket).recent:
            if other.sent_at > since and not other.heard:
                other.shift(back)

    def cancel(self, reservation: Reservation, now: float) -> None:
        """The request ended without a verdict."""
        self._follow(reservation, lambda s: s.bucket.cancel(reservation, now), now)

    def begin(self, name: str, prior: Prior) -> None:
        """Let a bucket of which nothing is known begin with what was learnt earlier."""

        def deed(shared: Shared) -> None:
            if not shared.bucket.sent:
                shared.bucket = begin(prior)

        self._store.deal(name, deed)

    def known(self, now: float, *more: str) -> dict[str, Known]:
        """Return what is known of each bucket that was used here, and of `more`, for people."""

        def deed(shared: Shared) -> Known:
            return known(shared.bucket, now, others=shared.others(self._holder, now))

        found = {}
        for name in {**self._rows, **dict.fromkeys(more)}:
            row = self._rows.get(name, Row())
            there = self._store.deal(name, deed)
            found[name] = replace(there, waiting=row.waiting, asked=row.asked)
        return found

    def beat(self, now: float) -> bool:
        """Give a sign of life, due every second or two; return whether anything is under way.

        Who waits for a hold's end hears of one that another process has found to be over.
        """
        busy = [(name, row) for name, row in self._rows.items() if row.under_way or row.head()]
        for name, row in busy:
            deed = partial(Shared.beat, holder=self._holder, now=now, waits=row.head() is not None)
            until = self._store.deal(name, deed)
            if row.hold is None or not until <= now < row.hold.until:
                continue
            if row.hold.reckoned:  # the first in the row looks whether it still is used up
                row.wake()
            else:
                row.open()
        return bool(busy)

    def use(self, store: Store) -> None:
        """Go on with another store: what is under way is counted there, too, when it ends."""
        self._store = store

    def leave_all(self) -> None:
        """The process ends, and leaves its part to the others."""
        for name in self._rows:
            self._store.deal(name, lambda shared: shared.leave(self._holder))

    def _follow(self, reservation: Reservation, deed: Callable[[Shared], T], now: float) -> T:
        """Do a deed that a reservation's fate asks for, and let the first in the row look again."""
        before = replace(reservation)

        def whole(shared: Shared) -> T:
            reservation.become(before)  # a store may do a deed again, on other numbers
            shared.revive(self._holder, reservation, now)
            was = reservation.heard, reservation.closed
            result = deed(shared)
            shared.follow(self._holder, reservation, was)
            return result

        row, ended = self._row(reservation.bucket), reservation.closed
        heard = reservation.heard
        result = self._store.deal(reservation.bucket, whole)
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
