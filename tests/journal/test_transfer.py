"""What goes along when a file fails and memory stands in for it, and what is brought back."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from nbcodex.journal.journal import Journal
from nbcodex.journal.spending import SpendAmount, Spending
from nbcodex.models import Origin, Reply, Request, Turn, TurnPosition, Usage
from nbcodex.settings import JOURNAL_FILENAME

from .conftest import HandClock, added, run

Open = Callable[..., Journal]
OURS = "ours"


@pytest.fixture
def journal(open_journal: Open) -> Journal:
    """A journal that does not wait for whoever holds its file locked."""
    return open_journal(patience=0.0)


@pytest.fixture
def locked(folder: Path, journal: Journal, clock: HandClock) -> Callable[[], Any]:
    """Return what locks the file for a while, and then has it tried again."""

    @contextmanager
    def lock() -> Iterator[None]:
        with closing(sqlite3.connect(folder / JOURNAL_FILENAME, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            assert "locked" in (journal.problem or "")
            other.execute("ROLLBACK")
        clock.pass_(61)
        journal.read_totals()
        assert journal.problem is None

    return lock


def ask(
    journal: Journal,
    prompt: str,
    *turns: Turn,
    status: Any = "done",
    notebook: str = OURS,
    place: TurnPosition | None = None,
) -> Request:
    """Return a request that was asked in a conversation, and came to its end."""
    origin = Origin(notebook=notebook, position=place or TurnPosition())
    request = Request(prompt=prompt, thread="main", turns=turns, origin=origin)
    reply = Reply(id=request.id, text=f"answer to {prompt}", status=status)
    run(journal.insert(request), journal.finish(request.id, reply))
    return request


def said(journal: Journal) -> list[Turn]:
    """Return what was said in our notebook's latest chapter, in order."""
    thread = journal.conversations.find_conversation(OURS, "main")
    slots = [slot for slot in thread.candidates if slot.chapter == thread.chapter and slot.is_done]
    return journal.conversations.read_turns(
        s.entry for s in sorted(slots, key=lambda slot: slot.number)
    )


def prompts(turns: Any) -> list[str]:
    return [turn.prompt for turn in turns]


def test_a_request_parked_in_memory_keeps_its_own_turns(journal: Journal, locked: Any) -> None:
    """In the file other notebooks' entries have the numbers that its turns had in memory."""
    for number in range(3):
        ask(journal, f"secret {number}", notebook="another")
    with locked():
        ask(journal, "first")
        parked = ask(journal, "second", *said(journal), status="parked")
    assert prompts(journal.find_entry(parked.id).request.turns) == ["first"]


def test_the_words_of_a_turn_come_back_as_its_name(
    journal: Journal, locked: Any, folder: Path
) -> None:
    """So that they go when the turn is forgotten."""
    ask(journal, "before")
    earlier = said(journal)
    with locked():
        ask(journal, "meanwhile")
        later = ask(journal, "later", *earlier, *said(journal))
    assert prompts(journal.find_entry(later.id).request.turns) == ["before", "meanwhile"]
    with closing(sqlite3.connect(folder / JOURNAL_FILENAME)) as file:
        requests = [row[0] for row in file.execute("SELECT request FROM entries")]
    assert [sum(word in text for text in requests) for word in ("before", "meanwhile")] == [1, 1]


def test_a_parked_request_has_its_turns_while_the_file_is_locked(
    journal: Journal, locked: Any
) -> None:
    """They stand in the file, which nobody may read then."""
    ask(journal, "first")
    parked = ask(journal, "second", *said(journal), status="parked")
    with locked():
        ask(journal, "unrelated", notebook="another")
        assert prompts(journal.find_entry(parked.id).request.turns) == ["first"]


def test_a_request_that_meets_the_lock_keeps_its_turns(journal: Journal, locked: Any) -> None:
    """Its turns were read while the file still served."""
    ask(journal, "secret", notebook="another")
    ask(journal, "first")
    turns = said(journal)
    with locked():
        parked = ask(journal, "second", *turns, status="parked")
        assert prompts(journal.find_entry(parked.id).request.turns) == ["first"]


def test_what_was_asked_meanwhile_is_part_of_the_conversation(
    journal: Journal, locked: Any
) -> None:
    """In order, and whoever was asked again meanwhile keeps his place."""
    ask(journal, "first")
    with locked():
        ask(journal, "second")
        number = journal.conversations.find_conversation(OURS, "main").candidates[-1].number
        ask(journal, "third")
        ask(journal, "second again", place=TurnPosition(number=number))
    ask(journal, "fourth")
    found = ["first", "second", "second again", "third", "fourth"]
    assert prompts(said(journal)) == found
    numbers = [
        slot.number for slot in journal.conversations.find_conversation(OURS, "main").candidates
    ]
    assert len(set(numbers)) == 4


