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
from nbcodex.ratelimit.charge_policy import Need, Permit
from nbcodex.ratelimit.limit_model import Refusal
from nbcodex.ratelimit.rate_limiter import Cooldown, QueueEntry, RateLimiter, Wait
from nbcodex.simulator.buckets import Refusal as ServerRefusal
from nbcodex.simulator.knobs import Knobs
from tests.benchmarks.oracle import Oracle
from tests.benchmarks.world import (
    START,
    EventHeap,
    Prompt,
    RemoteServer,
    lower_bound_s,
    stated_limit,
    workload,
)

BUCKET = "bucket"


class Client:
    """Many prompts that are sent through one limiter."""

    def __init__(
        self, server: RemoteServer, limiter: RateLimiter, prompts: list[Prompt], seed: int
    ) -> None:
        self.server, self.limiter, self.heap = server, limiter, server.heap
        self.rng = random.Random(seed)
        self.done = 0
        self.cpu = 0.0
        self.dead = False
        self.runs = [PromptRun(self, p) for p in prompts]

    def start(self) -> None:
        for run in self.runs:
            run.enter()


class PromptRun:
    """One prompt, from the queue to its answer."""

    def __init__(self, client: Client, prompt: Prompt) -> None:
        self.client, self.prompt = client, prompt
        self.entry: QueueEntry | None = None
        self.permit: Permit | None = None
        self.is_scheduled = False
        self.entered_at = self.finished_at = 0.0
        self.recheck_at = 0.0

    def enter(self) -> None:
        self.entered_at = self.client.heap.now
        need = Need(self.prompt.tokens, self.prompt.max_output)
        self.entry = self.client.limiter.enqueue(BUCKET, need, self.wake)
        self.wake()

    def wake(self) -> None:
        if not self.is_scheduled and not self.client.dead:
            self.is_scheduled = True
            self.client.heap.at(self.client.heap.now, self.try_acquire)

    def try_acquire(self) -> None:
        self.is_scheduled = False
        heap, entry = self.client.heap, self.entry
        if entry is None or not entry.is_waiting or self.client.dead:
            return
        answer = self.client.limiter.try_acquire(entry, heap.now)
        if isinstance(answer, Wait | Cooldown):
            self.recheck_at = answer.until
            heap.at(answer.until + 1e-6, self.recheck, answer.until)
            return
        self.permit = answer
        self.client.server.send(self.prompt, self)

    def recheck(self, recheck_at: float) -> None:
        if recheck_at == self.recheck_at:
            self.try_acquire()

    def requeue(self) -> None:
        assert self.entry
        self.client.limiter.requeue(self.entry)
        self.wake()

    # Called by the server.

    def on_headers(self, snapshot: LimitSnapshot | None) -> None:
        if self.client.dead:
            return
        self.client.limiter.observe(self.permit, self._arrived(snapshot), self.client.heap.now)

    def on_refusal(self, refusal: ServerRefusal, snapshot: LimitSnapshot | None) -> None:
        now = self.client.heap.now
        assert refusal.wait is not None
        until = now + backoff.with_jitter(refusal.wait, self.client.rng)
        self.client.limiter.refuse(
            self.permit,
            Refusal(
                until,
                Limit() if self.client.server.refusals_lack_figures else stated_limit(refusal),
                snapshot=self._arrived(snapshot),
            ),
            now,
        )
        self.requeue()

    def on_failure(self) -> None:
        if self.client.dead:
            return
        now = self.client.heap.now
        self.client.limiter.release(self.permit, now)
        self.client.heap.at(now + 1 + self.client.rng.random(), self.requeue)

    on_broken_stream = on_failure

    def on_answer(self, tokens: int, output: int) -> None:
        if self.client.dead:
            return
        now = self.client.heap.now
        usage = Usage(input_tokens=tokens, output_tokens=output)
        self.client.limiter.settle(self.permit, usage, now)
        self.finished_at = now
        self.client.done += 1

    def _arrived(self, snapshot: LimitSnapshot | None) -> LimitSnapshot | None:
        return snapshot and replace(snapshot, at=self.client.heap.now)


@dataclass(frozen=True, slots=True)
class Case:
    """The properties of the server and of the prompts."""

    name: str
    knobs: Knobs
    giant_share: float = 0.0
    steps: tuple[tuple[float, dict[str, Any]], ...] = ()
    states_processing: bool = True
    headers_are_late: bool = False
    refusals_lack_figures: bool = False


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
            Case(f"{policy}/giant_share", base, giant_share=0.05),
            Case(f"{policy}/requests", r(base, rpm=500)),
            Case(f"{policy}/blind", r(base, headers=False)),
            Case(f"{policy}/mute", r(base, headers=False), refusals_lack_figures=True),
            Case(f"{policy}/stranger", r(base, used_by_others=0.3)),
            Case(f"{policy}/burst1", r(base, hidden_window=1.0)),
            Case(f"{policy}/burst10", r(base, hidden_window=10.0)),
            Case(f"{policy}/slow", r(base, speed=50)),
            Case(f"{policy}/undated", base, states_processing=False),
            Case(f"{policy}/late", base, headers_are_late=True),
            Case(f"{policy}/late-undated", base, headers_are_late=True, states_processing=False),
        ):
            found[case.name] = case
    return found


def run(case: Case, prompts: list[Prompt], seed: int, make: Callable[..., Any]) -> RemoteServer:
    """Return the server after all prompts have been answered."""
    server = RemoteServer(
        EventHeap(),
        case.knobs,
        seed,
        states_processing=case.states_processing,
        headers_are_late=case.headers_are_late,
        refusals_lack_figures=case.refusals_lack_figures,
    )
    for when, change in case.steps:
        server.heap.at(START + when, lambda change=change: server.change(**change))
    client = make(server)
    began = time.process_time()
    client.start()
    server.heap.run()
    client.cpu = time.process_time() - began
    server.client = client  # type: ignore[attr-defined]
    return server


def measure(case: Case, count: int, seed: int) -> dict[str, float]:
    """Return the figures of one run."""
    prompts = workload(count, seed, giant_share=case.giant_share)

    # The oracle meets no faults, so they make a client less efficient.
    faultless = replace(case, knobs=replace(case.knobs, failures=0.0, stream_failures=0.0))
    oracle = run(faultless, prompts, seed, lambda w: Oracle(w, prompts))
    ours = run(case, prompts, seed, lambda w: Client(w, RateLimiter(), prompts, seed))
    counts = ours.counts
    assert len(counts.finished) == count, f"{count - len(counts.finished)} lost"
    span = max(counts.finished.values()) - START
    best = max(oracle.counts.finished.values()) - START
    charged = sum(p.charge(case.knobs.policy, case.knobs.token_bias) for p in prompts)
    rate = case.knobs.tpm / MINUTE
    plain = (charged - case.knobs.tpm) / rate
    plain += statistics.fmean(p.duration(case.knobs.speed) for p in prompts)
    return {
        "oracle": best / span,
        "plain": plain / span,
        "o.plain": plain / best,
        "strict": lower_bound_s(prompts, case.knobs) / span,
        "tokens": (charged - case.knobs.tpm) / rate / (counts.last_admitted_at - START),
        "429%": 100 * counts.refused / counts.requests,
        "twice": sum(n > 1 for n in counts.admitted.values())
        if not case.knobs.stream_failures
        else 0,
        "failed": count - len(counts.finished),
        "lowest%": 100 * counts.lowest_level / case.knobs.tpm,
        "o.lowest%": 100 * oracle.counts.lowest_level / case.knobs.tpm,
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
