"""How often the text of an answer is written while it arrives."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import Any

import pytest

from nbcodex.models import Request
from nbcodex.requests.entry_writer import EntryWriter
from tests.scripted import InstantJournal
from tests.virtual import LoopClock, run_virtual


@dataclass
class GrowingAnswer:
    """An answer that is still arriving."""

    text: str = ""
    position: None = None
    notes: tuple[str, ...] = ()


def lengths_written(chars_per_s: int, *, seconds: int, step: float) -> list[int]:
    """Return how long the text was each time that it was written."""

    async def main() -> list[int]:
        answer, journal = GrowingAnswer(), InstantJournal()
        arguments: Any = (journal, Request(prompt="x"), answer, LoopClock())
        writer = EntryWriter(*arguments)
        for _ in range(round(seconds / step)):
            answer.text += "x" * round(chars_per_s * step)
            writer.update_soon()
            await asyncio.sleep(step)
        return [len(text) for verb, text in journal.written if verb == "update_text"]

    return run_virtual(main())


@pytest.mark.parametrize("chars_per_s", [10, 400, 5_000])
def test_usual_answer_is_written_every_second(chars_per_s: int) -> None:
    written = lengths_written(chars_per_s, seconds=12, step=0.1)
    assert len(written) >= 12
    assert all(later - earlier <= chars_per_s for earlier, later in itertools.pairwise(written))


@pytest.mark.parametrize("chars_per_s", [2_000, 20_000])
def test_answer_without_an_end_is_written_a_bounded_number_of_times(chars_per_s: int) -> None:
    """Each time the whole text is written: at a fixed interval, this would be gigabytes."""
    seconds = 2_000_000 // chars_per_s
    written = lengths_written(chars_per_s, seconds=seconds, step=0.4)
    assert written[-1] > 1_000_000
    assert sum(written) < 120_000 * seconds
