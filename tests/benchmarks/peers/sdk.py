"""The SDK by itself, and with tenacity around it as OpenAI's cookbook has it.

https://github.com/openai/openai-cookbook/blob/main/examples/How_to_handle_rate_limits.ipynb
"""

from __future__ import annotations

from tests.benchmarks.peers.stage import POOL, Stage, ask
from tests.benchmarks.world import Prompt


async def alone(stage: Stage, *, retries: int) -> None:
    """Let the SDK retry."""
    client = await stage.client(max_retries=retries)
    await stage.each(lambda prompt: ask(client, prompt), at_once=POOL)


async def with_tenacity(stage: Stage, *, attempts: int | None, retries: int, at_once: int) -> None:
    """Retry with random exponential backoff."""
    from tenacity import retry, stop_after_attempt, stop_never, wait_random_exponential

    client = await stage.client(max_retries=retries)

    @retry(
        wait=wait_random_exponential(min=1, max=60),
        stop=stop_after_attempt(attempts) if attempts else stop_never,
    )
    async def ask_with_backoff(prompt: Prompt) -> object:
        return await ask(client, prompt)

    await stage.each(ask_with_backoff, at_once=at_once)
