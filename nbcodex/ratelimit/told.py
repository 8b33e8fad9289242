"""What headers and refusals tell of a bucket. Pure: our words in, arithmetic's figures out."""

from __future__ import annotations

from dataclasses import dataclass

from nbcodex.models import DAY, MINUTE, Gauge, Limit, Resource, Snapshot

NOISE = 0.01
"""A snapshot tells a rate only if at least this share of the limit is gone."""

LEAST, DEBT = 1.0, 1.0
"""Smaller limits are nobody's; deeper debts, in limits, are not believed."""


@dataclass(frozen=True, slots=True)
class Told:
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
    gauge: Gauge
    requested: float
    hidden: bool


def refused(limit: Limit | None, snapshot: Snapshot | None) -> Told | None:
    """Return the figures of a refusal: from its message, else from its headers; None without any.

    A refusal of what is there speaks of a shorter window than the one whose figures it shows.
    """
    resource = (limit and limit.resource) or "tokens"
    gauge: Gauge | None = None
    if snapshot is not None:
        gauge = snapshot.tokens if resource == "tokens" else snapshot.requests
    requested = (limit and limit.requested) or 1.0
    if limit and limit.limit and limit.limit >= LEAST and limit.used is not None:
        if limit.window not in (None, MINUTE):
            return None
        left = max(limit.limit - limit.used, -DEBT * limit.limit)
        gauge = Gauge(limit=limit.limit, remaining=left)
    if gauge is None:
        return None
    hidden = bool(limit and limit.requested) and gauge.remaining > 1.1 * requested
    return Told(resource, gauge, requested, hidden)


def told_by(gauge: Gauge) -> tuple[float, float, float]:
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
