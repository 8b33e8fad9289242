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
from nbcodex.requests.conversation import Conversations, JoinedRequest
from nbcodex.settings import Settings

CARRIED = CarriedReasoning(
    items=({"type": "reasoning", "encrypted_content": "abc", "summary": []},),
    model="m",
    base_url="https://a.example/v1",
)


class Notebook:
    """One process's view of a notebook whose journal may outlive it."""

    def __init__(self, journal: Journal, name: str | None = "one.ipynb") -> None:
        self.journal, self.name = journal, name
        self.conversations = Conversations()

    def restarted(self) -> Notebook:
        """Return the same notebook in another process."""
        return Notebook(self.journal, self.name)

    def joined(self, prompt: str, cell: str | None = None, **how: Any) -> JoinedRequest:
        """Return what a cell would send."""
        origin = Origin(notebook=self.name, cell=cell)
        anew = how.pop("new", False)
        request = Request(prompt=prompt, origin=origin, **{"thread": "main", **how})
        return self.conversations.join(
            request, self.journal.conversations, Settings(), start_new=anew
        )

    def ask(self, prompt: str, cell: str | None = None, **how: Any) -> Request:
        """Run a cell; its answer is its prompt in capitals, unless it ends otherwise."""
        status = how.pop("status", "done")
        text = how.pop("text", prompt.upper())
        request = self.joined(prompt, cell, **how).request
        reply = Reply(id=request.id, text=text, status=status, carried=CARRIED)
        asyncio.run(self._kept(request, reply))
        return request

    async def _kept(self, request: Request, reply: Reply) -> None:
        await self.journal.insert(request)
        await self.journal.finish(request.id, reply)

    def new(self, thread: str = "main") -> None:
        """Run ``%codex new``."""
        self.conversations.start_chapter(self.name, thread, self.journal.conversations)

    def seen(self, prompt: str, cell: str | None = None, **how: Any) -> str:
        """Return the prompts that a cell would see, without running it."""
        return said(self.joined(prompt, cell, **how).request)


def said(request: Request) -> str:
    return " ".join(turn.prompt for turn in request.turns)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """A journal on disk."""
    kept = Journal(tmp_path / "kept")
    yield kept
    kept.close()


@pytest.fixture
def book(journal: Journal) -> Notebook:
    """A notebook in which nothing was asked."""
    return Notebook(journal)


def test_a_cell_sees_what_was_said_before_it(book: Notebook) -> None:
    """Turns are prompt and answer, oldest first."""
    assert said(book.ask("a", "1")) == ""
    book.ask("b", "2")
    turns = book.ask("c", "3").turns
    assert [(turn.prompt, turn.answer) for turn in turns] == [("a", "A"), ("b", "B")]


def test_a_cell_that_runs_again_keeps_its_place(book: Notebook) -> None:
    """It sees the turns before it, replaces its own, and those after it stay."""
    for cell in "123":
        book.ask(f"p{cell}", cell)
    assert said(book.ask("again", "2")) == "p1"
    assert book.seen("d", "4") == "p1 again p3"
    assert book.seen("p1", "1") == ""


@pytest.mark.parametrize("status", ["failed", "parked", "interrupted", "cancelled", "pending"])
def test_only_finished_answers_are_turns(book: Notebook, status: str) -> None:
    """What ended otherwise is not seen, and a failed rerun leaves the old turn in place."""
    book.ask("a", "1")
    book.ask("bad", "2", status=status, text="half")
    book.ask("worse", "1", status=status)
    assert book.seen("c", "3") == "a"


def test_an_answer_without_a_word_is_no_turn(book: Notebook) -> None:
    """An empty answer, as when reasoning used up the bound, is left out."""
    book.ask("a", "1", text=" ")
    assert book.seen("b", "2") == ""


