"""How long a refused or broken attempt waits: pure arithmetic, apart from all waiting."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

STATED_WAIT_PAD_S = 0.02
"""Seconds added to every wait that the server states: it rounds, and clocks differ."""
JITTER_SHARE, MAX_JITTER_S = 0.05, 5.0
"""Stated waits are jittered upwards by up to a twentieth, and by five seconds at the most."""
BACKOFF_INITIAL_S, BACKOFF_FACTOR, BACKOFF_MAX_S = 1.0, 2.0, 60.0
"""Exponential backoff where nobody states a wait: seconds, growth, and bound."""


def stated_wait(wait: float, chance: random.Random) -> float:
    """Return the seconds to wait where the server asks for `wait`: never less than that."""
    return wait + STATED_WAIT_PAD_S + chance.uniform(0.0, min(JITTER_SHARE * wait, MAX_JITTER_S))


@dataclass(slots=True)
class RetryBudget:
    """How many retries of faults a server may cost, so that an outage is not made worse.

    A tenth of what succeeded, over a floor of one retry in ten seconds; both saved up to `size`.
    Used by everything that goes to one server. After Finagle's RetryBudget.

    Parameters
    ----------
    size : float
        Retries that can be saved up.
    share : float
        Retries earned by a success.
    rate : float
        Retries earned by a second.
    """

    size: float = 10.0
    share: float = 0.1
    rate: float = 0.1
    _saved: float = field(default=10.0)
    _at: float | None = field(default=None)

    def record_success(self, now: float) -> None:
        """Earn from a success."""
        self._earn(now)
        self._saved = min(self.size, self._saved + self.share)

    def spend(self, now: float) -> float:
        """Take one retry and return the seconds until it is earned (0 if it was saved)."""
        self._earn(now)
        self._saved -= 1.0
        return max(0.0, -self._saved / self.rate)

    def _earn(self, now: float) -> None:
        if self._at is not None:
            self._saved = min(self.size, self._saved + (now - self._at) * self.rate)
        self._at = now
