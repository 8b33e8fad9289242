"""A rate-limited server, a network and many prompts, as events on a heap: no sockets, no loop.

The limits are the simulator's own (`nbcodex.simulator.buckets`); time is a number.
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
from nbcodex.simulator.buckets import Account, Charge, Refusal, admission_charge
from nbcodex.simulator.knobs import Knobs

START = 5_000.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: what it costs, how long its answer is, and how long that takes."""

    number: int
    tokens: int
    output: int
    max_output: int
    latency: float

    def charge(self, policy: str, bias: float = 1.0) -> float:
        """Return what the server has charged in the end."""
        whole = self.max_output if policy == "kept" else self.output
        return round(self.tokens * bias) + whole

    def takes(self, speed: float) -> float:
        """Return the seconds from admission to the last word."""
        return self.latency + max(0, self.output - 1) / speed


def workload(count: int, seed: int, *, giants: float = 0.0) -> list[Prompt]:
    """Return prompts as in pacing.md: lognormal inputs, outputs and latencies."""
    chance = random.Random(f"workload:{seed}")
    prompts = []
    for number in range(count):
        tokens = max(1, round(chance.lognormvariate(math.log(250), 0.8)))
        output = min(1000, max(1, round(chance.lognormvariate(math.log(200), 0.7))))
        latency = chance.lognormvariate(math.log(0.5), 0.4)
        if chance.random() < giants:
            tokens *= 60
        prompts.append(Prompt(number, tokens, output, 1000, latency))
    return prompts


class Heap:
    """Events in the order of their moments."""

    def __init__(self) -> None:
        self.now = START
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        """Do something at an instant."""
        event = (max(when, self.now), next(self._numbers), action, args)
        heapq.heappush(self._events, event)

    def run(self) -> None:
        """Let everything happen."""
        while self._events:
            self.now, _, action, args = heapq.heappop(self._events)
            action(*args)


@dataclass(slots=True)
class Tally:
    """What the server saw."""

    requests: int = 0
    refused: int = 0
    admitted: dict[int, int] = field(default_factory=dict)
    finished: dict[int, float] = field(default_factory=dict)
    admitted_at: dict[int, float] = field(default_factory=dict)
    last_admission: float = 0.0
    lowest: float = math.inf
    refusals: list[float] = field(default_factory=list)
    full: float = 0.0


@dataclass(slots=True)
class World:
    """The server at the end of a network."""

    heap: Heap
    knobs: Knobs
    seed: int
    account: Account = field(default_factory=Account)
    tally: Tally = field(default_factory=Tally)
    way: float = 0.015
    jitter: float = 0.005
    processing: bool = True
    late: bool = False
    mute: bool = False
    client: Any = None
    _chance: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.account.set_limits(self.knobs, self.heap.now)
        self._chance = random.Random(f"net:{self.seed}")

    def change(self, **knobs: Any) -> None:
        """Turn knobs, from now on."""
        self.knobs = replace(self.knobs, **knobs)
        self.account.set_limits(self.knobs, self.heap.now)

    def delay(self) -> float:
        """Return the seconds of one way through the network."""
        return self.way + self._chance.expovariate(1 / self.jitter)

    def send(self, prompt: Prompt, client: Any) -> None:
        """Bring a request to the server; `client` hears what comes of it."""
        self.heap.at(self.heap.now + self.delay(), self._arrive, prompt, client)

    def _arrive(self, prompt: Prompt, client: Any) -> None:
        now, tally = self.heap.now, self.tally
        tally.requests += 1
        tokens = round(prompt.tokens * self.knobs.token_bias)
        charge = admission_charge(tokens, prompt.max_output, self.knobs)
        if self._chance.random() < self.knobs.failures:
            self.account.charge_request(now)
            self.heap.at(now + self.delay(), client.failed)
            return
        refusal = self.account.charge_or_refuse(charge.tokens, now)
        self._note()
        snapshot = self._snapshot()
        if refusal is not None:
            tally.refused += 1
            tally.refusals.append(now - START)
            self.heap.at(now + self.delay(), client.refused, refusal, snapshot(0.0))
            return
        tally.admitted[prompt.number] = tally.admitted.get(prompt.number, 0) + 1
        tally.admitted_at[prompt.number] = tally.last_admission = now
        first = now + prompt.latency
        end = now + prompt.takes(self.knobs.speed)
        worked = prompt.takes(self.knobs.speed) if self.late else prompt.latency
        self.heap.at(now + worked + self.delay(), client.first, snapshot(worked))
        if self._chance.random() < self.knobs.stream_failures:
            self.heap.at(first, self._settle, charge, prompt.output // 2)
            self.heap.at(first + self.delay(), client.broken)
            return
        self.heap.at(end, self._settle, charge, prompt.output)
        self.heap.at(max(end, first) + self.delay(), client.done, tokens, prompt.output)
        tally.finished[prompt.number] = max(end, tally.finished.get(prompt.number, 0.0))

    def _settle(self, charge: Charge, output: int) -> None:
        self.account.settle_output(charge, output, self.knobs, self.heap.now)
        self._note()

    def _note(self) -> None:
        bucket = self.account.tokens.get(MINUTE)
        if bucket is not None:
            self.tally.lowest = min(self.tally.lowest, bucket.level)

    def _snapshot(self) -> Callable[[float], LimitSnapshot | None]:
        """Return what the headers state at this instant, for when they are sent."""
        if not self.knobs.headers:
            return lambda _: None
        gauges = [self._gauge(b) for b in (self.account.tokens, self.account.requests)]

        def stated(worked: float) -> LimitSnapshot:
            worked = round(worked, 3) if self.processing else None
            return LimitSnapshot(at=0.0, processing=worked, tokens=gauges[0], requests=gauges[1])

        return stated

    def _gauge(self, buckets: dict[float, Any]) -> LimitReading | None:
        bucket = buckets.get(MINUTE)
        if bucket is None:
            return None
        now = self.heap.now
        level = max(0, math.floor(bucket.level_at(now) + 1e-6))
        full = math.ceil(bucket.full_in(now) * 1000) / 1000
        return LimitReading(limit=bucket.limit, remaining=level, full_in=full)


def limit_of(refusal: Refusal) -> Limit:
    """Return the words of a refusal."""
    return Limit(
        resource=refusal.resource,
        window=refusal.window,
        limit=refusal.limit,
        used=refusal.used,
        requested=refusal.requested,
    )


def bound(prompts: Iterable[Prompt], knobs: Knobs) -> float:
    """Return the seconds that no client can beat, with any knowledge and in any order.

    Requests that take `d` seconds or longer must be let in `d` seconds before the end, and fit into
    the bucket and what flows into it until then.
    """
    prompts = sorted(prompts, key=lambda p: -p.takes(knobs.speed))
    assert knobs.tpm
    rate, best = knobs.tpm / MINUTE, 0.0
    taken = count = 0.0
    total = sum(p.charge(knobs.policy, knobs.token_bias) for p in prompts)
    for prompt in prompts:
        takes = prompt.takes(knobs.speed)
        early = round(prompt.tokens * knobs.token_bias)
        taken += (
            early if knobs.policy == "actual" else prompt.charge(knobs.policy, knobs.token_bias)
        )
        count += 1
        best = max(best, takes, takes + (taken - knobs.tpm) / rate)
        if knobs.rpm:
            best = max(best, takes + (count - knobs.rpm) / (knobs.rpm / MINUTE))
    return max(best, (total - knobs.tpm) / rate)