def test_a_resumed_answer_joins_at_its_cells_place(book: Notebook, journal: Journal) -> None:
    """What was parked stands, once answered, where its cell was first run."""
    parked = book.ask("a", "1", status="parked")
    book.ask("b", "2")
    entry = journal.find_entry(parked.id)

    async def resume() -> None:
        await journal.claim(entry.id)
        await journal.finish(entry.id, Reply(id=entry.id, text="A"))

    asyncio.run(resume())
    assert book.seen("c", "3") == "a b"
    assert book.seen("b", "2") == "a"


def test_a_request_of_the_journal_has_its_turns_and_place(book: Notebook, journal: Journal) -> None:
    """Resuming and retrying send the same conversation, to the same place."""
    book.ask("a", "1")
    parked = book.ask("b", "2", status="parked")
    entry = journal.find_entry(parked.id)
    assert entry.request.turns == parked.turns
    assert entry.request.origin.position.number is not None
    assert equality_key(entry.request, base_url="x") == equality_key(parked, base_url="x")


def test_forgetting_an_entry_takes_its_words_from_later_ones(
    book: Notebook, journal: Journal, tmp_path: Path
) -> None:
    """A turn is kept once: what is forgotten is neither seen nor in the file any more."""
    first = book.ask("a secret wish", "1")
    later = book.ask("b", "2")
    asyncio.run(journal.delete(first.id))
    assert book.seen("c", "3") == "b"
    assert journal.find_entry(later.id).request.turns == ()
    journal.close()
    files = (tmp_path / "kept").glob("journal*")
    assert not any(b"secret wish" in file.read_bytes() for file in files)


def test_threads_and_notebooks_are_apart(book: Notebook, journal: Journal) -> None:
    """Each thread of each notebook is its own conversation; None joins none."""
    book.ask("a", "1")
    book.ask("x", "2", thread="other")
    book.ask("lost", "3", thread=None)
    assert book.seen("b", "4") == "a"
    assert book.seen("b", "4", thread="other") == "x"
    assert book.seen("b", "4", thread=None) == ""
    assert Notebook(journal, "two.ipynb").seen("b") == ""
    assert Notebook(journal, None).seen("b") == ""


def test_new_starts_afresh_with_its_cell(book: Notebook) -> None:
    """The cell sees nothing, later ones see it and what follows, earlier ones what they saw."""
    book.ask("a", "1")
    book.ask("b", "2")
    assert said(book.ask("c", "3", new=True)) == ""
    assert said(book.ask("d", "4")) == "c"
    assert book.seen("b", "2") == "a"
    assert said(book.ask("c", "3")) == "a b"
    assert book.seen("e", "5") == "a b c d"


def test_the_word_new_leaves_everything_behind(book: Notebook) -> None:
    """After `%codex new` nothing said before is seen, not even by a cell that runs again."""
    book.ask("a", "1")
    book.ask("b", "2")
    book.ask("x", "9", thread="other")
    book.new()
    assert said(book.ask("b", "2")) == ""
    assert said(book.ask("c", "3")) == "b"
    assert book.seen("y", "8", thread="other") == "x"
    assert book.restarted().seen("d", "4") == "b c"


def test_the_conversation_survives_a_restart(book: Notebook) -> None:
    """Another process of the same notebook goes on with it, cell by cell."""
    book.ask("a", "1")
    book.ask("b", "2")
    again = book.restarted()
    assert again.seen("c", "3") == "a b"
    assert again.seen("b", "2") == "a"


@pytest.mark.parametrize("named", [True, False], ids=["cell ids", "no cell ids"])
@pytest.mark.parametrize("new", [None, 2], ids=["plain", "%codex new in the middle"])
def test_restart_and_run_all_asks_the_same(book: Notebook, named: bool, new: int | None) -> None:
    """After a restart each cell of ten makes the request that it made before, to the letter."""

    def run_all(here: Notebook) -> list[bytes]:
        keys = []
        for number in range(10):
            if number == new:
                here.new()
            request = here.ask(f"p{number}", f"c{number}" if named else None)
            keys.append(equality_key(request, base_url="https://a.example/v1"))
        return keys

    first = run_all(book)
    assert len(set(first)) == 10
    for _ in range(2):
        book = book.restarted()
        assert run_all(book) == first


