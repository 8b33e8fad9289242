"""Maps that are cancelled or parked, from the executing thread and from others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

import nbcodex
from nbcodex import host
from nbcodex.errors import CancelledError, NbcodexError, ParkedError
from nbcodex.events import EndAction
from nbcodex.mapping import map_runner
from nbcodex.mapping.map_api import resume_map
from nbcodex.mapping.map_runner import MapRunner, active_runners
from nbcodex.models import Origin, Request
from nbcodex.notebook.commands.entries import _find_running
from nbcodex.notebook.monitor import Monitor

from .conftest import SimulatedClient, texts

ECHO = "[[echo: {}]]"
ROWS = [f"row {n}" for n in range(200)]
ERRORS = {"cancel": CancelledError, "park": ParkedError}

TIMEOUT_S = 60.0

cancel_or_park = pytest.mark.parametrize("action", ["cancel", "park"])


@pytest.fixture
def simulated(simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch) -> SimulatedClient:
    """For seconds there are active rows, and rows that are not started."""
    monkeypatch.setattr("nbcodex.mapping.backends.MAX_ACTIVE_ROWS", 16)
    simulated.simulator.change_knobs(latency=0.1)
    return simulated


def started(
    simulated: SimulatedClient, *, answers: int = 20, **options: Any
) -> tuple[MapRunner, Future[Any]]:
    """Return a map that another thread executes, once some of its rows are answered."""
    result: Future[Any] = Future()

    def ask() -> None:
        try:
            result.set_result(nbcodex.map(ECHO, ROWS, **options))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    wait_until(
        lambda: any(each.run.backend.counter.stats.done >= answers for each in active_runners())
    )
    return active_runners()[0], result


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


@pytest.mark.slow
@cancel_or_park
@pytest.mark.parametrize("in_other_process", [False, True])
def test_map_ended_from_another_thread_can_be_resumed(
    simulated: SimulatedClient, action: EndAction, in_other_process: bool
) -> None:
    """Here or in another process, only rows without an answer are sent."""
    runner, result = started(simulated)
    runner.end(action)
    error = result.exception(timeout=TIMEOUT_S)
    assert isinstance(error, ERRORS[action])
    assert f"%codex resume {runner.run.id} continues it" in error.advice.replace("`", "")
    known = len(simulated.prompts)
    assert known < len(ROWS)
    assert active_runners() == []
    done = [n for n, reply in enumerate(runner.run.replies_in_order()) if reply]
    simulated.simulator.change_knobs(latency=0.0)
    if in_other_process:
        simulated.restart_process()
    run = resume_map(runner.run.id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == ROWS
    asked = simulated.prompts.count
    assert all(asked(f"[[echo: row {n}]]") == 1 for n in done)
    journal = simulated.client.journal(host.current.settings())
    assert journal.maps.count_rows(run.id) == {"done": len(ROWS)}


@pytest.mark.slow
@cancel_or_park
def test_active_rows_are_cancelled_or_parked_and_others_parked(
    simulated: SimulatedClient, action: EndAction
) -> None:
    runner, result = started(simulated)
    # Rows that are sent from here on are active until they are ended.
    simulated.simulator.change_knobs(latency=TIMEOUT_S)
    sent = len(simulated.prompts)
    wait_until(lambda: len(simulated.prompts) > sent)
    runner.end(action)
    result.exception(timeout=TIMEOUT_S)
    journal = simulated.client.journal(host.current.settings())
    counts = journal.maps.count_rows(runner.run.id)
    assert counts.total() == len(ROWS)
    assert (counts["cancelled"] > 0) is (action == "cancel")
    assert counts["parked"] > 0
    assert counts.keys() <= {"done", "parked", "cancelled"}


@pytest.mark.slow
def test_cancelled_map_reports_no_failures(simulated: SimulatedClient) -> None:
    reports: list[Any] = []
    host.current.map_listener = lambda: reports.append
    runner, result = started(simulated, on_error="raise")
    runner.end("cancel")
    error = result.exception(timeout=TIMEOUT_S)
    assert isinstance(error, CancelledError)
    assert error.message.startswith("Cancelled by you: ")
    assert "of 200 rows are answered, nothing is lost." in error.message
    assert (reports[-1].outcome, reports[-1].failed) == ("cancelled", 0)
    assert reports[-1].done + reports[-1].parked == len(ROWS)
    assert runner.run.failures == {}


def test_active_map_cannot_be_resumed(simulated: SimulatedClient) -> None:
    runner, result = started(simulated)
    with pytest.raises(NbcodexError, match="is still running"):
        resume_map(runner.run.id)
    runner.end("park")
    result.exception(timeout=TIMEOUT_S)


@pytest.mark.slow
def test_map_on_the_callers_loop_ends_at_once(simulated: SimulatedClient) -> None:
    """A task that wakes up late leaves the resumed map alone."""

    async def main() -> tuple[Any, Any]:
        answered = asyncio.Event()
        host.current.map_listener = lambda: lambda stats: answered.set() if stats.done else None
        task = asyncio.ensure_future(nbcodex.amap(ECHO, ROWS))
        await answered.wait()
        (runner,) = active_runners()
        runner.end("cancel")
        assert runner.run.outcome == "cancelled"
        simulated.simulator.change_knobs(latency=0.0)
        run = resume_map(runner.run.id)
        assert run is runner.run
        replies = map_runner.run_map(run)
        return replies, (await asyncio.gather(task, return_exceptions=True))[0]

    replies, error = asyncio.run(main())
    assert texts(replies) == ROWS
    assert isinstance(error, CancelledError)


def test_suspended_iterator_is_ended_at_once(simulated: SimulatedClient) -> None:
    replies = nbcodex.map(ECHO, iter(ROWS))
    assert next(replies).text == "row 0"
    (runner,) = active_runners()
    runner.end("park")
    assert runner.ended.is_set()
    known = len(simulated.prompts)
    with pytest.raises(ParkedError, match="the rest is parked"):
        next(replies)
    assert len(simulated.prompts) == known


@pytest.mark.slow
@cancel_or_park
def test_monitor_buttons_for_all_end_a_map(simulated: SimulatedClient, action: EndAction) -> None:
    """If only its rows were ended, the map would start the next ones."""
    _, result = started(simulated)
    widget = Monitor(simulated.client)._live_widget()
    click = {"type": "action", "name": action, "request": "all", "id": 1}
    widget._receive(widget, click, [])
    assert isinstance(result.exception(timeout=TIMEOUT_S), ERRORS[action])
    assert len(simulated.prompts) < len(ROWS)


def test_id_prefix_names_the_map_not_its_rows(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, result = started(simulated)
    map_id = runner.run.id
    rows = [Request(prompt="x", id=f"{map_id}-{n}", origin=Origin(map_id=map_id)) for n in (1, 10)]
    handles = [SimpleNamespace(request=row) for row in rows]
    with monkeypatch.context() as patch:
        patch.setattr(type(simulated.client), "active_handles", lambda _: handles)
        assert _find_running(map_id[:5]) == ([runner], [])
        assert _find_running(map_id) == ([runner], [])
        assert _find_running(f"{map_id}-1") == ([], handles[:1])
    runner.end("park")
    result.exception(timeout=TIMEOUT_S)


@pytest.mark.slow
@cancel_or_park
def test_batch_job_continues_after_cancel_or_park(
    simulated: SimulatedClient, action: EndAction
) -> None:
    simulated.simulator.change_knobs(batch_seconds=600.0)
    runner, result = started(simulated, answers=0, engine="batch")
    wait_until(lambda: runner.run.backend.counter.stats.sent == len(ROWS))
    runner.end(action)
    error = result.exception(timeout=TIMEOUT_S)
    assert isinstance(error, ERRORS[action])
    assert "the provider continues" in str(error)
    simulated.simulator.change_knobs(batch_seconds=0.1)
    run = resume_map(runner.run.id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == ROWS


@pytest.mark.slow
def test_cancelled_row_does_not_end_its_map(simulated: SimulatedClient) -> None:
    _, result = started(simulated)
    simulated.simulator.change_knobs(latency=2.0)
    known = len(simulated.prompts)
    wait_until(lambda: len(simulated.prompts) > known)
    asked = simulated.prompts[-1]
    (handle,) = (h for h in simulated.client.active_handles() if h.request.prompt == asked)
    handle.end("cancel")
    simulated.simulator.change_knobs(latency=0.0)
    replies = result.result(timeout=TIMEOUT_S)
    missing = [reply for reply in replies if not reply]
    assert [(reply.id, reply.status) for reply in missing] == [(handle.request.id, "cancelled")]


def test_active_handles_are_listed_while_another_thread_starts_a_request(
    simulated: SimulatedClient,
) -> None:
    client = simulated.client

    class HandleOfAnotherThread:
        done = property(
            lambda _: not client.create_handle(Request(prompt="x"), host.current.settings())
        )

    first, second = HandleOfAnotherThread(), HandleOfAnotherThread()
    client._handles.update({"a": first, "b": second})  # type: ignore[dict-item]
    assert client.active_handles() == [first, second]
