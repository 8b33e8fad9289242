"""What is known of one model's limits, learned from headers, refusals and ended answers.

Numbers only, so that processes can share them, and pure: every function is given the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nbcodex.models import DAY, MINUTE, Limit, LimitReading, LimitSnapshot, Resource, Usage
from nbcodex.ratelimit.charge_policy import (
    CHARGE_POLICIES,
    ChargePolicyEstimator,
    Need,
    OutputEstimator,
    Permit,
)
from nbcodex.ratelimit.token_bucket import LIMIT_TRUST_S, MIN_LIMIT, TokenBucket
from nbcodex.ratelimit.undeclared_limits import ParallelLimit, UndeclaredLimits

# The margin is the share of a limit that is never used. A refusal by a limit that was known
# multiplies it by MARGIN_GROWTH, and each second by MARGIN_DECAY.
MIN_MARGIN, MAX_MARGIN, MARGIN_GROWTH, MARGIN_DECAY = 0.005, 0.1, 1.5, 0.99
# Without headers nothing shows unused capacity, so the assumed rate grows by HEADERLESS_GROWTH per
# second, and by GUESSED_GROWTH where it is only a guess. MAX_GROWTH bounds one step.
HEADERLESS_GROWTH, GUESSED_GROWTH, MAX_GROWTH = 0.004, 0.02, 0.1
# It grows only while the limit delays requests: if more than this many typical requests were
# refilled since the last one was sent, too few requests were waiting.
MAX_IDLE_REQUESTS = 4.0
# After a refusal without figures, this share of the measured rate of sending is taken as the limit.
# Fewer requests in flight than MIN_PACE_REQUESTS are too few to measure a rate.
REFUSED_RATE_SHARE, MIN_MEASURED_REQUESTS = 0.85, 3
# After the server has asked for slower growth, this share of the measured rate is sent. It may then
# grow by RAMP_FACTOR in RAMP_PERIOD_S (OpenAI's guide "Rate limits", on `slow_down`).
SLOW_DOWN_SHARE, RAMP_FACTOR, RAMP_PERIOD_S = 0.5, 1.5, 15 * MINUTE
MIN_SLOW_DOWN_INTERVAL_S = 2 * MINUTE  # for so long the rate is not lowered again
# Input tokens as the server counts them, over our estimate: a moving average, within these bounds.
INPUT_RATIO_LEARNING_RATE, MIN_INPUT_RATIO, MAX_INPUT_RATIO = 0.02, 0.25, 4.0
# The minimal round trip may grow by this factor with each snapshot, as routes change.
ROUND_TRIP_GROWTH = 1.01
# Remaining and reset are rounded: they show a rate only if this share of the limit is used.
MIN_USED_SHARE = 0.01
MAX_DEBT_FACTOR = 1.0  # stated debts of more limits than this are nonsense
# A refusal although this many times the requested amount is left comes from a hidden window.
HIDDEN_WINDOW_FACTOR = 1.1

NO_REFUND = (0.0,) * len(CHARGE_POLICIES)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A limit has refused a request."""

    until: float  # the end of the cooldown
    limit: Limit | None = None  # as the message states it
    snapshot: LimitSnapshot | None = None


def stated_bucket(reading: LimitReading) -> TokenBucket:
    """Return the bucket that the headers' reading implies."""
    limit, remaining = max(MIN_LIMIT, reading.limit), reading.remaining
    full_in, rate = reading.full_in, limit / MINUTE
    # Headers state no negative level: an empty bucket that takes longer than its window to fill
    # is in debt.
    if remaining <= 0 and full_in and MINUTE < full_in < (1 + MAX_DEBT_FACTOR) * MINUTE:
        remaining = limit - full_in * rate
    elif full_in and limit - remaining > MIN_USED_SHARE * limit:
        rate = min(limit, max(limit / DAY, (limit - remaining) / full_in))
    return TokenBucket(limit, rate, remaining)


@dataclass(frozen=True, slots=True)
class RefusalFigures:
    """A bucket as a refusal states it; the refused request was not taken from it."""

    resource: Resource
    reading: LimitReading
    requested: float  # what the server wanted to take
    is_hidden: bool  # enough remained: a shorter window refused, which the figures do not show


