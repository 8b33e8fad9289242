"""bespokelabs-curator: `curator.LLM` with the OpenAI backend, its defaults, and the limits.

https://docs.bespokelabs.ai: `backend_params`. It runs its loop within ours (nest_asyncio), and
reads the time from the process. tiktoken's tables are fetched, so it is given the true count.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

from tests.benchmarks.peers.stage import KEY, Stage
from tests.benchmarks.prompts import text_of


class Characters:
    """Counts tokens as the simulator does."""

    def encode(self, text: str, **_: Any) -> range:
        return range(round(len(text) / 4))


async def run(stage: Stage) -> None:
    """Ask by an `LLM` with the limits; the watch runs while it sends requests."""
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
        # It asks for them by a request that would block the loop; it is told the limits anyway.
        processor.get_header_based_rate_limits = lambda self: (0, 0)
        send = processor.process_requests_from_file

        async def timed(self: Any, *args: Any, **options: Any) -> None:
            stage.begin()
            await send(self, *args, **options)
            stage.end()

        processor.process_requests_from_file = timed
        llm = curator.LLM(
            model_name="gpt-4o-mini",
            backend="openai",
            generation_params={"max_tokens": stage.prompts[0].max_output},
            backend_params={
                "base_url": stage.base_url,
                "api_key": KEY,
                "max_requests_per_minute": stage.knobs.rpm,
                "max_tokens_per_minute": stage.knobs.tpm,
                "require_all_responses": False,
            },
        )
        llm([text_of(prompt) for prompt in stage.prompts])
