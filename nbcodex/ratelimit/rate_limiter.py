"""Decides which request may be sent, and when: first come, first served.

It never waits, and uses neither threads nor an event loop. Only the first request in a model's
queue gets an instant at which to ask again; each of the others is woken when it is first.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from nbcodex.models import MINUTE, Limit, LimitSnapshot, Usage
from nbcodex.ratelimit.charge_policy import Need, Permit
from nbcodex.ratelimit.limit_model import Refusal
from nbcodex.ratelimit.schedule import LONG_WINDOW_S, after_cooldown, check_size, limits_by_time
from nbcodex.ratelimit.sharing import LimitState, SharedModel, limit_state
from nbcodex.ratelimit.stores import MemoryStore, Store

ResultT = TypeVar("ResultT")

# Requests behind the first one ask again after FALLBACK_RECHECK_S, if they are not woken before.
# The first one asks again after SHARED_RECHECK_S if other processes share the limits.
FALLBACK_RECHECK_S, SHARED_RECHECK_S = 60.0, 0.25
MIN_ANNOUNCED_COOLDOWN_S = 1.0  # a shorter cooldown wakes no request behind the first one
# A queue that held more tokens than the limit times LONG_QUEUE_FACTOR is ordered by size once it
# holds less than the limit times QUEUE_END_FACTOR.
LONG_QUEUE_FACTOR, QUEUE_END_FACTOR = 8.0, 4.0
RECENT_PERMITS = 32  # of the last permits, whose requests may be on their way to the server


@dataclass(frozen=True, slots=True)
class Wait:
    """No permit yet, because a limit is fully used or other requests come first."""

    until: float  # when to ask again, which may be before `start_at`
    start_at: float | None = None  # the projected instant of sending; None if unknown
    limit: Limit | None = None  # the limit that is fully used; None if unknown


@dataclass(frozen=True, slots=True)
class Cooldown:
    """The model is closed to all requests until an instant, because of a limit."""

    until: float
    limit: Limit | None = None
    inherited: bool = False  # another process's refusal caused it; it may be over by now
    inferred: bool = False  # without a refusal: a limit over hours is exhausted, as projected


@dataclass(slots=True)
class QueueEntry:
    """A request's place in a queue. A refused request keeps its place, before all later ones."""

    limits_id: str  # the hashed name of the limits
    need: Need
    wake: Callable[[], None]
    arrival: int  # its number in the order of arrival
    priority: float = 0.0  # the lowest comes first, and of equal ones the first arrival
    is_waiting: bool = False


