"""langchain's `InMemoryRateLimiter`, which counts requests only: the rate is derived from tokens.

https://python.langchain.com/docs/how_to/chat_model_rate_limiting
"""

from __future__ import annotations

import asyncio
import statistics

from tests.benchmarks.peers.limiters import MAX_CONCURRENT, RETRIES, reserved_tokens
from tests.benchmarks.peers.trial import KEY, MODEL, Trial
from tests.benchmarks.prompts import text_of
from tests.benchmarks.world import Prompt


async def run(trial: Trial, *, reserve_max_output: bool) -> None:
    """Send by a chat model with a limiter, whose bucket holds the requests of a minute."""
    from langchain_core.rate_limiters import InMemoryRateLimiter
    from langchain_openai import ChatOpenAI

    mean_tokens = statistics.fmean(
        reserved_tokens(trial, prompt, reserve_max_output=reserve_max_output)
        for prompt in trial.prompts
    )
    limiter = InMemoryRateLimiter(
        requests_per_second=trial.knobs.tpm / 60 / mean_tokens,
        check_every_n_seconds=0.1,
        max_bucket_size=trial.knobs.tpm / mean_tokens,
    )
    client = await trial.client(max_retries=RETRIES)
    model = ChatOpenAI(
        model=MODEL,
        api_key=KEY,
        base_url=trial.base_url,
        max_retries=RETRIES,
        http_async_client=client._client,
        rate_limiter=limiter,
    )
    # The first request of its client runs a thread, in which virtual time would jump.
    trial.lift_limits()
    limiter.available_tokens, limiter.last = 1.0, asyncio.get_running_loop().time()
    await model.ainvoke("hi", max_tokens=16)

    async def ask(prompt: Prompt) -> None:
        await model.ainvoke(text_of(prompt), max_tokens=prompt.max_output)

    await trial.ask_all(ask, at_once=MAX_CONCURRENT)
