"""What a server charges for a request, and how much output answers use: both are learned.

No header states the charge policy, so three projections of the token bucket are compared with the
snapshots. *kept*: input and the whole bound on output, for good. *refunded*: the same, the unused
output given back at the end. *actual*: input at admission, output at the end. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nbcodex.ratelimit.token_bucket import LevelMark, TokenBucket

ChargePolicy = Literal["kept", "refunded", "actual"]
CHARGE_POLICIES: tuple[ChargePolicy, ...] = ("kept", "refunded", "actual")
KEPT, ACTUAL = 0, 2  # indexes: the policy that is safe under every server, the one charging later

# Snapshots are judged by windows: the order of requests on the way is noise that evens out over
# 0.4 s. A window that shows nothing for 5 s is restarted, or slow drift would count as evidence.
WINDOW_S, STALE_WINDOW_S = 0.4, 5.0
# The projections must differ by this many typical requests before a window counts.
MIN_DIVERGENCE_REQUESTS = 3.0
# A judgement counts 0.8 times as much one window later. With scores of at most 1 a window, a lead
# of 1.5 takes at least two windows; a policy that is 0.5 behind is no longer assumed possible.
SCORE_DECAY, SWITCH_LEAD, DISMISSED_LEAD = 0.8, 1.5, 0.5
TYPICAL_REQUEST_LEARNING_RATE = 0.02

# Before answers have come, as if so many had used their whole bound.
PRIOR_ANSWERS = 5.0
# After so many answers, the earlier ones count half.
OUTPUT_MEMORY_ANSWERS = 1_000


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request asks of the limits: estimated input, and the most output it may use."""

    input_tokens: float
    max_output: float

    @property
    def total(self) -> float:
        """Input and output."""
        return self.input_tokens + self.max_output


@dataclass(slots=True)
class Permit:
    """Leave to send one request, and what has become of it."""

    name: str  # of the limits that it was taken from
    cost: Cost
    issued_at: float
    number: int  # in the order of sending
    is_probe: bool  # goes through a cooldown
    token_marks: tuple[LevelMark, ...]  # of the three token projections, just after it was taken
    request_mark: LevelMark  # of the bucket of requests
    input_tokens: float  # the input as charged here: the estimate times what the server counts
    is_answered: bool = False  # let in, refused, or ended without a verdict
    is_closed: bool = False
    sent_at: float = 0.0  # when it really went; infinite until then
    model_id: int = 0  # of the model that it was taken from
    share_id: int = 0  # of the holder's share that counts it
    is_orphaned: bool = False  # that model is lost, so its marks mean nothing

    def restore(self, other: Permit) -> None:
        """Undo what has become of it since it was like `other`."""
        self.token_marks, self.share_id = other.token_marks, other.share_id
        self.is_answered, self.is_closed = other.is_answered, other.is_closed
        self.is_orphaned = other.is_orphaned

    def shift_marks(self, amounts: tuple[float, ...]) -> None:
        """Correct the marks: the projections held so much more when they were made."""
        pairs = zip(self.token_marks, amounts, strict=True)
        self.token_marks = tuple(LevelMark(m.level + amount, m.correction) for m, amount in pairs)


def _zeros() -> list[float]:
    return [0.0] * len(CHARGE_POLICIES)


