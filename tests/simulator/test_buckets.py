"""Token buckets, charges and refusals of the simulated limits."""

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


def full_account(knobs: Knobs, now: float = 0.0) -> Account:
    """Return an account with full buckets."""
    account = Account()
    account.set_limits(knobs, now)
    return account


@settings(deadline=None)
@given(limits, st.floats(-1.5, 1), moments)
def test_refill_does_not_depend_on_how_often_the_level_is_read(
    limit: int, share: float, times: list[float]
) -> None:
    looked = Bucket(limit, MINUTE, limit * share, 0.0)
    unseen = Bucket(limit, MINUTE, limit * share, 0.0)
    for time in times:
        looked.level_at(time)
    expected = min(limit, limit * share + limit / MINUTE * times[-1])
    assert looked.level_at(times[-1]) == pytest.approx(expected, abs=1e-6 * limit)
    assert unseen.level_at(times[-1]) == pytest.approx(expected, abs=1e-6 * limit)


@settings(deadline=None)
@given(limits, st.floats(0, 1), st.floats(0.01, 1))
def test_refused_request_is_admitted_after_exactly_the_stated_wait(
    limit: int, level: float, share: float
) -> None:
    knobs = Knobs(tpm=limit, rpm=None)
    cost = max(1, int(limit * share))
    account = full_account(knobs)
    account.charge_tokens(int(limit * (1 - level)), 0.0)
    refused = account.charge_or_refuse(cost, 0.0)
    if refused is None:
        return
    assert refused.wait is not None
    sooner = refused.wait - 0.002 - MINUTE / limit
    if sooner > 0:
        assert account.charge_or_refuse(cost, sooner) is not None
    assert account.charge_or_refuse(cost, refused.wait) is None


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 20))
def test_exhausted_requests_are_admitted_after_the_stated_wait(rpm: int, times: int) -> None:
    account, now = full_account(Knobs(tpm=None, rpm=rpm)), 0.0
    for _ in range(rpm):
        assert account.charge_or_refuse(1, now) is None
    for _ in range(times):
        refused = account.charge_or_refuse(1, now)
        assert refused is not None
        assert refused.wait is not None
        now += refused.wait
        assert account.charge_or_refuse(1, now) is None


@settings(deadline=None)
@given(limits, st.floats(0, 1), st.floats(0.01, 1))
def test_wait_follows_from_the_figures_of_the_refusal(
    limit: int, level: float, share: float
) -> None:
    """`(Used + Requested - Limit) / Limit * window`, to the millisecond."""
    account = full_account(Knobs(tpm=None, tpd=limit, rpm=None))
    account.charge_tokens(int(limit * (1 - level)), 0.0)
    refused = account.charge_or_refuse(max(1, int(limit * share)), 0.0)
    if refused is not None:
        assert refused.wait is not None
        wait = (refused.used + refused.requested - refused.limit) / refused.limit * DAY
        assert refused.wait == pytest.approx(wait, abs=1.001e-3)


@settings(deadline=None)
@given(policies, st.lists(st.tuples(sizes, st.floats(0, 20)), max_size=30))
def test_debt_is_at_most_the_actual_output(
    policy: str, requests: list[tuple[tuple[int, int, float], float]]
) -> None:
    knobs = Knobs(tpm=3_000, rpm=None, policy=policy)  # type: ignore[arg-type]
    account, now, owed = full_account(knobs), 0.0, 0
    for (input_tokens, max_output, used), pause in requests:
        charge = admission_charge(input_tokens, max_output, knobs)
        if account.charge_or_refuse(charge, now) is None:
            output = int(max_output * used)
            account.settle(charge, input_tokens + output, knobs, now)
            owed += output if policy == "actual" else 0
        assert account.tokens[MINUTE].level_at(now) >= -owed - 1e-3
        assert account.tokens[MINUTE].level_at(now) <= 3_000
        now += pause


@pytest.mark.parametrize(
    ("policy", "at_admission", "at_the_end"),
    [("kept", 1_100, 1_100), ("refunded", 1_100, 350), ("actual", 100, 350)],
)
def test_policy_decides_the_charge_at_admission_and_at_the_end(
    policy: str, at_admission: int, at_the_end: int
) -> None:
    """Input 100, `max_output` 1,000, output 250."""
    knobs = Knobs(tpm=10_000, rpm=None, policy=policy)  # type: ignore[arg-type]
    account, charge = full_account(knobs), admission_charge(100, 1_000, knobs)
    account.charge_or_refuse(charge, 0.0)
    assert account.tokens[MINUTE].level_at(0.0) == 10_000 - at_admission
    for _ in range(2):  # a second time changes nothing
        charge = account.settle(charge, 350, knobs, 0.0)
    assert (charge, account.tokens[MINUTE].level_at(0.0)) == (
        at_the_end,
        10_000 - at_the_end,
    )


def test_refusal_for_tokens_counts_as_a_request_and_one_for_requests_does_not() -> None:
    account = full_account(Knobs(tpm=100, rpm=10))
    account.charge_or_refuse(100, 0.0)
    account.charge_or_refuse(100, 0.0)
    assert account.requests[MINUTE].level_at(0.0) == 8
    for _ in range(20):
        account.charge_or_refuse(100, 0.0)
    assert account.requests[MINUTE].level_at(0.0) == 0


def test_request_larger_than_the_limit_is_refused_without_a_wait() -> None:
    refused = full_account(Knobs(tpm=100, rpm=None)).charge_or_refuse(101, 0.0)
    assert refused is not None
    assert refused.wait is None


def test_hidden_window_refuses_with_the_figures_of_the_minute() -> None:
    """With a window of 10 s, a sixth of the minute is available at once."""
    account = full_account(Knobs(tpm=6_000, rpm=None, hidden_window=10.0))
    assert account.charge_or_refuse(1_000, 0.0) is None
    refused = account.charge_or_refuse(500, 0.0)
    assert refused is not None
    assert (refused.window, refused.limit, refused.used) == (MINUTE, 6_000, 1_000)
    assert refused.wait == 5.0
    assert account.charge_or_refuse(500, 5.0) is None


def test_full_hidden_window_admits_a_larger_request_into_debt() -> None:
    account = full_account(Knobs(tpm=6_000, rpm=None, hidden_window=10.0))
    assert account.charge_or_refuse(1_500, 0.0) is None
    assert account.charge_or_refuse(1_500, 0.0) is not None
    assert account.tokens[10.0].level_at(0.0) == -500


def test_use_by_others_slows_the_refill_but_not_the_stated_reset() -> None:
    account = full_account(Knobs(tpm=6_000, rpm=None, used_by_others=0.3))
    account.charge_tokens(6_000, 0.0)
    assert account.tokens[MINUTE].level_at(10.0) == pytest.approx(700)
    assert account.tokens[MINUTE].seconds_until_full(10.0) == pytest.approx(53)


@pytest.mark.parametrize(("limit", "level"), [(20_000, 14_000), (8_000, 2_000), (3_000, 0)])
def test_changed_limit_keeps_the_used_amount_without_debt(limit: int, level: int) -> None:
    account = full_account(Knobs(tpm=10_000, rpm=None))
    account.charge_tokens(6_000, 0.0)
    account.set_limits(Knobs(tpm=limit, rpm=None), 0.0)
    assert account.tokens[MINUTE].level_at(0.0) == level
