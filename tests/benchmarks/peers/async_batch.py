"""async-batch-llm: `process_prompts` with token-aware admission.

https://geoff-davis.github.io/async-batch-llm/token-aware-admission/
"""

from __future__ import annotations

from typing import Any

from tests.benchmarks.peers.limiters import MAX_CONCURRENT
from tests.benchmarks.peers.trial import MODEL, Trial
from tests.benchmarks.prompts import text_of


async def run(trial: Trial, *, tuned: bool) -> None:
    """Wrap the SDK, with its retries off, as in "Use your existing async client"."""
    from async_batch_llm import (
        CallableStrategy,
        CallOutcome,
        CharacterTokenEstimator,
        ProcessorConfig,
        RateLimitConfig,
        process_prompts,
    )
    from async_batch_llm.classifiers import OpenAIErrorClassifier

    client = await trial.client(max_retries=0)
    bound = trial.prompts[0].max_output

    async def invoke(text: str, **_: Any) -> Any:
        answer = await client.responses.create(model=MODEL, input=text, max_output_tokens=bound)
        used = answer.usage
        usage = {"input_tokens": used.input_tokens, "output_tokens": used.output_tokens}
        return CallOutcome(answer.output_text, token_usage=usage)

    config = ProcessorConfig(
        concurrency=MAX_CONCURRENT,
        max_requests_per_minute=trial.knobs.rpm,
        max_tokens_per_minute=trial.knobs.tpm,
        token_estimator=CharacterTokenEstimator(expected_output_tokens=trial.mean_output),
        rate_limit=(
            RateLimitConfig(cooldown_seconds=1, slow_start_items=0) if tuned else RateLimitConfig()
        ),
    )
    strategy = CallableStrategy(invoke, error_classifier=OpenAIErrorClassifier())
    texts = [text_of(prompt) for prompt in trial.prompts]
    trial.start_clock()
    result = await process_prompts(strategy, texts, config=config)
    trial.stop_clock()
    trial.errors["failed"] = result.failed
