"""What a server charges for a request, and how much output answers use: both are learned.

No header states the charge policy, so three projections of the token bucket, one for each policy,
are compared with the snapshots. *kept*: input and the whole `max_output` are charged at admission.
*refunded*: the same, and unused output is refunded when the answer ends. *actual*: input is charged
at admission, the output when the answer ends. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nbcodex.ratelimit.token_bucket import LevelMark, TokenBucket

ChargePolicy = Literal["kept", "refunded", "actual"]
CHARGE_POLICIES: tuple[ChargePolicy, ...] = ("kept", "refunded", "actual")
ACTUAL_INDEX = CHARGE_POLICIES.index("actual")

# Errors are summed over a period of at least this: the random order of arrivals then evens out.
MIN_PERIOD_S = 0.4
# The projections must differ by this many typical requests before a period counts.
MIN_DIVERGENCE_REQUESTS = 3.0
# Scores are decayed sums: a period adds at most 1, and counts 0.8 times as much one period later.
# A lead of 1.5, which takes at least two periods, switches the policy; 0.5 rules *actual* out.
SCORE_DECAY, SWITCH_LEAD, RULED_OUT_LEAD = 0.8, 1.5, 0.5
TYPICAL_REQUEST_LEARNING_RATE = 0.02

# The prior of the output share: this many answers that used all of their `max_output`.
PRIOR_ANSWERS = 5.0
# After this many answers, the earlier ones count half.
OUTPUT_MEMORY_ANSWERS = 1_000


@dataclass(frozen=True, slots=True)
class Need:
    """The tokens that a request needs: its estimated input, and the most output it may use."""

    input_tokens: float
    max_output: float
    is_bounded: bool = True  # whether the request states `max_output`; otherwise it is a guess

    @property
    def total_tokens(self) -> float:
        """Input and output."""
        return self.input_tokens + self.max_output


@dataclass(slots=True)
class Permit:
    """Permission to send one attempt, and what the limits record of it: a reservation's data."""

    name: str  # the hashed name of the limits that it was taken from
    need: Need
    issued_at: float
    sequence_number: int  # in the order of sending
    is_probe: bool  # sent during a cooldown, to find out whether it is over
    token_marks: tuple[LevelMark, ...]  # levels after its charge, one for each policy's projection
    request_mark: LevelMark  # of the bucket of requests
    input_tokens: float  # as charged here: the estimate, corrected by what the server counts
    has_response: bool = False  # admitted, refused, or ended without either
    has_ended: bool = False  # ended
    sent_at: float = 0.0  # `Limiter` sets it to infinity until the attempt is sent
    model_id: int = 0  # of the `SharedModel` that it was taken from
    share_id: int = 0  # of the `HolderShare` that counts it as in flight
    is_orphaned: bool = False  # that `SharedModel` is lost, so the marks mean nothing

    def restore(self, other: Permit) -> None:
        """Undo what a transaction has changed: copy these fields from `other`, an earlier copy."""
        self.token_marks, self.share_id = other.token_marks, other.share_id
        self.has_response, self.has_ended = other.has_response, other.has_ended
        self.is_orphaned = other.is_orphaned

    def shift_marks(self, amounts: tuple[float, ...]) -> None:
        """Add to each mark a refund that the server made before this request arrived."""
        pairs = zip(self.token_marks, amounts, strict=True)
        self.token_marks = tuple(LevelMark(m.level + amount, m.correction) for m, amount in pairs)


def _zeros() -> list[float]:
    return [0.0] * len(CHARGE_POLICIES)


