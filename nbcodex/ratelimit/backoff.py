"""Computes the wait after a refused or failed attempt. It does not wait itself."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from dataclasses import dataclass, field

STATED_WAIT_PAD_S = 0.02  # added to a wait that a server states: servers round, and clocks differ
# Stated waits are jittered upwards by up to this share of them, but by at most MAX_JITTER_S.
JITTER_SHARE, MAX_JITTER_S = 0.05, 5.0
# Exponential backoff, where the server states no wait.
BACKOFF_INITIAL_S, BACKOFF_FACTOR, BACKOFF_MAX_S = 1.0, 2.0, 60.0


def with_jitter(wait: float, rng: random.Random) -> float:
    """Return the seconds to wait where the server asks for `wait`: never less than that."""
    return wait + STATED_WAIT_PAD_S + rng.uniform(0.0, min(JITTER_SHARE * wait, MAX_JITTER_S))


# A retry budget: the most retries that are saved, and how many a success and a second add.
MAX_SAVED_RETRIES, RETRIES_PER_SUCCESS, RETRIES_PER_S = 10.0, 0.1, 0.1
# How many waits for the budget a success ends: a recovered server's load doubles with each answer.
# So retries are not bounded while a part of the requests succeeds; backoff spaces them out.
RELEASED_PER_SUCCESS = 2


@dataclass(slots=True)
class RetryBudget:
    """Bounds the retries after faults of one server, so that they do not make an outage worse.

    It is Finagle's RetryBudget, with one difference: a success also releases waits. All requests to
    the server share it.
    """

    _saved: float = MAX_SAVED_RETRIES  # negative: so many retries wait for the budget
    _updated_at: float = -math.inf
    # The events that end waits for this budget, in the order in which those began.
    waiting: dict[asyncio.Event, None] = field(default_factory=dict)

    def record_success(self, now: float) -> None:
        """Save a part of a retry, and release retries that wait: the server answers again."""
        self._accrue(now)
        self._saved = min(MAX_SAVED_RETRIES, max(0.0, self._saved) + RETRIES_PER_SUCCESS)
        for event in list(itertools.islice(self.waiting, RELEASED_PER_SUCCESS)):
            del self.waiting[event]
            event.set()

    def spend(self, now: float) -> float:
        """Take one retry and return the seconds until it is allowed: 0 if one was saved."""
        self._accrue(now)
        self._saved -= 1.0
        return max(0.0, -self._saved / RETRIES_PER_S)

    def _accrue(self, now: float) -> None:
        earned = (now - self._updated_at) * RETRIES_PER_S
        self._saved, self._updated_at = min(MAX_SAVED_RETRIES, self._saved + earned), now
