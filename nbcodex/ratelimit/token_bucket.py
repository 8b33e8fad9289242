"""A server's token bucket as seen from outside: projected forward, and corrected by snapshots.

Pure arithmetic: every function is given the time. Must not know what is counted, nor who waits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Shares of the limit: a bucket this close to its limit is full, two limits this close are equal.
FULL_TOLERANCE, SAME_LIMIT_TOLERANCE = 1e-6, 1e-3

# Knowledge about a limit is relied on for so long if nothing confirms it: an account may be given
# a larger one, and some refusals are odd.
LIMIT_TRUST_S = 600.0

# What others on the same key take is estimated by a moving average that adopts this share of each
# second's error, so 10 s make a habit. A single surprise must not slow a bucket for long, so the
# habit is only assumed to continue for DRAIN_TRUST_S. Worth 1 point of 429s beside such a client.
DRAIN_LEARNING_RATE, DRAIN_TRUST_S = 0.1, 10.0


@dataclass(frozen=True, slots=True)
class LevelMark:
    """The level as projected just after something was taken, to compare with its snapshot."""

    level: float
    correction: float  # the sum of the corrections made until then


@dataclass(slots=True)
class TokenBucket:
    """A level that rises continuously up to `limit`. The fields' order is their form in stores."""

    limit: float = math.inf  # infinite while unknown: then only changes of the level are tracked
    rate: float = 0.0  # refill per second
    level: float = 0.0  # at `updated_at`; negative in debt, and while the limit is unknown
    updated_at: float = 0.0
    correction: float = 0.0  # the sum of all corrections, to bring older marks up to date
    # A shorter window that the server does not state fills and empties together with the stated
    # one. So their levels differ by a constant while neither is full: `unusable` is there, and
    # cannot be used (else a window of 1 s refuses 54 to 84 % of the requests).
    hidden_floor: float = 0.0
    lowest_hidden_floor: float = math.inf
    hidden_refusal_at: float = -math.inf  # when a refusal last showed that window
    foreign_rate: float = 0.0  # what others on the same key take in a second, on average
    observed_at: float = 0.0  # when a snapshot last accounted for that

    @property
    def is_known(self) -> bool:
        """Whether the limit is known."""
        return self.limit < math.inf

    @property
    def burst_capacity(self) -> float:
        """How much can be used at once when it is full."""
        return self.limit - self.hidden_floor

    def has_limit(self, limit: float) -> bool:
        """Return whether a stated limit is the one that is known."""
        return self.is_known and abs(self.limit - limit) <= SAME_LIMIT_TOLERANCE * self.limit

    def level_at(self, now: float) -> float:
        """Return the projected level at an instant that is not past."""
        return min(self.limit, self.level + max(0.0, now - self.updated_at) * self.rate)

    def available_at(self, amount: float, now: float) -> float:
        """Return the earliest instant at which `amount` is there; now while nothing is known."""
        if not self.is_known:
            return now
        # What is larger than the whole goes when the bucket is full: the server decides.
        amount = min(amount + self.hidden_floor, self.limit * (1 - FULL_TOLERANCE))
        unseen = min(DRAIN_TRUST_S, max(0.0, now - self.observed_at))
        level = self.level + max(0.0, now - self.updated_at) * self.rate
        missing = amount - min(self.limit, level - self.foreign_rate * unseen)
        if missing <= 0:
            return now
        # Others are assumed to continue for the rest of DRAIN_TRUST_S; after that, the full rate.
        trusted, net_rate = DRAIN_TRUST_S - unseen, self.rate - self.foreign_rate
        if missing <= trusted * net_rate:
            return now + missing / net_rate
        return now + trusted + (missing - trusted * net_rate) / self.rate

    def take(self, amount: float, now: float) -> LevelMark:
        """Take `amount` (a negative one is a refund), and mark the level after it."""
        if self.hidden_floor and self.level_at(now) >= self.limit * (1 - FULL_TOLERANCE):
            is_stale = now - self.hidden_refusal_at > LIMIT_TRUST_S
            self.lowest_hidden_floor = math.inf if is_stale else self.lowest_hidden_floor
            self.hidden_floor = 0.0 if is_stale else self.lowest_hidden_floor
        self._add(-amount, now)
        return LevelMark(self.level, self.correction)

    def undo(self, amount: float, now: float) -> None:
        """Add what was never taken: marks made since were made without it, and are corrected."""
        self._add(amount, now)
        self.correction += amount

    def error(self, mark: LevelMark, remaining: float, *, elapsed: float) -> float:
        """Return by how much the `remaining` of a snapshot exceeds the projection.

        It belongs to the request of the `mark`, which the server let in `elapsed` seconds later.
        """
        projected = min(self.limit, mark.level + max(0.0, elapsed) * self.rate)
        return remaining - projected - (self.correction - mark.correction)

    def correct(
        self, error: float, now: float, *, taken_at: float, learns_foreign_rate: bool
    ) -> None:
        """Correct the level by the `error` of a snapshot taken at an instant."""
        # It shows no drain if only refusals bring snapshots, or if its limit is another than the
        # error was projected with: a limit that falls is not what others take.
        if self.is_known and learns_foreign_rate:
            expected = -self.foreign_rate * max(0.0, taken_at - self.observed_at)
            drain = self.foreign_rate - DRAIN_LEARNING_RATE * (error - expected)
            self.foreign_rate = min(self.rate / 2, max(0.0, drain))
        self.observed_at = max(self.observed_at, taken_at)
        self._add(error, now)
        self.correction += error

    def set_limit(self, limit: float, rate: float, *, now: float, since: float) -> None:
        """Take over a stated limit. If it is the first, count what has flowed in since `since`."""
        if self.is_known:
            self.hidden_floor *= limit / self.limit
            self.lowest_hidden_floor *= limit / self.limit
            self.level = min(limit, self.level_at(now))
            self.updated_at = max(self.updated_at, now)
        else:
            self.updated_at = min(since, now)
        self.limit, self.rate = limit, rate
        self.foreign_rate = min(self.foreign_rate, rate / 2)

    def set_hidden_floor(self, unusable: float, now: float) -> None:
        """Take note of a shorter, unstated window that keeps so much from being used."""
        self.hidden_floor, self.hidden_refusal_at = min(self.limit, max(0.0, unusable)), now
        self.lowest_hidden_floor = min(self.lowest_hidden_floor, self.hidden_floor)

    def _add(self, amount: float, now: float) -> None:
        self.level = min(self.limit, self.level_at(now) + amount)
        self.updated_at = max(self.updated_at, now)
