"""Answers as the Responses API says them: its objects and the sequence of its events.

The shapes are those of OpenAI's reference for ``/v1/responses``. Must not know the clock.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from itertools import count
from typing import Any

from nbcodex.simulator.answers import tokenize
from nbcodex.simulator.faults import Fault
from nbcodex.simulator.generation import Making, Piece, Role, encode, told
from nbcodex.simulator.pictures import png

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
_THOUGHT = "**Reading the prompt**\n\nThis is simulated reasoning: nobody thought about it."


class ResponsesWire:
    """Says one answer in the events of the Responses API.

    Parameters
    ----------
    making : Making
        The answer.
    """

    def __init__(self, making: Making) -> None:
        self._making = making
        self._numbers = count()
        self._tokens = 0

    def pieces(self) -> Iterator[Piece]:
        """Yield the stream's events, from ``response.created`` to ``response.completed``."""
        start = self._response("in_progress")
        if self._making.asked.background:
            queued = self._response("queued")
            yield self._piece("preamble", "response.created", response=queued)
            yield self._piece("preamble", "response.queued", response=queued)
        else:
            yield self._piece("preamble", "response.created", response=start)
        yield self._piece("preamble", "response.in_progress", response=start)
        if self._making.plan.reasoning:
            yield from self._reasoning()
        if self._making.asked.draws:
            yield from self._drawing()
        if self._making.plan.tokens:
            yield from self._message()
        whole = self.whole()
        yield self._piece("end", f"response.{whole['status']}", response=whole)

    def broken(self, fault: Fault, message: str, number: int) -> list[bytes]:
        """Return the events, counted from `number`, with which generation breaks off."""
        self._numbers = count(number)
        words = told(fault, message)
        match fault.kind:
            case "error_event":
                return [self._event("error", error={**words, "param": None})]
            case "flat_error_event":
                flat = {"code": words["code"], "message": words["message"]}
                return [self._event("error", **flat, param=None)]
            case "failed":
                error = {"code": words["code"], "message": words["message"]}
                return [self._failed(error)]
            case _:
                nested = {**words, "code": fault.code or "too_many_requests", "param": None}
                return [self._failed(None), self._event("error", error=nested)]

    def whole(self) -> dict[str, Any]:
        """Return the finished response."""
        plan = self._making.plan
        output = []
        if plan.reasoning:
            output.append(self._thought("completed", self._summary()))
        if self._making.asked.draws:
            output.append(self._picture("completed"))
        if plan.tokens:
            output.append(self._answer("incomplete" if plan.cut else "completed", plan.text))
        done = self._response("incomplete" if plan.cut else "completed")
        reason = {"reason": "max_output_tokens"} if plan.cut else None
        return done | {"output": output, "usage": self._usage(), "incomplete_details": reason}

    def unfinished(self, status: str) -> dict[str, Any]:
        """Return a response that has no answer yet, or never will have one."""
        return self._response(status)

    def failed(self, fault: Fault, message: str) -> dict[str, Any]:
        """Return the response whose generation broke off."""
        words = told(fault, message)
        error = {"code": words["code"], "message": words["message"]}
        return self._response("failed") | {"error": error}

    def _reasoning(self) -> Iterator[Piece]:
        item = self._thought("in_progress", [])
        yield self._piece("preamble", "response.output_item.added", output_index=0, item=item)
        if self._summary():
            yield from self._summary_events()
        self._tokens = self._making.plan.reasoning
        done = self._thought("completed", self._summary())
        yield self._piece("aside", "response.output_item.done", output_index=0, item=done)

    def _summary_events(self) -> Iterator[Piece]:
        place = {"item_id": self._making.item_id("rs"), "output_index": 0, "summary_index": 0}
        part, name = {"type": "summary_text", "text": ""}, "response.reasoning_summary"
        yield self._piece("aside", f"{name}_part.added", **place, part=part)
        words = tokenize(_THOUGHT)
        for index, word in enumerate(words, start=1):
            self._tokens = self._making.plan.reasoning * index // len(words)
            yield self._piece("aside", f"{name}_text.delta", **place, delta=word)
        yield self._piece("aside", f"{name}_text.done", **place, text=_THOUGHT)
        yield self._piece("aside", f"{name}_part.done", **place, part={**part, "text": _THOUGHT})

    def _drawing(self) -> Iterator[Piece]:
        index = 1 if self._making.plan.reasoning else 0
        name = "response.image_generation_call"
        place = {"item_id": self._making.item_id("ig"), "output_index": index}
        item = self._picture("in_progress")
        yield self._piece("preamble", "response.output_item.added", output_index=index, item=item)
        for state in ("in_progress", "generating", "completed"):
            yield self._piece("aside", f"{name}.{state}", **place)
        done = self._picture("completed")
        yield self._piece("end", "response.output_item.done", output_index=index, item=done)

    def _picture(self, status: str) -> dict[str, Any]:
        item = {"id": self._making.item_id("ig"), "type": "image_generation_call", "status": status}
        if status != "completed":
            return {**item, "result": None}
        picture = b64encode(png(self._making.asked.prompt)).decode("ascii")
        return {**item, "output_format": "png", "result": picture}

    def _message(self) -> Iterator[Piece]:
        plan = self._making.plan
        index = 1 if plan.reasoning else 0
        place = {"item_id": self._making.item_id("msg"), "output_index": index, "content_index": 0}
        item = self._answer("in_progress", None)
        yield self._piece("preamble", "response.output_item.added", output_index=index, item=item)
        yield self._piece("preamble", "response.content_part.added", **place, part=_part(""))
        for delta, tokens in self._making.chunks():
            self._tokens = tokens
            name = "response.output_text.delta"
            yield self._piece("delta", name, **place, delta=delta, logprobs=[])
        name = "response.output_text.done"
        yield self._piece("end", name, **place, text=plan.text, logprobs=[])
        yield self._piece("end", "response.content_part.done", **place, part=_part(plan.text))
        done = self._answer("incomplete" if plan.cut else "completed", plan.text)
        yield self._piece("end", "response.output_item.done", output_index=index, item=done)

    def _piece(self, role: Role, type: str, **fields: Any) -> Piece:  # noqa: A002 - the wire's word
        at = self._making.moment(self._tokens)
        number = next(self._numbers)
        data = _sse(type, {**fields, "sequence_number": number})
        return Piece(data, role, self._tokens, at, number)

    def _event(self, type: str, **fields: Any) -> bytes:  # noqa: A002 - the wire's word
        return _sse(type, {**fields, "sequence_number": next(self._numbers)})

    def _failed(self, error: dict[str, Any] | None) -> bytes:
        return self._event("response.failed", response=self._response("failed") | {"error": error})

    def _response(self, status: str) -> dict[str, Any]:
        making = self._making
        body = making.asked.body
        echoed = {k: body[k] for k in _DEFAULTS if body.get(k) is not None}
        reasoning = {"effort": None, "summary": None} | (body.get("reasoning") or {})
        return {
            "id": making.id,
            "object": "response",
            "created_at": int(making.created_at),
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": making.asked.model,
            "output": [],
            "reasoning": reasoning,
            **_DEFAULTS,
            **echoed,
            "usage": None,
        }

    def _summary(self) -> list[dict[str, str]]:
        asked = self._making.asked.body.get("reasoning") or {}
        return [{"type": "summary_text", "text": _THOUGHT}] if asked.get("summary") else []

    def _thought(self, status: str, summary: list[dict[str, str]]) -> dict[str, Any]:
        item = {"id": self._making.item_id("rs"), "type": "reasoning", "summary": summary}
        include = self._making.asked.body.get("include")
        if isinstance(include, list) and "reasoning.encrypted_content" in include:
            item["encrypted_content"] = "" if status == "in_progress" else "c2ltdWxhdGVk"
        return item

    def _answer(self, status: str, text: str | None) -> dict[str, Any]:
        return {
            "id": self._making.item_id("msg"),
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [] if text is None else [_part(text)],
        }

    def _usage(self) -> dict[str, Any]:
        plan = self._making.plan
        return {
            "input_tokens": plan.input_tokens,
            "input_tokens_details": {
                "cached_tokens": self._making.cached,
                "cache_write_tokens": 0,
            },
            "output_tokens": plan.output_tokens,
            "output_tokens_details": {"reasoning_tokens": plan.reasoning},
            "total_tokens": plan.input_tokens + plan.output_tokens,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _sse(type: str, fields: dict[str, Any]) -> bytes:  # noqa: A002 - the wire's word
    return b"event: %s\ndata: %s\n\n" % (type.encode(), encode({"type": type, **fields}))
