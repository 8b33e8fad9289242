"""Failures of real connections: which error each becomes, and whether the request was sent."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nbcodex.errors import NbcodexError, TransportError
from nbcodex.models import Request
from nbcodex.openai_api import connections
from nbcodex.openai_api.answers import CompletedAnswer, StreamEvent, TextDelta
from nbcodex.openai_api.api_client import ApiClient
from tests.openai_api.scripted import KEY, MODEL, completed, delta, settings
from tests.virtual import LoopClock

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
Behaviour = Callable[[Reader, Writer], Awaitable[None]]

TEST_TIMEOUT_S = 60  # of a test that would otherwise wait for ever


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the proxies of the environment."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@asynccontextmanager
async def server(behave: Behaviour) -> AsyncIterator[str]:
    """Run a server that handles each connection with `behave`; yield its base URL."""
    served: set[asyncio.Task[None]] = set()

    async def serve(reader: Reader, writer: Writer) -> None:
        served.add(asyncio.current_task())  # type: ignore[arg-type]
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await behave(reader, writer)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    running = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}/v1"
    finally:
        running.close()
        if served:
            await asyncio.wait(served)


async def read(reader: Reader) -> bytes:
    """Read one request; return its head."""
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    await reader.readexactly(size)
    return head


@asynccontextmanager
async def connected_client() -> AsyncIterator[ApiClient]:
    api_client = ApiClient(clock=LoopClock())
    try:
        yield api_client
    finally:
        await api_client.close()


async def send(api_client: ApiClient, url: str, events: list[StreamEvent]) -> None:
    request = Request(prompt="Why?")
    stream = api_client.stream(request, settings(base_url=url), model=MODEL)
    events.extend([event async for event in stream])


def fails(behave: Behaviour) -> tuple[NbcodexError, list[StreamEvent]]:
    """Send a request that must fail; return the error, and the events before it."""
    events: list[StreamEvent] = []

    async def run() -> None:
        async with server(behave) as url, connected_client() as api_client:
            await send(api_client, url, events)

    with pytest.raises(NbcodexError) as caught:
        asyncio.run(run())
    return caught.value, events


def after(*parts: bytes, reset: bool = False) -> Behaviour:
    """Return the behaviour of a server that reads a request, sends `parts` and disconnects."""

    async def behave(reader: Reader, writer: Writer) -> None:
        await read(reader)
        for part in parts:
            writer.write(part)
            await writer.drain()
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    return behave


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nConte", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_closed_connection_counts_as_possibly_sent(sent: bytes, reset: bool) -> None:
    error, _ = fails(after(sent, reset=reset))
    assert isinstance(error, TransportError)
    assert not error.is_unbilled
    assert "in time" not in error.message


def test_refused_connection_counts_as_not_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def run() -> None:
        async with connected_client() as api_client:
            await send(api_client, f"http://127.0.0.1:{port}/v1", [])

    with pytest.raises(TransportError, match="connection to the server failed") as caught:
        asyncio.run(run())
    assert caught.value.is_unbilled
    assert "Is the server running?" in caught.value.message


def test_connect_timeout_counts_as_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECT_TIMEOUT_S", 0.05)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):  # the one that the kernel takes in

            async def run() -> None:
                async with connected_client() as api_client:
                    await send(api_client, f"http://127.0.0.1:{full.getsockname()[1]}/v1", [])

            with pytest.raises(TransportError, match="in time") as caught:
                asyncio.run(run())
    assert caught.value.is_unbilled


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    ("framing", "framed"),
    [
        (b"Transfer-Encoding: chunked\r\n\r\n", lambda part: b"%x\r\n%s\r\n" % (len(part), part)),
        (b"Content-Length: 100000\r\n\r\n", lambda part: part),
    ],
)
def test_text_before_a_break_is_yielded(
    framing: bytes, framed: Callable[[bytes], bytes], reset: bool
) -> None:
    released = asyncio.Event()

    async def behave(reader: Reader, writer: Writer) -> None:
        await after(HEAD, framing, framed(delta("Because")), reset=reset)(reader, writer)
        await released.wait()

    events: list[StreamEvent] = []

    async def run() -> None:
        async with server(behave) as url, connected_client() as api_client:
            request = Request(prompt="Why?")
            async for event in api_client.stream(request, settings(base_url=url), model=MODEL):
                events.append(event)
                if isinstance(event, TextDelta):
                    released.set()

    with pytest.raises(TransportError):
        asyncio.run(run())
    assert [p.text for p in events if isinstance(p, TextDelta)] == ["Because"]


def test_complete_answer_counts_however_the_connection_ends() -> None:
    async def behave(reader: Reader, writer: Writer) -> None:
        await read(reader)
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for part in (delta("a"), delta("b"), completed()):
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await writer.drain()
            for _ in range(20):
                await asyncio.sleep(0)

    events: list[StreamEvent] = []

    async def run() -> None:
        async with server(behave) as url, connected_client() as api_client:
            await send(api_client, url, events)

    asyncio.run(run())
    assert isinstance(events[-1], CompletedAnswer)
    assert events[-1].text == "ab"


def test_text_is_yielded_as_soon_as_it_arrives() -> None:
    text_arrived = asyncio.Event()

    async def behave(reader: Reader, writer: Writer) -> None:
        await read(reader)
        for part in (HEAD, b"Connection: close\r\n\r\n", delta("a")):
            writer.write(part)
        await text_arrived.wait()
        writer.write(completed())

    async def run() -> None:
        async with server(behave) as url, connected_client() as api_client:
            request = Request(prompt="Why?")
            async for event in api_client.stream(request, settings(base_url=url), model=MODEL):
                if isinstance(event, TextDelta):
                    text_arrived.set()
            assert isinstance(event, CompletedAnswer)

    asyncio.run(asyncio.wait_for(run(), TEST_TIMEOUT_S))


def test_cancelled_request_closes_the_connection() -> None:
    read_on, closed = asyncio.Event(), asyncio.Event()

    async def behave(reader: Reader, writer: Writer) -> None:
        await read(reader)
        writer.write(HEAD + b"Content-Length: 100000\r\n\r\n" + delta("a"))
        read_on.set()
        await reader.read()
        closed.set()

    async def run() -> None:
        async with server(behave) as url, connected_client() as api_client:
            task = asyncio.ensure_future(send(api_client, url, []))
            await read_on.wait()
            task.cancel()
            await closed.wait()

    asyncio.run(asyncio.wait_for(run(), TEST_TIMEOUT_S))


@pytest.mark.parametrize("hangs_up", [False, True])
def test_connection_is_reused_unless_the_server_closed_it(hangs_up: bool) -> None:
    peers: list[Any] = []

    async def behave(reader: Reader, writer: Writer) -> None:
        body = completed()
        while True:
            await read(reader)
            peers.append(writer.get_extra_info("peername"))
            writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            if hangs_up:
                return

    async def run() -> None:
        async with server(behave) as url, connected_client() as api_client:
            for _ in range(2):
                await send(api_client, url, [])
                for _ in range(10):
                    await asyncio.sleep(0)

    asyncio.run(run())
    assert len(set(peers)) == 1 + hangs_up


def test_request_has_the_key_once_and_only_the_sdks_headers() -> None:
    heads: list[bytes] = []

    async def behave(reader: Reader, writer: Writer) -> None:
        heads.append(await read(reader))
        writer.write(HEAD + b"Set-Cookie: a=b\r\nConnection: close\r\n\r\n" + completed())

    async def run() -> None:
        async with server(behave) as url, connected_client() as api_client:
            await send(api_client, url, [])

    asyncio.run(run())
    (head,) = heads
    assert head.count(KEY.encode()) == 1
    assert b"\r\nHost: 127.0.0.1:" in head.title()


@pytest.mark.slow
def test_process_with_open_connections_ends_without_warnings(tmp_path: Path) -> None:
    """A forked child neither warns nor breaks its parent's connections."""
    body = delta("hi") + completed()
    answer = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    code = f"""
import gc, os, socketserver, threading
import nbcodex

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        while head := b"".join(iter(self.rfile.readline, b"\\r\\n")).lower():
            self.rfile.read(int(head.split(b"content-length:")[1].split(b"\\r\\n")[0]))
            self.wfile.write({answer!r})

server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["OPENAI_BASE_URL"] = "http://127.0.0.1:%d/v1" % server.server_address[1]
for _ in range(2):
    assert nbcodex.ask("Why?", model="m").status == "done"
    if os.fork() == 0:
        gc.collect()
        assert nbcodex.ask("Why?", model="m").status == "done"
        raise SystemExit
    assert os.wait()[1] == 0
assert nbcodex.ask("Why?", model="m").status == "done"
"""
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", code],
        env={**os.environ, "OPENAI_API_KEY": KEY, "NBCODEX_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=3 * TEST_TIMEOUT_S,  # it starts five processes
    )
    assert (done.returncode, done.stderr) == (0, "")
