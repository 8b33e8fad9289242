"""`nbcodex.map(…, engine="batch")`, from the thread that asks: shapes, Stop, cancel, money."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pandas
import pytest

import nbcodex
from nbcodex import host
from nbcodex.errors import BatchUnsupportedError, NbcodexError, Stopped
from nbcodex.mapping import map_runner
from nbcodex.mapping.backends import BatchBackend
from nbcodex.mapping.map_api import resume_map
from nbcodex.simulator.error_responses import ErrorResponse

from .conftest import Room, texts

ECHO = "[[echo: {}]]"


@pytest.fixture(autouse=True)
def quickly(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes a moment, and is looked at often."""
    room.simulator.change_knobs(batch_seconds=0.3)
    monkeypatch.setattr("nbcodex.mapping.batch_api.FIRST_POLL_S", 0.03)


def last() -> Any:
    return nbcodex.map.last  # type: ignore[attr-defined]


def made(room: Room) -> int:
    """Return how many batches were made."""
    seen = [(entry.method, entry.path) for entry in room.simulator.log]
    return seen.count(("POST", "/v1/batches"))


def asked(room: Room) -> int:
    """Return how many rows were answered in batches."""
    return sum(seen.method == "BATCH" for seen in room.simulator.log)


def files(room: Room) -> int:
    return len(room.simulator.library._files)


def test_a_frame_comes_back_with_its_answers(room: Room) -> None:
    """Equal rows are asked once, all in one batch, and no file is left."""
    frame = pandas.DataFrame({"text": ["a", "b", "a"]})
    back = nbcodex.map("[[echo: {text}]]", frame, engine="batch")
    assert list(back["answer"]) == ["a", "b", "a"]
    assert (made(room), asked(room), files(room)) == (1, 2, 0)
    assert {seen.method for seen in room.simulator.log if seen.api} == {"BATCH"}


