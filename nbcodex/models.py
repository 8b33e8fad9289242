"""The records that all layers share: requests, limits, usage, replies and totals. Data only.

Glossary. Each word has this one meaning in the whole package.

request        prompt, model and options; immutable
attempt        one HTTP exchange on behalf of a request
retry          another attempt after a failed one; the wait between them is the backoff
refusal        a response that rejects an attempt, for a limit (HTTP 429) or for what it asks
fault          a failure of the server or the network; the simulator's faults include refusals
patience       the longest total wait that a user accepts; queueing for capacity is not counted
queue          wait in order of arrival while a limit is fully used; this uses no patience
park, resume   keep a request for later; continue with it
durable        kept by the server, so that a broken stream can be continued
event          something that happens to a request; `emit` sends it to the listeners, callables
ending         the last event: finished, parked, interrupted (by Stop), cancelled or failed
handle         a request as the calling thread holds it; its runner is on the event loop
custom client  the user's own OpenAI client in `Codex.client`, or a factory, async or not, for it
limit          the server's cap on tokens or requests in a window of time, such as a minute
budget, cap    the user's own caps on tokens or dollars; one of them
quota          credit with the provider: a matter of billing, so waiting does not help
snapshot       the limits as the headers of one response state them
cooldown       a model is closed to all requests until an instant, because of a limit
probe          an attempt during a cooldown, to find out whether it is over
bucket         a token bucket, by which a limit is modelled: it is refilled at a constant rate
limit model    what is known of the limits of one model and account; processes share it
hidden window  a second limit over a shorter time, which no header states
mark           a bucket's level just after a charge, to compare with what a response states
reservation    capacity taken from a rate limit for one attempt, or from a budget for a request
permit         the data of a reservation of a rate limit
charge policy  whether a server gives back what an answer did not use: kept (no), refunded (yes),
               or actual (it charges only what was used)
simulated      answered by `nbcodex.simulator`, which imitates a server and costs nothing
journal        the file that keeps requests and replies; an entry is one request in it
reuse          take the answer from the journal, where an equal request was answered
kernel         a process that runs requests: of a notebook, a terminal or a script
owner          the kernel that runs an entry's request; the entry is abandoned if it has died
host           the program that runs nbcodex: a notebook's shell, or a plain script
front end      the program that shows a notebook: JupyterLab, VS Code, Colab
thread         a named conversation of one notebook
chapter        the turns since a thread was started anew; its number is larger than earlier ones
map run        one prompt template applied to many rows
row            one request of a map run; its row key distinguishes it from an equal one
batch job      a file of rows handed to the provider's Batch API

Durations are seconds as floats; instants end in `_at`, and instants to wait for in `_until`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

Api = Literal["auto", "responses", "chat"]  # ``auto``: the one that the server turns out to have
# Of a request: ``pending`` until the first attempt; ``waiting`` for a limit or for a batch job.
Status = Literal[
    "pending", "running", "waiting", "done", "parked", "interrupted", "cancelled", "failed"
]
# What a limit of the server counts: tokens or requests in a window of time, requests in progress at
# once, or the growth of the traffic. Other nouns of servers, such as "images", are only shown.
Resource = Literal["tokens", "requests", "parallel requests", "traffic growth"]
MapOutcome = Literal["", "done", "stopped", "cancelled", "parked", "failed"]

MINUTE, DAY = 60.0, 86_400.0

CONTENT_FILTER = "content_filter"  # `Reply.cut` of an answer that the provider filtered

# Notes on a durable request that was sent, but whose response id never arrived: the server may be
# working on an answer that cannot be retrieved. The first note is used when the request ended then,
# the second when it was sent again.
NOTE_POSSIBLY_PAID, NOTE_POSSIBLY_PAID_TWICE = "possibly paid", "possibly paid twice"


def new_id() -> str:
    """Return a new request id of twelve hexadecimal digits; commands accept a unique prefix."""
    # Among a million requests in one journal, a collision has a probability of 0.2 %; with eight
    # digits, a map of 100,000 rows would contain one more often than not (birthday bound).
    return secrets.token_hex(6)


def describe(record: Any) -> str:
    """Return a dataclass's `repr` with rounded times, without fields that equal their default."""
    parts = []
    for each in fields(record):
        value = getattr(record, each.name)
        value = round(value, 3) if each.name in {"waited", "queued", "seconds"} else value
        if each.repr and value != each.default:
            parts.append(f"{each.name}={value!r}")
    return f"{type(record).__name__}({', '.join(parts)})"