@dataclass(slots=True)
class WaitQueue:
    """The requests of this process that wait for one model, and those in flight."""

    heap: list[tuple[float, int, QueueEntry]] = field(default_factory=list)  # priority, arrival
    waiting_tokens: float = 0.0
    peak_waiting_tokens: float = 0.0  # the most that `waiting_tokens` has been
    new_entry_priority: float = 0.0  # infinite, so last, once the others are ordered by size
    cooldown: Cooldown | None = None
    limit: Limit | None = None  # what the first request waits for
    own_cooldown_until: float = -math.inf  # end of the cooldowns that this process caused itself
    # The first request is sent when the cooldown ends as the server said, though buckets need more.
    trusts_cooldown_end: bool = False
    in_flight: int = 0
    probes_in_flight: int = 0
    recent_permits: deque[Permit] = field(default_factory=lambda: deque(maxlen=RECENT_PERMITS))

    def entries(self) -> Iterator[QueueEntry]:
        """Iterate over the waiting entries, in no order."""
        return (entry for *_, entry in self.heap if entry.is_waiting)

    def head(self) -> QueueEntry | None:
        """Return the first waiting entry."""
        # `remove` only marks an entry: to remove one from the middle of a heap would cost O(n).
        while self.heap and not self.heap[0][-1].is_waiting:
            heapq.heappop(self.heap)
        return self.heap[0][-1] if self.heap else None

    def push(self, entry: QueueEntry) -> None:
        """Add an entry at its place."""
        if not entry.is_waiting:
            entry.is_waiting = True
            self.waiting_tokens += entry.need.total_tokens
            self.peak_waiting_tokens = max(self.peak_waiting_tokens, self.waiting_tokens)
            heapq.heappush(self.heap, (entry.priority, entry.arrival, entry))

    def remove(self, entry: QueueEntry) -> None:
        """Mark an entry as not waiting."""
        if entry.is_waiting:
            entry.is_waiting = False
            self.waiting_tokens -= entry.need.total_tokens

    def order_remaining_by_size(self, limit: float) -> None:
        """Order the last requests of a long queue by size, the smallest first."""
        # Where the server refunds unused output, fewer answers are then in flight at the very end,
        # when no request is left to use their refunds: 6,000 prompts take 0.6 to 2.9 % less time
        # (eight seeds). A request has waited for more tokens than those that can overtake it now,
        # so its wait at most doubles. New requests come last.
        is_end = self.waiting_tokens < QUEUE_END_FACTOR * limit
        if self.peak_waiting_tokens <= LONG_QUEUE_FACTOR * limit or not is_end:
            return
        self.peak_waiting_tokens, self.new_entry_priority = 0.0, math.inf
        for *_, entry in self.heap:
            entry.priority = entry.need.input_tokens
        self.heap = sorted((e.priority, e.arrival, e) for e in self.entries())

    def wake_first(self) -> None:
        """Wake the first request, which then calls `try_acquire` again."""
        if head := self.head():
            head.wake()

    def set_cooldown(self, cooldown: Cooldown | None, now: float) -> None:
        """Begin or end a cooldown; wake all requests if this changes what they wait for."""
        previous, self.cooldown = self.cooldown, cooldown
        if cooldown is None:
            must_wake = previous is not None
        else:
            longer_than = max(now + MIN_ANNOUNCED_COOLDOWN_S, previous.until if previous else now)
            was_inherited = previous is not None and previous.inherited
            must_wake = cooldown.until > longer_than or was_inherited
        for entry in [*self.entries()] if must_wake else ():
            entry.wake()


