"""Reads the answers of both APIs, as events or in one piece. Performs no I/O.

Events are read as plain dictionaries: building the SDK's pydantic objects takes three quarters of
its 86 to 130 µs per event (measured with openai 3.54).
"""

from __future__ import annotations

import json
import re
from base64 import b64decode
from dataclasses import dataclass, field
from typing import Any

from nbcodex.models import Image, StreamPosition
from nbcodex.openai_api import dialects, pricing
from nbcodex.openai_api.answers import (
    MAX_HOSTED_TOOL_CALLS,
    RawAnswer,
    count_value,
    dict_items,
    dict_member,
    is_error_object,
    json_object,
    merge_usage,
    name_value,
    read_usage,
    text_value,
)
from nbcodex.openai_api.api_errors import AnswerFailedError, broken_connection

# Event types of OpenAI's reference "Streaming events" of the Responses API.
_REFUSAL_DELTA = "response.refusal.delta"
_TEXT_DELTAS = {"response.output_text.delta", _REFUSAL_DELTA}
_REASONING_DELTAS = {"response.reasoning_summary_text.delta", "response.reasoning_text.delta"}
_DONE_TEXTS = {"response.output_text.done": "text", "response.refusal.done": "refusal"}

# The id becomes a part of a URL's path: it must not contain anything that changes the path.
_SAFE_ID = re.compile(r"[A-Za-z0-9][\w.:-]{0,199}", re.ASCII)


@dataclass(slots=True, kw_only=True)
class _Reader:
    """The state of reading one answer, of either API."""

    answer: RawAnswer = field(default_factory=RawAnswer)
    position: StreamPosition | None = None  # from where a durable answer can be continued
    is_complete: bool = False  # the answer is whole; its usage may still follow
    is_closed: bool = False  # nothing of interest follows


@dataclass(slots=True, kw_only=True)
class ResponsesReader(_Reader):
    """Reads answers of the Responses API; `durable` if the server was asked to store them."""

    durable: bool = False
    _has_reasoning: bool = False

    def read_event(self, name: str, data: str) -> tuple[str, str]:
        """Return the text and the reasoning that an event adds."""
        if data == "[DONE]":
            self.is_closed = True
            return "", ""
        event = json_object(data)
        number = count_value(event, "sequence_number")
        last = self.position.sequence if self.position else None
        # A server that ignores `starting_after` repeats the events from the first one.
        if number is not None and last is not None and number <= last:
            return "", ""
        added = self._read(event, name)
        if self.position and number is not None:
            self.position = StreamPosition(self.position.response_id, number)
        return added

    def read_body(self, payload: dict[str, Any]) -> None:
        """Read an answer that came in one piece."""
        self._identify(payload)
        if payload.get("status") in {"queued", "in_progress"}:
            raise broken_connection("The answer is still being generated.")
        if not isinstance(payload.get("output"), list):
            raise AnswerFailedError(payload)
        self._finish(payload)
        parts = [
            text_value(part.get("text"))
            for item in self.answer.reasoning
            for part in dict_items(item, "summary") + dict_items(item, "content")
        ]
        self.answer.reasoning_text = "\n\n".join(filter(None, parts))

    def _read(self, event: dict[str, Any], name: str) -> tuple[str, str]:
        kind = event.get("type") or name
        if kind in _TEXT_DELTAS:
            self.answer.refused |= kind == _REFUSAL_DELTA
            delta = event.get("delta")
            return delta if isinstance(delta, str) else "", ""
        if kind in _REASONING_DELTAS:
            self._has_reasoning = True
            return "", text_value(event.get("delta"))
        # Summaries come in parts without a separator.
        if kind == "response.reasoning_summary_part.added" and self._has_reasoning:
            return "", "\n\n"
        response, item = dict_member(event, "response"), dict_member(event, "item")
        if kind in {"response.completed", "response.incomplete"}:
            self._finish(response, kind)
        elif kind == "response.output_item.done":
            images, calls = _read_items([item])
            self.answer.images += images
            self.answer.tool_calls += calls
            self.answer.hosted_tool_calls += _read_hosted_calls({}, [item])
        elif kind == "response.output_text.annotation.added":
            self.answer.add_sources([event.get("annotation")])
        elif kind in {"response.failed", "response.cancelled"}:
            # Azure sends `response.failed` without a reason, then an `error` event with it.
            raise AnswerFailedError(event, final=bool(response.get("error")))
        elif kind == "error" or (is_error_object(event) and "response" not in event):
            raise AnswerFailedError(event)
        elif kind in _DONE_TEXTS:
            self.answer.text += text_value(event.get(_DONE_TEXTS[kind]))
        elif response:
            self._identify(response)
        return "", ""

    def _identify(self, response: dict[str, Any]) -> None:
        self.answer.model = name_value(response.get("model")) or self.answer.model
        self.answer.response_id = name_value(response.get("id")) or self.answer.response_id
        id_ = safe_response_id(response.get("id"))
        # A server that does not know `background` ignores it, and would not have the answer later.
        if self.durable and self.position is None and id_ and response.get("background") is True:
            self.position = StreamPosition(id_)

    def _finish(self, response: dict[str, Any], kind: str = "") -> None:
        status = response.get("status")
        if is_error_object(response):
            raise AnswerFailedError(response)
        if status in ("failed", "cancelled"):
            self.answer.record_ending(status)
        self._identify(response)
        answer, output = self.answer, dict_items(response, "output")
        answer.usage = read_usage(response.get("usage"), response.get("service_tier"))
        # Some compatible servers leave out the type of a message.
        messages = [item for item in output if item.get("type") in ("message", None)]
        parts = [part for item in messages for part in dict_items(item, "content")]
        text = "".join(text_value(p.get("text")) + text_value(p.get("refusal")) for p in parts)
        # The final event repeats the whole text; the stream uses it only where no delta came.
        answer.text = text or answer.text
        answer.reasoning = [item for item in output if item.get("type") == "reasoning"]
        if output:
            answer.hosted_tool_calls = _read_hosted_calls(response, output)
        images, calls = _read_items(output)
        answer.images = images or answer.images
        answer.tool_calls = calls or answer.tool_calls
        for part in parts:
            answer.add_sources(part.get("annotations"))
        answer.refused |= any(part.get("refusal") for part in parts)
        if kind == "response.incomplete" or status == "incomplete":
            reason = dict_member(response, "incomplete_details").get("reason")
            answer.record_ending(name_value(reason) or "incomplete")
        self.is_complete = self.is_closed = True