def match_prefix(prefix: str, names: Iterable[str]) -> list[str]:
    """Return the name that equals `prefix`, or else all names that begin with it."""
    names = list(names)
    return [prefix] if prefix in names else [name for name in names if name.startswith(prefix)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnPosition:
    """Where an answer stands in its conversation."""

    chapter: int = 0
    number: int | None = None  # Orders the turns of a chapter; None comes after all numbers
    starts_new: bool = False  # Whether the chapter's turns before it are left out (``--new``)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The notebook, cell and map that a request belongs to."""

    notebook: str | None = None  # Its path, or a name for its kernel where the path is unknown
    cell: str | None = None  # The cell's id
    variable: str | None = None  # The variable that the reply is assigned to
    map_id: str | None = None  # The map run that it is a row of
    row_index: int | None = None  # Its index in that map, from 0
    row_count: int | None = None  # The number of rows of that map; None for an iterator
    engine: str = "live"  # How the map's rows are answered: as ``live`` requests, or by ``batch``
    data_kind: str = "list"  # The map's data: `InputData.kind`, such as ``list`` or ``pandas``
    position: TurnPosition = TurnPosition()  # Of the answer, if it joins a conversation
    server: str | None = None  # Host of the only server that may get it; None: any


# The first bytes of a file; WebP has a length between the two parts of its signature.
_IMAGE_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"RIFFWEBP": "image/webp",
}


@dataclass(frozen=True, slots=True)
class Image:
    """An image that accompanies a prompt or an answer."""

    data: bytes = field(repr=False)
    media_type: str = "image/png"  # ``image/png``, ``image/jpeg``, ``image/gif`` or ``image/webp``

    @classmethod
    def from_bytes(cls, data: bytes) -> Image | None:
        """Return the image in a file's bytes, or None if servers do not accept its format."""
        start = data[:4] + data[8:12] if data[8:12] == b"WEBP" else data
        for signature, media_type in _IMAGE_SIGNATURES.items():
            if start.startswith(signature):
                return cls(data, media_type)
        return None


