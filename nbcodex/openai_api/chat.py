"""Reads the answers of Chat Completions, in chunks or in one piece. Pure."""

from __future__ import annotations

from typing import Any

from nbcodex.models import StreamPosition
from nbcodex.openai_api.answers import (
    RawAnswer,
    dict_items,
    json_object,
    name_value,
    read_usage,
    text_value,
)
from nbcodex.openai_api.api_errors import AnswerFailedError

# OpenAI ends with "stop"; the others are endings of compatible servers (TGI, Anthropic's endpoint).
_NORMAL_ENDINGS = {"stop", "eos", "eos_token", "end_turn", "stop_sequence"}
_CUT_REASONS = {"length": "max_output_tokens", "max_tokens": "max_output_tokens"}


class ChatReader:
    """Reads the chunks of Chat Completions."""

    def __init__(self) -> None:
        self.answer = RawAnswer()
        self.mark: StreamPosition | None = None  # only the Responses API has durable answers
        self.is_complete = self.is_closed = False

    def read_event(self, name: str, data: str) -> tuple[str, str]:
        """Return the text and the reasoning that a chunk adds."""
        if data == "[DONE]":
            self.is_complete = self.is_closed = True
            return "", ""
        chunk = json_object(data)
        if chunk.get("error") or name == "error" or chunk.get("type") == "error":
            raise AnswerFailedError(chunk)
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
        if payload.get("error") or not choices:
            raise AnswerFailedError(payload)
        self.answer.model = name_value(payload.get("model"))
        self.answer.response_id = name_value(payload.get("id"))
        self.answer.usage = read_usage(payload.get("usage"))
        self.answer.text, _ = self._read_choice(choices[0], "message")
        self.is_complete = self.is_closed = True

    def _read_choice(self, choice: dict[str, Any], member: str) -> tuple[str, str]:
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            # Usage may still follow, so this completes the answer but does not close the stream.
            self.is_complete = True
            if reason not in _NORMAL_ENDINGS:
                self.answer.cut = _CUT_REASONS.get(reason) or name_value(reason)
        delta = choice.get(member)
        if not isinstance(delta, dict):
            return "", ""
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
