"""What an attempt yields, and the answer it ends in.

Owns the stream events, the usage figures and the rule which answers are successes. Everything comes
from a server: each value is checked for its type, cut, and cleaned of our secrets.
"""

from __future__ import annotations

import contextlib
import json
import re
from base64 import b64decode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any
from unicodedata import category

from nbcodex import models
from nbcodex.errors import AnswerError, shorten
from nbcodex.models import CONTENT_FILTER, Image, Source, StreamPosition, Usage
from nbcodex.openai_api.api_errors import AnswerFailedError
from nbcodex.openai_api.dialects import WORDS, bare, has_code
from nbcodex.openai_api.pricing import IMAGE_TOOL
from nbcodex.openai_api.rate_limits import parse_number

# Of tokens, events or requests: twice the longest context window. More would use up any budget.
MAX_PLAUSIBLE_COUNT = 20_000_000
MAX_STATED_COST = 1e4  # US dollars for one request; more is not believed
MAX_REASONING_CHARS = 1_000_000  # of the reasoning that the next turn can send back
MAX_SOURCES, MAX_URL_CHARS = 100, 2000  # of the web pages that an answer cites
MAX_IMAGES = 100  # of one answer
MAX_HOSTED_TOOL_CALLS = 1_000  # of one answer; more are not believed
MAX_ARGUMENT_DELTAS = 100_000  # of the arguments of all calls of one answer

NOTE_EMPTY = "the answer is empty"  # in the line of figures

# Values of `CompletedAnswer.cut`: the request's bound on the output, our own bound (the setting
# `max_answer`), and a function call. Others are CONTENT_FILTER and endings that we do not know.
CUT_MAX_OUTPUT, CUT_MAX_ANSWER, CUT_TOOL_CALLS = "max_output_tokens", "max_answer", "tool_calls"
CUT_NO_ENDING = "no finish reason"
_CUT_BY_ENDINGS = {
    "max_output_endings": CUT_MAX_OUTPUT,
    "filter_endings": CONTENT_FILTER,
    "tool_endings": CUT_TOOL_CALLS,
}

# What the Responses API accepts of a reasoning item in its input (openai 3.54,
# ResponseReasoningItemParam), and the member of DeepSeek's messages in Chat Completions.
_REASONING_FIELDS = ("type", "id", "summary", "encrypted_content", "reasoning_content")

# Unicode categories of characters that show nothing: control, format, surrogate and separator.
_BLANK = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"})

MASK = "[secret]"  # stands where a text contained one
MIN_SECRET_CHARS = 8  # a shorter string occurs by chance, and no provider's keys are that short

# Keys that users set where a local server requires any key at all: answers may contain them.
_PLACEHOLDERS = "lm-studio not-needed not-used no-key-required sk-no-key-required anything"


@dataclass(frozen=True, slots=True)
class ResponseStarted:
    """The server accepted the request: its headers are there, and the answer begins."""

    api: str  # "responses" or "chat"
    model: str | None  # as requested
    snapshot: models.LimitSnapshot
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
    """Something about the answer that the user should know."""

    text: str


@dataclass(frozen=True, slots=True)
class CompletedAnswer:
    """The finished answer."""

    text: str  # all the deltas joined
    usage: Usage  # the server's figures; unknown where the connection was lost after the last delta
    model: str | None  # the model that answered, as the server names it
    cut: str | None  # why the answer ends early
    response_id: str | None  # the server's id of the answer
    reasoning: tuple[dict[str, Any], ...] = ()  # what the next turn can send back of it
    images: tuple[Image, ...] = ()
    is_reasoning: bool = False  # all the text came as reasoning, and none as the answer
    declined: bool = False  # the model itself declined to answer
    simulated: bool = False  # only set for batches: for a stream, `ResponseStarted` states it
    tool_calls: tuple[str, ...] = ()  # the names of the functions that the model asked to call
    sources: tuple[Source, ...] = ()  # the web pages that the answer cites


