"""A holder that was silent for too long, or whose bucket was lost, spoils no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nbcodex.models import Limit, LimitReading, LimitSnapshot, Usage
from nbcodex.ratelimit.charge_policy import Cost, Permit
from nbcodex.ratelimit.rate_limiter import Cooldown, RateLimiter, Wait
from nbcodex.ratelimit.sharing import LEASE_S, SharedModel
from nbcodex.ratelimit.stores import MemoryStore

SNAPSHOT = LimitSnapshot(at=1.5, tokens=LimitReading(limit=600.0, remaining=500.0))
USAGE = Usage(input_tokens=10, output_tokens=40)


class Twice(MemoryStore):
    """A store that does each operation twice, as when another host was faster."""

    def transaction(self, name: str, operation: Callable[[SharedModel], Any]) -> Any:
        import copy

        operation(copy.deepcopy(self._models.setdefault(name, SharedModel())))
        return super().transaction(name, operation)


def taken(ledger: RateLimiter, now: float) -> Permit:
    given = ledger.try_acquire(ledger.enqueue("b", Cost(10, 90), lambda: None), now)
    assert isinstance(given, Permit)
    return given


def counts(store: MemoryStore) -> tuple[int, int, float]:
    bucket = store.transaction("b", lambda shared: shared.model)
    return bucket.unanswered, bucket.output.in_flight, bucket.output.start_sum


def test_a_refusal_from_a_bucket_that_was_lost_teaches_nothing() -> None:
    """Its number and its marks mean nothing in the new one, which goes on learning from its own."""
    ledger = RateLimiter(MemoryStore(), holder="me")
    for second in range(50):
        given = taken(ledger, float(second))
        ledger.observe(given, SNAPSHOT, float(second))
        ledger.settle(given, USAGE, float(second))
    astray, store = taken(ledger, 60.0), MemoryStore()
    ledger.use_store(store)
    limit = Limit(resource="tokens", window=60.0, limit=600, used=600, requested=100)
    ledger.refuse(astray, until=61.0, limit=limit, snapshot=None, now=60.5)
    fresh = taken(ledger, 62.0)
    ledger.observe(
        fresh, LimitSnapshot(at=62.0, tokens=LimitReading(limit=60.0, remaining=50.0)), 62.0
    )
    bucket = store.transaction("b", lambda shared: shared.model)
    assert (bucket.tokens.bucket.limit, bucket.tokens.bucket.level) == (60, 50)


@pytest.mark.parametrize("witness", ["me", "another"])
def test_a_holder_that_was_silent_for_too_long_loses_no_news(witness: str) -> None:
    """It was taken for dead, by itself or another; its answer tells of the limits all the same."""
    store = MemoryStore()
    ledger = RateLimiter(store, holder="me")
    given, late = taken(ledger, 1.0), 1.0 + 2 * LEASE_S
    store.transaction("b", lambda shared: shared.share_of(witness, late))
    assert counts(store) == (0, 0, 0.0)
    ledger.observe(given, SNAPSHOT, late + 1)
    assert counts(store) == (0, 1, 1.0)
    assert store.transaction("b", lambda shared: shared.model.tokens.bucket.limit) == 600
    ledger.settle(given, USAGE, late + 2)
    assert counts(store) == (0, 0, 0.0)


def test_an_answer_from_a_bucket_that_was_lost_changes_no_number() -> None:
    """Its marks mean nothing in the new one, and it is counted nowhere."""
    store = MemoryStore()
    ledger = RateLimiter(store, holder="me")
    given = taken(ledger, 1.0)
    store._models.clear()
    ledger.observe(given, SNAPSHOT, 2.0)
    ledger.settle(given, USAGE, 3.0)
    assert counts(store) == (0, 0, 0.0)
    assert not store.transaction("b", lambda shared: shared.model.tokens.bucket.is_known)


def test_a_deed_that_is_done_again_counts_once() -> None:
    """A store whose deeds are done twice ends with the same numbers as one where they are not."""
    ends = []
    for store in (MemoryStore(), Twice()):
        ledger = RateLimiter(store, holder="me")
        given = taken(ledger, 1.0)
        ledger.observe(given, SNAPSHOT, 2.0)
        other = taken(ledger, 2.0)
        ledger.settle(given, USAGE, 3.0)
        ledger.refuse(other, until=9.0, limit=None, snapshot=None, now=3.0)
        ends.append((store.transaction("b", lambda shared: shared.model), other.marks))
    assert ends[0] == ends[1]


def test_a_hold_lasts_as_long_for_other_holders() -> None:
    """What a refusal seems to leave in debt is reckoned after the hold, not on top of it."""
    store = MemoryStore()
    refused, other = RateLimiter(store, holder="me"), RateLimiter(store, holder="another")
    given = taken(refused, 1.0)
    full = LimitReading(limit=600.0, remaining=0.0, full_in=60.0)
    refused.refuse(
        given,
        until=9.0,
        limit=Limit(resource="tokens", window=60.0, limit=600, used=600, requested=100),
        snapshot=LimitSnapshot(at=1.1, tokens=full),
        now=1.1,
    )
    held = other.try_acquire(other.enqueue("b", Cost(10, 90), lambda: None), 2.0)
    assert isinstance(held, Wait | Cooldown)
    assert held.until == 9.0
