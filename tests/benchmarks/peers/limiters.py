"""Limiters that are asked before each request: aiolimiter, token-throttle, llama-index's.

None of them retries, so the SDK does.
"""

from __future__ import annotations

from tests.benchmarks.peers.stage import MODEL, Stage, ask
from tests.benchmarks.world import Prompt

RETRIES = 10
FEW = 256
"""Requests under way at most, where a limiter that lets too many pass would fill the pool."""


def reserved(stage: Stage, prompt: Prompt, *, whole: bool) -> int:
    """Return what a prompt may cost, or what it will on average."""
    return prompt.tokens + (prompt.max_output if whole else stage.mean_output)


async def with_aiolimiter(stage: Stage, *, whole: bool, retries: int = RETRIES) -> None:
    """https://aiolimiter.readthedocs.io: two leaky buckets, one for each limit."""
    from aiolimiter import AsyncLimiter

    client = await stage.client(max_retries=retries)
    tokens, requests = AsyncLimiter(stage.knobs.tpm, 60), AsyncLimiter(stage.knobs.rpm, 60)

    async def ask_in_turn(prompt: Prompt) -> None:
        await requests.acquire()
        await tokens.acquire(reserved(stage, prompt, whole=whole))
        await ask(client, prompt)

    await stage.each(ask_in_turn, at_once=FEW)


async def with_llama_index(stage: Stage, *, whole: bool) -> None:
    """Call the limiter as `llama_index.core.rate_limiter` has it, with the tokens of a request."""
    from llama_index.core.rate_limiter import TokenBucketRateLimiter

    client = await stage.client(max_retries=RETRIES)
    limiter = TokenBucketRateLimiter(
        requests_per_minute=stage.knobs.rpm, tokens_per_minute=stage.knobs.tpm
    )

    async def ask_in_turn(prompt: Prompt) -> None:
        await limiter.async_acquire(reserved(stage, prompt, whole=whole))
        await ask(client, prompt)

    await stage.each(ask_in_turn, at_once=FEW)


async def with_token_throttle(stage: Stage, *, retries: int = RETRIES) -> None:
    """https://github.com/Elijas/token-throttle, "Any provider (manual usage)", in memory.

    Its own counter needs tiktoken's tables, which are fetched: it is given the true count instead.
    """
    import token_throttle as tt

    client = await stage.client(max_retries=retries)
    limits = [
        tt.Quota(metric="requests", limit=stage.knobs.rpm, per_seconds=60),
        tt.Quota(metric="tokens", limit=stage.knobs.tpm, per_seconds=60),
    ]
    limiter = tt.RateLimiter(
        tt.PerModelConfig(quotas=tt.UsageQuotas(limits)), backend=tt.MemoryBackendBuilder()
    )

    async def ask_in_turn(prompt: Prompt) -> None:
        usage = {"requests": 1, "tokens": reserved(stage, prompt, whole=True)}
        async with limiter.reserve(usage, model=MODEL) as handle:
            response = await ask(client, prompt)
            handle.set_actual_usage({"requests": 1, "tokens": response.usage.total_tokens})

    await stage.each(ask_in_turn, at_once=FEW)
    await limiter.aclose()