# A `StreamPosition` states where a durable answer continues; it follows the text before it at once,
# so that both can be stored together. The first comes before any text and has only the id.
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
    reasoning_text: str = ""  # to show; of a stream, once it has ended
    reasoning: list[dict[str, Any]] = field(default_factory=list)  # items for the next turn
    reasoning_content: list[str] = field(default_factory=list)  # deltas of DeepSeek's member
    images: list[Image] = field(default_factory=list)
    declined: bool = False
    tool_calls: list[str] = field(default_factory=list)
    tool_arguments: list[str] = field(default_factory=list)  # deltas of their JSON
    hosted_tool_calls: tuple[str, ...] = ()  # names of paid tools that the provider ran
    sources: dict[str, str] = field(default_factory=dict)  # titles of web pages by their URL

    def add_call(self, name: object, arguments: object) -> None:
        """Add a function that the model asks to call, or more of its arguments."""
        if called := name_value(name):
            self.tool_calls.append(called)
        if arguments and len(self.tool_arguments) < MAX_ARGUMENT_DELTAS:
            self.tool_arguments.append(text_value(arguments))

    def add_image(self, value: object) -> None:
        """Add a picture: base64, a data URL, or an object with one; its bytes decide its type."""
        for name in ("image_url", "url", "b64_json"):
            value = value.get(name, value) if isinstance(value, dict) else value
        with contextlib.suppress(ValueError):
            image = Image.from_bytes(b64decode(text_value(value).rpartition(",")[2], validate=True))
            # The final event repeats those before.
            if image and len(self.images) < MAX_IMAGES and image not in self.images:
                self.images.append(image)

    def add_sources(self, listed: object) -> None:
        """Add the web pages that a provider lists as citations."""
        # OpenAI and OpenRouter send annotations of type ``url_citation``, nested in Chat
        # Completions; Perplexity ``search_results``; Perplexity and xAI also plain addresses.
        for item in listed if isinstance(listed, list) else []:
            page = item if isinstance(item, dict) else {"url": item}
            page = dict_member(page, "url_citation") or page
            url, title = text_value(page.get("url")), name_value(page.get("title"))
            is_page = url.lower().startswith(("https://", "http://"))
            if is_page and len(url) <= MAX_URL_CHARS and len(self.sources) < MAX_SOURCES:
                self.sources[url] = self.sources.get(url) or title or ""

    def read_ending(self, reason: object) -> bool:
        """Set `cut` by the stated reason of the end, if any; return whether there is one."""
        if not isinstance(reason, str):
            return False
        # Google's enum has a prefix: ``FINISH_REASON_STOP``.
        name = bare(reason.strip()).removeprefix("finishreason")
        if has_code([name], "absent_endings"):
            return False
        known = (cut for endings, cut in _CUT_BY_ENDINGS.items() if has_code([name], endings))
        cut = next(known, shorten(reason, 100))
        if cut not in _CUT_BY_ENDINGS.values() and has_code([name], "failed_endings"):
            raise failed_answer_error(cut)
        # The first ending that is not normal counts.
        if not self.cut and not has_code([name], "normal_endings"):
            self.cut = cut
        return True

    @property
    def is_unusable(self) -> bool:
        """Whether it ended in a way that is not known, with no call and no picture."""
        known = (None, *_CUT_BY_ENDINGS.values(), CUT_MAX_ANSWER, CUT_NO_ENDING)
        return self.cut not in known and not (self.tool_calls or self.images)

    def completed(
        self, text: str, redactor: Redactor, request: models.Request, server_kind: str
    ) -> CompletedAnswer:
        """Return the answer without secrets; `text` has been cleaned as it arrived."""
        # Some compatible servers call an ending normal that is a cut (openclaw/openclaw#142778).
        is_at_bound = 0 < (self.usage.output_tokens or 0) == request.max_output
        if server_kind == "compatible" and is_at_bound:
            self.cut = self.cut or CUT_MAX_OUTPUT
        clean, schema = redactor.clean, request.schema
        # Bedrock and LiteLLM answer a schema by calling a function with one of these names.
        other_calls = {*self.tool_calls} - {"json_tool_call", schema and schema.name}
        if schema and self.tool_calls and not (other_calls or text):
            text = clean("".join(self.tool_arguments))
            self.tool_calls = []
            self.cut = None if self.cut == CUT_TOOL_CALLS else self.cut
        # Where thinking is off, a server's reasoning parser can take the answer for reasoning.
        is_bare = not (text.strip() or self.images or self.tool_calls)
        is_reasoning = is_bare and self.cut in (None, CUT_NO_ENDING) and self.reasoning_text != ""
        reasoning, remaining_chars = [], MAX_REASONING_CHARS
        chat_item = {"reasoning_content": text_value("".join(self.reasoning_content))}
        for item in [*self.reasoning, chat_item]:
            kept = {name: item[name] for name in _REASONING_FIELDS if name in item}
            encoded = json.dumps(kept)
            remaining_chars -= len(encoded)
            is_useful = item.get("encrypted_content") or item.get("reasoning_content")
            # The server accepts only what it sent: an item that contains a secret is left out.
            if is_useful and remaining_chars >= 0 and clean(encoded) == encoded:
                reasoning.append(kept)
        # Each picture is charged besides the tokens, even if the answer does not list its call.
        unlisted_images = len(self.images) - self.hosted_tool_calls.count(IMAGE_TOOL)
        hosted_calls = self.hosted_tool_calls + (IMAGE_TOOL,) * unlisted_images
        return CompletedAnswer(
            text=clean(self.reasoning_text) if is_reasoning else text,
            is_reasoning=is_reasoning,
            usage=replace(self.usage, hosted_tool_calls=hosted_calls[:MAX_HOSTED_TOOL_CALLS]),
            model=clean(self.model) if self.model else None,
            cut=clean(self.cut) if self.cut else None,
            response_id=clean(self.response_id) if self.response_id else None,
            reasoning=tuple(reasoning),
            images=tuple(self.images),
            declined=self.declined,
            tool_calls=tuple(map(clean, self.tool_calls)),
            sources=tuple(Source(clean(url), clean(title)) for url, title in self.sources.items()),
        )


