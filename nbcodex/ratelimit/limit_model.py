"""What is known of one model's limits, learned from headers, refusals and ended answers.

Numbers only, so that processes can share them, and pure: every function is given the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nbcodex.models import DAY, MINUTE, Limit, LimitReading, LimitSnapshot, Resource, Usage
from nbcodex.ratelimit.charge_policy import (
    CHARGE_POLICIES,
    ZEROS,
    ChargePolicyEstimator,
    Need,
    OutputEstimator,
    Permit,
)
from nbcodex.ratelimit.token_bucket import LIMIT_TRUST_S, MIN_LIMIT, TokenBucket
from nbcodex.ratelimit.undeclared_limits import ParallelLimit, UndeclaredLimits

# The margin is the share of a limit that is kept free. A refusal by a limit that was known widens
# it by the factor MARGIN_GROWTH, and each second multiplies it by MARGIN_DECAY.
MIN_MARGIN, MAX_MARGIN, MARGIN_GROWTH, MARGIN_DECAY = 0.005, 0.1, 1.5, 0.99
# Without headers no response shows unused capacity, so the assumed rate grows by the share
# HEADERLESS_GROWTH per second, or by GUESSED_GROWTH if the limit is a guess, and by at most
# MAX_GROWTH between two requests.
HEADERLESS_GROWTH, GUESSED_GROWTH, MAX_GROWTH = 0.004, 0.02, 0.1
# The assumed rate grows only while it delays requests. It delays none if more tokens than this
# number of typical requests were refilled since the last request.
MAX_IDLE_REQUESTS = 4.0
# After a refusal that states no figures, this share of the measured rate becomes the assumed limit.
# With fewer than MIN_MEASURED_REQUESTS in flight, the measured rate means nothing.
REFUSED_RATE_SHARE, MIN_MEASURED_REQUESTS = 0.85, 3
# After the error `slow_down`, requests are sent at the share SLOW_DOWN_SHARE of the measured rate,
# which then grows by the factor RAMP_FACTOR in each RAMP_PERIOD_S (OpenAI's guide "Rate limits").
SLOW_DOWN_SHARE, RAMP_FACTOR, RAMP_PERIOD_S = 0.5, 1.5, 15 * MINUTE
MIN_SLOW_DOWN_INTERVAL_S = 2 * MINUTE  # errors that follow sooner do not lower the rate again
# The ratio of the server's count of input tokens to our estimate is a moving average.
INPUT_RATIO_LEARNING_RATE, MIN_INPUT_RATIO, MAX_INPUT_RATIO = 0.02, 0.25, 4.0
ROUND_TRIP_GROWTH = 1.01  # of the shortest round trip, at each snapshot, because routes change
# Headers round the remaining amount and the reset time, so the refill rate is computed from them
# only if at least this share of the limit is used.
MIN_USED_SHARE = 0.01
MAX_DEBT_FACTOR = 1.0  # a stated debt of more than the limit times this is not believed
# If the server refuses although the remaining amount exceeds the requested one by this factor, a
# hidden window has refused: a shorter one than headers state (see `TokenBucket.hidden_floor`).
HIDDEN_WINDOW_FACTOR = 1.1


@dataclass(frozen=True, slots=True)
class Refusal:
    """A limit has refused a request."""

    cooldown_until: float  # the end of the cooldown
    limit: Limit | None = None  # the limit, as the message states it
    snapshot: LimitSnapshot | None = None  # the limits, as the headers state them

    @property
    def resource(self) -> Resource:
        """What the limit counts; tokens where nothing is known of it."""
        if self.limit and self.limit.resource:
            return self.limit.resource
        # Gateways count requests without saying so (Kong/kong#3451). Taken for tokens, their limits
        # would be too small for most prompts, and servers that count tokens say so.
        return "requests" if self.limit and self.limit.limit is not None else "tokens"

    @property
    def reading(self) -> LimitReading | None:
        """The figures of a limit per minute: of the message if it has any, else of the headers."""
        limit = self.limit
        if limit and limit.limit and limit.limit >= MIN_LIMIT and limit.used is not None:
            if limit.window not in (None, MINUTE):
                return None
            remaining = max(limit.limit - limit.used, -MAX_DEBT_FACTOR * limit.limit)
            return LimitReading(limit=limit.limit, remaining=remaining)
        if self.snapshot is None:
            return None
        return self.snapshot.tokens if self.resource == "tokens" else self.snapshot.requests


def stated_bucket(reading: LimitReading) -> TokenBucket:
    """Return the bucket that headers state: its limit and refill rate, and its level at 0.0."""
    limit, remaining = max(MIN_LIMIT, reading.limit), reading.remaining
    full_in, rate = reading.full_in, limit / MINUTE
    # Headers state no negative level. But if an empty bucket takes longer than its window to fill,
    # its level is negative.
    if remaining <= 0 and full_in and MINUTE < full_in < (1 + MAX_DEBT_FACTOR) * MINUTE:
        remaining = limit - full_in * rate
    elif full_in and limit - remaining > MIN_USED_SHARE * limit:
        rate = min(limit, max(limit / DAY, (limit - remaining) / full_in))
    return TokenBucket(limit, rate, remaining)


def describe_limit(
    resource: Resource, bucket: TokenBucket, now: float, *, requested: float | None = None
) -> Limit:
    """Return a bucket's figures in the form in which a refusal states them."""
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
    input_ratio: float = 1.0  # the server's count of input tokens, divided by our estimate
    cooldown_until: float = -math.inf  # the end of the last cooldown
    cooldown_limit: Limit | None = None  # the limit that caused it
    margin: float = MIN_MARGIN  # the share of each limit that is kept free
    # While limits are unknown, at most so many requests wait for the response's headers at once, as
    # in TCP's slow start; None once limits are known.
    max_awaiting_response: int | None = 1
    awaiting_response: int = 0  # requests to which the server has not responded yet
    is_headerless: bool = False  # the headers of responses state no limits
    # The limit is not stated: refusals have no figures either, or the headers stopped stating it.
    limit_is_guessed: bool = False
    last_sent_at: float = -math.inf
    # The rate of sending is measured from the window's start until now, so over one to two minutes:
    # once the next window's start is a minute ago, that becomes the start, and now the next one.
    # After a minute without requests, both are now.
    rate_window_start_at: float = -math.inf
    rate_window_start_tokens: float = 0.0  # `sent_tokens` at that instant
    next_window_start_at: float = -math.inf
    next_window_start_tokens: float = 0.0
    permit_count: int = 0  # permits issued so far
    newest_snapshot_number: int = -1  # the highest number of a permit whose snapshot was used
    round_trip: float = math.inf  # the shortest seconds to the server and back
    # The largest request that the server has admitted: its input, and `max_output` if it stated one
    largest_admitted_tokens: float = 0.0
    limit_before_reboot: float = math.inf  # tokens per minute; a reboot resets all other fields
    parallel: ParallelLimit = field(default_factory=ParallelLimit)
    # After the error `slow_down` (OpenAI's): the tokens per second that could be sent at the
    # instant `slowed_down_at`. The rate may grow since then. Infinite if there was no such error.
    slow_down_rate: float = math.inf
    slowed_down_at: float = -math.inf
    sent_tokens: float = 0.0  # input and `max_output` of all requests but the refused ones

    def issue_permit(
        self, limits_id: str, need: Need, now: float, *, is_probe: bool = False
    ) -> Permit:
        """Charge a request that is about to be sent."""
        self._apply_idle_time(now)
        charged = need.input_tokens * self.input_ratio  # input tokens
        self.permit_count += 1
        self.awaiting_response += 1
        if now > self.next_window_start_at + MINUTE:
            if now > self.last_sent_at + MINUTE:
                self.next_window_start_at, self.next_window_start_tokens = now, self.sent_tokens
            self.rate_window_start_at = self.next_window_start_at
            self.rate_window_start_tokens = self.next_window_start_tokens
            self.next_window_start_at, self.next_window_start_tokens = now, self.sent_tokens
        self.last_sent_at = max(self.last_sent_at, now)
        self.sent_tokens += charged + need.max_output
        self.output.count_in_flight(need.max_output, now)
        self.undeclared.charge(self.admission_charge(need), now)
        marks = self.tokens.charge(charged, need.max_output, now)
        mark = self.requests.take(1, now)
        return Permit(
            limits_id, need, now, self.permit_count, is_probe, marks, mark, charged, sent_at=now
        )

    def _apply_idle_time(self, now: float) -> None:
        """Narrow the margin, and raise an assumed rate, by the time since the last request."""
        idle = max(0.0, now - self.last_sent_at) if self.permit_count else 0.0
        self.margin = max(MIN_MARGIN, self.margin * MARGIN_DECAY**idle)
        if self.limit_is_guessed and idle > LIMIT_TRUST_S:
            self.limit_is_guessed, self.max_awaiting_response = False, 1
            self.tokens.buckets = [TokenBucket(updated_at=now) for _ in CHARGE_POLICIES]
        refilled = idle * self.tokens.bucket.rate
        if self.is_headerless and refilled <= MAX_IDLE_REQUESTS * self.tokens.typical_request:
            growth = GUESSED_GROWTH if self.limit_is_guessed else HEADERLESS_GROWTH
            for bucket in (*self.tokens.buckets, self.requests):
                bucket.rate *= 1 + min(MAX_GROWTH, growth * idle)

    def has_slot(self, now: float, *, before: int = 0) -> bool:
        """Return whether the limit on parallel requests admits one more, after `before` others."""
        return self.output.in_flight + before < self.parallel.max_in_flight_at(now)

    def slow_down_rate_at(self, now: float) -> float:
        """Return the tokens per second allowed after the error `slow_down`, else infinity."""
        periods = max(0.0, now - self.slowed_down_at) / RAMP_PERIOD_S
        return self.slow_down_rate * math.pow(RAMP_FACTOR, min(30.0, periods))  # no overflow

    def admission_charge(self, need: Need) -> float:
        """Return the tokens that the server charges when it admits a request."""
        input_tokens = need.input_tokens * self.input_ratio
        return input_tokens if self.tokens.policy == "actual" else input_tokens + need.max_output

    def observe(self, permit: Permit, snapshot: LimitSnapshot | None, now: float) -> None:
        """Learn from the headers of a request that the server has admitted."""
        if permit.has_ended:
            return
        self._count_response(permit)
        if permit.is_probe:
            self.cooldown_until = min(self.cooldown_until, now)
        if permit.charge_is_lost:
            return
        self.undeclared.correct_by_admission(self.admission_charge(permit.need), now)
        self._discard_outdated_limits(permit, snapshot, now)
        admitted = permit.input_tokens + permit.need.max_output * permit.need.has_max_output
        self.largest_admitted_tokens = max(self.largest_admitted_tokens, admitted)
        if snapshot is None or not (snapshot.tokens or snapshot.requests):
            self.is_headerless = self.is_headerless or not self.tokens.bucket.is_known
            if self.max_awaiting_response is not None:
                # Slow start: each response allows one more, which doubles them per round trip.
                self.max_awaiting_response += 1
            return
        if snapshot.tokens or not self.tokens.bucket.is_known:
            self.is_headerless = False
        self.max_awaiting_response = None
        if permit.sequence_number <= self.newest_snapshot_number:
            return  # the snapshot of a later request includes this one
        self.newest_snapshot_number = permit.sequence_number
        # The permit was issued before the journal's commit, and the request was admitted half a
        # round trip after it was sent. The round trip is the time until the headers, without the
        # server's own processing time where it is stated.
        elapsed = permit.sent_at - permit.issued_at
        until_headers = max(0.0, snapshot.at - permit.sent_at)
        if snapshot.processing is not None:
            round_trip = max(0.0, until_headers - snapshot.processing)
            self.round_trip = min(self.round_trip * ROUND_TRIP_GROWTH, round_trip)
            elapsed += round_trip / 2
        elif self.round_trip < math.inf:
            elapsed += min(self.round_trip / 2, until_headers)
        if reading := snapshot.tokens:
            self._observe_reading(permit, "tokens", reading, elapsed, now)
        if reading := snapshot.requests:
            self._observe_reading(permit, "requests", reading, elapsed, now)

    def settle(self, permit: Permit, usage: Usage, now: float) -> tuple[float, ...]:
        """Apply the end of an answer; return what each charge policy refunds."""
        if permit.has_ended or usage.output_tokens is None:
            self.release(permit, now)
            return ZEROS
        self._end(permit)
        need = permit.need
        used = min(float(usage.output_tokens), need.max_output)
        self.output.record(need.max_output, used, now - permit.issued_at)
        self.parallel.record_end(self.output.in_flight, now, is_early=False)
        if permit.charge_is_lost:
            return ZEROS  # these buckets were never charged for it
        if usage.input_tokens and need.input_tokens and not usage.estimated:
            ratio = usage.input_tokens / need.input_tokens
            ratio = min(MAX_INPUT_RATIO, max(MIN_INPUT_RATIO, ratio))
            self.input_ratio += (ratio - self.input_ratio) * INPUT_RATIO_LEARNING_RATE
        refunds = self.tokens.settle(need.max_output, used, now)
        self.undeclared.refund(requests=0, tokens=refunds[self.tokens.assumed_index], now=now)
        return refunds

    def release(self, permit: Permit, now: float, *, ended_early: bool = False) -> None:
        """Apply the end of a request of unknown usage; `ended_early`: of an incomplete stream."""
        # Undeclared limits are assumed not to have counted it: no snapshot would show it later.
        if not (permit.has_response or permit.charge_is_lost):
            self.undeclared.refund(requests=1, tokens=self.admission_charge(permit.need), now=now)
        if permit.has_ended:
            return
        self._end(permit)
        # Servers that end one stream when another request arrives state no limits. Where limits are
        # stated, streams end early for other reasons: all at once, when a gateway restarts.
        if ended_early and not (self.tokens.bucket.is_known or self.requests.is_known):
            self.parallel.record_end(self.output.in_flight, now, is_early=True)

    def refuse(self, permit: Permit, refusal: Refusal, now: float) -> None:
        """Begin a cooldown because a limit has refused a request, and learn from the refusal."""
        limit = refusal.limit
        # During a cooldown, only requests that were sent before it are refused: those of one burst.
        is_first, was_admitted = now >= self.cooldown_until, permit.has_response
        is_repeated = now < self.cooldown_until + MINUTE
        self.release(permit, now)
        if not permit.is_probe and refusal.cooldown_until > self.cooldown_until:
            self.cooldown_until, self.cooldown_limit = refusal.cooldown_until, limit
        self.sent_tokens -= permit.input_tokens + permit.need.max_output
        # A refusal of an admitted request, in its stream, shows nothing about the limits.
        if was_admitted or permit.charge_is_lost:
            return
        # If the snapshot of a later request was used, the level is already without this charge.
        if permit.sequence_number > self.newest_snapshot_number:
            self.tokens.undo_charge(permit.input_tokens, permit.need.max_output, now)
        if limit and limit.resource == "parallel requests":
            self.parallel.learn(self.output.in_flight, now, stated=limit.limit)
        elif limit and limit.resource == "traffic growth":
            # A refusal that follows soon is of requests that were sent at the old rate.
            is_new = now - self.slowed_down_at > MIN_SLOW_DOWN_INTERVAL_S
            if is_first and is_new and self.output.in_flight >= MIN_MEASURED_REQUESTS:
                measured = min(self._measured_rate(now), self.slow_down_rate_at(now))
                self.slow_down_rate, self.slowed_down_at = SLOW_DOWN_SHARE * measured, now
        if limit and limit.resource not in {None, "tokens", "requests"}:
            return  # of images, for example, it is not known what a request needs
        if permit.is_probe or self._learn_undeclared(permit, refusal, now):
            return
        if reading := refusal.reading:
            self._adopt_figures(permit, refusal, reading, now, is_first=is_first)
        elif is_first and (limit is None or limit.window in (None, MINUTE)):
            self._reduce_rate(now, is_repeated=is_repeated)

    def _count_response(self, permit: Permit) -> None:
        if not permit.has_response:
            permit.has_response = True
            self.awaiting_response -= 1

    def _end(self, permit: Permit) -> None:
        self._count_response(permit)
        permit.has_ended = True
        self.output.count_in_flight(permit.need.max_output, permit.issued_at, sign=-1)

    def _observe_reading(
        self, permit: Permit, resource: Resource, reading: LimitReading, elapsed: float, now: float
    ) -> None:
        """Correct the buckets by what the server stated `elapsed` seconds after the permit."""
        stated = stated_bucket(reading)
        limit, rate, remaining = stated.limit, stated.rate, stated.level
        self.undeclared.drop_declared(resource, limit)
        taken_at = permit.issued_at + elapsed
        bucket = self.requests if resource == "requests" else self.tokens.bucket
        # A changed limit, or the lack of snapshots between refusals, causes errors by itself.
        others_took = not self.is_headerless and bucket.has_limit(limit)
        if resource == "requests":
            error = bucket.error(permit.request_mark, remaining, elapsed=elapsed)
            bucket.correct(error, now, taken_at=taken_at, others_took=others_took)
            bucket.set_limit(limit, rate, now=now, stated_at=taken_at)
        else:
            self.tokens.observe(permit, remaining, elapsed, now, others_took=others_took)
            self._set_token_limit(limit, rate, now=now, stated_at=taken_at)
            self.tokens.score_period(taken_at)

    def _set_token_limit(self, limit: float, rate: float, *, now: float, stated_at: float) -> None:
        self.limit_is_guessed = False
        for bucket in self.tokens.buckets:
            bucket.set_limit(limit, rate, now=now, stated_at=stated_at)

    def _learn_undeclared(self, permit: Permit, refusal: Refusal, now: float) -> bool:
        """Learn from a refusal by a limit that no header states; return whether it was by one."""
        limit = refusal.limit
        if limit is None or limit.used is None or limit.resource is None:
            return False
        if limit.limit is None or limit.limit < MIN_LIMIT:
            return False
        of_requests, seconds = limit.resource == "requests", limit.window or MINUTE
        declared = self.requests if of_requests else self.tokens.bucket
        if not declared.is_known:
            is_undeclared = seconds > MINUTE
        else:
            window_ratio = seconds * declared.rate / declared.limit
            is_declared = declared.has_limit(limit.limit) and 0.5 < window_ratio < 2
            is_undeclared = not (is_declared or self.is_headerless)
        if is_undeclared:
            self.undeclared.learn(limit, permit.sequence_number, refusal.cooldown_until, now)
            if of_requests and permit.sequence_number > self.newest_snapshot_number:
                self.requests.undo(1, now)  # the server does not count a refused request
        return is_undeclared

    def _adopt_figures(
        self, permit: Permit, refusal: Refusal, reading: LimitReading, now: float, *, is_first: bool
    ) -> None:
        """Adopt the figures of a refusal; widen the margin if its limit was known already."""
        self.max_awaiting_response = None
        of_requests = refusal.resource == "requests"
        bucket = self.requests if of_requests else self.tokens.bucket
        was_known = bucket.has_limit(reading.limit)
        elapsed = (now + permit.sent_at) / 2 - permit.issued_at  # refused half a round trip ago
        if permit.sequence_number > self.newest_snapshot_number:
            self.newest_snapshot_number = permit.sequence_number
            if of_requests:
                self.requests.undo(1, now)  # the server does not count a refused request
            self._observe_reading(permit, refusal.resource, reading, elapsed, now)
        requested = refusal.limit and refusal.limit.requested
        if requested and reading.remaining > HIDDEN_WINDOW_FACTOR * requested:
            # When the cooldown ends, the hidden window holds the requested amount. Now it holds
            # less, by the refill until then. It is empty when this bucket's level is lower by that.
            refill = max(0.0, refusal.cooldown_until - now) * bucket.rate
            hidden_level = max(0.0, requested - refill)
            for each in (self.requests,) if of_requests else self.tokens.buckets:
                each.set_hidden_floor(reading.remaining - hidden_level, now)
        elif was_known and is_first and not self.is_headerless:
            self.margin = min(MAX_MARGIN, self.margin * MARGIN_GROWTH)

    def _discard_outdated_limits(
        self, permit: Permit, snapshot: LimitSnapshot | None, now: float
    ) -> None:
        """Discard limits that headers stated long ago, if they do not state them any more."""
        tokens, requests = self.tokens.bucket, self.requests
        if not (snapshot and snapshot.tokens) and tokens.is_known and not self.is_headerless:
            self.is_headerless = self.limit_is_guessed = now - tokens.observed_at > LIMIT_TRUST_S
        # A limit on requests is kept while it may still delay one.
        was_full = permit.request_mark.level >= requests.limit - 1
        is_old = now - requests.observed_at > LIMIT_TRUST_S
        if not (snapshot and snapshot.requests) and was_full and is_old:
            self.requests = TokenBucket(updated_at=now)

    def _reduce_rate(self, now: float, *, is_repeated: bool) -> None:
        """After a refusal without figures, widen a known limit's margin or guess a lower limit."""
        bucket = self.tokens.bucket
        if bucket.is_known and not self.limit_is_guessed:
            self.margin = min(MAX_MARGIN, self.margin * MARGIN_GROWTH)
            return
        # A server that answers fast has few in flight: the rate between two refusals counts, if
        # others were sent and some were admitted.
        is_repeated &= self.max_awaiting_response != 1
        is_measured = is_repeated and bool(self.output.in_flight or self.limit_is_guessed)
        if self.output.in_flight < MIN_MEASURED_REQUESTS and not is_measured:
            self.max_awaiting_response = self.max_awaiting_response if bucket.is_known else 1
            return
        rate = REFUSED_RATE_SHARE * (bucket.rate if bucket.is_known else self._measured_rate(now))
        self.max_awaiting_response = None
        self._set_token_limit(rate * MINUTE, rate, now=now, stated_at=now)
        self.limit_is_guessed = self.is_headerless = True
        for each in self.tokens.buckets:
            each.level, each.updated_at = 0.0, now

    def _measured_rate(self, now: float) -> float:
        """Return the tokens per second that were sent in the last one or two minutes."""
        seconds = max(1.0, now - self.rate_window_start_at)
        return max(1.0, (self.sent_tokens - self.rate_window_start_tokens) / seconds)
