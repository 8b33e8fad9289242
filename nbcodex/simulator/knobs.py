"""The settings of the simulated server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Policy = Literal["kept", "refunded", "actual"]
RetryAfter = Literal["both", "seconds", "ms", "date", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """Settings of the simulated server. None means "no limit".

    Parameters
    ----------
    tpm, rpm, tpd, rpd : int or None
        Tokens and requests per minute and per day, for each key and model.
    policy : {"kept", "refunded", "actual"}
        How a request is charged. ``kept``: input and `max_output` at admission. ``refunded``: the
        same, and unused output is returned at the end. ``actual``: input at admission, output at
        the end, which may leave the bucket in debt.
    burst : float
        Length in seconds of a second, shorter window that no header shows; 0 for none.
    stranger : float
        Share of the refill that another client of the same key uses up.
    bias : float
        Tokens counted per four characters.
    assumed_output : int
        Value used for `max_output` if the request does not set it.
    failures, breaks : float
        Probability of a 500, and of a rate-limit error in mid-stream.
    headers : bool
        Whether answers carry ``x-ratelimit-*``.
    retry_after : {"both", "seconds", "ms", "date", "none"}
        Headers of a 429 that state the wait; the message always states it.
    latency, sigma : float
        Median of the seconds from admission to the first token, and the spread of its logarithm.
        The same prompt always has the same latency.
    speed : float
        Output tokens per second.
    chunk : int
        Tokens in one delta.
    models : tuple of str
        Models that ``/models`` lists; others get a 404. Empty: any name is accepted.
    apis : tuple of str
        APIs that exist; the other gets a 404.
    keys : tuple of str
        Accepted keys; empty: any.
    require_key : bool
        Whether a request without a key gets a 401.
    streams : bool
        Whether the organization may stream; otherwise ``stream=true`` gets a 400.
    context : int
        Context window: largest sum of input and output tokens.
    batch_seconds : float
        Duration of a batch; a batch of more than a day expires.
    batch_queue : int or None
        Largest number of requests waiting in batches, per key.
    organization : str
        Value of the header ``openai-organization``.
    seed : int
        Seed of all random choices.
    """

    tpm: int | None = 30_000
    rpm: int | None = 500
    tpd: int | None = None
    rpd: int | None = None
    policy: Policy = "kept"
    burst: float = 0.0
    stranger: float = 0.0
    bias: float = 1.0
    assumed_output: int = 1_000
    failures: float = 0.0
    breaks: float = 0.0
    headers: bool = True
    retry_after: RetryAfter = "both"
    latency: float = 0.5
    sigma: float = 0.0
    speed: float = 60.0
    chunk: int = 1
    models: tuple[str, ...] = ("gpt-5.6-sol", "gpt-5.6-mini")
    apis: tuple[str, ...] = ("responses", "chat")
    keys: tuple[str, ...] = ()
    require_key: bool = True
    streams: bool = True
    context: int = 400_000
    batch_seconds: float = 5.0
    batch_queue: int | None = None
    organization: str = "org-simulated"
    seed: int = 0

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
