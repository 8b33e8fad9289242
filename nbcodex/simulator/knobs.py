"""Settings of the simulated server (`Knobs`), and its faults with their JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, get_args

Policy = Literal["kept", "refunded", "actual"]
RetryAfter = Literal["both", "seconds", "ms", "date", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """Settings of the simulated server. A limit of None means that there is none."""

    # Tokens and requests per minute and per day, for each key and model.
    tpm: int | None = 30_000
    rpm: int | None = 500
    tpd: int | None = None
    rpd: int | None = None
    # How a request is charged. ``kept``: input and `max_output` at admission. ``refunded``: the
    # same, and unused output is returned at the end. ``actual``: input at admission, output at the
    # end, which may leave the bucket in debt.
    policy: Policy = "kept"
    # Length of a second, shorter window of the limits per minute, in seconds, which no header
    # shows; 0: there is none.
    hidden_window: float = 0.0
    used_by_others: float = 0.0  # share of the refill that other clients of the same key use up
    token_bias: float = 1.0  # tokens that the server counts for four characters of input
    assumed_output: int = 1_000  # value used for `max_output` if the request does not set it
    failures: float = 0.0  # probability of a 500
    stream_failures: float = 0.0  # probability of a rate-limit error in mid-stream
    headers: bool = True  # whether answers carry ``x-ratelimit-*``
    # Form of the headers of a 429 that state the wait, which the message states in any case.
    retry_after: RetryAfter = "both"
    # Seconds from admission to the first token: their median, and the standard deviation of their
    # logarithm. The same prompt always has the same latency.
    latency: float = 0.5
    latency_sigma: float = 0.0
    speed: float = 60.0  # output tokens per second
    chunk: int = 1  # tokens in one delta
    # Models that ``/models`` lists; others get a 404. Empty: any name is accepted.
    models: tuple[str, ...] = ("gpt-5.6-sol", "gpt-5.6-mini")
    apis: tuple[str, ...] = ("responses", "chat")  # APIs that exist; the other gets a 404
    keys: tuple[str, ...] = ()  # accepted keys; empty: any
    # Whether the organization may stream; otherwise ``stream=true`` gets a 400.
    allow_streaming: bool = True
    context: int = 400_000  # context window: largest sum of input and output tokens
    batch_seconds: float = 5.0  # duration of a batch; a batch of more than a day expires
    batch_queue: int | None = None  # largest number of requests in open batches, per key
    organization: str = "org-simulated"  # value of the header ``openai-organization``
    seed: int = 0  # seed of all random choices

    def __post_init__(self) -> None:
        for name, literal in (("policy", Policy), ("retry_after", RetryAfter)):
            if getattr(self, name) not in get_args(literal):
                raise ValueError(f"{name} must be one of {', '.join(get_args(literal))}")
        for name in ("tpm", "rpm", "tpd", "rpd", "chunk", "speed"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive")


# Errors while the answer is generated: a background response fails for good. Chat Completions has
# only error events and sends one for each of these. An answer without a stream gets `status`.
GenerationFault = Literal[
    "error_event",  # an event with a nested error object
    "flat_error_event",  # an event with the error's fields
    "failed",  # ``response.failed`` with its error
    # The wait in a header of the 200, ``response.failed`` without an error, then an error event.
    "azure_failed",
]
# Errors while the answer is sent: a background response is generated to its end nevertheless.
DeliveryFault = Literal[
    "truncated",  # a clean end too early
    "dropped",  # a connection reset
    "cut",  # a connection closed within a chunk
    "malformed",  # broken JSON
    "stalled",  # silence for `seconds`, or for ever
    "huge_line",  # a line of many megabytes
]
FaultKind = Literal[
    # Instead of an answer.
    "http",  # an HTTP error with `status`, `code` and `message`
    "tokens_per_minute",  # the 429s of OpenAI's limits
    "requests_per_minute",
    "tokens_per_day",
    "requests_per_day",
    "too_large",  # a 429 for a request that exceeds a whole limit
    "quota",  # a 429 for exhausted credit
    "azure",  # the 429 of Azure's limits
    "overloaded",  # a 503
    "html_429",  # a gateway's pages
    "html_502",
    "redirect",  # a 307 to `location`, unless `status` is another redirect
    "refused",  # a connection that is closed without a response
    # Around an answer.
    "slow",  # the first byte comes `seconds` later
    "headers",  # additional `headers`
    "absurd_headers",  # rate-limit headers with unusable values
    GenerationFault,
    DeliveryFault,
]
FAULT_KINDS: tuple[str, ...] = get_args(FaultKind)
GENERATION_FAULTS: frozenset[str] = frozenset(get_args(GenerationFault))


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault for one request; `FaultKind` describes the kinds."""

    kind: FaultKind
    after: int = 0  # number of text deltas before it; -1: before the first event of the stream
    # The wait that a 429 states (default 1.2), the delay, or the silence.
    seconds: float | None = None
    status: int = 500  # HTTP status of ``http`` (and of answers that are not streamed)
    # Values in place of the usual ones.
    code: str | None = None
    message: str | None = None
    # Additional headers; an empty value removes one.
    headers: Mapping[str, str] = field(default_factory=dict)
    location: str = "http://127.0.0.1:9/v1/responses"  # target of a ``redirect``

    def __post_init__(self) -> None:
        if self.kind not in FAULT_KINDS:
            raise ValueError(f"{self.kind!r} is not a fault; choose from: {', '.join(FAULT_KINDS)}")
        for name in ("after", "status", "seconds"):  # which may come from JSON
            value = getattr(self, name)
            if not isinstance(value, (int, float, NoneType) if name == "seconds" else int):
                raise ValueError(f"{name} of a fault must be a number, not {value!r}")  # noqa: TRY004

    @property
    def seconds_or_default(self) -> float:
        """`seconds`, or the default if it is None."""
        return 1.2 if self.seconds is None else self.seconds

    def applies_before(self, role: str, deltas: int) -> bool:
        """Whether it applies before an event of this role (`api_formats`) after `deltas` deltas."""
        return self.after < 0 or role == "end" or (role == "delta" and deltas == self.after)


def parse_fault(data: Any) -> Fault | None:
    """Return the fault in JSON data: a name, an object with fields, or null for none."""
    if data is None:
        return None
    try:
        return Fault(**({"kind": data} if isinstance(data, str) else data))
    except TypeError as exc:
        message = f"a fault must be null, a name, or an object with a kind: {exc}"
        raise ValueError(message) from exc


@dataclass(eq=False)
class Dropped(Exception):  # noqa: N818 - a way to end a connection, not an error
    """Ends the connection before the HTTP response is complete."""

    partial: bytes = b""  # the part of the next chunk that is still sent
    reset: bool = False  # whether the connection is reset rather than closed
