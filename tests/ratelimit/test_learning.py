"""What is learned from answers, headers and refusals, and how processes share it."""

from __future__ import annotations

import pytest

from nbcodex.models import Limit, LimitReading, LimitSnapshot
from nbcodex.ratelimit.charge_policy import Need, OutputEstimator
from nbcodex.ratelimit.limit_model import LimitModel, Refusal, stated_bucket
from nbcodex.ratelimit.sharing import SharedModel


def test_output_share_is_not_misled_by_short_answers() -> None:
    """They end first, while most are still in flight."""
    output = OutputEstimator()
    for _ in range(100):
        output.count_in_flight(1000, 0.0)
    for _ in range(10):
        output.count_in_flight(1000, 0.0, sign=-1)
        output.record(1000, 50, 1.0)
    early = output.used_share(1.0)
    for _ in range(90):
        output.count_in_flight(1000, 0.0, sign=-1)
        output.record(1000, 50, 1.0)
    assert early > 0.4
    assert output.used_share(1.0) < 0.11


@pytest.mark.parametrize(
    ("remaining", "full_in", "rate", "level"),
    [
        (0, 70.0, 10, -100),  # an empty bucket that needs over a minute is in debt
        (300, 60.0, 5, 300),  # the rate follows from the time until the bucket is full,
        (599, 60.0, 10, 599),  # if enough of the limit is used; else it is that of a minute
    ],
)
def test_headers_imply_a_bucket(
    remaining: float, full_in: float, rate: float, level: float
) -> None:
    bucket = stated_bucket(LimitReading(limit=600, remaining=remaining, full_in=full_in))
    assert (bucket.limit, bucket.rate, bucket.level) == (600, rate, pytest.approx(level))


def test_refusal_message_outweighs_headers() -> None:
    """Its figures are exact, and may show a debt."""
    snapshot = LimitSnapshot(at=0.0, tokens=LimitReading(limit=600, remaining=0))
    limit = Limit(resource="tokens", window=60.0, limit=600, used=650, requested=10)
    model = LimitModel()
    model.refuse(
        model.issue_permit("b", Need(10, 0), 0.0, is_probe=False),
        Refusal(6.0, limit, snapshot),
        0.0,
    )
    assert model.tokens.bucket.level == -50
    assert not model.tokens.bucket.hidden_floor


def test_refusal_despite_enough_tokens_shows_a_hidden_window() -> None:
    limit = Limit(resource="tokens", window=60.0, limit=600, used=50, requested=10)
    model = LimitModel()
    model.refuse(model.issue_permit("b", Need(10, 0), 0.0), Refusal(1.0, limit), 0.0)
    assert model.tokens.bucket.hidden_floor == 550


def test_idle_process_accumulates_no_claim() -> None:
    """It is served like the others from then on, not before them."""
    shared = SharedModel()
    for second in range(20):
        shared.schedule_next("busy", Need(10, 90), 200, float(second))
        shared.issue_permit("b", "busy", Need(10, 90), float(second))
    shared.renew_lease("idle", 19.0)
    shared.schedule_next("busy", Need(10, 90), 200, 20.0)
    shared.schedule_next("idle", Need(10, 90), 200, 20.0)
    assert shared.processes["idle"].served_tokens == shared.processes["busy"].served_tokens - 100


def test_newcomer_begins_where_the_last_one_served_did() -> None:
    """Even if that one has none waiting then."""
    shared = SharedModel()
    for second in range(600):
        shared.schedule_next("old", Need(10, 90), 100, float(second))
        shared.issue_permit("b", "old", Need(10, 90), float(second))
    shared.schedule_next("new", Need(10, 90), 60_000, 602.0)
    for _ in range(2):
        shared.issue_permit("b", "new", Need(10, 90), 602.0)
    shared.schedule_next("old", Need(10, 90), 100, 602.1)
    assert shared.processes["old"].served_tokens < shared.processes["new"].served_tokens


