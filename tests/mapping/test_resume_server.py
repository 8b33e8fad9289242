"""A map is resumed at the server that its rows were written for, and refused once elsewhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest

import nbcodex
from nbcodex import host
from nbcodex.errors import EntryError, Stopped
from nbcodex.mapping import map_runner
from nbcodex.mapping.map_api import resume_map
from tests.mapping import test_batch_backend, test_map
from tests.simulated import KEY
from tests.simulator_transport import SimulatorTransport

from .conftest import SimulatedClient, texts

pytestmark = pytest.mark.slow

ROWS = [f"row {n}" for n in range(100)]


def stopped_map(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, engine: Any = "live"
) -> str:
    """Return the id of a map that was stopped at OpenAI, with rows that are not answered."""
    if engine == "live":
        test_map.press_stop(monkeypatch, after=10)
    else:
        simulated.simulator.change_knobs(batch_queue=1, batch_seconds=0.3)
        monkeypatch.setattr("nbcodex.mapping.batch_api.FIRST_POLL_S", 0.03)
        test_batch_backend.press_stop(monkeypatch, stage="the provider's queue is full")
    with pytest.raises(Stopped):
        nbcodex.map("[[echo: {}]]", ROWS, engine=engine)
    simulated.simulator.change_knobs(batch_queue=None)
    return str(nbcodex.map.last.id)  # type: ignore[attr-defined]


def map_of_another_server(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, engine: str, *, restarted: bool
) -> str:
    """Return the id of a map that was stopped at OpenAI, while a gateway is configured now."""
    map_id = stopped_map(simulated, monkeypatch, engine)
    if restarted:
        simulated.restart_process()
    monkeypatch.setenv("OPENAI_BASE_URL", "https://gateway.example/v1")
    return map_id


def use_async_factory(simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `Codex.client` be an async function that makes a client of a gateway."""

    async def factory() -> openai.AsyncOpenAI:
        http = httpx2.AsyncClient(transport=SimulatorTransport(simulated.simulator))
        return openai.AsyncOpenAI(
            api_key=KEY, base_url="https://gateway.example/v1", http_client=http
        )

    settings = replace(host.current.settings(), client=factory)
    monkeypatch.setattr(host.Host, "settings", lambda _: settings)


def hosts(simulated: SimulatedClient) -> Counter[str]:
    """Return how many requests of any kind each host has received."""
    return Counter(seen.host for seen in simulated.simulator.log if seen.method != "BATCH")


def entries(simulated: SimulatedClient, map_id: str) -> list[Any]:
    return simulated.client.journal(host.current.settings()).maps.entries(map_id)


@pytest.mark.parametrize("engine", ["live", "batch"])
@pytest.mark.parametrize("in_other_process", [False, True])
def test_map_is_refused_once_at_another_server(
    simulated: SimulatedClient,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    in_other_process: bool,
) -> None:
    """Back at its server it is resumed, and each row is answered once."""
    map_id = map_of_another_server(simulated, monkeypatch, engine, restarted=in_other_process)
    with pytest.raises(EntryError) as caught:
        resume_map(map_id)
    assert f"{map_id} was written for api.openai.com" in caught.value.message
    assert f"`%codex resume {map_id} --new-server`" in caught.value.advice
    assert not any(entry.status == "failed" for entry in entries(simulated, map_id))
    monkeypatch.delenv("OPENAI_BASE_URL")
    run = resume_map(map_id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == ROWS
    assert set(hosts(simulated)) == {"api.openai.com"}


@pytest.mark.parametrize("engine", ["live", "batch"])
@pytest.mark.parametrize("in_other_process", [False, True])
def test_map_moves_to_another_server_if_the_user_says_so(
    simulated: SimulatedClient,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    in_other_process: bool,
) -> None:
    """Its rows name that server from then on."""
    map_id = map_of_another_server(simulated, monkeypatch, engine, restarted=in_other_process)
    run = resume_map(map_id, any_server=True)
    assert run is not None
    assert texts(map_runner.run_map(run)) == ROWS
    servers = Counter(entry.request.origin.server for entry in entries(simulated, map_id))
    assert servers.total() == len(ROWS)
    assert set(servers) <= {"api.openai.com", "gateway.example"}
    assert servers["gateway.example"] > 0
    assert hosts(simulated)["gateway.example"] > 0


@pytest.mark.parametrize("engine", ["live", "batch"])
def test_map_is_refused_at_the_server_of_an_async_factory(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    map_id = stopped_map(simulated, monkeypatch, engine)
    simulated.restart_process()
    use_async_factory(simulated, monkeypatch)
    with pytest.raises(EntryError, match=r"requests go to gateway\.example now"):
        resume_map(map_id)
    assert set(hosts(simulated)) == {"api.openai.com"}
    run = resume_map(map_id, any_server=True)
    assert run is not None
    assert texts(map_runner.run_map(run)) == ROWS
    assert hosts(simulated)["gateway.example"] > 0


@pytest.mark.parametrize("base_url", ["http://127.0.0.1:1/v1", "https://gateway.example/v1"])
def test_map_without_a_server_is_resumed_anywhere(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, base_url: str
) -> None:
    """Release 0.1.0 did not store it."""
    with monkeypatch.context() as patch:
        patch.setattr("nbcodex.openai_api.endpoints.Endpoint.server", None)
        map_id = stopped_map(simulated, patch)
        simulated.restart_process()
    monkeypatch.setenv("OPENAI_BASE_URL", base_url)
    assert resume_map(map_id) is not None
