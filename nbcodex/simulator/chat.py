"""Answers as the Chat Completions API says them: its objects and its chunks.

The shapes are those of OpenAI's reference for ``/v1/chat/completions``. Must not know the clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nbcodex.simulator.faults import Fault
from nbcodex.simulator.generation import Making, Piece, Role, encode, told

DONE = b"data: [DONE]\n\n"
FINGERPRINT = "fp_simulated"


class ChatWire:
    """Says one answer in the chunks of Chat Completions.

    Parameters
    ----------
    making : Making
        The answer.
    """

    def __init__(self, making: Making) -> None:
        self._making = making
        self._tokens = 0
        options = making.asked.body.get("stream_options") or {}
        self._with_usage = bool(options.get("include_usage"))

    def pieces(self) -> Iterator[Piece]:
        """Yield the stream's chunks, from the one that names the role to ``[DONE]``."""
        first = {"role": "assistant", "content": "", "refusal": None}
        yield self._piece("preamble", self._chunk(first))
        for delta, tokens in self._making.chunks():
            self._tokens = tokens
            yield self._piece("delta", self._chunk({"content": delta}))
        yield self._piece("end", self._chunk({}, finish=self._finish()))
        if self._with_usage:
            last = self._object("chat.completion.chunk") | {"choices": [], "usage": self._usage()}
            yield self._piece("end", last)
        yield Piece(DONE, "end", self._tokens, self._making.moment(self._tokens))

    def broken(self, fault: Fault, message: str, number: int) -> list[bytes]:  # noqa: ARG002
        """Return the chunk with which generation breaks off: nothing else is known here."""
        words = {**told(fault, message), "param": None}
        if fault.kind == "flat_error_event":
            return [_sse({"type": "error", "code": words["code"], "message": words["message"]})]
        return [_sse({"error": words})]

    def whole(self) -> dict[str, Any]:
        """Return the finished completion."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self._making.plan.text,
            "refusal": None,
            "annotations": [],
        }
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._finish()}
        return self._object("chat.completion") | {"choices": [choice], "usage": self._usage()}

    def _piece(self, role: Role, data: dict[str, Any]) -> Piece:
        return Piece(_sse(data), role, self._tokens, self._making.moment(self._tokens))

    def _chunk(self, delta: dict[str, Any], *, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        chunk = self._object("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self._with_usage else chunk

    def _object(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._making.id,
            "object": kind,
            "created": int(self._making.created_at),
            "model": self._making.asked.model,
            "service_tier": "default",
            "system_fingerprint": FINGERPRINT,
        }

    def _finish(self) -> str:
        return "length" if self._making.plan.cut else "stop"

    def _usage(self) -> dict[str, Any]:
        plan = self._making.plan
        return {
            "prompt_tokens": plan.input_tokens,
            "completion_tokens": plan.output_tokens,
            "total_tokens": plan.input_tokens + plan.output_tokens,
            "prompt_tokens_details": {"cached_tokens": self._making.cached, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": plan.reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % encode(data)
