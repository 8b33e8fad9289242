"""The HTTP server on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest

from nbcodex.simulator import Fault, Knobs, Simulator
from nbcodex.simulator.server import SimulatorServer, serve
from tests.simulator.helpers import KEY, MODEL

HEADERS = {"authorization": f"Bearer {KEY}"}
FAST = Knobs(latency=0.0, speed=100_000, chunk=10)
TIMEOUT_S = 60.0  # ends a test that has failed, even on a busy machine


@pytest.fixture
def served() -> Iterator[tuple[str, Simulator]]:
    """Give the URL of a server in a thread, and its simulator."""
    server = SimulatorServer(Simulator(FAST))
    yield server.start(), server.simulator
    server.stop()


async def ask(url: str, **options: Any) -> str:
    """Return the text of a streamed answer, read by the SDK."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        stream = await client.responses.create(
            model=MODEL, input="[[echo: one two three]]", stream=True, **options
        )
        return "".join([e.delta async for e in stream if e.type == "response.output_text.delta"])


async def eventually(holds: Callable[[], bool]) -> None:
    """Wait, in real time, until `holds` returns true."""
    async with asyncio.timeout(TIMEOUT_S):
        while not holds():  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.001)


def test_sdk_streams_an_answer_over_a_socket(served: tuple[str, Simulator]) -> None:
    assert asyncio.run(ask(served[0])) == "one two three"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("dropped", httpx2.ReadError),
        ("cut", httpx2.RemoteProtocolError),
        ("refused", httpx2.RemoteProtocolError),
    ],
)
@pytest.mark.parametrize("after", [-1, 0, 1])
def test_broken_connection_raises_the_same_error_as_the_transport(
    served: tuple[str, Simulator], kind: Any, after: int, cause: type[Exception]
) -> None:
    url, simulator = served
    simulator.script([Fault(kind, after=after)])
    with pytest.raises(openai.APIConnectionError) as caught:
        asyncio.run(ask(url))
    assert isinstance(caught.value.__cause__, cause)


def test_connection_is_reused_for_further_requests(served: tuple[str, Simulator]) -> None:
    url, _ = served
    body = {"model": MODEL, "input": "hello"}
    with httpx2.Client(headers=HEADERS, timeout=TIMEOUT_S) as client:
        for stream in (False, True, False):
            answer = client.post(f"{url}/v1/responses", json={**body, "stream": stream})
            assert answer.status_code == 200
            (connection,) = client._transport._pool.connections  # type: ignore[attr-defined]
        assert "Request Count: 3" in repr(connection)


def test_disconnected_client_ends_and_settles_a_stalled_stream() -> None:
    async def main() -> None:
        simulator = Simulator(Knobs(latency=0.0, policy="refunded"))
        simulator.script(["stalled"])
        body = {"model": MODEL, "input": "hello", "stream": True}
        async with (
            serve(simulator) as url,
            httpx2.AsyncClient(headers=HEADERS, timeout=TIMEOUT_S) as client,
        ):
            async with client.stream("POST", f"{url}/v1/responses", json=body) as answer:
                assert answer.status_code == 200
                assert simulator.log[0].charged == 1_001
            await eventually(lambda: simulator.log[0].charged == 1)

    asyncio.run(main())


def test_background_response_continues_after_a_disconnection() -> None:
    async def main() -> None:
        simulator = Simulator(Knobs(latency=0.0, speed=2_000))
        body = {"model": MODEL, "input": "[[tokens=200]]", "stream": True, "background": True}
        async with (
            serve(simulator) as url,
            httpx2.AsyncClient(headers=HEADERS, timeout=TIMEOUT_S) as client,
        ):
            async with client.stream("POST", f"{url}/v1/responses", json=body):
                pass
            await eventually(lambda: simulator.log[0].finished)

    asyncio.run(main())


def test_stopping_ends_active_streams() -> None:
    async def main() -> None:
        simulator = Simulator(Knobs(latency=0.0))
        simulator.script(["stalled"])
        async with httpx2.AsyncClient(headers=HEADERS, timeout=TIMEOUT_S) as client:
            body = {"model": MODEL, "input": "hello", "stream": True}
            async with serve(simulator) as url:
                request = client.build_request("POST", f"{url}/v1/responses", json=body)
                answer = await client.send(request, stream=True)
            with pytest.raises(httpx2.TransportError):
                await answer.aread()

    asyncio.run(main())


