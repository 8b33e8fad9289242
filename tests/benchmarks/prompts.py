"""The prompts and the server of the benchmarks that use the real API client. Data only."""

from __future__ import annotations

from dataclasses import replace

from nbcodex.simulator.knobs import Knobs
from tests.benchmarks.world import Prompt, workload

MODEL = "gpt-5.6-sol"
KNOBS = Knobs(tpm=600_000, rpm=20_000, latency_sigma=0.4, chunk=10_000)
MIN_PROMPT_TOKENS = 8  # of a prompt that states the length of its answer


def text_of(prompt: Prompt) -> str:
    """Return a text of the prompt's tokens that asks for the prompt's output."""
    head = f"{prompt.number} [[tokens={prompt.output}]] "
    return head + "x" * max(0, prompt.tokens * 4 - len(head))


def writable_workload(count: int, seed: int) -> list[Prompt]:
    """Return the prompts of `workload`, each long enough for `text_of`."""
    return [replace(p, tokens=max(p.tokens, MIN_PROMPT_TOKENS)) for p in workload(count, seed)]
