"""Limits that only refusals state."""

from __future__ import annotations

import pytest

from nbcodex.models import DAY, Limit, LimitReading, LimitSnapshot, Usage
from nbcodex.ratelimit.charge_policy import Need, Permit
from nbcodex.ratelimit.limit_model import Refusal
from nbcodex.ratelimit.rate_limiter import Cooldown, RateLimiter, Wait
from nbcodex.ratelimit.stores import MemoryStore

NEED = Need(50, 150)


def daily_headers(at: float, *, left: int = 14_000, limit: int = 14_400) -> LimitSnapshot:
    """Return headers that state requests a day."""
    reading = LimitReading(limit=limit, remaining=left, full_in=(limit - left) * DAY / limit)
    return LimitSnapshot(at=at, requests=reading)


def ask(limiter: RateLimiter, at: float) -> Permit | Wait | Cooldown:
    """Ask for a permit, and leave the queue if there is none."""
    entry = limiter.enqueue("b", NEED, lambda: None)
    answer = limiter.try_acquire(entry, at)
    if isinstance(answer, Wait | Cooldown):
        limiter.dequeue(entry)
    return answer


def answered_request(limiter: RateLimiter, at: float, snapshot: LimitSnapshot) -> None:
    """Send a request that is admitted, and answered at once."""
    answer = ask(limiter, at)
    assert isinstance(answer, Permit), answer
    limiter.observe(answer, snapshot, at)
    limiter.settle(answer, Usage(input_tokens=50, output_tokens=150), at)


def refused(limiter: RateLimiter, at: float, *, seconds: float, limit: int, wait: float) -> None:
    """Send a request that is refused by a limit without any capacity."""
    answer = ask(limiter, at)
    assert isinstance(answer, Permit), answer
    figures = Limit(resource="requests", window=seconds, limit=limit, used=limit, requested=1)
    limiter.refuse(answer, Refusal(at + wait, figures), at)
    limiter.release(answer, at)


def limiter_with_undeclared_limit() -> RateLimiter:
    """Return a limiter whose headers state a day; at 110, a limit of 30 a minute has refused it."""
    limiter = RateLimiter()
    answered_request(limiter, 100.0, daily_headers(100.0))
    refused(limiter, 110.0, seconds=60.0, limit=30, wait=2.0)
    return limiter


def test_limit_stated_only_by_a_refusal_is_kept() -> None:
    """One request every two seconds is sent, although the headers state a day."""
    limiter = limiter_with_undeclared_limit()
    for number in range(20):
        due = 112.0 + 2 * number
        early = ask(limiter, due - 0.1)
        assert isinstance(early, Wait | Cooldown)
        answered_request(limiter, due + 0.01, daily_headers(due))


@pytest.mark.parametrize("noun", ["input-images", "messages"])
def test_limit_of_another_noun_begins_a_cooldown_but_teaches_no_rate(noun: str) -> None:
    limiter = RateLimiter()
    answered_request(limiter, 100.0, daily_headers(100.0))
    permit = ask(limiter, 110.0)
    assert isinstance(permit, Permit)
    limit = Limit(resource=noun, window=60.0, limit=10, used=10, requested=2)
    limiter.refuse(permit, Refusal(113.0, limit), 110.0)
    cooldown = ask(limiter, 111.0)
    assert isinstance(cooldown, Cooldown)
    assert (cooldown.until, cooldown.limit) == (113.0, limit)
    for number in range(20):
        answered_request(limiter, 113.1 + number / 10, daily_headers(113.1))


def test_headers_override_limits_learned_from_refusals() -> None:
    """Once headers state the same limit, it is projected by them."""
    limiter = limiter_with_undeclared_limit()
    answered_request(
        limiter,
        113.0,
        LimitSnapshot(at=113.0, requests=LimitReading(limit=30, remaining=20, full_in=20.0)),
    )
    for number in range(10):
        answered_request(limiter, 113.1 + number / 10, daily_headers(113.0, limit=30, left=20))


def test_full_undeclared_limit_is_forgotten_after_ten_minutes() -> None:
    """It has refused nothing for long: the account may have a larger one."""
    limiter = limiter_with_undeclared_limit()
    for number in range(40):
        answered_request(limiter, 1000.0 + number / 100, daily_headers(1000.0))


