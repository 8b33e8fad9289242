"""Several kernels on one key, in virtual time: their ledgers share one store.

Run with ``python -m tests.benchmarks.kernels [--prompts N] [--seeds N]``.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

from nbcodex.ratelimit.rate_limiter import RateLimiter
from nbcodex.ratelimit.stores import MemoryStore
from tests.benchmarks.oracle import Oracle
from tests.benchmarks.pacing import TOKENS, Client
from tests.benchmarks.world import START, Heap, Prompt, World, workload


def run(policy: str, shares: list[list[Prompt]], seed: int) -> tuple[World, list[Client]]:
    """Return the world and the clients after all kernels have asked their prompts."""
    world = World(Heap(), replace(TOKENS, policy=policy), seed)
    store = MemoryStore()
    clients = [
        Client(world, RateLimiter(store, holder=str(i)), prompts, seed + i)
        for i, prompts in enumerate(shares)
    ]
    for client in clients:
        client.start()
        beat(client, world)
    world.heap.run()
    return world, clients


def beat(client: Client, world: World) -> None:
    """Let a kernel live as long as it has work."""
    if client.done < len(client.errands) and not client.dead:
        client.limiter.heartbeat(world.heap.now)
        world.heap.at(world.heap.now + 1, beat, client, world)


def jain(values: list[float]) -> float:
    """Return Jain's index of fairness: 1 if all are equal."""
    return sum(values) ** 2 / (len(values) * sum(v * v for v in values))


def fairness(world: World, shares: list[list[Prompt]], policy: str) -> float:
    """Return Jain's index of the tokens let in while all kernels had prompts waiting."""
    at = world.tally.admitted_at
    end = min(max(at[p.number] for p in prompts) for prompts in shares)
    served = [sum(p.charge(policy) for p in prompts if at[p.number] <= end) for prompts in shares]
    return jain(served)


def main() -> None:
    """Print one line for each policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    print("policy      oracle   429%   Jain")
    for policy in ("kept", "refunded", "actual"):
        rows = []
        for seed in range(options.seeds):
            prompts = workload(options.prompts, seed)
            shares = [prompts[i::4] for i in range(4)]
            world, _ = run(policy, shares, seed)
            best = World(Heap(), replace(TOKENS, policy=policy), seed)
            Oracle(best, prompts).start()
            best.heap.run()
            spans = [max(w.tally.finished.values()) - START for w in (best, world)]
            refused = 100 * world.tally.refused / world.tally.requests
            rows.append((spans[0] / spans[1], refused, fairness(world, shares, policy)))
        medians = [statistics.median(row[i] for row in rows) for i in range(3)]
        print(f"{policy:10} {medians[0]:7.3f} {medians[1]:6.3f} {medians[2]:6.3f}", flush=True)


if __name__ == "__main__":
    main()