def read_refusal(limit: Limit | None, snapshot: LimitSnapshot | None) -> RefusalFigures | None:
    """Return a refusal's figures, from its message or else its headers; None unless of a minute."""
    resource = (limit and limit.resource) or "tokens"
    reading: LimitReading | None = None
    if snapshot is not None:
        reading = snapshot.tokens if resource == "tokens" else snapshot.requests
    requested = (limit and limit.requested) or 1.0
    if limit and limit.limit and limit.limit >= MIN_LIMIT and limit.used is not None:
        if limit.window not in (None, MINUTE):
            return None
        remaining = max(limit.limit - limit.used, -MAX_DEBT_FACTOR * limit.limit)
        reading = LimitReading(limit=limit.limit, remaining=remaining)
    if reading is None:
        return None
    had_enough = reading.remaining > HIDDEN_WINDOW_FACTOR * requested
    is_hidden = bool(limit and limit.requested) and had_enough
    return RefusalFigures(resource, reading, requested, is_hidden)


def describe_limit(
    resource: Resource, bucket: TokenBucket, now: float, *, requested: float | None = None
) -> Limit:
    """Return a bucket in the form in which a refusal states it."""
    seconds = bucket.limit / bucket.rate
    # A rate from headers is rounded: a window near a minute or a day is exactly that.
    window = next((usual for usual in (MINUTE, DAY) if 0.8 < seconds / usual < 1.25), seconds)
    size, used = bucket.limit, bucket.limit - bucket.level_at(now)
    return Limit(resource=resource, window=window, limit=size, used=used, requested=requested)


