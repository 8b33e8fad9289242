"""Maps that are ended by an order: cancelled or parked, in whatever thread they are under way."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, Literal

import pytest

import nbcodex
from nbcodex import host
from nbcodex.errors import CancelledError, NbcodexError, ParkedError
from nbcodex.mapping import map_runner
from nbcodex.mapping.map_api import resume_map
from nbcodex.mapping.map_runner import MapRunner, active_runners
from nbcodex.models import Origin, Request
from nbcodex.notebook.commands.entries import _running
from nbcodex.notebook.monitor.widget import Monitor

from .conftest import Room, texts

ECHO = "[[echo: {}]]"
ROWS = [f"row {n}" for n in range(600)]
ERRORS = {"cancel": CancelledError, "park": ParkedError}

Order = Literal["cancel", "park"]
either = pytest.mark.parametrize("order", ["cancel", "park"])


@pytest.fixture
def room(room: Room) -> Room:
    """There are always rows under way, and rows that are not begun."""
    room.simulator.change_knobs(latency=0.1)
    return room


def begun(room: Room, *, answers: int = 20, **options: Any) -> tuple[MapRunner, Future[Any]]:
    """Return a map that another thread is at, when some of its rows are answered."""
    told: Future[Any] = Future()

    def ask() -> None:
        try:
            told.set_result(nbcodex.map(ECHO, ROWS, **options))
        except BaseException as error:
            told.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    wait_until(
        lambda: any(each.run.backend.counter.stats.done >= answers for each in active_runners())
    )
    return active_runners()[0], told


def wait_until(holds: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < give_up, "it did not come about"
        time.sleep(0.005)


@either
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_map_of_another_thread_is_ended_and_goes_on(
    room: Room, order: Order, elsewhere: bool
) -> None:
    """Nothing more is begun; here or in another process, going on asks what has no answer."""
    runner, told = begun(room)
    runner.end(order)
    error = told.exception(timeout=5)
    assert isinstance(error, ERRORS[order])
    assert f"%codex resume {runner.run.id} goes on" in error.advice.replace("`", "")
    known = len(room.prompts)
    assert known < len(ROWS)
    assert active_runners() == []
    done = [n for n, reply in enumerate(runner.run.replies_in_order()) if reply]
    if elsewhere:
        room.again()
    run = resume_map(runner.run.id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == ROWS
    asked = room.prompts.count
    assert all(asked(f"[[echo: row {n}]]") == 1 for n in done)
    journal = room.client.journal(host.current.settings())
    assert journal.maps.summary(run.id).counts == {"done": len(ROWS)}


@either
def test_rows_under_way_get_the_order(room: Room, order: Order) -> None:
    """They end as a single request does; what was not begun is parked, whichever it is."""
    runner, told = begun(room)
    runner.end(order)
    told.exception(timeout=5)
    journal = room.client.journal(host.current.settings())
    counts = journal.maps.summary(runner.run.id).counts
    assert counts.total() == len(ROWS)
    assert (counts["cancelled"] > 0) is (order == "cancel")
    assert counts["parked"] > 0
    assert counts.keys() <= {"done", "parked", "cancelled"}


def test_it_is_said_what_was_ended(room: Room) -> None:
    """No row of it counts as failed, the map keeps what it has, and the last report says how."""
    heard: list[Any] = []
    host.current.watch = lambda: heard.append
    runner, told = begun(room, on_error="raise")
    runner.end("cancel")
    error = told.exception(timeout=5)
    assert isinstance(error, CancelledError)
    assert error.message.startswith("Cancelled by you: ")
    assert "of 600 rows are answered, nothing is lost." in error.message
    assert (heard[-1].outcome, heard[-1].failed) == ("cancelled", 0)
    assert heard[-1].done + heard[-1].parked == len(ROWS)
    assert runner.run.failures == {}


def test_a_map_that_is_under_way_is_not_gone_on_with(room: Room) -> None:
    """Two who go through one run would each lose what the other hears."""
    runner, told = begun(room)
    with pytest.raises(NbcodexError, match="is still running"):
        resume_map(runner.run.id)
    runner.end("park")
    told.exception(timeout=5)


def test_on_ones_own_loop_it_has_ended_at_once(room: Room) -> None:
    """The error is no interrupt, which would end the loop; who wakes late leaves it alone."""

    async def main() -> tuple[Any, Any]:
        answered = asyncio.Event()
        host.current.watch = lambda: lambda told: answered.set() if told.done else None
        task = asyncio.ensure_future(nbcodex.amap(ECHO, ROWS))
        await answered.wait()
        (runner,) = active_runners()
        runner.end("cancel")
        assert runner.run.outcome == "cancelled"
        run = resume_map(runner.run.id)
        assert run is runner.run
        back = map_runner.run_map(run)
        return back, (await asyncio.gather(task, return_exceptions=True))[0]

    back, error = asyncio.run(main())
    assert texts(back) == ROWS
    assert isinstance(error, CancelledError)


def test_a_loop_that_is_between_two_replies_is_ended(room: Room) -> None:
    """What it has begun is ended at once; it hears of it when it asks for the next reply."""
    replies = nbcodex.map(ECHO, iter(ROWS))
    assert next(replies).text == "row 0"
    (runner,) = active_runners()
    runner.end("park")
    assert runner.ended
    known = len(room.prompts)
    with pytest.raises(ParkedError, match="the rest is parked"):
        next(replies)
    assert len(room.prompts) == known


@either
def test_the_monitors_buttons_for_all_end_a_map(room: Room, order: Order) -> None:
    """Its rows alone would make room for the next ones."""
    _, told = begun(room)
    click = {"type": "action", "name": order, "request": "all", "id": 1}
    Monitor(room.client)._receive(click)
    assert isinstance(told.exception(timeout=5), ERRORS[order])
    assert len(room.prompts) < len(ROWS)


def test_an_id_means_a_map_or_one_of_its_rows(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """A beginning of the map's is that of all its rows, too, and means the map."""
    runner, told = begun(room)
    map_id = runner.run.id
    rows = [Request(prompt="x", id=f"{map_id}-{n}", origin=Origin(map_id=map_id)) for n in (1, 10)]
    handles = [SimpleNamespace(request=row) for row in rows]
    with monkeypatch.context() as patch:
        patch.setattr(type(room.client), "active_handles", lambda _: handles)
        assert _running(map_id[:5]) == ([runner], [])
        assert _running(map_id) == ([runner], [])
        assert _running(f"{map_id}-1") == ([], handles[:1])
    runner.end("park")
    told.exception(timeout=5)


@either
def test_a_map_at_a_provider_is_left_there(room: Room, order: Order) -> None:
    """As by Stop; going on fetches it, or ends it there."""
    room.simulator.change_knobs(batch_seconds=0.5)
    runner, told = begun(room, answers=0, engine="batch")
    wait_until(lambda: runner.run.backend.counter.stats.sent == len(ROWS))
    runner.end(order)
    error = told.exception(timeout=5)
    assert isinstance(error, ERRORS[order])
    assert "the provider goes on" in str(error)
    run = resume_map(runner.run.id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == ROWS


def test_one_row_that_is_cancelled_ends_nothing_else(room: Room) -> None:
    """The map goes on, and its row says why it has no answer."""
    _, told = begun(room)
    handle = room.client.active_handles()[-1]
    handle.cancel()
    replies = told.result(timeout=20)
    missing = [reply for reply in replies if not reply]
    assert [(reply.id, reply.status) for reply in missing] == [(handle.request.id, "cancelled")]
