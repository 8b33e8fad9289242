"""Reads the answers of Chat Completions, in chunks or in one piece. Pure."""

from __future__ import annotations

from typing import Any

from nbcodex.models import StreamPosition
from nbcodex.openai_api.answers import (
    RawAnswer,
    dict_items,
    failed_ending,
    is_error_object,
    json_object,
    name_value,
    read_usage,
    text_value,
)
from nbcodex.openai_api.api_errors import AnswerFailedError


class ChatReader:
    """Reads the chunks of Chat Completions."""

    def __init__(self) -> None:
        self.answer = RawAnswer()
        self.mark: StreamPosition | None = None  # only the Responses API has durable answers
        self.is_complete = self.is_closed = False
        self._unrecognized: dict[str, Any] | None = None

    def read_event(self, name: str, data: str) -> tuple[str, str]:
        """Return the text and the reasoning that a chunk adds."""
        if data == "[DONE]":
            # It ends the stream, not the answer: llama-cpp-python sends it when another request
            # interrupts this one. Only a finish_reason makes an answer complete.
            self.is_closed = True
            if self._unrecognized and not self.is_complete:
                raise AnswerFailedError(self._unrecognized)
            return "", ""
        chunk = json_object(data)
        if is_error_object(chunk) or name == "error":
            raise AnswerFailedError(chunk)
        if "choices" not in chunk and "usage" not in chunk:
            self._unrecognized = chunk
        answer = self.answer
        if answer.model is None:
            answer.model = name_value(chunk.get("model"))
            answer.response_id = name_value(chunk.get("id"))
        # With `include_usage`, the last chunk has figures and an empty list of choices.
        if isinstance(chunk.get("usage"), dict):
            answer.usage = read_usage(chunk["usage"])
        text = reasoning = ""
        for choice in dict_items(chunk, "choices"):
            if choice.get("index") in (0, None):
                more_text, more_reasoning = self._read_choice(choice, "delta")
                text, reasoning = text + more_text, reasoning + more_reasoning
        return text, reasoning

    def read_body(self, payload: dict[str, Any]) -> None:
        """Read a completion that came in one piece."""
        choices = dict_items(payload, "choices")
        if is_error_object(payload) or not choices:
            raise AnswerFailedError(payload)
        self.answer.model = name_value(payload.get("model"))
        self.answer.response_id = name_value(payload.get("id"))
        self.answer.usage = read_usage(payload.get("usage"))
        self.answer.text, _ = self._read_choice(choices[0], "message")
        self.is_complete = self.is_closed = True

    def _read_choice(self, choice: dict[str, Any], member: str) -> tuple[str, str]:
        # OpenRouter puts an upstream error into the choice, beside `finish_reason: error`.
        if is_error_object(choice):
            raise AnswerFailedError(choice)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            if not self.answer.end(reason):
                raise AnswerFailedError(failed_ending(reason))
            # Usage may still follow, so this completes the answer but does not close the stream.
            self.is_complete = True
        delta = choice.get(member)
        if not isinstance(delta, dict):
            return "", ""
        # The older `function_call` has the same members as a call's `function`.
        for call in [*dict_items(delta, "tool_calls"), {"function": delta.get("function_call")}]:
            function = call.get("function")
            if isinstance(function, dict) and (called := name_value(function.get("name"))):
                self.answer.tool_calls.append(called)
        refusal = text_value(delta.get("refusal"))
        self.answer.refused |= bool(refusal)
        # DeepSeek and vLLM send `reasoning_content`, OpenRouter and Ollama `reasoning`.
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        return _content(delta.get("content")) + refusal, text_value(reasoning)


def _content(value: object) -> str:
    """Return the text of a message: a string, or a list of parts as some servers send it."""
    if isinstance(value, list):
        return "".join(text_value(part.get("text")) for part in value if isinstance(part, dict))
    return text_value(value)
