"""What is learnt from answers, headers and refusals, and how holders share it."""

from __future__ import annotations

import pytest

from nbcodex.models import Limit, LimitReading, LimitSnapshot
from nbcodex.ratelimit.charge_policy import Cost, OutputEstimator
from nbcodex.ratelimit.limit_model import LimitModel
from nbcodex.ratelimit.refusals import figures_from_reading, read_refusal
from nbcodex.ratelimit.sharing import SharedModel


def test_short_answers_do_not_mislead() -> None:
    """While most answers are still under way, the few that have ended do not stand for all."""
    output = OutputEstimator()
    for _ in range(100):
        output.start(1000, 0.0)
    for _ in range(10):
        output.drop(1000, 0.0)
        output.record(1000, 50, 1.0)
    early = output.share(1.0)
    for _ in range(90):
        output.drop(1000, 0.0)
        output.record(1000, 50, 1.0)
    assert early > 0.4
    assert output.share(1.0) < 0.11


def test_an_empty_bucket_can_be_in_debt() -> None:
    """Nothing left, and longer than a minute to full: the rest of the wait is a debt."""
    assert figures_from_reading(LimitReading(limit=600, remaining=0, full_in=70.0)) == (
        600,
        10,
        pytest.approx(-100),
    )


def test_a_rate_is_read_off_the_time_to_full() -> None:
    """Where enough is gone, the time to full tells the rate; else it is a minute's."""
    assert figures_from_reading(LimitReading(limit=600, remaining=300, full_in=60.0)) == (
        600,
        5,
        300,
    )
    assert figures_from_reading(LimitReading(limit=600, remaining=599, full_in=60.0)) == (
        600,
        10,
        599,
    )


def test_a_message_outweighs_headers() -> None:
    """The figures of a refusal's message are exact, and may show a debt; headers cannot."""
    snapshot = LimitSnapshot(at=0.0, tokens=LimitReading(limit=600, remaining=0))
    limit = Limit(resource="tokens", window=60.0, limit=600, used=650, requested=10)
    told = read_refusal(limit, snapshot)
    assert told
    assert told.reading.remaining == -50
    assert not told.is_hidden


def test_a_refusal_of_what_is_there_is_hidden() -> None:
    """There was enough: a shorter window refused it."""
    limit = Limit(resource="tokens", window=60.0, limit=600, used=50, requested=10)
    told = read_refusal(limit, None)
    assert told
    assert told.is_hidden


def test_who_was_idle_has_no_claim() -> None:
    """A holder that comes back is served like the others from then on, not before them."""
    shared = SharedModel()
    for second in range(20):
        shared.earliest_start("busy", Cost(10, 90), float(second), waiting_tokens=200)
        shared.issue_permit("b", "busy", Cost(10, 90), float(second))
    shared.share_of("idle", 19.0)
    shared.earliest_start("busy", Cost(10, 90), 20.0, waiting_tokens=200)
    shared.earliest_start("idle", Cost(10, 90), 20.0, waiting_tokens=200)
    assert shared.holders["idle"].served == shared.holders["busy"].served - 100


def test_who_was_served_alone_owes_nothing() -> None:
    """A newcomer begins where the one that went last did, also if that has nobody waiting then."""
    shared = SharedModel()
    for second in range(600):
        shared.earliest_start("old", Cost(10, 90), float(second), waiting_tokens=100)
        shared.issue_permit("b", "old", Cost(10, 90), float(second))
    shared.earliest_start("new", Cost(10, 90), 602.0, waiting_tokens=60_000)
    for _ in range(2):
        shared.issue_permit("b", "new", Cost(10, 90), 602.0)
    shared.earliest_start("old", Cost(10, 90), 602.1, waiting_tokens=100)
    assert shared.holders["old"].served < shared.holders["new"].served


