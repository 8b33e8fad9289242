"""An entry of the journal, from its insertion to its ending."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nbcodex.errors import EntryError
from nbcodex.journal import sqlite_worker
from nbcodex.journal.codec import decode, encode, equality_key
from nbcodex.journal.journal import Journal
from nbcodex.models import Origin, Reply, StreamPosition, Turn, Usage, UsageTotals

from .conftest import ManualClock, added, request, run

Open = Callable[..., Journal]

FULL = Reply(
    id="",
    text="Because of Rayleigh.",
    model="gpt-x",
    usage=Usage(input_tokens=812, cached_tokens=512, output_tokens=431, reasoning_tokens=9),
    cost=0.0052,
    attempts=2,
    waited=7.4,
    seconds=11.3,
    cut="max_output_tokens",
)


def test_inserted_request_is_pending_and_unchanged(journal: Journal) -> None:
    asked = request(
        "Bild: \u00fc \ud800 \x00 {x}",
        params={"tools": [{"a": 1}]},
        effort="low",
        origin=Origin(notebook="a.ipynb", cell="c1", variable="answer"),
    )
    run(journal.insert(asked))
    entry = journal.find_entry(asked.id)
    assert entry.request == asked
    assert (entry.status, entry.abandoned) == ("pending", False)


def test_request_inserted_with_an_attempt_is_running(journal: Journal) -> None:
    asked = added(journal, attempt=1)
    entry = journal.find_entry(asked.id)
    assert (entry.status, entry.reply.attempts) == ("running", 1)


def test_request_that_was_never_sent_is_not_counted(journal: Journal) -> None:
    """Its waits are not counted either."""
    asked = added(journal)
    run(journal.finish(Reply(id=asked.id, status="cancelled", attempts=0, waited=9.0)))
    assert journal.read_totals() == UsageTotals(requests=1)


def test_answer_is_read_by_the_next_journal(journal: Journal, open_journal: Open) -> None:
    """Another process reads the reply with every figure."""
    asked = added(journal)
    run(journal.finish(replace(FULL, id=asked.id)))
    journal.close()
    assert open_journal().find_entry(asked.id).reply == replace(FULL, id=asked.id)


@pytest.mark.parametrize("status", ["parked", "interrupted", "cancelled", "failed"])
def test_unsuccessful_endings_keep_text_figures_and_error(journal: Journal, status: Any) -> None:
    """An ending without an answer keeps the text so far, its figures, and why it ended."""
    asked = added(journal)
    reply = replace(FULL, id=asked.id, status=status)
    run(journal.finish(reply, error="TPM is used up", resume_at=1.8e9))
    entry = journal.find_entry(asked.id)
    assert entry.reply == reply
    assert (entry.error, entry.resume_at) == ("TPM is used up", 1.8e9)


def test_ending_without_text_leaves_the_stored_text(journal: Journal) -> None:
    """A resumed request that is refused at once keeps the text of its earlier attempt."""
    asked = added(journal)
    run(journal.update_text(asked.id, "half an answer"))
    run(journal.finish(Reply(id=asked.id, status="parked")))
    assert journal.find_entry(asked.id).reply.text == "half an answer"
    run(journal.claim(asked.id), journal.finish(Reply(id=asked.id)))
    assert journal.find_entry(asked.id).reply.text == ""


def test_attempts_and_waits_are_listed(journal: Journal) -> None:
    """`record_wait` says until when; the next attempt ends the wait."""
    asked = added(journal)
    run(journal.start_attempt(asked.id, 1), journal.record_wait(asked.id, 1.8e9))
    waiting = journal.find_entry(asked.id)
    assert (waiting.status, waiting.resume_at) == ("waiting", 1.8e9)
    run(journal.start_attempt(asked.id, 2))
    entry = journal.find_entry(asked.id)
    assert (entry.status, entry.resume_at) == ("running", None)
    assert entry.reply.attempts == 2


def test_text_and_sequence_of_a_durable_answer_are_stored_together(journal: Journal) -> None:
    """A stream that breaks is continued at the event at which the stored text ends."""
    asked = added(journal)
    run(journal.start_attempt(asked.id, 1), journal.set_response_id(asked.id, "resp_1"))
    run(
        journal.update_text(asked.id, "Because", sequence=7),
        journal.update_text(asked.id, "Because of"),
    )
    entry = journal.find_entry(asked.id)
    assert entry.reply.text == "Because of"
    assert entry.stream_position == StreamPosition("resp_1", 7)


@pytest.mark.parametrize(
    ("continues", "position"), [(True, StreamPosition("resp_1", 7)), (False, None)]
)
def test_new_attempt_clears_the_durable_response(
    journal: Journal, continues: bool, position: StreamPosition | None
) -> None:
    """An attempt that continues a response keeps its id and position."""
    asked = added(journal)
    run(journal.start_attempt(asked.id, 1), journal.set_response_id(asked.id, "resp_1"))
    run(
        journal.update_text(asked.id, "text", sequence=7),
        journal.start_attempt(asked.id, 2, continues=continues),
    )
    assert journal.find_entry(asked.id).stream_position == position


def test_implausible_figures_are_bounded(journal: Journal) -> None:
    asked = added(journal)
    usage = Usage(input_tokens=10**30, output_tokens=-5)
    reply = Reply(id=asked.id, text="\udfff", usage=usage, cost=float("nan"), waited=float("inf"))
    run(
        journal.set_response_id(asked.id, "\ud800"),
        journal.update_text(asked.id, "\ud800", sequence=10**40),
        journal.record_wait(asked.id, float("nan")),
        journal.finish(reply, error="\ud800", resume_at=float("inf")),
    )
    assert journal.find_entry(asked.id).status == "done"
    assert journal.read_totals().usage.input_tokens == 2**53
    assert journal.problem is None


def test_text_that_cannot_be_stored_is_reported_without_raising(journal: Journal) -> None:
    """A request that cannot be encoded does not fail the writes beside it."""
    circular: dict[str, Any] = {}
    circular["self"] = circular
    bad, good = request(params=circular), request()

    async def both() -> None:
        await asyncio.gather(journal.insert(bad), journal.insert(good))

    asyncio.run(both())
    assert "could not be written" in (journal.problem or "")
    assert [entry.id for entry in journal.recent_entries()] == [good.id]


def test_writes_to_an_unknown_entry_do_not_raise(journal: Journal) -> None:
    """An entry that is deleted while its request runs stays deleted."""
    asked = added(journal)
    assert run(journal.delete()) == 1
    run(
        journal.start_attempt(asked.id, 1),
        journal.finish(Reply(id=asked.id, text="late")),
    )
    assert journal.recent_entries() == []
    assert journal.problem is None


def test_reused_id_renames_the_older_entry(journal: Journal, open_journal: Open) -> None:
    """Two requests that drew the same id are both kept, the newer one under it."""
    asked = added(journal, status="done", text="old")
    run(open_journal().insert(replace(asked, prompt="another")))
    assert journal.find_entry(asked.id).request.prompt == "another"
    assert [entry.reply.text for entry in journal.recent_entries()] == ["", "old"]


def test_inserting_a_request_twice_changes_nothing(journal: Journal) -> None:
    asked = added(journal)
    run(journal.start_attempt(asked.id, 1), journal.insert(asked))
    assert [entry.status for entry in journal.recent_entries()] == ["running"]


def test_prefix_finds_an_entry_or_lists_the_candidates(journal: Journal) -> None:
    """A unique prefix finds its entry; an ambiguous one lists the ids; an exact id wins."""
    for id_ in ["3f2a0000", "3f2b0000", "3f2b0000-1"]:
        run(journal.insert(request(id=id_)))
    assert journal.find_entry("3f2a").id == "3f2a0000"
    assert journal.find_entry("3f2b0000").id == "3f2b0000"
    with pytest.raises(EntryError, match="3f2a0000, 3f2b0000, 3f2b0000-1"):
        journal.find_entry("3f2")
    for nothing in ["99", "", "%", "*", "\ud800"]:
        with pytest.raises(EntryError, match="No entry"):
            journal.find_entry(nothing)


def test_entries_are_newest_first_after_a_clock_jump(journal: Journal, clock: ManualClock) -> None:
    """A wall clock that goes back does not disturb the order."""
    first = added(journal, notebook="a")
    clock.epoch -= 3600
    second = added(journal, notebook="b")
    assert [entry.id for entry in journal.recent_entries()] == [second.id, first.id]
    assert [entry.id for entry in journal.recent_entries(1)] == [second.id]


def test_resumable_entries_are_those_parked_here_or_everywhere(journal: Journal) -> None:
    here = added(journal, status="parked", notebook="a")
    there = added(journal, status="parked", notebook="b")
    added(journal, status="done", notebook="a")
    added(journal, notebook="a")
    assert [entry.id for entry in journal.resumable_entries(notebook="a")] == [here.id]
    assert [entry.id for entry in journal.resumable_entries(notebook=None)] == [here.id, there.id]


def test_request_interrupted_by_shutdown_is_parked(
    journal: Journal, clock: Any, open_journal: Open
) -> None:
    """A restart interrupts first; an earlier Stop stays interrupted, and answers stay answers."""
    long_ago = added(journal, status="interrupted", text="half", notebook="a")
    clock.advance(60.0)
    just_now = added(journal, status="interrupted", text="half", notebook="a")
    answered = added(journal, status="done", notebook="a")
    journal.shut_down(max_interruption_age=5.0)
    entries = {entry.id: entry for entry in open_journal().recent_entries()}
    statuses = [entries[asked.id].status for asked in (long_ago, just_now, answered)]
    assert statuses == ["interrupted", "parked", "done"]
    assert entries[just_now.id].reply.text == "half"


def test_equal_request_is_answered_from_the_journal(journal: Journal) -> None:
    """`find_answer` returns the newest answer, marked as reused, without cost and tokens."""
    key = equality_key(request(), base_url="https://a/v1")
    for text in ["old", "new"]:
        asked = added(journal, key=key)
        run(journal.finish(replace(FULL, id=asked.id, text=text)))
    reply = run(journal.find_answer(key, reply_id=asked.id))
    assert (reply.text, reply.id, bool(reply)) == ("new", asked.id, True)
    assert (reply.reused, reply.cost, reply.attempts, reply.usage.total_tokens) == (True, 0, 0, 0)


@pytest.mark.parametrize("status", [None, "parked", "failed", "interrupted"])
def test_only_answered_entries_are_reused(journal: Journal, status: str | None) -> None:
    key = equality_key(request(), base_url="https://a/v1")
    added(journal, status=status, key=key)
    assert run(journal.find_answer(key, reply_id="new")) is None


def test_stored_key_differs_between_journals(
    journal: Journal, folder: Any, open_journal: Open
) -> None:
    """Keys are salted per journal, so that prompts cannot be guessed from their hashes."""
    key = equality_key(request(), base_url="https://a/v1")
    added(journal, key=key, status="done")
    assert run(open_journal().find_answer(key, reply_id="new")) is not None
    journal.close()
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    assert key not in content


def test_totals_of_all_time_continue_in_the_next_process(
    journal: Journal, open_journal: Open
) -> None:
    """Simulated tokens are not counted."""
    asked = added(journal)
    run(journal.finish(replace(FULL, id=asked.id)))
    simulated = added(journal)
    run(journal.finish(replace(FULL, id=simulated.id, simulated=True)))
    later = open_journal()
    totals = later.read_totals()
    assert (totals.requests, totals.answers, totals.cost) == (2, 1, 0.0052)
    assert totals.usage == FULL.usage


def test_totals_count_unknown_and_estimated_figures(journal: Journal, open_journal: Open) -> None:
    replies = [
        replace(FULL, usage=Usage(), cost=None),
        replace(FULL, usage=Usage(input_tokens=3, output_tokens=4, estimated=True)),
        replace(FULL, usage=Usage(input_tokens=0, output_tokens=0), cost=None),
    ]
    for reply in replies:
        run(journal.finish(replace(reply, id=added(journal).id)))
    totals = open_journal().read_totals()
    assert (totals.unknown, totals.unpriced, totals.estimated) == (1, 1, 1)


def test_main_thread_reads_while_the_loop_is_blocked(journal: Journal) -> None:
    """A read needs no loop: one that hangs does not make the notebook hang."""
    asked = added(journal)
    is_blocked, may_end = threading.Event(), threading.Event()

    async def hang() -> None:
        await journal.start_attempt(asked.id, 1)
        is_blocked.set()
        may_end.wait(60)

    thread = threading.Thread(target=lambda: asyncio.run(hang()))
    thread.start()
    assert is_blocked.wait(60)
    assert journal.find_entry(asked.id).status == "running"
    may_end.set()
    thread.join()


def test_cancelled_insert_is_committed(journal: Journal) -> None:
    """The task that waits for a commit may be cancelled; the commit happens."""
    asked = request()

    async def cancel() -> None:
        task = asyncio.create_task(journal.insert(asked))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert journal.find_entry(asked.id).status == "pending"


def test_journal_without_folder_works_in_memory(open_journal: Open) -> None:
    journal = open_journal(None)
    asked = added(journal, status="parked", text="half")
    assert run(journal.claim(asked.id))
    run(journal.finish(Reply(id=asked.id, text="whole")))
    assert journal.find_entry(asked.id).reply.text == "whole"
    assert journal.problem is None


def test_closed_journal_opens_again(journal: Journal) -> None:
    """`close` may be called twice, and the next call opens the file."""
    asked = added(journal)
    journal.close()
    journal.close()
    assert journal.find_entry(asked.id).abandoned


def test_many_writes_share_a_commit(journal: Journal) -> None:
    """300 requests need few commits."""
    commits, database = 0, journal._database
    transact = database._transact

    def counting(jobs: Any) -> Any:
        nonlocal commits
        commits += 1
        return transact(jobs)

    database._transact = counting  # type: ignore[method-assign]

    async def insert_many() -> None:
        await asyncio.gather(*[journal.insert(request()) for _ in range(300)])

    asyncio.run(insert_many())
    assert len(journal.recent_entries(1000)) == 300
    assert commits < 100


def test_single_writes_do_not_wait_for_others(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits are spaced only while jobs come in quick succession."""
    delays: list[float] = []
    monkeypatch.setattr(sqlite_worker.time, "sleep", delays.append)
    first = request()
    run(journal.insert(first), journal.start_attempt(first.id, 1))
    assert not any(delays)

    async def insert_many() -> None:
        await asyncio.gather(*(journal.insert(request()) for _ in range(20)))
        await journal.start_attempt(first.id, 2)

    asyncio.run(insert_many())
    assert any(delays)


