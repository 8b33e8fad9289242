"""An `httpx2` transport without sockets, for tests and for benchmarks in virtual time.

Like a connection, it delivers the response in chunks, applies the read timeout, and raises the
errors of a broken connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import httpx2

from nbcodex.simulator.http_messages import HttpRequest, HttpResponse
from nbcodex.simulator.knobs import Dropped
from nbcodex.simulator.service import Simulator

CLOSED_BEFORE_RESPONSE = "Server disconnected without sending a response."
CLOSED_IN_BODY = (
    "peer closed connection without sending complete message body (incomplete chunked read)"
)


class SimulatorTransport(httpx2.AsyncBaseTransport):
    """Sends all requests to a simulator in this process, for any host."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Return the simulator's response; it fails with the errors of a real connection."""
        http_request = HttpRequest(
            method=request.method,
            path=request.url.raw_path.decode("ascii"),
            headers={name.lower(): value for name, value in request.headers.items()},
            body=await request.aread(),
        )
        read_timeout = (request.extensions.get("timeout") or {}).get("read")
        with _connection_errors(request, CLOSED_BEFORE_RESPONSE):
            async with asyncio.timeout(read_timeout):
                answer = await self.simulator.answer(http_request)
        return httpx2.Response(
            answer.status,
            headers=[(name.encode(), value.encode()) for name, value in answer.headers.items()],
            stream=_Stream(answer, request, read_timeout),
            extensions={"http_version": b"HTTP/1.1"},
        )


class _Stream(httpx2.AsyncByteStream):
    """The bytes of a response, each chunk within the read timeout."""

    def __init__(
        self, answer: HttpResponse, request: httpx2.Request, read_timeout: float | None
    ) -> None:
        self._answer = answer
        self._request = request
        self._read_timeout = read_timeout

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._answer.body)
        while True:
            with _connection_errors(self._request, CLOSED_IN_BODY):
                try:
                    async with asyncio.timeout(self._read_timeout):
                        chunk = await anext(chunks)
                except StopAsyncIteration:
                    return
                except Dropped as drop:
                    if not drop.partial:
                        raise
                    chunk, chunks = drop.partial, _drop_next(drop)
            yield chunk

    async def aclose(self) -> None:
        await self._answer.aclose()


async def _drop_next(drop: Dropped) -> AsyncIterator[bytes]:
    """Raise `Dropped` at the next chunk."""
    raise Dropped(reset=drop.reset)
    yield b""


@contextlib.contextmanager
def _connection_errors(request: httpx2.Request, closed: str) -> Iterator[None]:
    """Translate timeouts and dropped connections into errors of `httpx2`."""
    try:
        yield
    except TimeoutError as exc:
        raise httpx2.ReadTimeout("", request=request) from exc
    except Dropped as drop:
        if drop.reset:
            raise httpx2.ReadError("", request=request) from drop
        raise httpx2.RemoteProtocolError(closed, request=request) from drop
