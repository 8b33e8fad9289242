"""How much of the output that requests ask for they use, learnt from the answers.

Pure arithmetic; must not know limits.
"""

from __future__ import annotations

from dataclasses import dataclass

PRIOR = 5.0
"""Requests that used all their output, assumed before any answer has come."""
RECENT = 1_000
"""Answers after which the older ones count half."""


@dataclass(slots=True)
class Output:
    """The mean share, not misled by the short answers, which are the first to end.

    Of `asked` tokens `used` were used by the answers that have ended; the time that those still
    under way have taken so far counts as if nothing had come of it yet.
    """

    asked: float = 0.0
    used: float = 0.0
    took: float = 0.0
    ended: int = 0
    under_way: int = 0
    asked_under_way: float = 0.0
    starts: float = 0.0

    def begin(self, asked: float, now: float) -> None:
        """A request goes."""
        self.under_way += 1
        self.asked_under_way += asked
        self.starts += now

    def drop(self, asked: float, at: float) -> None:
        """A request that went at `at` is no longer under way."""
        self.under_way -= 1
        self.asked_under_way -= asked
        self.starts -= at
        if not self.under_way:
            self.asked_under_way = self.starts = 0.0

    def end(self, asked: float, used: float, took: float) -> None:
        """An answer has ended."""
        self.asked += asked
        self.used += used
        self.took += took
        self.ended += 1
        if self.ended >= RECENT:
            self.asked, self.used, self.took = self.asked / 2, self.used / 2, self.took / 2
            self.ended //= 2

    def lasts(self, now: float) -> float:
        """Return for how long the answers under way go on, by the mean of those that have ended.

        Where they began one after another, they end so, too: the last of them after the whole mean.
        """
        if not self.ended or not self.under_way:
            return 0.0
        whole, age = self.took / self.ended, now - self.starts / self.under_way
        return max(0.0, min(whole, 2 * (whole - age)))

    def share(self, now: float) -> float:
        """Return the share of its bound that an answer uses, on average."""
        if not self.ended or not self.asked:
            return 1.0
        pending = max(0.0, self.under_way * now - self.starts)
        used = self.used * (1.0 + pending / self.took if self.took else 2.0)
        weight = PRIOR / (PRIOR + self.ended)
        return min(1.0, weight + (1.0 - weight) * used / self.asked)
