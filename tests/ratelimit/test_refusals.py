"""Limits that no header tells of, over another time than the one that they do."""

from __future__ import annotations

import pytest

from nbcodex.models import DAY, Limit, LimitReading, LimitSnapshot, Usage
from nbcodex.ratelimit.charge_policy import Cost, Permit
from nbcodex.ratelimit.rate_limiter import Cooldown, RateLimiter, Wait
from nbcodex.ratelimit.stores import MemoryStore

COST = Cost(50, 150)


def told(at: float, *, left: int = 14_000, limit: int = 14_400) -> LimitSnapshot:
    """Return headers that tell of requests a day."""
    gauge = LimitReading(limit=limit, remaining=left, full_in=(limit - left) * DAY / limit)
    return LimitSnapshot(at=at, requests=gauge)


def ask(ledger: RateLimiter, at: float) -> Permit | Wait | Cooldown:
    """Ask for leave to send, and give the place up where there is none."""
    ticket = ledger.enqueue("b", COST, lambda: None)
    leave = ledger.try_acquire(ticket, at)
    if isinstance(leave, Wait | Cooldown):
        ledger.dequeue(ticket)
    return leave


def let_in(ledger: RateLimiter, at: float, snapshot: LimitSnapshot) -> None:
    """Send a request that is let in, and answered at once."""
    leave = ask(ledger, at)
    assert isinstance(leave, Permit), leave
    ledger.observe(leave, snapshot, at)
    ledger.settle(leave, Usage(input_tokens=50, output_tokens=150), at)


def refused(ledger: RateLimiter, at: float, *, seconds: float, limit: int, wait: float) -> None:
    """Send a request that a limit refuses which is all used up."""
    leave = ask(ledger, at)
    assert isinstance(leave, Permit), leave
    figures = Limit(resource="requests", window=seconds, limit=limit, used=limit, requested=1)
    ledger.refuse(leave, until=at + wait, limit=figures, snapshot=None, now=at)
    ledger.release(leave, at)


def a_minute_s_limit_met() -> RateLimiter:
    """Return a ledger whose headers tell of a day, and which 30 a minute have refused at 110."""
    ledger = RateLimiter()
    let_in(ledger, 100.0, told(100.0))
    refused(ledger, 110.0, seconds=60.0, limit=30, wait=2.0)
    return ledger


def test_another_window_than_that_of_the_headers_is_held_to() -> None:
    """One request every two seconds may go, whatever the headers say of the day."""
    ledger = a_minute_s_limit_met()
    for number in range(20):
        due = 112.0 + 2 * number
        early = ask(ledger, due - 0.1)
        assert isinstance(early, Wait | Cooldown)
        let_in(ledger, due + 0.01, told(due))


def test_what_headers_come_to_tell_of_is_theirs() -> None:
    """Once they tell of the same limit, it is reckoned by them."""
    ledger = a_minute_s_limit_met()
    let_in(
        ledger,
        113.0,
        LimitSnapshot(at=113.0, requests=LimitReading(limit=30, remaining=20, full_in=20.0)),
    )
    for number in range(10):
        let_in(ledger, 113.1 + number / 10, told(113.0, limit=30, left=20))


def test_a_limit_that_is_not_met_again_is_forgotten() -> None:
    """It is full, and has refused nothing for long: the account may have got a larger one."""
    ledger = a_minute_s_limit_met()
    for number in range(40):
        let_in(ledger, 1000.0 + number / 100, told(1000.0))


@pytest.mark.parametrize("in_headers", [True, False])
def test_a_day_s_limit_is_no_queue(*, in_headers: bool) -> None:
    """What is used up for a day closes the model, with the limit's name, as a refusal would."""
    ledger = RateLimiter()
    if in_headers:
        let_in(ledger, 100.0, told(100.0, limit=200, left=0))
    else:
        let_in(
            ledger, 100.0, LimitSnapshot(at=100.0, requests=LimitReading(limit=500, remaining=400))
        )
        refused(ledger, 110.0, seconds=DAY, limit=200, wait=1.0)
        let_in(
            ledger, 112.0, LimitSnapshot(at=112.0, requests=LimitReading(limit=500, remaining=500))
        )
    hold = ask(ledger, 120.0)
    assert isinstance(hold, Cooldown)
    assert hold.limit
    assert hold.limit.name == "requests per day (RPD)"
    assert hold.until == pytest.approx((100 if in_headers else 112) + DAY / 200, abs=5)


