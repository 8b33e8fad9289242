"""The settings of the simulated server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Policy = Literal["kept", "refunded", "actual"]
RetryAfter = Literal["both", "seconds", "ms", "date", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """Settings of the simulated server. None means "no limit"."""

    # tpm, rpm, tpd, rpd: tokens and requests per minute and per day, for each key and model.
    tpm: int | None = 30_000
    rpm: int | None = 500
    tpd: int | None = None
    rpd: int | None = None
    # How a request is charged. ``kept``: input and `max_output` at admission. ``refunded``: the
    # same, and unused output is returned at the end. ``actual``: input at admission, output at the
    # end, which may leave the bucket in debt.
    policy: Policy = "kept"
    # Length in seconds of a second, shorter window that no header shows; 0 for none.
    hidden_window: float = 0.0
    used_by_others: float = 0.0  # share of the refill that another client of the same key uses up
    token_bias: float = 1.0  # tokens counted per four characters
    assumed_output: int = 1_000  # value used for `max_output` if the request does not set it
    # failures, breaks: probability of a 500, and of a rate-limit error in mid-stream.
    failures: float = 0.0
    stream_failures: float = 0.0
    headers: bool = True  # whether answers carry ``x-ratelimit-*``
    # Headers of a 429 that state the wait; the message always states it.
    retry_after: RetryAfter = "both"
    # latency, sigma: median of the seconds from admission to the first token, and the spread of
    # its logarithm. The same prompt always has the same latency.
    latency: float = 0.5
    latency_sigma: float = 0.0
    speed: float = 60.0  # output tokens per second
    chunk: int = 1  # tokens in one delta
    # Models that ``/models`` lists; others get a 404. Empty: any name is accepted.
    models: tuple[str, ...] = ("gpt-5.6-sol", "gpt-5.6-mini")
    apis: tuple[str, ...] = ("responses", "chat")  # APIs that exist; the other gets a 404
    keys: tuple[str, ...] = ()  # accepted keys; empty: any
    require_key: bool = True  # whether a request without a key gets a 401
    # Whether the organization may stream; otherwise ``stream=true`` gets a 400.
    allow_streaming: bool = True
    context: int = 400_000  # context window: largest sum of input and output tokens
    batch_seconds: float = 5.0  # duration of a batch; a batch of more than a day expires
    batch_queue: int | None = None  # largest number of requests waiting in batches, per key
    organization: str = "org-simulated"  # value of the header ``openai-organization``
    seed: int = 0  # seed of all random choices

    def __post_init__(self) -> None:
        for name, kind in (("policy", Policy), ("retry_after", RetryAfter)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}")
        for name in ("tpm", "rpm", "tpd", "rpd", "chunk", "speed"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive")


def parse_knobs(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a JSON object, with lists as tuples.

    Raises
    ------
    ValueError
        If a name is unknown.
    """
    if unknown := data.keys() - {field.name for field in fields(Knobs)}:
        raise ValueError(f"unknown setting: {', '.join(sorted(unknown))}")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