@dataclass(slots=True, kw_only=True)
class ChatReader(_Reader):
    """Reads the chunks of Chat Completions."""

    _unrecognized: dict[str, Any] | None = None
    _service_tier: object = None

    def read_event(self, name: str, data: str) -> tuple[str, str]:
        """Return the text and the reasoning that an event adds."""
        if data == "[DONE]":
            # It ends the stream, not the answer: llama-cpp-python sends it when another request
            # interrupts this one. Only a finish_reason makes an answer complete.
            self.is_closed = True
            if self._unrecognized and not self.is_complete:
                raise AnswerFailedError(self._unrecognized)
            return "", ""
        chunk = json_object(data)
        if name == "error":
            raise AnswerFailedError(chunk)
        if "choices" not in chunk and "usage" not in chunk:
            self._unrecognized = chunk
        return self._read(chunk, "delta")

    def read_body(self, payload: dict[str, Any]) -> None:
        """Read an answer that came in one piece."""
        if not dict_items(payload, "choices"):
            raise AnswerFailedError(payload)
        self.answer.text, self.answer.reasoning_text = self._read(payload, "message")
        self.is_complete = self.is_closed = True

    def _read(self, payload: dict[str, Any], member: str) -> tuple[str, str]:
        if is_error_object(payload):
            raise AnswerFailedError(payload)
        answer = self.answer
        if answer.model is None:
            answer.model = name_value(payload.get("model"))
            answer.response_id = name_value(payload.get("id"))
        self._service_tier = payload.get("service_tier") or self._service_tier
        # With `include_usage`, the last chunk has the usage and an empty list of choices.
        # Groq's is in `x_groq`, Moonshot's in the choice; others send the figures in parts.
        groq = dict_member(payload, "x_groq")
        for part in (groq, *dict_items(payload, "choices"), payload):
            if isinstance(part.get("usage"), dict):
                usage = read_usage(part["usage"], self._service_tier)
                answer.usage = merge_usage(answer.usage, usage)
        if timings := dict_member(payload, "timings"):  # llama.cpp
            read_tokens = [count_value(timings, name) or 0 for name in ("prompt_n", "cache_n")]
            output_tokens = timings.get("predicted_n")
            counted = {"input_tokens": sum(read_tokens), "output_tokens": output_tokens}
            answer.usage = merge_usage(read_usage(counted), answer.usage)
        # The text refers to `citations` by number; `search_results` has their titles.
        answer.add_sources(payload.get("citations"))
        answer.add_sources(payload.get("search_results"))
        text = reasoning = ""
        for choice in dict_items(payload, "choices"):
            if choice.get("index") in (0, None):
                more_text, more_reasoning = self._read_choice(choice, member)
                text, reasoning = text + more_text, reasoning + more_reasoning
        return text, reasoning

    def _read_choice(self, choice: dict[str, Any], member: str) -> tuple[str, str]:
        # OpenRouter puts an upstream error into the choice, beside `finish_reason: error`.
        if is_error_object(choice):
            raise AnswerFailedError(choice)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.answer.record_ending(reason)
            # Usage may still follow, so this completes the answer but does not close the stream.
            self.is_complete = True
        delta = choice.get(member)
        if not isinstance(delta, dict):
            return "", ""
        # The older `function_call` has the same members as a call's `function`.
        for call in [*dict_items(delta, "tool_calls"), {"function": delta.get("function_call")}]:
            if called := name_value(dict_member(call, "function").get("name")):
                self.answer.tool_calls.append(called)
        self.answer.add_sources(delta.get("annotations"))
        # OpenRouter's images are data URLs in parts of type ``image_url``.
        for part in dict_items(delta, "images"):
            url = text_value(dict_member(part, "image_url").get("url"))
            if image := _read_image(url.partition(";base64,")[2]):
                self.answer.images.append(image)
        refusal = text_value(delta.get("refusal"))
        self.answer.refused |= bool(refusal)
        text, reasoning = _read_content(delta.get("content"))
        reasonings = filter(None, map(delta.get, dialects.WORDS["reasoning_members"]))
        more, _ = _read_content(next(reasonings, None))
        if delta.get("reasoning_content"):
            self.answer.reasoning_content.append(more)
        # A stream joins the surrogates of a pair that its deltas split; see `whole_characters`.
        text = text if member == "delta" else text_value(text)
        return text + refusal, text_value(reasoning + more)


