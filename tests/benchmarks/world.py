"""A rate-limited server behind a network, and many prompts, as events on a heap, in virtual time.

Neither sockets nor an event loop are used. The limits are the simulator's own
(`nbcodex.simulator.buckets`).
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from nbcodex.models import MINUTE, Limit, LimitReading, LimitSnapshot
from nbcodex.simulator.buckets import Account, Refusal, admission_charge
from nbcodex.simulator.knobs import Knobs

START = 5_000.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its tokens, and the length and latency of its answer."""

    number: int
    tokens: int
    output: int
    max_output: int
    latency: float

    def charge(self, policy: str, bias: float = 1.0) -> float:
        """Return what the server has charged when the answer has ended."""
        output = self.max_output if policy == "kept" else self.output
        return round(self.tokens * bias) + output

    def duration(self, speed: float) -> float:
        """Return the seconds from admission to the end of the answer."""
        return self.latency + max(0, self.output - 1) / speed


def workload(count: int, seed: int, *, giant_share: float = 0.0) -> list[Prompt]:
    """Return prompts with lognormal inputs, outputs and latencies; some are 60 times as large."""
    rng = random.Random(f"workload:{seed}")
    prompts = []
    for number in range(count):
        tokens = max(1, round(rng.lognormvariate(math.log(250), 0.8)))
        output = min(1000, max(1, round(rng.lognormvariate(math.log(200), 0.7))))
        latency = rng.lognormvariate(math.log(0.5), 0.4)
        if rng.random() < giant_share:
            tokens *= 60
        prompts.append(Prompt(number, tokens, output, 1000, latency))
    return prompts


class EventHeap:
    """Events in the order of their instants."""

    def __init__(self) -> None:
        self.now = START
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        """Call `action` at an instant."""
        event = (max(when, self.now), next(self._numbers), action, args)
        heapq.heappush(self._events, event)

    def run(self) -> None:
        """Run all events."""
        while self._events:
            self.now, _, action, args = heapq.heappop(self._events)
            action(*args)


@dataclass(slots=True)
class ServerCounts:
    """What the server has counted."""

    requests: int = 0
    refused: int = 0
    admitted: dict[int, int] = field(default_factory=dict)  # how often, by the prompt's number
    finished: dict[int, float] = field(default_factory=dict)  # instants, by the prompt's number
    admitted_at: dict[int, float] = field(default_factory=dict)  # likewise
    last_admitted_at: float = 0.0
    lowest_level: float = math.inf  # of the bucket of tokens


