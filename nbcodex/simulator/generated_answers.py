"""Makes up answers from the prompt; the same prompt always gets the same answer.

Directives in the prompt control the answer: ``[[tokens=800]]`` sets its length, ``[[echo: text]]``
(at the end of the prompt) its text, ``[[fault=stalled]]`` or ``[[fault=failed after=3]]`` the
fault of each attempt. Does not know HTTP or how an answer is sent.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from nbcodex.simulator.error_responses import ErrorResponse
from nbcodex.simulator.faults import Fault, parse_fault
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.parsed_request import IMAGE_TOKENS, ParsedRequest

# Part of every answer except echoes and JSON.
SIMULATED_NOTICE = "*This is a simulated answer: no model was asked.*"


_TOKENS = re.compile(r"[ \n]?\S{1,5}|\s")
_DIRECTIVE = re.compile(r"\[\[(tokens|fault)=([^\]]*)\]\]")
_ECHO = re.compile(r"\[\[echo: ?(.*)\]\]", re.DOTALL)
_WORD = re.compile(r"[^\W_]{1,24}")
_SENTENCES = """ A limit counts tokens and requests apart, and either can run out first.
The reset in the headers is the time until the bucket is full, not the time to wait.
What is cached still counts towards the limit, though it costs less.
Two notebooks on one key share one bucket, even if neither knows of the other.
An answer that broke off can be asked for again; its prompt must not be lost meanwhile.
A short prompt with a large bound on its output takes as much of the bucket as a long one.
A user who waits should see for how long, and should be able to stop.
Jitter only ever lengthens a wait, so no request is sent too early.
A day's limit refills as steadily as a minute's, only a thousand times more slowly.
The first request finds the bucket full, and may spend all of it at once.
"""
_REASONING_TOKENS = {"minimal": 16, "low": 64, "medium": 256, "high": 1_024, "xhigh": 4_096}

_ANSWER_TEMPLATE = """\
# {title}

{mark}

You asked about {topic}.{earlier} Three things are worth knowing:

- The bucket holds **one minute** of tokens and refills all the time.
- A refused request counts as a request, so waiting is cheaper than trying.
- The server says how long to wait; do not try again sooner.

```python
def wait(used: int, requested: int, limit: int) -> float:
    \"\"\"Seconds until the bucket holds what is asked for.\"\"\"
    return max(0.0, (used + requested - limit) / limit * 60)


print(f"{{wait({used}, {requested}, 30_000):.3f}} s")
```
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPlan:
    """The complete answer to one request, computed before anything is sent."""

    # input_tokens, max_output: input tokens, and the output that admission charges.
    input_tokens: int
    max_output: int
    reasoning: int  # reasoning tokens before the first text token
    tokens: tuple[str, ...]  # the text, token by token
    truncated: bool  # whether `max_output` truncates it
    latency: float  # seconds from admission to the first token
    fault: Fault | None  # the fault that the prompt requests

    @property
    def output_tokens(self) -> int:
        """All tokens of the output, reasoning included."""
        return self.reasoning + len(self.tokens)

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.tokens)


def plan_answer(request: ParsedRequest, knobs: Knobs) -> AnswerPlan:
    """Return the answer to `request`. Pure, so that benchmarks can compute it too."""
    reasoning = _REASONING_TOKENS.get(request.effort or "", 256 if request.effort else 0)
    tokens = _answer_tokens(request)
    room = request.max_output if request.max_output is not None else knobs.context
    return AnswerPlan(
        input_tokens=count_tokens(request.text, knobs) + IMAGE_TOKENS * request.images,
        max_output=knobs.assumed_output if request.max_output is None else request.max_output,
        reasoning=min(reasoning, room),
        tokens=tokens[: max(0, room - reasoning)],
        truncated=reasoning + len(tokens) > room,
        latency=latency(request.text, knobs),
        fault=_requested_fault(request.prompt),
    )


def count_tokens(text: str, knobs: Knobs) -> int:
    """Return the number of tokens that the server counts for `text`."""
    return max(1, round(len(text) / 4 * knobs.token_bias))


def latency(text: str, knobs: Knobs) -> float:
    """Return the seconds from admission to the first token for an input of `text`."""
    if not knobs.latency_sigma:
        return knobs.latency
    chance = random.Random(f"{knobs.seed}:{text}")  # noqa: S311 - chance, not secrecy
    return knobs.latency * chance.lognormvariate(0, knobs.latency_sigma)


def tokenize(text: str) -> tuple[str, ...]:
    """Split `text` into tokens whose concatenation is `text`."""
    return tuple(_TOKENS.findall(text))


_FILLER = tuple(tokenize(sentence) for sentence in _SENTENCES.splitlines())