@pytest.mark.parametrize(
    "sent",
    [b"\r\n\r\n", b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" * 30_000],
)
def test_malformed_http_gets_a_400_or_a_closed_connection(
    served: tuple[str, Simulator], sent: bytes
) -> None:
    host, port = served[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        try:
            received = connection.recv(65_536)
        except ConnectionError:
            received = b""
    assert received == b"" or received.startswith(b"HTTP/1.1 400")
    assert asyncio.run(ask(served[0])) == "one two three"


def test_control_paths_set_faults_and_knobs_and_return_the_log(
    served: tuple[str, Simulator],
) -> None:
    url, simulator = served
    control = f"/_simulator/{simulator.control_secret}"
    with httpx2.Client(base_url=url, headers=HEADERS, timeout=TIMEOUT_S) as client:
        faults = ["quota", None, {"kind": "http", "status": 503, "after": 2}]
        assert client.post(f"{control}/script", json=faults).json() == {"scripted": 3}
        body = {"model": MODEL, "input": "hello"}
        statuses = [client.post("/v1/responses", json=body).status_code for _ in range(3)]
        assert statuses == [429, 200, 503]
        knobs = client.post(f"{control}/knobs", json={"tpm": 5, "models": [MODEL]}).json()
        assert (knobs["tpm"], knobs["models"]) == (5, [MODEL])
        log = client.get(f"{control}/log", params={"since": 1}).json()
        assert [(seen["prompt"], seen["status"]) for seen in log] == [
            ("hello", 200),
            ("hello", 503),
        ]


@pytest.mark.parametrize(
    ("what", "sent"),
    [
        ("script", "["),
        ("script", '["nonsense"]'),
        ("script", "7"),
        ("knobs", '{"no": 1}'),
        ("knobs", '{"policy": "no"}'),
        ("knobs", '{"tpm": 0}'),
    ],
)
def test_invalid_control_request_is_a_400_and_changes_nothing(
    served: tuple[str, Simulator], what: str, sent: str
) -> None:
    url, simulator = served
    path = f"/_simulator/{simulator.control_secret}/{what}"
    with httpx2.Client(base_url=url, timeout=TIMEOUT_S) as client:
        assert client.post(path, content=sent).status_code == 400
    assert simulator.knobs == FAST


@pytest.mark.parametrize("path", ["/_simulator/log", "/_simulator/guessed/log"])
def test_control_path_without_the_secret_is_a_404(served: tuple[str, Simulator], path: str) -> None:
    assert httpx2.get(f"{served[0]}{path}", timeout=TIMEOUT_S).status_code == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:80", 200),
        ("attacker.example", 403),
        ("localhost.attacker.example:80", 403),
        ("[", 403),
    ],
)
def test_host_header_must_name_this_machine(
    served: tuple[str, Simulator], host: str, status: int
) -> None:
    """A web page whose name was rebound to this machine gets no answer."""
    url, simulator = served
    body = {"model": MODEL, "input": "[[echo: yes]]"}
    headers = {**HEADERS, "host": host}
    response = httpx2.post(f"{url}/v1/responses", json=body, headers=headers, timeout=TIMEOUT_S)
    assert response.status_code == status
    assert len(simulator.log) == (status == 200)


def test_start_raises_if_the_address_is_in_use(served: tuple[str, Simulator]) -> None:
    port = int(served[0].rpartition(":")[2])
    with pytest.raises(OSError, match="in use"):
        SimulatorServer(Simulator(), port=port).start()


@pytest.mark.slow
def test_command_prints_its_url_and_has_an_option_for_each_knob() -> None:
    options = ["--tpm", "none", "--rpm", "7", "--models", "m", "--headers", "off"]
    command = [sys.executable, "-m", "nbcodex.simulator", *options]
    shown = subprocess.run([*command, "--help"], check=True, capture_output=True, text=True).stdout
    assert "probability of a 500 (0.0)" in " ".join(shown.split())
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url, _, control = [process.stdout.readline().split()[-1] for _ in range(3)]
        try:
            body = {"model": "m", "input": "[[echo: yes]]"}
            answer = httpx2.post(
                f"{url}/v1/responses", json=body, headers=HEADERS, timeout=TIMEOUT_S
            )
            knobs = httpx2.post(f"{control}knobs", json={}, timeout=TIMEOUT_S).json()
        finally:
            process.terminate()
    assert json.loads(answer.text)["output"][0]["content"][0]["text"] == "yes"
    assert (knobs["tpm"], knobs["rpm"], knobs["headers"]) == (None, 7, False)


@pytest.mark.slow
@pytest.mark.parametrize("iterations", range(8))
def test_stopping_closes_connections_that_were_just_accepted(iterations: int) -> None:
    async def connect_and_stop() -> list[socket.socket]:
        async with serve(Simulator(FAST)) as url:
            address = ("127.0.0.1", int(url.rpartition(":")[2]))
            clients = [socket.create_connection(address) for _ in range(3)]
            for _ in range(iterations):
                await asyncio.sleep(0)
        return clients

    for client in asyncio.run(connect_and_stop()):
        with client:
            client.settimeout(TIMEOUT_S)
            # A connection that the server left open would time out.
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
    gc.collect()  # an unclosed transport warns, and warnings are errors
