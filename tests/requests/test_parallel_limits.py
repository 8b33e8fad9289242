"""Servers that answer only some requests at once: the others wait, and none is parked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from nbcodex.events import Event, Finished
from nbcodex.models import Request
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.ratelimit.limiter import Limiter
from nbcodex.ratelimit.sharing import LimitState
from nbcodex.requests.runner import RequestRunner, Services
from nbcodex.settings import Secret, Settings
from tests.scripted import InstantJournal, ending
from tests.virtual import LoopClock, run_virtual

pytestmark = pytest.mark.slow

SETTINGS = Settings(
    api_key=Secret("sk-test-0123456789abcdef"),
    base_url="https://gateway.test/v1",
    model="m-1",
    api="chat",
)
# LiteLLM states the wait of its other limits in the header.
LITELLM = (
    "Rate limit exceeded for api_key: abc. Limit type: max_parallel_requests. Current limit: {}, "
    "Remaining: 0. Limit resets at: 2099-01-01 00:00:00 UTC"
)
UNSTATED = "Too many concurrent requests."
WORDS, WORD_INTERVAL_S = 20, 0.1


def chunk(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    data = {"id": "c1", "object": "chat.completion.chunk", "model": "m-1", "choices": [choice]}
    return f"data: {json.dumps(data)}\n\n".encode()


class Server(httpx2.AsyncBaseTransport):
    """A server with a number of slots, which refuses further requests with a message.

    Without a message, a further request ends the stream that has lasted longest.
    """

    def __init__(self, slots: int, refusal: str | None) -> None:
        self.slots, self.refusal = slots, refusal
        self.streams: list[object] = []  # in progress, oldest first
        self.requests = self.refused = self.broken = 0

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        self.requests += 1
        if len(self.streams) >= self.slots:
            if self.refusal is not None:
                self.refused += 1
                body = {"error": {"message": self.refusal, "type": "None", "code": "429"}}
                return httpx2.Response(429, headers={"retry-after": "60"}, json=body)
            self.broken += 1
            del self.streams[0]
        stream = object()
        self.streams.append(stream)
        headers = {"content-type": "text/event-stream"}
        return httpx2.Response(200, headers=headers, stream=_Answer(self, stream))


class _Answer(httpx2.AsyncByteStream):
    def __init__(self, server: Server, stream: object) -> None:
        self.server, self.stream = server, stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for number in range(WORDS):
            await asyncio.sleep(WORD_INTERVAL_S)
            if self.stream not in self.server.streams:
                break
            yield chunk({"content": f"word{number} "})
        else:
            yield chunk({}, "stop")
            self.server.streams.remove(self.stream)
        yield b"data: [DONE]\n\n"

    async def aclose(self) -> None:
        if self.stream in self.server.streams:
            self.server.streams.remove(self.stream)


def ask(server: Server, *bursts: int, pause: float = 0.0) -> tuple[list[Any], LimitState]:
    """Send bursts of requests; return their endings, and what is known of the limits then."""

    async def main() -> tuple[list[Any], LimitState]:
        clock, limiter, journal = LoopClock(), Limiter(), InstantJournal()
        services = Services(
            api_client=ApiClient(clock=clock, transport=server),
            journal=lambda _: journal,  # type: ignore[arg-type,return-value]
            spending_journal=lambda _: journal,  # type: ignore[arg-type,return-value]
            limiter=lambda _: limiter,
            clock=clock,
        )
        received: list[list[Event]] = []
        for number, count in enumerate(bursts):
            await asyncio.sleep(pause * (number > 0))
            runners = []
            for _ in range(count):
                received.append([])
                request = Request(prompt=f"row {len(received)}", max_output=50, patience=30.0)
                runner = RequestRunner(services, request, SETTINGS, received[-1].append)
                runners.append(runner.start())
            await asyncio.wait([runner.task for runner in runners])
        (state,) = (await limiter.limit_states(clock.now())).values()
        return [ending(each) for each in received], state

    return run_virtual(main())


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("refusal", [LITELLM, UNSTATED, None], ids=["stated", "unstated", "broken"])
def test_rows_beyond_a_parallel_limit_wait_for_a_slot(slots: int, refusal: str | None) -> None:
    server = Server(slots, refusal and refusal.format(slots))
    endings, state = ask(server, 4)
    assert [type(each) for each in endings] == [Finished] * 4
    assert {len(each.reply.text.split()) for each in endings} == {WORDS}
    assert server.refused + server.broken <= 3
    if refusal is not None or slots == 1:  # one early end in a row is no evidence
        assert state.max_parallel == slots


@pytest.mark.parametrize("refusal", [LITELLM, UNSTATED, None], ids=["stated", "unstated", "broken"])
def test_learned_parallel_limit_is_held_to(refusal: str | None) -> None:
    server = Server(1, refusal and refusal.format(1))
    endings, _ = ask(server, 4, 8)
    assert {type(each) for each in endings} == {Finished}
    # The second burst takes 16 s: less than until more requests are tried.
    assert server.refused + server.broken <= 3


def test_more_parallel_requests_are_tried_after_a_minute() -> None:
    server = Server(1, UNSTATED)
    endings, state = ask(server, 4, 40)
    assert {type(each) for each in endings} == {Finished}
    # 44 answers of 2 s take 88 s: one trial was refused.
    assert state.max_parallel == 1
    assert 1 < server.refused <= 5
