"""What can be set on the simulated server. Data, no deeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Policy = Literal["kept", "refunded", "actual"]
RetryAfter = Literal["both", "seconds", "ms", "date", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """How the simulated server behaves. A limit of None means that there is none.

    Parameters
    ----------
    tpm, rpm, tpd, rpd : int or None
        Tokens and requests per minute and per day, for each key and model.
    policy : {"kept", "refunded", "actual"}
        What a request is charged: input and the whole of `max_output` at admission, kept; the
        same, with what was not used given back at the end; or the input at admission and the
        output at the end, which may leave the bucket in debt.
    burst : float
        Seconds of a hidden shorter window, which no header shows; 0 for none.
    stranger : float
        The share of every refill that somebody else on the same key takes.
    bias : float
        Tokens that the server counts for each four characters.
    assumed_output : int
        What `max_output` is taken for where the request names none.
    failures, breaks : float
        Probability that a request meets a 500, and that a stream breaks off with a rate-limit
        error.
    headers : bool
        Whether answers carry ``x-ratelimit-*``.
    retry_after : {"both", "seconds", "ms", "date", "none"}
        Which header of a 429 states the wait; the text states it anyway.
    latency, sigma : float
        Median of the seconds from admission to the first token, and the spread of its logarithm.
        The same prompt always meets the same latency, whoever asks and whenever.
    speed : float
        Output tokens per second.
    chunk : int
        Tokens in one delta.
    models : tuple of str
        What ``/models`` lists; any other is a 404. Empty: any name will do.
    apis : tuple of str
        Which APIs exist; the other is a 404.
    keys : tuple of str
        The keys that are accepted; empty: any.
    require_key : bool
        Whether a request without a key is a 401.
    streams : bool
        Whether the organization may have answers streamed; else that is a 400.
    context : int
        Tokens that input and output may have together.
    batch_seconds : float
        How long a batch takes; what takes more than a day expires.
    batch_queue : int or None
        Requests that may wait in batches at a time, for each key.
    organization : str
        What ``openai-organization`` says.
    seed : int
        Where all chance starts from.
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
                raise ValueError(f"{name} is one of {', '.join(get_args(kind))}")
        for name in ("tpm", "rpm", "tpd", "rpd", "chunk", "speed"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is more than nothing")