def _answer_tokens(request: ParsedRequest) -> tuple[str, ...]:
    if echo := _ECHO.search(request.prompt):
        return tokenize(echo[1])
    if request.wants_image:
        return ()
    if request.schema is not None:
        return tokenize(json.dumps(example_value(request.schema), ensure_ascii=False))
    return _made_up_tokens(request.prompt, request.turns[-2] if len(request.turns) > 1 else "")


@lru_cache(maxsize=256)
def _made_up_tokens(prompt: str, earlier: str) -> tuple[str, ...]:
    """Return an answer with heading, list and code, in the length that the prompt requests."""
    digest = blake2b(prompt.encode("utf-8", "replace"), digest_size=8).digest()
    chance = random.Random(digest)  # noqa: S311 - chance, not secrecy
    shape = tokenize(_formatted_answer(prompt, earlier, chance))
    length = _requested_length(prompt)
    if length is None:
        return (*shape, *_filler(1, chance))
    head = shape if len(shape) <= length else tokenize(f"{SIMULATED_NOTICE}\n")
    filler = _filler(length - len(head), chance)
    return (*head, *filler)[: max(0, length - 1)] + (".",) * min(length, 1)


def _formatted_answer(prompt: str, earlier: str, chance: random.Random) -> str:
    topic = _topic(prompt)
    return _ANSWER_TEMPLATE.format(
        title=topic[:1].upper() + topic[1:],
        mark=SIMULATED_NOTICE,
        topic=f"*{topic}*",
        earlier=f" Before that, it was *{_topic(earlier)}*." if earlier else "",
        used=chance.randrange(20_000, 30_000),
        requested=chance.randrange(10_000, 20_000),
    )


def _topic(prompt: str) -> str:
    """Return the first words of the prompt without Markdown syntax."""
    words = _WORD.findall(_ECHO.sub("", _DIRECTIVE.sub("", prompt)))
    return " ".join(words[:8]) + (" …" * (len(words) > 8)) or "nothing"


def _filler(length: int, chance: random.Random) -> list[str]:
    """Return at least `length` tokens of true sentences about rate limits."""
    tokens = ["\n", *chance.choice(_FILLER)]
    while len(tokens) < length:
        tokens += [" ", *chance.choice(_FILLER)]
    return tokens


def _requested_length(prompt: str) -> int | None:
    for name, value in _DIRECTIVE.findall(prompt):
        if name == "tokens" and value.isdecimal():
            return int(value)
    return None


def _requested_fault(prompt: str) -> Fault | None:
    """Return the fault that the prompt requests.

    Raises
    ------
    ErrorResponse
        400 if there is no such fault.
    """
    for name, value in _DIRECTIVE.findall(prompt):
        if name == "fault":
            try:
                kind, *fields = value.split()
                numbers = {k: json.loads(v) for k, _, v in (f.partition("=") for f in fields)}
                return parse_fault({"kind": kind, **numbers})
            except ValueError as exc:
                raise ErrorResponse(400, f"[[fault={value}]] is not a valid fault: {exc}") from exc
    return None


MAX_LIST_DEPTH = 6


def example_value(
    schema: Mapping[str, Any], root: Mapping[str, Any] | None = None, depth: int = 0
) -> Any:
    """Return a value that fits the JSON schema `schema`.

    Lists below `MAX_LIST_DEPTH` levels are empty, so that recursive schemas terminate.
    """
    root = schema if root is None else root

    def within(part: Mapping[str, Any]) -> Any:
        return example_value(part, root, depth + 1)

    match schema:
        case _ if depth > 2 * MAX_LIST_DEPTH or not isinstance(schema, Mapping):
            return None
        case {"const": value} | {"enum": [value, *_]}:
            return value
        case {"$ref": str(ref)}:
            return within(_resolve(ref, root))
        case {"anyOf": [first, *_]} | {"oneOf": [first, *_]} | {"allOf": [first, *_]}:
            return within(first)
        case {"type": [first, *_]}:
            return within({**schema, "type": first})
        case {"type": "array"}:
            return [within(schema.get("items", {}))] * 2 if depth < MAX_LIST_DEPTH else []
        case {"type": "string"}:
            return "simulated"
        case {"type": "integer" | "number"}:
            return schema.get("minimum", 1)
        case {"type": "boolean"}:
            return True
        case {"type": "null"}:
            return None
        case _:
            given = schema.get("properties")
            fields = given if isinstance(given, Mapping) else {"simulated": {"const": True}}
            return {name: within(field) for name, field in fields.items()}


def _resolve(ref: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of `root` that `ref` names; an empty schema where there is none."""
    found: Any = root
    for step in filter(None, ref.removeprefix("#").split("/")):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}