class RateLimiter:
    """Decides for all models: each has a queue here, and the store has what is known of it."""

    def __init__(self, store: Store | None = None, *, process_id: str = "") -> None:
        # Another store may be assigned: a request in flight is added to it when the request ends.
        self.store = store or MemoryStore()
        self._process_id = process_id  # names this process in the store
        self._queues: defaultdict[str, WaitQueue] = defaultdict(WaitQueue)  # by limits id
        self._arrivals = itertools.count()

    def enqueue(self, limits_id: str, need: Need, wake: Callable[[], None]) -> QueueEntry:
        """Add a request to a queue; `wake` is called when it should try to acquire."""
        queue = self._queues[limits_id]
        if queue.head() is None:
            queue.new_entry_priority = queue.peak_waiting_tokens = 0.0
        entry = QueueEntry(limits_id, need, wake, next(self._arrivals), queue.new_entry_priority)
        queue.push(entry)
        return entry

    def requeue(self, entry: QueueEntry) -> None:
        """Put an entry back at its old place."""
        self._queues[entry.limits_id].push(entry)

    def dequeue(self, entry: QueueEntry) -> None:
        """Remove an entry from the queue."""
        queue = self._queues[entry.limits_id]
        was_first = queue.head() is entry
        queue.remove(entry)
        if was_first:
            queue.wake_first()

    def try_acquire(
        self, entry: QueueEntry, now: float, *, may_probe: bool = False
    ) -> Permit | Wait | Cooldown:
        """Return a permit to send now, or what to wait for; raise `TooLargeError` if it never fits.

        With `may_probe`, the caller sends a probe if this returns an inherited cooldown; while
        another request's probe is in flight, this returns a `Wait` instead.
        """
        queue = self._queues[entry.limits_id]
        if queue.head() is not entry:
            cooldown = queue.cooldown
            if cooldown is None or cooldown.until <= now or (may_probe and cooldown.inherited):
                return Wait(now + FALLBACK_RECHECK_S, limit=queue.limit)
            return cooldown
        decide = partial(self._decide, queue=queue, entry=entry, now=now)
        decision = self.store.transaction(entry.limits_id, decide)
        if isinstance(decision, Permit):
            self._record_sent(queue, entry, decision)
        elif isinstance(decision, Cooldown) and decision.inherited and may_probe:
            if queue.probes_in_flight:
                return Wait(now + FALLBACK_RECHECK_S)
        elif queue.head() is not entry:
            queue.wake_first()
        return decision

    def _decide(
        self, shared: SharedModel, queue: WaitQueue, entry: QueueEntry, now: float
    ) -> Permit | Wait | Cooldown:
        model, need = shared.model, entry.need
        check_size(model, need, now)
        if model.tokens.policy == "refunded":
            queue.order_remaining_by_size(model.tokens.bucket.limit)
            if queue.head() is not entry:
                return Wait(now + FALLBACK_RECHECK_S)
        start_at = shared.schedule_next(self._process_id, need, queue.waiting_tokens, now)
        if queue.trusts_cooldown_end and model.parallel.limit is None:
            start_at = min(start_at, after_cooldown(model, now))
        if queue.cooldown is not None and queue.cooldown.inferred:
            queue.cooldown = None
        if start_at <= now:
            return shared.issue_permit(entry.limits_id, self._process_id, need, now)
        if model.cooldown_until > now:
            inherited = model.cooldown_until > queue.own_cooldown_until
            queue.cooldown = Cooldown(model.cooldown_until, model.cooldown_limit, inherited)
            return queue.cooldown
        limits = limits_by_time(model, need, now)
        for until, limit in reversed(limits):
            if (limit.window or 0.0) > LONG_WINDOW_S and until > now + MINUTE:
                queue.cooldown = Cooldown(until, limit, inherited=True, inferred=True)
                return queue.cooldown
        recheck_at = now + SHARED_RECHECK_S if len(shared.processes) > 1 else start_at
        if model.has_slot(now):
            queue.limit = limits[-1][1] if limits else None  # the last one to have capacity
            return Wait(min(start_at, recheck_at), start_at, queue.limit)
        # The end of an answer frees a slot, at an unknown instant, and wakes the queue.
        in_flight = model.parallel.max_in_flight_at(now)
        queue.limit = Limit(resource="parallel requests", limit=in_flight)
        return Wait(min(start_at, recheck_at), limit=queue.limit)

    def probe(self, entry: QueueEntry, now: float) -> Permit:
        """Return a permit to send during a cooldown, which a refusal does not prolong."""
        limits_id, need, process = entry.limits_id, entry.need, self._process_id
        permit = self.store.transaction(
            limits_id, lambda s: s.issue_permit(limits_id, process, need, now, is_probe=True)
        )
        queue = self._queues[limits_id]
        queue.probes_in_flight += 1
        self._record_sent(queue, entry, permit)
        return permit

    def _record_sent(self, queue: WaitQueue, entry: QueueEntry, permit: Permit) -> None:
        queue.trusts_cooldown_end = False
        queue.recent_permits.append(permit)
        queue.in_flight += 1
        queue.remove(entry)
        queue.wake_first()

    def refuse(self, permit: Permit, refusal: Refusal, now: float) -> Cooldown:
        """Begin a cooldown because a limit has refused the request, and return it."""

        def operation(shared: SharedModel) -> Cooldown:
            shared.model.refuse(permit, refusal, now)
            return Cooldown(shared.model.cooldown_until, shared.model.cooldown_limit)

        cooldown = self._update(permit, operation, now)
        queue = self._queues[permit.limits_id]
        queue.trusts_cooldown_end = queue.trusts_cooldown_end or cooldown.until > now
        queue.own_cooldown_until = max(queue.own_cooldown_until, cooldown.until)
        queue.set_cooldown(cooldown, now)
        return cooldown

    def observe(self, permit: Permit, snapshot: LimitSnapshot | None, now: float) -> None:
        """Learn from the headers of an admitted request. An admitted probe ends the cooldown."""
        if permit.is_probe:
            self._queues[permit.limits_id].set_cooldown(None, now)
        self._update(permit, lambda shared: shared.model.observe(permit, snapshot, now), now)

    def settle(self, permit: Permit, usage: Usage, now: float) -> None:
        """Report what a finished answer used."""
        round_trip, refunds = self._update(
            permit, lambda s: (s.model.round_trip, s.model.settle(permit, usage, now)), now
        )
        # The server refunded half a round trip ago. Requests that were sent within the last round
        # trip reached it later, so the levels in their snapshots include the refund.
        since = now - (round_trip if round_trip < math.inf else 0.0)
        for other in self._queues[permit.limits_id].recent_permits:
            if other.sent_at > since and not other.has_response:
                other.add_earlier_refunds(refunds)

    def release(self, permit: Permit, now: float, *, ended_early: bool = False) -> None:
        """Report the end of a request of unknown usage; `ended_early`: of an incomplete stream."""
        self._update(permit, lambda s: s.model.release(permit, now, ended_early=ended_early), now)

    def limit_states(self, now: float, *limits_ids: str) -> dict[str, LimitState]:
        """Return the state of the limits that were used here, and of `limits_ids`, for display."""
        states = {}
        for id_ in {**self._queues, **dict.fromkeys(limits_ids)}:
            queue = self._queues.get(id_, WaitQueue())
            state = self.store.transaction(id_, lambda s: limit_state(s, self._process_id, now))
            waiting, tokens = sum(1 for _ in queue.entries()), queue.waiting_tokens
            states[id_] = replace(state, waiting=waiting, waiting_tokens=tokens)
        return states

    def heartbeat(self, now: float) -> bool:
        """Show each second that this process is alive; return whether any request is active."""
        active = [(id_, q) for id_, q in self._queues.items() if q.in_flight or q.head()]
        renew_lease = partial(SharedModel.heartbeat, process=self._process_id, now=now)
        for limits_id, queue in active:
            renew = partial(renew_lease, is_waiting=queue.head() is not None)
            stored_until = self.store.transaction(limits_id, renew)  # the end of the cooldown
            if queue.cooldown is None or not stored_until <= now < queue.cooldown.until:
                continue
            if queue.cooldown.inferred:
                queue.wake_first()  # the first request tries whether the limit is still exhausted
            else:  # a probe of another process has ended it
                queue.set_cooldown(None, now)
        return bool(active)

    def remove_process(self) -> None:
        """Remove this process from the models in the store, when it ends."""
        for limits_id in self._queues:
            self.store.transaction(limits_id, lambda s: s.remove_process(self._process_id))

    def _update(
        self, permit: Permit, operation: Callable[[SharedModel], ResultT], now: float
    ) -> ResultT:
        """Run an operation on a permit and its model, and wake the first request in the queue."""
        before = replace(permit)

        def run(shared: SharedModel) -> ResultT:
            permit.restore(before)  # a store may run an operation again, on another model
            shared.recount_after_expiry(self._process_id, permit, now)
            result = operation(shared)
            shared.update_counts(self._process_id, permit, before=before)
            return result

        queue = self._queues[permit.limits_id]
        result = self.store.transaction(permit.limits_id, run)
        is_first_response = permit.has_response and not before.has_response
        queue.probes_in_flight -= permit.is_probe and is_first_response
        queue.in_flight -= permit.has_ended and not before.has_ended
        queue.wake_first()
        return result
