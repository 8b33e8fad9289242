"""A second look-alike of OpenAI's API: real sockets, real time, written after the API's reference.

It shares no code with the project's own simulator, so that tests find what the simulator gets
wrong. Must not import nbcodex.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import count
from typing import get_args

from tests.servers.metering import MINUTE, ORGANIZATION, Account, Bucket, Policy
from tests.servers.wording import (
    Ask,
    Chat,
    Fields,
    RefusedError,
    Responses,
    error_of,
    parsed,
    pieces,
    words_of,
)

MODEL = "lookalike-1"
DELTAS_BEFORE_BREAK = 3  # in a stream that is to break
AGAIN_IN = 0.4  # seconds that a broken stream asks its client to wait

# In a prompt: how its first stream breaks.
_MARKER = re.compile(r"<<(failed|nested|flat)>>")


@dataclass(slots=True)
class Answer:
    """An answer that is being sent."""

    ask: Ask
    form: Responses | Chat
    headers: dict[str, str]
    begun: float = field(default_factory=time.monotonic)
    sent_tokens: int = 0

    def head(self) -> dict[str, str]:
        """Return the headers, with the limits at admission."""
        took = round((time.monotonic() - self.begun) * 1000)
        return {**self.headers, "openai-processing-ms": str(took)}


class Lookalike:
    """The server and its counters."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._accounts: dict[tuple[str, str], Account] = {}
        self._seen: Counter[str] = Counter()
        self._answered: Counter[str] = Counter()
        self._served: Counter[str] = Counter()
        self._numbers = count(1)

    def stats(self) -> Fields:
        """Return the counters. Tokens are net, without the refunded ones."""
        often = Counter(self._answered.values())
        return {
            "requests": self._served["requests"],
            "refused_requests": self._served["refused requests"],
            "refused_tokens": self._served["refused tokens"],
            "broken": self._served["broken"],
            "charged": self._served["charged"],
            "admitted": self._served["admitted"],
            "answered_once": often[1],
            "answered_twice": sum(often.values()) - often[1],
        }

    def _account(self, key: str, model: str) -> Account:
        if (key, model) not in self._accounts:
            tpm, rpm, filled = self._options.tpm, self._options.rpm, self._options.filled
            self._accounts[key, model] = Account(
                policy=self._options.policy,
                tokens=Bucket("tokens", tpm, tpm * filled),
                requests=Bucket("requests", rpm, rpm * filled),
            )
        return self._accounts[key, model]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve the requests of one connection."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ", 2)
                pairs = (line.partition(":") for line in head[1:] if line)
                headers = {name.lower(): value.strip() for name, _, value in pairs}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                try:
                    await self._answer(f"{method} {path}", headers, body, writer)
                except RefusedError as refused:
                    send(writer, refused.status, {"error": refused.error}, refused.headers)
                await writer.drain()
        writer.close()

    async def _answer(
        self, route: str, headers: Fields, body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        if route == "GET /stats":
            return send(writer, 200, self.stats())
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or not key:
            message = "You didn't provide an API key."
            raise RefusedError(401, error_of("invalid_request_error", None, message))
        match route:
            case "GET /v1/models":
                entry = {"id": MODEL, "object": "model", "created": 0, "owned_by": ORGANIZATION}
                return send(writer, 200, {"object": "list", "data": [entry]})
            case "POST /v1/responses":
                return await self._complete(Ask.read("responses", parsed(body)), key, writer)
            case "POST /v1/chat/completions":
                return await self._complete(Ask.read("chat", parsed(body)), key, writer)
        error = error_of("invalid_request_error", None, f"Invalid URL ({route})")
        raise RefusedError(404, error)

    async def _complete(self, ask: Ask, key: str, writer: asyncio.StreamWriter) -> None:
        """Admit a request, answer it, and settle its charge, even if its client disconnects."""
        account = self._account(key, ask.model)
        answer = self._admitted(account, ask)
        try:
            await asyncio.sleep(self._options.latency)
            if ask.stream:
                await self._stream(answer, account.tokens, writer)
            else:
                await self._whole(answer, writer)
            await writer.drain()
        finally:
            self._served["charged"] += account.settle(ask, answer.sent_tokens)

    def _admitted(self, account: Account, ask: Ask) -> Answer:
        self._served["requests"] += 1
        try:
            self._served["charged"] += account.admit(ask)
        except RefusedError as refused:
            self._served[f"refused {refused.error['type']}"] += 1
            raise
        self._served["admitted"] += 1
        form = (Responses if ask.api == "responses" else Chat)(ask, next(self._numbers))
        return Answer(ask, form, account.headers())

    async def _whole(self, answer: Answer, writer: asyncio.StreamWriter) -> None:
        words = words_of(answer.ask.prompt, answer.ask.bound)
        answer.sent_tokens = len(words)
        await asyncio.sleep(len(words) / self._options.speed)
        send(writer, 200, answer.form.whole(" ".join(words), len(words)), answer.head())
        self._answered[answer.ask.prompt] += 1

    async def _stream(self, answer: Answer, tokens: Bucket, writer: asyncio.StreamWriter) -> None:
        ask, form = answer.ask, answer.form
        words, how = words_of(ask.prompt, ask.bound), self._break_of(ask)
        open_stream(writer, answer.head())
        write(writer, *form.begin())
        for number, piece in enumerate(pieces(words)):
            if how and number == DELTAS_BEFORE_BREAK:
                self._served["broken"] += 1
                short = ask.whole - AGAIN_IN * tokens.limit / MINUTE
                error = tokens.refusal(ask.model, ask.whole, level=short)
                return write(writer, form.failure(how, error), last=True)
            write(writer, form.delta(piece))
            await writer.drain()
            answer.sent_tokens += len(piece.split())
            await asyncio.sleep(len(piece.split()) / self._options.speed)
        write(writer, *form.end(" ".join(words), answer.sent_tokens), last=True)
        self._answered[ask.prompt] += 1
        return None

    def _break_of(self, ask: Ask) -> str | None:
        """Return how the stream is to break; only the first one of a prompt does."""
        self._seen[ask.prompt] += 1
        found = _MARKER.search(ask.prompt)
        return found[1] if found and self._seen[ask.prompt] == 1 else None


# The necessary part of HTTP.


def _lines(status: int, headers: dict[str, str]) -> bytes:
    common = {
        "openai-organization": ORGANIZATION,
        "openai-version": "2020-10-01",
        "x-request-id": f"req_{secrets.token_hex(16)}",
    }
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in {**common, **headers}.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def send(
    writer: asyncio.StreamWriter, status: int, body: Fields, headers: Mapping[str, str] = {}
) -> None:
    """Send a whole answer."""
    data = json.dumps(body).encode()
    length = {"content-type": "application/json", "content-length": str(len(data))}
    writer.write(_lines(status, {**headers, **length}) + data)


def open_stream(writer: asyncio.StreamWriter, headers: dict[str, str]) -> None:
    """Send the head of a streamed answer."""
    stream = {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"}
    writer.write(_lines(200, {**headers, **stream}))


def write(writer: asyncio.StreamWriter, *frames: bytes, last: bool = False) -> None:
    """Send events of a stream."""
    data = b"".join(frames)
    end = b"0\r\n\r\n" if last else b""
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n" + end)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--tpm", type=float, default=30_000, help="tokens a minute")
    parser.add_argument("--rpm", type=float, default=500, help="requests a minute")
    parser.add_argument("--filled", type=float, default=1.0, help="share available at the start")
    parser.add_argument("--policy", choices=get_args(Policy), default="kept")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before the first word")
    parser.add_argument("--speed", type=float, default=200.0, help="tokens a second")
    return parser.parse_args()


async def _main(options: argparse.Namespace) -> None:
    lookalike = Lookalike(options)
    server = await asyncio.start_server(lookalike.serve, "127.0.0.1", options.port, backlog=1024)
    host, port = server.sockets[0].getsockname()
    print(f"http://{host}:{port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(_options()))