@dataclass(slots=True)
class RemoteServer:
    """A rate-limited server at the end of a network."""

    heap: EventHeap
    knobs: Knobs
    seed: int
    account: Account = field(default_factory=Account)
    counts: ServerCounts = field(default_factory=ServerCounts)
    one_way_s: float = 0.015  # the shortest time from the client to the server
    jitter_s: float = 0.005  # its mean excess
    states_processing: bool = True  # headers state the processing time
    headers_are_late: bool = False  # they arrive when the answer is complete
    refusals_lack_figures: bool = False
    client: Any = None
    _rng: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.account.set_limits(self.knobs, self.heap.now)
        self._rng = random.Random(f"net:{self.seed}")

    def change(self, **knobs: Any) -> None:
        """Change knobs."""
        self.knobs = replace(self.knobs, **knobs)
        self.account.set_limits(self.knobs, self.heap.now)

    def delay(self) -> float:
        """Return the seconds of one way through the network."""
        return self.one_way_s + self._rng.expovariate(1 / self.jitter_s)

    def send(self, prompt: Prompt, client: Any) -> None:
        """Send a request to the server, which calls methods of `client` with its responses."""
        self.heap.at(self.heap.now + self.delay(), self.receive, prompt, client)

    def receive(self, prompt: Prompt, client: Any) -> None:
        """Answer or refuse a request that has arrived."""
        now, counts = self.heap.now, self.counts
        counts.requests += 1
        tokens = round(prompt.tokens * self.knobs.token_bias)
        charge = admission_charge(tokens, prompt.max_output, self.knobs)
        if self._rng.random() < self.knobs.failures:
            self.account.charge_request(now)
            self.heap.at(now + self.delay(), client.on_failure)
            return
        refusal = self.account.charge_or_refuse(charge, now)
        self._record_level()
        snapshot = self._snapshot()
        if refusal is not None:
            counts.refused += 1
            self.heap.at(now + self.delay(), client.on_refusal, refusal, snapshot(0.0))
            return
        counts.admitted[prompt.number] = counts.admitted.get(prompt.number, 0) + 1
        counts.admitted_at[prompt.number] = counts.last_admitted_at = now
        first = now + prompt.latency
        end = now + prompt.duration(self.knobs.speed)
        processing = prompt.duration(self.knobs.speed) if self.headers_are_late else prompt.latency
        self.heap.at(now + processing + self.delay(), client.on_headers, snapshot(processing))
        if self._rng.random() < self.knobs.stream_failures:
            self.heap.at(first, self._settle, charge, tokens + prompt.output // 2)
            self.heap.at(first + self.delay(), client.on_broken_stream)
            return
        self.heap.at(end, self._settle, charge, tokens + prompt.output)
        self.heap.at(max(end, first) + self.delay(), client.on_answer, tokens, prompt.output)
        counts.finished[prompt.number] = max(end, counts.finished.get(prompt.number, 0.0))

    def _settle(self, charge: int, used: int) -> None:
        self.account.settle(charge, used, self.knobs, self.heap.now)
        self._record_level()

    def _record_level(self) -> None:
        bucket = self.account.tokens.get(MINUTE)
        if bucket is not None:
            self.counts.lowest_level = min(self.counts.lowest_level, bucket.level)

    def _snapshot(self) -> Callable[[float], LimitSnapshot | None]:
        """Return a function of the processing time that returns the headers of this instant."""
        if not self.knobs.headers:
            return lambda _: None
        tokens, requests = self._reading(self.account.tokens), self._reading(self.account.requests)

        def snapshot(seconds: float) -> LimitSnapshot:
            processing = round(seconds, 3) if self.states_processing else None
            return LimitSnapshot(at=0.0, processing=processing, tokens=tokens, requests=requests)

        return snapshot

    def _reading(self, buckets: dict[float, Any]) -> LimitReading | None:
        bucket = buckets.get(MINUTE)
        if bucket is None:
            return None
        now = self.heap.now
        level = max(0, math.floor(bucket.level_at(now) + 1e-6))
        full = math.ceil(bucket.seconds_until_full(now) * 1000) / 1000
        return LimitReading(limit=bucket.limit, remaining=level, full_in=full)


def stated_limit(refusal: Refusal) -> Limit:
    """Return the limit that a refusal states."""
    return Limit(
        resource=refusal.resource,
        window=refusal.window,
        limit=refusal.limit,
        used=refusal.used,
        requested=refusal.requested,
    )


def lower_bound_s(prompts: Iterable[Prompt], knobs: Knobs) -> float:
    """Return the shortest time in which any client can get all answers, in any order.

    Requests that take `d` seconds or longer must be admitted `d` seconds before the end, and fit
    into the bucket and its refill until then.
    """
    prompts = sorted(prompts, key=lambda p: -p.duration(knobs.speed))
    assert knobs.tpm
    rate, longest = knobs.tpm / MINUTE, 0.0
    taken = count = 0.0
    total = sum(p.charge(knobs.policy, knobs.token_bias) for p in prompts)
    for prompt in prompts:
        duration = prompt.duration(knobs.speed)
        early = round(prompt.tokens * knobs.token_bias)
        taken += (
            early if knobs.policy == "actual" else prompt.charge(knobs.policy, knobs.token_bias)
        )
        count += 1
        longest = max(longest, duration, duration + (taken - knobs.tpm) / rate)
        if knobs.rpm:
            longest = max(longest, duration + (count - knobs.rpm) / (knobs.rpm / MINUTE))
    return max(longest, (total - knobs.tpm) / rate)
