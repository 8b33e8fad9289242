"""What headers and refusals tell of a bucket. Pure: our words in, arithmetic's figures out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from nbcodex.models import DAY, MINUTE, Limit, LimitReading, LimitSnapshot, Resource
from nbcodex.ratelimit.token_bucket import LATELY, TokenBucket

NOISE = 0.01
"""A snapshot tells a rate only if at least this share of the limit is gone."""

LEAST, DEBT = 1.0, 1.0
"""Smaller limits are nobody's; deeper debts, in limits, are not believed."""


@dataclass(frozen=True, slots=True)
class RefusalFigures:
    """What a refusal tells.

    Parameters
    ----------
    resource : {"tokens", "requests"}
        What ran out.
    gauge : Gauge
        The bucket at the moment of refusal, which the request was not taken from.
    requested : float
        What the server wanted to take.
    hidden : bool
        Whether there was enough: a shorter window refused it, which the figures do not show.
    """

    resource: Resource
    gauge: LimitReading
    requested: float
    hidden: bool


def read_refusal(limit: Limit | None, snapshot: LimitSnapshot | None) -> RefusalFigures | None:
    """Return the figures of a refusal: from its message, else from its headers; None without any.

    A refusal of what is there speaks of a shorter window than the one whose figures it shows.
    """
    resource = (limit and limit.resource) or "tokens"
    gauge: LimitReading | None = None
    if snapshot is not None:
        gauge = snapshot.tokens if resource == "tokens" else snapshot.requests
    requested = (limit and limit.requested) or 1.0
    if limit and limit.limit and limit.limit >= LEAST and limit.used is not None:
        if limit.window not in (None, MINUTE):
            return None
        left = max(limit.limit - limit.used, -DEBT * limit.limit)
        gauge = LimitReading(limit=limit.limit, remaining=left)
    if gauge is None:
        return None
    hidden = bool(limit and limit.requested) and gauge.remaining > 1.1 * requested
    return RefusalFigures(resource, gauge, requested, hidden)


def figures_from_reading(gauge: LimitReading) -> tuple[float, float, float]:
    """Return limit, rate and level that headers tell.

    An empty bucket that takes longer than its window to fill is in debt.
    """
    limit, left, full_in = max(LEAST, gauge.limit), gauge.remaining, gauge.full_in
    rate = limit / MINUTE
    if left <= 0 and full_in and MINUTE < full_in < (1 + DEBT) * MINUTE:
        return limit, rate, limit - full_in * rate
    if full_in and limit - left > NOISE * limit:
        rate = min(limit, max(limit / DAY, (limit - left) / full_in))
    return limit, rate, left


@dataclass(slots=True)
class UndeclaredLimit:
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
    tank: TokenBucket = field(default_factory=TokenBucket)
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


@dataclass(slots=True)
class UndeclaredLimits:
    """All such limits of one model, by name."""

    kept: dict[str, UndeclaredLimit] = field(default_factory=dict)

    def __iter__(self) -> Iterator[UndeclaredLimit]:
        return iter(self.kept.values())

    def take(self, tokens: float, now: float) -> None:
        """Take what a request is charged; forget what is stale."""
        self.kept = {key: w for key, w in self.kept.items() if not w.is_stale(now)}
        for window in self:
            window.take(1, tokens, now)

    def give_back(self, requests: int, tokens: float, now: float) -> None:
        """Give back what was never charged, or is not any more."""
        for window in self:
            window.take(-requests, -tokens, now)

    def meet(self, limit: Limit, number: int, *, until: float, now: float) -> None:
        """Learn from the refusal of the request of that number."""
        window = UndeclaredLimit(limit.resource or "tokens", limit.window or MINUTE)
        key = f"{window.resource} {window.seconds:g}"
        self.kept.setdefault(key, window).meet(limit, number, until=until, now=now)

    def show(self, resource: Resource, limit: float) -> None:
        """Headers tell of a limit, which is reckoned by them from now on."""
        same = [
            key
            for key, window in self.kept.items()
            if window.resource == resource and window.tank.has_limit(limit)
        ]
        for key in same:
            del self.kept[key]

    def refute(self, tokens: float, now: float) -> None:
        """The server has let a request in: believe in no limit that would not have."""
        for key, window in list(self.kept.items()):
            if window.charge(1, tokens) > window.tank.limit:
                del self.kept[key]
            elif (level := window.tank.level_at(now)) < 0:
                window.tank.give_back(-level, now)

    def have_at(self, requests: int, tokens: float, now: float) -> float:
        """Return the earliest instant at which all of them have so much left."""
        moments = (w.tank.has_at(w.charge(requests, tokens), now) for w in self)
        return max(moments, default=now)


def limit_of(
    resource: Resource, tank: TokenBucket, now: float, *, requested: float | None = None
) -> Limit:
    """Return a tank's figures as a refusal would tell them."""
    seconds = tank.limit / tank.rate
    usual = next((each for each in (MINUTE, DAY) if 0.8 < seconds / each < 1.25), seconds)
    used = tank.limit - tank.level_at(now)
    return Limit(resource=resource, window=usual, limit=tank.limit, used=used, requested=requested)


def is_another(limit: Limit | None, shown: TokenBucket) -> bool:
    """Whether a refusal speaks of another window than the one that `shown` is reckoned by."""
    if limit is None or limit.used is None or limit.resource is None:
        return False
    if limit.limit is None or limit.limit < LEAST:
        return False
    seconds = limit.window or MINUTE
    if not shown.known:
        return seconds > MINUTE
    return not shown.has_limit(limit.limit) or not 0.5 < seconds * shown.rate / shown.limit < 2
