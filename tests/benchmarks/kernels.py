"""Several kernels on one key, in virtual time: their limiters share one store.

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
from tests.benchmarks.world import START, EventHeap, Prompt, RemoteServer, workload


def run(policy: str, shares: list[list[Prompt]], seed: int) -> tuple[RemoteServer, list[Client]]:
    """Return the server and the clients after all prompts have been answered."""
    server = RemoteServer(EventHeap(), replace(TOKENS, policy=policy), seed)
    store = MemoryStore()
    clients = [
        Client(server, RateLimiter(store, process_id=str(i)), prompts, seed + i)
        for i, prompts in enumerate(shares)
    ]
    for client in clients:
        client.start()
        keep_alive(client, server)
    server.heap.run()
    return server, clients


def keep_alive(client: Client, server: RemoteServer) -> None:
    """Send heartbeats of a kernel until its prompts are answered."""
    if client.done < len(client.runs) and not client.dead:
        client.limiter.heartbeat(server.heap.now)
        server.heap.at(server.heap.now + 1, keep_alive, client, server)


def jain(values: list[float]) -> float:
    """Return Jain's index of fairness: 1 if all are equal."""
    return sum(values) ** 2 / (len(values) * sum(v * v for v in values))


def fairness(server: RemoteServer, shares: list[list[Prompt]], policy: str) -> float:
    """Return Jain's index of the tokens admitted while all kernels had prompts waiting."""
    at = server.counts.admitted_at
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
            server, _ = run(policy, shares, seed)
            best = RemoteServer(EventHeap(), replace(TOKENS, policy=policy), seed)
            Oracle(best, prompts).start()
            best.heap.run()
            spans = [max(w.counts.finished.values()) - START for w in (best, server)]
            refused = 100 * server.counts.refused / server.counts.requests
            rows.append((spans[0] / spans[1], refused, fairness(server, shares, policy)))
        medians = [statistics.median(row[i] for row in rows) for i in range(3)]
        print(f"{policy:10} {medians[0]:7.3f} {medians[1]:6.3f} {medians[2]:6.3f}", flush=True)


if __name__ == "__main__":
    main()
