"""A server's token bucket as seen from outside: reckoned forward, and put right by snapshots.

Pure arithmetic: every function is told the time. Must not know what is counted, nor who waits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FULL, SAME = 1e-6, 1e-3
"""Share of the limit by which a full bucket may seem not to be; by which two are taken for one."""
LATELY = 600.0
"""Seconds for which what was learnt of a limit is relied on, if nothing bears it out: an account
may be given a larger one, and some refusals are odd."""
LEARN, UNSEEN = 0.1, 10.0
"""What of an error counts, each second, as somebody else's doing: 10 s make a habit; for no longer
than so many seconds is a habit relied on unseen."""


@dataclass(frozen=True, slots=True)
class LevelMark:
    """What a tank was reckoned to hold just after something was taken.

    A snapshot of that very moment is compared with it.

    Parameters
    ----------
    level : float
        The level reckoned then.
    shift : float
        The sum of the corrections made until then.
    """

    level: float
    shift: float


@dataclass(slots=True)
class TokenBucket:
    """A level that rises continuously up to `limit`. Of an unknown limit only changes are reckoned.

    Parameters
    ----------
    limit : float
        Size; infinite while it is unknown.
    rate : float
        What flows in a second.
    level, at : float
        The level at an instant; negative in debt, and as long as the limit is unknown.
    shift : float
        The sum of all corrections, by which older marks are brought up to date.
    floor, least_floor : float
        What is there and cannot be used, and the least that it ever was. A shorter window that the
        server does not tell of fills and empties together with the one that it tells of, so their
        levels differ by this much as long as neither is full.
    hid_at : float
        When a refusal told of that window last.
    leak, seen_at : float
        What somebody else takes in a second, on average, and since when it is not accounted for.
    """

    limit: float = math.inf
    rate: float = 0.0
    level: float = 0.0
    at: float = 0.0
    shift: float = 0.0
    floor: float = 0.0
    least_floor: float = math.inf
    hid_at: float = -math.inf
    leak: float = 0.0
    seen_at: float = 0.0

    @property
    def known(self) -> bool:
        """Whether the limit is known."""
        return self.limit < math.inf

    def has_limit(self, limit: float) -> bool:
        """Whether a stated limit is the one that is known."""
        return self.known and abs(self.limit - limit) <= SAME * self.limit

    @property
    def usable(self) -> float:
        """How much can be used at once when it is full."""
        return self.limit - self.floor

    def level_at(self, now: float) -> float:
        """Return the level reckoned for an instant that is not past."""
        return min(self.limit, self.level + max(0.0, now - self.at) * self.rate)

    def has_at(self, amount: float, now: float) -> float:
        """Return the earliest instant at which `amount` is there; now while nothing is known."""
        if not self.known:
            return now
        # What is larger than the whole goes when it is full: the server decides.
        amount = min(amount + self.floor, self.limit * (1 - FULL))
        unseen = min(UNSEEN, max(0.0, now - self.seen_at))
        level = self.level + max(0.0, now - self.at) * self.rate - self.leak * unseen
        missing = amount - min(self.limit, level)
        if missing <= 0:
            return now
        watchful, rate = UNSEEN - unseen, self.rate - self.leak
        if missing <= watchful * rate:
            return now + missing / rate
        return now + watchful + (missing - watchful * rate) / self.rate

    def take(self, amount: float, now: float) -> LevelMark:
        """Take `amount` (a negative one is given back), and return the mark of the moment after."""
        if self.floor and self.level_at(now) >= self.limit * (1 - FULL):
            is_old = now - self.hid_at > LATELY
            self.least_floor = math.inf if is_old else self.least_floor
            self.floor = 0.0 if is_old else self.least_floor
        self.level = min(self.limit, self.level_at(now) - amount)
        self.at = max(self.at, now)
        return LevelMark(self.level, self.shift)

    def give_back(self, amount: float, now: float) -> None:
        """Give back what was never taken: later marks were made without it, and are put right."""
        self.level = min(self.limit, self.level_at(now) + amount)
        self.at = max(self.at, now)
        self.shift += amount

    def error(self, mark: LevelMark, remaining: float, *, gone: float) -> float:
        """Return how much more a snapshot shows than was reckoned.

        Parameters
        ----------
        mark : LevelMark
            Of the request that the snapshot answers.
        remaining : float
            The level that the server states.
        gone : float
            Seconds between the mark and the server's admission.
        """
        reckoned = min(self.limit, mark.level + max(0.0, gone) * self.rate)
        return remaining - reckoned - (self.shift - mark.shift)

    def correct(self, error: float, now: float, *, taken_at: float, usual: bool = True) -> None:
        """Put the level right by the `error` that a snapshot taken at an instant shows.

        One that is `usual` tells of somebody else, too. One that only refusals bring does not, nor
        one of another limit than the error was reckoned with.
        """
        if self.known and usual:
            passed = max(0.0, taken_at - self.seen_at)
            leak = self.leak - LEARN * (error + self.leak * passed)
            self.leak = min(self.rate / 2, max(0.0, leak))
        self.seen_at = max(self.seen_at, taken_at)
        self.level = min(self.limit, self.level_at(now) + error)
        self.at = max(self.at, now)
        self.shift += error

    def adopt(self, limit: float, rate: float, *, now: float, since: float) -> None:
        """Take over a stated limit; what flowed since the instant `since` counts if it is new."""
        if self.known:
            self.floor *= limit / self.limit
            self.least_floor *= limit / self.limit
            self.level = min(limit, self.level_at(now))
            self.at = max(self.at, now)
        else:
            self.at = min(since, now)
        self.limit, self.rate = limit, rate
        self.leak = min(self.leak, rate / 2)

    def hide(self, floor: float, now: float) -> None:
        """A shorter window that nobody tells of keeps `floor` from being used."""
        self.floor, self.hid_at = min(self.limit, max(0.0, floor)), now
        self.least_floor = min(self.least_floor, self.floor)
