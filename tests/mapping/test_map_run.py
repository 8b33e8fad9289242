"""A run by itself: order and window, on a way that a test plays by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest

from nbcodex import events
from nbcodex.errors import NbcodexError, ParkedError, PermanentError
from nbcodex.mapping.backends import AHEAD, MOST, LiveBackend
from nbcodex.mapping.inputs import read_input
from nbcodex.mapping.map_run import Item, MapRun
from nbcodex.mapping.rows import recipe
from nbcodex.mapping.stats import StatsCounter
from nbcodex.models import Origin, Reply, Request
from nbcodex.settings import Settings

from .conftest import Room

WINDOW = LiveBackend.window


class Hand:
    """A way on which rows end when the test says so."""

    window, stage = WINDOW, ""

    def __init__(self, room: int = 10_000) -> None:
        self.settings, self.tally, self.most = Settings(), StatsCounter(), room
        self.started: list[str] = []
        self.over = False
        self._endings: list[events.Ending] = []

    def room(self) -> int:
        return self.most - (len(self.started) - self.tally.ended)

    def start(self, request: Request, entry: Any = None) -> None:
        self.started.append(request.id)

    def complete(self) -> None:
        self.over = True

    def order(self, what: Any, /) -> None: ...

    def missed(self) -> list[events.Ending]:
        return []

    def forget(self, id_: str) -> None: ...

    def ended(self, *, within: float) -> list[events.Ending]:
        found, self._endings = self._endings, []
        return found

    def end(self, *numbers: int, error: NbcodexError | None = None) -> None:
        """Let rows end."""
        for number in numbers:
            id_ = f"m1-{number}"
            reply = Reply(id=id_, text=str(number), status="failed" if error else "done")
            ending: events.Ending = events.Finished(request_id=id_, at=0.0, reply=reply)
            if isinstance(error, ParkedError):
                reply = Reply(id=id_, status="parked")
                ending = events.Parked(request_id=id_, at=0.0, error=error, reply=reply)
            elif error is not None:
                ending = events.Failed(request_id=id_, at=0.0, error=error, reply=reply)
            self.tally(ending)
            self._endings.append(ending)


def run_of(data: Any, room: Room, way: Hand, **options: Any) -> MapRun:
    shape, origin = read_input(data), Origin(map_id="m1")
    made = recipe("{}", shape, {}, row_key=None, settings=Settings(), origin=origin)
    return MapRun(
        shape, made, way, origin=origin, client=room.client, settings=Settings(), **options
    )


def test_replies_are_given_in_order(room: Room) -> None:
    """What ends early waits for those before it."""
    way = Hand()
    run = run_of(iter(range(3)), room, way)
    run.advance()
    way.end(2, 1)
    run.advance()
    assert list(run.ready()) == []
    way.end(0)
    run.advance()
    assert [reply.text for reply in run.ready()] == ["0", "1", "2"]
    assert not run.advance()
    assert way.over


def test_a_slow_row_holds_up_a_window_and_no_more(room: Room) -> None:
    """However many rows there are, only so many are read before the slow one is given."""
    way = Hand()
    run = run_of(iter(range(10**9)), room, way)
    for _ in range(5):
        run.advance()
        way.end(*range(1, len(way.started)))
    assert len(way.started) == WINDOW
    way.end(0)
    run.advance()
    next(run.ready())
    run.advance()
    assert len(way.started) == WINDOW + 1


def test_a_list_has_no_window(room: Room) -> None:
    """All its answers are kept anyway, so a slow row holds up nothing."""
    way = Hand(room=2)
    run = run_of(list(range(5_000)), room, way)
    run.advance()
    for number in range(1, 5_000):
        way.end(number)
        run.advance()
    assert len(way.started) == 5_000
    assert run.waits == 1


def test_an_ending_that_is_told_twice_counts_once(room: Room) -> None:
    """After an interrupt, what was heard may be heard again."""
    way = Hand()
    run = run_of(["a"], room, way)
    run.advance()
    way.end(0)
    endings = way.ended(within=0.0)
    run.note(endings)
    run.note(endings)
    assert [reply.text for reply in run.replies_in_order()] == ["0"]
    assert not run.advance()


def test_equal_rows_follow_the_first(room: Room) -> None:
    """They are started when it has ended, all of them, to find its answer."""
    way = Hand()
    run = run_of(["a", "a", "b", "a"], room, way)
    run.advance()
    assert way.started == ["m1-0", "m1-2"]
    way.end(0)
    run.advance()
    assert way.started == ["m1-0", "m1-2", "m1-1", "m1-3"]


@pytest.mark.parametrize("kind", [PermanentError, ParkedError])
def test_no_row_waits_for_an_equal_one_twice(
    room: Room, monkeypatch: pytest.MonkeyPatch, kind: type[NbcodexError]
) -> None:
    """What many equal rows cost is told by how many there are, whatever the first came to."""
    begun: list[int] = []
    real = MapRun._begin

    def begin(self: MapRun, item: Item) -> bool:
        begun.append(item.index)
        return real(self, item)

    monkeypatch.setattr(MapRun, "_begin", begin)
    way = Hand(room=10)
    run, ended = run_of(["a", "b"] * 50, room, way), 0
    while run.advance():
        numbers = [int(id_.partition("-")[2]) for id_ in way.started[ended:]]
        way.end(*numbers, error=None if ended else kind("no"))
        ended = len(way.started)
    assert max(Counter(begun).values()) <= 2


def test_equal_rows_fail_together(room: Room) -> None:
    """What is refused for what it asks would be refused again: it is asked once."""
    way = Hand()
    run = run_of(["a", "a", "a"], room, way)
    run.advance()
    way.end(0, error=PermanentError("no"))
    assert not run.advance()
    assert way.started == ["m1-0"]
    assert [reply.error for reply in run.replies_in_order()] == ["no", "no", "no"]


def test_a_parked_row_is_no_failure_that_ends_a_map(room: Room) -> None:
    """It is kept for later, also where the first failure is to end all."""
    way = Hand()
    run = run_of(["a", "b"], room, way, on_error="raise")
    run.advance()
    way.end(0, error=ParkedError("later"))
    assert run.advance()


def test_the_next_of_equal_rows_is_asked_where_the_first_was_parked(room: Room) -> None:
    """That may have been for a reason of its own; the others go on waiting."""
    way = Hand()
    run = run_of(["a", "a", "a"], room, way)
    run.advance()
    way.end(0, error=ParkedError("later"))
    run.advance()
    assert way.started == ["m1-0", "m1-1"]


def test_an_iterators_failures_are_not_remembered_for_ever(room: Room) -> None:
    """A million failed rows do not fill the memory."""
    way = Hand()
    run = run_of(iter(range(3_000)), room, way)
    ended = 0
    while run.advance():
        way.end(*range(ended, len(way.started)), error=PermanentError("no"))
        ended = len(way.started)
        for _ in run.ready():
            pass
    assert ended == 3_000
    assert len(run.failures) == 1_000
    assert not run.replies
    assert not run._undone


def test_live_takes_what_does_good(room: Room) -> None:
    """A few wait for leave to be sent, so that the ledger always has a next one; not all."""
    live = LiveBackend(cast(Any, room.client), Settings())
    for under_way, sent, left in [
        (0, 0, AHEAD),
        (40, 0, AHEAD - 40),
        (AHEAD, 0, 0),
        (300, 300, AHEAD),
        (MOST - 5, MOST - 5, 5),
        (MOST, MOST, 0),
    ]:
        live._started = under_way
        live.tally._sent = {str(n) for n in range(sent)}
        assert live.room() == left