def test_python_among_cells_is_asked_the_same_again(book: Notebook) -> None:
    """What `ask` joined between named cells keeps its place after a restart."""
    for _ in range(2):
        book = book.restarted()
        seen = [said(book.ask(p, c)) for p, c in (("a", "1"), ("b", None), ("c", "2"), ("d", None))]
        assert seen == ["", "a", "a b", "a b c"]


def test_without_cell_ids_the_same_prompt_is_said_twice(book: Notebook) -> None:
    """In one process, and where another goes on instead of repeating, turns are appended."""
    book.ask("a")
    book.ask("go on")
    assert said(book.ask("go on")) == "a go on"
    again = book.restarted()
    assert said(again.ask("go on")) == "a go on go on"
    assert said(again.ask("a")) == "a go on go on go on"


def test_a_changed_answer_changes_later_requests(book: Notebook) -> None:
    """What stands before a cell is part of what it asks."""
    book.ask("a", "1")
    before = book.ask("b", "2")
    book.ask("a", "1", text="another")
    after = book.joined("b", "2").request
    assert equality_key(after, base_url="x") != equality_key(before, base_url="x")


def test_the_place_in_the_journal_is_no_part_of_the_question() -> None:
    """Turns that say the same are equal, wherever they are kept."""
    one = Request(prompt="b", turns=(Turn(prompt="a", answer="A", entry=1),))
    two = replace(one, turns=(Turn(prompt="a", answer="A", entry=2),))
    other = replace(one, turns=(Turn(prompt="a", answer="A", images=(Image(b"x"),), entry=1),))
    keys = [equality_key(request, base_url="x") for request in (one, two, other)]
    assert keys[0] == keys[1] != keys[2]


def test_reasoning_and_pictures_are_carried_on(book: Notebook) -> None:
    """A turn has its pictures, and its answer's reasoning with whose it is."""
    book.ask("a", "1", images=(Image(b"png"),))
    (turn,) = book.ask("b", "2").turns
    assert turn.images == (Image(b"png"),)
    assert turn.carried == CARRIED.items
    assert (turn.model, turn.base_url) == (CARRIED.model, CARRIED.base_url)


def test_the_oldest_turns_are_left_out_first(book: Notebook) -> None:
    """What does not fit the model is dropped from the beginning, and counted."""
    for number in range(8):
        book.ask(f"p{number} " + "word " * 2_500, str(number))
    joined = book.joined("c", "c", model="nobody-knows-this")
    assert [turn.prompt[:2] for turn in joined.request.turns] == ["p5", "p6", "p7"]
    assert joined.left_out == 5
    assert joined.notes == ["3 earlier turns", "5 older turns left out: the context is full"]
    assert pricing.estimate_request_tokens(joined.request) < conversation.DEFAULT_CONTEXT_TOKENS
    assert book.joined("c", "c", model="gpt-5.6-sol").left_out == 0
    assert book.joined("c", "c", model="gpt-4o").left_out == 0


def test_a_bound_on_the_output_takes_room(book: Notebook) -> None:
    """The answer's own room is kept free, and a prompt that fills the window sees no turn."""
    for number in range(8):
        book.ask(f"p{number} " + "word " * 2_500, str(number))
    assert len(book.joined("c", model="nobody", max_output=12_000).request.turns) == 2
    assert book.joined("word " * 40_000, model="nobody").request.turns == ()


def test_a_journal_in_memory_holds_the_conversation() -> None:
    """Without a file the conversation lasts as long as the process."""
    journal = Journal(None)
    book = Notebook(journal)
    book.ask("a", "1")
    assert book.seen("b", "2") == "a"
    journal.close()
