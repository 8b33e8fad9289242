"""What an attempt yields, and the answer it ends in.

Owns the stream events, the shapes of both APIs' answers and their usage figures. Everything in
them comes from a server, so each value is checked for its type and cut before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nbcodex.errors import AnswerError, shorten
from nbcodex.models import CONTENT_FILTER, Image, LimitSnapshot, StreamPosition, Usage
from nbcodex.openai_api import dialects
from nbcodex.openai_api.redaction import Redactor

MAX_PLAUSIBLE_TOKENS = 20_000_000  # twice the longest context; more would use up any budget
MAX_STATED_COST = 1e4  # US dollars for one request; more is not believed
MAX_REASONING_CHARS = 1_000_000  # of encrypted reasoning that goes along with the next turn

# Values of `cut`, besides CONTENT_FILTER and endings that are not known.
MAX_OUTPUT, MAX_ANSWER, TOOL_CALLS = "max_output_tokens", "max_answer", "tool_calls"

# What the Responses API accepts of a reasoning item in its input (openai 3.54,
# ResponseReasoningItemParam).
_REASONING_FIELDS = ("type", "id", "summary", "encrypted_content")


@dataclass(frozen=True, slots=True)
class ResponseStarted:
    """The server accepted the request: its headers are there, and the answer begins."""

    api: str  # "responses" or "chat"
    model: str | None  # as requested
    snapshot: LimitSnapshot
    simulated: bool
    request_id: str | None  # the server's


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the model's visible reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Reset:
    """The text that follows is the answer from its beginning, and replaces what came before."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that the reader of the answer should know."""

    text: str


@dataclass(frozen=True, slots=True)
class CompletedAnswer:
    """The finished answer; `text` is all the deltas joined."""

    text: str  # the answer
    usage: Usage  # the server's figures; unknown where the connection was lost after the last delta
    model: str | None  # the model that answered, as the server names it
    cut: str | None  # why the answer ends early
    response_id: str | None  # the server's id of the answer
    # Encrypted reasoning items, to be sent before the next turn's input.
    reasoning: tuple[dict[str, Any], ...] = ()
    images: tuple[Image, ...] = ()  # the pictures that the model made
    refused: bool = False  # whether the model refused to answer
    # Whether a batch file came from the simulator; for a stream, `ResponseStarted` says so.
    simulated: bool = False
    tool_calls: tuple[str, ...] = ()  # the names of the functions that the model asked to call


# A `StreamPosition` says where a durable answer continues, after all text that was yielded before
# it; between that text and its position the stream does not wait. The first one names the answer
# before its text.
StreamEvent = (
    ResponseStarted | StreamPosition | Reset | TextDelta | ReasoningDelta | Notice | CompletedAnswer
)


@dataclass(slots=True)
class RawAnswer:
    """An answer as a reader collects it: it may still contain a secret that the server echoed."""

    usage: Usage = field(default_factory=Usage)
    model: str | None = None
    cut: str | None = None
    response_id: str | None = None
    text: str = ""
    reasoning_text: str = ""  # of an answer in one piece
    reasoning: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    refused: bool = False
    tool_calls: list[str] = field(default_factory=list)

    def end(self, reason: str) -> bool:
        """Note how the server says that the answer ended; return False if that is a failure."""
        name = dialects.normal_ending(reason)
        if name in dialects.FAILED_ENDINGS:
            return False
        if self.cut:  # the first ending counts
            return True
        if name in dialects.MAX_OUTPUT_ENDINGS:
            self.cut = MAX_OUTPUT
        elif name in dialects.FILTER_ENDINGS:
            self.cut = CONTENT_FILTER
        elif name in dialects.TOOL_ENDINGS:
            self.cut = TOOL_CALLS
        elif name not in dialects.NORMAL_ENDINGS:
            self.cut = shorten(reason, 100)
        return True

    def completed(self, text: str, redactor: Redactor) -> CompletedAnswer:
        """Return the answer without secrets; `text` has been cleaned as it arrived."""
        return CompletedAnswer(
            text=text,
            usage=self.usage,
            model=redactor.clean(self.model) if self.model else None,
            cut=redactor.clean(self.cut) if self.cut else None,
            response_id=redactor.clean(self.response_id) if self.response_id else None,
            reasoning=tuple(_returnable_reasoning(self.reasoning, redactor)),
            images=tuple(self.images),
            refused=self.refused,
            tool_calls=tuple(redactor.clean(name) for name in self.tool_calls),
        )


