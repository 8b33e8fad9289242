"""Generates an answer from the prompt; the same prompt always gets the same answer.

Directives in the prompt control the answer: ``[[tokens=800]]`` sets its length, ``[[echo: text]]``
(at the end of the prompt) its text, ``[[fault=stalled]]`` or ``[[fault=failed after=3]]`` the
fault of each attempt.
"""

from __future__ import annotations

import json
import random
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from importlib.resources import files
from typing import Any

from nbcodex.simulator.http_messages import ErrorResponse
from nbcodex.simulator.knobs import Fault, Knobs, parse_fault
from nbcodex.simulator.parsed_request import IMAGE_TOKENS, ParsedRequest

# Part of every answer except echoes and JSON.
SIMULATED_NOTICE = "*This is a simulated answer: no model was asked.*"
# Lists nested deeper than this in an example value are empty, and at twice the depth all values are
# null, so that recursive schemas terminate.
MAX_LIST_DEPTH = 6
PICTURE_SIZE, SQUARE_SIZE = 96, 12  # in pixels: a side of a picture, and of a square of its pattern

# A token is a word of up to five characters with the space before it: about four characters on
# average, as `plan_answer` assumes for the input.
_TOKENS = re.compile(r"[ \n]?\S{1,5}|\s")
_DIRECTIVE = re.compile(r"\[\[(tokens|fault)=([^\]]*)\]\]")
_LENGTH = re.compile(r"\[\[tokens=(\d+)\]\]")
_ECHO = re.compile(r"\[\[echo: ?(.*)\]\]", re.DOTALL)
# Punctuation that is syntax of Markdown or HTML is left out.
_WORD = re.compile(r"(?:[^\W_]|[-'\u2019,;:.?!%()+]){1,24}")
# Text for the length that a prompt requests.
_SENTENCES = files("nbcodex.simulator").joinpath("sentences.txt").read_text("utf-8")
# Reasoning tokens by the reasoning effort of the request.
_REASONING_TOKENS = {"minimal": 16, "low": 64, "medium": 256, "high": 1_024, "xhigh": 4_096}

_ANSWER_TEMPLATE = files("nbcodex.simulator").joinpath("answer.md").read_text("utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPlan:
    """The complete answer to one request, computed before anything is sent."""

    input_tokens: int
    max_output: int  # output tokens that admission charges
    reasoning_tokens: int  # reasoning tokens before the first text token
    tokens: tuple[str, ...]  # the text, token by token
    function_name: str  # name of the function that the answer calls with the text as its arguments
    is_truncated: bool  # whether `max_output` truncates it
    latency: float  # seconds from admission to the first token

    @property
    def output_tokens(self) -> int:
        """All tokens of the output, reasoning included."""
        return self.reasoning_tokens + len(self.tokens)

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.tokens)


def plan_answer(request: ParsedRequest, knobs: Knobs) -> AnswerPlan:
    """Return the answer to `request`."""
    reasoning = _REASONING_TOKENS.get(request.effort or "", 256 if request.effort else 0)
    tokens = answer_tokens(request)
    allowed = request.max_output if request.max_output is not None else knobs.context
    input_tokens = max(1, round(len(request.text) / 4 * knobs.token_bias))
    return AnswerPlan(
        input_tokens=input_tokens + IMAGE_TOKENS * request.images,
        max_output=knobs.assumed_output if request.max_output is None else request.max_output,
        reasoning_tokens=min(reasoning, allowed),
        tokens=tokens[: max(0, allowed - reasoning)],
        function_name=str(request.required_function["name"]) if request.required_function else "",
        is_truncated=reasoning + len(tokens) > allowed,
        latency=latency(request.text, knobs),
    )


def answer_tokens(request: ParsedRequest) -> tuple[str, ...]:
    """Return the whole text of the answer, token by token; `plan_answer` cuts it."""
    if echo := _ECHO.search(request.prompt):
        return tokenize(echo[1])
    if request.wants_image:
        return ()
    function = request.required_function
    schema = request.schema if function is None else function.get("parameters") or {}
    if schema is not None:
        return tokenize(json.dumps(example_value(schema), ensure_ascii=False))
    earlier_prompt = request.turns[-2] if len(request.turns) > 1 else ""
    return _text_tokens(request.prompt, earlier_prompt)


def latency(text: str, knobs: Knobs) -> float:
    """Return the seconds from admission to the first token for an input of `text`."""
    if not knobs.latency_sigma:
        return knobs.latency
    rng = random.Random(f"{knobs.seed}:{text}")  # noqa: S311 - not for secrecy
    return knobs.latency * rng.lognormvariate(0, knobs.latency_sigma)


def tokenize(text: str) -> tuple[str, ...]:
    """Split `text` into tokens whose concatenation is `text`."""
    return tuple(_TOKENS.findall(text))


_TOKENIZED_SENTENCES = tuple(tokenize(sentence) for sentence in _SENTENCES.splitlines())


