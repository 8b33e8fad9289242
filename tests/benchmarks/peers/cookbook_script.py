"""OpenAI's cookbook script ``api_request_parallel_processor.py``, in the packaged form of parareq.

The package imports a private module of its author and tiktoken, which would download tables. Both
are replaced, the count of tokens by the true one.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import types
from pathlib import Path

from tests.benchmarks.peers.trial import KEY, MODEL, Trial
from tests.benchmarks.prompts import text_of


async def run(trial: Trial, *, share: float) -> None:
    """Process a file of requests, at a share of the limits."""
    sys.modules["synthgpt"] = types.ModuleType("synthgpt")
    secret = types.ModuleType("synthgpt.secret")
    secret.OPENAI_API_KEY = KEY  # type: ignore[attr-defined]
    sys.modules["synthgpt.secret"] = secret
    sys.modules["tiktoken"] = types.ModuleType("tiktoken")
    from parareq import parareq

    # Its own function finds the endpoint in https addresses only.
    parareq.api_endpoint_from_url = lambda url: url.partition("/v1/")[2]
    parareq.num_tokens_consumed_from_request = _cost
    with tempfile.TemporaryDirectory() as folder:
        requests_file = _empty_file(folder)
        lines = [f"{json.dumps(line)}\n" for line in _lines(trial)]
        processor = parareq.APIRequestProcessor(
            requests_filepath=str(requests_file),
            save_filepath=str(Path(folder, "answers.jsonl")),
            request_url=f"{trial.base_url}/chat/completions",
            api_key=KEY,
            max_requests_per_minute=share * trial.knobs.rpm,
            max_tokens_per_minute=share * trial.knobs.tpm,
            max_attempts=5,
        )
        trial.start_clock()
        await processor._process_api_requests_from_file(
            iter(lines),
            asyncio.Queue(),
            parareq.task_id_generator_function(),
            parareq.StatusTracker(),
        )
        trial.stop_clock()


def _empty_file(folder: str) -> Path:
    """Return a file, which the script requires to exist although its lines come from memory."""
    path = Path(folder, "requests.jsonl")
    path.touch()
    return path


def _lines(trial: Trial) -> list[dict[str, object]]:
    return [
        {
            "model": MODEL,
            "max_tokens": prompt.max_output,
            "messages": [{"role": "user", "content": text_of(prompt)}],
        }
        for prompt in trial.prompts
    ]


def _cost(request: dict[str, object], *_: object) -> int:
    messages, bound = request["messages"], request["max_tokens"]
    assert isinstance(messages, list)
    assert isinstance(bound, int)
    return round(len(messages[0]["content"]) / 4) + bound
