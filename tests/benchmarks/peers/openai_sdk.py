"""The SDK alone, and with tenacity around it as in OpenAI's cookbook.

https://github.com/openai/openai-cookbook/blob/main/examples/How_to_handle_rate_limits.ipynb
"""

from __future__ import annotations

from tests.benchmarks.peers.trial import MAX_CONNECTIONS, Trial, ask
from tests.benchmarks.world import Prompt


async def alone(trial: Trial, *, retries: int) -> None:
    """Let the SDK retry."""
    client = await trial.client(max_retries=retries)
    await trial.ask_all(lambda prompt: ask(client, prompt), at_once=MAX_CONNECTIONS)


async def with_tenacity(trial: Trial, *, attempts: int | None, retries: int, at_once: int) -> None:
    """Retry with random exponential backoff."""
    from tenacity import retry, stop_after_attempt, stop_never, wait_random_exponential

    client = await trial.client(max_retries=retries)

    @retry(
        wait=wait_random_exponential(min=1, max=60),
        stop=stop_after_attempt(attempts) if attempts else stop_never,
    )
    async def ask_with_backoff(prompt: Prompt) -> object:
        return await ask(client, prompt)

    await trial.ask_all(ask_with_backoff, at_once=at_once)
