"""A limit that no header tells of, over another time than the one that they do: refusals tell it.

Pure arithmetic: every function is told the time. Must not know who waits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nbcodex.pacing.tank import LATELY, Tank
from nbcodex.pacing.told import LEAST
from nbcodex.records import DAY, MINUTE, Limit, Resource


@dataclass(slots=True)
class Window:
    """One such limit: requests a day, say, where headers tell those of a minute.

    Parameters
    ----------
    resource : {"tokens", "requests"}
        What it counts.
    seconds : float
        Over what time.
    tank : Tank
        What is left of it.
    met_at : float
        When it refused a request last.
    newest : int
        Number of the last request that it refused.
    """

    resource: Resource
    seconds: float
    tank: Tank = field(default_factory=Tank)
    met_at: float = -math.inf
    newest: int = -1

    def meet(self, limit: Limit, number: int, *, until: float, now: float) -> None:
        """Learn from a refusal; of several at once, the last one sent tells most.

        Figures are rounded, but what was refused is not there before the instant `until`.
        """
        size, asked = limit.limit or 0.0, limit.requested or 1.0
        self.tank.adopt(size, size / self.seconds, now=now, since=now)
        self.met_at = max(self.met_at, now)
        if number > self.newest:
            self.newest = number
            left = min(size - (limit.used or 0.0), asked - max(0.0, until - now) * self.tank.rate)
            self.tank.level, self.tank.at = max(0.0, left), now

    def take(self, requests: int, tokens: float, now: float) -> None:
        """Take what is charged; what is negative is given back."""
        self.tank.take(self.charge(requests, tokens), now)

    def charge(self, requests: int, tokens: float) -> float:
        """Return what it counts of so many requests and tokens."""
        return float(requests) if self.resource == "requests" else tokens

    def is_stale(self, now: float) -> bool:
        """Whether it is full, and has refused nothing for long: there may be none any more."""
        return now - self.met_at > LATELY and self.tank.level_at(now) >= self.tank.limit


def limit_of(
    resource: Resource, tank: Tank, now: float, *, requested: float | None = None
) -> Limit:
    """Return a tank's figures as a refusal would tell them."""
    seconds = tank.limit / tank.rate
    usual = next((each for each in (MINUTE, DAY) if 0.8 < seconds / each < 1.25), seconds)
    used = tank.limit - tank.level_at(now)
    return Limit(resource=resource, window=usual, limit=tank.limit, used=used, requested=requested)


def key_of(limit: Limit) -> str:
    """Return what names the window that a refusal speaks of."""
    return f"{limit.resource} {limit.window or MINUTE:g}"


def is_another(limit: Limit | None, shown: Tank) -> bool:
    """Whether a refusal speaks of another window than the one that `shown` is reckoned by."""
    if limit is None or limit.used is None or limit.resource is None:
        return False
    if limit.limit is None or limit.limit < LEAST:
        return False
    seconds = limit.window or MINUTE
    if not shown.known:
        return seconds > MINUTE
    return not shown.has_limit(limit.limit) or not 0.5 < seconds * shown.rate / shown.limit < 2
