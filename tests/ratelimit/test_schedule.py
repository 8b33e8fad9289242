"""When a request may go, while the charge policy is not known yet."""

from __future__ import annotations

import pytest

from nbcodex.models import LimitReading, LimitSnapshot, Usage
from nbcodex.ratelimit.charge_policy import ACTUAL_INDEX, Need
from nbcodex.ratelimit.limit_model import LimitModel
from nbcodex.ratelimit.schedule import MIN_SEND_GAP_S, earliest_start


def test_tokens_that_answers_may_yet_be_charged_are_not_spent() -> None:
    """A level that is high because output is charged at the end is not free room."""
    model, need = LimitModel(), Need(10, 90)
    sent = model.issue_permit("b", need, 100.0)
    level = LimitReading(limit=1000, remaining=180, full_in=49.2)
    model.observe(sent, LimitSnapshot(at=100.1, tokens=level), 100.1)
    assert earliest_start(model, need, 100.2) > 100.2
    model.tokens.scores[ACTUAL_INDEX] = 1.0
    assert earliest_start(model, need, 100.2) == 100.2


@pytest.mark.parametrize(("requests", "tokens"), [(60_000, 1e9), (1e9, 6e6)])
def test_send_gap_shrinks_where_the_limit_allows_more_than_250_a_second(
    requests: float, tokens: float
) -> None:
    """By requests or by tokens."""
    model, need = LimitModel(), Need(10, 90)
    sent = model.issue_permit("b", need, 100.0)
    full = LimitSnapshot(
        at=100.1,
        tokens=LimitReading(limit=tokens, remaining=tokens - 100, full_in=0.1),
        requests=LimitReading(limit=requests, remaining=requests - 1, full_in=0.1),
    )
    model.observe(sent, full, 100.1)
    model.issue_permit("b", need, 100.2)
    gap = earliest_start(model, need, 100.2) - 100.2
    assert 0 < gap < 1 / 1000 < MIN_SEND_GAP_S


def test_no_more_answers_start_than_bucket_and_refill_will_pay() -> None:
    """For long answers that are charged at their end."""
    model, now = LimitModel(), 1000.0
    first = model.issue_permit("b", Need(100, 2_000), now)
    reading = LimitReading(limit=200_000, remaining=199_900, full_in=0.1)
    model.observe(first, LimitSnapshot(at=now, tokens=reading), now)
    model.tokens.assumed_index = ACTUAL_INDEX
    output = model.output
    output.count_in_flight(2_000, now, sign=-1)
    output.requested_output = output.used_output = 2e6
    output.answer_seconds, output.ended_answers = 20_000.0, 1_000
    sent, now = 0, now + 0.01
    while earliest_start(model, Need(100, 2_000), now) <= now and sent < 1_000:
        model.issue_permit("b", Need(100, 2_000), now)
        sent, now = sent + 1, now + 0.01
    assert 100 < sent < (200_000 + 20 * 200_000 / 60) / 2_000


def test_request_with_a_bound_larger_than_the_bucket_goes_when_it_is_full() -> None:
    """With nothing else in flight."""
    model, now = LimitModel(), 1000.0
    first = model.issue_permit("b", Need(100, 1_000), now)
    reading = LimitReading(limit=30_000, remaining=29_900, full_in=0.2)
    model.observe(first, LimitSnapshot(at=now, tokens=reading), now)
    model.settle(first, Usage(input_tokens=100, output_tokens=1_000), now)
    model.tokens.assumed_index = ACTUAL_INDEX
    large = Need(100, 50_000)
    assert earliest_start(model, large, now + 100) == now + 100


@pytest.mark.parametrize(("estimate", "ratio"), [(636, 1.0), (636, 0.9), (580, 1.0)])
def test_request_that_exceeds_the_limit_is_not_queued_before_its_refusal(
    estimate: float, ratio: float
) -> None:
    """Though the excess is less than the estimate's error, and other users take tokens."""
    model, now = LimitModel(input_ratio=ratio), 100.0
    for remaining in (2_800, 300):
        sent = model.issue_permit("b", Need(100, 100), now)
        level = LimitReading(limit=3_000, remaining=remaining, full_in=60 - remaining / 50)
        model.observe(sent, LimitSnapshot(at=now, tokens=level), now)
        model.settle(sent, Usage(input_tokens=100, output_tokens=100, estimated=True), now)
        assert earliest_start(model, Need(estimate, 2_500), now + 1) == now + 1
        now += 1
    assert earliest_start(model, Need(300, 2_500), now) > now + 30


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_size_that_was_admitted_waits_for_capacity(ratio: float) -> None:
    """Though its estimate exceeds the limit."""
    model, now, large = LimitModel(input_ratio=ratio), 100.0, Need(636 / ratio, 2_500)
    sent = model.issue_permit("b", large, now)
    level = LimitReading(limit=3_000, remaining=0, full_in=60.0)
    model.observe(sent, LimitSnapshot(at=now, tokens=level), now)
    model.settle(sent, Usage(input_tokens=500, output_tokens=2_500, estimated=True), now)
    assert earliest_start(model, large, now + 1) > now + 50