def failed_answer_error(ending: str) -> AnswerFailedError:
    """Return the error for an answer with this ending; not final, because its usage may follow."""
    message = f'the server ended the answer with "{ending}"'
    return AnswerFailedError({"error": {"message": message}}, is_final=False)


def judge(answer: CompletedAnswer) -> None:
    """Raise an AnswerError if an answer is empty, or neither the model nor a limit ended it."""
    # Broken and failed answers never get here, nor does an attempt without text whose ending is not
    # known, unless the one before was the same: they are retried. What fails here is charged, and
    # the same request would end in the same way: no other place decides that an answer failed.
    text = answer.text.strip()
    # `isprintable` is False for characters that are newer than this Python, such as an emoji.
    is_empty = not answer.images and all(category(c) in _BLANK for c in text)
    is_call = any(re.fullmatch(p, text, re.DOTALL) for p in WORDS["tool_call_texts"])
    if answer.cut == CUT_TOOL_CALLS or answer.tool_calls or is_call:
        names = shorten(", ".join(answer.tool_calls) or "a function", 100)
        raise AnswerError(
            f"The model asked to call {names} instead of answering; nothing was called.",
            advice="nbcodex does not call functions: leave out any tools, or ask for words alone.",
            note="the model asked for a function call",
        )
    if answer.cut == CONTENT_FILTER:
        part = "the answer" if is_empty else "the rest of the answer"
        raise AnswerError(
            f"The provider's content filter withheld {part}.", advice="Rephrase the prompt."
        )
    if answer.cut == CUT_NO_ENDING and is_empty:
        raise AnswerError(
            "The server sent no answer: the provider has probably blocked the request.",
            advice="Rephrase the prompt, or use another model.",
            note=NOTE_EMPTY,
        )
    if answer.cut not in (None, CUT_MAX_OUTPUT, CUT_MAX_ANSWER):
        reason = f'The answer ended with "{answer.cut}", which is not known as a complete ending.'
        if answer.cut == CUT_NO_ENDING:
            reason = "The server did not state how the answer ended."
        kept = "Ask again, or rephrase the prompt" if is_empty else "The text so far is kept"
        raise AnswerError(reason, advice=f"{kept}; the server's log may say why it ended.")
    if answer.is_reasoning and not is_empty:
        raise AnswerError(
            "All the text came as reasoning and none as the answer; it is kept as the text.",
            advice="Switch thinking on, correct the server's reasoning parser, or send it again.",
            note="all the text came as reasoning",
        )
    if not is_empty:
        return
    reason = "the model ended it without any text"
    advice = "Send it again, or change the prompt; --effort and --max-output can matter, too."
    if answer.cut == CUT_MAX_OUTPUT:
        output, reasoning = answer.usage.output_tokens, answer.usage.reasoning_tokens
        count = f"{output:,} output tokens" if output else "output tokens"
        reason = f"the {count} {'went into reasoning' if reasoning or output else 'were used up'}"
        advice = "Raise --max-output if it is set, lower --effort, or shorten the prompt."
    raise AnswerError(f"The answer is empty: {reason}.", advice=advice, note=NOTE_EMPTY)


