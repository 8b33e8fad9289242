"""One run of one peer: it sends prompts to a simulated server, and its outcome is printed as JSON.

``python -m tests.benchmarks.peers.trial NAME --policy kept --seed 0`` runs in the peer's own
virtual environment, so this module imports nothing that only ours has. Time is virtual: the loop's
clock jumps, and `time.time`, `time.monotonic` and `time.perf_counter` read it. With ``--real``,
time is real, and everything goes through sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.server import serve
from nbcodex.simulator.service import Simulator
from tests.benchmarks.peers.definitions import PEERS, Peer
from tests.benchmarks.prompts import KNOBS, MODEL, text_of, writable_workload
from tests.benchmarks.world import Prompt
from tests.virtual import EPOCH, LoopClock, VirtualLoop

KEY = "sk-test-0123456789abcdef"
# Requests in flight at most where a peer sets no bound: the SDK's pool of connections.
MAX_CONNECTIONS = 1_000
MIN_TIMER_S = 0.001


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one run."""

    # What was run.
    peer: str
    policy: str
    seed: int
    count: int  # prompts
    tpm: int
    real: bool
    seconds: float  # from the first request to the last answer
    requests: int  # over HTTP
    refused: int  # with a 429
    failed: int  # prompts that were given up
    twice: int  # prompts that were answered more than once
    cpu: float  # seconds, including the simulated server


@dataclass(slots=True)
class Trial:
    """What a peer is given: prompts, and a server to send them to."""

    knobs: Knobs  # of the server; peers may be configured with `tpm` and `rpm`
    prompts: list[Prompt]
    simulator: Simulator
    url: str = ""  # without ``/v1``; empty if the peer needs no socket
    errors: Counter[str] = field(default_factory=Counter)  # why prompts were given up
    started_at: float = 0.0
    ended_at: float = 0.0

    @property
    def base_url(self) -> str:
        """The base URL for clients."""
        return f"{self.url or 'http://127.0.0.1:1'}/v1"

    @property
    def mean_output(self) -> int:
        """The mean of the outputs, which a user does not know beforehand."""
        return round(sum(p.output for p in self.prompts) / len(self.prompts))

    def transport(self) -> Any:
        """Return an `httpx2` transport to the server without a socket; None with a socket."""
        if self.url:
            return None
        from tests.simulator_transport import SimulatorTransport

        return SimulatorTransport(self.simulator)

    async def client(self, **options: Any) -> Any:
        """Return an `AsyncOpenAI` that has been used once."""
        # The SDK's first request runs a thread, in which virtual time would jump.
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        transport = self.transport()
        http = DefaultAsyncHttpxClient(transport=transport) if transport else None
        client = AsyncOpenAI(api_key=KEY, base_url=self.base_url, http_client=http, **options)
        self.lift_limits()
        await client.responses.create(model=MODEL, input="hi", max_output_tokens=16)
        return client

    def lift_limits(self) -> None:
        """Remove the limits, for what a peer does before its first prompt."""
        self.simulator.change_knobs(tpm=None, rpm=None)

    def start_clock(self) -> None:
        """Fill the buckets and start the clock."""
        self.lift_limits()
        self.simulator.change_knobs(tpm=self.knobs.tpm, rpm=self.knobs.rpm)
        self.simulator.log.clear()
        self.started_at = asyncio.get_running_loop().time()

    def stop_clock(self) -> None:
        """Record the end; the last call counts."""
        self.ended_at = asyncio.get_running_loop().time()

    async def ask_all(
        self, ask: Callable[[Prompt], Awaitable[Any]], *, at_once: int = MAX_CONNECTIONS
    ) -> None:
        """Send all prompts by `ask`, some at once; an exception counts as a failed prompt."""
        semaphore = asyncio.Semaphore(at_once)

        async def ask_one(prompt: Prompt) -> None:
            async with semaphore:
                try:
                    await ask(prompt)
                except Exception as exc:
                    self.errors[type(exc).__name__] += 1
            self.stop_clock()

        self.start_clock()
        await asyncio.gather(*(ask_one(prompt) for prompt in self.prompts))

    def outcome(self, **parameters: Any) -> Outcome:
        """Return the outcome by the server's log."""
        log = self.simulator.log
        finished = Counter(seen.prompt.partition(" ")[0] for seen in log if seen.finished)
        return Outcome(
            count=len(self.prompts),
            tpm=self.knobs.tpm or 0,
            seconds=self.ended_at - self.started_at,
            requests=len(log),
            refused=sum(seen.status == 429 for seen in log),
            failed=max(len(self.prompts) - len(finished), self.errors.total()),
            twice=sum(n > 1 for n in finished.values()),
            **parameters,
        )


async def ask(client: Any, prompt: Prompt) -> Any:
    """Send one prompt to the Responses API."""
    return await client.responses.create(
        model=MODEL, input=text_of(prompt), max_output_tokens=prompt.max_output
    )


async def run_peer(peer: Peer, knobs: Knobs, prompts: list[Prompt], *, sockets: bool) -> Trial:
    """Let `peer` send all prompts, and return its trial."""
    simulator = Simulator(knobs, clock=LoopClock())
    module = importlib.import_module(f"tests.benchmarks.peers.{peer.module}")
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(serve(simulator)) if sockets else ""
        trial = Trial(knobs, prompts, simulator, url)
        await getattr(module, peer.function)(trial, **peer.options)
        return trial


class TickingLoop(VirtualLoop):
    """A virtual loop whose timers take a millisecond at least, as those of `epoll` do."""

    # A peer that polls with shorter sleeps would stop virtual time.

    def call_at(self, when: float, *args: Any, **options: Any) -> asyncio.TimerHandle:
        """Call a function at an instant that is at least a millisecond ahead."""
        return super().call_at(max(when, self.time() + MIN_TIMER_S), *args, **options)


def patch_clocks(loop: VirtualLoop) -> None:
    """Replace the clocks of the `time` module by the loop's."""
    time.time = lambda: EPOCH + loop.time()
    time.monotonic = time.perf_counter = loop.time


def main() -> None:
    """Run one peer once, and print its outcome."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--policy", default="kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=6000)
    parser.add_argument("--tpm", type=int, default=KNOBS.tpm)
    parser.add_argument("--real", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    peer = PEERS[options.peer]
    knobs = replace(KNOBS, policy=options.policy, seed=options.seed, tpm=options.tpm, models=())
    loop = asyncio.SelectorEventLoop() if options.real else TickingLoop()
    if isinstance(loop, VirtualLoop):
        patch_clocks(loop)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        cpu_before = time.process_time()
        prompts = writable_workload(options.prompts, options.seed)
        trial = runner.run(
            run_peer(peer, knobs, prompts, sockets=options.real or peer.needs_socket)
        )
        outcome = trial.outcome(
            peer=peer.name,
            policy=options.policy,
            seed=options.seed,
            real=options.real,
            cpu=time.process_time() - cpu_before,
        )
        print(json.dumps({**asdict(outcome), "errors": trial.errors}), flush=True)


if __name__ == "__main__":
    main()
