"""When a request may go, by what is known of a bucket. Pure; must not know who waits, nor how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

from nbcodex.models import MINUTE, Limit, Resource
from nbcodex.ratelimit.charge_policy import Cost
from nbcodex.ratelimit.limit_model import WIDEST, LimitModel
from nbcodex.ratelimit.refusals import limit_of
from nbcodex.ratelimit.token_bucket import LATELY, TokenBucket

MIN_SEND_GAP_S = 0.004
"""Seconds between two sends: a burst that the network and the server's doors bear."""
BURST = 4.0
"""How many times a limit's own rate a burst may have, where that is more: the gap must never be
what bounds a job."""
TAIL = 0.02
"""What is kept back is at most this share of what still waits: the end of a job spends it."""
PROBE = 10.0
"""Seconds without a verdict after which a server that has told nothing yet is asked again."""
HASTE = 3.0
"""Without headers, how many times the limit's own rate is tried, once the limit is known: a wrong
hope so meets few refusals before the first of them is heard of."""
ERR = 1.2
"""By how much an estimate of the input may err."""
LONG = 2 * MINUTE
"""Seconds over which a limit counts that a request is rather told of than made to wait for."""
OWED = 0.5
"""Share of the bucket that is reserved for answers under way at most, as long as more flows in by
their end; the rest lets others begin."""


def earliest_start(
    bucket: LimitModel,
    cost: Cost,
    now: float,
    *,
    waiting: float = math.inf,
    before: Sequence[Cost] = (),
    guests: int = 0,
) -> float:
    """Return the earliest instant at which a request may go.

    Strictly first come, first served: in a bucket, whoever passes the first one delays it.

    Parameters
    ----------
    bucket : Bucket
        What is known.
    cost : Cost
        What it asks for.
    waiting : float
        Tokens that all who wait ask for together, this request included.
    before : sequence of Cost
        What those ask for who come first.
    guests : int
        Usual requests that shall find room at once, should they come.
    """
    first = after_gap(bucket, now)
    if bucket.blind and bucket.tokens.tank.known:
        bucket.tokens.hope(now)
        gap = bucket.charge(cost) / (HASTE * bucket.tokens.tank.rate)
        first = max(first, bucket.sent_at + gap)
    if bucket.at_once is not None and bucket.unheard >= bucket.at_once:
        first = max(first, bucket.sent_at + PROBE)
    if bucket.tokens.tank.known:
        spare = _spare(bucket, bucket.tokens.tank) + guests * bucket.tokens.usual
        spare = min(spare, TAIL * waiting)
        first = max(first, _has_tokens_at(bucket, (cost, *before), spare, now))
    if bucket.requests.known:
        spare = _spare(bucket, bucket.requests)
        if bucket.tokens.usual:
            spare = min(spare, TAIL * waiting / bucket.tokens.usual)
        first = max(first, bucket.requests.has_at(1 + len(before) + spare, now))
    tokens = sum(map(bucket.charge, (cost, *before)))
    return max(first, bucket.windows.have_at(1 + len(before), tokens, now))


def used_up(bucket: LimitModel, cost: Cost, now: float) -> tuple[float, Limit] | None:
    """Return until when a limit over hours is used up, and which one; None if none is, for long.

    To wait for one is no queueing, but what its user may not want to do.
    """
    tokens = bucket.charge(cost)
    found: list[tuple[Resource, TokenBucket, float]] = [
        ("requests", bucket.requests, 1.0),
        ("tokens", bucket.tokens.tank, tokens),
    ]
    found += [(w.resource, w.tank, w.charge(1, tokens)) for w in bucket.windows]
    closed: list[tuple[float, Limit]] = []
    for resource, tank, need in found:
        seconds = tank.limit / tank.rate if tank.known else 0.0
        until = tank.has_at(need, now)
        if seconds > LONG and until > now + MINUTE:
            closed.append((until, limit_of(resource, tank, now, requested=need)))
    return max(closed, key=itemgetter(0), default=None)


def after_gap(bucket: LimitModel, now: float) -> float:
    """Return the earliest instant at which anything may go: no hold, and a gap since the last."""
    rates = [bucket.requests.rate] if bucket.requests.known else []
    if bucket.tokens.tank.known and bucket.tokens.usual:
        rates.append(bucket.tokens.tank.rate / bucket.tokens.usual)
    gap = (
        min(MIN_SEND_GAP_S, 1 / (BURST * min(rates)))
        if rates and min(rates) > 0
        else MIN_SEND_GAP_S
    )
    return max(now, bucket.until, bucket.sent_at + gap)


def _has_tokens_at(bucket: LimitModel, costs: Sequence[Cost], spare: float, now: float) -> float:
    """Return when the tokens are there that requests and the answers under way are charged."""
    tank, owed = bucket.tokens.tank, _owed(bucket, costs, now)
    need = sum(map(bucket.charge, costs)) + owed + spare
    at = tank.has_at(need, now)
    if not bucket.output.under_way:
        return at
    # What no bucket holds at once flows in while answers end: of what is owed beyond the usual
    # share, that much.
    over = min(owed - OWED * tank.usable, need - tank.usable)
    return at + max(0.0, over) / tank.rate


def _owed(bucket: LimitModel, costs: Sequence[Cost], now: float) -> float:
    """Return what answers will be charged at their end, which is reserved as well."""
    asked = bucket.output.asked_under_way
    if bucket.tokens.policy == "actual":
        asked += sum(cost.output for cost in costs)
    elif bucket.blind or not bucket.tokens.may_owe:
        return 0.0  # without headers nothing would ever speak against it
    owed, tank = bucket.output.share(now) * asked, bucket.tokens.tank
    if not bucket.output.ended or tank.floor:
        return min(owed, OWED * tank.usable)
    # Beyond that, what they are charged must have flowed in by the time they end.
    return min(owed, max(OWED * tank.usable, owed - tank.rate * bucket.output.lasts(now)))


def _spare(bucket: LimitModel, tank: TokenBucket) -> float:
    return min(bucket.margin * tank.limit, WIDEST * tank.usable)


def never(bucket: LimitModel, cost: Cost, now: float) -> float | None:
    """Return the limit that the request is too large for at any time; None if it can fit.

    Estimates err, limits change, and some servers state nonsense: nothing is refused here that is
    not clearly larger, nor what the server has let in before, nor by a limit told long ago. That
    short prompts count for more than they seem to says nothing of a long one.
    """
    tank = bucket.tokens.tank
    least = cost.tokens * min(1.0, bucket.fit)
    clearly = least > ERR * tank.limit and least > bucket.largest and not bucket.guessed
    return tank.limit if clearly and now - tank.seen_at <= LATELY else None