@pytest.mark.parametrize("in_headers", [True, False])
def test_exhausted_daily_limit_parks_instead_of_queueing(*, in_headers: bool) -> None:
    """It closes the model under the limit's name, as a refusal would."""
    limiter = RateLimiter()
    if in_headers:
        answered_request(limiter, 100.0, daily_headers(100.0, limit=200, left=0))
    else:
        answered_request(
            limiter, 100.0, LimitSnapshot(at=100.0, requests=LimitReading(limit=500, remaining=400))
        )
        refused(limiter, 110.0, seconds=DAY, limit=200, wait=1.0)
        answered_request(
            limiter, 112.0, LimitSnapshot(at=112.0, requests=LimitReading(limit=500, remaining=500))
        )
    cooldown = ask(limiter, 120.0)
    assert isinstance(cooldown, Cooldown)
    assert cooldown.limit
    assert cooldown.limit.name == "requests per day (RPD)"
    assert cooldown.until == pytest.approx((100 if in_headers else 112) + DAY / 200, abs=5)


def test_daily_token_limit_gets_unused_output_back() -> None:
    """Where the server refunds, the limit over a day is refunded, too."""
    limiter = RateLimiter()
    reading = LimitReading(limit=60_000, remaining=59_000, full_in=1.0)
    answered_request(limiter, 100.0, LimitSnapshot(at=100.0, tokens=reading))
    bucket = limiter.store.transaction("b", lambda shared: shared.model)
    bucket.tokens.assumed_index = 1
    answer = ask(limiter, 110.0)
    assert isinstance(answer, Permit)
    limit = Limit(resource="tokens", window=DAY, limit=1_000_000, used=999_900, requested=200)
    limiter.refuse(answer, Refusal(110.0, limit), 110.0)
    (window,) = bucket.undeclared
    window.bucket.level = 1_000.0
    answered = ask(limiter, 111.0)
    assert isinstance(answered, Permit)
    limiter.settle(answered, Usage(input_tokens=50, output_tokens=10), 111.0)
    assert window.bucket.level_at(111.0) == pytest.approx(1_000 - 50 - 10, abs=20)


def limiter_with_exhausted_day(*, store: MemoryStore | None = None) -> RateLimiter:
    """Return a limiter that a limit of 200 requests a day has refused at 110."""
    limiter = RateLimiter(store, process_id="a")
    answered_request(
        limiter, 100.0, LimitSnapshot(at=100.0, requests=LimitReading(limit=500, remaining=400))
    )
    refused(limiter, 110.0, seconds=DAY, limit=200, wait=1.0)
    answered_request(
        limiter, 112.0, LimitSnapshot(at=112.0, requests=LimitReading(limit=500, remaining=500))
    )
    return limiter


def test_exhausted_daily_limit_is_announced_to_the_whole_queue() -> None:
    """No request queues for hours, at any place in the queue."""
    limiter = limiter_with_exhausted_day()
    for _ in range(3):
        cooldown = limiter.try_acquire(limiter.enqueue("b", NEED, lambda: None), 120.0)
        assert isinstance(cooldown, Cooldown)


def test_daily_limit_that_another_kernel_finds_larger_wakes_the_first() -> None:
    """Headers that state more end an inferred cooldown here."""
    store, woken = MemoryStore(), []
    other = limiter_with_exhausted_day(store=store)
    limiter = RateLimiter(store, process_id="b")
    entry = limiter.enqueue("b", NEED, lambda: woken.append(True))
    assert isinstance(limiter.try_acquire(entry, 120.0), Wait | Cooldown)
    probe = other.probe(other.enqueue("b", NEED, lambda: None), 121.0)
    reading = LimitReading(limit=200, remaining=150, full_in=50 * DAY / 200)
    other.observe(probe, LimitSnapshot(at=121.0, requests=reading), 121.0)
    limiter.heartbeat(122.0)
    assert woken
    assert isinstance(limiter.try_acquire(entry, 122.0), Permit)


def test_undeclared_limit_is_not_charged_for_attempts_that_never_arrived() -> None:
    """Offline attempts use up no daily limit, and a late refusal is refunded."""
    limiter = limiter_with_undeclared_limit()
    bucket = limiter.store.transaction("b", lambda shared: shared.model)
    (window,) = bucket.undeclared
    for number in range(20):
        answer = ask(limiter, 200.0 + number / 10)
        assert isinstance(answer, Permit)
        limiter.release(answer, 200.0 + number / 10)
    assert window.bucket.level_at(202.0) == 30
