"""When a request may go, by what is known of a model. Pure; must not know who waits, nor how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

from nbcodex.models import MINUTE, Limit, Resource
from nbcodex.ratelimit.charge_policy import Cost
from nbcodex.ratelimit.limit_model import MAX_MARGIN, LimitModel, describe_limit
from nbcodex.ratelimit.token_bucket import LIMIT_TRUST_S, TokenBucket

# Between two sends: a burst that networks and the server's front end bear. But the gap must never
# be what bounds a job (4 ms would be a limit of 15,000 a minute): it is at most a quarter of the
# limit's own interval.
MIN_SEND_GAP_S, BURST_RATE_FACTOR = 0.004, 4.0
# The margin is at most this share of what still waits, so that the end of a job spends it.
MARGIN_SHARE_OF_WAITING = 0.02
# A server that has stated nothing yet is asked again after so long without an answer.
UNANSWERED_TIMEOUT_S = 10.0
# Without headers, an optimistic charge policy is tried at this many times the limit's rate at
# most: if it is wrong, few requests meet the refusal before the first of them is known of.
HEADERLESS_RATE_FACTOR = 3.0
# An estimate of the input may be wrong by this factor.
INPUT_ESTIMATE_ERROR = 1.2
# Waiting for a limit over more than this is a cooldown that users decide on, not queueing.
LONG_WINDOW_S = 2 * MINUTE
# Charges that answers in flight may still cause reserve at most this share of the bucket, as long
# as more flows in by their end: the rest lets others begin.
MAX_OWED_SHARE = 0.5


def earliest_start(
    model: LimitModel,
    cost: Cost,
    now: float,
    *,
    waiting_tokens: float = math.inf,
    before: Sequence[Cost] = (),
    spare_requests: int = 0,
) -> float:
    """Return the earliest instant at which a request may go, after those `before` it.

    All that wait ask for `waiting_tokens` together; `spare_requests` typical requests of others
    shall find room at once. Strictly first come, first served: in a bucket, every request that
    passes the first one delays it, so small ones that pass would let a large one starve.
    """
    start_at, tokens, requests = after_gap(model, now), model.tokens.bucket, model.requests
    if model.is_headerless and tokens.is_known:
        model.tokens.choose_optimistic(now)
        tokens = model.tokens.bucket
        gap = model.admission_charge(cost) / (HEADERLESS_RATE_FACTOR * tokens.rate)
        start_at = max(start_at, model.last_sent_at + gap)
    if model.max_unanswered is not None and model.unanswered >= model.max_unanswered:
        start_at = max(start_at, model.last_sent_at + UNANSWERED_TIMEOUT_S)
    if tokens.is_known:
        margin = min(model.margin * tokens.limit, MAX_MARGIN * tokens.burst_capacity)
        spare = margin + spare_requests * model.tokens.typical_request
        spare = min(spare, MARGIN_SHARE_OF_WAITING * waiting_tokens)
        start_at = max(start_at, _tokens_available_at(model, (cost, *before), spare, now))
    if requests.is_known:
        spare = min(model.margin * requests.limit, MAX_MARGIN * requests.burst_capacity)
        if typical := model.tokens.typical_request:
            spare = min(spare, MARGIN_SHARE_OF_WAITING * waiting_tokens / typical)
        start_at = max(start_at, requests.available_at(1 + len(before) + spare, now))
    charges = sum(map(model.admission_charge, (cost, *before)))
    return max(start_at, model.undeclared.available_at(1 + len(before), charges, now))


def after_gap(model: LimitModel, now: float) -> float:
    """Return the earliest instant at which anything may go: no cooldown, and a gap after a send."""
    tokens, typical = model.tokens.bucket, model.tokens.typical_request
    rates = [model.requests.rate] if model.requests.is_known else []
    if tokens.is_known and typical:
        rates.append(tokens.rate / typical)
    gap = MIN_SEND_GAP_S
    if rates and min(rates) > 0:
        gap = min(gap, 1 / (BURST_RATE_FACTOR * min(rates)))
    return max(now, model.closed_until, model.last_sent_at + gap)


def exhausted_limit(model: LimitModel, cost: Cost, now: float) -> tuple[float, Limit] | None:
    """Return the limit over hours that is used up for longest, and until when; None if none is."""
    tokens = model.admission_charge(cost)
    buckets: list[tuple[Resource, TokenBucket, float]] = [("requests", model.requests, 1.0)]
    buckets.append(("tokens", model.tokens.bucket, tokens))
    buckets += [(e.resource, e.bucket, e.amount_of(1, tokens)) for e in model.undeclared]
    exhausted: list[tuple[float, Limit]] = []
    for resource, bucket, need in buckets:
        window = bucket.limit / bucket.rate if bucket.is_known else 0.0
        until = bucket.available_at(need, now)
        if window > LONG_WINDOW_S and until > now + MINUTE:
            exhausted.append((until, describe_limit(resource, bucket, now, requested=need)))
    return max(exhausted, key=itemgetter(0), default=None)


def impossible_limit(model: LimitModel, cost: Cost, now: float) -> float | None:
    """Return the limit that the request is too large for at any time; None if it can fit.

    Estimates err, limits change, and some servers state nonsense: only what is clearly larger is
    refused here, not what the server has let in before, nor by a limit stated long ago.
    """
    bucket = model.tokens.bucket
    # A fixed charge on each prompt makes short ones count fourfold and long ones hardly more: a
    # ratio above 1, learned from short prompts, shows nothing of a long one.
    at_least = cost.input_tokens * min(1.0, model.input_ratio)
    is_larger = at_least > max(INPUT_ESTIMATE_ERROR * bucket.limit, model.largest_admitted)
    is_old = now - bucket.observed_at > LIMIT_TRUST_S
    return bucket.limit if is_larger and not (model.is_guessed or is_old) else None


def _tokens_available_at(
    model: LimitModel, costs: Sequence[Cost], spare: float, now: float
) -> float:
    """Return when there are enough tokens for requests and for the answers in flight."""
    bucket, owed = model.tokens.bucket, _owed(model, costs, now)
    need = sum(map(model.admission_charge, costs)) + owed + spare
    available_at = bucket.available_at(need, now)
    if not model.output.in_flight:
        return available_at
    # What no bucket holds at once flows in while answers end: of what is owed beyond its usual
    # share, that much.
    over = min(owed - MAX_OWED_SHARE * bucket.burst_capacity, need - bucket.burst_capacity)
    return available_at + max(0.0, over) / bucket.rate


def _owed(model: LimitModel, costs: Sequence[Cost], now: float) -> float:
    """Return what answers will be charged at their end, which is reserved as well."""
    # Without this, prompts with long answers put the bucket seven limits into debt.
    output, bucket = model.output, model.tokens.bucket
    requested = output.requested_in_flight
    if model.tokens.policy == "actual":
        requested += sum(cost.max_output for cost in costs)
    elif model.is_headerless or not model.tokens.may_charge_later:
        return 0.0  # without headers, nothing would ever speak against it
    owed, usual = output.share(now) * requested, MAX_OWED_SHARE * bucket.burst_capacity
    if output.ended and not bucket.hidden_floor:
        # Beyond the usual share, what answers are charged must flow in by the time they end.
        usual = max(usual, owed - bucket.rate * output.remaining_seconds(now))
    return min(owed, usual)
