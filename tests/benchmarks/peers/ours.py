"""Our own side: everything else in this comparison stays as it is when the pacing changes."""

from __future__ import annotations

import asyncio

from nbcodex.models import Request
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.ratelimit.rate_limiter import RateLimiter
from nbcodex.settings import Secret, Settings
from tests.benchmarks.pacing_wire import Crowd
from tests.benchmarks.peers.stage import KEY, MODEL, Stage
from tests.virtual import LoopClock


async def run(stage: Stage) -> None:
    """Ask all prompts, told nothing of the limits."""
    clock = LoopClock()
    api_client = ApiClient(clock=clock, transport=stage.transport())
    settings = Settings(api_key=Secret(KEY), base_url=stage.base_url)
    crowd = Crowd(api_client, RateLimiter(), clock, settings, seed=stage.knobs.seed)
    stage.open_doors()
    await anext(aiter(api_client.stream(Request(prompt="hi"), settings, model=MODEL)))
    await stage.each(crowd.ask, at_once=len(stage.prompts))
    await asyncio.sleep(0)
