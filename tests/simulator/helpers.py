"""Simulators, clients and requests for the tests of this folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai

from nbcodex.simulator import HttpRequest, Knobs, Simulator
from tests.simulator_transport import SimulatorTransport
from tests.virtual import LoopClock

MODEL = "gpt-5.6-sol"
KEY = "sk-test-0123456789"


def simulator(**knobs: Any) -> Simulator:
    """Return a simulator on the clock of the running loop."""
    return Simulator(Knobs(**knobs), clock=LoopClock())


@contextlib.asynccontextmanager
async def sdk(server: Simulator, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """Yield the official client on the transport, without its own retries."""
    http = httpx2.AsyncClient(transport=SimulatorTransport(server))
    arguments = {
        "api_key": KEY,
        "base_url": "https://simulated.test/v1",
        "max_retries": 0,
        **options,
    }
    async with openai.AsyncOpenAI(http_client=http, **arguments) as client:
        yield client


def post(path: str = "/v1/responses", body: Any = None, **headers: str) -> HttpRequest:
    """Return a POST with the test key."""
    if body is None:
        body = {"model": MODEL, "input": "hello"}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    extra = {name.replace("_", "-"): value for name, value in headers.items()}
    return HttpRequest(
        method="POST", path=path, headers={"authorization": f"Bearer {KEY}", **extra}, body=data
    )


async def fetch(server: Simulator, request: HttpRequest) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and the whole body."""
    answer = await server.answer(request)
    try:
        body = b"".join([chunk async for chunk in answer.body])
    finally:
        await answer.aclose()
    return answer.status, answer.headers, body


async def refusal(
    server: Simulator, request: HttpRequest
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Return status, headers and the error of a request that fails."""
    status, headers, body = await fetch(server, request)
    return status, headers, json.loads(body)["error"]
