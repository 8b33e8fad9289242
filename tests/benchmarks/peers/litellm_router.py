"""litellm's Router with the limits of its one deployment.

https://docs.litellm.ai/docs/routing: usage-based routing, `tpm` and `rpm`, retries.
"""

from __future__ import annotations

import datetime
import os
import time

from tests.benchmarks.peers.limiters import MAX_CONCURRENT, RETRIES
from tests.benchmarks.peers.trial import KEY, Trial
from tests.benchmarks.prompts import text_of
from tests.benchmarks.world import Prompt


async def run(trial: Trial) -> None:
    """Send by a router."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    from litellm import Router
    from litellm.router_strategy import lowest_tpm_rpm_v2

    # It counts by the minutes of the wall clock, which it reads by a function of its own.
    lowest_tpm_rpm_v2.get_utc_datetime = lambda: datetime.datetime.fromtimestamp(
        time.time(), datetime.UTC
    )
    router = Router(
        model_list=[
            {
                "model_name": "model",
                "litellm_params": {
                    "model": "openai/gpt-4o-mini",
                    "api_key": KEY,
                    "api_base": trial.base_url,
                    "tpm": trial.knobs.tpm,
                    "rpm": trial.knobs.rpm,
                },
            }
        ],
        routing_strategy="usage-based-routing-v2",
        num_retries=RETRIES,
    )

    async def ask(prompt: Prompt) -> None:
        await router.acompletion(
            model="model",
            messages=[{"role": "user", "content": text_of(prompt)}],
            max_tokens=prompt.max_output,
        )

    trial.lift_limits()
    await router.acompletion(model="model", messages=[{"role": "user", "content": "hi"}])
    await trial.ask_all(ask, at_once=MAX_CONCURRENT)
