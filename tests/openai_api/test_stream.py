"""How a stream is read: packets are gathered, and what is there is read at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from nbcodex.openai_api.answers import TextDelta
from nbcodex.openai_api.readers import ResponsesReader
from nbcodex.openai_api.stream import PACKET_GATHERING_S, AnswerStream
from nbcodex.settings import Settings
from tests.virtual import run_virtual

COUNT = 40
DELTAS = [b'data: {"type": "response.output_text.delta", "delta": "word "}\n\n'] * COUNT
END = b'data: {"type": "response.completed", "response": {"status": "completed"}}\n\n'


def answer_stream(chunks: AsyncIterator[bytes]) -> AnswerStream:
    return AnswerStream(chunks, ResponsesReader(), Settings(), secrets=[])


async def read(chunks: AsyncIterator[bytes]) -> tuple[str, float]:
    """Return the text of a stream, and the seconds that its reading took."""
    began = asyncio.get_running_loop().time()
    text = "".join(
        [e.text async for e in answer_stream(chunks).events() if isinstance(e, TextDelta)]
    )
    return text, asyncio.get_running_loop().time() - began


def test_chunks_that_are_there_are_read_without_sleeping(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps: list[float] = []

    async def note(seconds: float) -> None:
        sleeps.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", note)

    async def one_packet() -> AsyncIterator[bytes]:
        for piece in [*DELTAS, END]:
            busy_until = time.perf_counter() + 0.0005
            while time.perf_counter() < busy_until:
                pass
            yield piece

    text, _ = asyncio.run(read(one_packet()))
    assert (text, sleeps) == ("word " * COUNT, [])


def test_packets_are_gathered_after_a_wait() -> None:
    async def packet_by_packet() -> AsyncIterator[bytes]:
        for piece in [*DELTAS, END]:
            await asyncio.sleep(0.001)
            yield piece

    text, took = run_virtual(read(packet_by_packet()))
    assert text == "word " * COUNT
    assert took > COUNT * PACKET_GATHERING_S


def test_abandoned_body_is_closed() -> None:
    closed: list[bool] = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield DELTAS[0]
        finally:
            closed.append(True)

    async def main() -> None:
        body = endless()
        pieces = answer_stream(body).events()
        await anext(pieces)
        await pieces.aclose()
        assert closed
        assert body

    run_virtual(main())
