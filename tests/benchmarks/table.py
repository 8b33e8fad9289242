"""The form of the benchmarks' figures: medians with their range, in Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def spread(figures: Sequence[float], scale: float = 1.0) -> str:
    """Return the median, and the lowest and highest, each times `scale`."""
    low, middle, high = (
        f"{value * scale:.3g}" for value in (min(figures), statistics.median(figures), max(figures))
    )
    return f"{middle} ({low} to {high})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
