"""Reads the answers of both APIs, as events or in one piece. Performs no I/O.

Events are read as plain dictionaries: building the SDK's pydantic objects takes three quarters of
its 86 to 130 µs per event (measured with openai 3.54).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from nbcodex.models import StreamPosition, Usage
from nbcodex.openai_api import answers, dialects, pricing
from nbcodex.openai_api.answers import RawAnswer, count_value, dict_member, text_value
from nbcodex.openai_api.api_errors import AnswerFailedError, broken_connection
from nbcodex.openai_api.rate_limits import dicts_in

# Event types of OpenAI's reference "Streaming events" of the Responses API.
_REFUSAL_DELTA = "response.refusal.delta"  # of the text by which the model declines to answer
_TEXT_DELTAS = {"response.output_text.delta", _REFUSAL_DELTA}
_REASONING_DELTAS = {"response.reasoning_summary_text.delta", "response.reasoning_text.delta"}
_DONE_TEXTS = {"response.output_text.done", "response.refusal.done", "response.content_part.done"}
_FINAL_EVENTS = {"response.completed", "response.incomplete", "response.done"}

TextAndReasoning = tuple[str, str]  # what an event, or a part of an answer, adds

# Special tokens with which chat templates end a turn; some servers leave them in the text.
_SPECIAL_TOKENS = rf"(?:(?:{'|'.join(map(re.escape, dialects.WORDS['special_tokens']))})\s*)"
_POSSIBLE_ENDING = re.compile(rf"{_SPECIAL_TOKENS}*(?:<[^<>\n]{{0,30}})?\Z")  # also half a token
_MAX_ENDING_CHARS = 200  # a search in a long text would take quadratic time
_ENDING_TOKENS = re.compile(rf"{_SPECIAL_TOKENS}+\Z")

# The id becomes a part of a URL's path: it must not contain anything that changes the path.
_SAFE_ID = re.compile(r"[A-Za-z0-9][\w.:-]{0,199}", re.ASCII)


@dataclass(slots=True, kw_only=True)
class _Reader:
    """The state of reading one answer, of either API."""

    answer: RawAnswer = field(default_factory=RawAnswer)
    position: StreamPosition | None = None  # from where a durable answer can be continued
    is_complete: bool = False  # the answer is whole; its usage may still follow
    may_be_complete: bool = False  # it stated how it ended beside a text: more may follow
    is_closed: bool = False  # nothing of interest follows
    lacks_ending: bool = False  # it came to its end, but does not state how
    accepts_missing_ending: bool = False  # whether that is complete; else the stream is broken
    has_restarted: bool = False  # the answer replaces the deltas, which began anew
    reasoning_chars: int = 0  # of the reasoning in members of its own (Chat Completions)

    def _read_content(self, value: object) -> TextAndReasoning:
        """Return the text and the reasoning of a message's content, a string or a list of parts."""
        if isinstance(value, dict):  # the answer itself, in Cloudflare's JSON mode
            return json.dumps(value, ensure_ascii=False), ""
        if not isinstance(value, list):
            return value if isinstance(value, str) else "", ""
        text = reasoning = ""
        for part in value:
            if not isinstance(part, dict):
                text += text_value(part)
                continue
            self.answer.add_sources(part.get("annotations"))
            self.answer.add_image(part)
            refusal = text_value(part.get("refusal"))
            self.answer.declined |= bool(refusal)
            inner = dict_member(part, "text").get("value") or part.get("text")
            more, _ = self._read_content(part.get("thinking") or inner or part.get("summary"))
            # Of Magistral, Databricks and vLLM.
            if part.get("type") in ("thinking", "reasoning", "reasoning_text"):
                reasoning += more
            else:
                text += more + refusal
        return text, reasoning


