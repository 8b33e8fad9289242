"""One observed bucket shared by several holders (kernels, hosts), fair between them by tokens.

Each holder that waits leaves word what its first request asks for. Who has been served least goes
first; the others are told the moment at which there is enough for those before them, too, so nobody
polls. Pure arithmetic on numbers; must not know where they are stored.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from nbcodex.ratelimit.bucket import Bucket
from nbcodex.ratelimit.moment import moment
from nbcodex.ratelimit.prior import heir
from nbcodex.ratelimit.reservation import Cost, Reservation

LATE = 0.3
"""Seconds after its moment when a holder that has not come loses its turn."""
GONE = 3.0
"""Seconds after its moment when it has no claim any more to what it did not get: on a busy machine
all are late now and then, and whoever is not would get the turns of the others for good."""
LEASE = 5.0
"""Seconds without a sign of life after which a holder is taken for dead."""
COURTESY = 4
"""Usual requests that are left in the bucket for holders that have nothing to ask just now: it
costs a long job a moment, once, and lets the others' short ones go at once."""
AHEAD = 60.0
"""Seconds into the future that no instant lies, unless it is of another run of the machine."""
LOOK = 0.25
"""Seconds after which one of several holders looks again, as the others may have news."""


def _birth() -> int:
    return secrets.randbits(53)


@dataclass(slots=True)
class Share:
    """One holder's part.

    Parameters
    ----------
    seen_at : float
        Its last sign of life.
    served : float
        Tokens it was given, on the scale of all.
    due_at : float
        When its first request may go; in the past if it has none.
    tokens, output : float
        What that request asks for.
    asked : float
        Tokens that all its waiting requests ask for.
    under_way, unheard : int
        Requests that are under way, and those of them without a verdict.
    asked_under_way, starts : float
        Their bounds on output, and the sum of the instants at which they went.
    born : int
        Tells it from an earlier share of the same holder.
    """

    seen_at: float = 0.0
    served: float = 0.0
    due_at: float = -1e18
    tokens: float = 0.0
    output: float = 0.0
    asked: float = 0.0
    under_way: int = 0
    unheard: int = 0
    asked_under_way: float = 0.0
    starts: float = 0.0
    born: int = field(default_factory=_birth)

    def waits(self, now: float) -> bool:
        """Return whether it has somebody waiting who is not late."""
        return self.due_at + LATE >= now


