"""Answers as objects and events of the Responses API, after OpenAI's reference."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from collections.abc import Iterator
from hashlib import blake2b
from itertools import count
from typing import Any

from nbcodex.simulator.faults import Fault
from nbcodex.simulator.generated_answers import tokenize
from nbcodex.simulator.generation import Answer, Role, StreamEvent, encode_json, error_fields

_DEFAULTS: dict[str, Any] = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
_REASONING_TEXT = "**Reading the prompt**\n\nThis is simulated reasoning."


class ResponsesFormat:
    """Formats one answer for the Responses API."""

    def __init__(self, answer: Answer) -> None:
        self._source = answer
        self._numbers = count()
        self._tokens = 0

    def stream_events(self) -> Iterator[StreamEvent]:
        """Yield the events of the stream, from ``response.created`` to the final one."""
        start = self._response_object("in_progress")
        if self._source.request.background:
            queued = self._response_object("queued")
            yield self._stream_event("preamble", "response.created", response=queued)
            yield self._stream_event("preamble", "response.queued", response=queued)
        else:
            yield self._stream_event("preamble", "response.created", response=start)
        yield self._stream_event("preamble", "response.in_progress", response=start)
        if self._source.plan.reasoning:
            yield from self._reasoning_events()
        if self._source.request.wants_image:
            yield from self._image_events()
        if self._source.plan.tokens:
            yield from self._message_events()
        whole = self.as_object()
        yield self._stream_event("end", f"response.{whole['status']}", response=whole)

    def error_events(self, fault: Fault, message: str, number: int) -> list[bytes]:
        """Return the events of an error in mid-stream, numbered from `number`."""
        self._numbers = count(number)
        error = error_fields(fault, message)
        match fault.kind:
            case "error_event":
                return [self._encoded_event("error", error={**error, "param": None})]
            case "flat_error_event":
                flat = {"code": error["code"], "message": error["message"]}
                return [self._encoded_event("error", **flat, param=None)]
            case "failed":
                error = {"code": error["code"], "message": error["message"]}
                return [self._failed_event(error)]
            case _:
                nested = {**error, "code": fault.code or "too_many_requests", "param": None}
                return [self._failed_event(None), self._encoded_event("error", error=nested)]

    def as_object(self) -> dict[str, Any]:
        """Return the finished response."""
        plan = self._source.plan
        output = []
        if plan.reasoning:
            output.append(self._reasoning_item("completed", self._summary()))
        if self._source.request.wants_image:
            output.append(self._image_item("completed"))
        if plan.tokens:
            output.append(
                self._message_item("incomplete" if plan.truncated else "completed", plan.text)
            )
        done = self._response_object("incomplete" if plan.truncated else "completed")
        reason = {"reason": "max_output_tokens"} if plan.truncated else None
        return done | {"output": output, "usage": self._usage(), "incomplete_details": reason}

    def unfinished_object(self, status: str) -> dict[str, Any]:
        """Return a response object without an answer."""
        return self._response_object(status)

    def failed_object(self, fault: Fault, message: str) -> dict[str, Any]:
        """Return the object of a response whose generation failed."""
        error = error_fields(fault, message)
        error = {"code": error["code"], "message": error["message"]}
        return self._response_object("failed") | {"error": error}

    def _reasoning_events(self) -> Iterator[StreamEvent]:
        item = self._reasoning_item("in_progress", [])
        yield self._stream_event(
            "preamble", "response.output_item.added", output_index=0, item=item
        )
        if self._summary():
            yield from self._summary_events()
        self._tokens = self._source.plan.reasoning
        done = self._reasoning_item("completed", self._summary())
        yield self._stream_event("aside", "response.output_item.done", output_index=0, item=done)

    def _summary_events(self) -> Iterator[StreamEvent]:
        place = {"item_id": self._source.item_id("rs"), "output_index": 0, "summary_index": 0}
        part, name = {"type": "summary_text", "text": ""}, "response.reasoning_summary"
        yield self._stream_event("aside", f"{name}_part.added", **place, part=part)
        words = tokenize(_REASONING_TEXT)
        for index, word in enumerate(words, start=1):
            self._tokens = self._source.plan.reasoning * index // len(words)
            yield self._stream_event("aside", f"{name}_text.delta", **place, delta=word)
        yield self._stream_event("aside", f"{name}_text.done", **place, text=_REASONING_TEXT)
        yield self._stream_event(
            "aside", f"{name}_part.done", **place, part={**part, "text": _REASONING_TEXT}
        )

    def _image_events(self) -> Iterator[StreamEvent]:
        index = 1 if self._source.plan.reasoning else 0
        name = "response.image_generation_call"
        place = {"item_id": self._source.item_id("ig"), "output_index": index}
        item = self._image_item("in_progress")
        yield self._stream_event(
            "preamble", "response.output_item.added", output_index=index, item=item
        )
        for state in ("in_progress", "generating", "completed"):
            yield self._stream_event("aside", f"{name}.{state}", **place)
        done = self._image_item("completed")
        yield self._stream_event("end", "response.output_item.done", output_index=index, item=done)

    def _image_item(self, status: str) -> dict[str, Any]:
        item = {"id": self._source.item_id("ig"), "type": "image_generation_call", "status": status}
        if status != "completed":
            return {**item, "result": None}
        picture = b64encode(png_pattern(self._source.request.prompt)).decode("ascii")
        return {**item, "output_format": "png", "result": picture}

    def _message_events(self) -> Iterator[StreamEvent]:
        plan = self._source.plan
        index = 1 if plan.reasoning else 0
        place = {"item_id": self._source.item_id("msg"), "output_index": index, "content_index": 0}
        item = self._message_item("in_progress", None)
        yield self._stream_event(
            "preamble", "response.output_item.added", output_index=index, item=item
        )
        yield self._stream_event("preamble", "response.content_part.added", **place, part=_part(""))
        for delta, tokens in self._source.deltas():
            self._tokens = tokens
            name = "response.output_text.delta"
            yield self._stream_event("delta", name, **place, delta=delta, logprobs=[])
        name = "response.output_text.done"
        yield self._stream_event("end", name, **place, text=plan.text, logprobs=[])
        yield self._stream_event(
            "end", "response.content_part.done", **place, part=_part(plan.text)
        )
        done = self._message_item("incomplete" if plan.truncated else "completed", plan.text)
        yield self._stream_event("end", "response.output_item.done", output_index=index, item=done)

    def _stream_event(self, role: Role, type: str, **fields: Any) -> StreamEvent:  # noqa: A002 - the wire's word
        at = self._source.seconds_until(self._tokens)
        number = next(self._numbers)
        data = _sse(type, {**fields, "sequence_number": number})
        return StreamEvent(data, role, self._tokens, at, number)

    def _encoded_event(self, type: str, **fields: Any) -> bytes:  # noqa: A002 - the wire's word
        return _sse(type, {**fields, "sequence_number": next(self._numbers)})

    def _failed_event(self, error: dict[str, Any] | None) -> bytes:
        return self._encoded_event(
            "response.failed", response=self._response_object("failed") | {"error": error}
        )

    def _response_object(self, status: str) -> dict[str, Any]:
        answer = self._source
        body = answer.request.body
        echoed = {k: body[k] for k in _DEFAULTS if body.get(k) is not None}
        reasoning = {"effort": None, "summary": None} | (body.get("reasoning") or {})
        return {
            "id": answer.id,
            "object": "response",
            "created_at": int(answer.created_at),
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": answer.request.model,
            "output": [],
            "reasoning": reasoning,
            **_DEFAULTS,
            **echoed,
            "usage": None,
        }

    def _summary(self) -> list[dict[str, str]]:
        options = self._source.request.body.get("reasoning") or {}
        return [{"type": "summary_text", "text": _REASONING_TEXT}] if options.get("summary") else []

    def _reasoning_item(self, status: str, summary: list[dict[str, str]]) -> dict[str, Any]:
        item = {"id": self._source.item_id("rs"), "type": "reasoning", "summary": summary}
        include = self._source.request.body.get("include")
        if isinstance(include, list) and "reasoning.encrypted_content" in include:
            item["encrypted_content"] = "" if status == "in_progress" else "c2ltdWxhdGVk"
        return item

    def _message_item(self, status: str, text: str | None) -> dict[str, Any]:
        return {
            "id": self._source.item_id("msg"),
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [] if text is None else [_part(text)],
        }

    def _usage(self) -> dict[str, Any]:
        plan = self._source.plan
        return {
            "input_tokens": plan.input_tokens,
            "input_tokens_details": {
                "cached_tokens": self._source.cached,
                "cache_write_tokens": 0,
            },
            "output_tokens": plan.output_tokens,
            "output_tokens_details": {"reasoning_tokens": plan.reasoning},
            "total_tokens": plan.input_tokens + plan.output_tokens,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _sse(type: str, fields: dict[str, Any]) -> bytes:  # noqa: A002 - the wire's word
    return b"event: %s\ndata: %s\n\n" % (type.encode(), encode_json({"type": type, **fields}))


SIZE, CELL = 96, 12
"""Pixels of a side, and of a square of the pattern."""


def png_pattern(prompt: str) -> bytes:
    """Return a picture as a PNG file."""
    digest = blake2b(prompt.encode("utf-8", "replace"), digest_size=8).digest()
    light, dark = digest[:3], bytes(value // 3 for value in digest[3:6])
    rows = (_row(digest, light, dark, y // CELL) for y in range(SIZE))
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 8, 2, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", zlib.compress(b"".join(rows), 9)),
            _chunk(b"IEND", b""),
        )
    )


def _row(digest: bytes, light: bytes, dark: bytes, y: int) -> bytes:
    cells = SIZE // CELL
    mirrored = (min(x, cells - 1 - x) for x in range(cells))
    colours = (light if digest[y % 8] >> x & 1 else dark for x in mirrored)
    return b"\0" + b"".join(colour * CELL for colour in colours)


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)