def read_usage(figures: object, service_tier: object = None) -> Usage:
    """Return the token figures of either API; implausible ones are unknown."""
    if not isinstance(figures, dict):
        return Usage()
    # Source: ``usage`` in OpenAI's references of Responses and of Chat Completions.
    of_input = dict_member(figures, "input_tokens_details", "prompt_tokens_details")
    of_output = dict_member(figures, "output_tokens_details", "completion_tokens_details")
    # Names of OpenAI, DeepSeek, and Anthropic's (also through LiteLLM).
    cache_figures = figures | {n: v for n, v in of_input.items() if v or n not in figures}
    input_tokens = count_value(figures, "input_tokens", "prompt_tokens")
    output_tokens = count_value(figures, "output_tokens", "completion_tokens")
    total = count_value(figures, "total_tokens")
    reasoning_tokens = count_value(figures | of_output, "reasoning_tokens")
    if output_tokens is not None:
        # Gemini's and xAI's output lacks the reasoning, which only the total contains.
        if total is not None and input_tokens is not None:
            pages = count_value(figures, "citation_tokens") or 0  # Perplexity's, which are not text
            output_tokens = max(output_tokens, total - input_tokens - pages)
        # Perplexity's lacks it as well, and so does the total.
        if reasoning_tokens is not None and reasoning_tokens > output_tokens:
            output_tokens += reasoning_tokens
    return Usage(
        input_tokens=input_tokens,
        cached_tokens=count_value(
            cache_figures, "cached_tokens", "prompt_cache_hit_tokens", "cache_read_input_tokens"
        ),
        cache_written_tokens=count_value(
            cache_figures, "cache_write_tokens", "cache_creation_input_tokens"
        ),
        output_tokens=output_tokens,
        reasoning_tokens=reasoning_tokens,
        input_audio_tokens=count_value(of_input, "audio_tokens") or None,
        output_audio_tokens=count_value(of_output, "audio_tokens") or None,
        service_tier=name_value(service_tier),  # the one that was really used decides the price
        stated_cost=_stated_cost(figures),
    )


def _stated_cost(figures: dict[str, Any]) -> float | None:
    cost = figures.get("cost", figures.get("estimated_cost"))  # OpenRouter, DeepInfra
    if isinstance(cost, dict):
        cost = cost.get("total_cost")  # Perplexity
    stated = plausible_cost(cost)
    if stated is None:  # xAI
        return plausible_cost(figures.get("cost_in_usd_ticks"), units_per_dollar=1e10) or None
    # On a user's own key, OpenRouter's `cost` is its fee alone.
    if figures.get("is_byok"):
        details = dict_member(figures, "cost_details")
        return stated + (plausible_cost(details.get("upstream_inference_cost")) or 0.0)
    return stated


def plausible_cost(value: object, units_per_dollar: float = 1.0) -> float | None:
    """Return the cost of one request in US dollars; None if it is absurd."""
    number = parse_number(value)
    if number is None or number / units_per_dollar >= MAX_STATED_COST:
        return None
    return number / units_per_dollar


def merge_usage(earlier: Usage, later: Usage) -> Usage:
    """Return the figures of two parts of a stream: the later ones, unless they are 0 or unknown."""
    values = ((each.name, getattr(later, each.name)) for each in fields(later))
    known = {n: v for n, v in values if v or (v is not None and getattr(earlier, n) is None)}
    return replace(earlier, **known)


