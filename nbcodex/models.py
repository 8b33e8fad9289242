"""The words everybody speaks: requests, limits, snapshots, usage and replies. Data, no deeds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Api = Literal["auto", "responses", "chat"]
Status = Literal[
    "pending", "running", "waiting", "done", "parked", "interrupted", "cancelled", "failed"
]
Resource = Literal["tokens", "requests"]

MINUTE, DAY = 60.0, 86_400.0

CONTENT_FILTER = "content_filter"  # `Reply.cut` of an answer that the provider filtered


NOTE_POSSIBLY_PAID, NOTE_POSSIBLY_PAID_TWICE = "possibly paid", "possibly paid twice"
"""The notes on a request that was sent, and whose fate at the server nobody knows: as it ended
there, and as it was asked again."""


def new_id() -> str:
    """Return a fresh request id: twelve hexadecimal digits, of which any unique start will do.

    Of a million requests in one journal, two have the same with a probability of 0.2 %; of eight
    digits, a map with 100,000 rows would have a pair more often than not.
    """
    return secrets.token_hex(6)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnPosition:
    """Where an answer stands in its conversation.

    Parameters
    ----------
    chapter : int
        Which beginning of the conversation it follows: 0 is the first.
    number : int or None
        Turns are in the order of their numbers; None stands behind all others.
    begins : bool
        Whether the conversation starts afresh with it.
    """

    chapter: int = 0
    number: int | None = None
    begins: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a request was asked.

    Parameters
    ----------
    notebook : str or None
        The notebook (or the kernel, where nobody knows the notebook).
    cell : str or None
        The cell's id.
    variable : str or None
        The name that the answer is to be bound to.
    map_id : str or None
        The map that it is an item of.
    row_index, row_count : int or None
        Its position in that map, from 0, and how many there are, where that is known.
    engine : str
        How the map is answered: ``live`` or ``batch``.
    place : Place
        Where the answer stands, if it joins a conversation.
    """

    notebook: str | None = None
    cell: str | None = None
    variable: str | None = None
    map_id: str | None = None
    row_index: int | None = None
    row_count: int | None = None
    engine: str = "live"
    position: TurnPosition = TurnPosition()


@dataclass(frozen=True, slots=True)
class Image:
    """A picture that goes with a prompt.

    Parameters
    ----------
    data : bytes
        The file.
    media_type : str
        What it holds: ``image/png``, ``image/jpeg``, ``image/gif`` or ``image/webp``.
    """

    data: bytes = field(repr=False)
    media_type: str = "image/png"


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedReasoning:
    """What an answer brings along for the next turn, for whoever gave it alone.

    Parameters
    ----------
    items : tuple of mapping
        Encrypted reasoning, in the server's words.
    model, base_url : str
        The model that was asked, and where.
    """

    items: tuple[Mapping[str, Any], ...]
    model: str
    base_url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One exchange of a conversation.

    Parameters
    ----------
    prompt, answer : str
        What was asked, as the server saw it, and what came of it.
    images : tuple of Image
        Pictures that went with the prompt.
    carried : tuple of mapping
        The answer's items that the server wants back, such as encrypted reasoning, in its words.
    model, base_url : str or None
        To whom `carried` goes back: None to anybody.
    entry : int or None
        Its place in the journal, which is no part of what was said.
    """

    prompt: str
    answer: str
    images: tuple[Image, ...] = ()
    carried: tuple[Mapping[str, Any], ...] = ()
    model: str | None = None
    base_url: str | None = None
    entry: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """The shape that an answer is to have.

    Parameters
    ----------
    name : str
        Letters, digits, ``_`` and ``-``: at most 64.
    definition : mapping
        A JSON schema.
    strict : bool
        Whether the server is to hold the model to it word by word, which not every schema allows.
    model : class or None
        The pydantic class that reads the answer; it lasts as long as the process.
    """

    name: str
    definition: Mapping[str, Any]
    strict: bool = True
    model: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt, a model and options; immutable, so that what is sent again is what was asked.

    Parameters
    ----------
    prompt : str
        The text, as the server shall see it.
    model : str or None
        Name of the model (on Azure: of the deployment). None lets the provider decide.
    system : str or None
        Instructions that stand before the prompt.
    images : tuple of Image
        Pictures that go with the prompt.
    turns : tuple of Turn
        The conversation so far, oldest first.
    thread : str or None
        The conversation that the answer becomes a part of.
    schema : Schema or None
        The shape that the answer is to have.
    max_output : int or None
        Upper bound on output tokens, reasoning included.
    effort : str or None
        Reasoning effort, in the server's words.
    params : mapping
        Further parameters of the API, passed on in the body.
    api : {"auto", "responses", "chat"}
        Which API to speak.
    api_base : str or None
        Base URL for this request only.
    patience : float
        Seconds of waiting, caused by refusals and faults, after which the request is parked.
    created_at : float
        Seconds since the epoch.
    origin : Origin
        Where it was asked.
    reuse : bool
        Whether an equal request's answer in the journal will do.
    durable : bool
        Whether the server shall keep the answer, so that a broken stream can be picked up.
    row : str or None
        What tells it from another row of a map that asks the same.
    """

    prompt: str
    id: str = field(default_factory=new_id)
    model: str | None = None
    system: str | None = None
    images: tuple[Image, ...] = ()
    turns: tuple[Turn, ...] = ()
    thread: str | None = None
    schema: Schema | None = None
    max_output: int | None = None
    effort: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    api: Api = "auto"
    api_base: str | None = None
    patience: float = 600.0
    created_at: float = field(default_factory=time.time)
    origin: Origin = field(default_factory=Origin)
    reuse: bool = False
    durable: bool = False
    row: str | None = None


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """How far a durable answer has been read: what it takes to pick it up.

    Parameters
    ----------
    response_id : str
        The server's name for the answer.
    sequence : int or None
        Number of the last event that was read; None: pick it up from its beginning.
    """

    response_id: str
    sequence: int | None = None


