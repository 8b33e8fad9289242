"""A run by itself: order and window, on a backend that a test plays by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest

from nbcodex import events
from nbcodex.errors import NbcodexError, ParkedError, PermanentError
from nbcodex.mapping.backends import (
    LIVE_WINDOW_ROWS,
    MAX_ACTIVE_ROWS,
    MAX_QUEUED_ROWS,
    LiveBackend,
    StatsCounter,
)
from nbcodex.mapping.inputs import read_input
from nbcodex.mapping.map_run import MapRun, RowState
from nbcodex.mapping.rows import row_requests
from nbcodex.models import MapStats, Origin, Reply, Request
from nbcodex.settings import Settings

from .conftest import Room


class ManualBackend:
    """A backend whose rows end when the test says so."""

    window, stage = LIVE_WINDOW_ROWS, ""

    def __init__(self, max_active: int = 10_000) -> None:
        self.settings, self.counter, self.max_active = Settings(), StatsCounter("m1"), max_active
        self.started: list[str] = []
        self.flushed = False
        self._endings: list[events.Ending] = []

    def capacity(self, active: int) -> int:
        return self.max_active - active

    def start(self, request: Request, entry: Any = None) -> None:
        self.started.append(request.id)

    def flush(self) -> None:
        self.flushed = True

    def end_active(self, action: Any, /) -> None: ...

    def unconfirmed(self) -> list[events.Ending]:
        return []

    def confirm(self, request_id: str) -> None: ...

    def endings(self, *, timeout: float) -> list[events.Ending]:
        found, self._endings = self._endings, []
        return found

    def end_rows(self, *numbers: int, error: NbcodexError | None = None) -> None:
        for number in numbers:
            id_ = f"m1-{number}"
            reply = Reply(id=id_, text=str(number), status="failed" if error else "done")
            ending: events.Ending = events.Finished(request_id=id_, at=0.0, reply=reply)
            if isinstance(error, ParkedError):
                reply = Reply(id=id_, status="parked")
                ending = events.Parked(request_id=id_, at=0.0, error=error, reply=reply)
            elif error is not None:
                ending = events.Failed(request_id=id_, at=0.0, error=error, reply=reply)
            self.counter(ending)
            self._endings.append(ending)


def run_of(data: Any, room: Room, backend: ManualBackend, **options: Any) -> MapRun:
    shape, origin = read_input(data), Origin(map_id="m1")
    made = row_requests("{}", shape, {}, row_key=None, settings=Settings(), origin=origin)
    return MapRun(
        shape, made, backend, origin=origin, client=room.client, settings=Settings(), **options
    )


def test_replies_are_given_in_order(room: Room) -> None:
    """What ends early waits for those before it."""
    backend = ManualBackend()
    run = run_of(iter(range(3)), room, backend)
    run.advance()
    backend.end_rows(2, 1)
    run.advance()
    assert list(run.pop_ready()) == []
    backend.end_rows(0)
    run.advance()
    assert [reply.text for reply in run.pop_ready()] == ["0", "1", "2"]
    assert not run.advance()
    assert backend.flushed


def test_a_slow_row_holds_up_a_window_and_no_more(room: Room) -> None:
    """However many rows there are, only so many are read before the slow one is given."""
    backend = ManualBackend()
    run = run_of(iter(range(10**9)), room, backend)
    for _ in range(5):
        run.advance()
        backend.end_rows(*range(1, len(backend.started)))
    assert len(backend.started) == LIVE_WINDOW_ROWS
    backend.end_rows(0)
    run.advance()
    next(run.pop_ready())
    run.advance()
    assert len(backend.started) == LIVE_WINDOW_ROWS + 1


def test_a_list_has_no_window(room: Room) -> None:
    """All its answers are kept anyway, so a slow row holds up nothing."""
    backend = ManualBackend(max_active=2)
    run = run_of(list(range(5_000)), room, backend)
    run.advance()
    for number in range(1, 5_000):
        backend.end_rows(number)
        run.advance()
    assert len(backend.started) == 5_000
    assert run.active_rows == 1


def test_an_ending_that_is_told_twice_counts_once(room: Room) -> None:
    """After an interrupt, what was heard may be heard again."""
    backend = ManualBackend()
    run = run_of(["a"], room, backend)
    run.advance()
    backend.end_rows(0)
    endings = backend.endings(timeout=0.0)
    run.record(endings)
    run.record(endings)
    assert [reply.text for reply in run.replies_in_order()] == ["0"]
    assert not run.advance()


def test_equal_rows_follow_the_first(room: Room) -> None:
    """They are started when it has ended, all of them, to find its answer."""
    backend = ManualBackend()
    run = run_of(["a", "a", "b", "a"], room, backend)
    run.advance()
    assert backend.started == ["m1-0", "m1-2"]
    backend.end_rows(0)
    run.advance()
    assert backend.started == ["m1-0", "m1-2", "m1-1", "m1-3"]


@pytest.mark.parametrize("kind", [PermanentError, ParkedError])
def test_no_row_waits_for_an_equal_one_twice(
    room: Room, monkeypatch: pytest.MonkeyPatch, kind: type[NbcodexError]
) -> None:
    """What many equal rows cost is told by how many there are, whatever the first came to."""
    begun: list[int] = []
    real = MapRun._start

    def begin(self: MapRun, row: RowState) -> bool:
        begun.append(row.index)
        return real(self, row)

    monkeypatch.setattr(MapRun, "_start", begin)
    backend = ManualBackend(max_active=10)
    run, ended = run_of(["a", "b"] * 50, room, backend), 0
    while run.advance():
        numbers = [int(id_.partition("-")[2]) for id_ in backend.started[ended:]]
        backend.end_rows(*numbers, error=None if ended else kind("no"))
        ended = len(backend.started)
    assert max(Counter(begun).values()) <= 2


def test_equal_rows_fail_together(room: Room) -> None:
    """What is refused for what it asks would be refused again: it is asked once."""
    backend = ManualBackend()
    run = run_of(["a", "a", "a"], room, backend)
    run.advance()
    backend.end_rows(0, error=PermanentError("no"))
    assert not run.advance()
    assert backend.started == ["m1-0"]
    assert [reply.error for reply in run.replies_in_order()] == ["no", "no", "no"]


def test_a_parked_row_is_no_failure_that_ends_a_map(room: Room) -> None:
    """It is kept for later, also where the first failure is to end all."""
    backend = ManualBackend()
    run = run_of(["a", "b"], room, backend, on_error="raise")
    run.advance()
    backend.end_rows(0, error=ParkedError("later"))
    assert run.advance()


def test_the_next_of_equal_rows_is_asked_where_the_first_was_parked(room: Room) -> None:
    """That may have been for a reason of its own; the others go on waiting."""
    backend = ManualBackend()
    run = run_of(["a", "a", "a"], room, backend)
    run.advance()
    backend.end_rows(0, error=ParkedError("later"))
    run.advance()
    assert backend.started == ["m1-0", "m1-1"]


def test_an_iterators_failures_are_not_remembered_for_ever(room: Room) -> None:
    """A million failed rows do not fill the memory."""
    backend = ManualBackend()
    run = run_of(iter(range(3_000)), room, backend)
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


def test_live_takes_what_does_good(room: Room) -> None:
    """A few wait for leave to be sent, so that the ledger always has a next one; not all."""
    live = LiveBackend(cast(Any, room.client), Settings(), map_id="m1")
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
