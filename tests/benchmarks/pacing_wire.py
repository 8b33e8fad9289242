"""The rate limiter with the real API client and the whole simulator, in virtual time.

It checks the figures of `tests.benchmarks.pacing`, which uses neither.

Run with ``python -m tests.benchmarks.pacing_wire [--prompts N] [--seeds N]``. Prompts, limits and
oracle are those of `tests.benchmarks.pacing`; the input is estimated from the text, requests go
through the SDK, and every figure is read from headers, messages and usage.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections import Counter
from dataclasses import replace

from nbcodex.errors import LimitError, TransientError
from nbcodex.models import Request
from nbcodex.openai_api import pricing
from nbcodex.openai_api.answers import CompletedAnswer, ResponseStarted
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.ratelimit import backoff
from nbcodex.ratelimit.charge_policy import Need, Permit
from nbcodex.ratelimit.limit_model import Refusal
from nbcodex.ratelimit.rate_limiter import Cooldown, QueueEntry, RateLimiter, Wait
from nbcodex.runtime.clock import Clock
from nbcodex.settings import Secret, Settings
from nbcodex.simulator.generated_answers import latency
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.service import Simulator
from tests.benchmarks.oracle import Oracle
from tests.benchmarks.prompts import KNOBS, MODEL, text_of, writable_workload
from tests.benchmarks.world import START, EventHeap, Prompt, RemoteServer
from tests.simulated import KEY
from tests.simulator_transport import SimulatorTransport
from tests.virtual import LoopClock, run_virtual


class Crowd:
    """Prompts that are sent through one limiter and one API client."""

    def __init__(
        self,
        api_client: ApiClient,
        limiter: RateLimiter,
        clock: Clock,
        settings: Settings,
        *,
        seed: int,
    ) -> None:
        self.api_client, self.limiter, self.clock, self.settings = (
            api_client,
            limiter,
            clock,
            settings,
        )
        self.rng = random.Random(seed)
        self.finished: Counter[int] = Counter()
        self.last_answer_at = 0.0

    async def ask(self, prompt: Prompt) -> None:
        """Send one prompt until it is answered."""
        request = Request(prompt=text_of(prompt), model=MODEL, max_output=prompt.max_output)
        event = asyncio.Event()
        need = Need(pricing.estimate_request_tokens(request), prompt.max_output)
        entry = self.limiter.enqueue("b", need, event.set)
        while not await self._attempt(request, entry, event):
            self.limiter.requeue(entry)
        self.finished[prompt.number] += 1
        self.last_answer_at = self.clock.now()

    async def _attempt(self, request: Request, entry: QueueEntry, event: asyncio.Event) -> bool:
        """Send the prompt once; return whether it was answered."""
        permit = await self._acquire(entry, event)
        try:
            async for received in self.api_client.stream(request, self.settings, model=MODEL):
                match received:
                    case ResponseStarted():
                        self.limiter.observe(permit, received.snapshot, self.clock.now())
                    case CompletedAnswer():
                        self.limiter.settle(permit, received.usage, self.clock.now())
                        return True
        except LimitError as error:
            now = self.clock.now()
            until = now + backoff.with_jitter(error.wait or 1.0, self.rng)
            self.limiter.refuse(permit, Refusal(until, error.limit, snapshot=error.snapshot), now)
        except TransientError:
            self.limiter.release(permit, self.clock.now())
            await asyncio.sleep(1)
        return False

    async def _acquire(self, entry: QueueEntry, event: asyncio.Event) -> Permit:
        while True:
            event.clear()
            answer = self.limiter.try_acquire(entry, self.clock.now())
            if not isinstance(answer, Wait | Cooldown):
                return answer
            await self.clock.wait(answer.until, unless=event)


async def ours(knobs: Knobs, prompts: list[Prompt], seed: int) -> tuple[float, float, int]:
    """Return the seconds, the percentage of refusals, and the prompts not answered just once."""
    simulator = Simulator(knobs, clock=LoopClock())
    clock = LoopClock()
    api_client = ApiClient(clock=clock, transport=SimulatorTransport(simulator))
    crowd = Crowd(api_client, RateLimiter(), clock, Settings(api_key=Secret(KEY)), seed=seed)
    # The SDK's first request runs a thread, in which virtual time would jump.
    simulator.change_knobs(tpm=None, rpm=None)
    await anext(aiter(crowd.api_client.stream(Request(prompt="hi"), crowd.settings, model=MODEL)))
    simulator.change_knobs(tpm=knobs.tpm, rpm=knobs.rpm)
    simulator.log.clear()
    started_at = crowd.clock.now()
    await asyncio.gather(*(crowd.ask(prompt) for prompt in prompts))
    refused = sum(seen.status == 429 for seen in simulator.log)
    wrong = sum(n != 1 for n in crowd.finished.values()) + len(prompts) - len(crowd.finished)
    return crowd.last_answer_at - started_at, 100 * refused / len(simulator.log), wrong


def oracle_seconds(knobs: Knobs, prompts: list[Prompt], seed: int) -> float:
    """Return the seconds that the oracle needs with the same latencies."""
    known = [replace(p, latency=latency(text_of(p), knobs)) for p in prompts]
    server = RemoteServer(EventHeap(), knobs, seed)
    Oracle(server, known).start()
    server.heap.run()
    return max(server.counts.finished.values()) - START


def main() -> None:
    """Print a line for each policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    print("policy      oracle   429%  wrong")
    for policy in ("kept", "refunded", "actual"):
        rows = []
        for seed in range(options.seeds):
            knobs = replace(KNOBS, policy=policy, seed=seed)
            prompts = writable_workload(options.prompts, seed)
            seconds, refused, wrong = run_virtual(ours(knobs, prompts, seed))
            rows.append((oracle_seconds(knobs, prompts, seed) / seconds, refused, wrong))
        medians = [statistics.median(row[i] for row in rows) for i in range(3)]
        print(f"{policy:10} {medians[0]:7.3f} {medians[1]:6.3f} {medians[2]:6.0f}", flush=True)


if __name__ == "__main__":
    main()
