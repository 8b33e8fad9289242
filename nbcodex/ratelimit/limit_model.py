"""All that is known of one model's limits: an observed bucket, and what it learns.

Numbers only, so that processes can share it, and pure: every function is told the time. Must not
know who waits, nor how.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nbcodex.models import MINUTE, Limit, LimitReading, LimitSnapshot, Usage
from nbcodex.ratelimit.charge_policy import (
    CHARGE_POLICIES,
    KEPT,
    ChargePolicyEstimator,
    Cost,
    OutputEstimator,
    Permit,
)
from nbcodex.ratelimit.refusals import (
    RefusalFigures,
    UndeclaredLimits,
    figures_from_reading,
    is_another,
    read_refusal,
)
from nbcodex.ratelimit.token_bucket import LATELY, LevelMark, TokenBucket

MARGIN, WIDEST, WIDER, NARROWER = 0.005, 0.1, 1.5, 0.99
"""Share of the limit kept back; its bound; its growth by a refusal that nobody can explain, and how
it shrinks in a second."""
GROWTH, FASTER = 0.004, 0.02
"""What the pace gains each second, where no headers tell whether there is more; where not even the
limit is known."""
FEW = 3
"""Requests under way that tell no pace: refused without figures, they wait, and go one by one."""
BUSY = 4.0
"""How many usual requests may have flowed in since the last one went, for the pace to be what holds
them up: it is tried out only where it is used."""
CUT = 0.85
"""What is left of a pace that was refused, where the server tells no figures."""


@dataclass(slots=True)
class LimitModel:
    """The limits of one model and account, as they are reckoned.

    Parameters
    ----------
    tokens, requests : Shadows and Tank
        Tokens and requests a minute.
    windows : Windows
        Limits that only refusals tell of.
    output : Output
        How much output answers use.
    fit : float
        What the server counts for each token that we estimate.
    until, limit : float, Limit or None
        The hold: nobody may send until then, because of this limit.
    margin : float
        Share of the limit that is kept back.
    at_once : int or None
        How many requests may be without a verdict, while the limits are unknown; None once known.
    blind, guessed : bool
        Whether answers carry no limits; whether not even refusals do, and the limit is a guess, or
        was told long ago.
    sent, unheard : int
        Requests that went, and those of them without a verdict.
    sent_at : float
        When the last one went.
    first_at, first_level, later_at, later_level : float
        The stretch over which a pace is measured: when it began, one to two minutes ago or after a
        rest, and what there was; and the same of its middle, where the next one begins.
    newest : int
        Number of the last request whose headers were read; those of earlier ones are old news.
    rtt : float
        Seconds on the way to the server and back, at the least; infinite while unknown.
    largest : float
        Input tokens of the largest request that was ever let in.
    earlier : float
        The limit on tokens before the machine was started anew; infinite where nobody knows.
    """

    tokens: ChargePolicyEstimator = field(default_factory=ChargePolicyEstimator)
    requests: TokenBucket = field(default_factory=TokenBucket)
    windows: UndeclaredLimits = field(default_factory=UndeclaredLimits)
    output: OutputEstimator = field(default_factory=OutputEstimator)
    fit: float = 1.0
    until: float = -math.inf
    limit: Limit | None = None
    margin: float = MARGIN
    at_once: int | None = 1
    unheard: int = 0
    blind: bool = False
    guessed: bool = False
    sent_at: float = -math.inf
    first_at: float = -math.inf
    first_level: float = 0.0
    later_at: float = -math.inf
    later_level: float = 0.0
    sent: int = 0
    newest: int = -1
    rtt: float = math.inf
    largest: float = 0.0
    earlier: float = math.inf

    def take(self, name: str, cost: Cost, at: float, *, probe: bool = False) -> Permit:
        """Let a request go at the instant `at`."""
        self._grow(at)
        tokens = cost.tokens * self.fit
        self.sent += 1
        self.unheard += 1
        if at > self.later_at + MINUTE:
            has_rested, level = at > self.sent_at + MINUTE, self.tokens.tank.level_at(at)
            self.first_at = at if has_rested else self.later_at
            self.first_level = level if has_rested else self.later_level
            self.later_at, self.later_level = at, level
        self.sent_at = max(self.sent_at, at)
        self.output.begin(cost.output, at)
        self.windows.take(self.charge(cost), at)
        return Permit(
            bucket=name,
            cost=cost,
            at=at,
            sent_at=at,
            number=self.sent,
            probe=probe,
            marks=self.tokens.admit(tokens, cost.output, at),
            turn=self.requests.take(1, at),
            tokens=tokens,
        )

    def admit(self, reservation: Permit, snapshot: LimitSnapshot | None, now: float) -> None:
        """The server has let a request in; its headers are at hand."""
        if reservation.closed:
            return
        self._hear(reservation)
        if reservation.probe:
            self.until = min(self.until, now)
        if reservation.astray:
            return  # taken from a bucket that is lost: its marks mean nothing here
        self.windows.refute(self.charge(reservation.cost), now)
        self._lose_sight(reservation, snapshot, now)
        gauges = snapshot and (snapshot.tokens or snapshot.requests)
        if snapshot is None or gauges is None:
            self.blind = self.blind or not self.tokens.tank.known
            if self.at_once is not None:
                self.at_once += 1
            return
        if snapshot.tokens or not self.tokens.tank.known:
            self.blind = False
        self.at_once = None
        self.largest = max(self.largest, reservation.tokens)
        self._observe(reservation, snapshot, now)

    def settle(self, reservation: Permit, usage: Usage, now: float) -> tuple[float, ...]:
        """An answer has ended; return what each ledger gave back."""
        self._hear(reservation)
        if reservation.closed:
            return (0.0,) * len(CHARGE_POLICIES)
        reservation.closed = True
        cost = reservation.cost
        self.output.drop(cost.output, reservation.at)
        if usage.output_tokens is None:
            return (0.0,) * len(CHARGE_POLICIES)
        used = min(float(usage.output_tokens), cost.output)
        self.output.end(cost.output, used, now - reservation.at)
        if reservation.astray:
            return (0.0,) * len(CHARGE_POLICIES)  # nothing was taken from these ledgers
        if usage.input_tokens and cost.tokens and not usage.estimated:
            ratio = min(4.0, max(0.25, usage.input_tokens / cost.tokens))
            self.fit += (ratio - self.fit) * 0.02
        back = self.tokens.settle(cost.output, used, now)
        self.windows.give_back(0, back[self.tokens.chosen], now)
        return back

    def charge(self, cost: Cost) -> float:
        """Return the tokens that the server takes at admission."""
        tokens = cost.tokens * self.fit
        return tokens if self.tokens.policy == "actual" else tokens + cost.output

    def cancel(self, reservation: Permit, now: float) -> None:
        """A request has ended without a verdict; what it was charged, snapshots will tell.

        Of limits that no snapshot tells of, it is taken not to have been.
        """
        if not (reservation.heard or reservation.astray):
            self.windows.give_back(1, self.charge(reservation.cost), now)
        self._hear(reservation)
        if not reservation.closed:
            reservation.closed = True
            self.output.drop(reservation.cost.output, reservation.at)

    def refuse(
        self,
        reservation: Permit,
        *,
        until: float,
        limit: Limit | None,
        snapshot: LimitSnapshot | None,
        now: float,
    ) -> None:
        """A limit has refused a request: close the bucket until an instant, and learn from it.

        What was let in and broken off later is closed for, too, but teaches nothing; nor does what
        was taken from a bucket that is lost.
        """
        fresh, admitted = now >= self.until, reservation.heard
        self.cancel(reservation, now)
        if not reservation.probe and until > self.until:
            self.until, self.limit = until, limit
        if admitted or reservation.astray:
            return
        # What a later one has told includes already that this one was never charged.
        is_news = reservation.number > self.newest
        if is_news:
            self.tokens.void(reservation.tokens, reservation.cost.output, now)
        if reservation.probe or self._meet(limit, reservation, until, now, is_news=is_news):
            return
        told = read_refusal(limit, snapshot)
        if told is not None:
            self._learn(reservation, told, until, now, fresh=fresh, is_news=is_news)
        elif limit is None or limit.window in (None, MINUTE):
            self._guess(now, fresh=fresh)

    # What is learnt.

    def _hear(self, reservation: Permit) -> None:
        if not reservation.heard:
            reservation.heard = True
            self.unheard -= 1

    def _meet(
        self,
        limit: Limit | None,
        reservation: Permit,
        until: float,
        now: float,
        *,
        is_news: bool,
    ) -> bool:
        """Whether a refusal speaks of a window that headers do not tell; learn from it then."""
        of_requests = limit is not None and limit.resource == "requests"
        shown = self.requests if of_requests else self.tokens.tank
        if limit is None or (self.blind and shown.known) or not is_another(limit, shown):
            return False
        self.windows.meet(limit, reservation.number, until=until, now=now)
        if of_requests and is_news:
            self.requests.give_back(1, now)  # a request that is refused for its number counts not
        return True

    def _observe(self, reservation: Permit, snapshot: LimitSnapshot, now: float) -> None:
        """Put the ledgers right by the headers of a request that was let in."""
        if reservation.number <= self.newest:
            return
        self.newest = reservation.number
        gone = self._gone(reservation, snapshot)
        if gauge := snapshot.tokens:
            self._observe_tokens(reservation, gauge, gone, now)
        if gauge := snapshot.requests:
            self._observe_requests(reservation.turn, gauge, gone, reservation.at, now)

    def _observe_requests(
        self, turn: LevelMark, gauge: LimitReading, gone: float, at: float, now: float
    ) -> None:
        limit, rate, remaining = figures_from_reading(gauge)
        self.windows.show("requests", limit)
        error, taken_at = self.requests.error(turn, remaining, gone=gone), at + gone
        usual = not self.blind and self.requests.has_limit(limit)
        self.requests.correct(error, now, taken_at=taken_at, usual=usual)
        self.requests.adopt(limit, rate, now=now, since=taken_at)

    def _observe_tokens(
        self, reservation: Permit, gauge: LimitReading, gone: float, now: float
    ) -> tuple[float, ...]:
        limit, rate, remaining = figures_from_reading(gauge)
        self.windows.show("tokens", limit)
        taken_at = reservation.at + gone
        marks = reservation.marks
        usual = not self.blind and self.tokens.tank.has_limit(limit)
        errors = self.tokens.observe(
            marks, remaining, gone=gone, taken_at=taken_at, now=now, usual=usual
        )
        self._adopt(limit, rate, now=now, since=taken_at)
        self.tokens.judge(taken_at, patient=self.blind)
        return errors

    def _adopt(self, limit: float, rate: float, *, now: float, since: float) -> None:
        self.guessed = False
        for tank in self.tokens.tanks:
            tank.adopt(limit, rate, now=now, since=since)

    def _gone(self, reservation: Permit, snapshot: LimitSnapshot) -> float:
        """Return the seconds between the leave and the admission that the snapshot shows."""
        readying = reservation.sent_at - reservation.at
        if snapshot.processing is not None:
            way = max(0.0, snapshot.at - reservation.sent_at - snapshot.processing)
            self.rtt = min(self.rtt * 1.01, way)
            return readying + way / 2
        # A way that was long once may be short now.
        passed = max(0.0, snapshot.at - reservation.sent_at)
        return readying + (min(self.rtt / 2, passed) if self.rtt < math.inf else 0.0)

    def _learn(
        self,
        reservation: Permit,
        told: RefusalFigures,
        until: float,
        now: float,
        *,
        fresh: bool,
        is_news: bool,
    ) -> None:
        """Adopt the figures of a refusal; where they surprise, keep back more."""
        self.at_once = None
        of_requests = told.resource == "requests"
        tank = self.requests if of_requests else self.tokens.tank
        steady = tank.has_limit(told.gauge.limit)
        gone = (now + reservation.sent_at) / 2 - reservation.at
        errors = None
        if is_news:
            self.newest = reservation.number
            if of_requests:
                # A request that is refused for its number is not counted.
                self.requests.give_back(1, now)
                self._observe_requests(reservation.turn, told.gauge, gone, reservation.at, now)
            else:
                errors = self._observe_tokens(reservation, told.gauge, gone, now)
        if told.hidden:
            hidden = max(0.0, told.requested - max(0.0, until - now) * tank.rate)
            for each in (self.requests,) if of_requests else self.tokens.tanks:
                each.hide(told.gauge.remaining - hidden, now)
        elif steady and fresh and not self.blind:
            self._widen()
            if errors and abs(errors[KEPT]) < abs(errors[self.tokens.chosen]):
                self.tokens.doubt()

    def _lose_sight(self, reservation: Permit, snapshot: LimitSnapshot | None, now: float) -> None:
        """Rely no more on a limit that headers told long ago, and do not tell any more."""
        tokens, requests = self.tokens.tank, self.requests
        if not (snapshot and snapshot.tokens) and tokens.known and not self.blind:
            self.blind = self.guessed = now - tokens.seen_at > LATELY
        was_full = reservation.turn.level >= requests.limit - 1
        if not (snapshot and snapshot.requests) and was_full and now - requests.seen_at > LATELY:
            self.requests = TokenBucket(at=now)

    def _widen(self) -> None:
        self.margin = min(WIDEST, self.margin * WIDER)

    def _guess(self, now: float, *, fresh: bool) -> None:
        """Go on more slowly, where a refusal tells no figures and nothing is known."""
        tank = self.tokens.tank
        if tank.known and not self.guessed:
            if fresh:
                self._widen()
            return
        if not fresh:
            return
        if self.output.under_way < FEW:
            self.at_once = self.at_once if tank.known else 1
            return
        taken = (self.first_level - tank.level_at(now)) / max(1.0, now - self.first_at)
        rate = CUT * (tank.rate if tank.known else max(1.0, taken))
        self.at_once = None
        self._adopt(rate * MINUTE, rate, now=now, since=now)
        self.guessed = self.blind = True
        for each in self.tokens.tanks:
            each.level, each.at = 0.0, now

    def _grow(self, now: float) -> None:
        """Let time heal: keep back less, and try more where no headers tell what there is."""
        passed = max(0.0, now - self.sent_at) if self.sent else 0.0
        self.margin = max(MARGIN, self.margin * NARROWER**passed)
        if self.guessed and passed > LATELY:
            self.guessed, self.at_once = False, 1
            self.tokens.tanks = [TokenBucket(at=now) for _ in CHARGE_POLICIES]
        if self.blind and passed * self.tokens.tank.rate <= BUSY * self.tokens.usual:
            growth = FASTER if self.guessed else GROWTH
            for tank in (*self.tokens.tanks, self.requests):
                tank.rate *= 1 + min(0.1, growth * passed)
