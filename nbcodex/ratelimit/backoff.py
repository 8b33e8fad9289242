"""Computes the wait after a refused or failed attempt. It does not wait itself."""

from __future__ import annotations

import random
from dataclasses import dataclass

# Added to every wait that a server states: servers round, and clocks differ.
STATED_WAIT_PAD_S = 0.02
# Stated waits are jittered upwards by up to this share of them, but by at most MAX_JITTER_S.
JITTER_SHARE, MAX_JITTER_S = 0.05, 5.0
# Exponential backoff, where the server states no wait.
BACKOFF_INITIAL_S, BACKOFF_FACTOR, BACKOFF_MAX_S = 1.0, 2.0, 60.0


def with_jitter(wait: float, rng: random.Random) -> float:
    """Return the seconds to wait where the server asks for `wait`: never less than that."""
    return wait + STATED_WAIT_PAD_S + rng.uniform(0.0, min(JITTER_SHARE * wait, MAX_JITTER_S))


@dataclass(slots=True)
class RetryBudget:
    """Bounds the retries after faults of one server, so that they do not make an outage worse.

    As in Finagle's RetryBudget, ten successes allow one retry, and so do ten seconds. All requests
    to the server share the budget.
    """

    max_saved: float = 10.0  # this and the next three are numbers of retries
    per_success: float = 0.1
    per_second: float = 0.1
    _saved: float = 10.0
    _updated_at: float | None = None

    def record_success(self, now: float) -> None:
        """Add `per_success` to what is saved."""
        self._accrue(now)
        self._saved = min(self.max_saved, self._saved + self.per_success)

    def spend(self, now: float) -> float:
        """Take one retry and return the seconds until it is allowed: 0 if one was saved."""
        self._accrue(now)
        self._saved -= 1.0
        return max(0.0, -self._saved / self.per_second)

    def _accrue(self, now: float) -> None:
        passed = 0.0 if self._updated_at is None else now - self._updated_at
        self._saved = min(self.max_saved, self._saved + passed * self.per_second)
        self._updated_at = now