def test_records_are_decoded_as_they_were_encoded() -> None:
    """Nested records, bytes and tuples survive; unknown records stay plain mappings."""
    odd: Any = ({"b": b"\x00", "l": [1], "deep": {"__record__": "os.system"}},)
    record = Reply(id="x", parsed=odd, usage=Usage(input_tokens=1))
    assert decode(Reply, encode(record)) == record
    newer = encode(record).replace('"__record__": "Reply"', '"__record__": "Reply", "new": 1')
    assert decode(Reply, newer) == record


@pytest.mark.parametrize("server", [None, "api.openai.com"])
def test_server_that_an_entry_was_written_for_is_stored(
    journal: Journal, server: str | None
) -> None:
    asked = request(origin=Origin(notebook="a")).with_server(server)
    run(journal.insert(asked), journal.finish(Reply(id=asked.id, status="parked")))
    assert journal.find_entry(asked.id).request == asked


@pytest.mark.parametrize(("new", "stored"), [(None, "old.example"), ("new.example", "new.example")])
def test_claim_for_another_server_replaces_the_server_alone(
    journal: Journal, new: str | None, stored: str
) -> None:
    turns = (Turn(prompt="a", answer="b"),)
    asked = request(turns=turns, params={"a": 1}).with_server("old.example")
    run(journal.insert(asked), journal.finish(Reply(id=asked.id, status="parked")))
    assert run(journal.claim(asked.id, server=new))
    assert journal.find_entry(asked.id).request == asked.with_server(stored)


def test_damaged_entry_can_be_claimed_for_another_server(journal: Journal) -> None:
    asked = added(journal, status="parked")
    damage = "UPDATE entries SET request = '[]'"
    journal._worker.call(lambda c: c.execute(damage) and None, default=None)
    assert run(journal.claim(asked.id, server="new.example"))
    assert journal.problem is None


def test_durable_entries_are_those_with_a_response(journal: Journal) -> None:
    """Of one entry, of a map, or of all; rows without a response are left out."""
    plain = added(journal, status="done")
    durable = [added(journal), added(journal, map_id="m1", row_index=0)]
    for asked in durable:
        run(journal.start_attempt(asked.id, 1), journal.set_response_id(asked.id, "resp_1"))
    assert [entry.id for entry in journal.durable_entries()] == [asked.id for asked in durable]
    assert [entry.id for entry in journal.durable_entries(durable[0].id)] == [durable[0].id]
    assert [entry.id for entry in journal.durable_entries("m1")] == [durable[1].id]
    assert journal.durable_entries(plain.id) == []
    with pytest.raises(EntryError):
        journal.durable_entries("zz")
