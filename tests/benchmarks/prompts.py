"""What the benchmarks that go through a real wire ask, and of whom. Data, no deeds."""

from __future__ import annotations

from dataclasses import replace

from nbcodex.simulator.knobs import Knobs
from tests.benchmarks.world import Prompt, workload

MODEL = "gpt-5.6-sol"
KNOBS = Knobs(tpm=600_000, rpm=20_000, latency_sigma=0.4, chunk=10_000)
SHORTEST = 8
"""Tokens of the shortest prompt that can say what it wants."""


def text_of(prompt: Prompt) -> str:
    """Return a text of the prompt's tokens that asks for the prompt's output."""
    head = f"{prompt.number} [[tokens={prompt.output}]] "
    return head + "x" * max(0, prompt.tokens * 4 - len(head))


def written(count: int, seed: int) -> list[Prompt]:
    """Return the prompts of `workload`, none too short to be written down."""
    return [replace(p, tokens=max(p.tokens, SHORTEST)) for p in workload(count, seed)]
