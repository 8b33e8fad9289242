"""Reads the answers of Chat Completions, in chunks or in one piece. Pure.

Also finds the reasoning that local models put into the text of either API.
"""

from __future__ import annotations

import json
from typing import Any

from nbcodex.models import StreamPosition
from nbcodex.openai_api import dialects
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
from nbcodex.openai_api.responses import images_of_urls


class ChatReader:
    """Reads the chunks of Chat Completions."""

    def __init__(self) -> None:
        self.answer = RawAnswer()
        self.position: StreamPosition | None = None  # only the Responses API has durable answers
        self.is_complete = self.is_closed = False
        self._unrecognized: dict[str, Any] | None = None
        self._service_tier: object = None

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
        self._service_tier = chunk.get("service_tier") or self._service_tier
        # With `include_usage`, the last chunk has figures and an empty list of choices.
        if isinstance(chunk.get("usage"), dict):
            answer.usage = read_usage(chunk["usage"], self._service_tier)
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
        self.answer.usage = read_usage(payload.get("usage"), payload.get("service_tier"))
        self.answer.text, self.answer.reasoning_text = self._read_choice(choices[0], "message")
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
        # OpenRouter's pictures, as data URLs.
        self.answer.images += images_of_urls(dict_items(delta, "images"))
        refusal = text_value(delta.get("refusal"))
        self.answer.refused |= bool(refusal)
        # DeepSeek and vLLM send `reasoning_content`, OpenRouter and Ollama `reasoning`.
        text, reasoning = _content(delta.get("content"))
        more, _ = _content(delta.get("reasoning_content") or delta.get("reasoning"))
        return text + refusal, reasoning + more


def _content(value: object) -> tuple[str, str]:
    """Return the text and the reasoning of a message's content.

    It is a string; a list of parts, of which Magistral's are also of type ``thinking``; or, with
    Cloudflare's JSON mode, the JSON object itself.
    """
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False), ""
    if not isinstance(value, list):
        return text_value(value), ""
    text = reasoning = ""
    for part in value:
        if not isinstance(part, dict):
            text += text_value(part)
        elif part.get("type") == "thinking":
            more, _ = _content(part.get("thinking"))
            reasoning += more
        else:
            text += text_value(part.get("text"))
    return text, reasoning


class ReasoningSplitter:
    """Separates ``<think>…</think>`` at the beginning of a text from the answer after it.

    Tags can be split over chunks. Some chat templates open the tag in the prompt, so that only the
    closing tag is in the text: then what came before it was reasoning, and `has_restarted` is true
    until the next call. A tag within code or quotes is part of the answer.
    """

    def __init__(self) -> None:
        self.has_restarted = False
        self._held = ""
        self._closing = ""  # the tag that ends the reasoning; empty outside of it
        self._is_undecided = self._may_be_unopened = True
        self._before: list[str] = []  # the text so far, while it may turn out to be reasoning
        self._last, self._backticks = "", 0

    def feed(self, more: str) -> tuple[str, str]:
        """Return the text and the reasoning that are certain so far."""
        self.has_restarted = False
        if not more or not (self._is_undecided or self._closing or self._may_be_unopened):
            return more, ""
        text, reasoning = self._held + more, ""
        self._held = ""
        if self._is_undecided:
            text = text.lstrip()
            for opening, closing in dialects.REASONING_TAGS.items():
                if text.startswith(opening):
                    text, self._closing = text.removeprefix(opening), closing
                    self._is_undecided = self._may_be_unopened = False
                    break
                if opening.startswith(text):
                    self._held = text
                    return "", ""
            self._is_undecided = False
        if self._closing:
            reasoning, found, text = text.partition(self._closing)
            if found:
                self._closing, self._is_undecided = "", True
                rest, again = self.feed(text)
                return rest, reasoning + again
            return "", self._hold_back(reasoning, [self._closing])
        if not self._may_be_unopened:
            return text, reasoning
        return self._find_unopened(text)

    def flush(self) -> tuple[str, str]:
        """Return what was held back; the text has ended."""
        held, self._held = self._held, ""
        return ("", held) if self._closing else (held, "")

    def _find_unopened(self, text: str) -> tuple[str, str]:
        # A tag is whole in `text`, because its beginning would have been held back.
        for tag in dialects.REASONING_TAGS.values():
            at = text.find(tag)
            while at >= 0:
                before = self._last + text[:at]
                if (self._backticks + text.count("`", 0, at)) % 2 == 0 and before[-1:] not in (
                    '"',
                    "'",
                ):
                    self._is_undecided, self._may_be_unopened = True, False
                    answer, more = self.feed(text[at + len(tag) :])
                    self.has_restarted = True
                    return answer, "".join([*self._before, text[:at], more])
                at = text.find(tag, at + 1)
        text = self._hold_back(text, list(dialects.REASONING_TAGS.values()))
        self._before.append(text)
        self._last, self._backticks = text[-1:] or self._last, self._backticks + text.count("`")
        return text, ""

    def _hold_back(self, text: str, tags: list[str]) -> str:
        """Return a text without the tail that may be the beginning of a tag."""
        for size in range(min(len(text), max(map(len, tags)) - 1), 0, -1):
            if any(tag.startswith(text[-size:]) for tag in tags):
                self._held = text[-size:]
                return text[:-size]
        return text


def split_reasoning(text: str) -> tuple[str, str]:
    """Return the text and the reasoning of a whole answer."""
    splitter = ReasoningSplitter()
    answer, reasoning = splitter.feed(text)
    more, more_reasoning = splitter.flush()
    return answer + more, reasoning + more_reasoning