AnswerReader = ResponsesReader | ChatReader


def safe_response_id(value: object) -> str | None:
    """Return an answer's id if it is safe in a URL's path, else None."""
    return value if isinstance(value, str) and _SAFE_ID.fullmatch(value) else None


def _read_items(items: list[dict[str, Any]]) -> tuple[list[Image], list[str]]:
    """Return the images and the names of the called functions among output items."""
    images, calls = [], []
    for item in items:
        match item.get("type"):
            case "image_generation_call":  # OpenAI's guide to image generation
                if image := _read_image(text_value(item.get("result"))):
                    images.append(image)
            case "function_call" | "custom_tool_call":
                calls.append(name_value(item.get("name")) or "a function")
            case "computer_call":  # of the user's computer, which nbcodex does not control
                calls.append("computer")
    return images, calls


def _read_hosted_calls(response: dict[str, Any], output: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the calls of paid tools in a response, a name for each."""
    names = []
    for item in output:
        # Of web search, only searches are charged.
        is_free = dict_member(item, "action").get("type") in ("open_page", "find_in_page")
        if (name := pricing.paid_tool(item.get("type"))) and not is_free:
            names.append(name)
    # OpenAI's own count, since 2026, leaves out searches that it does not charge for.
    web_search = dict_member(dict_member(response, "tool_usage"), "web_search")
    if (searches := count_value(web_search, "num_requests")) is not None:
        names = [name for name in names if name != "web_search"]
        names += ["web_search"] * min(searches, MAX_HOSTED_TOOL_CALLS)
    return tuple(names[:MAX_HOSTED_TOOL_CALLS])


def _read_image(encoded: str) -> Image | None:
    try:
        # The media type is taken from the bytes, because what the server states is not trusted.
        return Image.from_bytes(b64decode(encoded, validate=True))
    except ValueError:
        return None


def _read_content(value: object) -> tuple[str, str]:
    """Return the text and the reasoning of a message's content, a string or a list of parts."""
    if isinstance(value, dict):  # the answer itself, in Cloudflare's JSON mode
        return json.dumps(value, ensure_ascii=False), ""
    if not isinstance(value, list):
        return value if isinstance(value, str) else "", ""
    text = reasoning = ""
    for part in value:
        if not isinstance(part, dict):
            text += text_value(part)
        elif part.get("type") == "thinking":  # Magistral
            more, _ = _read_content(part.get("thinking"))
            reasoning += more
        else:
            text += text_value(part.get("text") or part.get("summary"))
    return text, reasoning


class ReasoningSplitter:
    """Separates the reasoning that local models put before an answer, as ``<think>…</think>``."""

    def __init__(self) -> None:
        # Some chat templates open the tag in the prompt, so that only the closing tag is in the
        # text: then all text before it was reasoning, and this is true until the next call.
        self.has_restarted = False
        self._tail = ""  # held back: it may be the beginning of a tag
        self._closing_tag = ""  # the tag that ends the reasoning; empty outside of it
        self._is_undecided = True  # whether an opening tag may come next
        self._may_be_unopened = True  # whether a closing tag may come without an opening one
        self._possible_reasoning: list[str] = []  # the text so far
        self._last_char, self._backticks = "", 0  # of `_possible_reasoning`

    def feed(self, more: str) -> tuple[str, str]:
        """Return the text and the reasoning that are certain so far."""
        self.has_restarted = False
        if not more or not (self._is_undecided or self._closing_tag or self._may_be_unopened):
            return more, ""
        text, self._tail = self._tail + more, ""
        if self._is_undecided:
            text = text.lstrip()
            for opening, closing in dialects.REASONING_TAGS.items():
                if text.startswith(opening):
                    text, self._closing_tag = text.removeprefix(opening), closing
                    self._may_be_unopened = False
                    break
                if opening.startswith(text):
                    self._tail = text
                    return "", ""
            self._is_undecided = False
        if self._closing_tag:
            reasoning, found, text = text.partition(self._closing_tag)
            if not found:
                return "", self._hold_back(reasoning, [self._closing_tag])
            # Another block of reasoning may follow.
            self._closing_tag, self._is_undecided = "", True
            rest, more_reasoning = self.feed(text)
            return rest, reasoning + more_reasoning
        return self._find_unopened(text) if self._may_be_unopened else (text, "")

    def flush(self) -> tuple[str, str]:
        """Return what was held back, at the end of the text."""
        tail, self._tail = self._tail, ""
        return ("", tail) if self._closing_tag else (tail, "")

    def _find_unopened(self, text: str) -> tuple[str, str]:
        # A tag is whole in `text`, because its beginning would have been held back. Few deltas
        # contain a tag's first character, and the others cost little.
        tags = [tag for tag in dialects.REASONING_TAGS.values() if tag[0] in text]
        for tag in tags:
            for found in re.finditer(re.escape(tag), text):
                at = found.start()
                backticks = self._backticks + text.count("`", 0, at)
                char_before = (self._last_char + text[:at])[-1:]
                if backticks % 2 or char_before in ('"', "'"):
                    continue  # a tag within code or quotes is part of the answer
                self._is_undecided, self._may_be_unopened = True, False
                answer, reasoning = self.feed(text[found.end() :])
                self.has_restarted = True
                return answer, "".join([*self._possible_reasoning, text[:at], reasoning])
        text = self._hold_back(text, tags) if tags else text
        self._possible_reasoning.append(text)
        self._last_char = text[-1:] or self._last_char
        self._backticks += text.count("`")
        return text, ""

    def _hold_back(self, text: str, tags: list[str]) -> str:
        """Return a text without the tail that may be the beginning of a tag."""
        for size in range(min(len(text), max(map(len, tags)) - 1), 0, -1):
            if any(tag.startswith(text[-size:]) for tag in tags):
                self._tail = text[-size:]
                return text[:-size]
        return text


def split_reasoning(text: str) -> tuple[str, str]:
    """Return the text and the reasoning of a whole answer."""
    splitter = ReasoningSplitter()
    answer, reasoning = splitter.feed(text)
    more, more_reasoning = splitter.flush()
    return answer + more, reasoning + more_reasoning
