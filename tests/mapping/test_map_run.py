"""The order and window of a map run, on a backend that the tests control."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nbcodex import events
from nbcodex.errors import (
    CredentialsError,
    NbcodexError,
    NetworkRefusedError,
    ParkedError,
    PermanentError,
)
from nbcodex.mapping.backends import (
    MAX_ACTIVE_ROWS,
    MAX_QUEUED_ROWS,
    LiveBackend,
    StatsCounter,
)
from nbcodex.mapping.inputs import PandasInput, read_input, rows_from_journal
from nbcodex.mapping.map_run import MapRun, RowState
from nbcodex.mapping.rows import RowRequests
from nbcodex.models import MapStats, Origin, Reply, Request, RequestOptions
from nbcodex.runtime.clock import BootClock
from nbcodex.settings import Settings

from .conftest import SimulatedClient


class ManualBackend:
    """A backend whose rows end when the test says so."""

    max_unreturned_rows, stage = LiveBackend.max_unreturned_rows, ""

    client: Any = SimpleNamespace(clock=BootClock())

    def __init__(self, max_active: int = 10_000) -> None:
        self.settings, self.counter, self.max_active = Settings(), StatsCounter("m1"), max_active
        self.started: list[str] = []
        self.requests: dict[str, Request] = {}
        self.flushed = False
        self._endings: dict[str, events.Ending] = {}

    def capacity(self, active_rows: int) -> int:
        return self.max_active - active_rows

    def start_row(self, request: Request, entry: Any = None) -> None:
        self.started.append(request.id)
        self.requests[request.id] = request

    def send_collected(self) -> None:
        self.flushed = True

    def end_active(self, action: Any, /) -> None: ...

    def confirm_ending(self, request_id: str) -> None:
        self._endings.pop(request_id, None)

    def next_endings(self, *, timeout: float) -> list[events.Ending]:
        return list(self._endings.values())

    def end_rows(self, *numbers: int, error: NbcodexError | None = None) -> None:
        for number in numbers:
            id_ = f"m1-{number}"
            text = self.requests[id_].prompt
            reply = Reply(id=id_, text=text, status="failed" if error else "done")
            ending: events.Ending = events.Finished(request_id=id_, at=0.0, reply=reply)
            if isinstance(error, ParkedError):
                reply = Reply(id=id_, status="parked")
                ending = events.Parked(request_id=id_, at=0.0, error=error, reply=reply)
            elif error is not None:
                ending = events.Failed(request_id=id_, at=0.0, error=error, reply=reply)
            self.counter(ending)
            self._endings[id_] = ending


def run_of(data: Any, backend: ManualBackend, **options: Any) -> MapRun:
    shape, origin = read_input(data), Origin(map_id="m1")
    made = RowRequests(
        "{}", shape, RequestOptions(), row_key=None, settings=Settings(), origin=origin
    )
    return MapRun(shape, made, cast(Any, backend), origin=origin, **options)


def test_replies_are_returned_in_order() -> None:
    backend = ManualBackend()
    run = run_of(iter(range(3)), backend)
    run.advance()
    backend.end_rows(2, 1)
    run.advance()
    assert list(run.pop_ready()) == []
    backend.end_rows(0)
    run.advance()
    assert [reply.text for reply in run.pop_ready()] == ["0", "1", "2"]
    assert not run.advance()
    assert backend.flushed


def test_slow_row_of_an_iterator_stops_reading_after_one_window() -> None:
    backend = ManualBackend()
    run = run_of(iter(range(10**9)), backend)
    for _ in range(5):
        run.advance()
        backend.end_rows(*range(1, len(backend.started)))
    assert len(backend.started) == LiveBackend.max_unreturned_rows
    backend.end_rows(0)
    run.advance()
    next(run.pop_ready())
    run.advance()
    assert len(backend.started) == LiveBackend.max_unreturned_rows + 1


@pytest.mark.slow
def test_slow_row_of_a_list_delays_no_other() -> None:
    backend = ManualBackend(max_active=2)
    run = run_of(list(range(5_000)), backend)
    run.advance()
    for number in range(1, 5_000):
        backend.end_rows(number)
        run.advance()
    assert len(backend.started) == 5_000
    assert len(run._active) == 1


def test_map_from_the_journal_does_not_read_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its frame has no columns: older versions of pandas yield no row of such a frame."""
    data = rows_from_journal(["a", "b"], "pandas", None)
    monkeypatch.setattr(PandasInput, "rows", lambda _: pytest.fail("the data was read"))
    origin = Origin(map_id="m1")
    run = MapRun(data, None, cast(Any, ManualBackend()), origin=origin)
    assert not run.advance()
    monkeypatch.setattr(MapRun, "_park_remaining", lambda *_, **__: None)
    run.end_early("stopped")
    assert not run.advance()


