"""langchain's `InMemoryRateLimiter`, which counts requests only: their rate must stand for tokens.

https://python.langchain.com/docs/how_to/chat_model_rate_limiting
"""

from __future__ import annotations

import asyncio
import statistics

from tests.benchmarks.peers.limiters import FEW, RETRIES, reserved
from tests.benchmarks.peers.stage import KEY, MODEL, Stage
from tests.benchmarks.prompts import text_of
from tests.benchmarks.world import Prompt


async def run(stage: Stage, *, whole: bool) -> None:
    """Ask by a chat model that has a limiter; its bucket holds a minute of requests."""
    from langchain_core.rate_limiters import InMemoryRateLimiter
    from langchain_openai import ChatOpenAI

    usual = statistics.fmean(reserved(stage, prompt, whole=whole) for prompt in stage.prompts)
    limiter = InMemoryRateLimiter(
        requests_per_second=stage.knobs.tpm / 60 / usual,
        check_every_n_seconds=0.1,
        max_bucket_size=stage.knobs.tpm / usual,
    )
    client = await stage.client(max_retries=RETRIES)
    model = ChatOpenAI(
        model=MODEL,
        api_key=KEY,
        base_url=stage.base_url,
        max_retries=RETRIES,
        http_async_client=client._client,
        rate_limiter=limiter,
    )
    # Its own client's first request runs a thread, too.
    stage.open_doors()
    limiter.available_tokens, limiter.last = 1.0, asyncio.get_running_loop().time()
    await model.ainvoke("hi", max_tokens=16)

    async def ask(prompt: Prompt) -> None:
        await model.ainvoke(text_of(prompt), max_tokens=prompt.max_output)

    await stage.each(ask, at_once=FEW)