@dataclass(slots=True)
class ChargePolicyEstimator:
    """Three projections over the same events, scored by how well they predict the snapshots.

    The fields' order is their form in stores.
    """

    buckets: list[TokenBucket] = field(
        default_factory=lambda: [TokenBucket() for _ in CHARGE_POLICIES]
    )
    scores: list[float] = field(default_factory=_zeros)  # lower is better
    window_errors: list[float] = field(default_factory=_zeros)
    window_start_at: float | None = None
    chosen: int = KEPT
    typical_request: float = 0.0  # tokens, output bound included

    @property
    def policy(self) -> ChargePolicy:
        """The policy that is assumed."""
        return CHARGE_POLICIES[self.chosen]

    @property
    def bucket(self) -> TokenBucket:
        """The projection for the policy that is assumed."""
        return self.buckets[self.chosen]

    @property
    def may_charge_later(self) -> bool:
        """Whether answers may yet be charged at their end, as no evidence speaks against it.

        Snapshots correct what a wrong policy has projected, but show no charge that is yet to
        come: trusted at once, 300 requests on a tenth of a minute's tokens met two refusals.
        """
        return self.scores[ACTUAL] - self.scores[self.chosen] < DISMISSED_LEAD

    def charge(self, tokens: float, output: float, now: float) -> tuple[LevelMark, ...]:
        """Charge a request of `tokens` input and at most `output` output to all buckets."""
        total = tokens + output
        rate = TYPICAL_REQUEST_LEARNING_RATE if self.typical_request else 1.0
        self.typical_request += (total - self.typical_request) * rate
        charges = (total, total, tokens)
        return tuple(b.take(c, now) for b, c in zip(self.buckets, charges, strict=True))

    def settle(self, output: float, used: float, now: float) -> tuple[float, ...]:
        """Enter the end of a request that used `used` of `output`; return each refund."""
        refunds = (0.0, output - used, -used)
        for bucket, amount in zip(self.buckets, refunds, strict=True):
            bucket.take(-amount, now)
        return refunds

    def undo_charge(self, tokens: float, output: float, now: float) -> None:
        """Take out a request that was never charged."""
        total = tokens + output
        for bucket, amount in zip(self.buckets, (total, total, tokens), strict=True):
            bucket.undo(amount, now)

    def observe(
        self,
        permit: Permit,
        remaining: float,
        elapsed: float,
        now: float,
        *,
        learns_foreign_rate: bool,
    ) -> tuple[float, ...]:
        """Correct all three by a snapshot; return the error of each."""
        taken_at, pairs = (
            permit.issued_at + elapsed,
            zip(self.buckets, permit.token_marks, strict=True),
        )
        errors = tuple(b.error(m, remaining, elapsed=elapsed) for b, m in pairs)
        for index, (bucket, error) in enumerate(zip(self.buckets, errors, strict=True)):
            if bucket.is_known:
                self.window_errors[index] += error
            bucket.correct(error, now, taken_at=taken_at, learns_foreign_rate=learns_foreign_rate)
        return errors

    def score_window(self, at: float, *, snapshots_are_rare: bool = False) -> None:
        """Score the window that ends with the snapshot of an instant, if it shows enough."""
        if self.window_start_at is None:
            self._restart_window(at)
            return
        age = at - self.window_start_at
        divergence = max(self.window_errors) - min(self.window_errors)
        if age < WINDOW_S or divergence <= MIN_DIVERGENCE_REQUESTS * self.typical_request:
            if age > STALE_WINDOW_S and not snapshots_are_rare:
                self._restart_window(at)
            return
        # Summed with their sign: what one snapshot shows too early, the next shows too late.
        errors = [abs(e) for e in self.window_errors]
        least = min(errors)
        for index, error in enumerate(errors):
            score = min(1.0, (error - least) / divergence)
            self.scores[index] = SCORE_DECAY * self.scores[index] + score
        self._restart_window(at)
        best = min(range(len(CHARGE_POLICIES)), key=self.scores.__getitem__)
        if self.scores[self.chosen] - self.scores[best] >= SWITCH_LEAD:
            self.chosen = best

    def choose_optimistic(self, now: float) -> None:
        """Assume the policy that allows most among those that the evidence does not rule out."""
        # Where answers carry no limits, only a refusal shows anything: what is never tried is never
        # learned.
        best = min(self.scores)
        likely = [i for i, score in enumerate(self.scores) if score - best < SWITCH_LEAD]
        self.chosen = max(likely, key=lambda i: self.buckets[i].level_at(now))

    def reset(self) -> None:
        """Go back to the safe policy, and collect evidence anew."""
        self.chosen, self.scores = KEPT, _zeros()
        self._restart_window(None)

    def _restart_window(self, at: float | None) -> None:
        self.window_start_at, self.window_errors = at, _zeros()


@dataclass(slots=True)
class OutputEstimator:
    """The mean share of its bound that an answer uses. The fields' order is their form in stores.

    Short answers end first, and would make the mean too small: the time that those in flight have
    taken so far counts as if they had produced output at the usual pace.
    """

    requested: float = 0.0  # bounds of the answers that have ended
    used: float = 0.0  # what those used
    seconds: float = 0.0  # what those took
    ended: int = 0
    in_flight: int = 0
    requested_in_flight: float = 0.0
    start_sum: float = 0.0  # of the instants at which those in flight started

    def count_started(self, requested: float, now: float) -> None:
        """Count a request that is sent."""
        self.in_flight += 1
        self.requested_in_flight += requested
        self.start_sum += now

    def drop(self, requested: float, started_at: float) -> None:
        """Remove a request from those in flight."""
        self.in_flight -= 1
        self.requested_in_flight -= requested
        self.start_sum -= started_at
        if not self.in_flight:
            self.requested_in_flight = self.start_sum = 0.0  # rounding errors must not add up

    def record(self, requested: float, used: float, seconds: float) -> None:
        """Learn from an answer that has ended."""
        self.requested += requested
        self.used += used
        self.seconds += seconds
        self.ended += 1
        if self.ended >= OUTPUT_MEMORY_ANSWERS:
            self.requested, self.used = self.requested / 2, self.used / 2
            self.seconds, self.ended = self.seconds / 2, self.ended // 2

    def remaining_seconds(self, now: float) -> float:
        """Return how long the answers in flight continue, by the mean of those that have ended.

        Where they started one after another they end so: the last one after the whole mean, which
        is twice what is left of an answer of mean age.
        """
        if not self.ended or not self.in_flight:
            return 0.0
        mean, age = self.seconds / self.ended, now - self.start_sum / self.in_flight
        return max(0.0, min(mean, 2 * (mean - age)))

    def share(self, now: float) -> float:
        """Return the share of its bound that an answer uses, on average."""
        if not self.ended or not self.requested:
            return 1.0
        pending = max(0.0, self.in_flight * now - self.start_sum)
        used = self.used * (1.0 + pending / self.seconds if self.seconds else 2.0)
        weight = PRIOR_ANSWERS / (PRIOR_ANSWERS + self.ended)
        return min(1.0, weight + (1.0 - weight) * used / self.requested)
