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
    """Sends all requests to a simulator in this process, for any host.

    Parameters
    ----------
    simulator : Simulator
        The server.
    """

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Return the simulator's response to `request`.

        Raises
        ------
        httpx2.ReadTimeout, httpx2.ReadError, httpx2.RemoteProtocolError
            As a real connection would.
        """
        call = HttpRequest(
            method=request.method,
            path=request.url.raw_path.decode("ascii"),
            headers={name.lower(): value for name, value in request.headers.items()},
            body=await request.aread(),
        )
        patience = (request.extensions.get("timeout") or {}).get("read")
        with _as_connection(request, CLOSED_BEFORE_RESPONSE):
            async with asyncio.timeout(patience):
                answer = await self.simulator.answer(call)
        return httpx2.Response(
            answer.status,
            headers=[(name.encode(), value.encode()) for name, value in answer.headers.items()],
            stream=_Stream(answer, request, patience),
            extensions={"http_version": b"HTTP/1.1"},
        )


class _Stream(httpx2.AsyncByteStream):
    """The bytes of a response, each chunk within the read timeout."""

    def __init__(
        self, answer: HttpResponse, request: httpx2.Request, patience: float | None
    ) -> None:
        self._answer = answer
        self._request = request
        self._patience = patience

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._answer.body)
        while True:
            with _as_connection(self._request, CLOSED_IN_BODY):
                try:
                    async with asyncio.timeout(self._patience):
                        chunk = await anext(chunks)
                except StopAsyncIteration:
                    return
                except Dropped as drop:
                    if not drop.partial:
                        raise
                    chunk, chunks = drop.partial, _dropping(drop)
            yield chunk

    async def aclose(self) -> None:
        await self._answer.body.aclose()


async def _dropping(drop: Dropped) -> AsyncIterator[bytes]:
    """Raise `Dropped` at the next chunk."""
    raise Dropped(reset=drop.reset)
    yield b""


@contextlib.contextmanager
def _as_connection(request: httpx2.Request, closed: str) -> Iterator[None]:
    """Translate timeouts and dropped connections into errors of `httpx2`."""
    try:
        yield
    except TimeoutError as exc:
        raise httpx2.ReadTimeout("", request=request) from exc
    except Dropped as drop:
        if drop.reset:
            raise httpx2.ReadError("", request=request) from drop
        raise httpx2.RemoteProtocolError(closed, request=request) from drop
