"""Threads and their turns: their order, what a request sees of them, and what does not fit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbcodex.journal.codec import equality_key
from nbcodex.journal.journal import Journal
from nbcodex.models import CarriedReasoning, Image, Origin, Reply, Request, Turn
from nbcodex.openai_api import pricing
from nbcodex.requests import conversation
from nbcodex.requests.conversation import Conversations
from nbcodex.settings import Settings

CARRIED = CarriedReasoning(
    items=({"type": "reasoning", "encrypted_content": "abc", "summary": []},),
    model="m",
    base_url="https://a.example/v1",
)


class Notebook:
    """A notebook as one process sees it; its journal may be used by a later process."""

    def __init__(self, journal: Journal, name: str | None = "one.ipynb") -> None:
        self.journal, self.name = journal, name
        self.conversations = Conversations()

    def restarted(self) -> Notebook:
        """Return the same notebook in another process."""
        return Notebook(self.journal, self.name)

    def joined(self, prompt: str, cell: str | None = None, **how: Any) -> tuple[Request, list[str]]:
        """Return what a cell would send."""
        origin = Origin(notebook=self.name, cell=cell)
        start_new = how.pop("new", False)
        request = Request(prompt=prompt, origin=origin, **{"thread": "main", **how})
        return self.conversations.join(
            request, self.journal.conversations, Settings(), start_new=start_new
        )

    def ask(self, prompt: str, cell: str | None = None, **how: Any) -> Request:
        """Run a cell; its answer is its prompt in capitals, unless it ends otherwise."""
        status = how.pop("status", "done")
        text = how.pop("text", prompt.upper())
        request, _ = self.joined(prompt, cell, **how)
        reply = Reply(id=request.id, text=text, status=status, carried=CARRIED)
        asyncio.run(self._kept(request, reply))
        return request

    async def _kept(self, request: Request, reply: Reply) -> None:
        await self.journal.insert(request)
        await self.journal.finish(reply)

    def new(self, thread: str = "main") -> None:
        """Run ``%codex new``."""
        self.conversations.start_chapter(self.name, thread, self.journal.conversations)

    def seen(self, prompt: str, cell: str | None = None, **how: Any) -> str:
        """Return the prompts that a cell would see, without running it."""
        return prompts_of(self.joined(prompt, cell, **how)[0])


def prompts_of(request: Request) -> str:
    return " ".join(turn.prompt for turn in request.turns)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """A journal on disk."""
    kept = Journal(tmp_path / "kept")
    yield kept
    kept.close()


@pytest.fixture
def notebook(journal: Journal) -> Notebook:
    """A notebook without any requests."""
    return Notebook(journal)


def test_cell_sees_earlier_turns_oldest_first(notebook: Notebook) -> None:
    assert prompts_of(notebook.ask("a", "1")) == ""
    notebook.ask("b", "2")
    turns = notebook.ask("c", "3").turns
    assert [(turn.prompt, turn.answer) for turn in turns] == [("a", "A"), ("b", "B")]


def test_rerun_cell_keeps_its_position(notebook: Notebook) -> None:
    for cell in "123":
        notebook.ask(f"p{cell}", cell)
    assert prompts_of(notebook.ask("again", "2")) == "p1"
    assert notebook.seen("d", "4") == "p1 again p3"
    assert notebook.seen("p1", "1") == ""


@pytest.mark.parametrize("status", ["failed", "parked", "interrupted", "cancelled", "pending"])
def test_only_finished_answers_are_turns(notebook: Notebook, status: str) -> None:
    notebook.ask("a", "1")
    notebook.ask("bad", "2", status=status, text="half")
    notebook.ask("worse", "1", status=status)
    assert notebook.seen("c", "3") == "a"


def test_empty_answer_is_not_a_turn(notebook: Notebook) -> None:
    notebook.ask("a", "1", text=" ")
    assert notebook.seen("b", "2") == ""


def test_resumed_answer_joins_at_its_cells_position(notebook: Notebook, journal: Journal) -> None:
    parked = notebook.ask("a", "1", status="parked")
    notebook.ask("b", "2")
    entry = journal.find_entry(parked.id)

    async def resume() -> None:
        await journal.claim(entry.id)
        await journal.finish(Reply(id=entry.id, text="A"))

    asyncio.run(resume())
    assert notebook.seen("c", "3") == "a b"
    assert notebook.seen("b", "2") == "a"


def test_stored_request_has_its_turns_and_position(notebook: Notebook, journal: Journal) -> None:
    notebook.ask("a", "1")
    parked = notebook.ask("b", "2", status="parked")
    entry = journal.find_entry(parked.id)
    assert entry.request.turns == parked.turns
    assert entry.request.origin.position.number is not None
    assert equality_key(entry.request, base_url="x") == equality_key(parked, base_url="x")


def test_forgetting_an_entry_removes_its_text_from_later_ones(
    notebook: Notebook, journal: Journal, tmp_path: Path
) -> None:
    first = notebook.ask("a secret plan", "1")
    later = notebook.ask("b", "2")
    asyncio.run(journal.delete(first.id))
    assert notebook.seen("c", "3") == "b"
    assert journal.find_entry(later.id).request.turns == ()
    journal.close()
    files = (tmp_path / "kept").glob("journal*")
    assert not any(b"secret plan" in file.read_bytes() for file in files)


def test_threads_and_notebooks_are_separate(notebook: Notebook, journal: Journal) -> None:
    notebook.ask("a", "1")
    notebook.ask("x", "2", thread="other")
    notebook.ask("lost", "3", thread=None)
    assert notebook.seen("b", "4") == "a"
    assert notebook.seen("b", "4", thread="other") == "x"
    assert notebook.seen("b", "4", thread=None) == ""
    assert Notebook(journal, "two.ipynb").seen("b") == ""
    assert Notebook(journal, None).seen("b") == ""


def test_new_option_starts_afresh_with_its_cell(notebook: Notebook) -> None:
    notebook.ask("a", "1")
    notebook.ask("b", "2")
    assert prompts_of(notebook.ask("c", "3", new=True)) == ""
    assert prompts_of(notebook.ask("d", "4")) == "c"
    assert notebook.seen("b", "2") == "a"
    assert prompts_of(notebook.ask("c", "3")) == "a b"
    assert notebook.seen("e", "5") == "a b c d"


def test_new_command_hides_everything_before(notebook: Notebook) -> None:
    notebook.ask("a", "1")
    notebook.ask("b", "2")
    notebook.ask("x", "9", thread="other")
    notebook.new()
    assert prompts_of(notebook.ask("b", "2")) == ""
    assert prompts_of(notebook.ask("c", "3")) == "b"
    assert notebook.seen("y", "8", thread="other") == "x"
    assert notebook.restarted().seen("d", "4") == "b c"


def test_conversation_survives_a_restart(notebook: Notebook) -> None:
    notebook.ask("a", "1")
    notebook.ask("b", "2")
    again = notebook.restarted()
    assert again.seen("c", "3") == "a b"
    assert again.seen("b", "2") == "a"


@pytest.mark.parametrize("named", [True, False], ids=["cell ids", "no cell ids"])
@pytest.mark.parametrize("new", [None, 2], ids=["plain", "%codex new in the middle"])
def test_restart_and_run_all_repeats_the_same_requests(
    notebook: Notebook, named: bool, new: int | None
) -> None:
    def run_all(here: Notebook) -> list[bytes]:
        keys = []
        for number in range(10):
            if number == new:
                here.new()
            request = here.ask(f"p{number}", f"c{number}" if named else None)
            keys.append(equality_key(request, base_url="https://a.example/v1"))
        return keys

    first = run_all(notebook)
    assert len(set(first)) == 10
    for _ in range(2):
        notebook = notebook.restarted()
        assert run_all(notebook) == first


def test_ask_among_cells_keeps_its_position_after_a_restart(notebook: Notebook) -> None:
    for _ in range(2):
        notebook = notebook.restarted()
        seen = [
            prompts_of(notebook.ask(p, c))
            for p, c in (("a", "1"), ("b", None), ("c", "2"), ("d", None))
        ]
        assert seen == ["", "a", "a b", "a b c"]


def test_repeated_prompt_without_cell_id_is_appended(notebook: Notebook) -> None:
    notebook.ask("a")
    notebook.ask("go on")
    assert prompts_of(notebook.ask("go on")) == "a go on"
    again = notebook.restarted()
    assert prompts_of(again.ask("go on")) == "a go on go on"
    assert prompts_of(again.ask("a")) == "a go on go on go on"


def test_changed_answer_changes_later_requests(notebook: Notebook) -> None:
    notebook.ask("a", "1")
    before = notebook.ask("b", "2")
    notebook.ask("a", "1", text="another")
    after, _ = notebook.joined("b", "2")
    assert equality_key(after, base_url="x") != equality_key(before, base_url="x")


def test_equal_turns_are_equal_wherever_stored() -> None:
    one = Request(prompt="b", turns=(Turn(prompt="a", answer="A", entry=1),))
    two = replace(one, turns=(Turn(prompt="a", answer="A", entry=2),))
    other = replace(one, turns=(Turn(prompt="a", answer="A", images=(Image(b"x"),), entry=1),))
    keys = [equality_key(request, base_url="x") for request in (one, two, other)]
    assert keys[0] == keys[1] != keys[2]


def test_turns_carry_images_and_reasoning(notebook: Notebook) -> None:
    notebook.ask("a", "1", images=(Image(b"png"),))
    (turn,) = notebook.ask("b", "2").turns
    assert turn.images == (Image(b"png"),)
    assert turn.carried == CARRIED.items
    assert (turn.model, turn.base_url) == (CARRIED.model, CARRIED.base_url)


def test_oldest_turns_are_left_out_first(notebook: Notebook) -> None:
    for number in range(8):
        notebook.ask(f"p{number} " + "word " * 2_500, str(number))
    request, notes = notebook.joined("c", "c", model="nobody-knows-this")
    assert [turn.prompt[:2] for turn in request.turns] == ["p5", "p6", "p7"]
    assert notes == ["3 earlier turns", "5 older turns left out: the context is full"]
    assert pricing.estimate_request_tokens(request) < conversation.DEFAULT_CONTEXT_TOKENS
    for model in ("gpt-5.6-sol", "gpt-4o"):
        assert notebook.joined("c", "c", model=model)[1] == ["8 earlier turns"]


def test_room_for_the_answer_is_kept_free(notebook: Notebook) -> None:
    for number in range(8):
        notebook.ask(f"p{number} " + "word " * 2_500, str(number))
    assert len(notebook.joined("c", model="nobody", max_output=12_000)[0].turns) == 2
    assert notebook.joined("word " * 40_000, model="nobody")[0].turns == ()


def test_journal_in_memory_holds_the_conversation() -> None:
    journal = Journal(None)
    notebook = Notebook(journal)
    notebook.ask("a", "1")
    assert notebook.seen("b", "2") == "a"
    journal.close()
