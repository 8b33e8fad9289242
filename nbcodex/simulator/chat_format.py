"""Answers as objects and chunks of the Chat Completions API, after OpenAI's reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nbcodex.simulator.faults import Fault
from nbcodex.simulator.generation import Answer, Role, StreamEvent, encode_json, error_fields

DONE = b"data: [DONE]\n\n"
FINGERPRINT = "fp_simulated"


class ChatFormat:
    """Formats one answer for Chat Completions."""

    def __init__(self, answer: Answer) -> None:
        self._source = answer
        self._tokens = 0
        options = answer.request.body.get("stream_options") or {}
        self._with_usage = bool(options.get("include_usage"))

    def stream_events(self) -> Iterator[StreamEvent]:
        """Yield the chunks of the stream, from the role to ``[DONE]``."""
        first = {"role": "assistant", "content": "", "refusal": None}
        yield self._stream_event("preamble", self._chunk(first))
        for delta, tokens in self._source.deltas():
            self._tokens = tokens
            yield self._stream_event("delta", self._chunk({"content": delta}))
        yield self._stream_event("end", self._chunk({}, finish=self._finish()))
        if self._with_usage:
            last = self._object("chat.completion.chunk") | {"choices": [], "usage": self._usage()}
            yield self._stream_event("end", last)
        yield StreamEvent(DONE, "end", self._tokens, self._source.seconds_until(self._tokens))

    def error_events(self, fault: Fault, message: str, number: int) -> list[bytes]:  # noqa: ARG002
        """Return the chunk of an error in mid-stream; Chat Completions has no other form of it."""
        error = {**error_fields(fault, message), "param": None}
        if fault.kind == "flat_error_event":
            return [_sse({"type": "error", "code": error["code"], "message": error["message"]})]
        return [_sse({"error": error})]

    def as_object(self) -> dict[str, Any]:
        """Return the finished completion."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self._source.plan.text,
            "refusal": None,
            "annotations": [],
        }
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._finish()}
        return self._object("chat.completion") | {"choices": [choice], "usage": self._usage()}

    def _stream_event(self, role: Role, data: dict[str, Any]) -> StreamEvent:
        return StreamEvent(_sse(data), role, self._tokens, self._source.seconds_until(self._tokens))

    def _chunk(self, delta: dict[str, Any], *, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        chunk = self._object("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self._with_usage else chunk

    def _object(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._source.id,
            "object": kind,
            "created": int(self._source.created_at),
            "model": self._source.request.model,
            "service_tier": "default",
            "system_fingerprint": FINGERPRINT,
        }

    def _finish(self) -> str:
        return "length" if self._source.plan.truncated else "stop"

    def _usage(self) -> dict[str, Any]:
        plan = self._source.plan
        return {
            "prompt_tokens": plan.input_tokens,
            "completion_tokens": plan.output_tokens,
            "total_tokens": plan.input_tokens + plan.output_tokens,
            "prompt_tokens_details": {"cached_tokens": self._source.cached, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": plan.reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % encode_json(data)
