"""Computes when a request may be sent, from what is known of a model's limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

from nbcodex.errors import TooLargeError
from nbcodex.models import MINUTE, Limit, Resource
from nbcodex.ratelimit.charge_policy import Need
from nbcodex.ratelimit.limit_model import MAX_MARGIN, LimitModel, describe_limit
from nbcodex.ratelimit.token_bucket import LIMIT_TRUST_S, TokenBucket

# The least gap between two requests limits bursts, for networks and the server's front end. It must
# not limit the throughput (4 ms would allow only 15,000 requests a minute), so it is at most a
# quarter of the interval at which the limit admits typical requests.
MIN_SEND_GAP_S, BURST_RATE_FACTOR = 0.004, 4.0
MAX_MARGIN_OF_WAITING = 0.02  # times the waiting tokens: so the last requests use the margin, too
RESPONSE_TIMEOUT_S = 10.0  # while limits are unknown, after this time another request is sent
# Without headers, requests are sent at most at the limit's rate times this: if the assumed charge
# policy is wrong, few requests are sent before the first refusal arrives.
HEADERLESS_RATE_FACTOR = 3.0
INPUT_ESTIMATE_ERROR = 1.2  # an estimate of the input may be wrong by this factor
LONG_WINDOW_S = 2 * MINUTE  # a wait for a limit over a longer time is a cooldown: it uses patience
# When answers in flight end, their output may be charged. At most this share of a bucket is kept
# for that if the refill until then covers the rest: new requests use the other share.
MAX_OWED_SHARE = 0.5


def earliest_start(
    model: LimitModel,
    need: Need,
    now: float,
    *,
    waiting_tokens: float = math.inf,
    before: Sequence[Need] = (),
    spare_requests: int = 0,
) -> float:
    """Return the earliest instant at which a request may be sent, after those `before` it.

    `waiting_tokens` is the sum over all waiting requests; capacity for `spare_requests` typical
    requests is left to other processes. No request may overtake an earlier one: in a token bucket,
    that would delay the earlier one, so small requests could starve a large one.
    """
    start_at, tokens, requests = after_cooldown(model, now), model.tokens.bucket, model.requests
    # This rate was measured with the whole `max_output` of each request, so it counts here, too.
    requested = need.input_tokens * model.input_ratio + need.max_output
    start_at = max(start_at, model.last_sent_at + requested / model.slow_down_rate_at(now))
    if not model.has_slot(now, before=len(before)):
        start_at = max(start_at, model.parallel.next_increase_at(now))
    if model.is_headerless and tokens.is_known:
        model.tokens.assume_most_permissive(now)
        tokens = model.tokens.bucket
        gap = model.admission_charge(need) / (HEADERLESS_RATE_FACTOR * tokens.rate)
        start_at = max(start_at, model.last_sent_at + gap)
    max_awaiting = model.max_awaiting_response
    if max_awaiting is not None and model.awaiting_response >= max_awaiting:
        start_at = max(start_at, model.last_sent_at + RESPONSE_TIMEOUT_S)
    # A request larger than the limit would not fit into a full bucket either, so the queue would
    # only delay its refusal. It is sent once the server has responded to all earlier requests. If
    # the server admits it, because the estimate is too high, later ones of its size are queued.
    if tokens.is_known and (model.awaiting_response or not exceeds_limit(model, need)):
        margin = min(model.margin * tokens.limit, MAX_MARGIN * tokens.burst_capacity)
        spare = margin + spare_requests * model.tokens.typical_request
        spare = min(spare, MAX_MARGIN_OF_WAITING * waiting_tokens)
        start_at = max(start_at, _tokens_available_at(model, (need, *before), spare, now))
    if requests.is_known:
        spare = min(model.margin * requests.limit, MAX_MARGIN * requests.burst_capacity)
        if typical := model.tokens.typical_request:
            spare = min(spare, MAX_MARGIN_OF_WAITING * waiting_tokens / typical)
        start_at = max(start_at, requests.available_at(1 + len(before) + spare, now))
    charges = sum(map(model.admission_charge, (need, *before)))
    return max(start_at, model.undeclared.available_at(1 + len(before), charges, now))


def after_cooldown(model: LimitModel, now: float) -> float:
    """Return the first instant after the cooldown and after the least gap between two requests."""
    tokens, typical = model.tokens.bucket, model.tokens.typical_request
    # Typical requests per second that the limits admit; a rate of 0 is unknown.
    rates = [model.requests.rate, tokens.rate / typical if typical else 0.0]
    gaps = [1 / (BURST_RATE_FACTOR * rate) for rate in rates if rate > 0]
    gap = min(MIN_SEND_GAP_S, max(gaps, default=MIN_SEND_GAP_S))
    return max(now, model.cooldown_until, model.last_sent_at + gap)


def limits_by_time(model: LimitModel, need: Need, now: float) -> list[tuple[float, Limit]]:
    """Return the instants at which limits have capacity for a request, earliest first."""
    tokens = model.admission_charge(need)
    buckets: list[tuple[Resource, TokenBucket, float]] = [("requests", model.requests, 1.0)]
    buckets.append(("tokens", model.tokens.bucket, tokens))
    buckets += [(e.resource, e.bucket, e.amount_of(tokens)) for e in model.undeclared]
    limits = [
        (bucket.available_at(amount, now), describe_limit(resource, bucket, now, requested=amount))
        for resource, bucket, amount in buckets
        if bucket.is_known
    ]
    return sorted(limits, key=itemgetter(0))


def exceeds_limit(model: LimitModel, need: Need) -> bool:
    """Return whether input and `max_output` together exceed the limit, as estimated."""
    requested = need.input_tokens * min(1.0, model.input_ratio) + need.max_output
    limit = max(model.tokens.bucket.limit, model.largest_admitted_tokens)
    return need.has_max_output and requested > limit


def check_size(model: LimitModel, need: Need, now: float) -> None:
    """Raise `TooLargeError` for a request that the limit can never admit.

    Estimates err, limits change, and some servers state absurd limits. So it has to be clearly
    larger than a limit that was stated recently, and than all requests that were admitted.
    """
    bucket = model.tokens.bucket
    # Servers add some tokens to each prompt, which may quadruple a short one. So a ratio above 1
    # that was learned from short prompts says nothing about a long one.
    at_least = need.input_tokens * min(1.0, model.input_ratio)
    if model.limit_is_guessed or now - bucket.observed_at > LIMIT_TRUST_S:
        return
    if at_least > max(INPUT_ESTIMATE_ERROR * bucket.limit, model.largest_admitted_tokens):
        raise TooLargeError(
            f"The prompt has about {at_least:,.0f} tokens, {at_least - bucket.limit:,.0f} more "
            f"than the {bucket.limit:,.0f} tokens per minute that the model allows.",
            advice="Shorten the prompt, or choose a model with a larger limit.",
        )
    charges_output = model.tokens.policy != "actual" and not model.tokens.may_charge_at_end
    # OpenAI compares the larger of prompt and `max_output` with the limit (guide "Rate limits").
    is_longer = need.max_output > max(bucket.limit, model.largest_admitted_tokens)
    if charges_output and is_longer and need.has_max_output:
        raise TooLargeError(
            f"The prompt has about {at_least:,.0f} tokens, and the answer may have up to "
            f"{need.max_output:,.0f}: more than the {bucket.limit:,.0f} tokens per minute that the "
            "model allows.",
            advice="Lower --max-output, or choose a model with a larger limit.",
        )


def _tokens_available_at(
    model: LimitModel, needs: Sequence[Need], spare: float, now: float
) -> float:
    """Return when there are enough tokens for requests, `spare`, and the answers in flight."""
    output, bucket, owed = model.output, model.tokens.bucket, 0.0
    # Output that may be charged when answers end is reserved: otherwise prompts with long answers
    # put the bucket into a debt of seven limits. Without headers, no snapshot can rule the policy
    # *actual* out, so only the assumed policy counts.
    is_actual = model.tokens.policy == "actual"
    if is_actual or (model.tokens.may_charge_at_end and not model.is_headerless):
        requested = output.requested_in_flight
        if is_actual:
            requested += sum(need.max_output for need in needs)
        owed = output.used_share(now) * requested
        reserved = MAX_OWED_SHARE * bucket.burst_capacity
        if output.ended_answers and not bucket.hidden_floor:  # so no hidden window is known
            # What is not refilled until the answers end has to be reserved in any case.
            reserved = max(reserved, owed - bucket.rate * output.remaining_seconds(now))
        owed = min(owed, reserved)
    tokens = sum(map(model.admission_charge, needs)) + owed + spare
    available_at = bucket.available_at(tokens, now)
    if not output.in_flight:
        return available_at
    # What answers in flight still owe beyond a full bucket has to be refilled after it is full.
    excess = min(owed - MAX_OWED_SHARE * bucket.burst_capacity, tokens - bucket.burst_capacity)
    return available_at + max(0.0, excess) / bucket.rate
