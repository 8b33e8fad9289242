"""`nbcodex.map(…, engine="batch")` from the caller's side: results, Stop, cancel, costs."""

from __future__ import annotations

import asyncio
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pandas
import pytest

import nbcodex
from nbcodex import host
from nbcodex.errors import BatchUnsupportedError, NbcodexError, Stopped
from nbcodex.mapping import map_runner
from nbcodex.mapping.backends import BatchBackend
from nbcodex.mapping.map_api import resume_map
from nbcodex.mapping.upload import erase_leftovers
from nbcodex.models import Usage
from nbcodex.notebook.commands.entries import forget
from nbcodex.runtime import event_loop
from nbcodex.simulator.http_messages import ErrorResponse

from .conftest import SimulatedClient, texts

pytestmark = pytest.mark.slow

ECHO = "[[echo: {}]]"


@pytest.fixture(autouse=True)
def short_jobs(simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated.simulator.change_knobs(batch_seconds=0.3)
    monkeypatch.setattr("nbcodex.mapping.batch_api.FIRST_POLL_S", 0.03)


def last() -> Any:
    return nbcodex.map.last  # type: ignore[attr-defined]


def jobs_created(simulated: SimulatedClient) -> int:
    seen = [(entry.method, entry.path) for entry in simulated.simulator.log]
    return seen.count(("POST", "/v1/batches"))


def rows_sent(simulated: SimulatedClient) -> int:
    return sum(seen.method == "BATCH" for seen in simulated.simulator.log)


def files(simulated: SimulatedClient) -> int:
    return len(simulated.simulator.batches._files)


def test_frame_is_answered_by_one_job_that_sends_equal_rows_once(
    simulated: SimulatedClient,
) -> None:
    frame = pandas.DataFrame({"text": ["a", "b", "a"]})
    back = nbcodex.map("[[echo: {text}]]", frame, engine="batch")
    assert list(back["answer"]) == ["a", "b", "a"]
    assert (jobs_created(simulated), rows_sent(simulated), files(simulated)) == (1, 2, 0)
    assert {seen.method for seen in simulated.simulator.log if seen.api} == {"BATCH"}


def test_iterator_is_read_one_window_ahead(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each window is a job; its replies are returned before the next one is read."""
    monkeypatch.setattr(BatchBackend, "max_unreturned_rows", 30)
    read = itertools.count()
    replies = nbcodex.map(ECHO, (f"n{n}" for n in read), engine="batch")
    assert texts(itertools.islice(replies, 40)) == [f"n{n}" for n in range(40)]
    replies.close()
    assert next(read) <= 40 + 30 + 1


def test_amap_uploads_a_batch(simulated: SimulatedClient) -> None:
    replies = asyncio.run(nbcodex.amap(ECHO, ["a", "b"], engine="batch"))
    assert texts(replies) == ["a", "b"]
    assert jobs_created(simulated) == 1


def test_row_without_a_request_is_not_uploaded(simulated: SimulatedClient) -> None:
    replies = nbcodex.map("{text}", [{"text": "[[echo: a]]"}, {"text": " "}], engine="batch")
    assert [bool(reply) for reply in replies] == [True, False]
    assert rows_sent(simulated) == 1


def press_stop(monkeypatch: pytest.MonkeyPatch, *, stage: str = "in progress") -> None:
    """Raise KeyboardInterrupt while the job is at a stage."""
    real = BatchBackend.next_endings

    def next_endings(self: BatchBackend, *, timeout: float) -> Any:
        if timeout and self.stage.startswith(stage):
            monkeypatch.setattr(BatchBackend, "next_endings", real)
            raise KeyboardInterrupt
        return real(self, timeout=min(timeout, 0.01))

    monkeypatch.setattr(BatchBackend, "next_endings", next_endings)


def test_stop_before_any_job_is_accepted_offers_no_cancel(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated.simulator.change_knobs(batch_queue=1)
    press_stop(monkeypatch, stage="the provider's queue is full")
    with pytest.raises(Stopped, match="the rest is parked") as caught:
        nbcodex.map(ECHO, [f"row {n}" for n in range(50)], engine="batch")
    assert f"`%codex resume {last().id}` continues it" in caught.value.advice
    assert "cancel" not in caught.value.advice


def test_resumed_equal_rows_are_uploaded_once(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated.simulator.change_knobs(batch_queue=1)
    press_stop(monkeypatch, stage="the provider's queue is full")
    rows = [f"row {n % 3}" for n in range(30)]
    with pytest.raises(Stopped):
        nbcodex.map(ECHO, rows, engine="batch")
    simulated.simulator.change_knobs(batch_queue=None)
    run = resume_map(last().id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == rows
    assert rows_sent(simulated) == 3


@pytest.mark.parametrize("in_other_process", [False, True])
def test_job_continues_after_stop_and_resume_fetches_it(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, in_other_process: bool
) -> None:
    """Here or in another process; until then the map is listed as unfinished."""
    simulated.simulator.change_knobs(batch_seconds=8.0)
    rows = [f"row {n}" for n in range(50)]
    press_stop(monkeypatch)
    with pytest.raises(Stopped) as caught:
        nbcodex.map(ECHO, rows, engine="batch")
    stopped = last().id
    assert f"%codex cancel {stopped}" in caught.value.advice
    simulated.simulator.change_knobs(batch_seconds=0.1)
    if in_other_process:
        simulated.restart_process()
    journal = simulated.client.journal(host.current.settings())
    assert journal.maps.unfinished() == [stopped]
    run = resume_map(stopped)
    assert run is not None
    assert texts(map_runner.run_map(run)) == rows
    assert (jobs_created(simulated), rows_sent(simulated), files(simulated)) == (1, 50, 0)
    assert journal.maps.unfinished() == []


def test_rerun_in_another_process_waits_for_the_existing_job(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated.simulator.change_knobs(batch_seconds=8.0)
    press_stop(monkeypatch)
    with pytest.raises(Stopped):
        nbcodex.map(ECHO, ["a", "b", "c"], engine="batch")
    simulated.simulator.change_knobs(batch_seconds=0.3)
    simulated.restart_process()
    assert texts(nbcodex.map(ECHO, ["c", "b", "a", "d"], engine="batch")) == list("cbad")
    assert (rows_sent(simulated), files(simulated)) == (4, 0)


def test_cancel_fetches_finished_rows_and_parks_the_rest(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated.simulator.change_knobs(batch_seconds=10.0)
    press_stop(monkeypatch)
    with pytest.raises(Stopped):
        nbcodex.map(ECHO, [str(n) for n in range(10)], engine="batch")
    run = resume_map(last().id, cancel_jobs=True)
    assert run is not None
    replies = map_runner.run_map(run)
    done = sum(map(bool, replies))
    assert rows_sent(simulated) == done < 10
    assert {reply.status for reply in replies} <= {"done", "parked"}
    assert files(simulated) == 0
    simulated.simulator.change_knobs(batch_seconds=0.1)
    run = resume_map(last().id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == [str(n) for n in range(10)]
    assert rows_sent(simulated) == 10


def test_live_map_has_no_job_to_cancel(simulated: SimulatedClient) -> None:
    nbcodex.map(ECHO, ["a"])
    with pytest.raises(NbcodexError, match="No batch job"):
        resume_map(last().id, cancel_jobs=True)


def test_server_without_batch_api_ends_the_map(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upload(*_: object) -> None:
        raise ErrorResponse(404, "Not Found")

    monkeypatch.setattr(simulated.simulator.batches, "_upload", upload)
    with pytest.raises(BatchUnsupportedError, match="engine='live'"):
        nbcodex.map(ECHO, ["a"], engine="batch")


def test_batch_costs_half_everywhere(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cost(usage: Usage, *_: object) -> float:
        return 0.25 if usage.service_tier == "batch" else 0.5

    monkeypatch.setattr("nbcodex.openai_api.pricing.cost", cost)
    questions: list[str] = []
    host.current.confirm = lambda question: bool(questions.append(question)) or True
    estimate = nbcodex.map(ECHO, ["a", "b", "c"], engine="batch", dry_run=True)
    assert estimate.cost == 0.75
    assert "half the usual price" in str(estimate)
    replies = nbcodex.map(ECHO, [str(n) for n in range(6)], engine="batch")
    assert {reply.cost for reply in replies} == {0.25}
    assert "$1.50" in questions[0]


def test_stats_include_the_stage_of_the_job(simulated: SimulatedClient) -> None:
    simulated.simulator.change_knobs(batch_seconds=8.0)
    reports: list[Any] = []

    def listen(stats: Any) -> None:
        reports.append(stats)
        if stats.stage.startswith("in progress") and stats.stage.endswith("of 20"):
            simulated.simulator.change_knobs(batch_seconds=0.1)

    host.current.map_listener = lambda: listen
    nbcodex.map(ECHO, list(range(20)), engine="batch")
    stages = [report.stage for report in reports]
    assert any(stage.startswith("in progress") and stage.endswith("of 20") for stage in stages)
    assert max(report.sent for report in reports) == 20
    assert (reports[-1].done, reports[-1].sent, reports[-1].stage) == (20, 0, "")


@pytest.mark.parametrize("forgotten", ["the map", "its rows", "all"])
def test_files_of_deleted_rows_are_erased_at_the_provider(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """Their job, which is in progress, is cancelled."""
    simulated.simulator.change_knobs(batch_seconds=10.0)
    press_stop(monkeypatch)
    with pytest.raises(Stopped):
        nbcodex.map(ECHO, ["a", "b"], engine="batch")
    simulated.simulator.change_knobs(batch_seconds=10_000.0)  # it stays in progress
    settings, client = host.current.settings(), simulated.client
    journal = client.journal(settings)
    names = {
        "the map": [last().id],
        "its rows": [f"{last().id}-0", f"{last().id}-1"],
        "all": [None],
    }
    for name in names[forgotten]:
        assert event_loop.run(journal.delete(name)) > 0
    assert files(simulated) == 1
    event_loop.run(erase_leftovers(journal.batch_jobs, client.services(), settings))
    assert files(simulated) == 0
    assert event_loop.run(journal.batch_jobs.unerased_jobs()) == []


@pytest.mark.parametrize("forgotten", ["the map", "all"])
def test_forgetting_leaves_a_running_job_at_the_provider(
    simulated: SimulatedClient, capsys: pytest.CaptureFixture[str], forgotten: str
) -> None:
    """The map that waits for it gets its answers, whatever is forgotten or erased meanwhile."""
    simulated.simulator.change_knobs(batch_seconds=2.0)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(nbcodex.map, ECHO, ["a", "b"], engine="batch")
        settings = host.current.settings()
        journal = simulated.client.journal(settings)
        shell = SimpleNamespace(history_manager=None)
        session: Any = SimpleNamespace(journal=journal, settings=settings, shell=shell)
        while not jobs_created(simulated):
            assert not running.done()
            time.sleep(0.01)
        forget(session, last().id if forgotten == "the map" else "all")
        # As when another map starts.
        services = simulated.client.services()
        event_loop.run(erase_leftovers(journal.batch_jobs, services, settings))
        forget(session, "all")
        assert not running.done()
        assert texts(running.result()) == ["a", "b"]
    assert "files of the batch job" in capsys.readouterr().out
