"""What a bucket has learnt: told to people, and kept so that the next job begins where it ended."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nbcodex.models import Gauge, Limit
from nbcodex.ratelimit.bucket import Bucket
from nbcodex.ratelimit.policy import POLICIES, Policy
from nbcodex.ratelimit.tank import Tank
from nbcodex.ratelimit.window import limit_of

ANSWERS = 50
"""As how many answers of its own a bucket takes what it is told of earlier ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """What was learnt. Limits are not part of it: the first answer tells them.

    Parameters
    ----------
    policy : {"kept", "refunded", "actual"}
        What the server charges.
    share : float
        How much of the output that requests ask for they use, on average.
    fit : float
        What the server counts for each token that we estimate.
    """

    policy: Policy
    share: float
    fit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of a bucket at an instant, for people.

    Parameters
    ----------
    tokens, requests : Gauge or None
        Limit and level as they are reckoned; None while the limit is unknown.
    windows : tuple of Limit
        Limits that only refusals tell of, as they are reckoned.
    policy : {"kept", "refunded", "actual"}
        What the server is believed to charge.
    told : bool
        Whether its headers tell of limits.
    hidden : float or None
        Tokens that a shorter window, which no header tells of, lets through at once.
    leak : float
        Tokens a second that somebody else on the same key takes.
    margin : float
        Share of the limit that is kept back.
    others : int
        Other processes that are active on it.
    used : bool
        Whether it was ever drawn on.
    hold : float or None
        Until when nobody may send.
    limit : Limit or None
        The limit that closed the bucket last.
    learnt : Prior or None
        What the next job can begin with.
    earlier : float or None
        The limit on tokens before the machine was started anew, where it is not told yet.
    waiting, asked : int, float
        Requests of this process that wait for their turn, and the tokens that they may use.
    """

    tokens: Gauge | None
    requests: Gauge | None
    windows: tuple[Limit, ...]
    policy: Policy
    told: bool
    hidden: float | None
    leak: float
    margin: float
    others: int
    used: bool
    hold: float | None
    limit: Limit | None
    learnt: Prior | None
    earlier: float | None = None
    waiting: int = 0
    asked: float = 0.0


def known(bucket: Bucket, now: float, *, others: int = 0) -> Known:
    """Return what is known of a bucket."""
    tank = bucket.tokens.tank
    return Known(
        tokens=_gauge(tank, now),
        requests=_gauge(bucket.requests, now),
        windows=tuple(limit_of(w.resource, w.tank, now) for w in bucket.windows),
        policy=bucket.tokens.policy,
        told=tank.known and not bucket.blind,
        hidden=tank.usable if tank.floor else None,
        leak=tank.leak,
        margin=bucket.margin,
        others=others,
        used=bucket.sent > 0,
        hold=bucket.until if bucket.until > now else None,
        limit=bucket.limit,
        learnt=learnt(bucket, now),
        earlier=None if tank.known or bucket.earlier == math.inf else bucket.earlier,
    )


def _gauge(tank: Tank, now: float) -> Gauge | None:
    if not tank.known:
        return None
    level = tank.level_at(now)
    return Gauge(limit=tank.limit, remaining=level, full_in=(tank.limit - level) / tank.rate)


def learnt(bucket: Bucket, now: float) -> Prior | None:
    """Return what a bucket has learnt; None before it has seen enough answers."""
    if bucket.output.ended < ANSWERS:
        return None
    return Prior(policy=bucket.tokens.policy, share=bucket.output.share(now), fit=bucket.fit)


def begin(prior: Prior) -> Bucket:
    """Return a bucket that begins where an earlier one left off; evidence changes its mind."""
    bucket = Bucket(fit=min(4.0, max(0.25, prior.fit)))
    bucket.tokens.chosen = POLICIES.index(prior.policy)
    output = bucket.output
    output.asked = output.took = float(ANSWERS)
    output.used = ANSWERS * min(1.0, max(0.0, prior.share))
    output.ended = ANSWERS
    return bucket


def heir(bucket: Bucket) -> Bucket:
    """Return what outlives a bucket when the clock begins anew, and all under way has ended."""
    idle = replace(bucket.output, under_way=0, asked_under_way=0.0, starts=0.0)
    prior = learnt(replace(bucket, output=idle), 0.0)
    new = Bucket() if prior is None else begin(prior)
    limit = bucket.tokens.tank.limit
    new.earlier = limit if limit < math.inf and not bucket.guessed else bucket.earlier
    return new
