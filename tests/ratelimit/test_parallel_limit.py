"""Limits on parallel requests and on the growth of traffic."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nbcodex.models import Limit, LimitReading, LimitSnapshot, Usage
from nbcodex.ratelimit.charge_policy import Need, Permit
from nbcodex.ratelimit.limit_model import RAMP_PERIOD_S, Refusal
from nbcodex.ratelimit.rate_limiter import Cooldown, RateLimiter, Wait
from nbcodex.ratelimit.stores import MemoryStore
from nbcodex.ratelimit.undeclared_limits import (
    MAX_TRIAL_INTERVAL_S,
    MIN_TRIAL_INTERVAL_S,
    ParallelLimit,
)

NEED = Need(10, 90)
PARALLEL = Limit(resource="parallel requests")


def sent(limiter: RateLimiter, now: float, *, count: int = 1) -> list[Permit]:
    """Send so many requests by probes, which are counted like others."""
    permits = []
    for _ in range(count):
        permit = limiter.probe(limiter.enqueue("b", NEED, lambda: None), now)
        permit.is_probe = False
        permits.append(permit)
    return permits


def ask(limiter: RateLimiter, now: float) -> Permit | Wait | Cooldown:
    """Ask for a permit, and leave the queue if there is none."""
    entry = limiter.enqueue("b", NEED, lambda: None)
    answer = limiter.try_acquire(entry, now)
    if isinstance(answer, Wait | Cooldown):
        limiter.dequeue(entry)
    return answer


def limit_of(limiter: RateLimiter) -> ParallelLimit:
    return limiter.store.transaction("b", lambda shared: shared.model.parallel)


@pytest.mark.parametrize(("count", "accepted"), [(4, 1), (4, 2), (8, 5)])
def test_refused_burst_shows_how_many_were_accepted(count: int, accepted: int) -> None:
    limiter = RateLimiter()
    permits = sent(limiter, 100.0, count=count)
    for permit in permits[accepted:]:
        limiter.refuse(permit, Refusal(101.0, PARALLEL), 100.1)
    assert limit_of(limiter).limit == accepted


@pytest.mark.parametrize(("stated", "in_flight", "limit"), [(2, 4, 2), (5, 3, 2), (1, 1, 1)])
def test_stated_parallel_limit_is_adopted_unless_fewer_were_refused(
    stated: int, in_flight: int, limit: int
) -> None:
    limiter = RateLimiter()
    *_, refused = sent(limiter, 100.0, count=in_flight)
    limit_stated = Limit(resource="parallel requests", limit=stated)
    limiter.refuse(refused, Refusal(101.0, limit_stated), 100.1)
    assert limit_of(limiter).limit == limit


def test_request_waits_for_a_slot_and_is_woken_when_one_is_free() -> None:
    limiter, woken = RateLimiter(), list[bool]()
    first, second = sent(limiter, 100.0, count=2)
    limiter.refuse(second, Refusal(101.0, PARALLEL), 100.1)
    entry = limiter.enqueue("b", NEED, lambda: woken.append(True))
    answer = limiter.try_acquire(entry, 102.0)
    assert isinstance(answer, Wait)
    assert (answer.start_at, answer.limit) == (None, replace(PARALLEL, limit=1))
    woken.clear()
    limiter.settle(first, Usage(input_tokens=10, output_tokens=20), 103.0)
    assert woken
    assert isinstance(limiter.try_acquire(entry, 103.0), Permit)


def test_parallel_limit_counts_requests_of_all_kernels_and_is_shared_in_turns() -> None:
    store = MemoryStore()
    one, other = (RateLimiter(store, process_id=name) for name in ("a", "b"))
    first, second = sent(one, 100.0, count=2)
    one.refuse(second, Refusal(101.0, PARALLEL), 100.1)
    waiting = other.enqueue("b", NEED, lambda: None)
    assert isinstance(other.try_acquire(waiting, 102.0), Wait)
    one.settle(first, Usage(input_tokens=10, output_tokens=20), 102.1)
    # The kernel that was served less comes first.
    assert isinstance(ask(one, 102.1), Wait)
    assert isinstance(other.try_acquire(waiting, 102.2), Permit)


def test_trials_become_more_after_each_interval_and_rarer_after_each_refusal() -> None:
    limit = ParallelLimit()
    assert limit.max_in_flight_at(0.0) == math.inf
    limit.learn(4, 100.0)
    interval = MIN_TRIAL_INTERVAL_S
    allowed = [limit.max_in_flight_at(100.0 + n * interval) for n in (0, 0.9, 1, 2, 3)]
    assert allowed == [4, 4, 5, 7, 11]
    limit.learn(4, 100.0 + interval)
    assert limit.max_in_flight_at(100.0 + 2 * interval) == 4
    assert limit.next_increase_at(100.0 + 2 * interval) == 100.0 + 3 * interval
    for _ in range(10):
        limit.learn(4, limit.next_increase_at(limit.learned_at))
    assert limit.trial_interval == MAX_TRIAL_INTERVAL_S
    limit.learn(4, limit.learned_at + 10 * MAX_TRIAL_INTERVAL_S)
    assert limit.trial_interval == MIN_TRIAL_INTERVAL_S


@pytest.mark.parametrize("ends_between", [True, False])
def test_streams_that_end_early_in_a_row_show_a_parallel_limit(*, ends_between: bool) -> None:
    limiter = RateLimiter()
    permits = sent(limiter, 100.0, count=4)
    for permit in permits:
        limiter.observe(permit, None, 100.1)
    limiter.release(permits[0], 101.0, ended_early=True)
    if ends_between:
        limiter.settle(permits[1], Usage(input_tokens=10, output_tokens=20), 101.5)
    limiter.release(permits[2], 102.0, ended_early=True)
    assert limit_of(limiter).limit == (None if ends_between else 2)


def test_streams_of_a_server_with_rate_limits_show_no_parallel_limit() -> None:
    limiter = RateLimiter()
    reading = LimitReading(limit=1e6, remaining=9e5, full_in=6.0)
    permits = sent(limiter, 100.0, count=4)
    for permit in permits:
        limiter.observe(permit, LimitSnapshot(at=100.1, tokens=reading), 100.1)
    for permit in permits:
        limiter.release(permit, 101.0, ended_early=True)
    assert limit_of(limiter).limit is None


def test_early_end_of_the_only_stream_shows_nothing() -> None:
    limiter = RateLimiter()
    for second in range(5):
        (permit,) = sent(limiter, 100.0 + second)
        limiter.observe(permit, None, 100.0 + second)
        limiter.release(permit, 100.5 + second, ended_early=True)
    assert limit_of(limiter).limit is None


SLOW_DOWN = Limit(resource="traffic growth")


@pytest.mark.parametrize("has_headers", [True, False])
def test_slow_down_halves_the_rate_and_lets_it_grow_slowly(*, has_headers: bool) -> None:
    limiter = RateLimiter()
    reading = LimitReading(limit=1e9, remaining=1e9 - 100, full_in=0.1)
    snapshot = LimitSnapshot(at=100.0, tokens=reading) if has_headers else None
    permits = []
    for number in range(100):  # 1,000 tokens per second
        (permit,) = sent(limiter, 100.0 + number / 10)
        limiter.observe(permit, snapshot, 100.0 + number / 10)
        permits.append(permit)
    for permit in sent(limiter, 110.0, count=5):
        limiter.refuse(permit, Refusal(111.0, SLOW_DOWN), 110.0)
    model = limiter.store.transaction("b", lambda shared: shared.model)
    assert model.slow_down_rate == pytest.approx(500, rel=0.15)
    later = model.slow_down_rate_at(110.0 + RAMP_PERIOD_S)
    assert later == pytest.approx(1.5 * model.slow_down_rate)
    for permit in permits:
        limiter.release(permit, 111.0)
    assert isinstance(ask(limiter, 112.0), Permit)
    answer = ask(limiter, 112.1)
    assert isinstance(answer, Wait)
    assert answer.start_at == pytest.approx(112.0 + 100 / model.slow_down_rate, abs=0.01)


def test_slow_down_of_a_single_request_sets_no_rate() -> None:
    limiter = RateLimiter()
    (permit,) = sent(limiter, 100.0)
    limiter.refuse(permit, Refusal(101.0, SLOW_DOWN), 100.1)
    assert isinstance(ask(limiter, 101.0), Permit)
    model = limiter.store.transaction("b", lambda shared: shared.model)
    assert model.slow_down_rate == math.inf
