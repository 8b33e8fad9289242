"""Data frames and series as Markdown tables, small enough for a prompt.

Owns how much of a frame a prompt holds. Imports no library of frames: they are told by what they
can do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from nbcodex.errors import shorten

ROWS, COLUMNS, CELL = 60, 20, 200
"""How much of a frame a prompt holds: rows, columns, and characters of one cell."""

LARGEST = 20_000
"""Characters of a table, about 5,000 tokens, beyond which rows are left out."""


def has(value: object, *names: str) -> bool:
    """Whether the type of `value` has all these attributes: a proxy or a mock has every one."""
    return all(hasattr(type(value), name) for name in names)


def table(value: Any) -> str | None:
    """Return a pandas or polars frame or series as a Markdown table; None for anything else."""
    if has(value, "to_frame") and not has(value, "columns"):
        value = value.to_frame()
    rows: Iterable[tuple[object, ...]]
    names = list(getattr(value, "columns", ())) if has(value, "columns", "shape") else []
    if has(value, "columns", "shape", "itertuples"):
        plain = type(value.index).__name__ == "RangeIndex" and value.index.name is None
        rows = value.itertuples(index=not plain, name=None)
        labels = [] if plain else [value.index.name or ""]
    elif has(value, "columns", "shape", "iter_rows"):
        rows, labels = value.iter_rows(), []
    else:
        return None
    width = len(labels) + COLUMNS
    lines = [_row([*labels, *names][:width])]
    lines.append("|" + " --- |" * min(width, len(labels) + len(names)))
    shown = list(_shown(_row(row[:width]) for row in islice(rows, ROWS)))
    lines += shown
    lines += _cut(value.shape[0] - len(shown), "row") + _cut(len(names) - COLUMNS, "column")
    return "\n".join(lines) + "\n"


def _shown(rows: Iterator[str]) -> Iterator[str]:
    """Yield rows as long as there is room for them, and the first in any case."""
    size = 0
    for row in rows:
        size += len(row)
        if size > LARGEST and size > len(row):
            return
        yield row


def _cut(more: int, what: str) -> list[str]:
    return [f"… {more:,} more {what}{'s' * (more > 1)}"] if more > 0 else []


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return shorten(text, CELL).replace("|", "\\|")
