"""A scripted server: an httpx2 transport that returns the responses that a test lists."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest

from nbcodex.errors import NbcodexError
from nbcodex.models import Request
from nbcodex.openai_api.answers import (
    CompletedAnswer,
    Reset,
    ResponseStarted,
    StreamEvent,
    TextDelta,
)
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.settings import Secret, Settings
from tests.virtual import LoopClock, run_virtual

KEY = "sk-test-0123456789abcdefghij"
DONE = b"data: [DONE]\n\n"
BASE = "https://gateway.example/v1"
MODEL = "gpt-5.6-sol"


@dataclass
class Silence:
    """A pause in a body."""

    seconds: float


Part = bytes | Silence | Exception


@dataclass
class Script:
    """One response: status, headers, and a body in parts."""

    parts: Iterable[Part] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Body(httpx2.AsyncByteStream):
    """A scripted body that records whether it was closed."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = parts
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            if isinstance(part, Silence):
                await asyncio.sleep(part.seconds)
            elif isinstance(part, Exception):
                raise part
            else:
                yield part

    async def aclose(self) -> None:
        self.closed = True


Answer = Script | Exception | Callable[[httpx2.Request], Script]


class Server(httpx2.AsyncBaseTransport):
    """Returns its scripts in order, the last one repeatedly, and records the requests."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []
        self.bodies: list[Body] = []
        self.received = asyncio.Event()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        self.requests.append(request)
        self.received.set()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            answer = answer(request)
        body = Body(answer.parts)
        self.bodies.append(body)
        return httpx2.Response(answer.status, headers=dict(answer.headers), stream=body)

    @property
    def sent(self) -> list[dict[str, Any]]:
        return [json.loads(r.content) for r in self.requests]

    @property
    def sent_models(self) -> list[str]:
        return [json.loads(r.content)["model"] for r in self.requests if r.content]


def event(payload: object, name: str = "") -> bytes:
    """Return one server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(payload)}\n\n".encode()


def delta(text: str) -> bytes:
    return event({"type": "response.output_text.delta", "delta": text})


def completed(**response: Any) -> bytes:
    return event({"type": "response.completed", "response": {"model": MODEL, **response}})


def chunk(text: str | None = None, *, finish: str | None = None, **more: Any) -> bytes:
    delta_fields = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta_fields, "finish_reason": finish}
    return event({"model": "m", "id": "c", "choices": [choice], **more})


def refusal(
    status: int, message: str = "no", *, headers: Mapping[str, str] = {}, **error: Any
) -> Script:
    body = {"error": {"message": message, "type": None, "param": None, "code": None, **error}}
    return Script(
        [json.dumps(body).encode()], status, {"content-type": "application/json", **headers}
    )


def settings(**values: Any) -> Settings:
    given = {"api_key": Secret(KEY), "base_url": BASE, "api": "responses", "model": MODEL}
    return Settings(**{**given, **values})


def play(
    server: Server,
    *,
    chosen: Settings | None = None,
    api_client: ApiClient | None = None,
    **options: Any,
) -> list[StreamEvent]:
    """Send one request in virtual time and return all its events."""
    chosen = chosen or settings()
    request = Request(prompt=options.pop("prompt", "Why?"), **options)

    async def run() -> list[StreamEvent]:
        client = api_client or ApiClient(clock=LoopClock(), transport=server)
        model = await client.resolve_model(request, chosen)
        events = [p async for p in client.stream(request, chosen, model=model)]
        await client.close()
        return events

    return run_virtual(run())


def text_of(events: list[StreamEvent]) -> str:
    text = ""
    for each in events:
        if isinstance(each, Reset):
            text = ""
        elif isinstance(each, TextDelta):
            text += each.text
    return text


def ending_of(events: list[StreamEvent]) -> CompletedAnswer:
    assert isinstance(events[0], ResponseStarted)
    assert isinstance(events[-1], CompletedAnswer)
    assert events[-1].text == text_of(events)
    return events[-1]


def failed(code: str | None, message: str = "") -> bytes:
    error = code and {"code": code, "message": message}
    return event({"type": "response.failed", "response": {"error": error, "usage": None}})


def fails(server: Server, **options: Any) -> NbcodexError:
    """Send one request that must fail, and return the error."""
    with pytest.raises(NbcodexError) as caught:
        play(server, **options)
    assert all(body.closed for body in server.bodies)
    return caught.value
