"""The projection of a server's token bucket."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbcodex.ratelimit.token_bucket import FOREIGN_TRUST_S, TokenBucket

amounts = st.floats(0, 1000)
steps = st.lists(st.tuples(st.floats(0, 30), amounts), max_size=30)


def full(limit: float = 600.0) -> TokenBucket:
    return TokenBucket(limit=limit, rate=limit / 60, level=limit, updated_at=100.0)


def test_level_rises_by_the_rate_up_to_the_limit() -> None:
    bucket = full()
    bucket.take(600, 100)
    assert bucket.level_at(130) == pytest.approx(300)
    assert bucket.level_at(1000) == 600


def test_available_at_is_exact() -> None:
    """At that instant there is enough, and not before."""
    bucket = full()
    bucket.take(600, 100)
    moment = bucket.available_at(50, 100)
    assert moment == pytest.approx(105)
    assert bucket.level_at(moment) >= 50 - 1e-9


def test_unknown_limit_makes_nothing_wait() -> None:
    assert TokenBucket().available_at(1e9, 7.0) == 7.0


def test_amount_larger_than_the_limit_goes_when_the_bucket_is_full() -> None:
    """The server decides on one that cannot fit."""
    bucket = full()
    bucket.take(60, 100)
    assert bucket.available_at(10_000, 100) == pytest.approx(106, abs=0.01)


def test_first_snapshot_counts_what_was_taken_and_flowed_in_since() -> None:
    bucket = TokenBucket()
    mark = bucket.take(100, 10.0)
    bucket.take(50, 11.0)
    bucket.correct(bucket.error(mark, 500, elapsed=0.0), 20.0, taken_at=10.0, others_took=True)
    bucket.set_limit(600, 10, now=20.0, stated_at=10.0)
    assert bucket.level_at(20.0) == pytest.approx(500 - 50 + 100)


@given(steps)
def test_snapshot_that_agrees_shows_no_error(events: list[tuple[float, float]]) -> None:
    """Where the projection is right, for any earlier instant."""
    bucket, now, seen = full(1e6), 100.0, []
    for wait, amount in events:
        now += wait
        mark = bucket.take(amount, now)
        seen.append((mark, bucket.level))
    assert all(
        bucket.error(mark, level, elapsed=0) == pytest.approx(0, abs=1e-6) for mark, level in seen
    )


@given(steps, st.floats(-500, 500))
def test_error_is_corrected_once(events: list[tuple[float, float]], wrong: float) -> None:
    """After a correction, older marks that shared the error show none."""
    bucket, now, marks = TokenBucket(limit=1e6, rate=1.0, level=5e5, updated_at=100.0), 100.0, []
    for wait, amount in events:
        now += wait
        marks.append((bucket.take(amount, now), bucket.level + wrong))
    for mark, level in marks[:1]:
        bucket.correct(bucket.error(mark, level, elapsed=0), now, taken_at=now, others_took=True)
    for mark, level in marks:
        assert bucket.error(mark, level, elapsed=0) == pytest.approx(0, abs=1e-6)


def test_debt_is_waited_out() -> None:
    bucket = full()
    bucket.take(900, 100)
    assert bucket.available_at(1, 100) == pytest.approx(100 + 30.1)


def test_drain_by_others_slows_the_projection() -> None:
    """Snapshots keep showing less than projected."""
    bucket = full()
    bucket.take(600, 100)
    for second in range(101, 160):
        mark = bucket.take(0, second)
        bucket.correct(
            bucket.error(mark, 7 * (second - 100.0), elapsed=0),
            second,
            taken_at=second,
            others_took=True,
        )
    assert bucket.foreign_rate == pytest.approx(3, rel=0.1)
    assert math.isclose(bucket.available_at(bucket.level + 70, 159), 159 + 10, rel_tol=0.01)


def test_drain_by_others_is_trusted_only_briefly() -> None:
    """One large surprise slows nothing for longer."""
    bucket = full()
    mark = bucket.take(0, 100)
    bucket.correct(bucket.error(mark, 0, elapsed=0), 100, taken_at=100, others_took=True)
    assert bucket.foreign_rate == bucket.rate / 2
    assert bucket.available_at(30, 100) == pytest.approx(106)
    assert bucket.available_at(600, 100) == pytest.approx(160 + FOREIGN_TRUST_S / 2, rel=1e-3)
    assert bucket.available_at(600, 150) == pytest.approx(160 + FOREIGN_TRUST_S / 2, rel=1e-3)