# Cached, because the answer is generated again for each attempt of a prompt.
@lru_cache(maxsize=256)
def _text_tokens(prompt: str, earlier_prompt: str) -> tuple[str, ...]:
    """Return an answer with heading, list and code, of the length that the prompt requests."""
    digest = blake2b(prompt.encode("utf-8", "replace"), digest_size=8).digest()
    rng = random.Random(digest)  # noqa: S311 - not for secrecy
    topic = _topic(prompt)
    text = _ANSWER_TEMPLATE.format(
        title=topic[:1].upper() + topic[1:],
        notice=SIMULATED_NOTICE,
        topic=f"*{topic}*",
        earlier=f" Before that, it was *{_topic(earlier_prompt)}*." if earlier_prompt else "",
        used=rng.randrange(20_000, 30_000),
        requested=rng.randrange(10_000, 20_000),
    )
    tokens = tokenize(text)
    if (requested := _LENGTH.search(prompt)) is None:
        return (*tokens, *_filler(rng, min_tokens=1))
    length = int(requested[1])
    if len(tokens) > length:
        tokens = tokenize(f"{SIMULATED_NOTICE}\n")
    tokens += tuple(_filler(rng, min_tokens=length - len(tokens)))
    return tokens[: max(0, length - 1)] + (".",) * min(length, 1)


def _topic(prompt: str) -> str:
    """Return the first words of the prompt without Markdown syntax."""
    words = _WORD.findall(_ECHO.sub("", _DIRECTIVE.sub("", prompt)))
    return (" ".join(words[:8]) + " …" * (len(words) > 8)).rstrip(".,;:") or "nothing"


def _filler(rng: random.Random, *, min_tokens: int) -> list[str]:
    """Return whole sentences about rate limits, of `min_tokens` tokens at least."""
    tokens = ["\n", *rng.choice(_TOKENIZED_SENTENCES)]
    while len(tokens) < min_tokens:
        tokens += [" ", *rng.choice(_TOKENIZED_SENTENCES)]
    return tokens


def requested_fault(prompt: str) -> Fault | None:
    """Return the fault that the prompt requests; raise a 400 if there is no such fault."""
    for name, value in _DIRECTIVE.findall(prompt):
        if name == "fault":
            try:
                kind, *fields = value.split()
                numbers = {k: json.loads(v) for k, _, v in (f.partition("=") for f in fields)}
                return parse_fault({"kind": kind, **numbers})
            except ValueError as exc:
                raise ErrorResponse(400, f"[[fault={value}]] is not a valid fault: {exc}") from exc
    return None


def example_value(
    schema: Mapping[str, Any], root: Mapping[str, Any] | None = None, depth: int = 0
) -> Any:
    """Return a value that fits the JSON schema `schema`, a part of the schema `root`."""
    root = schema if root is None else root
    inner_value = partial(example_value, root=root, depth=depth + 1)
    match schema:
        case _ if depth > 2 * MAX_LIST_DEPTH or not isinstance(schema, Mapping):
            return None
        case {"const": value} | {"enum": [value, *_]}:
            return value
        case {"$ref": str(ref)}:
            target: Any = root
            for step in filter(None, ref.removeprefix("#").split("/")):
                target = target.get(step) if isinstance(target, Mapping) else None
            return inner_value(target if isinstance(target, Mapping) else {})
        case {"anyOf": [first, *_]} | {"oneOf": [first, *_]} | {"allOf": [first, *_]}:
            return inner_value(first)
        case {"type": [first, *_]}:
            return inner_value({**schema, "type": first})
        case {"type": "array"}:
            return [inner_value(schema.get("items", {}))] * 2 if depth < MAX_LIST_DEPTH else []
        case {"type": "string"}:
            return "simulated"
        case {"type": "integer" | "number"}:
            return schema.get("minimum", 1)
        case {"type": "boolean"}:
            return True
        case {"type": "null"}:
            return None
        case _:
            properties = schema.get("properties")
            if not isinstance(properties, Mapping):
                properties = {"simulated": {"const": True}}
            return {name: inner_value(inner) for name, inner in properties.items()}


def png_pattern(prompt: str) -> bytes:
    """Return a PNG file: a symmetric pattern in two colours, both determined by the prompt."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    digest = blake2b(prompt.encode("utf-8", "replace"), digest_size=8).digest()
    light, dark = digest[:3], bytes(value // 3 for value in digest[3:6])
    squares = PICTURE_SIZE // SQUARE_SIZE
    rows = b""
    for y in range(squares):
        mirrored = (min(x, squares - 1 - x) for x in range(squares))
        colours = (light if digest[y % 8] >> x & 1 else dark for x in mirrored)
        # Each row of pixels begins with its filter type, and 0 means unfiltered.
        rows += (b"\0" + b"".join(colour * SQUARE_SIZE for colour in colours)) * SQUARE_SIZE
    header = struct.pack(">IIBBBBB", PICTURE_SIZE, PICTURE_SIZE, 8, 2, 0, 0, 0)  # 8 bits, RGB
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
