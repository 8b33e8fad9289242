"""All that is known of one model's limits, and what it is learned from.

Numbers only, so that processes can share it, and pure. Must not know who waits, nor how.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from nbcodex.models import DAY, MINUTE, Limit, LimitReading, LimitSnapshot, Resource, Usage
from nbcodex.ratelimit.charge_policy import (
    CHARGE_POLICIES,
    KEPT,
    ChargePolicyEstimator,
    Cost,
    OutputEstimator,
    Permit,
)
from nbcodex.ratelimit.token_bucket import LIMIT_TRUST_S, TokenBucket

# The share of the limit that is kept back: at first, at most, how a refusal that nothing explains
# widens it, and how it narrows in a second.
MIN_MARGIN, MAX_MARGIN, MARGIN_GROWTH, MARGIN_DECAY = 0.005, 0.1, 1.5, 0.99
# What a pace gains in a second where no headers show whether there is more; and where not even
# the limit is known.
HEADERLESS_GROWTH, GUESSED_GROWTH, MAX_GROWTH = 0.004, 0.02, 0.1
# A pace is only tried out while it is what limits us: if less than this many typical requests have
# flowed in since the last one went.
MAX_IDLE_REQUESTS = 4.0
# What is left of a pace that was refused without figures. Fewer requests in flight than
# MIN_PACE_REQUESTS show no pace: they wait, and go one by one.
REFUSED_PACE_SHARE, MIN_PACE_REQUESTS = 0.85, 3
# What the server counts for each estimated input token: a moving average, within these bounds.
INPUT_RATIO_LEARNING_RATE, MIN_INPUT_RATIO, MAX_INPUT_RATIO = 0.02, 0.25, 4.0
# A round trip's minimum may grow by this factor with each snapshot, as routes change.
ROUND_TRIP_GROWTH = 1.01

NO_REFUND = (0.0,) * len(CHARGE_POLICIES)


# Remaining and reset are rounded: they show a rate only if this share of the limit is used.
MIN_USED_SHARE = 0.01
# A smaller limit is nonsense, and so is a deeper debt (in limits).
MIN_LIMIT, MAX_DEBT_LIMITS = 1.0, 1.0
# A refusal of this much less than what is left must come from a shorter window.
HIDDEN_WINDOW_FACTOR = 1.1


@dataclass(frozen=True, slots=True)
class RefusalFigures:
    """The figures of a refusal: the bucket at that moment, which the request was not taken from."""

    resource: Resource
    reading: LimitReading
    requested: float  # what the server wanted to take
    is_hidden: bool  # there was enough: a shorter window, which the figures do not show, refused


def read_refusal(limit: Limit | None, snapshot: LimitSnapshot | None) -> RefusalFigures | None:
    """Return the figures from a refusal's message, else from its headers; None without any."""
    resource = (limit and limit.resource) or "tokens"
    reading: LimitReading | None = None
    if snapshot is not None:
        reading = snapshot.tokens if resource == "tokens" else snapshot.requests
    requested = (limit and limit.requested) or 1.0
    if limit and limit.limit and limit.limit >= MIN_LIMIT and limit.used is not None:
        if limit.window not in (None, MINUTE):
            return None
        remaining = max(limit.limit - limit.used, -MAX_DEBT_LIMITS * limit.limit)
        reading = LimitReading(limit=limit.limit, remaining=remaining)
    if reading is None:
        return None
    enough = reading.remaining > HIDDEN_WINDOW_FACTOR * requested
    return RefusalFigures(resource, reading, requested, bool(limit and limit.requested) and enough)


def figures_from_reading(reading: LimitReading) -> tuple[float, float, float]:
    """Return limit, rate and level that headers state."""
    limit, remaining = max(MIN_LIMIT, reading.limit), reading.remaining
    full_in, rate = reading.full_in, limit / MINUTE
    # Headers state no negative level: an empty bucket that takes longer than its window to fill
    # is in debt.
    if remaining <= 0 and full_in and MINUTE < full_in < (1 + MAX_DEBT_LIMITS) * MINUTE:
        return limit, rate, limit - full_in * rate
    if full_in and limit - remaining > MIN_USED_SHARE * limit:
        rate = min(limit, max(limit / DAY, (limit - remaining) / full_in))
    return limit, rate, remaining


