"""What the server answers: text made up from the prompt, the same each time.

A prompt can say what it wants: ``[[tokens=800]]`` sets the length of the answer, ``[[echo: text]]``
(the last thing in the prompt) its very words, ``[[fault=stalled]]`` or ``[[fault=failed after=3]]``
what goes wrong at each attempt. Must not know HTTP, nor how an answer is sent.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from nbcodex.simulator.asked import IMAGE_TOKENS, Asked
from nbcodex.simulator.faults import Fault, read_fault
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.refusals import Failure
from nbcodex.simulator.schemas import example

MARK = "*This is a simulated answer: no model was asked.*"
"""The line that every answer holds, but for echoes and JSON."""

_TOKENS = re.compile(r"[ \n]?\S{1,5}|\s")
_DIRECTIVE = re.compile(r"\[\[(tokens|fault)=([^\]]*)\]\]")
_ECHO = re.compile(r"\[\[echo: ?(.*)\]\]", re.DOTALL)
_WORD = re.compile(r"[^\W_]{1,24}")
_SENTENCES = """ A limit counts tokens and requests apart, and either can run out first.
The reset in the headers is the time until the bucket is full, not the time to wait.
What is cached still counts towards the limit, though it costs less.
Two notebooks on one key share one bucket, whether or not they know of each other.
An answer that broke off can be asked for again; its prompt must not be lost meanwhile.
A short prompt with a large bound on its output takes as much of the bucket as a long one.
Whoever waits should see for how long, and should be able to stop.
Jitter only ever lengthens a wait: nobody gets in early.
A day's limit refills as steadily as a minute's, only a thousand times more slowly.
The first request finds the bucket full, and may spend all of it at once.
"""
_EFFORTS = {"minimal": 16, "low": 64, "medium": 256, "high": 1_024, "xhigh": 4_096}

_SHAPE = """\
# {title}

{mark}

You asked about {topic}.{earlier} Three things are worth knowing:

- The bucket holds **one minute** of tokens and refills all the time.
- A refused request counts as a request, so waiting is cheaper than trying.
- The server says how long to wait; nobody should come back sooner.

```python
def wait(used: int, requested: int, limit: int) -> float:
    \"\"\"Seconds until the bucket holds what is asked for.\"\"\"
    return max(0.0, (used + requested - limit) / limit * 60)


print(f"{{wait({used}, {requested}, 30_000):.3f}} s")
```
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer to one request, before a word of it is said.

    Parameters
    ----------
    input_tokens, max_output : int
        Tokens of the input, and the output that admission reckons with.
    reasoning : int
        Tokens that are thought before the first word.
    tokens : tuple of str
        The text, token by token.
    cut : bool
        Whether `max_output` ends it early.
    latency : float
        Seconds from admission to the first token.
    fault : Fault or None
        What the prompt itself wants to go wrong.
    """

    input_tokens: int
    max_output: int
    reasoning: int
    tokens: tuple[str, ...]
    cut: bool
    latency: float
    fault: Fault | None

    @property
    def output_tokens(self) -> int:
        """All tokens of the output, reasoning included."""
        return self.reasoning + len(self.tokens)

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.tokens)


def plan(asked: Asked, knobs: Knobs) -> Plan:
    """Return the answer to `asked`: a pure function, so that a yardstick can know it too."""
    reasoning = _EFFORTS.get(asked.effort or "", 256 if asked.effort else 0)
    tokens = _tokens(asked)
    room = asked.max_output if asked.max_output is not None else knobs.context
    return Plan(
        input_tokens=count(asked.text, knobs) + IMAGE_TOKENS * asked.images,
        max_output=knobs.assumed_output if asked.max_output is None else asked.max_output,
        reasoning=min(reasoning, room),
        tokens=tokens[: max(0, room - reasoning)],
        cut=reasoning + len(tokens) > room,
        latency=latency(asked.text, knobs),
        fault=_wanted_fault(asked.prompt),
    )


def count(text: str, knobs: Knobs) -> int:
    """Return the tokens that the server counts in `text`."""
    return max(1, round(len(text) / 4 * knobs.bias))


def latency(text: str, knobs: Knobs) -> float:
    """Return the seconds from admission to the first token for an input of `text`."""
    if not knobs.sigma:
        return knobs.latency
    chance = random.Random(f"{knobs.seed}:{text}")  # noqa: S311 - chance, not secrecy
    return knobs.latency * chance.lognormvariate(0, knobs.sigma)


def tokenize(text: str) -> tuple[str, ...]:
    """Return `text` in tokens, which joined are `text` again."""
    return tuple(_TOKENS.findall(text))


_FILLER = tuple(tokenize(sentence) for sentence in _SENTENCES.splitlines())


def _tokens(asked: Asked) -> tuple[str, ...]:
    if echo := _ECHO.search(asked.prompt):
        return tokenize(echo[1])
    if asked.draws:
        return ()
    if asked.schema is not None:
        return tokenize(json.dumps(example(asked.schema), ensure_ascii=False))
    return _composed(asked.prompt, asked.turns[-2] if len(asked.turns) > 1 else "")


@lru_cache(maxsize=256)
def _composed(prompt: str, earlier: str) -> tuple[str, ...]:
    """Return an answer with a heading, a list and code, and as long as the prompt wants it."""
    digest = blake2b(prompt.encode("utf-8", "replace"), digest_size=8).digest()
    chance = random.Random(digest)  # noqa: S311 - chance, not secrecy
    shape = tokenize(_shape(prompt, earlier, chance))
    length = _wanted_length(prompt)
    if length is None:
        return (*shape, *_filler(1, chance))
    head = shape if len(shape) <= length else tokenize(f"{MARK}\n")
    filler = _filler(length - len(head), chance)
    return (*head, *filler)[: max(0, length - 1)] + (".",) * min(length, 1)


def _shape(prompt: str, earlier: str, chance: random.Random) -> str:
    topic = _topic(prompt)
    return _SHAPE.format(
        title=topic[:1].upper() + topic[1:],
        mark=MARK,
        topic=f"*{topic}*",
        earlier=f" Before that, it was *{_topic(earlier)}*." if earlier else "",
        used=chance.randrange(20_000, 30_000),
        requested=chance.randrange(10_000, 20_000),
    )


def _topic(prompt: str) -> str:
    """Return the first words of the prompt, with nothing in them that Markdown would heed."""
    words = _WORD.findall(_ECHO.sub("", _DIRECTIVE.sub("", prompt)))
    return " ".join(words[:8]) + (" …" * (len(words) > 8)) or "nothing"


def _filler(length: int, chance: random.Random) -> list[str]:
    """Return at least `length` tokens of sentences that are true, if not to the point."""
    tokens = ["\n", *chance.choice(_FILLER)]
    while len(tokens) < length:
        tokens += [" ", *chance.choice(_FILLER)]
    return tokens


def _wanted_length(prompt: str) -> int | None:
    for name, value in _DIRECTIVE.findall(prompt):
        if name == "tokens" and value.isdecimal():
            return int(value)
    return None


def _wanted_fault(prompt: str) -> Fault | None:
    """Return the fault that the prompt asks for.

    Raises
    ------
    Failure
        400, if it asks for one that there is not.
    """
    for name, value in _DIRECTIVE.findall(prompt):
        if name == "fault":
            try:
                kind, *fields = value.split()
                numbers = {k: json.loads(v) for k, _, v in (f.partition("=") for f in fields)}
                return read_fault({"kind": kind, **numbers})
            except ValueError as exc:
                raise Failure(400, f"[[fault={value}]] makes no sense: {exc}") from exc
    return None
