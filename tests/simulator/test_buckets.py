"""The arithmetic of the limits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbcodex.models import DAY, MINUTE
from nbcodex.simulator.buckets import Account, Bucket, admission_charge
from nbcodex.simulator.knobs import Knobs

limits = st.integers(1, 2_000_000)
moments = st.lists(st.floats(0, 500), min_size=1, max_size=8).map(sorted)
policies = st.sampled_from(["kept", "refunded", "actual"])
sizes = st.tuples(st.integers(1, 2_000), st.integers(0, 2_000), st.floats(0, 1))


def account(knobs: Knobs, now: float = 0.0) -> Account:
    """Return an account with full buckets."""
    made = Account()
    made.set_limits(knobs, now)
    return made


@settings(deadline=None)
@given(limits, st.floats(-1.5, 1), moments)
def test_refill_does_not_depend_on_who_looks(limit: int, share: float, times: list[float]) -> None:
    """The level after a while is the same however often it was looked at."""
    looked = Bucket(limit, MINUTE, limit * share, 0.0)
    unseen = Bucket(limit, MINUTE, limit * share, 0.0)
    for time in times:
        looked.level_at(time)
    expected = min(limit, limit * share + limit / MINUTE * times[-1])
    assert looked.level_at(times[-1]) == pytest.approx(expected, abs=1e-6 * limit)
    assert unseen.level_at(times[-1]) == pytest.approx(expected, abs=1e-6 * limit)


@settings(deadline=None)
@given(limits, st.floats(0, 1), st.floats(0.01, 1))
def test_who_waits_as_told_gets_in(limit: int, level: float, share: float) -> None:
    """A refused request is admitted after exactly the stated wait, and not a token sooner."""
    knobs = Knobs(tpm=limit, rpm=None)
    cost = max(1, int(limit * share))
    asked = account(knobs)
    asked.charge(int(limit * (1 - level)), 0.0)
    refused = asked.charge_or_refuse(cost, 0.0)
    if refused is None:
        return
    assert refused.wait is not None
    sooner = refused.wait - 0.002 - MINUTE / limit
    if sooner > 0:
        assert asked.charge_or_refuse(cost, sooner) is not None
    assert asked.charge_or_refuse(cost, refused.wait) is None


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 20))
def test_who_waits_for_a_request_gets_in(rpm: int, times: int) -> None:
    """The same holds for requests, one after the other, when all are used up."""
    asked, now = account(Knobs(tpm=None, rpm=rpm)), 0.0
    for _ in range(rpm):
        assert asked.charge_or_refuse(1, now) is None
    for _ in range(times):
        refused = asked.charge_or_refuse(1, now)
        assert refused is not None
        assert refused.wait is not None
        now += refused.wait
        assert asked.charge_or_refuse(1, now) is None


@settings(deadline=None)
@given(limits, st.floats(0, 1), st.floats(0.01, 1))
def test_the_figures_of_a_refusal_give_its_wait(limit: int, level: float, share: float) -> None:
    """`(Used + Requested - Limit) / Limit * window` is the stated wait, to the millisecond."""
    asked = account(Knobs(tpm=None, tpd=limit, rpm=None))
    asked.charge(int(limit * (1 - level)), 0.0)
    refused = asked.charge_or_refuse(max(1, int(limit * share)), 0.0)
    if refused is not None:
        assert refused.wait is not None
        wait = (refused.used + refused.requested - refused.limit) / refused.limit * DAY
        assert refused.wait == pytest.approx(wait, abs=1.001e-3)


@settings(deadline=None)
@given(policies, st.lists(st.tuples(sizes, st.floats(0, 20)), max_size=30))
def test_the_bucket_goes_into_debt_only_for_actual_output(
    policy: str, requests: list[tuple[tuple[int, int, float], float]]
) -> None:
    """Only outputs charged at the end can push the level below zero, and only by their sum."""
    knobs = Knobs(tpm=3_000, rpm=None, policy=policy)  # type: ignore[arg-type]
    asked, now, owed = account(knobs), 0.0, 0
    for (input_tokens, max_output, used), pause in requests:
        charge = admission_charge(input_tokens, max_output, knobs)
        if asked.charge_or_refuse(charge.tokens, now) is None:
            output = int(max_output * used)
            asked.settle_output(charge, output, knobs, now)
            owed += output if policy == "actual" else 0
        assert asked.tokens[MINUTE].level_at(now) >= -owed - 1e-3
        assert asked.tokens[MINUTE].level_at(now) <= 3_000
        now += pause


@pytest.mark.parametrize(
    ("policy", "at_admission", "at_the_end"),
    [("kept", 1_100, 1_100), ("refunded", 1_100, 350), ("actual", 100, 350)],
)
def test_each_policy_charges_what_it_says(policy: str, at_admission: int, at_the_end: int) -> None:
    """Input 100, `max_output` 1,000, output 250: charged so at admission, and so at the end."""
    knobs = Knobs(tpm=10_000, rpm=None, policy=policy)  # type: ignore[arg-type]
    asked, charge = account(knobs), admission_charge(100, 1_000, knobs)
    asked.charge_or_refuse(charge.tokens, 0.0)
    assert asked.tokens[MINUTE].level_at(0.0) == 10_000 - at_admission
    asked.settle_output(charge, 250, knobs, 0.0)
    asked.settle_output(charge, 999, knobs, 0.0)
    assert (charge.tokens, asked.tokens[MINUTE].level_at(0.0)) == (at_the_end, 10_000 - at_the_end)


def test_a_request_refused_for_its_tokens_counts_as_a_request() -> None:
    """Failed requests count, but for those refused because requests themselves ran out."""
    asked = account(Knobs(tpm=100, rpm=10))
    asked.charge_or_refuse(100, 0.0)
    asked.charge_or_refuse(100, 0.0)
    assert asked.requests[MINUTE].level_at(0.0) == 8
    for _ in range(20):
        asked.charge_or_refuse(100, 0.0)
    assert asked.requests[MINUTE].level_at(0.0) == 0


def test_a_request_larger_than_the_limit_never_gets_in() -> None:
    """It is refused without a wait even when the bucket is full."""
    refused = account(Knobs(tpm=100, rpm=None)).charge_or_refuse(101, 0.0)
    assert refused is not None
    assert refused.wait is None


def test_a_hidden_window_refuses_while_the_minute_has_enough() -> None:
    """With a burst window of 10 s, a sixth of the minute goes at once, the rest must wait."""
    asked = account(Knobs(tpm=6_000, rpm=None, hidden_window=10.0))
    assert asked.charge_or_refuse(1_000, 0.0) is None
    refused = asked.charge_or_refuse(500, 0.0)
    assert refused is not None
    assert (refused.window, refused.limit, refused.used) == (MINUTE, 6_000, 1_000)
    assert refused.wait == 5.0
    assert asked.charge_or_refuse(500, 5.0) is None


def test_a_hidden_window_lets_a_large_request_pass_when_it_is_full() -> None:
    """A request larger than the hidden window gets in, and leaves a debt there."""
    asked = account(Knobs(tpm=6_000, rpm=None, hidden_window=10.0))
    assert asked.charge_or_refuse(1_500, 0.0) is None
    assert asked.charge_or_refuse(1_500, 0.0) is not None
    assert asked.tokens[10.0].level_at(0.0) == -500


def test_a_stranger_slows_the_refill() -> None:
    """A stranger who takes 30% leaves 70% of the refill, while the headers know nothing of it."""
    asked = account(Knobs(tpm=6_000, rpm=None, used_by_others=0.3))
    asked.charge(6_000, 0.0)
    assert asked.tokens[MINUTE].level_at(10.0) == pytest.approx(700)
    assert asked.tokens[MINUTE].full_in(10.0) == pytest.approx(53)


@pytest.mark.parametrize(("limit", "level"), [(20_000, 14_000), (8_000, 2_000), (3_000, 0)])
def test_a_changed_limit_keeps_what_was_taken(limit: int, level: int) -> None:
    """A step of the limit moves the level with it, but makes no debt."""
    asked = account(Knobs(tpm=10_000, rpm=None))
    asked.charge(6_000, 0.0)
    asked.set_limits(Knobs(tpm=limit, rpm=None), 0.0)
    assert asked.tokens[MINUTE].level_at(0.0) == level
