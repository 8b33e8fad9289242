"""One response of the server, from its headers to its last word, as the pieces of an answer.

Knows neither what was asked nor what becomes of a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nbcodex.errors import shorten
from nbcodex.models import StreamPosition
from nbcodex.openai_api import connections, rate_limits, responses
from nbcodex.openai_api.answers import (
    CompletedAnswer,
    ReasoningDelta,
    Reset,
    ResponseStarted,
    StreamEvent,
    TextDelta,
)
from nbcodex.openai_api.redaction import Redactor
from nbcodex.openai_api.stream import Reading
from nbcodex.runtime.clock import Clock
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from openai import AsyncAPIResponse, AsyncOpenAI


LARGEST = 1_000_000
"""Characters of an answer's reasoning that are carried on."""

_SENT_BACK = ("type", "id", "summary", "encrypted_content")
"""What the Responses API takes of a reasoning item among its input."""


async def go_on(
    call: Any,
    client: AsyncOpenAI,
    settings: Settings,
    *,
    clock: Clock,
    mark: StreamPosition,
    text: str,
) -> AsyncGenerator[StreamEvent]:
    """Yield what one call brings of a durable answer, whether that is its rest or all of it."""
    redactor = redactor_for(settings, client)
    reader = responses.ResponsesReader(durable=True, mark=mark)
    async with contextlib.AsyncExitStack() as stack:
        async with asyncio.timeout(settings.idle_timeout):
            response = await stack.enter_async_context(call)
        yield opened(response, redactor, clock=clock, api="responses", model=None)
        rest = begin(response, reader, client, settings, begun=bool(text))
        async with contextlib.aclosing(pieces(rest, redactor)) as brought:
            async for piece in brought:
                if rest.is_whole and isinstance(piece, TextDelta):
                    if not piece.text.startswith(text):
                        yield Reset()
                    piece = TextDelta(piece.text.removeprefix(text))
                yield piece
    said = rest.text if rest.is_whole else text + rest.text
    yield completed(said, reader.ending, redactor)


def begin(
    response: AsyncAPIResponse[Any],
    reader: responses.Reader,
    client: AsyncOpenAI,
    settings: Settings,
    *,
    begun: bool = False,
) -> Reading:
    """Return the reading of a response; `begun`: whether it goes on with a text."""
    return Reading(
        response.iter_bytes(),
        reader,
        redactor=redactor_for(settings, client),
        thoughts=redactor_for(settings, client),
        idle=settings.idle_timeout,
        begun=begun,
    )


def opened(
    response: AsyncAPIResponse[Any],
    redactor: Redactor,
    *,
    clock: Clock,
    api: str,
    model: str | None,
) -> ResponseStarted:
    """Return what the headers tell."""
    sent = dict(response.headers.items())  # each look into the original goes through all of it
    request_id = redactor.clean(sent.get("x-request-id", ""))
    return ResponseStarted(
        api=api,
        model=model,
        snapshot=rate_limits.snapshot(sent, at=clock.now(), clean=redactor.clean),
        simulated=rate_limits.is_simulated(sent),
        request_id=shorten(request_id, 100) or None,
    )


async def pieces(reading: Reading, redactor: Redactor) -> AsyncGenerator[StreamEvent]:
    """Yield what a reading brings: a durable answer's name before its text, its mark behind it."""
    last = reading.mark
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(reading.close)
        brought = await stack.enter_async_context(contextlib.aclosing(reading.pieces()))
        async for text, thought in brought:
            mark = reading.mark
            if mark and redactor.clean(mark.response_id) != mark.response_id:
                mark = None
            if mark and not last:
                yield StreamPosition(mark.response_id)
            if thought:
                yield ReasoningDelta(thought)
            if text:
                yield TextDelta(text)
            if mark and mark != last:
                yield mark
            last = mark


def completed(text: str, ending: responses.Ending, redactor: Redactor) -> CompletedAnswer:
    """Return an answer that is whole."""
    return CompletedAnswer(
        text=text,
        usage=ending.usage,
        model=redactor.clean(ending.model) if ending.model else None,
        cut=redactor.clean(ending.cut) if ending.cut else None,
        response_id=redactor.clean(ending.response_id) if ending.response_id else None,
        reasoning=tuple(_carried(ending.reasoning, redactor)),
        images=tuple(ending.images),
        refused=ending.refused,
    )


def _carried(items: Iterable[Mapping[str, Any]], redactor: Redactor) -> Iterator[dict[str, Any]]:
    """Yield the reasoning that can be sent back: encrypted, in a decent size, without a secret."""
    room = LARGEST
    for item in items:
        kept = {name: item[name] for name in _SENT_BACK if name in item}
        text = json.dumps(kept)
        room -= len(text)
        if item.get("encrypted_content") and room >= 0 and redactor.clean(text) == text:
            yield kept


def redactor_for(settings: Settings, client: AsyncOpenAI) -> Redactor:
    """Return what keeps all secrets in force out of one text."""
    return Redactor([*settings.secrets(), *connections.secrets_of(client)])