def model_with_limits(*, tokens: float, requests: float) -> LimitModel:
    """Return a full bucket whose limits are known."""
    model = LimitModel()
    first = model.issue_permit("b", Need(0, 0), 0.0)
    readings = [
        LimitReading(limit=int(n), remaining=int(n), full_in=0.0) for n in (tokens, requests)
    ]
    model.observe(first, LimitSnapshot(at=0.0, tokens=readings[0], requests=readings[1]), 0.0)
    model.release(first, 0.0)
    return model


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_simultaneous_token_refusals_show_one_level(order: list[int]) -> None:
    """None of them was charged: the level is the stated one."""
    model = model_with_limits(tokens=60_000, requests=600)
    sent = [model.issue_permit("b", Need(100, 9_900), 100.0 + n / 100) for n in range(4)]
    limit = Limit(resource="tokens", window=60.0, limit=60_000, used=59_500, requested=10_000)
    for number in order:
        model.refuse(sent[number], Refusal(110.0, limit), 100.1)
    assert model.tokens.bucket.level_at(100.1) == pytest.approx(500, abs=100)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_simultaneous_request_refusals_show_one_level(order: list[int]) -> None:
    """None of them is counted."""
    model = model_with_limits(tokens=60_000, requests=600)
    sent = [model.issue_permit("b", Need(1, 9), 100.0 + n / 100) for n in range(4)]
    limit = Limit(resource="requests", window=60.0, limit=600, used=600, requested=1)
    for number in order:
        model.refuse(sent[number], Refusal(101.0, limit), 100.1)
    assert model.requests.level_at(100.1) == pytest.approx(0, abs=1.5)


def test_headers_older_than_a_refusal_are_ignored() -> None:
    model = model_with_limits(tokens=60_000, requests=600)
    before = model.issue_permit("b", Need(100, 900), 100.0)
    refused_one = model.issue_permit("b", Need(100, 9_900), 100.02)
    limit = Limit(resource="tokens", window=60.0, limit=60_000, used=59_500, requested=10_000)
    model.refuse(refused_one, Refusal(110.0, limit), 100.1)
    reading = LimitReading(limit=60_000, remaining=500, full_in=59.5)
    model.observe(before, LimitSnapshot(at=100.5, tokens=reading), 100.5)
    assert model.tokens.bucket.level_at(100.5) == pytest.approx(900, abs=200)


def test_fallen_limit_is_not_taken_for_a_drain() -> None:
    model = model_with_limits(tokens=1_000_000, requests=5_000)
    sent = model.issue_permit("b", Need(13, 700), 100.0)
    tokens, requests = (
        LimitReading(limit=3_000, remaining=2_287),
        LimitReading(limit=60, remaining=59),
    )
    model.observe(sent, LimitSnapshot(at=100.0, tokens=tokens, requests=requests), 100.0)
    assert model.tokens.bucket.available_at(2_787, 100.0) == pytest.approx(110)
    assert model.requests.available_at(59.5, 100.0) == pytest.approx(100.5)


def test_drain_is_at_most_half_of_a_fallen_limit() -> None:
    model = model_with_limits(tokens=1_000_000, requests=5_000)
    for at, limit, left in ((100.0, 1_000_000, 0), (200.0, 3_000, 0)):
        sent = model.issue_permit("b", Need(0, 0), at)
        reading = LimitReading(limit=limit, remaining=left)
        model.observe(sent, LimitSnapshot(at=at, tokens=reading), at)
    assert model.tokens.bucket.foreign_rate == model.tokens.bucket.rate / 2


def test_token_limit_that_headers_cease_to_state_is_learned_anew() -> None:
    """Even if they still state requests."""
    model = model_with_limits(tokens=600, requests=500)
    sent = model.issue_permit("b", Need(10, 90), 5_000.0)
    model.observe(
        sent, LimitSnapshot(at=5_000.0, requests=LimitReading(limit=500, remaining=400)), 5_000.0
    )
    assert model.is_headerless
    assert model.limit_is_guessed
