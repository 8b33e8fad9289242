"""What each heuristic of the rate limiter gains: scenes in virtual time with one switched off.

Run with ``python -m tests.benchmarks.ablation [--prompts N] [--seeds N]``. A cell is the change of
the efficiency (the oracle's time over ours) in points of a hundred, and of the 429s in points, when
the heuristic is off; the first row has the figures with all of them on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from nbcodex.models import MINUTE
from nbcodex.ratelimit import sharing
from nbcodex.ratelimit.charge_policy import CHARGE_POLICIES, ChargePolicyEstimator
from nbcodex.ratelimit.rate_limiter import RateLimiter, WaitQueue
from nbcodex.ratelimit.stores import MemoryStore
from nbcodex.ratelimit.token_bucket import TokenBucket
from tests.benchmarks.kernels import keep_alive
from tests.benchmarks.pacing import TOKENS, Case, Client, PromptRun, measure
from tests.benchmarks.table import table
from tests.benchmarks.world import START, EventHeap, RemoteServer, workload

_correct = TokenBucket.correct


def _correct_ignoring_others(bucket: TokenBucket, *args: Any, **options: Any) -> None:
    _correct(bucket, *args, **options | {"others_took": False})


def _nothing(*_: Any, **__: Any) -> None:
    return None


HEURISTICS: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "three charge policies": (
        (ChargePolicyEstimator, "score_period", _nothing),
        (ChargePolicyEstimator, "assume_most_permissive", _nothing),
    ),
    "hidden window": ((TokenBucket, "set_hidden_floor", _nothing),),
    "use by others": ((TokenBucket, "correct", _correct_ignoring_others),),
    "end of a job by size": ((WaitQueue, "order_remaining_by_size", _nothing),),
    "room for idle kernels": ((sharing, "IDLE_RESERVE_REQUESTS", 0),),
}


@contextmanager
def without(heuristic: str | None) -> Iterator[None]:
    """Switch a heuristic off within the block."""
    with ExitStack() as stack:
        for target, name, value in HEURISTICS[heuristic] if heuristic else ():
            stack.enter_context(patch.object(target, name, value))
        yield


def alone(count: int, seed: int, policy: Any, **knobs: Any) -> tuple[float, float]:
    """Return the efficiency of one kernel and its share of 429s, both in percent."""
    case = Case("", replace(TOKENS, policy=policy, **knobs))
    figures = measure(case, count, seed)
    return 100 * figures["oracle"], figures["429%"]


def light(count: int, seed: int, policy: Any) -> tuple[float, float]:
    """Return the longest wait in ms of a few prompts beside a heavy kernel, and the 429s."""
    prompts, store = workload(count + 20, seed), MemoryStore()
    server = RemoteServer(EventHeap(), replace(TOKENS, policy=policy), seed)
    busy, idle = (
        Client(server, RateLimiter(store, process_id=n), [], seed) for n in ("busy", "idle")
    )
    busy.runs = [PromptRun(busy, p) for p in prompts[:count]]
    idle.runs = [PromptRun(idle, p) for p in prompts[count:]]
    busy.start()
    for client in (busy, idle):
        keep_alive(client, server)
    for number, run in enumerate(idle.runs):
        server.heap.at(START + 40 + number, run.enter)
    server.heap.run()
    at = server.counts.admitted_at
    waits = [at[e.prompt.number] - e.entered_at for e in idle.runs]
    return 1000 * max(waits[1:17]), 100 * server.counts.refused / server.counts.requests


def killed(count: int, seed: int, policy: Any) -> tuple[float, float]:
    """Return how much of the limit three kernels use after a fourth has died, and the 429s."""
    prompts, store = workload(count, seed), MemoryStore()
    server = RemoteServer(EventHeap(), replace(TOKENS, policy=policy, used_by_others=0.3), seed)
    clients = [
        Client(server, RateLimiter(store, process_id=str(i)), prompts[i::4], i) for i in range(4)
    ]
    for client in clients:
        client.start()
        keep_alive(client, server)
    server.heap.at(START + 30, setattr, clients[0], "dead", True)
    server.heap.run()
    begin, end = START + 35, START + 75
    at = server.counts.admitted_at
    taken = sum(p.charge(policy) for p in prompts if begin <= at.get(p.number, 0) < end)
    used = taken / (0.7 * TOKENS.tpm / MINUTE * (end - begin))  # type: ignore[operator]
    return 100 * used, 100 * server.counts.refused / server.counts.requests


SCENES: dict[str, Callable[[int, int, Any], tuple[float, float]]] = {
    "plain": alone,
    "stranger": lambda *a: alone(*a, used_by_others=0.3),
    "no headers": lambda *a: alone(*a, headers=False),
    "1 s window": lambda *a: alone(*a, hidden_window=1.0),
    "light beside heavy, ms": light,
    "one of four killed": killed,
}
# Heuristics that cannot matter in a scene are not measured there.
ONLY = {
    "room for idle kernels": {"light beside heavy, ms", "one of four killed"},
}


def main() -> None:
    """Print one table for each policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for policy in CHARGE_POLICIES:
        full: dict[str, tuple[float, float]] = {}
        rows = []
        for heuristic in (None, *HEURISTICS):
            cells = []
            for name, scene in SCENES.items():
                if heuristic and name not in ONLY.get(heuristic, SCENES):
                    cells.append("")
                    continue
                with without(heuristic):
                    runs = [scene(options.prompts, seed, policy) for seed in range(options.seeds)]
                figures = tuple(statistics.fmean(column) for column in zip(*runs, strict=True))
                if heuristic is None:
                    full[name] = figures
                    cells.append(f"{figures[0]:.1f}, {figures[1]:.2f}")
                else:
                    change = [new - old for new, old in zip(figures, full[name], strict=True)]
                    cells.append(f"{change[0]:+.1f}, {change[1]:+.2f}")
            rows.append([f"without {heuristic}" if heuristic else "all on", *cells])
        print(f"\n*{policy}*\n\n{table(['', *SCENES], rows)}", flush=True)


if __name__ == "__main__":
    main()
