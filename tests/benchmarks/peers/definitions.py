"""The libraries that are compared: how each is used, and what it needs. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SDK = "openai==3.54.0"


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to send many prompts."""

    name: str  # on the command line and in the plot
    description: str  # how the library is used, for the table
    configured_with: str  # what it is given about the server: "nothing", or its limits
    entry_point: str  # the function that uses it, as ``module.function`` of this package
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of that function
    environment: str = "small"  # name of its virtual environment; empty: that of this project
    packages: tuple[str, ...] = (SDK, "tenacity", "aiolimiter")  # installed there
    python: str = ""  # the oldest Python that it supports, if newer than this project's
    needs_socket: bool = False  # on the loopback interface, even in virtual time

    @property
    def module(self) -> str:
        """The module of its entry point."""
        return self.entry_point.partition(".")[0]

    @property
    def function(self) -> str:
        """The function of its entry point."""
        return self.entry_point.partition(".")[2]


def _script(share: int) -> Peer:
    return Peer(
        f"cookbook script, {share} %",
        f"OpenAI's `api_request_parallel_processor.py` (as packaged by parareq), {share} % of the "
        "limits, 5 attempts",
        "limits",
        "cookbook_script.run",
        {"share": share / 100},
        environment="script",
        packages=("parareq", "aiohttp", "h11"),
        needs_socket=True,
    )


ALL = (
    Peer(
        "nbcodex",
        "this project's rate limiter",
        "nothing",
        "nbcodex_limiter.run",
        environment="",
        packages=(),
    ),
    Peer("SDK, 2 retries", "`AsyncOpenAI()`", "nothing", "openai_sdk.alone", {"retries": 2}),
    Peer(
        "SDK, 10 retries",
        "`AsyncOpenAI(max_retries=10)`",
        "nothing",
        "openai_sdk.alone",
        {"retries": 10},
    ),
    Peer(
        "tenacity, cookbook",
        "`wait_random_exponential(min=1, max=60)`, `stop_after_attempt(6)` around the SDK",
        "nothing",
        "openai_sdk.with_tenacity",
        {"attempts": 6, "retries": 2, "at_once": 1000},
    ),
    Peer(
        "tenacity, patient",
        "the same wait without a last attempt, the SDK's own retries off, 256 at once",
        "nothing",
        "openai_sdk.with_tenacity",
        {"attempts": None, "retries": 0, "at_once": 256},
    ),
    _script(50),
    _script(75),
    _script(100),
    Peer(
        "aiolimiter, bounds",
        "`AsyncLimiter(tpm, 60).acquire(input + max_output)`, the SDK with 10 retries",
        "limits",
        "limiters.with_aiolimiter",
        {"reserve_max_output": True},
    ),
    Peer(
        "aiolimiter, means",
        "the same with `acquire(input + mean output)`",
        "limits, mean output",
        "limiters.with_aiolimiter",
        {"reserve_max_output": False},
    ),
    Peer(
        "aiolimiter, means, patient",
        "the same, the SDK with 1,000 retries",
        "limits, mean output",
        "limiters.with_aiolimiter",
        {"reserve_max_output": False, "retries": 1_000},
    ),
    Peer(
        "token-throttle",
        "`reserve` and refund, memory backend, 256 at once, the SDK with 10 retries",
        "limits",
        "limiters.with_token_throttle",
        environment="throttle",
        packages=(SDK, "token-throttle"),
        python="3.12",
    ),
    Peer(
        "token-throttle, patient",
        "the same, the SDK with 1,000 retries",
        "limits",
        "limiters.with_token_throttle",
        {"retries": 1_000},
        environment="throttle",
        packages=(SDK, "token-throttle"),
        python="3.12",
    ),
    Peer(
        "llama-index, bounds",
        "`TokenBucketRateLimiter.async_acquire(input + max_output)`, the SDK with 10 retries",
        "limits",
        "limiters.with_llama_index",
        {"reserve_max_output": True},
        environment="llamaindex",
        packages=(SDK, "llama-index-core"),
    ),
    Peer(
        "langchain, bounds",
        "`InMemoryRateLimiter`, requests a second from tpm / mean(input + max_output), "
        "`ChatOpenAI(max_retries=10)`",
        "limits, mean input",
        "langchain_limiter.run",
        {"reserve_max_output": True},
        environment="langchain",
        packages=(SDK, "langchain-openai"),
    ),
    Peer(
        "langchain, means",
        "the same from tpm / mean(input + output)",
        "limits, mean input and output",
        "langchain_limiter.run",
        {"reserve_max_output": False},
        environment="langchain",
        packages=(SDK, "langchain-openai"),
    ),
    Peer(
        "async-batch-llm",
        "`process_prompts`, token-aware admission with the expected output, 256 at once",
        "limits, mean output",
        "async_batch.run",
        {"tuned": False},
        environment="asyncbatch",
        packages=(SDK, "async-batch-llm"),
    ),
    Peer(
        "async-batch-llm, tuned",
        "the same with a cooldown of 1 s instead of 300 (then the stated wait counts) and no slow "
        "start",
        "limits, mean output",
        "async_batch.run",
        {"tuned": True},
        environment="asyncbatch",
        packages=(SDK, "async-batch-llm"),
    ),
    Peer(
        "litellm Router",
        "`usage-based-routing-v2` with tpm and rpm, 10 retries, 256 at once",
        "limits",
        "litellm_router.run",
        environment="litellm",
        packages=("litellm", "h11"),
        needs_socket=True,
    ),
    Peer(
        "curator",
        "`curator.LLM(backend='openai')` with its defaults and the limits",
        "limits",
        "curator_llm.run",
        environment="curator",
        packages=("bespokelabs-curator",),
        needs_socket=True,
    ),
)

PEERS = {peer.name: peer for peer in ALL}
