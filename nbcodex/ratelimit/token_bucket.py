"""A server's token bucket as seen from outside: projected forward, and corrected by snapshots.

A snapshot is what the headers of one response state. Pure: every function is given the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nbcodex.models import DAY

# Shares of the limit: a bucket this close to its limit is full, two limits this close are equal.
FULL_TOLERANCE, SAME_LIMIT_TOLERANCE = 1e-6, 1e-3

# A limit that no response confirms is trusted for this long: an account may get a larger limit,
# and some refusals state absurd figures.
LIMIT_TRUST_S = 600.0
MAX_WINDOW_S, MIN_LIMIT = 31 * DAY, 1.0  # limits beyond these are not believed

# The rate at which other clients use the same limit is a moving average with this learning rate per
# second. It is assumed to continue for FOREIGN_TRUST_S after a snapshot, so that one large error
# does not slow the bucket for long. Beside a client that takes 30 % of the limit, this reduces the
# share of 429s by 1 percentage point.
FOREIGN_LEARNING_RATE, FOREIGN_TRUST_S = 0.1, 10.0


@dataclass(frozen=True, slots=True)
class LevelMark:
    """A bucket's level just after a request was charged, to compare with that of its response."""

    level: float
    correction: float  # the bucket's `correction` then


@dataclass(slots=True)
class TokenBucket:
    """A level that rises continuously up to `limit`. Stores keep the fields in this order."""

    limit: float = math.inf  # infinite while unknown: then only changes of the level are tracked
    rate: float = 0.0  # refill per second
    level: float = 0.0  # at `updated_at`; negative in debt, and while the limit is unknown
    updated_at: float = 0.0
    correction: float = 0.0  # the sum of all corrections; marks made earlier lack the later ones
    # Some servers enforce a second limit over a shorter window that no header states. Both are
    # charged the same tokens and refill at the same rate, so while neither is full their levels
    # differ by a constant: the hidden one is empty when this level is at `hidden_floor`. Without
    # this, a hidden window of 1 s refuses 54 to 84 % of the requests.
    hidden_floor: float = 0.0
    lowest_hidden_floor: float = math.inf  # of all refusals by the hidden window
    hidden_refusal_at: float = -math.inf  # the last refusal by the hidden window
    foreign_rate: float = 0.0  # mean tokens per second that other clients with the same key take
    observed_at: float = 0.0  # the last snapshot

    @property
    def is_known(self) -> bool:
        """Whether the limit is known."""
        return self.limit < math.inf

    @property
    def is_plausible(self) -> bool:
        """Whether limit, refill rate and debt are within what any server has."""
        if not self.is_known:
            return True
        min_level = -max(self.limit, DAY * self.rate)
        return 0 < self.limit < 1.01 * MAX_WINDOW_S * self.rate and self.level >= min_level

    @property
    def burst_capacity(self) -> float:
        """The most that can be taken at once, from a full bucket."""
        return self.limit - self.hidden_floor

    def has_limit(self, limit: float) -> bool:
        """Return whether a stated limit is the known one."""
        return self.is_known and abs(self.limit - limit) <= SAME_LIMIT_TOLERANCE * self.limit

    def level_at(self, now: float) -> float:
        """Return the projected level at an instant after `updated_at`."""
        return min(self.limit, self.level + max(0.0, now - self.updated_at) * self.rate)

    def available_at(self, amount: float, now: float) -> float:
        """Return the earliest instant at which `amount` can be taken; `now` if nothing is known."""
        if not self.is_known:
            return now
        # A request larger than the bucket is sent when the bucket is full: the server decides.
        amount = min(amount + self.hidden_floor, self.limit * (1 - FULL_TOLERANCE))
        unobserved = min(FOREIGN_TRUST_S, max(0.0, now - self.observed_at))
        level = self.level + max(0.0, now - self.updated_at) * self.rate
        missing = amount - min(self.limit, level - self.foreign_rate * unobserved)
        if missing <= 0:
            return now
        # Others are assumed to continue for the rest of FOREIGN_TRUST_S; then the full rate counts.
        trusted, net_rate = FOREIGN_TRUST_S - unobserved, self.rate - self.foreign_rate
        if missing <= trusted * net_rate:
            return now + missing / net_rate
        return now + trusted + (missing - trusted * net_rate) / self.rate

    def take(self, amount: float, now: float) -> LevelMark:
        """Take `amount` (a negative one is a refund) and return a mark of the level after it."""
        if self.hidden_floor and self.level_at(now) >= self.limit * (1 - FULL_TOLERANCE):
            # While this bucket is full, the hidden one may go on filling, which lowers the floor:
            # the lowest one seen is assumed.
            is_stale = now - self.hidden_refusal_at > LIMIT_TRUST_S
            self.lowest_hidden_floor = math.inf if is_stale else self.lowest_hidden_floor
            self.hidden_floor = 0.0 if is_stale else self.lowest_hidden_floor
        self._add(-amount, now)
        return LevelMark(self.level, self.correction)

    def undo(self, amount: float, now: float) -> None:
        """Add back what the server never took, and correct the marks made since then."""
        self._add(amount, now)
        self.correction += amount

    def error(self, mark: LevelMark, remaining: float, *, elapsed: float) -> float:
        """Return by how much a snapshot exceeds the projection `elapsed` seconds after the mark."""
        projected = min(self.limit, mark.level + max(0.0, elapsed) * self.rate)
        return remaining - projected - (self.correction - mark.correction)

    def correct(self, error: float, now: float, *, taken_at: float, others_took: bool) -> None:
        """Correct the level by a snapshot's `error`; `others_took`: other clients caused it."""
        if self.is_known and others_took:
            expected = -self.foreign_rate * max(0.0, taken_at - self.observed_at)
            rate = self.foreign_rate - FOREIGN_LEARNING_RATE * (error - expected)
            self.foreign_rate = min(self.rate / 2, max(0.0, rate))
        self.observed_at = max(self.observed_at, taken_at)
        self.undo(error, now)

    def set_limit(self, limit: float, rate: float, *, now: float, stated_at: float) -> None:
        """Adopt a stated limit; the first one adds the refill since the instant `stated_at`."""
        if self.is_known:
            self.hidden_floor *= limit / self.limit
            self.lowest_hidden_floor *= limit / self.limit
            self.level = min(limit, self.level_at(now))
            self.updated_at = max(self.updated_at, now)
        else:
            self.updated_at = min(stated_at, now)
        self.limit, self.rate = limit, max(rate, limit / MAX_WINDOW_S)
        self.foreign_rate = min(self.foreign_rate, self.rate / 2)

    def set_hidden_floor(self, floor: float, now: float) -> None:
        """Record a refusal by a hidden window at a level of `floor`."""
        self.hidden_floor, self.hidden_refusal_at = min(self.limit, max(0.0, floor)), now
        self.lowest_hidden_floor = min(self.lowest_hidden_floor, self.hidden_floor)

    def _add(self, amount: float, now: float) -> None:
        self.level = min(self.limit, self.level_at(now) + amount)
        self.updated_at = max(self.updated_at, now)