def test_an_iterator_is_read_in_chunks(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a batch; what is read is given before the next."""
    monkeypatch.setattr(BatchBackend, "window", 30)
    read = itertools.count()
    replies = nbcodex.map(ECHO, (f"n{n}" for n in read), engine="batch")
    assert texts(itertools.islice(replies, 40)) == [f"n{n}" for n in range(40)]
    replies.close()
    assert next(read) <= 40 + 30 + 1


def test_amap_hands_in_too(room: Room) -> None:
    """On the caller's loop."""
    replies = asyncio.run(nbcodex.amap(ECHO, ["a", "b"], engine="batch"))
    assert texts(replies) == ["a", "b"]
    assert made(room) == 1


def test_a_function_that_fails_for_a_row_stops_nobody(room: Room) -> None:
    """Such a row is never handed in."""
    replies = nbcodex.map("{text}", [{"text": "[[echo: a]]"}, {"text": " "}], engine="batch")
    assert [bool(reply) for reply in replies] == [True, False]
    assert asked(room) == 1


def interrupted(monkeypatch: pytest.MonkeyPatch, *, stage: str = "in progress") -> None:
    """Press Stop while the provider is at it, or at another stage."""
    real = BatchBackend.endings

    def endings(self: BatchBackend, *, timeout: float) -> Any:
        if timeout and self.stage.startswith(stage):
            monkeypatch.setattr(BatchBackend, "endings", real)
            raise KeyboardInterrupt
        return real(self, timeout=min(timeout, 0.01))

    monkeypatch.setattr(BatchBackend, "endings", endings)


def test_stop_says_that_the_provider_has_nothing(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing was taken, nothing goes on there, and there is nothing to cancel."""
    room.simulator.change_knobs(batch_queue=1)
    interrupted(monkeypatch, stage="the provider's queue is full")
    with pytest.raises(Stopped, match="the rest is parked") as caught:
        nbcodex.map(ECHO, [f"row {n}" for n in range(50)], engine="batch")
    assert f"`%codex resume {last().id}` goes on" in caught.value.advice
    assert "cancel" not in caught.value.advice


def test_equal_rows_that_nobody_took_are_handed_in_once(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on, the first answer does for those that ask the same, as it would have before Stop."""
    room.simulator.change_knobs(batch_queue=1)
    interrupted(monkeypatch, stage="the provider's queue is full")
    rows = [f"row {n % 3}" for n in range(30)]
    with pytest.raises(Stopped):
        nbcodex.map(ECHO, rows, engine="batch")
    room.simulator.change_knobs(batch_queue=None)
    run = resume_map(last().id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == rows
    assert asked(room) == 3


@pytest.mark.parametrize("elsewhere", [False, True])
def test_stop_leaves_it_with_the_provider_and_resume_fetches(
    room: Room, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """Here or in another process; it says so, and the map is listed as unfinished."""
    room.simulator.change_knobs(batch_seconds=0.8)
    rows = [f"row {n}" for n in range(50)]
    interrupted(monkeypatch)
    with pytest.raises(Stopped) as caught:
        nbcodex.map(ECHO, rows, engine="batch")
    stopped = last().id
    assert f"%codex cancel {stopped}" in caught.value.advice
    if elsewhere:
        room.again()
    journal = room.client.journal(host.current.settings())
    assert [batch.id for batch in journal.maps.unfinished()] == [stopped]
    run = resume_map(stopped)
    assert run is not None
    assert texts(map_runner.run_map(run)) == rows
    assert (made(room), asked(room), files(room)) == (1, 50, 0)
    assert journal.maps.unfinished() == []


def test_running_the_cell_again_in_another_process_pays_nothing_twice(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for what is with the provider already."""
    room.simulator.change_knobs(batch_seconds=0.8)
    interrupted(monkeypatch)
    with pytest.raises(Stopped):
        nbcodex.map(ECHO, ["a", "b", "c"], engine="batch")
    room.again()
    assert texts(nbcodex.map(ECHO, ["c", "b", "a", "d"], engine="batch")) == list("cbad")
    assert (asked(room), files(room)) == (4, 0)


def test_cancel_ends_it_there_and_fetches_what_is_done(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is parked, and a resume hands it in."""
    room.simulator.change_knobs(batch_seconds=10.0)
    interrupted(monkeypatch)
    with pytest.raises(Stopped):
        nbcodex.map(ECHO, [str(n) for n in range(10)], engine="batch")
    run = resume_map(last().id, cancel_jobs=True)
    assert run is not None
    replies = map_runner.run_map(run)
    done = sum(map(bool, replies))
    assert asked(room) == done < 10
    assert {reply.status for reply in replies} <= {"done", "parked"}
    assert files(room) == 0
    room.simulator.change_knobs(batch_seconds=0.1)
    run = resume_map(last().id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == [str(n) for n in range(10)]
    assert asked(room) == 10


def test_only_a_map_at_a_provider_can_be_cancelled(room: Room) -> None:
    """A live one says so."""
    nbcodex.map(ECHO, ["a"])
    with pytest.raises(NbcodexError, match="No batch job"):
        resume_map(last().id, cancel_jobs=True)


def test_a_server_without_batches_ends_the_map(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of however few rows, with an error that names the engine to use."""

    def upload(*_: object) -> None:
        raise ErrorResponse(404, "Not Found")

    monkeypatch.setattr(room.simulator.library, "upload", upload)
    with pytest.raises(BatchUnsupportedError, match="engine='live'"):
        nbcodex.map(ECHO, ["a"], engine="batch")


def test_it_costs_half(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what is told before, in what is asked about, and in what is counted."""
    monkeypatch.setattr("nbcodex.openai_api.pricing.cost", lambda *_: 0.5)
    questions: list[str] = []
    host.current.confirm = lambda question: bool(questions.append(question)) or True
    told = nbcodex.map(ECHO, ["a", "b", "c"], engine="batch", dry_run=True)
    assert told.cost == 0.75
    assert "half the usual price" in str(told)
    replies = nbcodex.map(ECHO, [str(n) for n in range(6)], engine="batch")
    assert {reply.cost for reply in replies} == {0.25}
    assert "$1.50" in questions[0]


def test_the_watcher_hears_where_the_provider_is(room: Room) -> None:
    """Validating, in progress, and how many are done."""
    room.simulator.change_knobs(batch_seconds=1.5)
    heard: list[Any] = []
    host.current.watch = lambda: heard.append
    nbcodex.map(ECHO, list(range(20)), engine="batch")
    stages = [report.stage for report in heard]
    assert any(stage.startswith("in progress") and stage.endswith("of 20") for stage in stages)
    assert max(report.sent for report in heard) == 20
    assert (heard[-1].done, heard[-1].sent, heard[-1].stage) == (20, 0, "")