@dataclass(slots=True, kw_only=True)
class ResponsesReader(_Reader):
    """Reads answers of the Responses API; `durable` if the server was asked to store them."""

    durable: bool = False
    _has_reasoning: bool = False
    _items: list[dict[str, Any]] = field(default_factory=list)  # output items; {} if only begun
    # Whole texts, by the indexes of their output item and content part.
    _done_texts: dict[tuple[object, object], str] = field(default_factory=dict)
    # Output indexes of the messages that come before the answer, and are shown as reasoning.
    _commentary: set[int | None] = field(default_factory=set)

    def read_event(self, name: str, data: str) -> TextAndReasoning:
        """Return the text and the reasoning that an event adds."""
        if data == "[DONE]":
            self.is_closed = True
            self.read_end()
            return "", ""
        event = answers.json_object(data)
        number = count_value(event, "sequence_number")
        last_number = self.position.sequence if self.position else None
        # A server that ignores `starting_after` repeats the events from the first one.
        if number is not None and last_number is not None and number <= last_number:
            return "", ""
        added = self._read(event, name)
        if self.position and number is not None:
            self.position = StreamPosition(self.position.response_id, number)
        return added

    def read_body(self, payload: dict[str, Any]) -> None:
        """Read an answer that came in one piece."""
        self._identify(payload)
        is_generated = payload.get("status") not in {"queued", "in_progress"}
        if is_generated and not {"output", "output_text"} & {*payload}:
            raise AnswerFailedError(payload)
        self._finish(payload)
        parts = [
            text_value(part.get("text"))
            for item in self.answer.reasoning
            for part in dicts_in(item.get("summary")) + dicts_in(item.get("content"))
        ]
        self.answer.reasoning_text = "\n\n".join(filter(None, [*parts, self.answer.reasoning_text]))

    def read_end(self) -> None:
        """Decide, at the end of the body, whether the answer is whole."""
        # OpenRouter may omit `response.completed` (moeru-ai/airi#2589); a durable one is resumed.
        last = self._items[-1] if self._items else {}
        is_final = last.get("type") == "message" and last.get("phase") != "commentary"
        if is_final and last.get("status") == "completed" and self.position is None:
            self._finish(response={})

    def _read(self, event: dict[str, Any], name: str) -> TextAndReasoning:
        event_type = event.get("type") or name
        if self.is_complete and event_type != "response.created":
            return "", ""
        indexes = (count_value(event, "output_index"), count_value(event, "content_index"))
        is_commentary = indexes[0] in self._commentary
        if event_type in _TEXT_DELTAS:
            self.answer.declined |= event_type == _REFUSAL_DELTA
            delta = value if isinstance(value := event.get("delta"), str) else ""
            if self.has_restarted and not is_commentary:
                self._done_texts[indexes] = self._done_texts.get(indexes, "") + delta
            return ("", delta) if is_commentary else (delta, "")
        if event_type in _REASONING_DELTAS:
            self._has_reasoning = True
            return "", text_value(event.get("delta"))
        # Summaries come in parts without a separator.
        if event_type == "response.reasoning_summary_part.added" and self._has_reasoning:
            return "", "\n\n"
        response, item = dict_member(event, "response"), dict_member(event, "item")
        is_error = answers.is_error_object(event) and "response" not in event
        if event_type in _FINAL_EVENTS:
            self._finish(response, event_type)
            # An agent's server runs the function itself: the next response has the answer.
            self.is_closed = not self.answer.tool_calls
        elif event_type == "response.created" and self.answer.response_id:
            # A relay asked again (mnfst/llm-gateway#2072), or the answer to a call follows.
            self.answer = RawAnswer(usage=self.answer.usage)
            self._items, self._done_texts, self._commentary = [], {}, set()
            self.has_restarted, self.is_complete = True, False
            self._identify(response)
        elif event_type == "response.output_item.added":
            self._items.append({})
            if item.get("phase") == "commentary":
                self._commentary.add(indexes[0])
        elif event_type == "response.output_item.done":
            self._items.append(item)
            self._read_items([item], response={})
        elif event_type == "response.output_text.annotation.added":
            self.answer.add_sources([event.get("annotation")])
        elif event_type in {"response.failed", "response.cancelled"}:
            # Azure sends `response.failed` without a reason, then an `error` event with it.
            self._read_usage(response)
            raise AnswerFailedError(event, is_final=bool(response.get("error")))
        elif "error" in (event_type, name) or is_error or "choices" in event:  # of Chat
            raise AnswerFailedError(event)
        elif event_type in _DONE_TEXTS and not is_commentary:
            self._done_texts[indexes], _ = self._read_content([dict_member(event, "part") or event])
        elif response:
            self._identify(response)
        return "", ""

    def _identify(self, response: dict[str, Any]) -> None:
        self.answer.model = answers.name_value(response.get("model")) or self.answer.model
        self.answer.response_id = answers.name_value(response.get("id")) or self.answer.response_id
        id_ = safe_response_id(response.get("id"))
        # A server that does not know `background` ignores it, and would not have the answer later.
        if self.durable and self.position is None and id_ and response.get("background") is True:
            self.position = StreamPosition(id_)

    def _read_usage(self, response: dict[str, Any]) -> None:
        usage = answers.read_usage(response.get("usage"), response.get("service_tier"))
        earlier = self.answer.usage  # of an answer that this one replaces
        self.answer.usage = usage if earlier == Usage() else earlier + usage

    def _finish(self, response: dict[str, Any], event_type: str = "") -> None:
        self._read_usage(response)
        if answers.is_error_object(response):
            raise AnswerFailedError(response)
        status = "incomplete" if event_type == "response.incomplete" else None
        status = status or response.get("status") or "completed"
        if status in ("queued", "in_progress"):
            raise broken_connection("The answer is still being generated.")
        self._identify(response)
        answer, output = self.answer, dicts_in(response.get("output"))
        reason = dict_member(response, "incomplete_details").get("reason")
        if not (answer.read_ending(reason) or answer.read_ending(status)):
            answer.cut = answers.CUT_NO_ENDING
        if output:
            answer.tool_calls, answer.tool_arguments, answer.hosted_tool_calls = [], [], ()
            self._read_items(output, response)
        # Some compatible servers leave out the type of a message, or all items in the final event.
        items = output or ([] if self.position else self._items)
        answer.reasoning = [item for item in items if item.get("type") == "reasoning"]
        messages = [item for item in items if item.get("type") in ("message", None)]
        if any(message.get("status") == "incomplete" for message in messages):
            answer.read_ending("max_output_tokens")
        commentary: list[str] = []
        texts: list[str] = []
        for message in messages:
            text, _ = self._read_content(message.get("content"))
            (commentary if message.get("phase") == "commentary" else texts).append(text)
        text, answer.reasoning_text = "".join(texts), "\n\n".join(commentary)
        if not text:
            text, answer.reasoning_text = answer.reasoning_text, ""
        if not (text or self.position):
            text = "".join(self._done_texts.values())
        answer.text = text or text_value(response.get("output_text"))
        self.is_complete = self.is_closed = True

    def _read_items(self, items: list[dict[str, Any]], response: dict[str, Any]) -> None:
        """Add the pictures and the calls among output items; `response` may count the latter."""
        for item in items:
            item_type = item.get("type")
            if item_type == "image_generation_call":  # OpenAI's guide to image generation
                self.answer.add_image(item.get("result"))
            elif item_type in dialects.WORDS["client_calls"]:
                name = item.get("name") or str(item_type).removesuffix("_call")
                self.answer.add_call(name, item.get("arguments"))
        if len(self.answer.hosted_tool_calls) < answers.MAX_HOSTED_TOOL_CALLS:
            self.answer.hosted_tool_calls += _read_hosted_calls(items, response)


