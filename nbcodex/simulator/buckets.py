"""The arithmetic of the limits: buckets that refill continuously, and what a request takes of them.

Pure but for the state it owns: every function is told the time. Must not know HTTP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nbcodex.models import DAY, MINUTE, Resource
from nbcodex.simulator.knobs import Knobs

ROUNDING = 1e-9
"""Share of a limit by which sums of floats may miss it."""


@dataclass(slots=True)
class Bucket:
    """A level that rises continuously to `limit`, in `window` seconds from empty to full.

    Parameters
    ----------
    limit, window, level, at : float
        Size; seconds; the level at the instant `at`. A level may be negative: a debt.
    stranger : float
        The share of the refill that somebody else takes.
    """

    limit: float
    window: float
    level: float
    at: float
    stranger: float = 0.0

    def level_at(self, now: float) -> float:
        """Return the level at the instant `now`, and remember it."""
        if now > self.at:
            rate = self.limit / self.window * (1 - self.stranger)
            self.level = min(self.limit, self.level + (now - self.at) * rate)
            self.at = now
        return self.level

    def has(self, amount: float, now: float) -> bool:
        """Return whether `amount` could be taken now."""
        return self.level_at(now) + ROUNDING * self.limit >= amount

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, whether or not it is there; a negative one is given back."""
        self.level = min(self.limit, self.level_at(now) - amount)

    def used(self, now: float) -> int:
        """Return what is taken of the limit, in whole units, as the server's messages have it."""
        return math.ceil(self.limit - self.level_at(now) - ROUNDING * self.limit)

    def wait(self, amount: float, now: float) -> float:
        """Return the seconds until `amount` is there, by the arithmetic of OpenAI's messages."""
        return max(0.0, (self.used(now) + amount - self.limit) / self.limit * self.window)

    def full_in(self, now: float) -> float:
        """Return the seconds until the bucket is full: what ``x-ratelimit-reset-*`` says."""
        return (self.limit - self.level_at(now)) / self.limit * self.window

    def resize(self, limit: float, now: float) -> None:
        """Change the limit; what is taken of the old one is taken of the new one."""
        level = self.level_at(now)
        self.level = max(limit - (self.limit - level), min(level, 0.0))
        self.limit = limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Which limit refused a request, with the figures that the message needs.

    Parameters
    ----------
    resource, window
        What ran out, and over which seconds it is counted.
    limit, used, requested : int
        The figures.
    wait : float or None
        Seconds to wait; None if the request is larger than the whole limit.
    """

    resource: Resource
    window: float
    limit: int
    used: int
    requested: int
    wait: float | None


@dataclass(slots=True)
class Charge:
    """What one request has been charged so far, and how much of it was for its output."""

    tokens: int
    for_output: int
    settled: bool = False


@dataclass(slots=True)
class Account:
    """The buckets of one key and model."""

    tokens: dict[float, Bucket] = field(default_factory=dict)
    requests: dict[float, Bucket] = field(default_factory=dict)

    def apply(self, knobs: Knobs, now: float) -> None:
        """Adopt the limits of `knobs`: new buckets are full, old ones keep what was taken."""
        _adopt(self.tokens, _sizes(knobs.tpm, knobs.tpd, knobs.burst), knobs, now)
        _adopt(self.requests, _sizes(knobs.rpm, knobs.rpd, knobs.burst), knobs, now)

    def admit(self, cost: int, now: float) -> Refusal | None:
        """Take a request and `cost` tokens, or say why not.

        A request refused for its tokens counts as a request all the same.
        """
        refusal = _check(self.requests, "requests", 1, now)
        if refusal is not None:
            return refusal
        self.count(now)
        refusal = _check(self.tokens, "tokens", cost, now)
        if refusal is None:
            self.charge(cost, now)
        return refusal

    def count(self, now: float) -> None:
        """Take one request."""
        for bucket in self.requests.values():
            bucket.take(1, now)

    def charge(self, tokens: int, now: float) -> None:
        """Take `tokens`, which may leave a debt; a negative number is given back."""
        for bucket in self.tokens.values():
            bucket.take(tokens, now)

    def settle(self, charge: Charge, output: int, knobs: Knobs, now: float) -> None:
        """Bring `charge` to what the policy asks for `output` tokens; once."""
        if charge.settled:
            return
        charge.settled = True
        difference = 0 if knobs.policy == "kept" else output - charge.for_output
        self.charge(difference, now)
        charge.tokens += difference
        charge.for_output += difference


def opening_charge(input_tokens: int, max_output: int, knobs: Knobs) -> Charge:
    """Return what is charged at admission."""
    output = 0 if knobs.policy == "actual" else max_output
    return Charge(tokens=input_tokens + output, for_output=output)


def _sizes(minute: int | None, day: int | None, burst: float) -> dict[float, float]:
    """Return the size of each bucket by its window in seconds."""
    sizes: dict[float, float] = {}
    if minute is not None:
        sizes[MINUTE] = minute
        if burst:
            sizes[burst] = minute * burst / MINUTE
    if day is not None:
        sizes[DAY] = day
    return sizes


def _adopt(
    buckets: dict[float, Bucket], sizes: dict[float, float], knobs: Knobs, now: float
) -> None:
    for window in buckets.keys() - sizes.keys():
        del buckets[window]
    for window, size in sizes.items():
        bucket = buckets.setdefault(window, Bucket(size, window, size, now))
        bucket.resize(size, now)
        bucket.stranger = knobs.stranger


def _check(
    buckets: dict[float, Bucket], resource: Resource, amount: int, now: float
) -> Refusal | None:
    """Return the refusal of the bucket that takes longest, if one has not got `amount`."""
    refusals = [
        _refusal(buckets, bucket, resource, amount, now)
        for bucket in buckets.values()
        if not bucket.has(_needed(bucket, amount), now)
    ]
    return max(refusals, key=_patience, default=None)


def _needed(bucket: Bucket, amount: int) -> float:
    """Return how much must be there: a hidden window lets even a large request pass when full."""
    return amount if _is_shown(bucket) else min(amount, bucket.limit)


def _is_shown(bucket: Bucket) -> bool:
    return bucket.window in (MINUTE, DAY)


def _refusal(
    buckets: dict[float, Bucket], bucket: Bucket, resource: Resource, amount: int, now: float
) -> Refusal:
    """Return the refusal by `bucket`; a hidden window speaks with the figures of the minute."""
    shown = bucket if _is_shown(bucket) else buckets[MINUTE]
    never = amount > shown.limit
    return Refusal(
        resource=resource,
        window=shown.window,
        limit=int(shown.limit),
        used=shown.used(now),
        requested=amount,
        wait=None if never else _stated(bucket.wait(_needed(bucket, amount), now)),
    )


def _stated(seconds: float) -> float:
    """Return `seconds` in whole milliseconds, rounded up, so that who waits so long gets in."""
    return max(0.001, math.ceil(round(seconds * 1000, 6)) / 1000)


def _patience(refusal: Refusal) -> float:
    return math.inf if refusal.wait is None else refusal.wait
