"""A simulator on a real socket, in this process or in another, for kernels to connect to."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nbcodex.simulator import HttpRequest, HttpResponse, Knobs, Simulator
from nbcodex.simulator.server import SimulatorServer

KEY = "sk-test-0123456789abcdef"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running simulator, by its URL."""

    url: str

    @property
    def environ(self) -> dict[str, str]:
        """The environment with which a kernel uses this server."""
        return {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": KEY,
            "NBCODEX_MODEL": "gpt-5.6-sol",
        }

    @property
    def setup(self) -> str:
        """A cell that sets this environment and loads the extension."""
        return f"import os\nos.environ.update({self.environ!r})\n%load_ext nbcodex"


@dataclass(frozen=True, kw_only=True)
class Simulated(Served):
    """A running simulator of this process."""

    core: Simulator

    @property
    def prompts(self) -> list[str]:
        """The prompts of all requests, refused ones included."""
        return [record.prompt for record in self.core.log if record.api]

    @contextmanager
    def held(self, text: str) -> Iterator[None]:
        """Answer no request with `text` in it before the context ends."""
        answer, released = self.core.answer, threading.Event()

        async def answer_when_released(request: HttpRequest) -> HttpResponse:
            while text.encode() in request.body and not released.is_set():  # noqa: ASYNC110 - a thread sets it
                await asyncio.sleep(0.01)
            return await answer(request)

        self.core.answer = answer_when_released  # type: ignore[method-assign]
        try:
            yield
        finally:
            released.set()
            self.core.answer = answer  # type: ignore[method-assign]


@contextmanager
def simulated(**knobs: Any) -> Iterator[Simulated]:
    """Start a simulator; stop it afterwards."""
    core = Simulator(Knobs(**knobs))
    server = SimulatorServer(core)
    try:
        yield Simulated(core=core, url=server.start())
    finally:
        server.stop()


@contextmanager
def simulator_process(**knobs: Any) -> Iterator[Served]:
    """Start a simulator in another process, where no test slows it down."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in knobs.items()]
    command = [sys.executable, "-m", "nbcodex.simulator", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            yield Served(url=server.stdout.readline().strip())
        finally:
            server.terminate()
