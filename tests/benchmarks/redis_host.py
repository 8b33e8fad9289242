"""One host of the Redis benchmark: a process with a limiter in Redis, set up by its arguments.

Prints one line of JSON at its end. Run by `tests.benchmarks.redis`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from nbcodex.openai_api.api_client import ApiClient
from nbcodex.ratelimit.charge_policy import Need, Permit
from nbcodex.ratelimit.rate_limiter import QueueEntry, RateLimiter
from nbcodex.ratelimit.sharing import SharedModel
from nbcodex.ratelimit.stores import MemoryStore, Store
from nbcodex.ratelimit.stores.redis import FallbackStore, RedisStore
from nbcodex.runtime.clock import BootClock
from nbcodex.settings import Secret, Settings
from tests.benchmarks.pacing_wire import Crowd
from tests.benchmarks.world import Prompt, workload
from tests.simulated import KEY

ResultT = TypeVar("ResultT")


class TimedStore:
    """A store that records how long operations take, and how often they are run."""

    def __init__(self, store: Store) -> None:
        self.salt = store.salt
        self.store, self.took, self.runs = store, list[float](), 0

    def transaction(self, name: str, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        def counted(shared: SharedModel) -> ResultT:
            self.runs += 1
            return operation(shared)

        began = time.perf_counter()
        try:
            return self.store.transaction(name, counted)
        finally:
            self.took.append(time.perf_counter() - began)

    def figures(self) -> dict[str, float]:
        cuts = statistics.quantiles(self.took, n=100)
        again = self.runs / len(self.took) - 1
        return {"median": cuts[49], "p99": cuts[98], "again": again, "operations": len(self.took)}


class Host(Crowd):
    """A crowd that records how long its prompts wait for permits and for whole answers."""

    def __init__(self, *args: object, **more: object) -> None:
        super().__init__(*args, **more)  # type: ignore[arg-type]
        self.left: list[float] = []
        self.answered: list[float] = []

    async def ask(self, prompt: Prompt) -> None:
        began = self.clock.now()
        await super().ask(prompt)
        self.answered.append(self.clock.now() - began)

    async def _acquire(self, entry: QueueEntry, event: asyncio.Event) -> Permit:
        began = self.clock.now()
        permit = await super()._acquire(entry, event)
        self.left.append(self.clock.now() - began)
        return permit


async def run_host(host: Host, prompts: list[Prompt], *, seconds: float, every: float) -> None:
    """Send the prompts, at once or one after another, until all are answered or time is up."""
    asking = asyncio.ensure_future(_ask(host, prompts, every))
    end = host.clock.now() + seconds
    while not asking.done() and host.clock.now() < end:
        host.limiter.heartbeat(host.clock.now())
        await asyncio.wait([asking], timeout=1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def _ask(host: Host, prompts: list[Prompt], every: float) -> None:
    async with asyncio.TaskGroup() as group:
        for prompt in prompts:
            group.create_task(host.ask(prompt))
            if every:
                await asyncio.sleep(host.rng.expovariate(1 / every))


def run_operations(store: TimedStore, *, seconds: float, rate: float) -> None:
    """Run operations at a constant rate, and nothing else."""
    clock, need = BootClock(), Need(250, 1000)
    limiter = RateLimiter(store, process_id=str(time.perf_counter_ns()))
    end = clock.now() + seconds
    due = clock.now()
    while due < end:
        time.sleep(max(0.0, due - clock.now()))
        entry = limiter.enqueue("b", need, lambda: None)
        permit = limiter.probe(entry, clock.now())
        limiter.observe(permit, None, clock.now())
        limiter.release(permit, clock.now())
        limiter.heartbeat(clock.now())
        due += 1 / rate


def wait_for_all(clock: BootClock) -> None:
    """Report that everything is imported, and wait for the instant at which all hosts begin."""
    print("ready", flush=True)
    time.sleep(max(0.0, float(sys.stdin.readline()) - clock.now()))


def main() -> None:
    """Run one host."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis", required=True)
    parser.add_argument("--api", default="")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--every", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=0.0)
    options = parser.parse_args()
    report = lambda text: print(text, file=sys.stderr)  # noqa: E731
    store = TimedStore(
        FallbackStore(RedisStore(Secret(options.redis)), MemoryStore(), notify=report)
    )
    store.transaction("b", lambda _: None)
    clock = BootClock()
    if options.rate:
        wait_for_all(clock)
        run_operations(store, seconds=options.seconds, rate=options.rate)
        print(json.dumps(store.figures()))
        return
    keys = {urlsplit(options.api).netloc: Secret(KEY)}
    settings = Settings(api_key=Secret(KEY), base_url=f"{options.api}/v1", keys=keys)
    limiter = RateLimiter(store, process_id=str(options.index))
    host = Host(ApiClient(clock=clock), limiter, clock, settings, seed=options.index)
    prompts = workload(options.prompts, 0)[options.index :: options.hosts]

    wait_for_all(clock)
    asyncio.run(run_host(host, prompts, seconds=options.seconds, every=options.every))
    twice = sum(n != 1 for n in host.finished.values())
    done = {"index": options.index, "finished": len(host.finished), "twice": twice}
    print(json.dumps(done | {"left": host.left, "answered": host.answered} | store.figures()))


if __name__ == "__main__":
    main()
