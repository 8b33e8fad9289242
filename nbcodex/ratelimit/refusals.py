"""What headers and refusals say about limits, and the limits that only refusals state.

Pure: the API client's records in, the arithmetic's figures out. Must not know who waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from nbcodex.models import DAY, MINUTE, Limit, LimitReading, LimitSnapshot, Resource
from nbcodex.ratelimit.token_bucket import LIMIT_TRUST_S, TokenBucket

# Remaining and reset are rounded: they show a rate only if this share of the limit is used.
MIN_USED_SHARE = 0.01
# A smaller limit is nonsense, and so is a deeper debt (in limits).
MIN_LIMIT, MAX_DEBT_LIMITS = 1.0, 1.0
# A refusal of this much less than what is left must come from a shorter window.
HIDDEN_WINDOW_FACTOR = 1.1


@dataclass(frozen=True, slots=True)
class RefusalFigures:
    """The figures of a refusal: the bucket at that moment, which the request was not taken from."""

    resource: Resource
    reading: LimitReading
    requested: float  # what the server wanted to take
    is_hidden: bool  # there was enough: a shorter window, which the figures do not show, refused


def read_refusal(limit: Limit | None, snapshot: LimitSnapshot | None) -> RefusalFigures | None:
    """Return the figures from a refusal's message, else from its headers; None without any."""
    resource = (limit and limit.resource) or "tokens"
    reading: LimitReading | None = None
    if snapshot is not None:
        reading = snapshot.tokens if resource == "tokens" else snapshot.requests
    requested = (limit and limit.requested) or 1.0
    if limit and limit.limit and limit.limit >= MIN_LIMIT and limit.used is not None:
        if limit.window not in (None, MINUTE):
            return None
        remaining = max(limit.limit - limit.used, -MAX_DEBT_LIMITS * limit.limit)
        reading = LimitReading(limit=limit.limit, remaining=remaining)
    if reading is None:
        return None
    enough = reading.remaining > HIDDEN_WINDOW_FACTOR * requested
    return RefusalFigures(resource, reading, requested, bool(limit and limit.requested) and enough)


def figures_from_reading(reading: LimitReading) -> tuple[float, float, float]:
    """Return limit, rate and level that headers state."""
    limit, remaining = max(MIN_LIMIT, reading.limit), reading.remaining
    full_in, rate = reading.full_in, limit / MINUTE
    # Headers state no negative level: an empty bucket that takes longer than its window to fill
    # is in debt.
    if remaining <= 0 and full_in and MINUTE < full_in < (1 + MAX_DEBT_LIMITS) * MINUTE:
        return limit, rate, limit - full_in * rate
    if full_in and limit - remaining > MIN_USED_SHARE * limit:
        rate = min(limit, max(limit / DAY, (limit - remaining) / full_in))
    return limit, rate, remaining


@dataclass(slots=True)
class UndeclaredLimit:
    """A limit over another time than the headers': requests a day, say, beside those a minute."""

    resource: Resource
    seconds: float
    bucket: TokenBucket = field(default_factory=TokenBucket)
    refused_at: float = -math.inf
    newest: int = -1  # number of the last permit that it refused

    def learn(self, limit: Limit, number: int, *, until: float, now: float) -> None:
        """Learn from a refusal of the permit of that number."""
        size, requested = limit.limit or 0.0, limit.requested or 1.0
        self.bucket.adopt(size, size / self.seconds, now=now, since=now)
        self.refused_at = max(self.refused_at, now)
        if number > self.newest:  # of several refusals at once, the last one sent shows most
            self.newest = number
            # Figures are rounded, but what was refused is certainly not there before `until`.
            at_most = requested - max(0.0, until - now) * self.bucket.rate
            left = min(size - (limit.used or 0.0), at_most)
            self.bucket.level, self.bucket.updated_at = max(0.0, left), now

    def amount_of(self, requests: int, tokens: float) -> float:
        """Return what it counts of so many requests and tokens."""
        return float(requests) if self.resource == "requests" else tokens


@dataclass(slots=True)
class UndeclaredLimits:
    """All such limits of one model, by resource and window."""

    by_name: dict[str, UndeclaredLimit] = field(default_factory=dict)

    def __iter__(self) -> Iterator[UndeclaredLimit]:
        return iter(self.by_name.values())

    def charge(self, tokens: float, now: float) -> None:
        """Charge one request."""
        for name, each in list(self.by_name.items()):
            is_full = each.bucket.level_at(now) >= each.bucket.limit
            if is_full and now - each.refused_at > LIMIT_TRUST_S:
                del self.by_name[name]  # it may exist no longer
            each.bucket.take(each.amount_of(1, tokens), now)

    def refund(self, requests: int, tokens: float, now: float) -> None:
        """Give back what was not charged after all."""
        for each in self:
            each.bucket.take(-each.amount_of(requests, tokens), now)

    def learn(self, limit: Limit, number: int, *, until: float, now: float) -> None:
        """Learn from the refusal of the permit of that number."""
        new = UndeclaredLimit(limit.resource or "tokens", limit.window or MINUTE)
        name = f"{new.resource} {new.seconds:g}"
        self.by_name.setdefault(name, new).learn(limit, number, until=until, now=now)

    def drop_declared(self, resource: Resource, limit: float) -> None:
        """Leave a limit that headers state to what they state."""
        for name, each in list(self.by_name.items()):
            if each.resource == resource and each.bucket.has_limit(limit):
                del self.by_name[name]

    def disprove(self, tokens: float, now: float) -> None:
        """Correct each limit that would not have let in what the server has let in."""
        for name, each in list(self.by_name.items()):
            if each.amount_of(1, tokens) > each.bucket.limit:
                del self.by_name[name]
            elif (level := each.bucket.level_at(now)) < 0:
                each.bucket.undo(-level, now)

    def available_at(self, requests: int, tokens: float, now: float) -> float:
        """Return the earliest instant at which all of them have so much left."""
        instants = (e.bucket.available_at(e.amount_of(requests, tokens), now) for e in self)
        return max(instants, default=now)


def describe_limit(
    resource: Resource, bucket: TokenBucket, now: float, *, requested: float | None = None
) -> Limit:
    """Return a bucket's figures as a refusal would state them."""
    seconds = bucket.limit / bucket.rate
    # A rate that headers state is rounded: a window near a usual one is that one.
    window = next((usual for usual in (MINUTE, DAY) if 0.8 < seconds / usual < 1.25), seconds)
    size, used = bucket.limit, bucket.limit - bucket.level_at(now)
    return Limit(resource=resource, window=window, limit=size, used=used, requested=requested)


def is_undeclared(limit: Limit | None, declared: TokenBucket) -> bool:
    """Return whether a refusal speaks of another window than the one that headers state."""
    if limit is None or limit.used is None or limit.resource is None:
        return False
    if limit.limit is None or limit.limit < MIN_LIMIT:
        return False
    seconds = limit.window or MINUTE
    if not declared.is_known:
        return seconds > MINUTE
    ratio = seconds * declared.rate / declared.limit
    return not declared.has_limit(limit.limit) or not 0.5 < ratio < 2
