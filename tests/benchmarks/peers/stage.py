"""One run of one peer: prompts, a simulated server, and what came of it, printed as JSON.

``python -m tests.benchmarks.peers.stage NAME --policy kept --seed 0`` runs in the peer's own
virtual environment, so nothing is imported here that only ours has. Time is virtual: the loop's
clock jumps, and `time.time`, `time.monotonic` and `time.perf_counter` read it. ``--real`` lets time
be, and sends everything through sockets.
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
from tests.benchmarks.peers.roster import PEERS, Peer
from tests.benchmarks.prompts import KNOBS, MODEL, text_of, written
from tests.benchmarks.world import Prompt
from tests.virtual import EPOCH, LoopClock, VirtualLoop

KEY = "sk-test-0123456789abcdef"
POOL = 1_000
"""Requests under way at most where a peer sets no bound: the SDK's pool of connections."""

TICK = 0.001
"""Seconds that no timer is shorter than."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run.

    Parameters
    ----------
    peer, policy, seed, count, tpm, real
        What was run.
    seconds : float
        From the first request to the last answer.
    requests, refused : int
        HTTP requests, and those that met a 429.
    failed, twice : int
        Prompts that were given up, and those that were answered more than once.
    cpu : float
        Seconds of CPU, the simulated server's included.
    """

    peer: str
    policy: str
    seed: int
    count: int
    tpm: int
    real: bool
    seconds: float
    requests: int
    refused: int
    failed: int
    twice: int
    cpu: float


@dataclass(slots=True)
class Stage:
    """What a peer meets: prompts to ask, and a server to ask them of.

    Parameters
    ----------
    knobs : Knobs
        The server's; `tpm` and `rpm` are what peers that want to know the limits may be told.
    prompts : list of Prompt
        What is to be asked, in this order.
    simulator : Simulator
        The server.
    url : str
        Where it listens, without ``/v1``; empty where no peer needs a socket.
    errors : Counter
        What made a peer give a prompt up.
    """

    knobs: Knobs
    prompts: list[Prompt]
    simulator: Simulator
    url: str = ""
    errors: Counter[str] = field(default_factory=Counter)
    began: float = 0.0
    ended: float = 0.0

    @property
    def base_url(self) -> str:
        """The base URL for clients."""
        return f"{self.url or 'http://127.0.0.1:1'}/v1"

    @property
    def mean_output(self) -> int:
        """The mean of the outputs, which nobody knows who has not asked yet."""
        return round(sum(p.output for p in self.prompts) / len(self.prompts))

    def transport(self) -> Any:
        """Return the `httpx2` transport that leads to the server without a socket; None if real."""
        if self.url:
            return None
        from tests.simulator_transport import SimulatorTransport

        return SimulatorTransport(self.simulator)

    async def client(self, **options: Any) -> Any:
        """Return an `AsyncOpenAI` that has been used once.

        The SDK's first request runs a thread, in which virtual time would jump.
        """
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        transport = self.transport()
        http = DefaultAsyncHttpxClient(transport=transport) if transport else None
        client = AsyncOpenAI(api_key=KEY, base_url=self.base_url, http_client=http, **options)
        self.open_doors()
        await client.responses.create(model=MODEL, input="hi", max_output_tokens=16)
        return client

    def open_doors(self) -> None:
        """Let there be no limits, for whatever a peer does before its first prompt."""
        self.simulator.change_knobs(tpm=None, rpm=None)

    def begin(self) -> None:
        """Fill the buckets and start the watch."""
        self.open_doors()
        self.simulator.change_knobs(tpm=self.knobs.tpm, rpm=self.knobs.rpm)
        self.simulator.log.clear()
        self.began = asyncio.get_running_loop().time()

    def end(self) -> None:
        """Stop the watch: all is answered that will be."""
        self.ended = asyncio.get_running_loop().time()

    async def each(self, ask: Callable[[Prompt], Awaitable[Any]], *, at_once: int = POOL) -> None:
        """Ask all prompts by `ask`, not more than some at once; what it raises is a failure."""
        gate = asyncio.Semaphore(at_once)

        async def attend(prompt: Prompt) -> None:
            async with gate:
                try:
                    await ask(prompt)
                except Exception as exc:
                    self.errors[type(exc).__name__] += 1
            self.end()

        self.begin()
        await asyncio.gather(*(attend(prompt) for prompt in self.prompts))

    def outcome(self, **what: Any) -> Outcome:
        """Return what the server saw."""
        log = self.simulator.log
        finished = Counter(seen.prompt.partition(" ")[0] for seen in log if seen.finished)
        return Outcome(
            count=len(self.prompts),
            tpm=self.knobs.tpm or 0,
            seconds=self.ended - self.began,
            requests=len(log),
            refused=sum(seen.status == 429 for seen in log),
            failed=max(len(self.prompts) - len(finished), self.errors.total()),
            twice=sum(n > 1 for n in finished.values()),
            **what,
        )


async def ask(client: Any, prompt: Prompt) -> Any:
    """Ask one prompt of the Responses API."""
    return await client.responses.create(
        model=MODEL, input=text_of(prompt), max_output_tokens=prompt.max_output
    )


async def ask_chat(client: Any, prompt: Prompt) -> Any:
    """Ask one prompt of Chat Completions, where a peer reads its answers."""
    return await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": text_of(prompt)}],
        max_tokens=prompt.max_output,
    )


async def play(peer: Peer, knobs: Knobs, prompts: list[Prompt], *, sockets: bool) -> Stage:
    """Let `peer` ask all prompts."""
    simulator = Simulator(knobs, clock=LoopClock())
    module = importlib.import_module(f"tests.benchmarks.peers.{peer.module}")
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(serve(simulator)) if sockets else ""
        stage = Stage(knobs, prompts, simulator, url)
        await getattr(module, peer.function)(stage, **peer.options)
        return stage


class TickingLoop(VirtualLoop):
    """A virtual loop whose timers need a millisecond at least, as those of `epoll` do.

    A peer that sleeps for less, again and again until something is true, would stop time.
    """

    def call_at(self, when: float, *args: Any, **options: Any) -> asyncio.TimerHandle:
        """Call something at an instant, which is not quite now."""
        return super().call_at(max(when, self.time() + TICK), *args, **options)


def rule_time(loop: VirtualLoop) -> None:
    """Let the whole process read the loop's clock."""
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
        rule_time(loop)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        began = time.process_time()
        prompts = written(options.prompts, options.seed)
        stage = runner.run(play(peer, knobs, prompts, sockets=options.real or peer.sockets))
        outcome = stage.outcome(
            peer=peer.name,
            policy=options.policy,
            seed=options.seed,
            real=options.real,
            cpu=time.process_time() - began,
        )
        print(json.dumps({**asdict(outcome), "errors": stage.errors}), flush=True)


if __name__ == "__main__":
    main()
