"""What memory copies from a file that fails, and what is copied back."""

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

from .conftest import ManualClock, added, run

Open = Callable[..., Journal]
OURS = "ours"


@pytest.fixture
def journal(open_journal: Open, monkeypatch: pytest.MonkeyPatch) -> Journal:
    """A journal that does not wait for locks."""
    monkeypatch.setattr("nbcodex.journal.database.LOCK_TIMEOUT_S", 0.0)
    return open_journal()


@pytest.fixture
def locked(folder: Path, journal: Journal, clock: ManualClock) -> Callable[[], Any]:
    """Return a context manager: it locks the file, and lets it be tried again afterwards."""

    @contextmanager
    def lock() -> Iterator[None]:
        with closing(sqlite3.connect(folder / JOURNAL_FILENAME, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            assert "locked" in (journal.problem or "")
            other.execute("ROLLBACK")
        clock.advance(61)
        journal.read_totals()
        assert journal.problem is None

    return lock


def ask(
    journal: Journal,
    prompt: str,
    *turns: Turn,
    status: Any = "done",
    notebook: str = OURS,
    position: TurnPosition | None = None,
) -> Request:
    """Return a finished request of a conversation."""
    origin = Origin(notebook=notebook, position=position or TurnPosition())
    request = Request(prompt=prompt, thread="main", turns=turns, origin=origin)
    reply = Reply(id=request.id, text=f"answer to {prompt}", status=status)
    run(journal.insert(request), journal.finish(reply))
    return request


def latest_turns(journal: Journal) -> list[Turn]:
    """Return the turns of our notebook's latest chapter, in order."""
    thread = journal.conversations.find_conversation(OURS, "main")
    turns = [each for each in thread.candidates if each.chapter == thread.chapter and each.is_done]
    return journal.conversations.read_turns(
        turn.entry for turn in sorted(turns, key=lambda turn: turn.number)
    )


def prompts(turns: Any) -> list[str]:
    return [turn.prompt for turn in turns]


def test_request_parked_in_memory_keeps_its_turns_in_the_file(
    journal: Journal, locked: Any
) -> None:
    """Entries of other notebooks in the file have the numbers that its turns had in memory."""
    for number in range(3):
        ask(journal, f"secret {number}", notebook="another")
    with locked():
        ask(journal, "first")
        parked = ask(journal, "second", *latest_turns(journal), status="parked")
    assert prompts(journal.find_entry(parked.id).request.turns) == ["first"]


def test_turns_become_references_again_in_the_file(
    journal: Journal, locked: Any, folder: Path
) -> None:
    """So their words are gone when their entry is deleted."""
    ask(journal, "before")
    earlier = latest_turns(journal)
    with locked():
        ask(journal, "meanwhile")
        later = ask(journal, "later", *earlier, *latest_turns(journal))
    assert prompts(journal.find_entry(later.id).request.turns) == ["before", "meanwhile"]
    with closing(sqlite3.connect(folder / JOURNAL_FILENAME)) as file:
        requests = [row[0] for row in file.execute("SELECT request FROM entries")]
    assert [sum(word in text for text in requests) for word in ("before", "meanwhile")] == [1, 1]


def test_parked_request_has_its_turns_while_the_file_is_locked(
    journal: Journal, locked: Any
) -> None:
    ask(journal, "first")
    parked = ask(journal, "second", *latest_turns(journal), status="parked")
    with locked():
        ask(journal, "unrelated", notebook="another")
        assert prompts(journal.find_entry(parked.id).request.turns) == ["first"]


def test_request_inserted_during_an_outage_keeps_turns_read_before(
    journal: Journal, locked: Any
) -> None:
    """Its turns were read before the file failed."""
    ask(journal, "secret", notebook="another")
    ask(journal, "first")
    turns = latest_turns(journal)
    with locked():
        parked = ask(journal, "second", *turns, status="parked")
        assert prompts(journal.find_entry(parked.id).request.turns) == ["first"]


def test_turns_of_an_outage_join_the_conversation(journal: Journal, locked: Any) -> None:
    """They are in order, and a prompt that is asked again keeps its position."""
    ask(journal, "first")
    with locked():
        ask(journal, "second")
        number = journal.conversations.find_conversation(OURS, "main").candidates[-1].number
        ask(journal, "third")
        ask(journal, "second again", position=TurnPosition(number=number))
    ask(journal, "fourth")
    found = ["first", "second", "second again", "third", "fourth"]
    assert prompts(latest_turns(journal)) == found
    candidates = journal.conversations.find_conversation(OURS, "main").candidates
    assert len({candidate.number for candidate in candidates}) == 4


def test_chapter_started_during_an_outage_keeps_its_number(journal: Journal, locked: Any) -> None:
    """Its process knows it by that number, and it is the latest one."""
    ask(journal, "first")
    with locked():
        ask(journal, "unrelated", notebook="another")
        chapter = journal.conversations.start_chapter(OURS, "main")
    assert journal.conversations.find_conversation(OURS, "main").chapter == chapter
    assert latest_turns(journal) == []


def test_latest_chapter_is_known_while_the_file_is_locked(journal: Journal, locked: Any) -> None:
    """Otherwise prompts during the outage would join a conversation that their user has left."""
    ask(journal, "first")
    chapter = journal.conversations.start_chapter(OURS, "main")
    with locked():
        ask(journal, "unrelated", notebook="another")
        assert journal.conversations.find_conversation(OURS, "main").chapter == chapter


def test_entry_numbers_of_the_file_refer_to_nothing_in_memory(
    journal: Journal, locked: Any
) -> None:
    """A turn that was read before the lock is missing then; no other turn takes its place."""
    ask(journal, "first")
    before = journal.conversations.find_conversation(OURS, "main").candidates[0].entry
    with locked():
        ask(journal, "secret", notebook="another")
        assert journal.conversations.read_turns([before]) == []


def today(clock: ManualClock) -> str:
    return date.fromtimestamp(clock.wall()).isoformat()


def reserve(journal: Journal, id_: str, clock: ManualClock, *, tokens: int = 100) -> None:
    amount, day = SpendAmount(tokens=tokens), today(clock)
    run(journal.reserve_budget(id_, amount, today=day, allowed=lambda _: True))


def spend(journal: Journal, tokens: int) -> None:
    """Finish a request that used `tokens`."""
    asked = added(journal)
    usage = Usage(input_tokens=tokens, output_tokens=0)
    run(journal.finish(Reply(id=asked.id, text="yes", attempts=1, usage=usage)))


def spending(journal: Journal, clock: ManualClock) -> Spending:
    found: Spending = run(journal.read_spending(today(clock)))
    return found


def test_budget_holds_while_the_file_is_locked(
    journal: Journal, open_journal: Open, locked: Any, clock: ManualClock
) -> None:
    """The earlier spending and the reservations of other kernels count, too."""
    run(journal.set_budget("2k/day"))
    spend(journal, 900)
    reserve(open_journal(), "theirs", clock)
    with locked():
        reserve(journal, "ours", clock)
        spent = SpendAmount(tokens=900)
        reserved = SpendAmount(tokens=200)
        assert spending(journal, clock) == Spending(
            budget="2k/day", day=spent, month=spent, reserved=reserved
        )


def test_spending_during_outages_is_counted_once(
    journal: Journal, locked: Any, clock: ManualClock
) -> None:
    spend(journal, 1)
    for tokens in (20, 300):
        with locked():
            spend(journal, tokens)
    assert spending(journal, clock).day == SpendAmount(tokens=321)


@pytest.mark.parametrize("budget", ["5k/day", ""])
def test_budget_changed_during_an_outage_is_kept(
    journal: Journal, locked: Any, clock: ManualClock, budget: str
) -> None:
    run(journal.set_budget("2k/day"))
    with locked():
        run(journal.set_budget(budget))
    assert spending(journal, clock).budget == budget


def test_reservations_follow_what_happened_during_an_outage(
    journal: Journal, open_journal: Open, locked: Any, clock: ManualClock
) -> None:
    theirs, ended = open_journal(), added(journal)
    reserve(theirs, "theirs", clock, tokens=1)
    reserve(journal, ended.id, clock, tokens=20)
    reserve(journal, "goes on", clock, tokens=300)
    with locked():
        run(journal.finish(Reply(id=ended.id, status="cancelled")))
        reserve(journal, "begun", clock, tokens=4000)
    assert spending(journal, clock).reserved == SpendAmount(tokens=4301)


@pytest.mark.slow
def test_turns_keep_their_order_through_two_outages(journal: Journal, locked: Any) -> None:
    """Memory numbers its entries beyond those of the file, each time."""
    asked = ["first"]
    ask(journal, "first")
    for number in range(4):
        with locked():
            ask(journal, f"meanwhile {number}")
        ask(journal, f"after {number}")
        asked += [f"meanwhile {number}", f"after {number}"]
    assert prompts(latest_turns(journal)) == asked