@dataclass(frozen=True, slots=True)
class Source:
    """A web page that an answer cites."""

    url: str
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedReasoning:
    """Reasoning that the next turn can send back, to the server that produced it only."""

    # Items of the response, unchanged; one with ``reasoning_content`` is of Chat Completions
    items: tuple[Mapping[str, Any], ...]
    model: str  # The model that produced them
    base_url: str  # The server that produced them


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One prompt of a conversation, and its answer."""

    prompt: str  # As it was sent
    answer: str
    images: tuple[Image, ...] = ()  # Images of the prompt
    # Items of the answer that the server wants back, such as encrypted reasoning
    carried: tuple[Mapping[str, Any], ...] = ()
    model: str | None = None  # The only model that may receive `carried`; None: any
    base_url: str | None = None  # The only server that may; None: any
    entry: int | None = field(default=None, compare=False)  # Number of its entry in the journal


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """The structure that an answer must have."""

    name: str  # Letters, digits, ``_`` and ``-``: at most 64
    definition: Mapping[str, Any]  # A JSON schema
    strict: bool = True  # Whether the server enforces it, which not every schema allows
    # The pydantic class, or TypeAdapter, that parses the answer; the journal does not keep it
    model: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What is given for one request, beside its prompt. None: as the settings say."""

    model: str | None = None  # the model, or an alias of one
    system: str | None = None  # instructions that precede the prompt
    max_output: int | None = None  # upper bound on output tokens, reasoning included
    effort: str | None = None  # reasoning effort, in the server's words
    params: Mapping[str, Any] | None = None  # further parameters of the API
    patience: str | float | None = None  # seconds, or a string such as ``10m``
    api: str | None = None  # one of `Api`
    api_base: str | None = None  # base URL of another server
    reuse: bool | None = None  # whether the answer to an equal request in the journal is acceptable
    durable: bool | None = None  # whether the server keeps the answer, to continue a broken stream
    schema: object = None  # a type, or a JSON schema as a mapping
    images: Iterable[Any] | None = None  # paths, bytes, matplotlib figures or PIL images
    thread: str | None = None  # the conversation that the answer joins

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        """Return the options among the arguments of a function, such as its `locals()`."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in arguments.items() if name in names})


# The names of this record's fields, and of those of Turn, Schema and Image, are part of the key by
# which the journal recognizes equal requests: renaming one would disable the reuse of all answers.
@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt, a model and options; immutable, so that a retry sends what was asked."""

    prompt: str
    id: str = field(default_factory=new_id)
    model: str | None = None  # On Azure, the name of its deployment; None: the provider's choice
    system: str | None = None  # Instructions that precede the prompt
    images: tuple[Image, ...] = ()
    turns: tuple[Turn, ...] = ()  # The conversation so far, oldest first
    thread: str | None = None  # The conversation that the answer becomes part of
    schema: Schema | None = None  # The structure that the answer must have
    max_output: int | None = None  # Upper bound on output tokens, reasoning included
    effort: str | None = None  # Reasoning effort, by the server's name for it
    params: Mapping[str, Any] = field(default_factory=dict)  # Added to the body that is sent
    api: Api = "auto"
    api_base: str | None = None  # Base URL for this request only
    patience: float = 600.0  # Seconds of waits until it is parked; 600 if an old entry has none
    created_at: float = field(default_factory=time.time)  # Seconds since the epoch
    origin: Origin = field(default_factory=Origin)
    reuse: bool = False  # Whether the journal's answer to an equal request is acceptable
    durable: bool = False  # Whether the server keeps the answer, to continue a broken stream
    row: str | None = None  # The row key, if it is a row of a map

    def with_server(self, server: str | None) -> Self:
        """Return the request with another `Origin.server`."""
        return replace(self, origin=replace(self.origin, server=server))


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """How far a durable answer has been read; it is continued from there."""

    response_id: str
    sequence: int | None = None  # Number of the last event read; None: read from the beginning


