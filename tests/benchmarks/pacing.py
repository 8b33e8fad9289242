"""How well the pacing uses a limit, against a first-come-first-served oracle, in virtual time.

Run with ``python -m tests.benchmarks.pacing [--prompts N] [--seeds N] [--case NAME]``.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from nbcodex.models import MINUTE, Limit, LimitSnapshot, Usage
from nbcodex.ratelimit import backoff
from nbcodex.ratelimit.charge_policy import Cost, Permit
from nbcodex.ratelimit.limit_model import Refusal
from nbcodex.ratelimit.rate_limiter import Cooldown, QueueEntry, RateLimiter, Wait
from nbcodex.simulator.buckets import Refusal as ServerRefusal
from nbcodex.simulator.knobs import Knobs
from tests.benchmarks.oracle import Oracle
from tests.benchmarks.world import START, Heap, Prompt, World, bound, limit_of, workload

BUCKET = "bucket"


class Client:
    """A crowd of prompts behind one limiter."""

    def __init__(
        self, world: World, limiter: RateLimiter, prompts: list[Prompt], seed: int
    ) -> None:
        self.world, self.limiter, self.heap = world, limiter, world.heap
        self.chance = random.Random(seed)
        self.done = 0
        self.cpu = 0.0
        self.dead = False
        self.errands = [Errand(self, p) for p in prompts]

    def start(self) -> None:
        for errand in self.errands:
            errand.enter()


class Errand:
    """One prompt on its way."""

    def __init__(self, client: Client, prompt: Prompt) -> None:
        self.client, self.prompt = client, prompt
        self.entry: QueueEntry | None = None
        self.reservation: Permit | None = None
        self.asking = False
        self.entered_at = self.finished_at = 0.0
        self.moment = 0.0

    def enter(self) -> None:
        self.entered_at = self.client.heap.now
        cost = Cost(self.prompt.tokens, self.prompt.max_output)
        self.entry = self.client.limiter.enqueue(BUCKET, cost, self.wake)
        self.wake()

    def wake(self) -> None:
        if not self.asking and not self.client.dead:
            self.asking = True
            self.client.heap.at(self.client.heap.now, self.ask)

    def ask(self) -> None:
        self.asking = False
        heap, entry = self.client.heap, self.entry
        if entry is None or not entry.is_waiting or self.client.dead:
            return
        answer = self.client.limiter.try_acquire(entry, heap.now)
        if isinstance(answer, Wait | Cooldown):
            self.moment = answer.until
            heap.at(answer.until + 1e-6, self.due, answer.until)
            return
        self.reservation = answer
        self.client.world.send(self.prompt, self)

    def due(self, moment: float) -> None:
        if moment == self.moment:
            self.ask()

    def again(self) -> None:
        assert self.entry
        self.client.limiter.requeue(self.entry)
        self.wake()

    # What the server says.

    def first(self, snapshot: LimitSnapshot | None) -> None:
        if self.client.dead:
            return
        self.client.limiter.observe(self.reservation, self._at(snapshot), self.client.heap.now)

    def refused(self, refusal: ServerRefusal, snapshot: LimitSnapshot | None) -> None:
        now = self.client.heap.now
        assert refusal.wait is not None
        until = now + backoff.stated_wait(refusal.wait, self.client.chance)
        self.client.limiter.refuse(
            self.reservation,
            Refusal(
                until,
                Limit() if self.client.world.mute else limit_of(refusal),
                snapshot=self._at(snapshot),
            ),
            now,
        )
        self.again()

    def failed(self) -> None:
        if self.client.dead:
            return
        now = self.client.heap.now
        self.client.limiter.release(self.reservation, now)
        self.client.heap.at(now + 1 + self.client.chance.random(), self.again)

    broken = failed

    def done(self, tokens: int, output: int) -> None:
        if self.client.dead:
            return
        now = self.client.heap.now
        usage = Usage(input_tokens=tokens, output_tokens=output)
        self.client.limiter.settle(self.reservation, usage, now)
        self.finished_at = now
        self.client.done += 1

    def _at(self, snapshot: LimitSnapshot | None) -> LimitSnapshot | None:
        return snapshot and replace(snapshot, at=self.client.heap.now)


@dataclass(frozen=True, slots=True)
class Case:
    """What the server is like, and what is asked of it."""

    name: str
    knobs: Knobs
    giants: float = 0.0
    steps: tuple[tuple[float, dict[str, Any]], ...] = ()
    processing: bool = True
    late: bool = False
    mute: bool = False


TOKENS = Knobs(tpm=600_000, rpm=20_000)


def cases() -> dict[str, Case]:
    r = replace
    found = {}
    for policy in ("kept", "refunded", "actual"):
        base = r(TOKENS, policy=policy)
        halved = ((40.0, {"tpm": 300_000}), (100.0, {"tpm": 600_000}))
        for case in (
            Case(policy, base),
            Case(f"{policy}/bias", r(base, token_bias=1.15)),
            Case(f"{policy}/bias-", r(base, token_bias=0.85)),
            Case(f"{policy}/5xx", r(base, failures=0.01)),
            Case(f"{policy}/breaks", r(base, stream_failures=0.01)),
            Case(f"{policy}/halved", base, steps=halved),
            Case(f"{policy}/giants", base, giants=0.05),
            Case(f"{policy}/requests", r(base, rpm=500)),
            Case(f"{policy}/blind", r(base, headers=False)),
            Case(f"{policy}/mute", r(base, headers=False), mute=True),
            Case(f"{policy}/stranger", r(base, used_by_others=0.3)),
            Case(f"{policy}/burst1", r(base, hidden_window=1.0)),
            Case(f"{policy}/burst10", r(base, hidden_window=10.0)),
            Case(f"{policy}/slow", r(base, speed=50)),
            Case(f"{policy}/undated", base, processing=False),
            Case(f"{policy}/late", base, late=True),
            Case(f"{policy}/late-undated", base, late=True, processing=False),
        ):
            found[case.name] = case
    return found


def run(case: Case, prompts: list[Prompt], seed: int, make: Callable[..., Any]) -> World:
    """Return the world after everything has been asked."""
    world = World(
        Heap(), case.knobs, seed, processing=case.processing, late=case.late, mute=case.mute
    )
    for when, change in case.steps:
        world.heap.at(START + when, lambda change=change: world.change(**change))
    client = make(world)
    began = time.process_time()
    client.start()
    world.heap.run()
    client.cpu = time.process_time() - began
    world.client = client  # type: ignore[attr-defined]
    return world


def measure(case: Case, count: int, seed: int) -> dict[str, float]:
    """Return the figures of one run."""
    prompts = workload(count, seed, giants=case.giants)

    # The oracle meets no faults: a client that does pays for them.
    smooth = replace(case, knobs=replace(case.knobs, failures=0.0, stream_failures=0.0))
    oracle = run(smooth, prompts, seed, lambda w: Oracle(w, prompts))
    ours = run(case, prompts, seed, lambda w: Client(w, RateLimiter(), prompts, seed))
    tally = ours.tally
    assert len(tally.finished) == count, f"{count - len(tally.finished)} lost"
    span = max(tally.finished.values()) - START
    best = max(oracle.tally.finished.values()) - START
    charged = sum(p.charge(case.knobs.policy, case.knobs.token_bias) for p in prompts)
    rate = case.knobs.tpm / MINUTE
    plain = (charged - case.knobs.tpm) / rate
    plain += statistics.fmean(p.takes(case.knobs.speed) for p in prompts)
    return {
        "oracle": best / span,
        "plain": plain / span,
        "o.plain": plain / best,
        "strict": bound(prompts, case.knobs) / span,
        "tokens": (charged - case.knobs.tpm) / rate / (tally.last_admission - START),
        "429%": 100 * tally.refused / tally.requests,
        "twice": sum(n > 1 for n in tally.admitted.values())
        if not case.knobs.stream_failures
        else 0,
        "failed": count - len(tally.finished),
        "lowest%": 100 * tally.lowest / case.knobs.tpm,
        "o.lowest%": 100 * oracle.tally.lowest / case.knobs.tpm,
        "cpu/1000": ours.client.cpu / count * 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--case", action="append", default=[])
    options = parser.parse_args()
    known = cases()
    chosen = options.case or list(known)
    names: list[str] = []
    for name in (n for n in known if any(fnmatch(n, c) for c in chosen)):
        rows = [measure(known[name], options.prompts, seed) for seed in range(options.seeds)]
        if not names:
            names = list(rows[0])
            print(f"{'case':18}" + "".join(f"{n:>15}" for n in names))
        cells = []
        for key in names:
            values = [row[key] for row in rows]
            cells.append(f"{statistics.median(values):.3f} ±{(max(values) - min(values)) / 2:.3f}")
        print(f"{name:18}" + "".join(f"{c:>15}" for c in cells), flush=True)


if __name__ == "__main__":
    main()