def test_a_chapter_that_was_opened_meanwhile_goes_on(journal: Journal, locked: Any) -> None:
    """Under the number by which its process knows it, and as the latest."""
    ask(journal, "first")
    with locked():
        ask(journal, "unrelated", notebook="another")
        chapter = journal.conversations.start_chapter(OURS, "main")
    assert journal.conversations.find_conversation(OURS, "main").chapter == chapter
    assert said(journal) == []


def test_the_chapters_of_the_file_are_known_while_it_is_locked(
    journal: Journal, locked: Any
) -> None:
    """Else what is asked meanwhile would join a conversation that its user has left."""
    ask(journal, "first")
    chapter = journal.conversations.start_chapter(OURS, "main")
    with locked():
        ask(journal, "unrelated", notebook="another")
        assert journal.conversations.find_conversation(OURS, "main").chapter == chapter


def test_numbers_of_the_file_name_nothing_in_memory(journal: Journal, locked: Any) -> None:
    """A turn that was found before the lock is missing then, and nobody else's."""
    ask(journal, "first")
    before = journal.conversations.find_conversation(OURS, "main").candidates[0].entry
    with locked():
        ask(journal, "secret", notebook="another")
        assert journal.conversations.read_turns([before]) == []


def today(clock: HandClock) -> str:
    return date.fromtimestamp(clock.wall()).isoformat()


def set_aside(journal: Journal, id_: str, clock: HandClock, *, tokens: int = 100) -> None:
    amount, day = SpendAmount(tokens=tokens), today(clock)
    run(journal.reserve_budget(id_, amount, today=day, allowed=lambda _: True))


def use(journal: Journal, tokens: int) -> None:
    """Have a request answered that used so many."""
    asked = added(journal)
    usage = Usage(input_tokens=tokens, output_tokens=0)
    run(journal.finish(asked.id, Reply(id=asked.id, text="yes", attempts=1, usage=usage)))


def seen(journal: Journal, clock: HandClock) -> Spending:
    found: Spending = run(journal.read_spending(today(clock)))
    return found


def test_a_cap_holds_while_the_file_is_locked(
    journal: Journal, open_journal: Open, locked: Any, clock: HandClock
) -> None:
    """So does what was used by then, and what others have under way."""
    run(journal.set_budget("2k/day"))
    use(journal, 900)
    set_aside(open_journal(), "theirs", clock)
    with locked():
        set_aside(journal, "ours", clock)
        spent = SpendAmount(tokens=900)
        aside = SpendAmount(tokens=200)
        assert seen(journal, clock) == Spending(
            budget="2k/day", day=spent, month=spent, reserved=aside
        )


def test_what_was_used_meanwhile_is_counted_once(
    journal: Journal, locked: Any, clock: HandClock
) -> None:
    """With what was used before, each time that the file fails."""
    use(journal, 1)
    for tokens in (20, 300):
        with locked():
            use(journal, tokens)
    assert seen(journal, clock).day == SpendAmount(tokens=321)


@pytest.mark.parametrize("budget", ["5k/day", ""])
def test_a_budget_that_was_changed_meanwhile_stays(
    journal: Journal, locked: Any, clock: HandClock, budget: str
) -> None:
    """Lifted or replaced."""
    run(journal.set_budget("2k/day"))
    with locked():
        run(journal.set_budget(budget))
    assert seen(journal, clock).budget == budget


def test_what_is_set_aside_follows_what_became_of_it_meanwhile(
    journal: Journal, open_journal: Open, locked: Any, clock: HandClock
) -> None:
    """What has ended counts no more, what was begun does, and others' is theirs."""
    theirs, ended = open_journal(), added(journal)
    set_aside(theirs, "theirs", clock, tokens=1)
    set_aside(journal, ended.id, clock, tokens=20)
    set_aside(journal, "goes on", clock, tokens=300)
    with locked():
        run(journal.finish(ended.id, Reply(id=ended.id, status="cancelled")))
        set_aside(journal, "begun", clock, tokens=4000)
    assert seen(journal, clock).reserved == SpendAmount(tokens=4301)


def test_turns_keep_their_order_through_two_outages(journal: Journal, locked: Any) -> None:
    """Memory numbers its entries beyond those of the file, each time."""
    asked = ["first"]
    ask(journal, "first")
    for number in range(4):
        with locked():
            ask(journal, f"meanwhile {number}")
        ask(journal, f"after {number}")
        asked += [f"meanwhile {number}", f"after {number}"]
    assert prompts(said(journal)) == asked