def known_bucket(*, tokens: float, requests: float) -> LimitModel:
    """Return a full bucket whose limits are known."""
    model = LimitModel()
    first = model.issue_permit("b", Cost(0, 0), 0.0)
    gauges = [LimitReading(limit=int(n), remaining=int(n), full_in=0.0) for n in (tokens, requests)]
    model.observe(first, LimitSnapshot(at=0.0, tokens=gauges[0], requests=gauges[1]), 0.0)
    model.release(first, 0.0)
    return model


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_refused_together_all_tell_of_one_level(order: list[int]) -> None:
    """Of several that a stranger's tokens keep out, none was charged: the level is what is told."""
    model = known_bucket(tokens=60_000, requests=600)
    sent = [model.issue_permit("b", Cost(100, 9_900), 100.0 + n / 100) for n in range(4)]
    limit = Limit(resource="tokens", window=60.0, limit=60_000, used=59_500, requested=10_000)
    for number in order:
        model.refuse(sent[number], until=110.0, limit=limit, snapshot=None, now=100.1)
    assert model.tokens.bucket.level_at(100.1) == pytest.approx(500, abs=100)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_refused_for_their_number_all_tell_of_one_level(order: list[int]) -> None:
    """A request that is refused for its number is not counted, nor are those beside it."""
    model = known_bucket(tokens=60_000, requests=600)
    sent = [model.issue_permit("b", Cost(1, 9), 100.0 + n / 100) for n in range(4)]
    limit = Limit(resource="requests", window=60.0, limit=600, used=600, requested=1)
    for number in order:
        model.refuse(sent[number], until=101.0, limit=limit, snapshot=None, now=100.1)
    assert model.requests.level_at(100.1) == pytest.approx(0, abs=1.5)


def test_headers_from_before_a_refusal_are_old_news() -> None:
    """Who was let in before the refused one, and is heard of later, does not undo what it told."""
    model = known_bucket(tokens=60_000, requests=600)
    before = model.issue_permit("b", Cost(100, 900), 100.0)
    refused_one = model.issue_permit("b", Cost(100, 9_900), 100.02)
    limit = Limit(resource="tokens", window=60.0, limit=60_000, used=59_500, requested=10_000)
    model.refuse(refused_one, until=110.0, limit=limit, snapshot=None, now=100.1)
    gauge = LimitReading(limit=60_000, remaining=500, full_in=59.5)
    model.observe(before, LimitSnapshot(at=100.5, tokens=gauge), 100.5)
    assert model.tokens.bucket.level_at(100.5) == pytest.approx(900, abs=200)


def test_a_limit_that_has_fallen_is_no_stranger_s_doing() -> None:
    """What a smaller limit has taken away at once, nobody is expected to go on taking."""
    model = known_bucket(tokens=1_000_000, requests=5_000)
    sent = model.issue_permit("b", Cost(13, 700), 100.0)
    tokens, requests = (
        LimitReading(limit=3_000, remaining=2_287),
        LimitReading(limit=60, remaining=59),
    )
    model.observe(sent, LimitSnapshot(at=100.0, tokens=tokens, requests=requests), 100.0)
    assert model.tokens.bucket.available_at(2_787, 100.0) == pytest.approx(110)
    assert model.requests.available_at(59.5, 100.0) == pytest.approx(100.5)


def test_nobody_is_expected_to_take_more_than_half_of_a_smaller_limit() -> None:
    """A stranger's habit is no larger than what flows, also after a limit has fallen."""
    model = known_bucket(tokens=1_000_000, requests=5_000)
    for at, limit, left in ((100.0, 1_000_000, 0), (200.0, 3_000, 0)):
        sent = model.issue_permit("b", Cost(0, 0), at)
        gauge = LimitReading(limit=limit, remaining=left)
        model.observe(sent, LimitSnapshot(at=at, tokens=gauge), at)
    assert model.tokens.bucket.foreign_rate == model.tokens.bucket.rate / 2


def test_tokens_that_headers_tell_no_more_are_found_out_anew() -> None:
    """Also where they go on telling of requests: what was told of tokens long ago binds nobody."""
    model = known_bucket(tokens=600, requests=500)
    sent = model.issue_permit("b", Cost(10, 90), 5_000.0)
    model.observe(
        sent, LimitSnapshot(at=5_000.0, requests=LimitReading(limit=500, remaining=400)), 5_000.0
    )
    assert model.is_headerless
    assert model.is_guessed