@dataclass(slots=True)
class UndeclaredLimit:
    """A limit over another time than the headers': requests a day, say, beside those a minute."""

    resource: Resource
    seconds: float
    bucket: TokenBucket = field(default_factory=TokenBucket)
    refused_at: float = -math.inf
    newest: int = -1  # number of the last permit that it refused

    def learn(self, limit: Limit, number: int, *, until: float, now: float) -> None:
        """Learn from a refusal of the permit of that number."""
        size, requested = limit.limit or 0.0, limit.requested or 1.0
        self.bucket.set_limit(size, size / self.seconds, now=now, since=now)
        self.refused_at = max(self.refused_at, now)
        if number > self.newest:  # of several refusals at once, the last one sent shows most
            self.newest = number
            # Figures are rounded, but what was refused is certainly not there before `until`.
            at_most = requested - max(0.0, until - now) * self.bucket.rate
            left = min(size - (limit.used or 0.0), at_most)
            self.bucket.level, self.bucket.updated_at = max(0.0, left), now

    def amount_of(self, requests: int, tokens: float) -> float:
        """Return what it counts of so many requests and tokens."""
        return float(requests) if self.resource == "requests" else tokens


@dataclass(slots=True)
class UndeclaredLimits:
    """All such limits of one model, by resource and window."""

    by_name: dict[str, UndeclaredLimit] = field(default_factory=dict)

    def __iter__(self) -> Iterator[UndeclaredLimit]:
        return iter(self.by_name.values())

    def charge(self, tokens: float, now: float) -> None:
        """Charge one request."""
        for name, each in list(self.by_name.items()):
            is_full = each.bucket.level_at(now) >= each.bucket.limit
            if is_full and now - each.refused_at > LIMIT_TRUST_S:
                del self.by_name[name]  # it may exist no longer
            each.bucket.take(each.amount_of(1, tokens), now)

    def refund(self, requests: int, tokens: float, now: float) -> None:
        """Give back what was not charged after all."""
        for each in self:
            each.bucket.take(-each.amount_of(requests, tokens), now)

    def learn(self, limit: Limit, number: int, *, until: float, now: float) -> None:
        """Learn from the refusal of the permit of that number."""
        new = UndeclaredLimit(limit.resource or "tokens", limit.window or MINUTE)
        name = f"{new.resource} {new.seconds:g}"
        self.by_name.setdefault(name, new).learn(limit, number, until=until, now=now)

    def drop_declared(self, resource: Resource, limit: float) -> None:
        """Leave a limit that headers state to what they state."""
        for name, each in list(self.by_name.items()):
            if each.resource == resource and each.bucket.has_limit(limit):
                del self.by_name[name]

    def disprove(self, tokens: float, now: float) -> None:
        """Correct each limit that would not have let in what the server has let in."""
        for name, each in list(self.by_name.items()):
            if each.amount_of(1, tokens) > each.bucket.limit:
                del self.by_name[name]
            elif (level := each.bucket.level_at(now)) < 0:
                each.bucket.undo(-level, now)

    def available_at(self, requests: int, tokens: float, now: float) -> float:
        """Return the earliest instant at which all of them have so much left."""
        instants = (e.bucket.available_at(e.amount_of(requests, tokens), now) for e in self)
        return max(instants, default=now)


def describe_limit(
    resource: Resource, bucket: TokenBucket, now: float, *, requested: float | None = None
) -> Limit:
    """Return a bucket's figures as a refusal would state them."""
    seconds = bucket.limit / bucket.rate
    # A rate that headers state is rounded: a window near a usual one is that one.
    window = next((usual for usual in (MINUTE, DAY) if 0.8 < seconds / usual < 1.25), seconds)
    size, used = bucket.limit, bucket.limit - bucket.level_at(now)
    return Limit(resource=resource, window=window, limit=size, used=used, requested=requested)


def is_undeclared(limit: Limit | None, declared: TokenBucket) -> bool:
    """Return whether a refusal speaks of another window than the one that headers state."""
    if limit is None or limit.used is None or limit.resource is None:
        return False
    if limit.limit is None or limit.limit < MIN_LIMIT:
        return False
    seconds = limit.window or MINUTE
    if not declared.is_known:
        return seconds > MINUTE
    ratio = seconds * declared.rate / declared.limit
    return not declared.has_limit(limit.limit) or not 0.5 < ratio < 2


