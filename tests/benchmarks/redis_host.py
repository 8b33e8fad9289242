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
from nbcodex.ratelimit.charge_policy import Cost, Permit
from nbcodex.ratelimit.rate_limiter import QueueEntry, RateLimiter
from nbcodex.ratelimit.sharing import SharedModel
from nbcodex.ratelimit.stores import MemoryStore, Store
from nbcodex.ratelimit.stores.redis import FallbackStore, RedisStore
from nbcodex.runtime.clock import BootClock
from nbcodex.settings import Secret, Settings
from tests.benchmarks.pacing_wire import Crowd
from tests.benchmarks.world import Prompt, workload
from tests.simulated import KEY

T = TypeVar("T")


class Timed:
    """A store that notes how long operations take, and how often they are done."""

    def __init__(self, store: Store) -> None:
        self.salt = store.salt
        self.store, self.took, self.done = store, list[float](), 0

    def transaction(self, name: str, operation: Callable[[SharedModel], T]) -> T:
        def counted(shared: SharedModel) -> T:
            self.done += 1
            return operation(shared)

        began = time.perf_counter()
        try:
            return self.store.transaction(name, counted)
        finally:
            self.took.append(time.perf_counter() - began)

    def figures(self) -> dict[str, float]:
        cuts = statistics.quantiles(self.took, n=100)
        again = self.done / len(self.took) - 1
        return {"median": cuts[49], "p99": cuts[98], "again": again, "operations": len(self.took)}


class Host(Crowd):
    """A crowd that notes how long its prompts wait, for leave and for the whole answer."""

    def __init__(self, *args: object, **more: object) -> None:
        super().__init__(*args, **more)  # type: ignore[arg-type]
        self.left: list[float] = []
        self.answered: list[float] = []

    async def ask(self, prompt: Prompt) -> None:
        began = self.clock.now()
        await super().ask(prompt)
        self.answered.append(self.clock.now() - began)

    async def _leave(self, entry: QueueEntry, event: asyncio.Event) -> Permit:
        began = self.clock.now()
        reservation = await super()._leave(entry, event)
        self.left.append(self.clock.now() - began)
        return reservation


async def live(host: Host, prompts: list[Prompt], *, seconds: float, every: float) -> None:
    """Ask the prompts, all at once or one after the other, until they or the time are used up."""
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
                await asyncio.sleep(host.chance.expovariate(1 / every))


def spin(store: Timed, *, seconds: float, rate: float) -> None:
    """Do operations at a steady rate, and nothing else."""
    clock, cost = BootClock(), Cost(250, 1000)
    limiter = RateLimiter(store, holder=str(time.perf_counter_ns()))
    end = clock.now() + seconds
    due = clock.now()
    while due < end:
        time.sleep(max(0.0, due - clock.now()))
        entry = limiter.enqueue("b", cost, lambda: None)
        given = limiter.probe(entry, clock.now())
        limiter.observe(given, None, clock.now())
        limiter.release(given, clock.now())
        limiter.heartbeat(clock.now())
        due += 1 / rate


def wait_for_all(clock: BootClock) -> None:
    """Say that everything is imported, and wait for the moment at which all begin."""
    print("ready", flush=True)
    time.sleep(max(0.0, float(sys.stdin.readline()) - clock.now()))


def main() -> None:
    """Be one host."""
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
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731
    store = Timed(FallbackStore(RedisStore(Secret(options.redis)), MemoryStore(), notify=say))
    store.transaction("b", lambda _: None)
    clock = BootClock()
    if options.rate:
        wait_for_all(clock)
        spin(store, seconds=options.seconds, rate=options.rate)
        print(json.dumps(store.figures()))
        return
    place = urlsplit(options.api).netloc
    keys = {place: Secret(KEY)}
    settings = Settings(api_key=Secret(KEY), base_url=f"{options.api}/v1", keys=keys)
    limiter = RateLimiter(store, holder=str(options.index))
    host = Host(ApiClient(clock=clock), limiter, clock, settings, seed=options.index)
    prompts = workload(options.prompts, 0)[options.index :: options.hosts]

    wait_for_all(clock)
    asyncio.run(live(host, prompts, seconds=options.seconds, every=options.every))
    twice = sum(n != 1 for n in host.finished.values())
    done = {"index": options.index, "finished": len(host.finished), "twice": twice}
    print(json.dumps(done | {"left": host.left, "answered": host.answered} | store.figures()))


if __name__ == "__main__":
    main()
