"""What a bucket has learnt: told to people, and kept so that the next job begins where it ended."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field, replace

from nbcodex.models import Limit, LimitReading
from nbcodex.ratelimit.charge_policy import CHARGE_POLICIES, ChargePolicy, Cost, Permit
from nbcodex.ratelimit.limit_model import LimitModel
from nbcodex.ratelimit.refusals import limit_of
from nbcodex.ratelimit.schedule import earliest_start
from nbcodex.ratelimit.token_bucket import TokenBucket

ANSWERS = 50
"""As how many answers of its own a bucket takes what it is told of earlier ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitHistory:
    """What was learnt. Limits are not part of it: the first answer tells them.

    Parameters
    ----------
    policy : {"kept", "refunded", "actual"}
        What the server charges.
    output_share : float
        How much of the output that requests ask for they use, on average.
    input_ratio : float
        What the server counts for each token that we estimate.
    """

    policy: ChargePolicy
    output_share: float
    input_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitState:
    """What is known of a bucket at an instant, for people.

    Parameters
    ----------
    tokens, requests : Gauge or None
        Limit and level as they are reckoned; None while the limit is unknown.
    undeclared : tuple of Limit
        Limits that only refusals tell of, as they are reckoned.
    policy : {"kept", "refunded", "actual"}
        What the server is believed to charge.
    declared : bool
        Whether its headers tell of limits.
    burst_tokens : float or None
        Tokens that a shorter window, which no header tells of, lets through at once.
    foreign_rate : float
        Tokens a second that somebody else on the same key takes.
    margin : float
        Share of the limit that is kept back.
    other_processes : int
        Other processes that are active on it.
    was_used : bool
        Whether it was ever drawn on.
    closed_until : float or None
        Until when nobody may send.
    limit : Limit or None
        The limit that closed the bucket last.
    history : Prior or None
        What the next job can begin with.
    limit_before_reboot : float or None
        The limit on tokens before the machine was started anew, where it is not told yet.
    waiting, waiting_tokens : int, float
        Requests of this process that wait for their turn, and the tokens that they may use.
    """

    tokens: LimitReading | None
    requests: LimitReading | None
    undeclared: tuple[Limit, ...]
    policy: ChargePolicy
    declared: bool
    burst_tokens: float | None
    foreign_rate: float
    margin: float
    other_processes: int
    was_used: bool
    closed_until: float | None
    limit: Limit | None
    history: LimitHistory | None
    limit_before_reboot: float | None = None
    waiting: int = 0
    waiting_tokens: float = 0.0


def limit_state(bucket: LimitModel, now: float, *, others: int = 0) -> LimitState:
    """Return what is known of a bucket."""
    tank = bucket.tokens.tank
    return LimitState(
        tokens=_gauge(tank, now),
        requests=_gauge(bucket.requests, now),
        undeclared=tuple(limit_of(w.resource, w.tank, now) for w in bucket.windows),
        policy=bucket.tokens.policy,
        declared=tank.known and not bucket.blind,
        burst_tokens=tank.usable if tank.floor else None,
        foreign_rate=tank.leak,
        margin=bucket.margin,
        other_processes=others,
        was_used=bucket.sent > 0,
        closed_until=bucket.until if bucket.until > now else None,
        limit=bucket.limit,
        history=learned_history(bucket, now),
        limit_before_reboot=None if tank.known or bucket.earlier == math.inf else bucket.earlier,
    )


def _gauge(tank: TokenBucket, now: float) -> LimitReading | None:
    if not tank.known:
        return None
    level = tank.level_at(now)
    return LimitReading(limit=tank.limit, remaining=level, full_in=(tank.limit - level) / tank.rate)


def learned_history(bucket: LimitModel, now: float) -> LimitHistory | None:
    """Return what a bucket has learnt; None before it has seen enough answers."""
    if bucket.output.ended < ANSWERS:
        return None
    return LimitHistory(
        policy=bucket.tokens.policy, output_share=bucket.output.share(now), input_ratio=bucket.fit
    )


def model_from_history(prior: LimitHistory) -> LimitModel:
    """Return a bucket that begins where an earlier one left off; evidence changes its mind."""
    bucket = LimitModel(fit=min(4.0, max(0.25, prior.input_ratio)))
    bucket.tokens.chosen = CHARGE_POLICIES.index(prior.policy)
    output = bucket.output
    output.asked = output.took = float(ANSWERS)
    output.used = ANSWERS * min(1.0, max(0.0, prior.output_share))
    output.ended = ANSWERS
    return bucket


def successor(bucket: LimitModel) -> LimitModel:
    """Return what outlives a bucket when the clock begins anew, and all under way has ended."""
    idle = replace(bucket.output, under_way=0, asked_under_way=0.0, starts=0.0)
    prior = learned_history(replace(bucket, output=idle), 0.0)
    new = LimitModel() if prior is None else model_from_history(prior)
    limit = bucket.tokens.tank.limit
    new.earlier = limit if limit < math.inf and not bucket.guessed else bucket.earlier
    return new


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
class HolderShare:
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
class SharedModel:
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

    bucket: LimitModel = field(default_factory=LimitModel)
    holders: dict[str, HolderShare] = field(default_factory=dict)
    born: int = field(default_factory=_birth)
    turn: float = 0.0
    promise: float = 0.0
    promised_to: str = ""

    def share(self, holder: str, now: float) -> HolderShare:
        """Return a holder's part, which is a sign of its life; drop those of the dead."""
        if self.bucket.sent_at > now + AHEAD:
            self.bucket, self.holders, self.born = successor(self.bucket), {}, _birth()
        for name in [n for n, share in self.holders.items() if share.seen_at + LEASE < now]:
            self._bury(self.holders.pop(name))
        mine = self.holders.get(holder)
        if mine is None:
            mine = self.holders[holder] = HolderShare()
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

    def earliest_start(self, holder: str, cost: Cost, now: float, *, asked: float) -> float:
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
        mine.due_at = earliest_start(
            self.bucket, cost, now, waiting=waiting, before=before, guests=guests
        )
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
    ) -> Permit:
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

    def revive(self, holder: str, reservation: Permit, now: float) -> None:
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

    def follow(self, holder: str, reservation: Permit, was: tuple[bool, bool]) -> None:
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

    def _bury(self, share: HolderShare) -> None:
        """What a dead holder had under way ends without a word."""
        self.bucket.unheard -= share.unheard
        output = self.bucket.output
        output.under_way -= share.under_way
        output.asked_under_way -= share.asked_under_way
        output.starts -= share.starts
