"""The server's rate limits: continuously refilled token buckets, and the charge of each request."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nbcodex.models import DAY, MINUTE, Resource
from nbcodex.simulator.knobs import Knobs

ROUNDING_SHARE = 1e-9  # a level may miss a limit by this share: sums of floats are inexact


@dataclass(slots=True)
class Bucket:
    """A level that rises continuously to `limit`, in `window` seconds from empty to full."""

    limit: float
    window: float
    level: float  # the level at `updated_at`; below zero, it is a debt
    updated_at: float
    used_by_others: float = 0.0  # share of the refill that other clients use up

    def level_at(self, now: float) -> float:
        """Return the level at `now`, and store it."""
        if now > self.updated_at:
            rate = self.limit / self.window * (1 - self.used_by_others)
            self.level = min(self.limit, self.level + (now - self.updated_at) * rate)
            self.updated_at = now
        return self.level

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, which may leave a debt; a negative amount is returned to the bucket."""
        self.level = min(self.limit, self.level_at(now) - amount)

    def used(self, now: float) -> int:
        """Return the used part of the limit in whole units, as in the server's messages."""
        return math.ceil(self.limit - self.level_at(now) - ROUNDING_SHARE * self.limit)

    def seconds_until_full(self, now: float) -> float:
        """Return the seconds until the bucket is full, as in ``x-ratelimit-reset-*``."""
        return (self.limit - self.level_at(now)) / self.limit * self.window


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The limit that refused a request, with the figures for the message."""

    resource: Resource
    window: float  # seconds
    limit: int
    used: int
    requested: int
    wait: float | None  # seconds to wait; None if the request exceeds the whole limit


@dataclass(slots=True)
class Account:
    """The buckets of one key and model, by their windows in seconds."""

    tokens: dict[float, Bucket] = field(default_factory=dict)
    requests: dict[float, Bucket] = field(default_factory=dict)

    def set_limits(self, knobs: Knobs, now: float) -> None:
        """Set the limits of `knobs`: new buckets are full, existing ones keep the used amount."""
        for buckets, per_minute, per_day in (
            (self.tokens, knobs.tpm, knobs.tpd),
            (self.requests, knobs.rpm, knobs.rpd),
        ):
            limits: dict[float, float] = {}
            if per_minute is not None:
                limits[MINUTE] = per_minute
                if knobs.hidden_window:
                    limits[knobs.hidden_window] = per_minute * knobs.hidden_window / MINUTE
            if per_day is not None:
                limits[DAY] = per_day
            for window in buckets.keys() - limits.keys():
                del buckets[window]
            for window, limit in limits.items():
                full = Bucket(limit, window, level=limit, updated_at=now)
                bucket = buckets.setdefault(window, full)
                level = bucket.level_at(now)
                # The used amount stays the same, but a smaller limit does not create a debt.
                bucket.level = max(limit - (bucket.limit - level), min(level, 0.0))
                bucket.limit = limit
                bucket.used_by_others = knobs.used_by_others

    def charge_or_refuse(self, tokens: int, now: float) -> Refusal | None:
        """Charge one request and its `tokens`, or return the refusal."""
        if refusal := _find_refusal(self.requests, "requests", amount=1, now=now):
            return refusal
        self.charge_request(now)  # counts even if it is refused for its tokens
        if refusal := _find_refusal(self.tokens, "tokens", amount=tokens, now=now):
            return refusal
        self.charge_tokens(tokens, now)
        return None

    def charge_request(self, now: float) -> None:
        """Take one request."""
        for bucket in self.requests.values():
            bucket.take(1, now)

    def charge_tokens(self, tokens: int, now: float) -> None:
        """Take `tokens`, which may leave a debt; a negative number is given back."""
        for bucket in self.tokens.values():
            bucket.take(tokens, now)

    def settle(self, charged: int, used: int, knobs: Knobs, now: float) -> int:
        """Adjust a charge to the tokens used, as the policy prescribes; return the new charge."""
        if knobs.policy == "kept":
            return charged
        self.charge_tokens(used - charged, now)
        return used


def admission_charge(input_tokens: int, max_output: int, knobs: Knobs) -> int:
    """Return the tokens that are charged at admission."""
    return input_tokens + (0 if knobs.policy == "actual" else max_output)


def _find_refusal(
    buckets: dict[float, Bucket], resource: Resource, *, amount: int, now: float
) -> Refusal | None:
    """Return the refusal with the longest wait, if a bucket has less than `amount`."""
    refusals = []
    for bucket in buckets.values():
        is_hidden = bucket.window not in (MINUTE, DAY)
        # A client must not see that a hidden window exists: when it is full, it admits a request
        # larger than itself, and its refusals state the figures of the minute.
        needed = min(amount, bucket.limit) if is_hidden else amount
        if bucket.level_at(now) + ROUNDING_SHARE * bucket.limit >= needed:
            continue
        stated = buckets[MINUTE] if is_hidden else bucket
        # The formula that the figures of OpenAI's messages follow. It starts from the used part in
        # whole units, and ignores that other clients use up a share of the refill.
        wait = (bucket.used(now) + needed - bucket.limit) / bucket.limit * bucket.window
        # Rounded up to whole milliseconds, so that the stated wait is long enough.
        wait = max(0.001, math.ceil(round(wait * 1000, 6)) / 1000)
        refusals.append(
            Refusal(
                resource=resource,
                window=stated.window,
                limit=int(stated.limit),
                used=stated.used(now),
                requested=amount,
                wait=None if amount > stated.limit else wait,
            )
        )
    return max(refusals, key=lambda each: each.wait or math.inf, default=None)