@dataclass(slots=True)
class Shared:
    """A bucket and who holds parts of it.

    Parameters
    ----------
    bucket, holders : Bucket, dict
        What is known, and the parts by the holders' names.
    born : int
        Tells it from one that was lost or elsewhere.
    turn : float
        Tokens that those who went had been given before, at the most, on the scale of all: where a
        newcomer begins.
    promise, promised_to : float, str
        Tokens that the server has said it lets in when the hold ends, and the holder it was told.
    """

    bucket: Bucket = field(default_factory=Bucket)
    holders: dict[str, Share] = field(default_factory=dict)
    born: int = field(default_factory=_birth)
    turn: float = 0.0
    promise: float = 0.0
    promised_to: str = ""

    def share(self, holder: str, now: float) -> Share:
        """Return a holder's part, which is a sign of its life; drop those of the dead."""
        if self.bucket.sent_at > now + AHEAD:
            self.bucket, self.holders, self.born = heir(self.bucket), {}, _birth()
        for name in [n for n, share in self.holders.items() if share.seen_at + LEASE < now]:
            self._bury(self.holders.pop(name))
        mine = self.holders.get(holder)
        if mine is None:
            mine = self.holders[holder] = Share()
        mine.seen_at = now
        return mine

    def beat(self, holder: str, now: float, *, waits: bool) -> float:
        """Take a holder's sign of life, and whether it has anybody waiting; return the hold's end.

        What it asked for, and does not any more, keeps nobody waiting.
        """
        mine = self.share(holder, now)
        if not waits:
            mine.due_at, mine.asked = -1e18, 0.0
        return self.bucket.until

    def moment(self, holder: str, cost: Cost, now: float, *, asked: float) -> float:
        """Return when the holder's first request may go, and keep its place until then."""
        mine = self.share(holder, now)
        others = [s for n, s in self.holders.items() if n != holder and s.waits(now)]
        if mine.due_at + GONE < now:
            # Who comes back has no claim on what it did not ask for.
            mine.served = max(mine.served, self.turn)
        before = [Cost(s.tokens, s.output) for s in others if s.served < mine.served]
        waiting = asked + sum(s.asked for s in others)
        has_many = asked > cost.tokens + cost.output
        some_idle = len(self.holders) - 1 > len(others)
        guests = COURTESY if has_many and some_idle else 0
        mine.due_at = moment(self.bucket, cost, now, waiting=waiting, before=before, guests=guests)
        mine.tokens, mine.output, mine.asked = cost.tokens, cost.output, asked
        return mine.due_at

    def others(self, holder: str, now: float) -> int:
        """Return how many holders live beside this one."""
        lives = [n for n, share in self.holders.items() if share.seen_at + LEASE >= now]
        return len({*lives} - {holder})

    def keep_promise(self, holder: str, cost: Cost) -> None:
        """Note that the server lets this holder's request in when the hold ends."""
        self.promise, self.promised_to = cost.tokens + cost.output, holder

    def inherits(self, holder: str, cost: Cost) -> bool:
        """Whether the server has promised room for a request to a holder that is gone by now."""
        gone = self.promised_to not in {*self.holders} - {holder}
        return gone and cost.tokens + cost.output <= self.promise

    def look_at(self, due_at: float, now: float) -> float:
        """Return when one who waits for `due_at` shall ask again."""
        return due_at if len(self.holders) < 2 else min(due_at, now + LOOK)

    def take(
        self, name: str, holder: str, cost: Cost, now: float, *, probe: bool = False
    ) -> Reservation:
        """Let the holder's request go."""
        mine = self.share(holder, now)
        self.turn = max(self.turn, mine.served)
        mine.served += cost.tokens + cost.output
        mine.asked = max(0.0, mine.asked - cost.tokens - cost.output)
        if not mine.asked:
            mine.due_at = -1e18
        mine.under_way += 1
        mine.unheard += 1
        mine.asked_under_way += cost.output
        mine.starts += now
        if holder == self.promised_to or self.inherits(holder, cost):
            self.promise, self.promised_to = 0.0, ""
        reservation = self.bucket.take(name, cost, now, probe=probe)
        reservation.home, reservation.born = self.born, mine.born
        return reservation

    def revive(self, holder: str, reservation: Reservation, now: float) -> None:
        """Count in again what was counted out when its holder seemed dead, or was lost."""
        mine = self.share(holder, now)
        if reservation.born == mine.born or reservation.closed:
            return
        reservation.born, reservation.astray = mine.born, reservation.home != self.born
        self.bucket.output.begin(reservation.cost.output, reservation.at)
        mine.under_way += 1
        mine.asked_under_way += reservation.cost.output
        mine.starts += reservation.at
        if not reservation.heard:
            mine.unheard += 1
            self.bucket.unheard += 1

    def leave(self, holder: str) -> None:
        """The holder ends, and leaves its part to the others."""
        if holder in self.holders:
            self._bury(self.holders.pop(holder))

    def follow(self, holder: str, reservation: Reservation, was: tuple[bool, bool]) -> None:
        """Note in the holder's part what became of a reservation that `was` heard, was closed."""
        mine = self.holders.get(holder)
        if mine is None:
            return
        if reservation.heard and not was[0]:
            mine.unheard -= 1
        if reservation.closed and not was[1]:
            mine.under_way -= 1
            mine.asked_under_way -= reservation.cost.output
            mine.starts -= reservation.at

    def _bury(self, share: Share) -> None:
        """What a dead holder had under way ends without a word."""
        self.bucket.unheard -= share.unheard
        output = self.bucket.output
        output.under_way -= share.under_way
        output.asked_under_way -= share.asked_under_way
        output.starts -= share.starts
