"""A simulator behind a real socket, in this process, for kernels in others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nbcodex.simulator import Knobs, Simulator
from nbcodex.simulator.server import SimulatorServer

KEY = "sk-test-0123456789abcdef"


@dataclass(frozen=True)
class Simulated:
    """A running simulator and the address it answers at."""

    core: Simulator
    url: str

    @property
    def environ(self) -> dict[str, str]:
        """The environment that leads a kernel here."""
        return {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": KEY,
            "NBCODEX_MODEL": "gpt-5.6-sol",
        }

    @property
    def setup(self) -> str:
        """The cell that leads a notebook here, and loads the extension."""
        return f"import os\nos.environ.update({self.environ!r})\n%load_ext nbcodex"

    @property
    def prompts(self) -> list[str]:
        """What was asked, refused requests included."""
        return [seen.prompt for seen in self.core.log if seen.api]


@contextmanager
def simulated(**knobs: Any) -> Iterator[Simulated]:
    """Start a simulator; stop it afterwards."""
    core = Simulator(Knobs(**knobs))
    server = SimulatorServer(core)
    try:
        yield Simulated(core, server.start())
    finally:
        server.stop()
