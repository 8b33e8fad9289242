"""The door with a socket: HTTP/1.1 on the loopback, for the demo, browsers and other processes.

Owns connections: it frames answers, notices readers that leave, and breaks connections where a
fault says so. Must not know what is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from email.utils import formatdate

import h11

from nbcodex.simulator.faults import Dropped
from nbcodex.simulator.replies import Answer
from nbcodex.simulator.routes import Call
from nbcodex.simulator.service import Simulator

BLOCK = 65_536
LARGEST_BODY = 64 * 1024 * 1024
NO_LINGER = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
"""`SO_LINGER` on, with no time to linger: closing sends a reset."""


@contextlib.asynccontextmanager
async def serve(simulator: Simulator, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Serve `simulator` on the running loop, and give its base URL (without ``/v1``)."""
    connections: set[asyncio.Task[None]] = set()

    def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(simulator, reader, writer)
        task = asyncio.get_running_loop().create_task(connection.run())
        connections.add(task)
        task.add_done_callback(connections.discard)

    server = await asyncio.start_server(connect, host, port)
    try:
        address = server.sockets[0].getsockname()
        yield f"http://{address[0]}:{address[1]}"
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


class _Connection:
    """One connection: requests one after the other, until an end comes."""

    def __init__(
        self, simulator: Simulator, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._simulator = simulator
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER)

    async def run(self) -> None:
        """Answer until the connection ends, from either side."""
        try:
            await self._converse()
            self._writer.close()
            await self._writer.wait_closed()
        except ConnectionError:
            pass
        finally:
            # Also when the server closes, and a reader that does not read keeps data waiting.
            self._writer.transport.abort()

    async def _converse(self) -> None:
        """Answer one request after the other."""
        try:
            while (call := await self._call()) is not None:
                await self._attend(call)
                self._http.start_next_cycle()
        except h11.RemoteProtocolError:
            await self._complain()
        except Dropped as drop:
            await self._drop(drop)
        except h11.LocalProtocolError:
            # The reader wants no second answer on this connection.
            pass

    async def _call(self) -> Call | None:
        """Return the next request; None if there will be none."""
        request: h11.Request | None = None
        body = bytearray()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                await self._receive()
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > LARGEST_BODY:
                    raise h11.RemoteProtocolError("the body is too large")
            elif isinstance(event, h11.EndOfMessage) and request is not None:
                return _as_call(request, bytes(body))
            else:
                return None

    async def _receive(self) -> None:
        if self._http.they_are_waiting_for_100_continue:
            self._send(h11.InformationalResponse(status_code=100, headers=[]))
        self._http.receive_data(await self._reader.read(BLOCK))

    async def _attend(self, call: Call) -> None:
        """Answer, but stop when the reader leaves.

        Raises
        ------
        ConnectionError
            If it has left.
        """
        answering = asyncio.ensure_future(self._answer(call))
        watching = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            answering.cancel()
            watching.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)
        if answering.cancelled():
            raise ConnectionAbortedError
        answering.result()

    async def _watch(self) -> None:
        """Return when the reader has left; keep what it sends meanwhile for the next request."""
        while data := await self._reader.read(BLOCK):
            self._http.receive_data(data)

    async def _answer(self, call: Call) -> None:
        answer = await self._simulator.answer(call)
        try:
            self._send(_head(answer))
            async for chunk in answer.body:
                self._send(h11.Data(data=chunk))
                await self._writer.drain()
            self._send(h11.EndOfMessage())
            await self._writer.drain()
        finally:
            await answer.body.aclose()

    def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            self._writer.write(data)

    async def _complain(self) -> None:
        """Say that this was no HTTP, if that can still be said."""
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._send(h11.Response(status_code=400, headers=[("content-length", "0")]))
            self._send(h11.EndOfMessage())
            await self._writer.drain()

    async def _drop(self, drop: Dropped) -> None:
        """End the connection as `drop` says."""
        if drop.reset:
            wire: socket.socket = self._writer.get_extra_info("socket")
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            self._writer.transport.abort()
        elif drop.partial:
            # The chunk promises twice what comes, so that the end falls within it.
            self._writer.write(b"%x\r\n%s" % (2 * len(drop.partial), drop.partial))
            await self._writer.drain()


def _as_call(request: h11.Request, body: bytes) -> Call:
    return Call(
        method=request.method.decode("ascii"),
        path=request.target.decode("ascii", "replace"),
        headers={name.decode("ascii"): value.decode("latin-1") for name, value in request.headers},
        body=body,
    )


def _head(answer: Answer) -> h11.Response:
    headers = [
        (name.encode("ascii"), value.encode("latin-1", "replace"))
        for name, value in answer.headers.items()
    ]
    headers.append((b"date", formatdate(usegmt=True).encode()))
    return h11.Response(status_code=answer.status, headers=headers)


class SimulatorServer:
    """A simulator served from a daemon thread of its own.

    `Simulator.script` and `Simulator.log` may be used from other threads.

    Parameters
    ----------
    simulator : Simulator or None
        The server; None means one with the usual knobs.
    host, port
        Where it listens; port 0 means any that is free.
    """

    def __init__(
        self, simulator: Simulator | None = None, *, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self.simulator = simulator or Simulator()
        self.url = ""
        self._address = (host, port)
        self._thread: threading.Thread | None = None
        self._ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    def start(self) -> str:
        """Begin to serve, and return the base URL (without ``/v1``).

        Raises
        ------
        OSError
            If the address cannot be had.
        """
        self._thread = threading.Thread(target=self._run, name="nbcodex-simulator", daemon=True)
        self._thread.start()
        self._ready.result()
        return self.url

    def stop(self) -> None:
        """End all connections and the thread."""
        if self._thread is not None and self._thread.is_alive():
            loop, end = self._ready.result()
            loop.call_soon_threadsafe(end.set)
            self._thread.join()

    def __enter__(self) -> str:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except OSError as exc:
            self._ready.set_exception(exc)

    async def _serve(self) -> None:
        end = asyncio.Event()
        host, port = self._address
        async with serve(self.simulator, host, port) as self.url:
            self._ready.set_result((asyncio.get_running_loop(), end))
            await end.wait()
