"""How permits end whose model, store or process was lost meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nbcodex.models import Limit, LimitReading, LimitSnapshot, Usage
from nbcodex.ratelimit.charge_policy import Need, Permit
from nbcodex.ratelimit.limit_model import Refusal
from nbcodex.ratelimit.rate_limiter import Cooldown, RateLimiter, Wait
from nbcodex.ratelimit.sharing import LEASE_S, SharedModel
from nbcodex.ratelimit.stores import MemoryStore

SNAPSHOT = LimitSnapshot(at=1.5, tokens=LimitReading(limit=600.0, remaining=500.0))
USAGE = Usage(input_tokens=10, output_tokens=40)


class RepeatingStore(MemoryStore):
    """A store that runs each operation twice, as if another host had committed before it."""

    def transaction(self, name: str, operation: Callable[[SharedModel], Any]) -> Any:
        import copy

        operation(copy.deepcopy(self._models.setdefault(name, SharedModel())))
        return super().transaction(name, operation)


def taken(limiter: RateLimiter, now: float) -> Permit:
    permit = limiter.try_acquire(limiter.enqueue("b", Need(10, 90), lambda: None), now)
    assert isinstance(permit, Permit)
    return permit


def counts(store: MemoryStore) -> tuple[int, int, float]:
    bucket = store.transaction("b", lambda shared: shared.model)
    return bucket.awaiting_response, bucket.output.in_flight, bucket.output.start_times_sum


def test_refusal_of_a_permit_from_a_lost_model_is_ignored() -> None:
    """Its number and marks mean nothing in the new model, which learns from its own."""
    limiter = RateLimiter(MemoryStore(), process_id="me")
    for second in range(50):
        permit = taken(limiter, float(second))
        limiter.observe(permit, SNAPSHOT, float(second))
        limiter.settle(permit, USAGE, float(second))
    orphaned, store = taken(limiter, 60.0), MemoryStore()
    limiter.store = store
    limit = Limit(resource="tokens", window=60.0, limit=600, used=600, requested=100)
    limiter.refuse(orphaned, Refusal(61.0, limit), 60.5)
    fresh = taken(limiter, 62.0)
    limiter.observe(
        fresh, LimitSnapshot(at=62.0, tokens=LimitReading(limit=60.0, remaining=50.0)), 62.0
    )
    bucket = store.transaction("b", lambda shared: shared.model)
    assert (bucket.tokens.bucket.limit, bucket.tokens.bucket.level) == (60, 50)


@pytest.mark.parametrize("witness", ["me", "another"])
def test_answer_to_a_process_counted_as_dead_is_still_learned_from(witness: str) -> None:
    """Its lease ran out, but the model is the same."""
    store = MemoryStore()
    limiter = RateLimiter(store, process_id="me")
    permit, late = taken(limiter, 1.0), 1.0 + 2 * LEASE_S
    store.transaction("b", lambda shared: shared.renew_lease(witness, late))
    assert counts(store) == (0, 0, 0.0)
    limiter.observe(permit, SNAPSHOT, late + 1)
    assert counts(store) == (0, 1, 1.0)
    assert store.transaction("b", lambda shared: shared.model.tokens.bucket.limit) == 600
    limiter.settle(permit, USAGE, late + 2)
    assert counts(store) == (0, 0, 0.0)


def test_answer_to_a_permit_from_a_lost_model_changes_no_level() -> None:
    """Its marks mean nothing in the new model, and it is counted nowhere."""
    store = MemoryStore()
    limiter = RateLimiter(store, process_id="me")
    permit = taken(limiter, 1.0)
    store._models.clear()
    limiter.observe(permit, SNAPSHOT, 2.0)
    limiter.settle(permit, USAGE, 3.0)
    assert counts(store) == (0, 0, 0.0)
    assert not store.transaction("b", lambda shared: shared.model.tokens.bucket.is_known)


def test_operation_that_a_store_repeats_counts_once() -> None:
    """A store that runs each operation twice ends with the same numbers."""
    ends = []
    for store in (MemoryStore(), RepeatingStore()):
        limiter = RateLimiter(store, process_id="me")
        permit = taken(limiter, 1.0)
        limiter.observe(permit, SNAPSHOT, 2.0)
        other = taken(limiter, 2.0)
        limiter.settle(permit, USAGE, 3.0)
        limiter.refuse(other, Refusal(9.0), 3.0)
        ends.append((store.transaction("b", lambda shared: shared.model), other.token_marks))
    assert ends[0] == ends[1]


def test_cooldown_lasts_as_long_for_other_processes() -> None:
    """An apparent debt is projected from the cooldown's end, not added to it."""
    store = MemoryStore()
    refused, other = RateLimiter(store, process_id="me"), RateLimiter(store, process_id="another")
    permit = taken(refused, 1.0)
    full = LimitReading(limit=600.0, remaining=0.0, full_in=60.0)
    refused.refuse(
        permit,
        Refusal(
            9.0,
            Limit(resource="tokens", window=60.0, limit=600, used=600, requested=100),
            snapshot=LimitSnapshot(at=1.1, tokens=full),
        ),
        1.1,
    )
    answer = other.try_acquire(other.enqueue("b", Need(10, 90), lambda: None), 2.0)
    assert isinstance(answer, Wait | Cooldown)
    assert answer.until == 9.0