def judge(answer: CompletedAnswer) -> None:
    """Raise an AnswerError unless an answer that has ended is a success.

    The only place that decides this, for both APIs: a success is not empty, and was ended by the
    model or cut by the output limit, the server's or our own. Broken and failed answers never get
    here; they are retried. What is refused here was generated and is charged: the same request
    would end the same way.
    """
    is_empty = not (answer.text.strip() or answer.images)
    if answer.cut == TOOL_CALLS or (answer.tool_calls and is_empty):
        names = shorten(", ".join(answer.tool_calls) or "a function", 100)
        raise AnswerError(
            f"The model asked to call {names} instead of answering; nothing was called.",
            advice="nbcodex does not call functions: leave out the tools, or tool_choice.",
        )
    if answer.cut == CONTENT_FILTER:
        part = "the answer" if is_empty else "the rest of the answer"
        raise AnswerError(
            f"The provider's content filter withheld {part}.", advice="Rephrase the prompt."
        )
    if answer.cut not in (None, MAX_OUTPUT, MAX_ANSWER):
        raise AnswerError(
            f'The answer ended with "{answer.cut}", which is not known as a complete ending.',
            advice="The text so far is kept; the server's log may say why it ended.",
        )
    if not is_empty:
        return
    if answer.cut == MAX_OUTPUT:
        output, reasoning = answer.usage.output_tokens, answer.usage.reasoning_tokens
        count = f"{output:,} output tokens" if output else "output tokens"
        where = "went into reasoning" if reasoning or output else "were used up"
        raise AnswerError(
            f"The answer is empty: the {count} {where}.",
            advice="Raise --max-output, or lower --effort.",
        )
    raise AnswerError(
        "The answer is empty: the model ended it without any text.",
        advice="Send it again, or change the prompt; --effort and --max-output can matter, too.",
    )


def _returnable_reasoning(
    items: Iterable[Mapping[str, Any]], redactor: Redactor
) -> Iterator[dict[str, Any]]:
    """Yield the reasoning items that can be sent back: encrypted, bounded, without a secret."""
    remaining = MAX_REASONING_CHARS
    for item in items:
        kept = {name: item[name] for name in _REASONING_FIELDS if name in item}
        text = json.dumps(kept)
        remaining -= len(text)
        if item.get("encrypted_content") and remaining >= 0 and redactor.clean(text) == text:
            yield kept


# Values of untrusted JSON.


def read_usage(figures: object, service_tier: object = None) -> Usage:
    """Return the token figures of either API; implausible ones are unknown.

    `service_tier` is the tier that was really used, which decides the price.

    Source: ``usage`` in OpenAI's references of Responses (``input_tokens``) and Chat Completions
    (``prompt_tokens``).
    """
    if not isinstance(figures, dict):
        return Usage()
    cached = _usage_detail(figures, "input", "prompt", "cached_tokens")
    if cached is None:
        cached = count_value(figures, "prompt_cache_hit_tokens", "cached_tokens")  # DeepSeek
    return Usage(
        input_tokens=_token_count(figures, "input_tokens", "prompt_tokens"),
        cached_tokens=cached,
        cache_written_tokens=_usage_detail(figures, "input", "prompt", "cache_write_tokens"),
        output_tokens=_token_count(figures, "output_tokens", "completion_tokens"),
        reasoning_tokens=_usage_detail(figures, "output", "completion", "reasoning_tokens"),
        service_tier=name_value(service_tier),
        stated_cost=_stated_cost(figures.get("cost")),
    )


def _token_count(figures: dict[str, Any], *names: str) -> int | None:
    count = count_value(figures, *names)
    return None if count is None or count > MAX_PLAUSIBLE_TOKENS else count


def _usage_detail(figures: dict[str, Any], *prefixes_and_name: str) -> int | None:
    *prefixes, name = prefixes_and_name
    for prefix in prefixes:
        details = figures.get(f"{prefix}_tokens_details")
        if isinstance(details, dict):
            return count_value(details, name)
    return None


def _stated_cost(cost: object) -> float | None:
    """Return the provider's own figure in US dollars: OpenRouter's number, Perplexity's object."""
    if isinstance(cost, dict):
        cost = cost.get("total_cost")
    if isinstance(cost, bool) or not isinstance(cost, int | float):
        return None
    return float(cost) if 0 <= cost < MAX_STATED_COST else None  # False for NaN


def count_value(payload: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of some members if it is a plausible count."""
    value = next((payload[name] for name in names if name in payload), None)
    # Above 2**53, the widgets' JavaScript loses digits.
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        return None
    return value


def text_value(value: object) -> str:
    """Return a string, with lone surrogates replaced: they cannot be encoded; else ""."""
    if not isinstance(value, str):
        return ""
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


def name_value(value: object) -> str | None:
    """Return a short one-line string, or None."""
    return (shorten(value, 100) or None) if isinstance(value, str) else None


def dict_items(payload: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the objects in a list member; other elements are left out."""
    found = payload.get(name)
    return [i for i in found if isinstance(i, dict)] if isinstance(found, list) else []


def is_error_object(payload: Mapping[str, Any]) -> bool:
    """Whether an object of a successful response describes an error after all.

    OpenAI's is ``error``; gateways also send ``error_code`` and the like (pi #8462).
    """
    if payload.get("type") == "error":
        return True
    return any(value for name, value in payload.items() if name.startswith(("error", "Error")))


def failed_ending(reason: str) -> dict[str, Any]:
    """Return the error object for an ending that says that the answer failed."""
    return {"error": {"message": f'the server ended the answer with "{shorten(reason, 100)}"'}}


def json_object(data: str) -> dict[str, Any]:
    """Return a JSON object, or raise a ValueError or RecursionError."""
    payload = json.loads(data)
    if not isinstance(payload, dict):
        raise ValueError("not an object")  # noqa: TRY004 - handled like any other invalid JSON
    return payload
