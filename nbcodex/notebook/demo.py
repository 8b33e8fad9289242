"""`%codex demo`: a simulator in this process, in the place of the real API."""

from __future__ import annotations

from nbcodex.settings import DEFAULT_MODEL, Secret, Settings
from nbcodex.simulator import Fault, Knobs, Simulator
from nbcodex.simulator.server import SimulatorServer

_LOW = Knobs(tpm=3_000, rpm=60, latency=0.4, speed=60.0)
_CALM = Knobs(tpm=1_000_000, rpm=5_000, latency=0.2, speed=200.0)

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


def welcome(*, calm: bool) -> str:
    """Return what to say when it has started."""
    reason = "no limit is met" if calm else "you see limits at work"
    return (
        f"From now on a simulator answers, with {(_CALM if calm else _LOW).tpm:,} tokens a minute, "
        f"so that {reason}. Nothing leaves this machine; `%codex demo off` ends it."
    )


def start(*, calm: bool = False) -> Settings:
    """Start the simulator, unless it runs; return the settings that lead to it and nowhere else.

    `calm` gives it limits that nobody meets; one that runs with others is replaced.
    """
    global _server
    knobs = _CALM if calm else _LOW
    if _server is not None and _server.simulator.knobs != knobs:
        stop()
    if _server is None:
        simulator = Simulator(knobs)
        simulator.script(() if calm else _OTHERS)
        _server = SimulatorServer(simulator)
    address = f"{_server.url or _server.start()}/v1"
    # What is simulated stays out of the user's own journal and ledger. The address is not this
    # simulator's for good: the next one may have its port, and other limits.
    return Settings(
        api_key=Secret("no-key-is-needed-here"),
        base_url=address,
        model=DEFAULT_MODEL,
        journal=False,
        private_limits=True,
    )


def stop() -> None:
    """Stop the simulator."""
    global _server
    if _server is not None:
        _server.stop()
        _server = None
