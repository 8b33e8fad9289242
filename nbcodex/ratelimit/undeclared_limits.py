"""Limits of one model that no header states, learned from refusals and broken streams. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from nbcodex.models import MINUTE, Limit, Resource
from nbcodex.ratelimit.token_bucket import LIMIT_TRUST_S, TokenBucket

# The known limit on parallel requests is exceeded on trial after each interval. The interval is
# doubled if a trial is refused, and reset after so many intervals without a refusal.
MIN_TRIAL_INTERVAL_S, MAX_TRIAL_INTERVAL_S, RESET_TRIALS = 60.0, 600.0, 8
# So many streams in succession have to end early, beside other requests in flight, to show a limit
# on parallel requests: a single one may be a fault of the network.
MIN_BROKEN_STREAMS = 2


@dataclass(slots=True)
class UndeclaredLimit:
    """A limit such as 200 requests a day. Stores keep the fields in this order."""

    resource: Resource
    seconds: float  # the window over which the server counts
    bucket: TokenBucket = field(default_factory=TokenBucket)
    refused_at: float = -math.inf
    newest_refused_number: int = -1  # highest number of a permit that it refused

    def amount_of(self, tokens: float, *, requests: int = 1) -> float:
        """Return what this limit counts of so many requests: their number, or their tokens."""
        return float(requests) if self.resource == "requests" else tokens


@dataclass(slots=True)
class UndeclaredLimits:
    """The undeclared limits of one model, by resource and window."""

    by_name: dict[str, UndeclaredLimit] = field(default_factory=dict)

    def __iter__(self) -> Iterator[UndeclaredLimit]:
        return iter(self.by_name.values())

    def charge(self, tokens: float, now: float) -> None:
        """Charge one request."""
        for name, each in list(self.by_name.items()):
            is_full = each.bucket.level_at(now) >= each.bucket.limit
            if is_full and now - each.refused_at > LIMIT_TRUST_S:
                del self.by_name[name]  # it has refused nothing for long, and may be obsolete
            each.bucket.take(each.amount_of(tokens), now)

    def refund(self, requests: int, tokens: float, now: float) -> None:
        """Add back what was charged but not used."""
        for each in self:
            each.bucket.take(-each.amount_of(tokens, requests=requests), now)

    def learn(self, limit: Limit, permit_number: int, cooldown_until: float, now: float) -> None:
        """Learn from the refusal of a permit that began a cooldown."""
        new = UndeclaredLimit(limit.resource or "tokens", limit.window or MINUTE)
        found = self.by_name.setdefault(f"{new.resource} {new.seconds:g}", new)
        size, requested = limit.limit or 0.0, limit.requested or 1.0
        found.bucket.set_limit(size, size / found.seconds, now=now, stated_at=now)
        found.refused_at = max(found.refused_at, now)
        # Refusals may arrive out of order: the figures of the request that was sent last are kept.
        if permit_number > found.newest_refused_number:
            found.newest_refused_number = permit_number
            # The figures are rounded, but no cooldown ends before the requested amount is there.
            at_most = requested - max(0.0, cooldown_until - now) * found.bucket.rate
            remaining = min(size - (limit.used or 0.0), at_most)
            found.bucket.level, found.bucket.updated_at = max(0.0, remaining), now

    def drop_declared(self, resource: Resource, limit: float) -> None:
        """Drop an undeclared limit once headers state the same."""
        for name, each in list(self.by_name.items()):
            if each.resource == resource and each.bucket.has_limit(limit):
                del self.by_name[name]

    def correct_by_admission(self, tokens: float, now: float) -> None:
        """Drop or refill the limits that, as known, do not allow a request that was admitted."""
        for name, each in list(self.by_name.items()):
            if each.amount_of(tokens) > each.bucket.limit:
                del self.by_name[name]
            elif (level := each.bucket.level_at(now)) < 0:
                each.bucket.undo(-level, now)

    def available_at(self, requests: int, tokens: float, now: float) -> float:
        """Return the earliest instant at which all limits have capacity for the requests."""
        times = (e.bucket.available_at(e.amount_of(tokens, requests=requests), now) for e in self)
        return max(times, default=now)


@dataclass(slots=True)
class ParallelLimit:
    """A limit on requests that are in flight at once. Stores keep the fields in this order.

    A refusal may name it (LiteLLM's `max_parallel_requests`). A server that can answer only one
    request may instead end its stream when another request arrives (llama-cpp-python).
    """

    limit: int | None = None  # None while no limit is known
    learned_at: float = -math.inf
    trial_interval: float = MIN_TRIAL_INTERVAL_S  # seconds
    broken_streams: int = 0  # in succession

    def max_in_flight_at(self, now: float) -> float:
        """Return how many requests may be in flight: the limit, and on trial 1, 3, 7, … more."""
        if self.limit is None:
            return math.inf
        return self.limit + math.pow(2, int(min(30.0, self._intervals(now)))) - 1  # no overflow

    def next_increase_at(self, now: float) -> float:
        """Return when `max_in_flight_at` will be larger than at `now`."""
        return self.learned_at + (int(self._intervals(now)) + 1) * self.trial_interval

    def _intervals(self, now: float) -> float:
        return max(0.0, now - self.learned_at) / self.trial_interval

    def learn(self, accepted: int, now: float, *, stated: float | None = None) -> None:
        """Learn that one request more than the `accepted` ones in flight was too many."""
        if self._intervals(now) >= RESET_TRIALS:
            self.trial_interval = MIN_TRIAL_INTERVAL_S
        elif self.limit is not None and self._intervals(now) >= 1:
            self.trial_interval = min(MAX_TRIAL_INTERVAL_S, 2 * self.trial_interval)
        # If fewer were accepted than stated, other clients with the same key use the rest.
        self.limit = max(1, min(accepted, int(stated or accepted)))
        self.learned_at = now

    def record_end(self, others: int, now: float, *, is_early: bool) -> None:
        """Learn from the end of a stream while `others` are in flight; `is_early`: incomplete."""
        if others:
            self.broken_streams = self.broken_streams + 1 if is_early else 0
            if self.broken_streams >= MIN_BROKEN_STREAMS:
                self.learn(others, now)
