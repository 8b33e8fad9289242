"""What is learnt from answers, headers and refusals, and how holders share it."""

from __future__ import annotations

import pytest

from nbcodex.pacing.output import Output
from nbcodex.pacing.reservation import Cost
from nbcodex.pacing.shares import Shared
from nbcodex.pacing.told import refused, told_by
from nbcodex.records import Gauge, Limit, Snapshot


def test_short_answers_do_not_mislead() -> None:
    """While most answers are still under way, the few that have ended do not stand for all."""
    output = Output()
    for _ in range(100):
        output.begin(1000, 0.0)
    for _ in range(10):
        output.drop(1000, 0.0)
        output.end(1000, 50, 1.0)
    early = output.share(1.0)
    for _ in range(90):
        output.drop(1000, 0.0)
        output.end(1000, 50, 1.0)
    assert early > 0.4
    assert output.share(1.0) < 0.11


def test_an_empty_bucket_can_be_in_debt() -> None:
    """Nothing left, and longer than a minute to full: the rest of the wait is a debt."""
    assert told_by(Gauge(limit=600, remaining=0, full_in=70.0)) == (600, 10, pytest.approx(-100))


def test_a_rate_is_read_off_the_time_to_full() -> None:
    """Where enough is gone, the time to full tells the rate; else it is a minute's."""
    assert told_by(Gauge(limit=600, remaining=300, full_in=60.0)) == (600, 5, 300)
    assert told_by(Gauge(limit=600, remaining=599, full_in=60.0)) == (600, 10, 599)


def test_a_message_outweighs_headers() -> None:
    """The figures of a refusal's message are exact, and may show a debt; headers cannot."""
    snapshot = Snapshot(at=0.0, tokens=Gauge(limit=600, remaining=0))
    limit = Limit(resource="tokens", window=60.0, limit=600, used=650, requested=10)
    told = refused(limit, snapshot)
    assert told
    assert told.gauge.remaining == -50
    assert not told.hidden


def test_a_refusal_of_what_is_there_is_hidden() -> None:
    """There was enough: a shorter window refused it."""
    limit = Limit(resource="tokens", window=60.0, limit=600, used=50, requested=10)
    told = refused(limit, None)
    assert told
    assert told.hidden


def test_who_was_idle_has_no_claim() -> None:
    """A holder that comes back is served like the others from then on, not before them."""
    shared = Shared()
    for second in range(20):
        shared.moment("busy", Cost(10, 90), float(second), asked=200)
        shared.take("b", "busy", Cost(10, 90), float(second))
    shared.share("idle", 19.0)
    shared.moment("busy", Cost(10, 90), 20.0, asked=200)
    shared.moment("idle", Cost(10, 90), 20.0, asked=200)
    assert shared.holders["idle"].served == shared.holders["busy"].served