@dataclass(frozen=True, slots=True)
class Resumption:
    """What the journal knows of a request that is resumed."""

    not_before: float | None = None  # Seconds since the epoch before which it is not sent
    position: StreamPosition | None = None  # Where its durable answer continues
    text: str = ""  # The answer up to that position
    notes: tuple[str, ...] = ()  # Its notes so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The server's limit that refused a request, with the figures of the refusal."""

    resource: Resource | None = None  # What is limited; None where the server does not name it
    window: float | None = None  # Seconds over which the server counts
    limit: float | None = None  # In the resource's unit, like the next two
    used: float | None = None
    requested: float | None = None
    model: str | None = None  # The model that the limit belongs to

    @property
    def name(self) -> str:
        """The limit's usual name: ``tokens per minute (TPM)``."""
        if not self.window:
            return f"{self.resource or 'rate'} limit"
        units = {1.0: "second", MINUTE: "minute", 3600.0: "hour", DAY: "day", 7 * DAY: "week"}
        unit = units.get(self.window)
        if self.resource and unit:
            return f"{self.resource} per {unit} ({self.resource[0].upper()}P{unit[0].upper()})"
        # A month has no such abbreviation: TPM and RPM stand for minutes.
        other = "month" if self.window == 30 * DAY else f"{self.window / MINUTE:,g} minutes"
        return f"{self.resource or 'rate limit'} per {unit or other}"

    @property
    def figures(self) -> str:
        """The server's figures, such as ``limit 30,000, used 22,999, requested 12,528``."""
        given = {"limit": self.limit, "used": self.used, "requested": self.requested}
        return ", ".join(f"{name} {n:,.0f}" for name, n in given.items() if n is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitReading:
    """One limit as one response's headers state it."""

    limit: float  # Tokens or requests in the window (``x-ratelimit-limit-*``)
    remaining: float  # What may still be used now (``x-ratelimit-remaining-*``)
    full_in: float | None = None  # Seconds until all may be used (``x-ratelimit-reset-*``)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSnapshot:
    """The limits as one response's headers state them."""

    at: float  # The instant at which the headers arrived
    processing: float | None = None  # Seconds that the server worked (``openai-processing-ms``)
    tokens: LimitReading | None = None  # The tightest that the headers name, like the next
    requests: LimitReading | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """List prices in US dollars of one token of input and of output, none of it cached."""

    input: float
    output: float

    def cost(self, usage: Usage) -> float:
        """Return US dollars for the known tokens of a usage."""
        return self.input * (usage.input_tokens or 0) + self.output * (usage.output_tokens or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request; None means unknown, never zero."""

    input_tokens: int | None = None
    cached_tokens: int | None = None  # Part of the input: read from the provider's prompt cache
    output_tokens: int | None = None
    reasoning_tokens: int | None = None  # Part of the output
    estimated: bool = False  # Whether any figure is ours, not the server's
    cache_written_tokens: int | None = None  # Part of the input: written to the prompt cache
    service_tier: str | None = None  # The provider's class of service, which has its own prices
    stated_cost: float | None = None  # US dollars, where the provider states a cost itself
    input_audio_tokens: int | None = None  # Part of the input
    output_audio_tokens: int | None = None  # Part of the output
    hosted_tool_calls: tuple[str, ...] = ()  # The tool of each call that the provider charges

    __repr__ = describe

    def __add__(self, other: Usage) -> Usage:
        """Return the sum; a figure that is unknown in one of them is unknown in the sum."""
        sums: dict[str, Any] = {
            "estimated": self.estimated or other.estimated,
            "service_tier": self.service_tier if self.service_tier == other.service_tier else None,
            "hosted_tool_calls": self.hosted_tool_calls + other.hosted_tool_calls,
        }
        for name in {each.name for each in fields(self)} - sums.keys():
            figures = getattr(self, name), getattr(other, name)
            sums[name] = None if None in figures else sum(figures)
        return Usage(**sums)

    @property
    def total_tokens(self) -> int | None:
        """Input and output together; None if either is unknown."""
        if self.input_tokens is None or self.output_tokens is None:
            return None
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The result of a request. True only when it holds a finished answer."""

    id: str  # The request's id
    text: str = ""  # The answer, or as much of it as arrived
    status: Status = "done"  # ``done``, or why there is no finished answer
    model: str | None = None  # The model that answered, as the server names it
    usage: Usage = Usage()  # Tokens of all attempts; those of broken ones may be estimates
    cost: float | None = None  # US dollars; None where no price is known
    unpriced_tools: tuple[str, ...] = ()  # Left out of `cost`: tools, audio, a surcharge
    attempts: int = 1  # HTTP attempts, the successful one included
    waited: float = 0.0  # Seconds spent waiting because of limits and faults
    queued: float = 0.0  # Seconds spent in the queue for capacity, which use no patience
    seconds: float = 0.0  # From the prompt to the end of the answer, less `waited` and `queued`
    cut: str | None = None  # Why the answer ends early: ``max_output_tokens`` or ``content_filter``
    parsed: Any = None  # The validated object, where a schema or JSON was requested
    images: tuple[Image, ...] = ()  # Images that the model made
    sources: tuple[Source, ...] = ()  # Web pages that the answer cites, in the provider's order
    reused: bool = False  # Whether the answer came from the journal
    simulated: bool = False  # Whether the answer came from the simulator
    notes: tuple[str, ...] = ()  # Remarks for the line of figures, which stands below the answer
    error: str | None = None  # Why there is no answer, in a map, where nothing is raised
    carried: CarriedReasoning | None = field(default=None, repr=False)  # For the next turn

    __repr__ = describe

    def __bool__(self) -> bool:
        return self.status == "done"

    def __str__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        # Imported here: the renderer is needed only where a reply is shown.
        from nbcodex.rendering.markdown import sanitize_markdown

        return sanitize_markdown(self.text)


# The fields of `Usage` that totals sum up.
SUMMED_TOKENS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
# Known to be zero, while `Usage()` is unknown.
ZERO_USAGE = Usage(input_tokens=0, cached_tokens=0, output_tokens=0, reasoning_tokens=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageTotals:
    """The summed figures of many requests. Unknown figures are counted, never taken for zero."""

    requests: int = 0
    answers: int = 0  # Requests with a finished answer
    attempts: int = 0  # HTTP attempts
    refusals: int = 0  # Attempts that a limit refused
    usage: Usage = ZERO_USAGE  # The sums of all known tokens
    cost: float = 0.0  # US dollars, as far as prices are known
    waited: float = 0.0  # Sum of the requests' waits in seconds; they may wait at the same time
    unknown: int = 0  # Requests with unknown tokens
    unpriced: int = 0  # Requests whose price is unknown, in whole or in part
    estimated: int = 0  # Requests with estimated tokens

    @classmethod
    def of(cls, reply: Reply, *, refusals: int = 0) -> UsageTotals:
        """Return what one reply adds."""
        usage, is_priced = reply.usage, reply.cost is not None and not reply.unpriced_tools
        known: dict[str, Any] = {name: getattr(usage, name) or 0 for name in SUMMED_TOKENS}
        may_cost = reply.attempts > 0 and usage.total_tokens != 0
        return cls(
            requests=1,
            answers=int(reply.status == "done"),
            attempts=reply.attempts,
            refusals=refusals,
            usage=Usage(**known, estimated=usage.estimated),
            cost=reply.cost or 0.0,
            waited=reply.waited,
            unknown=int(usage.total_tokens is None and may_cost),
            # What was not sent, or has no tokens, or is simulated, has no price to know.
            unpriced=int(not (is_priced or reply.simulated) and may_cost),
            estimated=int(usage.estimated),
        )

    def __add__(self, other: UsageTotals) -> UsageTotals:
        names = [each.name for each in fields(self)]
        return UsageTotals(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class MapStats:
    """The figures of a map run at one instant."""

    map_id: str
    at: float  # The instant, in seconds since boot
    total: int | None = None  # Rows; None for the rows of an iterator, which has no length
    done: int = 0  # Rows with an answer
    reused: int = 0  # Of `done`: with an answer from the journal
    cut: int = 0  # Of `done`: with an answer that ends early
    failed: int = 0  # Rows that ended without an answer
    parked: int = 0  # Rows that are kept for later
    sent: int = 0  # Rows at the server
    waiting: int = 0  # The rest of `total`: neither done, failed, parked nor sent
    totals: UsageTotals = UsageTotals()  # What the rows have used so far
    cooldown_until: float | None = None  # The end of the model's cooldown
    limit: Limit | None = None  # The limit that caused the cooldown
    tokens_per_minute: float | None = None  # The server's limits
    requests_per_minute: float | None = None
    model: str | None = None  # The model that answers
    simulated: bool = False  # Whether the simulator answers
    stage: str = ""  # What the map waits for, in a few words, where it is no limit
    outcome: MapOutcome = ""  # Empty while the map runs
    failures: tuple[tuple[str, str], ...] = ()  # The first few failed rows: row and reason

    @property
    def ended(self) -> int:
        """Rows that have ended."""
        return self.done + self.failed + self.parked

    @property
    def paid(self) -> int:
        """Rows that were answered anew."""
        return self.done - self.reused


MapListener = Callable[[MapStats], None]
