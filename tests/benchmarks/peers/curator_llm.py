"""bespokelabs-curator: `curator.LLM` with the OpenAI backend, its defaults, and the limits.

https://docs.bespokelabs.ai: `backend_params`. It runs its loop within ours (nest_asyncio), and
reads the time from the process. tiktoken would download tables, so it is given the true count.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

from tests.benchmarks.peers.trial import KEY, Trial
from tests.benchmarks.prompts import text_of


class Characters:
    """Counts tokens as the simulator does."""

    def encode(self, text: str, **_: Any) -> range:
        return range(round(len(text) / 4))


async def run(trial: Trial) -> None:
    """Send by an `LLM` with the limits; only the time while it sends requests is measured."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(
            TELEMETRY_ENABLED="false",
            LITELLM_LOCAL_MODEL_COST_MAP="True",
            HF_HUB_OFFLINE="1",
            CURATOR_CACHE_DIR=folder,
            HF_HOME=folder,
        )
        from bespokelabs import curator
        from bespokelabs.curator.request_processor.online import openai_online_request_processor

        processor = openai_online_request_processor.OpenAIOnlineRequestProcessor
        processor.get_token_encoding = lambda self: Characters()
        # It would request the limits in a way that blocks the loop; they are configured anyway.
        processor.get_header_based_rate_limits = lambda self: (0, 0)
        send = processor.process_requests_from_file

        async def timed(self: Any, *args: Any, **options: Any) -> None:
            trial.start_clock()
            await send(self, *args, **options)
            trial.stop_clock()

        processor.process_requests_from_file = timed
        llm = curator.LLM(
            model_name="gpt-4o-mini",
            backend="openai",
            generation_params={"max_tokens": trial.prompts[0].max_output},
            backend_params={
                "base_url": trial.base_url,
                "api_key": KEY,
                "max_requests_per_minute": trial.knobs.rpm,
                "max_tokens_per_minute": trial.knobs.tpm,
                "require_all_responses": False,
            },
        )
        llm([text_of(prompt) for prompt in trial.prompts])