def test_tokens_of_a_day_are_counted_as_they_are_used() -> None:
    """Where the server refunds, the day's limit has back what an answer did not use."""
    ledger = RateLimiter()
    gauge = LimitReading(limit=60_000, remaining=59_000, full_in=1.0)
    let_in(ledger, 100.0, LimitSnapshot(at=100.0, tokens=gauge))
    bucket = ledger._store.transaction("b", lambda shared: shared.model)
    bucket.tokens.chosen = 1
    leave = ask(ledger, 110.0)
    assert isinstance(leave, Permit)
    limit = Limit(resource="tokens", window=DAY, limit=1_000_000, used=999_900, requested=200)
    ledger.refuse(leave, until=110.0, limit=limit, snapshot=None, now=110.0)
    (window,) = bucket.undeclared
    window.bucket.level = 1_000.0
    answered = ask(ledger, 111.0)
    assert isinstance(answered, Permit)
    ledger.settle(answered, Usage(input_tokens=50, output_tokens=10), 111.0)
    assert window.bucket.level_at(111.0) == pytest.approx(1_000 - 50 - 10, abs=20)


def a_day_used_up(*, store: MemoryStore | None = None) -> RateLimiter:
    """Return a ledger of which a refusal at 110 has told that a day's 200 requests are used up."""
    ledger = RateLimiter(store, holder="a")
    let_in(ledger, 100.0, LimitSnapshot(at=100.0, requests=LimitReading(limit=500, remaining=400)))
    refused(ledger, 110.0, seconds=DAY, limit=200, wait=1.0)
    let_in(ledger, 112.0, LimitSnapshot(at=112.0, requests=LimitReading(limit=500, remaining=500)))
    return ledger


def test_whoever_waits_for_a_day_s_limit_is_told() -> None:
    """Not only the first in the row: nobody queues for hours."""
    ledger = a_day_used_up()
    for _ in range(3):
        hold = ledger.try_acquire(ledger.enqueue("b", COST, lambda: None), 120.0)
        assert isinstance(hold, Cooldown)


def test_what_another_kernel_finds_open_wakes_the_first_in_the_row() -> None:
    """A day's limit that headers come to tell of larger keeps nobody here until its old moment."""
    store, woken = MemoryStore(), []
    other = a_day_used_up(store=store)
    ledger = RateLimiter(store, holder="b")
    ticket = ledger.enqueue("b", COST, lambda: woken.append(True))
    assert isinstance(ledger.try_acquire(ticket, 120.0), Wait | Cooldown)
    probe = other.probe(other.enqueue("b", COST, lambda: None), 121.0)
    gauge = LimitReading(limit=200, remaining=150, full_in=50 * DAY / 200)
    other.observe(probe, LimitSnapshot(at=121.0, requests=gauge), 121.0)
    ledger.heartbeat(122.0)
    assert woken
    assert isinstance(ledger.try_acquire(ticket, 122.0), Permit)


def test_what_never_reached_the_server_is_charged_to_no_window() -> None:
    """Offline, a day's limit is not used up by attempts, and a late refusal is given back, too."""
    ledger = a_minute_s_limit_met()
    bucket = ledger._store.transaction("b", lambda shared: shared.model)
    (window,) = bucket.undeclared
    for number in range(20):
        leave = ask(ledger, 200.0 + number / 10)
        assert isinstance(leave, Permit)
        ledger.release(leave, 200.0 + number / 10)
    assert window.bucket.level_at(202.0) == 30
