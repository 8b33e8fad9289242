"""The rate limiter of this project, which the other libraries are compared with."""

from __future__ import annotations

import asyncio

from nbcodex.models import Request
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.ratelimit.rate_limiter import RateLimiter
from nbcodex.settings import Secret, Settings
from tests.benchmarks.pacing_wire import Crowd
from tests.benchmarks.peers.trial import KEY, MODEL, Trial
from tests.virtual import LoopClock


async def run(trial: Trial) -> None:
    """Send all prompts, without any knowledge of the limits."""
    clock = LoopClock()
    api_client = ApiClient(clock=clock, transport=trial.transport())
    settings = Settings(api_key=Secret(KEY), base_url=trial.base_url)
    crowd = Crowd(api_client, RateLimiter(), clock, settings, seed=trial.knobs.seed)
    trial.lift_limits()
    await anext(aiter(api_client.stream(Request(prompt="hi"), settings, model=MODEL)))
    await trial.ask_all(crowd.ask, at_once=len(trial.prompts))
    await asyncio.sleep(0)
