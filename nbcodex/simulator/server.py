"""Serves a simulator over HTTP/1.1 on a socket, for the demo, browsers and other processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from email.utils import formatdate
from ipaddress import ip_address
from urllib.parse import urlsplit

import h11

from nbcodex.runtime.event_loop import EventLoop
from nbcodex.simulator.http_messages import ErrorResponse, HttpRequest
from nbcodex.simulator.knobs import Dropped
from nbcodex.simulator.service import Simulator

READ_BYTES = 65_536
# Iterations of the event loop that asyncio needs at most to hand over an accepted connection.
ACCEPT_ITERATIONS = 5
MAX_BODY_BYTES = 64 * 1024 * 1024
# SO_LINGER with a timeout of 0: closing the socket sends a reset. The struct differs on Windows.
RESET_ON_CLOSE = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


@contextlib.asynccontextmanager
async def serve(simulator: Simulator, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Serve `simulator` on the running event loop; yields its base URL (without ``/v1``)."""
    loop = asyncio.get_running_loop()
    connections: set[asyncio.Task[None]] = set()

    def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = loop.create_task(_Connection(simulator, reader, writer).serve())
        connections.add(task)
        task.add_done_callback(connections.discard)
        # A task that is cancelled before its first step never reaches its own cleanup.
        task.add_done_callback(lambda _: writer.transport.abort())

    server = await asyncio.start_server(connect, host, port)
    try:
        address = server.sockets[0].getsockname()
        yield f"http://{address[0]}:{address[1]}"
    finally:
        with contextlib.suppress(NotImplementedError):  # the event loop of Windows
            for listening in server.sockets:
                loop.remove_reader(listening.fileno())
        # A connection that was just accepted reaches `connect` some iterations of the loop later.
        # It must do so before the server closes: CPython then fails and leaves its socket open.
        for _ in range(ACCEPT_ITERATIONS):
            await asyncio.sleep(0)
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await asyncio.sleep(0)  # aborted transports close their sockets in the next iteration


@dataclass(eq=False)
class _Connection:
    simulator: Simulator
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection = field(default_factory=lambda: h11.Connection(h11.SERVER))

    async def serve(self) -> None:
        try:
            try:
                while (request := await self._read_request()) is not None:
                    await self._answer_while_connected(request)
                    self.http.start_next_cycle()
            except h11.RemoteProtocolError:
                # Malformed HTTP gets a 400, if no response has started.
                if self.http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                    self._send(h11.Response(status_code=400, headers=[("content-length", "0")]))
                    self._send(h11.EndOfMessage())
                    await self.writer.drain()
            except Dropped as drop:
                if drop.reset:
                    connection: socket.socket = self.writer.get_extra_info("socket")
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                    self.writer.transport.abort()
                elif drop.partial:
                    # The header states twice the length: the connection ends within the chunk.
                    self.writer.write(b"%x\r\n%s" % (2 * len(drop.partial), drop.partial))
                    await self.writer.drain()
            except h11.LocalProtocolError:
                # The client asked to close the connection after this response.
                pass
            self.writer.close()
            await self.writer.wait_closed()
        except ConnectionError:
            pass
        finally:
            # Unsent data for a client that does not read would keep the connection open.
            self.writer.transport.abort()

    async def _read_request(self) -> HttpRequest | None:
        """Return the next request; None if the client has finished."""
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                self.http.receive_data(await self.reader.read(READ_BYTES))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MAX_BODY_BYTES:
                    raise h11.RemoteProtocolError("the body is too large")
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                return HttpRequest(
                    method=head.method.decode("ascii"),
                    path=head.target.decode("ascii", "replace"),
                    headers={n.decode("ascii"): v.decode("latin-1") for n, v in head.headers},
                    body=bytes(body),
                )
            else:
                return None

    async def _answer_while_connected(self, request: HttpRequest) -> None:
        """Answer, but stop with `ConnectionError` when the client disconnects."""

        async def read_until_disconnected() -> None:
            # What the client sends meanwhile is the start of its next request.
            while data := await self.reader.read(READ_BYTES):
                self.http.receive_data(data)

        answering = asyncio.ensure_future(self._answer(request))
        watching = asyncio.ensure_future(read_until_disconnected())
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            answering.cancel()
            watching.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)
        if answering.cancelled():
            raise ConnectionAbortedError
        answering.result()

    async def _answer(self, request: HttpRequest) -> None:
        host = request.headers.get("host", "")
        if self._is_rebound(host):
            failure = ErrorResponse(403, f"{host} is not a name of this machine. Use localhost.")
            response = failure.as_response(common_headers={})
        else:
            response = await self.simulator.answer(request)
        dated = {"date": formatdate(usegmt=True)} | response.headers
        headers = [(n.encode("ascii"), v.encode("latin-1", "replace")) for n, v in dated.items()]
        try:
            self._send(h11.Response(status_code=response.status, headers=headers))
            async for chunk in response.body:
                self._send(h11.Data(data=chunk))
                await self.writer.drain()
            self._send(h11.EndOfMessage())
            await self.writer.drain()
        finally:
            await response.aclose()

    def _is_rebound(self, host: str) -> bool:
        """Whether a Host header on loopback names another machine, as in DNS rebinding."""
        # A web page can let its own name resolve to this machine, to read what it answers.
        if not ip_address(self.writer.get_extra_info("sockname")[0]).is_loopback:
            return False
        try:
            name = urlsplit(f"//{host}").hostname or "localhost"
            return name != "localhost" and not ip_address(name)
        except ValueError:  # not an address
            return True

    def _send(self, event: h11.Event) -> None:
        self.writer.write(self.http.send(event) or b"")


class SimulatorServer:
    """Serves a simulator from its own daemon thread; port 0 selects a free one."""

    def __init__(self, simulator: Simulator, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.simulator = simulator  # any thread may use its log, and its script of faults
        self.url = ""
        self._serving = serve(simulator, host, port)
        self._loop: EventLoop | None = None

    def start(self) -> str:
        """Start serving and return the base URL (without ``/v1``), or raise an OSError."""
        loop = EventLoop()
        try:
            self.url = loop.submit(self._serving.__aenter__()).result()
        except OSError:
            loop.close()
            raise
        self._loop = loop
        return self.url

    def stop(self) -> None:
        """Close all connections and end the thread."""
        if (loop := self._loop) is not None:
            self._loop = None
            loop.submit(self._serving.__aexit__(None, None, None)).result()
            loop.close()