@dataclass(slots=True)
class LimitModel:
    """The limits of one model and account. The fields' order is their form in stores."""

    tokens: ChargePolicyEstimator = field(default_factory=ChargePolicyEstimator)
    requests: TokenBucket = field(default_factory=TokenBucket)
    undeclared: UndeclaredLimits = field(default_factory=UndeclaredLimits)
    output: OutputEstimator = field(default_factory=OutputEstimator)
    input_ratio: float = 1.0
    closed_until: float = -math.inf  # a cooldown: nothing may be sent until then,
    closing_limit: Limit | None = None  # because of this limit
    margin: float = MIN_MARGIN
    max_unanswered: int | None = 1  # while limits are unknown; None once they are known
    unanswered: int = 0
    is_headerless: bool = False  # answers state no limits
    is_guessed: bool = False  # nor do refusals, or the limit was stated long ago
    last_sent_at: float = -math.inf
    # A pace is measured over a stretch that began one to two minutes ago, or after a rest: its
    # start, and its middle, where the next one begins.
    pace_start_at: float = -math.inf
    pace_start_level: float = 0.0
    pace_middle_at: float = -math.inf
    pace_middle_level: float = 0.0
    sent: int = 0
    newest_observed: int = -1  # number of the last permit whose headers were read
    round_trip: float = math.inf  # the least seconds to the server and back
    largest_admitted: float = 0.0  # input tokens
    limit_before_reboot: float = math.inf  # on tokens

    def issue_permit(self, name: str, cost: Cost, now: float, *, is_probe: bool = False) -> Permit:
        """Let a request go."""
        self._relax(now)
        tokens = cost.input_tokens * self.input_ratio
        self.sent += 1
        self.unanswered += 1
        if now > self.pace_middle_at + MINUTE:
            level = self.tokens.bucket.level_at(now)
            has_rested = now > self.last_sent_at + MINUTE
            self.pace_start_at = now if has_rested else self.pace_middle_at
            self.pace_start_level = level if has_rested else self.pace_middle_level
            self.pace_middle_at, self.pace_middle_level = now, level
        self.last_sent_at = max(self.last_sent_at, now)
        self.output.count_started(cost.max_output, now)
        self.undeclared.charge(self.admission_charge(cost), now)
        marks = self.tokens.charge(tokens, cost.max_output, now)
        mark = self.requests.take(1, now)
        return Permit(name, cost, now, self.sent, is_probe, marks, mark, tokens, sent_at=now)

    def admission_charge(self, cost: Cost) -> float:
        """Return the tokens that the server takes at admission."""
        tokens = cost.input_tokens * self.input_ratio
        return tokens if self.tokens.policy == "actual" else tokens + cost.max_output

    def observe(self, permit: Permit, snapshot: LimitSnapshot | None, now: float) -> None:
        """Learn from a request that the server has let in, and from its headers."""
        if permit.is_closed:
            return
        self._answer(permit)
        if permit.is_probe:
            self.closed_until = min(self.closed_until, now)
        if permit.is_orphaned:
            return
        self.undeclared.disprove(self.admission_charge(permit.cost), now)
        self._distrust_old_headers(permit, snapshot, now)
        if snapshot is None or not (snapshot.tokens or snapshot.requests):
            self.is_headerless = self.is_headerless or not self.tokens.bucket.is_known
            if self.max_unanswered is not None:
                # Slow start: each answer lets one more go, which doubles them per round trip.
                self.max_unanswered += 1
            return
        if snapshot.tokens or not self.tokens.bucket.is_known:
            self.is_headerless = False
        self.max_unanswered = None
        self.largest_admitted = max(self.largest_admitted, permit.input_tokens)
        if permit.number <= self.newest_observed:
            return  # what a later one has shown includes this one
        self.newest_observed = permit.number
        elapsed = self._seconds_to_admission(permit, snapshot)
        if reading := snapshot.tokens:
            self._observe_tokens(permit, reading, elapsed, now)
        if reading := snapshot.requests:
            self._observe_requests(permit, reading, elapsed, now)

    def settle(self, permit: Permit, usage: Usage, now: float) -> tuple[float, ...]:
        """Enter the end of an answer; return what each projection was given back."""
        self._answer(permit)
        if permit.is_closed:
            return NO_REFUND
        permit.is_closed = True
        cost = permit.cost
        self.output.drop(cost.max_output, permit.issued_at)
        if usage.output_tokens is None:
            return NO_REFUND
        used = min(float(usage.output_tokens), cost.max_output)
        self.output.record(cost.max_output, used, now - permit.issued_at)
        if permit.is_orphaned:
            return NO_REFUND  # nothing was taken from these projections
        if usage.input_tokens and cost.input_tokens and not usage.estimated:
            ratio = min(
                MAX_INPUT_RATIO, max(MIN_INPUT_RATIO, usage.input_tokens / cost.input_tokens)
            )
            self.input_ratio += (ratio - self.input_ratio) * INPUT_RATIO_LEARNING_RATE
        refunds = self.tokens.settle(cost.max_output, used, now)
        self.undeclared.refund(0, refunds[self.tokens.chosen], now)
        return refunds

    def release(self, permit: Permit, now: float) -> None:
        """Enter the end of a request without a verdict; snapshots show what it was charged."""
        # Limits that no snapshot shows are assumed not to have counted it.
        if not (permit.is_answered or permit.is_orphaned):
            self.undeclared.refund(1, self.admission_charge(permit.cost), now)
        self._answer(permit)
        if not permit.is_closed:
            permit.is_closed = True
            self.output.drop(permit.cost.max_output, permit.issued_at)

    def refuse(
        self,
        permit: Permit,
        *,
        until: float,
        limit: Limit | None,
        snapshot: LimitSnapshot | None,
        now: float,
    ) -> None:
        """A limit has refused a request: close the model until an instant, and learn from it."""
        is_first, was_let_in = now >= self.closed_until, permit.is_answered
        self.release(permit, now)
        if not permit.is_probe and until > self.closed_until:
            self.closed_until, self.closing_limit = until, limit
        # What was let in and broken off later teaches nothing, nor do the marks of a lost model.
        if was_let_in or permit.is_orphaned:
            return
        # What a later one has shown includes that this one was never charged.
        is_news = permit.number > self.newest_observed
        if is_news:
            self.tokens.undo_charge(permit.input_tokens, permit.cost.max_output, now)
        if permit.is_probe or self._learn_undeclared(limit, permit, until, now, is_news=is_news):
            return
        figures = read_refusal(limit, snapshot)
        if figures is not None:
            self._learn(permit, figures, until, now, is_first=is_first, is_news=is_news)
        elif limit is None or limit.window in (None, MINUTE):
            self._guess_pace(now, is_first=is_first)

    # What is learned.

    def _answer(self, permit: Permit) -> None:
        if not permit.is_answered:
            permit.is_answered = True
            self.unanswered -= 1

    def _observe_requests(
        self, permit: Permit, reading: LimitReading, elapsed: float, now: float
    ) -> None:
        limit, rate, remaining = figures_from_reading(reading)
        self.undeclared.drop_declared("requests", limit)
        bucket, taken_at = self.requests, permit.issued_at + elapsed
        error = bucket.error(permit.request_mark, remaining, elapsed=elapsed)
        learns_drain = not self.is_headerless and bucket.has_limit(limit)
        bucket.correct(error, now, taken_at=taken_at, learns_foreign_rate=learns_drain)
        bucket.set_limit(limit, rate, now=now, since=taken_at)

    def _observe_tokens(
        self, permit: Permit, reading: LimitReading, elapsed: float, now: float
    ) -> tuple[float, ...]:
        limit, rate, remaining = figures_from_reading(reading)
        self.undeclared.drop_declared("tokens", limit)
        taken_at = permit.issued_at + elapsed
        learns_drain = not self.is_headerless and self.tokens.bucket.has_limit(limit)
        errors = self.tokens.observe(
            permit, remaining, elapsed, now, learns_foreign_rate=learns_drain
        )
        self._adopt_tokens(limit, rate, now=now, since=taken_at)
        self.tokens.score_window(taken_at, snapshots_are_rare=self.is_headerless)
        return errors

    def _adopt_tokens(self, limit: float, rate: float, *, now: float, since: float) -> None:
        self.is_guessed = False
        for bucket in self.tokens.buckets:
            bucket.set_limit(limit, rate, now=now, since=since)

    def _seconds_to_admission(self, permit: Permit, snapshot: LimitSnapshot) -> float:
        """Return the seconds between the permit and the admission that the snapshot shows."""
        # Admission is half a round trip after sending; the round trip is the time to the headers
        # less the server's own processing.
        preparation = permit.sent_at - permit.issued_at  # the journal's commit lies between
        passed = max(0.0, snapshot.at - permit.sent_at)
        if snapshot.processing is not None:
            round_trip = max(0.0, passed - snapshot.processing)
            self.round_trip = min(self.round_trip * ROUND_TRIP_GROWTH, round_trip)
            return preparation + round_trip / 2
        if self.round_trip == math.inf:
            return preparation
        return preparation + min(self.round_trip / 2, passed)

    def _learn_undeclared(
        self, limit: Limit | None, permit: Permit, until: float, now: float, *, is_news: bool
    ) -> bool:
        """Learn from a refusal by a window that headers do not state; False if it is not one."""
        of_requests = limit is not None and limit.resource == "requests"
        declared = self.requests if of_requests else self.tokens.bucket
        if limit is None or (self.is_headerless and declared.is_known):
            return False
        if not is_undeclared(limit, declared):
            return False
        self.undeclared.learn(limit, permit.number, until=until, now=now)
        if of_requests and is_news:
            self.requests.undo(1, now)  # the server does not count a refused request
        return True

    def _learn(
        self,
        permit: Permit,
        figures: RefusalFigures,
        until: float,
        now: float,
        *,
        is_first: bool,
        is_news: bool,
    ) -> None:
        """Adopt the figures of a refusal; where they surprise, widen the margin."""
        self.max_unanswered = None
        of_requests = figures.resource == "requests"
        bucket = self.requests if of_requests else self.tokens.bucket
        is_expected_limit = bucket.has_limit(figures.reading.limit)
        elapsed = (now + permit.sent_at) / 2 - permit.issued_at
        errors = None
        if is_news:
            self.newest_observed = permit.number
            if of_requests:
                self.requests.undo(1, now)  # the server does not count a refused request
                self._observe_requests(permit, figures.reading, elapsed, now)
            else:
                errors = self._observe_tokens(permit, figures.reading, elapsed, now)
        if figures.is_hidden:
            # At `until` the shorter window has room for the request; what it holds now is less by
            # its refill. The stated level exceeds that by what cannot be used.
            hidden_level = max(0.0, figures.requested - max(0.0, until - now) * bucket.rate)
            for each in (self.requests,) if of_requests else self.tokens.buckets:
                each.set_hidden_floor(figures.reading.remaining - hidden_level, now)
        elif is_expected_limit and is_first and not self.is_headerless:
            self.margin = min(MAX_MARGIN, self.margin * MARGIN_GROWTH)
            if errors and abs(errors[KEPT]) < abs(errors[self.tokens.chosen]):
                self.tokens.reset()

    def _distrust_old_headers(
        self, permit: Permit, snapshot: LimitSnapshot | None, now: float
    ) -> None:
        """Rely no longer on a limit that headers stated long ago and have ceased to state."""
        tokens, requests = self.tokens.bucket, self.requests
        if not (snapshot and snapshot.tokens) and tokens.is_known and not self.is_headerless:
            self.is_headerless = self.is_guessed = now - tokens.observed_at > LIMIT_TRUST_S
        was_full = permit.request_mark.level >= requests.limit - 1
        is_old = now - requests.observed_at > LIMIT_TRUST_S
        if not (snapshot and snapshot.requests) and was_full and is_old:
            self.requests = TokenBucket(updated_at=now)

    def _guess_pace(self, now: float, *, is_first: bool) -> None:
        """Go on more slowly, where a refusal has no figures and nothing is known."""
        bucket = self.tokens.bucket
        if not is_first:
            return  # the refusals of one burst count once
        if bucket.is_known and not self.is_guessed:
            self.margin = min(MAX_MARGIN, self.margin * MARGIN_GROWTH)
            return
        if self.output.in_flight < MIN_PACE_REQUESTS:
            self.max_unanswered = self.max_unanswered if bucket.is_known else 1
            return
        taken = self.pace_start_level - bucket.level_at(now)
        measured = max(1.0, taken / max(1.0, now - self.pace_start_at))
        rate = REFUSED_PACE_SHARE * (bucket.rate if bucket.is_known else measured)
        self.max_unanswered = None
        self._adopt_tokens(rate * MINUTE, rate, now=now, since=now)
        self.is_guessed = self.is_headerless = True
        for each in self.tokens.buckets:
            each.level, each.updated_at = 0.0, now

    def _relax(self, now: float) -> None:
        """Let time heal: narrow the margin, and try more where no headers show what there is."""
        passed = max(0.0, now - self.last_sent_at) if self.sent else 0.0
        self.margin = max(MIN_MARGIN, self.margin * MARGIN_DECAY**passed)
        if self.is_guessed and passed > LIMIT_TRUST_S:
            self.is_guessed, self.max_unanswered = False, 1
            self.tokens.buckets = [TokenBucket(updated_at=now) for _ in CHARGE_POLICIES]
        flowed_in = passed * self.tokens.bucket.rate
        if self.is_headerless and flowed_in <= MAX_IDLE_REQUESTS * self.tokens.typical_request:
            growth = GUESSED_GROWTH if self.is_guessed else HEADERLESS_GROWTH
            for bucket in (*self.tokens.buckets, self.requests):
                bucket.rate *= 1 + min(MAX_GROWTH, growth * passed)