@dataclass(slots=True)
class LimitModel:
    """The limits of one model and account. Stores keep the fields in this order."""

    tokens: ChargePolicyEstimator = field(default_factory=ChargePolicyEstimator)
    requests: TokenBucket = field(default_factory=TokenBucket)
    undeclared: UndeclaredLimits = field(default_factory=UndeclaredLimits)  # no header states them
    output: OutputEstimator = field(default_factory=OutputEstimator)
    input_ratio: float = 1.0  # input tokens as the server counts them, over our estimate
    cooldown_until: float = -math.inf  # the end of the last cooldown
    cooldown_limit: Limit | None = None  # the limit that caused it
    margin: float = MIN_MARGIN  # share of the limit that is never used
    max_awaiting_response: int | None = 1  # while limits are unknown; None once they are known
    awaiting_response: int = 0  # requests that were sent and neither admitted nor refused so far
    is_headerless: bool = False  # the headers of answers state no limits
    limit_is_guessed: bool = False  # refusals state none either, or the limit was stated long ago
    last_sent_at: float = -math.inf
    # The rate of sending is measured over a period that began one to two minutes ago, or after a
    # minute without requests. The next period begins at the middle of this one.
    rate_window_start_at: float = -math.inf
    rate_window_start_tokens: float = 0.0  # `sent_tokens` at that instant
    next_window_start_at: float = -math.inf
    next_window_start_tokens: float = 0.0
    permit_count: int = 0  # the number of the last permit
    newest_snapshot_number: int = -1  # number of the last sent permit whose snapshot was used
    round_trip: float = math.inf  # the least seconds to the server and back
    largest_admitted_tokens: float = (
        0.0  # tokens of input, and of output as far as a request bounds it
    )
    limit_before_reboot: float = math.inf  # tokens per minute; a reboot resets all other fields
    parallel: ParallelLimit = field(default_factory=ParallelLimit)
    # Tokens per second that were allowed at `slowed_down_at`, and may grow since then: infinite
    # unless the server has asked for slower growth (OpenAI's `slow_down`).
    slow_down_rate: float = math.inf
    slowed_down_at: float = -math.inf
    sent_tokens: float = 0.0  # input and `max_output` of all requests, without refused ones

    def issue_permit(self, name: str, need: Need, now: float, *, is_probe: bool = False) -> Permit:
        """Charge a request that is about to be sent."""
        self._apply_idle_time(now)
        input_tokens = need.input_tokens * self.input_ratio
        self.permit_count += 1
        self.awaiting_response += 1
        if now > self.next_window_start_at + MINUTE:
            has_rested = now > self.last_sent_at + MINUTE
            self.rate_window_start_at = now if has_rested else self.next_window_start_at
            self.rate_window_start_tokens = (
                self.sent_tokens if has_rested else self.next_window_start_tokens
            )
            self.next_window_start_at, self.next_window_start_tokens = now, self.sent_tokens
        self.last_sent_at = max(self.last_sent_at, now)
        self.sent_tokens += input_tokens + need.max_output
        self.output.count_started(need.max_output, now)
        self.undeclared.charge(self.admission_charge(need), now)
        marks = self.tokens.charge(input_tokens, need.max_output, now)
        mark = self.requests.take(1, now)
        return Permit(
            name, need, now, self.permit_count, is_probe, marks, mark, input_tokens, sent_at=now
        )

    def _apply_idle_time(self, now: float) -> None:
        """Narrow the margin, and raise an assumed rate, by the time since the last request."""
        passed = max(0.0, now - self.last_sent_at) if self.permit_count else 0.0
        self.margin = max(MIN_MARGIN, self.margin * MARGIN_DECAY**passed)
        if self.limit_is_guessed and passed > LIMIT_TRUST_S:
            self.limit_is_guessed, self.max_awaiting_response = False, 1
            self.tokens.buckets = [TokenBucket(updated_at=now) for _ in CHARGE_POLICIES]
        refilled = passed * self.tokens.bucket.rate
        if self.is_headerless and refilled <= MAX_IDLE_REQUESTS * self.tokens.typical_request:
            growth = GUESSED_GROWTH if self.limit_is_guessed else HEADERLESS_GROWTH
            for bucket in (*self.tokens.buckets, self.requests):
                bucket.rate *= 1 + min(MAX_GROWTH, growth * passed)

    def has_slot(self, now: float, *, before: int = 0) -> bool:
        """Return whether one more request may be in flight, if `before` others are sent first."""
        return self.output.in_flight + before < self.parallel.allowed_at(now)

    def slow_down_rate_at(self, now: float) -> float:
        """Return the tokens per second that may be sent after a `slow_down`, else infinity."""
        periods = max(0.0, now - self.slowed_down_at) / RAMP_PERIOD_S
        return self.slow_down_rate * math.pow(RAMP_FACTOR, min(30.0, periods))

    def admission_charge(self, need: Need) -> float:
        """Return the tokens that the server takes at admission."""
        input_tokens = need.input_tokens * self.input_ratio
        return input_tokens if self.tokens.policy == "actual" else input_tokens + need.max_output

    def observe(self, permit: Permit, snapshot: LimitSnapshot | None, now: float) -> None:
        """Learn from the headers of a request that the server has admitted."""
        if permit.has_ended:
            return
        self._count_response(permit)
        if permit.is_probe:
            self.cooldown_until = min(self.cooldown_until, now)
        if permit.is_orphaned:
            return
        self.undeclared.correct_by_admission(self.admission_charge(permit.need), now)
        self._discard_outdated_limits(permit, snapshot, now)
        admitted = permit.input_tokens + permit.need.max_output * permit.need.is_bounded
        self.largest_admitted_tokens = max(self.largest_admitted_tokens, admitted)
        if snapshot is None or not (snapshot.tokens or snapshot.requests):
            self.is_headerless = self.is_headerless or not self.tokens.bucket.is_known
            if self.max_awaiting_response is not None:
                # Slow start: each answer admits one more, which doubles them per round trip.
                self.max_awaiting_response += 1
            return
        if snapshot.tokens or not self.tokens.bucket.is_known:
            self.is_headerless = False
        self.max_awaiting_response = None
        if permit.sequence_number <= self.newest_snapshot_number:
            return  # the snapshot of a later request includes this one
        self.newest_snapshot_number = permit.sequence_number
        # The permit was issued before the journal's commit, and the request was admitted half a
        # round trip after it was sent. The round trip is the time to the headers less the server's
        # own processing, where it is stated.
        elapsed = permit.sent_at - permit.issued_at
        passed = max(0.0, snapshot.at - permit.sent_at)
        if snapshot.processing is not None:
            round_trip = max(0.0, passed - snapshot.processing)
            self.round_trip = min(self.round_trip * ROUND_TRIP_GROWTH, round_trip)
            elapsed += round_trip / 2
        elif self.round_trip < math.inf:
            elapsed += min(self.round_trip / 2, passed)
        if reading := snapshot.tokens:
            self._observe_reading(permit, "tokens", reading, elapsed, now)
        if reading := snapshot.requests:
            self._observe_reading(permit, "requests", reading, elapsed, now)

    def settle(self, permit: Permit, usage: Usage, now: float) -> tuple[float, ...]:
        """Apply the end of an answer; return the refund of each policy's projection."""
        self._count_response(permit)
        if permit.has_ended:
            return NO_REFUND
        permit.has_ended = True
        need = permit.need
        self.output.drop(need.max_output, permit.issued_at)
        if usage.output_tokens is None:
            return NO_REFUND
        used = min(float(usage.output_tokens), need.max_output)
        self.output.record(need.max_output, used, now - permit.issued_at)
        self.parallel.record_end(self.output.in_flight, now, is_early=False)
        if permit.is_orphaned:
            return NO_REFUND  # it was not taken from these projections
        if usage.input_tokens and need.input_tokens and not usage.estimated:
            ratio = usage.input_tokens / need.input_tokens
            ratio = min(MAX_INPUT_RATIO, max(MIN_INPUT_RATIO, ratio))
            self.input_ratio += (ratio - self.input_ratio) * INPUT_RATIO_LEARNING_RATE
        refunds = self.tokens.settle(need.max_output, used, now)
        self.undeclared.refund(0, refunds[self.tokens.assumed_index], now)
        return refunds

    def release(self, permit: Permit, now: float, *, ended_early: bool = False) -> None:
        """Apply the end of a request of unknown usage, or of a stream that ended incomplete."""
        # Undeclared limits are assumed not to have counted it: no snapshot would show it later.
        if not (permit.has_response or permit.is_orphaned):
            self.undeclared.refund(1, self.admission_charge(permit.need), now)
        self._count_response(permit)
        if not permit.has_ended:
            permit.has_ended = True
            self.output.drop(permit.need.max_output, permit.issued_at)
            # A gateway that restarts ends all streams at once; one-slot servers state no limits.
            if ended_early and not (self.tokens.bucket.is_known or self.requests.is_known):
                self.parallel.record_end(self.output.in_flight, now, is_early=True)

    def refuse(self, permit: Permit, refusal: Refusal, now: float) -> None:
        """Begin a cooldown because a limit has refused a request, and learn from the refusal."""
        until, limit = refusal.until, refusal.limit
        is_first, was_admitted = now >= self.cooldown_until, permit.has_response
        self.release(permit, now)
        if not permit.is_probe and until > self.cooldown_until:
            self.cooldown_until, self.cooldown_limit = until, limit
        self.sent_tokens -= permit.input_tokens + permit.need.max_output
        # The refusal of an admitted request, in mid-stream, shows nothing about the limits.
        if was_admitted or permit.is_orphaned:
            return
        # The snapshot of a later request would already show that this one was not charged.
        if permit.sequence_number > self.newest_snapshot_number:
            self.tokens.undo_charge(permit.input_tokens, permit.need.max_output, now)
        if limit and limit.resource == "parallel requests":
            self.parallel.learn(self.output.in_flight, now, stated=limit.limit)
            return
        if limit and limit.resource == "traffic growth":
            # Until the slower rate has shown its effect, another refusal is of the old one.
            is_new = now - self.slowed_down_at > MIN_SLOW_DOWN_INTERVAL_S
            if is_first and is_new and self.output.in_flight >= MIN_MEASURED_REQUESTS:
                measured = min(self._measured_rate(now), self.slow_down_rate_at(now))
                self.slow_down_rate, self.slowed_down_at = SLOW_DOWN_SHARE * measured, now
            return
        if permit.is_probe or self._learn_undeclared(limit, permit, until, now):
            return
        if figures := read_refusal(limit, refusal.snapshot):
            self._adopt_figures(permit, figures, until, now, is_first=is_first)
        elif is_first and (limit is None or limit.window in (None, MINUTE)):
            # The refusals of one burst count once.
            self._reduce_rate(now)

    def _count_response(self, permit: Permit) -> None:
        if not permit.has_response:
            permit.has_response = True
            self.awaiting_response -= 1

    def _observe_reading(
        self, permit: Permit, resource: Resource, reading: LimitReading, elapsed: float, now: float
    ) -> None:
        """Correct the buckets by what the server stated `elapsed` seconds after the permit."""
        stated = stated_bucket(reading)
        limit, rate, remaining = stated.limit, stated.rate, stated.level
        self.undeclared.drop_declared(resource, limit)
        taken_at = permit.issued_at + elapsed
        bucket = self.requests if resource == "requests" else self.tokens.bucket
        by_others = not self.is_headerless and bucket.has_limit(limit)
        if resource == "requests":
            error = bucket.error(permit.request_mark, remaining, elapsed=elapsed)
            bucket.correct(error, now, taken_at=taken_at, by_others=by_others)
            bucket.set_limit(limit, rate, now=now, since=taken_at)
        else:
            self.tokens.observe(permit, remaining, elapsed, now, by_others=by_others)
            self._set_token_limit(limit, rate, now=now, since=taken_at)
            self.tokens.score_period(taken_at)

    def _set_token_limit(self, limit: float, rate: float, *, now: float, since: float) -> None:
        self.limit_is_guessed = False
        for bucket in self.tokens.buckets:
            bucket.set_limit(limit, rate, now=now, since=since)

    def _learn_undeclared(
        self, limit: Limit | None, permit: Permit, until: float, now: float
    ) -> bool:
        """Learn from a refusal by a window that headers do not state; False for any other."""
        if limit is None or limit.used is None or limit.resource is None:
            return False
        if limit.limit is None or limit.limit < MIN_LIMIT:
            return False
        of_requests, seconds = limit.resource == "requests", limit.window or MINUTE
        declared = self.requests if of_requests else self.tokens.bucket
        if not declared.is_known:
            is_undeclared = seconds > MINUTE
        else:
            ratio = seconds * declared.rate / declared.limit
            is_declared = declared.has_limit(limit.limit) and 0.5 < ratio < 2
            is_undeclared = not (is_declared or self.is_headerless)
        if is_undeclared:
            self.undeclared.learn(limit, permit.sequence_number, until=until, now=now)
            if of_requests and permit.sequence_number > self.newest_snapshot_number:
                self.requests.undo(1, now)  # the server does not count a refused request
        return is_undeclared

    def _adopt_figures(
        self, permit: Permit, figures: RefusalFigures, until: float, now: float, *, is_first: bool
    ) -> None:
        """Adopt the figures of a refusal; widen the margin if its limit was known already."""
        self.max_awaiting_response = None
        of_requests = figures.resource == "requests"
        bucket = self.requests if of_requests else self.tokens.bucket
        is_expected_limit = bucket.has_limit(figures.reading.limit)
        elapsed = (now + permit.sent_at) / 2 - permit.issued_at  # refused half a round trip ago
        if permit.sequence_number > self.newest_snapshot_number:
            self.newest_snapshot_number = permit.sequence_number
            if of_requests:
                self.requests.undo(1, now)  # the server does not count a refused request
            self._observe_reading(permit, figures.resource, figures.reading, elapsed, now)
        if figures.is_hidden:
            # At `until` the hidden window will hold the requested amount; at present it holds less
            # by the refill until then. The floor is the stated level at which it holds nothing.
            hidden_level = max(0.0, figures.requested - max(0.0, until - now) * bucket.rate)
            for each in (self.requests,) if of_requests else self.tokens.buckets:
                each.set_hidden_floor(figures.reading.remaining - hidden_level, now)
        elif is_expected_limit and is_first and not self.is_headerless:
            self.margin = min(MAX_MARGIN, self.margin * MARGIN_GROWTH)

    def _discard_outdated_limits(
        self, permit: Permit, snapshot: LimitSnapshot | None, now: float
    ) -> None:
        """Stop relying on a limit that headers stated long ago and do not state any more."""
        tokens, requests = self.tokens.bucket, self.requests
        if not (snapshot and snapshot.tokens) and tokens.is_known and not self.is_headerless:
            self.is_headerless = self.limit_is_guessed = now - tokens.observed_at > LIMIT_TRUST_S
        was_full = permit.request_mark.level >= requests.limit - 1  # so it delays nothing
        is_old = now - requests.observed_at > LIMIT_TRUST_S
        if not (snapshot and snapshot.requests) and was_full and is_old:
            self.requests = TokenBucket(updated_at=now)

    def _reduce_rate(self, now: float) -> None:
        """Send more slowly after a refusal without figures: widen the margin, or guess a limit."""
        bucket = self.tokens.bucket
        if bucket.is_known and not self.limit_is_guessed:
            self.margin = min(MAX_MARGIN, self.margin * MARGIN_GROWTH)
            return
        if self.output.in_flight < MIN_MEASURED_REQUESTS:
            self.max_awaiting_response = self.max_awaiting_response if bucket.is_known else 1
            return
        pace = bucket.rate if bucket.is_known else self._measured_rate(now)
        rate = REFUSED_RATE_SHARE * pace
        self.max_awaiting_response = None
        self._set_token_limit(rate * MINUTE, rate, now=now, since=now)
        self.limit_is_guessed = self.is_headerless = True
        for each in self.tokens.buckets:
            each.level, each.updated_at = 0.0, now

    def _measured_rate(self, now: float) -> float:
        """Return the tokens per second that were sent in the last one or two minutes."""
        seconds = max(1.0, now - self.rate_window_start_at)
        return max(1.0, (self.sent_tokens - self.rate_window_start_tokens) / seconds)
