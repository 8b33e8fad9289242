"""Limiters that are called before each request: those of aiolimiter, token-throttle, llama-index.

None of them retries, so the SDK does.
"""

from __future__ import annotations

from tests.benchmarks.peers.trial import MODEL, Trial, ask
from tests.benchmarks.world import Prompt

RETRIES = 10
# Requests in flight at most, where a limiter that admits too many would use up all connections.
MAX_CONCURRENT = 256


def reserved_tokens(trial: Trial, prompt: Prompt, *, reserve_max_output: bool) -> int:
    """Return the tokens that a prompt may cost, or those that it costs on average."""
    return prompt.tokens + (prompt.max_output if reserve_max_output else trial.mean_output)


async def with_aiolimiter(
    trial: Trial, *, reserve_max_output: bool, retries: int = RETRIES
) -> None:
    """https://aiolimiter.readthedocs.io: two leaky buckets, one for each limit."""
    from aiolimiter import AsyncLimiter

    client = await trial.client(max_retries=retries)
    tokens, requests = AsyncLimiter(trial.knobs.tpm, 60), AsyncLimiter(trial.knobs.rpm, 60)

    async def acquire_and_ask(prompt: Prompt) -> None:
        await requests.acquire()
        await tokens.acquire(reserved_tokens(trial, prompt, reserve_max_output=reserve_max_output))
        await ask(client, prompt)

    await trial.ask_all(acquire_and_ask, at_once=MAX_CONCURRENT)


async def with_llama_index(trial: Trial, *, reserve_max_output: bool) -> None:
    """Call the limiter as `llama_index.core.rate_limiter` does, with the tokens of a request."""
    from llama_index.core.rate_limiter import TokenBucketRateLimiter

    client = await trial.client(max_retries=RETRIES)
    limiter = TokenBucketRateLimiter(
        requests_per_minute=trial.knobs.rpm, tokens_per_minute=trial.knobs.tpm
    )

    async def acquire_and_ask(prompt: Prompt) -> None:
        await limiter.async_acquire(
            reserved_tokens(trial, prompt, reserve_max_output=reserve_max_output)
        )
        await ask(client, prompt)

    await trial.ask_all(acquire_and_ask, at_once=MAX_CONCURRENT)


async def with_token_throttle(trial: Trial, *, retries: int = RETRIES) -> None:
    """https://github.com/Elijas/token-throttle, "Any provider (manual usage)", in memory.

    Its own counter would download tiktoken's tables: it is given the true count instead.
    """
    import token_throttle as tt

    client = await trial.client(max_retries=retries)
    limits = [
        tt.Quota(metric="requests", limit=trial.knobs.rpm, per_seconds=60),
        tt.Quota(metric="tokens", limit=trial.knobs.tpm, per_seconds=60),
    ]
    limiter = tt.RateLimiter(
        tt.PerModelConfig(quotas=tt.UsageQuotas(limits)), backend=tt.MemoryBackendBuilder()
    )

    async def acquire_and_ask(prompt: Prompt) -> None:
        usage = {"requests": 1, "tokens": reserved_tokens(trial, prompt, reserve_max_output=True)}
        async with limiter.reserve(usage, model=MODEL) as handle:
            response = await ask(client, prompt)
            handle.set_actual_usage({"requests": 1, "tokens": response.usage.total_tokens})

    await trial.ask_all(acquire_and_ask, at_once=MAX_CONCURRENT)
    await limiter.aclose()