def count_value(payload: Mapping[str, Any], *names: str) -> int | None:
    """Return the largest of some members that are plausible counts."""
    # A gateway can state 0 beside the figure under another name (BerriAI/litellm#11789).
    numbers = map(parse_number, map(payload.get, names))
    counts = [int(number) for number in numbers if number is not None and number.is_integer()]
    return max((count for count in counts if count <= MAX_PLAUSIBLE_COUNT), default=None)


def text_value(value: object) -> str:
    """Return a string with its lone surrogates, which cannot be encoded, replaced; else ""."""
    if not isinstance(value, str):
        return ""
    whole, half = whole_characters(value)
    return f"{whole}\ufffd" if half else whole


def whole_characters(text: str) -> tuple[str, str]:
    """Return a text that can be encoded, and the first half of a surrogate pair at its end."""
    # Servers that stream token by token can send the two halves in two deltas.
    half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
    text = text.removesuffix(half)
    if not text.isascii():
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text, half


def name_value(value: object) -> str | None:
    """Return a string, cut to one short line; None for an empty one, or for another type."""
    return (shorten(value, 100) or None) if isinstance(value, str) else None


def dict_member(payload: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the first of some members that is an object; {} if there is none."""
    return next((payload[name] for name in names if isinstance(payload.get(name), dict)), {})


def is_error_object(payload: Mapping[str, Any]) -> bool:
    """Whether an object of a successful response describes an error after all."""
    # MiniMax states an error in `base_resp`, beside `choices: null`.
    if payload.get("type") == "error" or dict_member(payload, "base_resp").get("status_code"):
        return True
    # OpenAI's is ``error``; gateways also send ``error_code`` and such (earendil-works/pi#8462).
    # Beside an answer, an error can be 0, or an object whose members are all empty.
    values = [v for name, v in payload.items() if name.startswith(("error", "Error"))]
    stated = [any(v.values()) if isinstance(v, dict) else bool(v) for v in values]
    return any(stated) and not any(v in (0, "0") and v is not False for v in values)


def json_object(data: str) -> dict[str, Any]:
    """Return a JSON object, or raise a ValueError or RecursionError."""
    payload = json.loads(data)
    if not isinstance(payload, dict):
        raise ValueError("not an object")  # noqa: TRY004 - handled like any other invalid JSON
    return payload


def effective_secrets(secrets: Iterable[str]) -> list[str]:
    """Return the secrets but for placeholders and those that are too short, the longest first."""
    words = _PLACEHOLDERS.split()
    kept = {s for s in secrets if len(s) >= MIN_SECRET_CHARS and s.lower() not in words}
    return sorted(kept, key=len, reverse=True)


class Redactor:
    """Replaces secrets in one text: a server may echo our key anywhere, split over deltas."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self.secrets = effective_secrets(secrets)
        # A longer secret stands first, so that it wins over one that is its prefix.
        self._pattern = re.compile("|".join(map(re.escape, self.secrets)) or r"(?!)")
        self.tail = ""  # what is held back: it may be the beginning of a secret

    def clean(self, text: str) -> str:
        """Return a whole text without the secrets."""
        return self._pattern.sub(MASK, text)

    def feed(self, text: str) -> str:
        """Return what can be shown of the text so far and was not returned before."""
        text = self.tail + text
        safe_end = len(text)  # no secret begins before it and goes on after the text
        for secret in self.secrets:
            at = text.find(secret[0], max(0, len(text) - len(secret) + 1))
            while at >= 0 and not secret.startswith(text[at:]):
                at = text.find(secret[0], at + 1)
            if at >= 0:
                safe_end = min(safe_end, at)
        if safe_end < len(text):
            # A match that reaches over this end is held back whole, else its first half is shown.
            matches = self._pattern.finditer(text)
            crossing = (m.start() for m in matches if m.start() < safe_end < m.end())
            safe_end = next(crossing, safe_end)
        self.tail = text[safe_end:]
        return self.clean(text[:safe_end])

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        text, self.tail = self.tail, ""
        return self.clean(text)