def test_ending_delivered_twice_counts_once() -> None:
    backend = ManualBackend()
    run = run_of(["a"], backend)
    run.advance()
    backend.end_rows(0)
    (ending,) = backend.next_endings(timeout=0.0)
    run.advance()
    backend._endings[ending.request_id] = ending
    assert not run.advance()
    assert [reply.text for reply in run.replies_in_order()] == ["a"]


def test_equal_rows_start_after_the_first_has_ended() -> None:
    backend = ManualBackend()
    run = run_of(["a", "a", "b", "a"], backend)
    run.advance()
    assert backend.started == ["m1-0", "m1-2"]
    backend.end_rows(0)
    run.advance()
    assert backend.started == ["m1-0", "m1-2", "m1-1", "m1-3"]


@pytest.mark.parametrize("kind", [PermanentError, ParkedError])
def test_equal_rows_are_started_at_most_twice_each(
    monkeypatch: pytest.MonkeyPatch, kind: type[NbcodexError]
) -> None:
    """Otherwise many equal rows would take quadratic time."""
    started: list[int] = []
    real = MapRun._start

    def start(self: MapRun, row: RowState) -> bool:
        started.append(row.index)
        return real(self, row)

    monkeypatch.setattr(MapRun, "_start", start)
    backend = ManualBackend(max_active=10)
    run, ended = run_of(["a", "b"] * 50, backend), 0
    while run.advance():
        numbers = [int(id_.partition("-")[2]) for id_ in backend.started[ended:]]
        backend.end_rows(*numbers, error=None if ended else kind("no"))
        ended = len(backend.started)
    assert max(Counter(started).values()) <= 2


def test_permanent_failure_is_shared_by_equal_rows() -> None:
    backend = ManualBackend()
    run = run_of(["a", "a", "a"], backend)
    run.advance()
    backend.end_rows(0, error=PermanentError("no"))
    assert not run.advance()
    assert backend.started == ["m1-0"]
    assert [reply.error for reply in run.replies_in_order()] == ["no", "no", "no"]


@pytest.mark.parametrize("error", [CredentialsError("no"), NetworkRefusedError("no")])
def test_refusal_that_meets_every_row_ends_the_map(error: NbcodexError) -> None:
    backend = ManualBackend()
    run = run_of([str(n) for n in range(200)], backend)
    run.advance()
    backend.end_rows(*range(8), error=error)
    with pytest.raises(type(error)):
        run.advance()


@pytest.mark.parametrize("on_error", ["keep", "raise"])
def test_advice_of_the_map_is_not_part_of_the_errors_of_its_rows(on_error: Any) -> None:
    backend, error = ManualBackend(), CredentialsError("no")
    run = run_of([str(n) for n in range(20)], backend, on_error=on_error)
    run.advance()
    backend.end_rows(*range(20), error=error)
    with pytest.raises(CredentialsError, match="%codex resume m1"):
        run.advance()
    assert {reply.error for reply in run.replies_in_order()} == {"no"}


def test_parked_row_does_not_end_a_map_with_on_error_raise() -> None:
    backend = ManualBackend()
    run = run_of(["a", "b"], backend, on_error="raise")
    run.advance()
    backend.end_rows(0, error=ParkedError("later"))
    assert run.advance()


def test_next_equal_row_starts_if_the_first_is_parked() -> None:
    backend = ManualBackend()
    run = run_of(["a", "a", "a"], backend)
    run.advance()
    backend.end_rows(0, error=ParkedError("later"))
    run.advance()
    assert backend.started == ["m1-0", "m1-1"]


@pytest.mark.slow
def test_remembered_failures_of_an_iterator_are_bounded() -> None:
    backend = ManualBackend()
    run = run_of(iter(range(3_000)), backend)
    ended = 0
    while run.advance():
        backend.end_rows(*range(ended, len(backend.started)), error=PermanentError("no"))
        ended = len(backend.started)
        for _ in run.pop_ready():
            pass
    assert ended == 3_000
    assert len(run.failures) == 1_000
    assert not run.replies
    assert not run._unanswered


def test_live_capacity_is_bounded_by_active_and_queued_rows(simulated: SimulatedClient) -> None:
    live = LiveBackend(cast(Any, simulated.client), Settings(), map_id="m1")
    for active, sent, left in [
        (0, 0, MAX_QUEUED_ROWS),
        (40, 0, MAX_QUEUED_ROWS - 40),
        (MAX_QUEUED_ROWS, 0, 0),
        (300, 300, MAX_QUEUED_ROWS),
        (MAX_ACTIVE_ROWS - 5, MAX_ACTIVE_ROWS - 5, 5),
        (MAX_ACTIVE_ROWS, MAX_ACTIVE_ROWS, 0),
    ]:
        live.counter.stats = MapStats(map_id="m1", at=0.0, sent=sent)
        assert live.capacity(active) == left