@dataclass(slots=True)
class ChargePolicyEstimator:
    """One projection for each policy, scored by how well it predicts the snapshots.

    Stores keep the fields in this order.
    """

    buckets: list[TokenBucket] = field(
        default_factory=lambda: [TokenBucket() for _ in CHARGE_POLICIES]
    )
    scores: list[float] = field(default_factory=_zeros)  # decayed sums of errors: lower is better
    period_errors: list[float] = field(default_factory=_zeros)
    period_start_at: float | None = None
    assumed_index: int = 0  # of the assumed policy; at first *kept*, which is safe with any server
    typical_request: float = 0.0  # tokens with the whole `max_output`, a moving average

    def __post_init__(self) -> None:
        lengths = {len(self.buckets), len(self.scores), len(self.period_errors)}
        if lengths != {len(CHARGE_POLICIES)} or not 0 <= self.assumed_index < len(CHARGE_POLICIES):
            raise ValueError("one figure for each charge policy is needed")  # damaged in a store

    @property
    def policy(self) -> ChargePolicy:
        """The policy that is assumed."""
        return CHARGE_POLICIES[self.assumed_index]

    @property
    def bucket(self) -> TokenBucket:
        """The projection for the policy that is assumed."""
        return self.buckets[self.assumed_index]

    @property
    def may_charge_at_end(self) -> bool:
        """Whether output may yet be charged when answers end: the scores do not rule it out."""
        # Snapshots correct what a wrong policy has projected, but do not show charges that are
        # still to come: without this, two of 300 requests were refused.
        return self.scores[ACTUAL_INDEX] - self.scores[self.assumed_index] < RULED_OUT_LEAD

    def charge(self, input_tokens: float, max_output: float, now: float) -> tuple[LevelMark, ...]:
        """Charge a request to all projections and return their marks."""
        total = input_tokens + max_output
        rate = TYPICAL_REQUEST_LEARNING_RATE if self.typical_request else 1.0
        self.typical_request += (total - self.typical_request) * rate
        charges = (total, total, input_tokens)
        return tuple(b.take(c, now) for b, c in zip(self.buckets, charges, strict=True))

    def settle(self, max_output: float, used: float, now: float) -> tuple[float, ...]:
        """Apply the end of a request that used `used` of its output; return each refund."""
        refunds = (0.0, max_output - used, -used)
        for bucket, amount in zip(self.buckets, refunds, strict=True):
            bucket.take(-amount, now)
        return refunds

    def undo_charge(self, input_tokens: float, max_output: float, now: float) -> None:
        """Add back a request that the server never charged."""
        total = input_tokens + max_output
        for bucket, amount in zip(self.buckets, (total, total, input_tokens), strict=True):
            bucket.undo(amount, now)

    def observe(
        self, permit: Permit, remaining: float, elapsed: float, now: float, *, by_others: bool
    ) -> None:
        """Correct all projections by a request's snapshot, as `TokenBucket.correct` does."""
        taken_at = permit.issued_at + elapsed
        pairs = zip(self.buckets, permit.token_marks, strict=True)
        for index, (bucket, mark) in enumerate(pairs):
            error = bucket.error(mark, remaining, elapsed=elapsed)
            if bucket.is_known:
                self.period_errors[index] += error
            bucket.correct(error, now, taken_at=taken_at, by_others=by_others)

    def score_period(self, at: float) -> None:
        """Score the period that ends with a snapshot taken at `at`, if it tells policies apart."""
        if self.period_start_at is None:
            self.period_start_at = at
            self.period_errors = _zeros()
        # The sums are signed: a request that arrives out of order causes two opposite errors.
        errors = [abs(error) for error in self.period_errors]
        divergence = max(self.period_errors) - min(self.period_errors)
        is_short = at - self.period_start_at < MIN_PERIOD_S
        if is_short or divergence <= MIN_DIVERGENCE_REQUESTS * self.typical_request:
            return
        for index, error in enumerate(errors):
            score = min(1.0, (error - min(errors)) / divergence)
            self.scores[index] = SCORE_DECAY * self.scores[index] + score
        best = min(range(len(CHARGE_POLICIES)), key=self.scores.__getitem__)
        if self.scores[self.assumed_index] - self.scores[best] >= SWITCH_LEAD:
            self.assumed_index = best
        self.period_start_at, self.period_errors = at, _zeros()

    def assume_most_permissive(self, now: float) -> None:
        """Assume the policy that allows most, of those within SWITCH_LEAD of the best score."""
        # Without headers only refusals are evidence, so a policy has to be tried to be learned.
        best = min(self.scores)
        likely = [i for i, score in enumerate(self.scores) if score - best < SWITCH_LEAD]
        self.assumed_index = max(likely, key=lambda i: self.buckets[i].level_at(now))


@dataclass(slots=True)
class OutputEstimator:
    """The mean share of its `max_output` that an answer uses. Stores keep the fields in this order.

    Short answers end first, and would make the mean too small. So answers in flight count as well,
    as if they had produced output at the mean speed since they started.
    """

    requested_output: float = 0.0  # the sum of `max_output` of ended answers, like the next two
    used_output: float = 0.0
    answer_seconds: float = 0.0
    ended_answers: int = 0
    in_flight: int = 0
    requested_in_flight: float = 0.0
    start_times_sum: float = 0.0  # of the instants at which those in flight started

    def count_in_flight(self, max_output: float, started_at: float, *, sign: int = 1) -> None:
        """Add a request to those in flight; with `sign=-1`, remove it."""
        self.in_flight += sign
        self.requested_in_flight += sign * max_output
        self.start_times_sum += sign * started_at
        if not self.in_flight:
            self.requested_in_flight = self.start_times_sum = 0.0  # drops the rounding errors

    def record(self, requested: float, used: float, seconds: float) -> None:
        """Learn from an answer that has ended."""
        self.requested_output += requested
        self.used_output += used
        self.answer_seconds += seconds
        self.ended_answers += 1
        if self.ended_answers >= OUTPUT_MEMORY_ANSWERS:
            self.requested_output /= 2
            self.used_output /= 2
            self.answer_seconds /= 2
            self.ended_answers //= 2

    def remaining_seconds(self, now: float) -> float:
        """Return how long the answers in flight will last, by the mean of the ended ones.

        Answers that started one after another end one after another: the last one ends after a
        whole mean duration, which is twice what is left of an answer of mean age.
        """
        if not self.ended_answers or not self.in_flight:
            return 0.0
        mean, age = (
            self.answer_seconds / self.ended_answers,
            now - self.start_times_sum / self.in_flight,
        )
        return max(0.0, min(mean, 2 * (mean - age)))

    def used_share(self, now: float) -> float:
        """Return the share of its `max_output` that an answer uses, on average."""
        if not self.ended_answers or not self.requested_output:
            return 1.0
        seconds_in_flight = max(0.0, self.in_flight * now - self.start_times_sum)
        factor = 1.0 + seconds_in_flight / self.answer_seconds if self.answer_seconds else 2.0
        used = self.used_output * factor
        weight = PRIOR_ANSWERS / (PRIOR_ANSWERS + self.ended_answers)
        return min(1.0, weight + (1.0 - weight) * used / self.requested_output)
