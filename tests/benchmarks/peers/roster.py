"""Who is compared, as which documentation has it, and what each needs. Data, no deeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SDK = "openai==3.54.0"


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to ask many prompts.

    Parameters
    ----------
    name : str
        What it is called on the command line, and in the plot.
    how : str
        How it is used, for the table.
    told : str
        What it is told of the server: nothing, or the limits.
    play : str
        Module and function, ``module.function``, that use it.
    options : dict
        What the function is given beside the stage.
    home : str
        Name of its virtual environment; empty: ours.
    needs : tuple of str
        What that is made of.
    python : str
        The oldest Python it takes, if that is not ours.
    sockets : bool
        Whether it needs a real socket, on the loopback, even in virtual time.
    """

    name: str
    how: str
    told: str
    play: str
    options: dict[str, Any] = field(default_factory=dict)
    home: str = "small"
    needs: tuple[str, ...] = (SDK, "tenacity", "aiolimiter")
    python: str = ""
    sockets: bool = False

    @property
    def module(self) -> str:
        """The module that uses it."""
        return self.play.partition(".")[0]

    @property
    def function(self) -> str:
        """The function that uses it."""
        return self.play.partition(".")[2]


def _script(share: int) -> Peer:
    return Peer(
        f"cookbook script, {share} %",
        f"OpenAI's `api_request_parallel_processor.py` (as packaged by parareq), {share} % of the "
        "limits, 5 attempts",
        "limits",
        "script.run",
        {"share": share / 100},
        home="script",
        needs=("parareq", "aiohttp", "h11"),
        sockets=True,
    )


ALL = (
    Peer("nbcodex", "this project's pacing", "nothing", "ours.run", home="", needs=()),
    Peer("SDK, 2 retries", "`AsyncOpenAI()`", "nothing", "sdk.alone", {"retries": 2}),
    Peer(
        "SDK, 10 retries", "`AsyncOpenAI(max_retries=10)`", "nothing", "sdk.alone", {"retries": 10}
    ),
    Peer(
        "tenacity, cookbook",
        "`wait_random_exponential(min=1, max=60)`, `stop_after_attempt(6)` around the SDK",
        "nothing",
        "sdk.with_tenacity",
        {"attempts": 6, "retries": 2, "at_once": 1000},
    ),
    Peer(
        "tenacity, patient",
        "the same wait without an end, the SDK's own retries off, 256 at once",
        "nothing",
        "sdk.with_tenacity",
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
        {"whole": True},
    ),
    Peer(
        "aiolimiter, means",
        "the same with `acquire(input + mean output)`",
        "limits, mean output",
        "limiters.with_aiolimiter",
        {"whole": False},
    ),
    Peer(
        "aiolimiter, means, patient",
        "the same, the SDK with 1,000 retries",
        "limits, mean output",
        "limiters.with_aiolimiter",
        {"whole": False, "retries": 1_000},
    ),
    Peer(
        "token-throttle",
        "`reserve` and refund, memory backend, 256 at once, the SDK with 10 retries",
        "limits",
        "limiters.with_token_throttle",
        home="throttle",
        needs=(SDK, "token-throttle"),
        python="3.12",
    ),
    Peer(
        "token-throttle, patient",
        "the same, the SDK with 1,000 retries",
        "limits",
        "limiters.with_token_throttle",
        {"retries": 1_000},
        home="throttle",
        needs=(SDK, "token-throttle"),
        python="3.12",
    ),
    Peer(
        "llama-index, bounds",
        "`TokenBucketRateLimiter.async_acquire(input + max_output)`, the SDK with 10 retries",
        "limits",
        "limiters.with_llama_index",
        {"whole": True},
        home="llamaindex",
        needs=(SDK, "llama-index-core"),
    ),
    Peer(
        "langchain, bounds",
        "`InMemoryRateLimiter`, requests a second from tpm / mean(input + max_output), "
        "`ChatOpenAI(max_retries=10)`",
        "limits, mean input",
        "chain.run",
        {"whole": True},
        home="langchain",
        needs=(SDK, "langchain-openai"),
    ),
    Peer(
        "langchain, means",
        "the same from tpm / mean(input + output)",
        "limits, mean input and output",
        "chain.run",
        {"whole": False},
        home="langchain",
        needs=(SDK, "langchain-openai"),
    ),
    Peer(
        "async-batch-llm",
        "`process_prompts`, token-aware admission with the expected output, 256 at once",
        "limits, mean output",
        "batch.run",
        {"tuned": False},
        home="asyncbatch",
        needs=(SDK, "async-batch-llm"),
    ),
    Peer(
        "async-batch-llm, tuned",
        "the same with a cooldown of 1 s instead of 300 (then the server's word counts) and no "
        "slow start",
        "limits, mean output",
        "batch.run",
        {"tuned": True},
        home="asyncbatch",
        needs=(SDK, "async-batch-llm"),
    ),
    Peer(
        "litellm Router",
        "`usage-based-routing-v2` with tpm and rpm, 10 retries, 256 at once",
        "limits",
        "router.run",
        home="litellm",
        needs=("litellm", "h11"),
        sockets=True,
    ),
    Peer(
        "curator",
        "`curator.LLM(backend='openai')` with its defaults and the limits",
        "limits",
        "curated.run",
        home="curator",
        needs=("bespokelabs-curator",),
        sockets=True,
    ),
)

PEERS = {peer.name: peer for peer in ALL}
