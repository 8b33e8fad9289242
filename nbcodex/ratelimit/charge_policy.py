"""What a server charges for a request, and how much output answers use: both are learned.

*kept*: input and the whole `max_output` are charged at admission. *refunded*: the same, and unused
output is refunded when the answer ends. *actual*: input is charged at admission, and the output
when the answer ends. No header states the policy, so there is one token bucket for each policy, and
their levels are compared with the levels that the server states. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from nbcodex.ratelimit.token_bucket import LevelMark, TokenBucket

ChargePolicy = Literal["kept", "refunded", "actual"]
CHARGE_POLICIES: tuple[ChargePolicy, ...] = ("kept", "refunded", "actual")
ACTUAL_INDEX = CHARGE_POLICIES.index("actual")
ZEROS = (0.0,) * len(CHARGE_POLICIES)

# The errors of each policy's bucket are summed over a period. It lasts at least MIN_PERIOD_S, since
# requests arrive out of order, and until the sums differ by so many typical requests.
MIN_PERIOD_S, MIN_DIVERGENCE_REQUESTS = 0.4, 3.0
# At the end of a period, each score is multiplied by SCORE_DECAY, and the policy's error is added,
# scaled to 0 for the best policy and 1 for the worst. A policy is assumed if its score is lower by
# SWITCH_LEAD than that of the assumed one, which takes two periods at least. *actual* is ruled out
# if its score is higher by RULED_OUT_LEAD.
SCORE_DECAY, SWITCH_LEAD, RULED_OUT_LEAD = 0.8, 1.5, 0.5
TYPICAL_REQUEST_LEARNING_RATE = 0.02

PRIOR_ANSWERS = 5.0  # as if so many answers had used all of their `max_output` before
OUTPUT_MEMORY_ANSWERS = 1_000  # after so many the sums are halved, so that later answers count more


@dataclass(frozen=True, slots=True)
class Need:
    """The tokens that a request asks a limit for."""

    input_tokens: float  # an estimate
    max_output: float
    has_max_output: bool = True  # the request states `max_output`; otherwise that is a guess

    @property
    def total_tokens(self) -> float:
        """Input and output."""
        return self.input_tokens + self.max_output


@dataclass(slots=True)
class Permit:
    """The permission to send one attempt, with what was charged for it."""

    limits_id: str  # the hashed name of the limits
    need: Need
    issued_at: float
    # A `LimitModel` has the limits of one model and account; a `SharedModel` adds the processes.
    sequence_number: int  # counts the permits of a `LimitModel`
    is_probe: bool  # sent during a cooldown, to find out whether it is over
    token_marks: tuple[LevelMark, ...]  # of the bucket of each charge policy
    request_mark: LevelMark  # of the bucket of requests
    input_tokens: float  # as charged: the estimate times `LimitModel.input_ratio`
    has_response: bool = False  # the server has admitted or refused it, or it has ended
    has_ended: bool = False
    sent_at: float = 0.0  # infinite from `Limiter.acquire` until the attempt is sent
    model_id: int = 0  # of the `SharedModel` that was charged
    share_id: int = 0  # of the `ProcessShare` that counts it as in flight
    charge_is_lost: bool = False  # the charged `SharedModel` was lost, so the marks mean nothing

    def restore(self, earlier: Permit) -> None:
        """Undo the changes that a transaction has made since the copy `earlier`."""
        self.token_marks, self.share_id = earlier.token_marks, earlier.share_id
        self.has_response, self.has_ended = earlier.has_response, earlier.has_ended
        self.charge_is_lost = earlier.charge_is_lost

    def add_earlier_refunds(self, refunds: tuple[float, ...]) -> None:
        """Add to the marks what the server refunded before this request reached it."""
        pairs = zip(self.token_marks, refunds, strict=True)
        self.token_marks = tuple(replace(mark, level=mark.level + refund) for mark, refund in pairs)


@dataclass(slots=True)
class ChargePolicyEstimator:
    """A token bucket for each charge policy, and its errors. Stores keep the fields' order."""

    buckets: list[TokenBucket] = field(
        default_factory=lambda: [TokenBucket() for _ in CHARGE_POLICIES]
    )
    scores: list[float] = field(default_factory=lambda: [*ZEROS])  # lower is better
    period_errors: list[float] = field(default_factory=lambda: [*ZEROS])  # signed sums
    period_start_at: float | None = None
    assumed_index: int = 0  # of the assumed policy; at first *kept*, which is safe with any server
    typical_request: float = 0.0  # the mean tokens of a request, with the whole `max_output`

    def __post_init__(self) -> None:
        lengths = {len(self.buckets), len(self.scores), len(self.period_errors)}
        if lengths != {len(CHARGE_POLICIES)} or not 0 <= self.assumed_index < len(CHARGE_POLICIES):
            raise ValueError("one figure for each charge policy is needed")  # damaged in a store

    @property
    def policy(self) -> ChargePolicy:
        """The assumed policy."""
        return CHARGE_POLICIES[self.assumed_index]

    @property
    def bucket(self) -> TokenBucket:
        """The bucket of the assumed policy."""
        return self.buckets[self.assumed_index]

    @property
    def may_charge_at_end(self) -> bool:
        """Whether output may be charged when answers end: the scores do not rule *actual* out."""
        # Snapshots correct the level of a wrong policy's bucket, but they do not show the charges
        # that answers in flight will cause: without this, two of 300 requests were refused.
        return self.scores[ACTUAL_INDEX] - self.scores[self.assumed_index] < RULED_OUT_LEAD

    def charge(self, input_tokens: float, max_output: float, now: float) -> tuple[LevelMark, ...]:
        """Charge a request to the bucket of each policy; return the marks."""
        total = input_tokens + max_output
        rate = TYPICAL_REQUEST_LEARNING_RATE if self.typical_request else 1.0
        self.typical_request += (total - self.typical_request) * rate
        charges = (total, total, input_tokens)  # in the order of CHARGE_POLICIES
        return tuple(b.take(c, now) for b, c in zip(self.buckets, charges, strict=True))

    def settle(self, max_output: float, used_output: float, now: float) -> tuple[float, ...]:
        """Apply the end of a request; return what each policy refunds (negative: charges)."""
        refunds = (0.0, max_output - used_output, -used_output)
        for bucket, amount in zip(self.buckets, refunds, strict=True):
            bucket.take(-amount, now)
        return refunds

    def undo_charge(self, input_tokens: float, max_output: float, now: float) -> None:
        """Add back what the server never charged; unlike a refund, this corrects the marks."""
        total = input_tokens + max_output
        for bucket, amount in zip(self.buckets, (total, total, input_tokens), strict=True):
            bucket.undo(amount, now)

    def observe(
        self, permit: Permit, remaining: float, elapsed: float, now: float, *, others_took: bool
    ) -> None:
        """Correct the buckets by the `remaining` tokens stated `elapsed` seconds after a permit.

        `others_took`: an error is taken for the use of other clients with the same key.
        """
        taken_at = permit.issued_at + elapsed
        pairs = zip(self.buckets, permit.token_marks, strict=True)
        for index, (bucket, mark) in enumerate(pairs):
            error = bucket.error(mark, remaining, elapsed=elapsed)
            if bucket.is_known:  # its limit
                self.period_errors[index] += error
            bucket.correct(error, now, taken_at=taken_at, others_took=others_took)

    def score_period(self, at: float) -> None:
        """End the period at a snapshot, if its errors differ enough to score the policies."""
        if self.period_start_at is None:
            self.period_start_at = at
            self.period_errors = [*ZEROS]
        # A request that arrives out of order causes two opposite errors, whose sum is about 0.
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
        self.period_start_at, self.period_errors = at, [*ZEROS]

    def assume_most_permissive(self, now: float) -> None:
        """Assume the policy whose bucket is fullest, of those within SWITCH_LEAD of the best."""
        # Without headers only a refusal can show that a policy is wrong, so it has to be tried.
        best = min(self.scores)
        likely = [i for i, score in enumerate(self.scores) if score - best < SWITCH_LEAD]
        self.assumed_index = max(likely, key=lambda i: self.buckets[i].level_at(now))


