"""`%codex demo`: a simulator with low limits, in this process, in the place of the real API."""

from __future__ import annotations

from nbcodex.settings import DEFAULT_MODEL, Secret, Settings
from nbcodex.simulator import Fault, Knobs, Simulator
from nbcodex.simulator.server import SimulatorServer

WELCOME = (
    "From now on a simulator answers, with 3,000 tokens a minute, so that you see limits at work. "
    "Nothing leaves this machine; `%codex demo off` ends it."
)
_KNOBS = Knobs(tpm=3_000, rpm=60, latency=0.4, speed=60.0)

_OTHERS = (
    None,
    Fault("tokens_per_minute", seconds=6.0),
    None,
    Fault("tokens_per_minute", seconds=5.0),
    Fault("tokens_per_minute", seconds=4.0),
)
"""What the first requests meet: refusals, as if somebody else had used the same key meanwhile. What
it uses itself, nbcodex reckons with, and so would meet no limit."""

_server: SimulatorServer | None = None


def start() -> Settings:
    """Start the simulator, unless it runs; return the settings that lead to it and nowhere else."""
    global _server
    if _server is None:
        simulator = Simulator(_KNOBS)
        simulator.script(_OTHERS)
        _server = SimulatorServer(simulator)
    address = f"{_server.url or _server.start()}/v1"
    # What is simulated stays out of the user's own journal.
    return Settings(
        api_key=Secret("no-key-is-needed-here"),
        base_url=address,
        model=DEFAULT_MODEL,
        journal=False,
    )


def stop() -> None:
    """Stop the simulator."""
    global _server
    if _server is not None:
        _server.stop()
        _server = None
