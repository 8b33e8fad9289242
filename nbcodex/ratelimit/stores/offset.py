"""How far a server's clock is ahead of ours, from round trips. Pure; bounded, not just estimated.

A stamp that the server made between our sending and our receiving bounds the difference from both
sides, whatever the way took in each direction. The narrowest bounds are kept, and widened by what
the clocks may drift apart meanwhile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DRIFT = 5e-4
"""Seconds by which two clocks may part in a second: as fast as one that is being put right."""


@dataclass(slots=True)
class Offset:
    """The bounds of server time minus our time.

    Parameters
    ----------
    low, high : float
        The bounds; infinite before the first stamp.
    at : float
        When they were found, by our clock.
    """

    low: float = -math.inf
    high: float = math.inf
    at: float = 0.0

    @property
    def value(self) -> float:
        """The offset in seconds, wrong by at most `error`."""
        return (self.low + self.high) / 2

    @property
    def error(self) -> float:
        """By how much `value` may be wrong."""
        return (self.high - self.low) / 2

    def observe(self, stamp: float, *, sent_at: float, received_at: float) -> bool:
        """Learn from the server's `stamp`; return False if one of the clocks has jumped.

        The bounds are then those of this stamp alone.
        """
        wider = DRIFT * max(0.0, received_at - self.at)
        low, high = stamp - received_at, stamp - sent_at
        steady = low <= self.high + wider and high >= self.low - wider
        if steady:
            low, high = max(low, self.low - wider), min(high, self.high + wider)
        self.low, self.high, self.at = low, high, received_at
        return steady