@dataclass(slots=True)
class OutputEstimator:
    """Estimates which share of its `max_output` an answer uses. Stores keep the fields' order.

    Short answers end first, so their mean share is too small. As with other censored data, the
    output of the answers in flight, at the mean speed, is added to that of the ended ones.
    """

    requested_output: float = 0.0  # the sum of the `max_output` of ended answers
    used_output: float = 0.0  # the sum of what they used
    answer_seconds: float = 0.0  # the sum of their durations
    ended_answers: int = 0
    in_flight: int = 0
    requested_in_flight: float = 0.0  # the sum of the `max_output` of answers in flight
    start_times_sum: float = 0.0  # the sum of the instants at which they started

    def count_in_flight(self, max_output: float, started_at: float, *, sign: int = 1) -> None:
        """Add a request to those in flight; with `sign=-1`, remove it."""
        self.in_flight += sign
        self.requested_in_flight += sign * max_output
        self.start_times_sum += sign * started_at
        if not self.in_flight:
            self.requested_in_flight = self.start_times_sum = 0.0  # drops the rounding errors

    def record(self, max_output: float, used_output: float, seconds: float) -> None:
        """Learn from an answer that has ended."""
        self.requested_output += max_output
        self.used_output += used_output
        self.answer_seconds += seconds
        self.ended_answers += 1
        if self.ended_answers >= OUTPUT_MEMORY_ANSWERS:
            self.requested_output /= 2
            self.used_output /= 2
            self.answer_seconds /= 2
            self.ended_answers //= 2

    def remaining_seconds(self, now: float) -> float:
        """Return how long the answers in flight will last, if they take the mean duration."""
        if not self.ended_answers or not self.in_flight:
            return 0.0
        mean = self.answer_seconds / self.ended_answers
        age = now - self.start_times_sum / self.in_flight
        # If the answers started at regular intervals, an answer of mean age has half as long to go
        # as the youngest one, which is the last to end.
        return max(0.0, min(mean, 2 * (mean - age)))

    def used_share(self, now: float) -> float:
        """Return the mean share of its `max_output` that an answer uses."""
        if not self.ended_answers or not self.requested_output:
            return 1.0
        seconds_in_flight = max(0.0, self.in_flight * now - self.start_times_sum)
        factor = 1.0 + seconds_in_flight / self.answer_seconds if self.answer_seconds else 2.0
        used = self.used_output * factor
        weight = PRIOR_ANSWERS / (PRIOR_ANSWERS + self.ended_answers)
        return min(1.0, weight + (1.0 - weight) * used / self.requested_output)
