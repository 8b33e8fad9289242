"""A client of its own for each test, on a simulator without sockets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from nbcodex import client
from nbcodex.client import Client
from nbcodex.host import Host
from nbcodex.runtime import event_loop
from nbcodex.runtime.clock import BootClock
from nbcodex.simulator import Knobs, Simulator
from tests.simulated import KEY
from tests.simulator_transport import SimulatorTransport


@dataclass
class SimulatedClient:
    """A client and the simulator that it asks."""

    simulator: Simulator
    client: Client

    @property
    def prompts(self) -> list[str]:
        """Prompts that were sent, refused requests included."""
        return [seen.prompt for seen in self.simulator.log if seen.api]

    def restart_process(self) -> None:
        """Continue as another process would: with the same files, and nothing in memory."""
        from nbcodex.mapping import map_api

        self.client.close()
        map_api.kept_runs.clear()
        self.client = client._current = Client(transport=SimulatorTransport(self.simulator))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedClient]:
    """A client whose server has limits far out of reach."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NBCODEX_MODEL", "gpt-5.6-sol")
    core = Simulator(
        Knobs(tpm=10**8, rpm=10**6, latency=0.005, speed=20_000.0, chunk=50), clock=BootClock()
    )
    made = SimulatedClient(core, Client(transport=SimulatorTransport(core)))
    monkeypatch.setattr(client, "_current", made.client)
    monkeypatch.setattr("nbcodex.host.current", Host(confirm=lambda _: True, is_script=False))
    # The random ids of other tests' maps may begin like the short ones that tests choose.
    monkeypatch.setattr("nbcodex.mapping.map_api.kept_runs", {})
    # On a busy machine, a second is too little for the rows that tests expect in the journal.
    monkeypatch.setattr("nbcodex.mapping.map_run.END_ACTIVE_S", 60.0)
    monkeypatch.setattr("nbcodex.mapping.map_run.PARK_REMAINING_S", 60.0)
    monkeypatch.setattr("nbcodex.mapping.map_api.INACTIVE_TIMEOUT_S", 60.0)
    yield made
    made.client.close()
    event_loop.shared().submit(made.client.services().api_client.close()).result()


def echo(text: str) -> str:
    """Return a prompt that is answered with `text`."""
    return f"[[echo: {text}]]"


def texts(replies: Any) -> list[str]:
    """Return the replies' texts."""
    return [reply.text for reply in replies]