@dataclass(slots=True, kw_only=True)
class ChatReader(_Reader):
    """Reads the chunks of Chat Completions."""

    _unrecognized_chunk: dict[str, Any] | None = None  # the last one without choices and usage
    _service_tier: object = None
    _has_choices: bool | None = None  # None before the first chunk
    # Where a choice can have its text: some servers put a message into a chunk, a delta into a
    # body, or the text of the older API into both. Only the first one with a text is read on.
    _text_members: tuple[str, ...] = ("delta", "message", "text")
    _first_reasoning: str = ""  # the first delta of it
    _has_snapshots: bool = False  # whether later ones repeat those before
    _has_ending: bool = False
    _has_text_after_ending: bool = False

    def read_event(self, name: str, data: str) -> TextAndReasoning:
        """Return the text and the reasoning that an event adds."""
        if data == "[DONE]":
            # It ends the stream, not the answer: llama-cpp-python sends it when another request
            # interrupts this one. Only a finish_reason makes an answer complete.
            self.is_closed = True
            self.read_end(is_marked=True)
            return "", ""
        chunk = answers.json_object(data)
        if name == "error":
            raise AnswerFailedError(chunk)
        if "choices" not in chunk and "usage" not in chunk:
            self._unrecognized_chunk = chunk
        return self._read(chunk)

    def read_body(self, payload: dict[str, Any]) -> None:
        """Read an answer that came in one piece."""
        # OpenRouter's can be nested in a member (pydantic/pydantic-ai#3994).
        payloads = [payload, *dicts_in([*payload.values()])]
        payload = next((p for p in payloads if dicts_in(p.get("choices"))), payload)
        # The answer to a blocked prompt has no error, but `choices: null`.
        if not dicts_in(payload.get("choices")) and payload.get("choices", True):
            raise AnswerFailedError(payload)
        text, self.answer.reasoning_text = self._read(payload)
        self.answer.text, self.is_closed = text_value(text), True
        self.read_end(is_marked=True)
        if not self.is_complete:
            raise broken_connection("The answer does not state that it is complete.")

    def read_end(self, *, is_marked: bool = False) -> None:
        """Decide at the end whether the answer is whole; ``[DONE]`` may have marked the end."""
        has_usage = bool(self.answer.usage.output_tokens)
        if self.may_be_complete or (self._has_ending and (is_marked or has_usage)):
            self.is_complete = True
        elif self._unrecognized_chunk and not self.is_complete:
            raise AnswerFailedError(self._unrecognized_chunk)
        elif is_marked and (has_usage or self._has_choices is False):
            self.lacks_ending, self.is_complete = True, self.accepts_missing_ending
            self.answer.cut = answers.CUT_NO_ENDING

    def _read(self, payload: dict[str, Any]) -> TextAndReasoning:
        if answers.is_error_object(payload):
            raise AnswerFailedError(payload)
        answer, choices = self.answer, dicts_in(payload.get("choices"))
        if answer.model is None:
            answer.model = answers.name_value(payload.get("model"))
            answer.response_id = answers.name_value(payload.get("id"))
        self._service_tier = payload.get("service_tier") or self._service_tier
        # With `include_usage`, the last chunk has the usage and an empty list of choices.
        # Groq's usage is in `x_groq`, Moonshot's in the choice; others send it in parts.
        groq = dict_member(payload, "x_groq")
        for part in (groq, *choices, payload):
            if isinstance(part.get("usage"), dict):
                usage = answers.read_usage(part["usage"], self._service_tier)
                answer.usage = answers.merge_usage(answer.usage, usage)
        if timings := dict_member(payload, "timings"):  # llama.cpp
            read_tokens = sum(count_value(timings, name) or 0 for name in ("prompt_n", "cache_n"))
            counted = {"input_tokens": read_tokens, "output_tokens": timings.get("predicted_n")}
            answer.usage = answers.merge_usage(answers.read_usage(counted), answer.usage)
        # The text refers to `citations` by number; `search_results` has their titles.
        answer.add_sources(payload.get("citations"))
        answer.add_sources(payload.get("search_results"))
        if "choices" in payload:
            self._has_choices = bool(choices or self._has_choices)
        # The only one. Its index can be a token's (huggingface/text-generation-inference#1648).
        choice = choices[0] if choices else {}
        # OpenRouter puts an upstream error into the choice, beside `finish_reason: error`.
        if answers.is_error_object(choice):
            raise AnswerFailedError(choice, is_final=False)
        is_ending = False
        for part in (payload, choice):
            is_ending |= answer.read_ending(part.get("finish_reason") or part.get("finishReason"))
        text, reasoning = self._read_choice(choice)
        # Some servers state an ending in each chunk (BerriAI/litellm#2195). One beside or before a
        # text does not complete the answer: `read_end` decides. After others, usage may follow.
        if text or reasoning:
            self._has_text_after_ending |= self._has_ending
            self.is_complete = False
        elif not self._has_text_after_ending:
            self.is_complete |= is_ending or (self._has_ending and "usage" in payload)
        self._has_ending |= is_ending
        self.may_be_complete = self._has_ending and not self._has_text_after_ending
        return text, reasoning

    def _read_choice(self, choice: dict[str, Any]) -> TextAndReasoning:
        for name in self._text_members:
            message = choice.get(name)
            if isinstance(message, str):
                message = {"content": message}
            text, reasoning = self._read_message(message) if isinstance(message, dict) else ("", "")
            if text or reasoning:
                self._text_members = (name,)
                return text, reasoning
        return "", ""

    def _read_message(self, message: dict[str, Any]) -> TextAndReasoning:
        answer = self.answer
        # The older `function_call` has the same members as a call's `function`.
        old_call = {"function": message.get("function_call")}
        for call in [*dicts_in(message.get("tool_calls")), old_call]:
            function = dict_member(call, "function")
            # Only the first delta of a call has its id, and a name if the server gives one.
            default_name = "a function" if call.get("id") and not answer.tool_calls else None
            answer.add_call(function.get("name") or default_name, function.get("arguments"))
        answer.add_sources(message.get("annotations"))
        images = message.get("images")
        for image in images if isinstance(images, list) else []:
            answer.add_image(image)
        refusal = text_value(message.get("refusal"))
        answer.declined |= bool(refusal)
        audio = dict_member(message, "audio").get("transcript")
        content = message.get("content") or message.get("parsed") or audio
        text, reasoning = self._read_content(content)
        reasonings = filter(None, map(message.get, dialects.WORDS["reasoning_members"]))
        more, _ = self._read_content(next(reasonings, None))
        # Snapshots of all the reasoning so far instead of deltas (MiniMax, can1357/oh-my-pi#2434).
        first, chars = self._first_reasoning, self.reasoning_chars
        is_longer = len(more) > chars - self._has_snapshots  # or one of them again
        if is_longer and len(first.strip()) > 1 and more.startswith(first):
            self._has_snapshots, more = True, more[chars:]
        self._first_reasoning = self._first_reasoning or more
        self.reasoning_chars += len(more)
        if message.get("reasoning_content"):
            answer.reasoning_content.append(more)
        return text + refusal, text_value(reasoning + more)


