"""The answer of one row never reaches another: whatever the order, the duplicates, the resumes."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import httpx2
import pandas
import polars
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nbcodex
from nbcodex import events
from nbcodex.errors import ParkedError, PermanentError, Stopped
from nbcodex.journal.reads import Entry
from nbcodex.mapping import map_api, map_runner
from nbcodex.mapping.batch_rows import PendingRow
from nbcodex.mapping.inputs import read_input
from nbcodex.mapping.map_api import resume_map
from nbcodex.mapping.map_run import MapRun
from nbcodex.mapping.rows import RowRequests
from nbcodex.models import Origin, Reply, Request, RequestOptions, Status
from nbcodex.settings import Settings

from .conftest import SimulatedClient
from .test_map import press_stop
from .test_map_run import ManualBackend
from .test_upload import FaultyTransport, World, requests, run_virtual

pytestmark = pytest.mark.slow

ECHO = "[[echo: {text}]]"
SETTINGS = Settings(journal=False)


def run_with(data: Any, source: Any, backend: ManualBackend) -> MapRun:
    """Return a map run without a journal, whose rows end when the test says so."""
    inputs, origin = read_input(data), Origin(map_id="m1")
    made = RowRequests(
        source, inputs, RequestOptions(), row_key=None, settings=SETTINGS, origin=origin
    )
    backend.settings = SETTINGS
    return MapRun(inputs, made, cast(Any, backend), origin=origin)


def end_some(backend: ManualBackend, chance: random.Random) -> None:
    """End about half of the active rows, in any order and in any way."""
    ended = {event.request_id for event in backend.next_endings(timeout=0.0)}
    active = [id_ for id_ in backend.requests if id_ not in ended]
    chance.shuffle(active)
    for id_ in active[::2]:
        backend.counter(events.Sent(request_id=id_, at=0.0, attempt=1, model=None, input_tokens=1))
    chance.shuffle(active)
    for id_ in active[: len(active) // 2 + 1]:
        error = chance.choice([None, None, None, ParkedError("later"), PermanentError("no")])
        backend.end_rows(int(id_.partition("-")[2]), error=error)
        del backend.requests[id_]


def stop_and_resume(run: MapRun, backend: ManualBackend, chance: random.Random) -> None:
    """Stop a run, let another kernel answer some of its rows, and resume it."""
    for id_ in list(backend.requests):
        backend.end_rows(int(id_.partition("-")[2]), error=ParkedError("stopped"))
        del backend.requests[id_]
    run.end_early("stopped")
    entries = {}
    for row in run._unanswered.values():
        if row.request and chance.random() < 0.5:
            done = chance.random() < 0.5
            request, status = row.request, cast(Status, "done" if done else "parked")
            if chance.random() < 0.2:  # of another map with the same id
                request = replace(request, prompt="something else")
            reply = Reply(id=request.id, text=request.prompt if done else "", status=status)
            entries[request.id] = Entry(request=request, reply=reply)
    run.prepare_resume(entries, SETTINGS)


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(0, 5), max_size=40), seed=st.integers(0, 2**32), stops=st.booleans()
)
def test_each_row_gets_the_answer_to_its_own_prompt(
    rows: list[int], seed: int, stops: bool
) -> None:
    """With equal rows, endings in any order, and resumes; the counts always add up."""
    chance, backend = random.Random(seed), ManualBackend(max_active=8)
    run = run_with([f"row {number}" for number in rows], "{}", backend)
    while run.advance():
        end_some(backend, chance)
        if stops and chance.random() < 0.2:
            stop_and_resume(run, backend, chance)
        stats = run.stats()
        counts = stats.done, stats.failed, stats.parked, stats.sent, stats.waiting
        assert sum(counts) == len(rows)
        assert min(counts) >= 0
    run.finish()
    stats, replies = run.stats(), run.replies_in_order()
    statuses = Counter(reply.status for reply in replies)
    assert (stats.done, stats.failed, stats.parked) == (
        statuses["done"],
        statuses["failed"],
        statuses["parked"],
    )
    assert (stats.sent, stats.waiting) == (0, 0)
    for index, (number, reply) in enumerate(zip(rows, replies, strict=True)):
        assert reply.id == f"m1-{index}"
        assert reply.text in ("", f"row {number}")
        assert not reply or reply.text


@settings(deadline=None)
@given(rows=st.lists(st.integers(0, 5), max_size=40), seed=st.integers(0, 2**32))
def test_replies_of_an_iterator_are_in_the_order_of_its_items(rows: list[int], seed: int) -> None:
    chance, backend = random.Random(seed), ManualBackend(max_active=8)
    run = run_with((f"row {number}" for number in rows), "{}", backend)
    replies = []
    while run.advance():
        end_some(backend, chance)
        replies += run.pop_ready()
    replies += run.pop_ready()
    assert [reply.id for reply in replies] == [f"m1-{index}" for index in range(len(rows))]
    assert all(r.text in ("", f"row {n}") for n, r in zip(rows, replies, strict=True))


@pytest.mark.parametrize("option", ["api_base", "model"])
def test_refusal_of_one_server_or_model_does_not_reach_rows_of_another(option: str) -> None:
    values = {"first": "https://a.example/v1", "second": "https://b.example/v1"}

    def prompt(name: str) -> dict[str, str]:
        return {"prompt": "the same", option: values[name]}

    backend = ManualBackend()
    run = run_with(["first", "second", "first"], prompt, backend)
    run.advance()
    assert backend.started == ["m1-0", "m1-1"]
    backend.end_rows(0, error=PermanentError("refused by a"))
    backend.end_rows(1)
    assert not run.advance()
    refusal = "refused by a"
    assert [reply.error for reply in run.replies_in_order()] == [refusal, None, refusal]


class TamperingTransport(FaultyTransport):
    """Changes the lines of the result files that a batch job has."""

    def __init__(self, core: Any, seed: int) -> None:
        super().__init__(core)
        self.chance = random.Random(seed)
        self.lost: set[str] = set()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        if not request.url.path.endswith("/content"):
            return response
        lines = [json.loads(line) for line in (await response.aread()).splitlines()]
        self.chance.shuffle(lines)
        for line in lines[:2]:  # without an id, or with one of no row
            self.lost.add(line.pop("custom_id"))
        lines[1]["custom_id"] = self.chance.choice([None, "", "m1-99", "m2-0", 3])
        doubles = [line | {"response": None} for line in lines[2:5]]  # answered, then an error
        text = "\n".join(map(json.dumps, [*lines, *lines[4:6], *doubles])) + "\nnot JSON\n[]\n"
        headers = {
            name: value
            for name, value in response.headers.items()
            if name not in ("content-length", "content-encoding", "transfer-encoding")
        }
        return httpx2.Response(200, headers=headers, content=text.encode())


@pytest.mark.parametrize("chunk", [1, 3, 250])
@pytest.mark.parametrize("seed", range(4))
def test_batch_results_are_matched_by_id_alone(
    monkeypatch: pytest.MonkeyPatch, seed: int, chunk: int
) -> None:
    """In any order, listed twice, without an id or with an unknown one, between damaged lines."""
    monkeypatch.setattr("nbcodex.mapping.batch_rows.COMMIT_CHUNK_ROWS", chunk)

    async def main() -> None:
        world = World()
        world.transport = transport = TamperingTransport(world.core, seed)
        await world.run(world.uploader(), requests(12))
        ids = [event.request_id for event in world.events if isinstance(event, events.Ending)]
        assert sorted(ids) == sorted(f"m1-{n}" for n in range(12))
        for number in range(12):
            ending, entry = world.endings[f"m1-{number}"], world.entries()[f"m1-{number}"]
            if ending.request_id in transport.lost:
                assert isinstance(ending, events.Parked)
            else:
                assert isinstance(ending, events.Finished)
                assert ending.reply.text == entry.reply.text == str(number)
        lost = [request for request in requests(12) if request.id in transport.lost]
        entries = world.entries()
        world.events.clear()
        world.transport = FaultyTransport(world.core)
        uploader = world.uploader()
        uploader.add([PendingRow(request, entries[request.id]) for request in lost])
        uploader.flush()
        await world.until(lambda: len(world.endings) == 2)
        for request in lost:
            assert world.endings[request.id].reply.text == request.id.partition("-")[2]

    run_virtual(main())


@pytest.mark.parametrize("in_order", [True, False])
def test_rows_of_an_earlier_map_with_the_same_id_are_not_restored(
    simulated: SimulatedClient, in_order: bool
) -> None:
    """The journal renames the older entry if two maps draw the same id."""
    entries = []
    for id_, text in [("m77-0", "own"), ("m77-0-5", "foreign"), ("m77-1", "own too")]:
        origin = Origin(map_id="m77", row_index=int(id_[4]), row_count=2)
        request = Request(prompt=text, id=id_, origin=origin)
        entries.append(Entry(request=request, reply=Reply(id=id_, text=text)))
    run = map_api._run_from_journal("m77", entries if in_order else entries[::-1])
    assert [reply.text for reply in run.replies_in_order()] == ["own", "own too"]


def reverse_rows(frame: Any) -> None:
    frame["text"] = [*reversed(frame["text"])]


def append_row(frame: Any) -> None:
    frame.loc[len(frame)] = "appended"


def replace_values(frame: Any) -> None:
    frame["text"] = ["changed"] * len(frame)


def replace_polars_values(frame: Any) -> None:
    frame.insert_column(0, polars.Series("new", ["changed"] * frame.height))
    frame[0, "text"] = "changed"


@pytest.mark.parametrize("limit", [None, 90])
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (pandas.DataFrame, reverse_rows),
        (pandas.DataFrame, append_row),
        (pandas.DataFrame, replace_values),
        (polars.DataFrame, replace_polars_values),
    ],
)
def test_frame_that_is_changed_before_a_resume_keeps_its_answers_in_their_rows(
    simulated: SimulatedClient,
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
    change: Any,
    limit: int | None,
) -> None:
    texts = [f"row {n:03}" for n in range(120)]
    frame = kind({"text": texts})
    press_stop(monkeypatch, after=10)
    with pytest.raises(Stopped):
        nbcodex.map(ECHO, frame, limit=limit)
    change(frame)
    run = resume_map(nbcodex.map.last.id)  # type: ignore[attr-defined]
    assert run is not None
    result = map_runner.run_map(run)
    assert [*result["text"]] == [*result["answer"]] == texts[:limit]


def test_frame_that_is_changed_while_the_map_runs_keeps_its_answers_in_their_rows(
    simulated: SimulatedClient,
) -> None:
    frame = pandas.DataFrame({"text": [f"row {n:03}" for n in range(120)]})

    def prompt(row: dict[str, str]) -> str:
        reverse_rows(frame)
        return ECHO.format(**row)

    result = nbcodex.map(prompt, frame, confirm=True)
    assert [*result["text"]] == [*result["answer"]]
