"""A file that release 0.1.0 (commit 7f78a18) wrote is listed, resumed and continued.

The file holds an answered entry with an image, a thread of two turns with a parked third one, a
failed entry, a map of five rows of which one is in a batch job, a day's spending, a budget, and an
entry whose kernel was killed with half of its durable answer.
"""

from __future__ import annotations

import gzip
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from nbcodex.journal.codec import equality_key
from nbcodex.journal.journal import Journal
from nbcodex.journal.schema import APPLICATION_ID
from nbcodex.models import Image, Origin, Reply, Request, StreamPosition, TurnPosition
from nbcodex.settings import JOURNAL_FILENAME

from .conftest import ManualClock, added, run

Open = Callable[..., Journal]
NOTEBOOK = "/lessons/one.ipynb"
WRITTEN_AT = 1_780_000_000.0
BASE_URL = "https://api.openai.com/v1"


@pytest.fixture
def journal(folder: Path, clock: ManualClock, open_journal: Open) -> Journal:
    """A journal on the old file, a minute after its last kernel was killed."""
    folder.mkdir(mode=0o700)
    written = Path(__file__).with_name("journal-0.1.0.sqlite3.gz").read_bytes()
    (folder / JOURNAL_FILENAME).write_bytes(gzip.decompress(written))
    clock.epoch = WRITTEN_AT + 61
    return open_journal()


def test_old_entries_are_listed(journal: Journal) -> None:
    entries = journal.recent_entries()
    assert journal.problem is None
    assert [(entry.id, entry.status, entry.abandoned) for entry in entries] == [
        ("aba4d001", "running", True),
        ("ba7c4000-0", "done", False),
        ("fa11ed01", "failed", False),
        ("9a4ced01", "parked", False),
        ("7dea0002", "done", False),
        ("7dea0001", "done", False),
        ("d0e00001", "done", False),
    ]
    answered = entries[-1]
    assert answered.reply.text == "6.022e23 of anything."
    assert answered.request.origin.variable == "mole"
    assert answered.request.images == (Image(data=b"\x89PNG"),)


def test_an_old_answer_is_reused(journal: Journal) -> None:
    """Equal requests have equal keys in both versions."""
    request = Request(
        prompt="What is a mole?", model="gpt-5.6-sol", images=(Image(data=b"\x89PNG"),)
    )
    reply = run(journal.find_answer(equality_key(request, base_url=BASE_URL), reply_id="new"))
    assert reply is not None
    assert (reply.text, reply.reused) == ("6.022e23 of anything.", True)


def test_what_was_parked_or_abandoned_is_resumed(journal: Journal) -> None:
    parked, abandoned = journal.resumable_entries(notebook=NOTEBOOK)
    assert parked.request.origin.server is None
    assert (parked.id, parked.resume_at) == ("9a4ced01", WRITTEN_AT + 3600)
    turns = [(turn.prompt, turn.answer) for turn in parked.request.turns]
    assert turns == [("Name a metal.", "Iron."), ("And its symbol?", "Fe.")]
    assert (abandoned.id, abandoned.reply.text) == ("aba4d001", "Half of the ans")
    assert abandoned.stream_position == StreamPosition("resp_1", 7)
    for entry in (parked, abandoned):
        assert run(journal.claim(entry.id))
        run(journal.finish(Reply(id=entry.id, text="whole", attempts=2)))
        assert journal.find_entry(entry.id).status == "done"


def test_an_old_thread_continues(journal: Journal) -> None:
    conversation = journal.conversations.find_conversation(NOTEBOOK, "main")
    done = [candidate.entry for candidate in conversation.candidates if candidate.is_done]
    turns = journal.conversations.read_turns(done)
    assert [turn.answer for turn in turns] == ["Iron.", "Fe."]
    assert (turns[0].carried, turns[0].model) == (
        ({"type": "reasoning", "id": "rs_1"},),
        "gpt-5.6-sol",
    )
    position = TurnPosition(chapter=conversation.chapter)
    origin = Origin(notebook=NOTEBOOK, position=position)
    later = Request(prompt="Its mass?", thread="main", turns=tuple(turns), origin=origin)
    run(journal.insert(later))
    candidates = journal.conversations.find_conversation(NOTEBOOK, "main").candidates
    assert max(candidates, key=lambda c: c.number).entry == candidates[-1].entry
    assert len(journal.find_entry(later.id).request.turns) == 2
    assert journal.conversations.find_conversation(NOTEBOOK, "other").chapter == 1


def test_an_old_map_continues(journal: Journal) -> None:
    assert journal.maps.count_rows("ba7c4000") == {"done": 1, "parked": 3, "cancelled": 1}
    rows = journal.maps.entries("ba7c4000")
    assert [entry.request.origin.row_index for entry in rows] == [0, 1, 2, 3, 4]
    assert {entry.request.origin.row_count for entry in rows} == {5}
    assert {entry.request.origin.map_id for entry in rows} == {"ba7c4000"}
    keys = [equality_key(entry.request, base_url=BASE_URL) for entry in rows]
    assert journal.maps.answered_keys(keys) == {keys[0]}
    job = run(journal.batch_jobs.claim_job("part-1"))
    assert (job.file_id, job.remote_id) == ("file-1", "batch-1")
    assert [request.prompt for request in job.requests] == ["Classify row 4."]


def test_old_budgets_and_totals_count(journal: Journal) -> None:
    seen = run(journal.read_spending("2026-05-28"))
    assert (seen.budget, seen.day.tokens, seen.day.dollars) == ("1000000.0/day", 4200, 1.0)
    assert seen.reserved.tokens == 300
    totals = journal.read_totals()
    assert (totals.requests, totals.answers, totals.usage.input_tokens) == (11, 4, 4000)
    assert (totals.cost, totals.unknown) == (1.0, 4)


def test_a_file_from_before_the_first_release_is_left_alone(
    folder: Path, open_journal: Open
) -> None:
    folder.mkdir(mode=0o700)
    with closing(sqlite3.connect(folder / JOURNAL_FILENAME)) as connection:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 5")
        connection.execute("CREATE TABLE entries (seq INTEGER PRIMARY KEY)")
    journal = open_journal()
    assert added(journal, status="done")
    assert "before its first release" in (journal.problem or "")
