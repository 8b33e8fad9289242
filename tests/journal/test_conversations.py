"""How conversations are stored: once per turn, in damaged files, and deleted for good."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbcodex.journal.journal import Journal
from nbcodex.models import Origin, Reply, Request, Turn
from nbcodex.settings import JOURNAL_FILENAME

Open = Callable[..., Journal]


def add_turn(journal: Journal, prompt: str, *turns: Turn, thread: str = "main") -> int:
    """Insert a prompt and its answer; return the entry's number."""
    request = Request(prompt=prompt, thread=thread, turns=turns, origin=Origin(notebook="n"))

    async def keep() -> None:
        await journal.insert(request)
        await journal.finish(Reply(id=request.id, text="yes"))

    asyncio.run(keep())
    return journal.conversations.find_conversation("n", thread).candidates[-1].entry


def test_turn_is_stored_once(folder: Path, open_journal: Open) -> None:
    journal = open_journal()
    entries: list[int] = []
    for number in range(5):
        turns = journal.conversations.read_turns(entries)
        entries.append(add_turn(journal, f"unmistakable {number}", *turns))
    journal.close()
    assert (folder / JOURNAL_FILENAME).read_bytes().count(b"unmistakable 0") == 1


def test_turns_without_entries_are_stored_in_full(open_journal: Open) -> None:
    journal = open_journal()
    own = Turn(prompt="a", answer="b")
    add_turn(journal, "c", own)
    entry = journal.recent_entries(1)[0]
    assert journal.find_entry(entry.id).request.turns == (own,)


@pytest.mark.parametrize("column", ["request", "reply"])
@pytest.mark.parametrize("text", ["{", "null", '{"__record__": "Reply", "id": "x"}', "[" * 9**5])
def test_damaged_turn_is_left_out(open_journal: Open, column: str, text: str) -> None:
    journal = open_journal()
    bad, good = add_turn(journal, "bad"), add_turn(journal, "good")
    update = f"UPDATE entries SET {column} = ? WHERE seq = ?"

    def damage(connection: Any) -> None:
        connection.execute(update, (text, bad))

    journal._worker.call(damage, default=None)
    prompts = [turn.prompt for turn in journal.conversations.read_turns([bad, good])]
    assert prompts[-1] == "good"
    assert "bad" not in prompts or column == "reply"


def test_deleting_all_deletes_the_chapters(open_journal: Open) -> None:
    journal = open_journal()
    add_turn(journal, "a")
    assert journal.conversations.start_chapter("n", "main") > 0
    asyncio.run(journal.delete())
    assert journal.conversations.find_conversation("n", "main").chapter == 0