@dataclass(frozen=True, slots=True)
class Resumption:
    """How a request of the journal is taken up again.

    Parameters
    ----------
    not_before : float or None
        Seconds since the epoch before which it stays where it is.
    mark : Mark or None
        Where its durable answer goes on.
    text : str
        The answer up to that mark.
    notes : tuple of str
        What there was to know of it when it was left.
    """

    not_before: float | None = None
    mark: StreamPosition | None = None
    text: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The server's limit that refused a request, with the figures it gave.

    Parameters
    ----------
    resource : {"tokens", "requests"} or None
        What ran out; None where the server does not say.
    window : float or None
        Seconds over which the server counts.
    limit, used, requested : float or None
        The server's figures, in the resource's unit.
    model : str or None
        The model that the limit belongs to.
    """

    resource: Resource | None = None
    window: float | None = None
    limit: float | None = None
    used: float | None = None
    requested: float | None = None
    model: str | None = None

    @property
    def name(self) -> str:
        """The limit as people say it: ``tokens per minute (TPM)``."""
        if self.resource is None:
            return "rate limit"
        per = {MINUTE: "minute", DAY: "day"}.get(self.window or 0.0)
        if per is None:
            return f"{self.resource} limit"
        return f"{self.resource} per {per} ({self.resource[0].upper()}P{per[0].upper()})"

    @property
    def figures(self) -> str:
        """What the server told, such as ``limit 30,000, used 22,999, requested 12,528``."""
        told = {"limit": self.limit, "used": self.used, "requested": self.requested}
        return ", ".join(
            f"{word} {value:,.0f}" for word, value in told.items() if value is not None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitReading:
    """One bucket as one response's headers tell it.

    Parameters
    ----------
    limit, remaining : float
        Size and level, in the bucket's unit.
    full_in : float or None
        Seconds until the bucket is full again (``x-ratelimit-reset-*``), which is not the time to
        wait.
    """

    limit: float
    remaining: float
    full_in: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSnapshot:
    """The limits as one response's headers tell them.

    Parameters
    ----------
    at : float
        The instant at which the headers arrived.
    processing : float or None
        Seconds the server worked before it answered (``openai-processing-ms``).
    tokens, requests : Gauge or None
        The tightest bucket of each kind that the headers name.
    organization : str or None
        Whose limits these are.
    """

    at: float
    processing: float | None = None
    tokens: LimitReading | None = None
    requests: LimitReading | None = None
    organization: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """US dollars for a token of input and of output, as price lists have them; nothing cached."""

    input: float
    output: float

    def of(self, usage: Usage) -> float:
        """Return US dollars for what is known of a usage."""
        output = self.output * (usage.output_tokens or 0)
        return self.input * (usage.input_tokens or 0) + output


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request. Cached is a part of input, reasoning a part of output.

    None means unknown, never zero. `estimated` marks figures that we made and the server did not.
    """

    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    estimated: bool = False

    def plus(self, other: Usage) -> Usage:
        """Return both together; what is unknown of one is unknown of both."""

        def both(one: int | None, another: int | None) -> int | None:
            return None if one is None or another is None else one + another

        return Usage(
            input_tokens=both(self.input_tokens, other.input_tokens),
            cached_tokens=both(self.cached_tokens, other.cached_tokens),
            output_tokens=both(self.output_tokens, other.output_tokens),
            reasoning_tokens=both(self.reasoning_tokens, other.reasoning_tokens),
            estimated=self.estimated or other.estimated,
        )

    @property
    def total_tokens(self) -> int | None:
        """Input and output together; None if either is unknown."""
        if self.input_tokens is None or self.output_tokens is None:
            return None
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came of a request. True only when it holds a finished answer.

    Parameters
    ----------
    id : str
        The request's id.
    text : str
        The answer, or as much of it as arrived.
    status : str
        ``done``, or why there is no finished answer.
    model : str or None
        The model that answered, in the server's words.
    usage : Usage
        Tokens of all tries. Of those that broke off they are estimates, and marked so.
    cost : float or None
        US dollars; None where no price is known.
    attempts : int
        HTTP tries, the successful one included.
    waited : float
        Seconds spent waiting because of limits and faults.
    seconds : float
        From the question to the last word, without the waiting.
    cut : str or None
        Why a finished answer ends early (``max_output_tokens``, ``content_filter``), else None.
    parsed : object
        The validated object, where a schema or JSON was asked for.
    images : tuple of Image
        The pictures that the model made.
    reused, simulated : bool
        Whether the answer came from the journal, or from the simulator.
    notes : tuple of str
        What else its reader should know, in a few words each.
    error : str or None
        Why there is no answer, where it is one of many and nothing was raised.
    carried : Carried or None
        What goes along with the next turn of the conversation.
    """

    id: str
    text: str = ""
    status: Status = "done"
    model: str | None = None
    usage: Usage = Usage()
    cost: float | None = None
    attempts: int = 1
    waited: float = 0.0
    seconds: float = 0.0
    cut: str | None = None
    parsed: Any = None
    images: tuple[Image, ...] = ()
    reused: bool = False
    simulated: bool = False
    notes: tuple[str, ...] = ()
    error: str | None = None
    carried: CarriedReasoning | None = field(default=None, repr=False)

    def __bool__(self) -> bool:
        return self.status == "done"

    def __str__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        from nbcodex.rendering.markdown import sanitize_markdown

        return sanitize_markdown(self.text)