AnswerReader = ResponsesReader | ChatReader


def safe_response_id(value: object) -> str | None:
    """Return an answer's id if it is safe in a URL's path, else None."""
    return value if isinstance(value, str) and _SAFE_ID.fullmatch(value) else None


def _read_hosted_calls(items: list[dict[str, Any]], response: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the paid tools that were called, one for each call."""
    # A web search also opens pages, which is not charged.
    free = ("open_page", "find_in_page")
    charged = [item for item in items if dict_member(item, "action").get("type") not in free]
    names = [name for item in charged if (name := pricing.paid_tool(item.get("type")))]
    # OpenAI's own count, since 2026, leaves out searches that it does not charge for.
    web_search = dict_member(dict_member(response, "tool_usage"), "web_search")
    if (searches := count_value(web_search, "num_requests")) is not None:
        names = [name for name in names if name != "web_search"]
        names += ["web_search"] * min(searches, answers.MAX_HOSTED_TOOL_CALLS)
    return tuple(names)


class ReasoningSplitter:
    """Separates the reasoning that local models put before an answer, as ``<think>…</think>``."""

    def __init__(self, server_kind: str) -> None:
        # `server_kind` is `Endpoint.kind`: OpenAI's answers have no such tags.
        # Some chat templates open the tag in the prompt, so that only the closing tag is in the
        # text: then all text before it was reasoning, and this is true until the next call.
        self.has_restarted = False
        self._tail = ""  # held back: it may be the beginning of a tag
        self._special_tokens = ""  # held back, too: they are dropped at the end of the answer
        self._closing_tag = ""  # the tag that ends the reasoning; empty outside of it
        self._has_tags = self._is_undecided = server_kind != "openai"  # an opening tag may follow
        self._may_be_unopened = server_kind == "compatible"  # a closing tag may come without one
        self._possible_reasoning: list[str] = []  # the text so far
        self._last_char, self._backticks = "", 0  # of `_possible_reasoning`

    def feed(self, more: str) -> TextAndReasoning:
        """Return the text and the reasoning that are certain so far."""
        self.has_restarted = False
        text, reasoning = self._split(more)
        if not self._has_tags:
            return text, reasoning
        if not self.has_restarted:
            text = self._special_tokens + text
        found = _POSSIBLE_ENDING.search(text, max(0, len(text) - _MAX_ENDING_CHARS))
        self._special_tokens = found[0] if found else ""
        return text.removesuffix(self._special_tokens), reasoning

    def flush(self) -> TextAndReasoning:
        """Return what was held back, at the end of the text, but no special token."""
        tail, self._tail = self._tail, ""
        text, self._special_tokens = _ENDING_TOKENS.sub("", self._special_tokens), ""
        return (text, tail) if self._closing_tag else (text + tail, "")

    def _split(self, more: str) -> TextAndReasoning:
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
            rest, more_reasoning = self._split(text)
            return rest, reasoning + more_reasoning
        return self._find_unopened(text) if self._may_be_unopened else (text, "")

    def _find_unopened(self, text: str) -> TextAndReasoning:
        # A tag is whole in `text`, because its beginning would have been held back. Few deltas
        # contain a tag's first character, and the others cost little.
        tags = {close: tag for tag, close in dialects.REASONING_TAGS.items() if close[0] in text}
        for tag, opening in tags.items():
            backticks, counted_to = self._backticks, 0
            for found in re.finditer(re.escape(tag), text):
                at = found.start()
                backticks += text.count("`", counted_to, at)
                counted_to, char = at, text[at - 1] if at else self._last_char
                # Answers about such tags have them in code, quotes, or between spaces; a model that
                # ends its reasoning begins a line, or writes the tag right after its last word.
                is_ending = char in ("", "\n", ".", "!", "?", "…") or char.isalnum()
                if not is_ending or backticks % 2:
                    continue
                before = "".join([*self._possible_reasoning, text[:at]])
                self._may_be_unopened = False
                if opening in before:  # it closes a tag that the answer contains
                    return text, ""
                self._is_undecided = True
                answer, reasoning = self._split(text[found.end() :])
                self.has_restarted = True
                return answer, before + reasoning
        text = self._hold_back(text, [*tags]) if tags else text
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


def split_reasoning(text: str, server_kind: str) -> TextAndReasoning:
    """Return the text and the reasoning of a whole answer."""
    splitter = ReasoningSplitter(server_kind)
    answer, reasoning = splitter.feed(text)
    more, more_reasoning = splitter.flush()
    return answer + more, reasoning + more_reasoning
