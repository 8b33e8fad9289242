"""The monitor without a browser: state, words, wire format, and who it tells what."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nbcodex
from nbcodex import events
from nbcodex.client import Client
from nbcodex.errors import BudgetError, LimitError, OverloadedError, ParkedError
from nbcodex.journal.reads import OtherKernels
from nbcodex.models import (
    NO_USAGE,
    Limit,
    LimitReading,
    LimitSnapshot,
    Reply,
    Request,
    Usage,
    UsageTotals,
)
from nbcodex.notebook import widget_base
from nbcodex.notebook.display import panel
from nbcodex.notebook.display import widget as panel_widget
from nbcodex.notebook.monitor import widget as monitor_widget
from nbcodex.notebook.monitor.collector import Watch, _lines
from nbcodex.notebook.monitor.state import (
    LOGGED,
    Grown,
    Line,
    MonitorState,
    Observed,
    last_hour,
    last_turn,
    reduce,
)
from nbcodex.notebook.monitor.view import ROWS, picture, status
from nbcodex.ratelimit.limit_model import LimitModel
from nbcodex.ratelimit.rate_limiter import Cooldown
from nbcodex.ratelimit.sharing import limit_state
from tests.kernel_client import kernel
from tests.simulated import Simulated

WALL = time.mktime((2026, 11, 24, 14, 0, 0, 0, 0, -1))
LIMIT = Limit(resource="tokens", window=60.0, limit=30_000, used=22_999, requested=12_528)
REFUSED = LimitError("Too many tokens.", limit=LIMIT)
USED = Usage(input_tokens=812, cached_tokens=512, output_tokens=431, reasoning_tokens=64)
REPLY = Reply(
    id="3f2a", text="Hello", model="gpt-5.6-sol", usage=USED, cost=0.0052, attempts=2, waited=7.4
)
MODEL = "gpt-5.6-sol"
BUCKET = f"https://api.openai.com/v1 org {MODEL}"
PROMPT = "Write a poem about the sea, and make it rhyme in every line"


def queued(at: float = 0.0, id_: str = "3f2a") -> events.Queued:
    """Return the event that begins a request."""
    return events.Queued(request_id=id_, at=at, model="gpt-5.6-sol", patience=600.0)


def sent(at: float, id_: str = "3f2a", attempt: int = 1) -> events.Sent:
    """Return the event of an attempt that begins."""
    return events.Sent(
        request_id=id_, at=at, attempt=attempt, model="gpt-5.6-sol", input_tokens=812
    )


def refused(at: float, resume_at: float, id_: str = "3f2a", error: Any = REFUSED) -> Any:
    """Return the event of a first attempt that failed."""
    return events.BackingOff(
        request_id=id_, at=at, error=error, attempt=1, resume_at=resume_at, waited=0.0
    )


def finished(at: float, id_: str = "3f2a", reply: Reply = REPLY) -> events.Finished:
    """Return the event of an answer."""
    return events.Finished(request_id=id_, at=at, reply=replace(reply, id=id_))


def after(*heard: Any) -> MonitorState:
    """Return the state after all this."""
    return reduce(MonitorState(), heard)


# The state.


def test_open_requests_come_and_go() -> None:
    """A request is open from its first event to its ending, whatever comes after that."""
    state = after(queued(0, "a"), queued(0, "b"), sent(1, "a"), finished(2, "a"))
    assert list(state.open) == ["b"]
    assert list(reduce(state, [Grown(request_id="a", at=3, size=9)]).open) == ["b"]


def test_request_that_was_under_way_is_shown() -> None:
    """What was asked before the monitor listened is open from the first event that it hears."""
    assert after(sent(5, "a")).open["a"].phase == "sending"


def test_state_never_changes() -> None:
    """A state stays as it is, whatever is heard later."""
    state = after(queued(0, "a"), finished(1, "b"))
    before = repr(state)
    reduce(state, [queued(2, "c"), finished(2, "a"), refused(3, 9, "d")])
    assert repr(state) == before


def test_no_text_is_kept() -> None:
    """Answers grow in numbers alone: about four bytes a token."""
    grown = Grown(request_id="3f2a", at=2, size=400)
    state = after(queued(), sent(1), grown, grown, finished(3))
    row = after(queued(), sent(1), grown, grown).open["3f2a"]
    assert (row.phase, row.usage.output_tokens, len(row.text)) == ("streaming", 200, 0)
    assert state.last is not None
    assert (state.last.text, state.last.usage) == ("", USED)


def test_retries_are_logged() -> None:
    """Refusals, faults, parkings and failures are remembered: the newest, and not without end."""
    error = OverloadedError("Come\x1b[31m back\nlater.")
    parked = events.Parked(request_id="3f2a", at=4, error=ParkedError("Later."), reply=REPLY)
    state = after(queued(), refused(1, 8.4), refused(2, 3, error=error), parked)
    assert [line.what for line in state.log] == [
        "attempt 1 refused, again in 7.4 s · tokens per minute (TPM): limit 30,000, used 22,999,"
        " requested 12,528",
        "attempt 1 refused, again in 1.0 s · Server overloaded: Come [31m back later.",
        "parked: Later.",
    ]
    many = after(*(refused(at, 2 * at) for at in range(3 * LOGGED)))
    assert len(many.log) == LOGGED
    assert many.log[-1].at == 3 * LOGGED - 1


def test_what_befalls_many_in_a_row_is_one_line() -> None:
    """Fifty that a budget keeps back do not push the retries out of the log."""
    kept = [
        events.Parked(
            request_id=f"r{n}", at=4 + n, error=BudgetError(f"{n} are used."), reply=REPLY
        )
        for n in range(50)
    ]
    state = after(queued(), refused(1, 9), *kept, refused(60, 68))
    assert [(line.times, line.at) for line in state.log] == [(1, 1), (50, 53), (1, 60)]
    assert "r0  parked: it would pass your budget (50 times)\n" in status(state, 60, 60)


def test_a_refusal_that_parks_is_a_limit_met() -> None:
    """Where the wait is longer than the patience, the plot has its mark all the same."""
    error = ParkedError("Later.", cause=LimitError("Too many.", limit=LIMIT))
    parked = events.Parked(request_id="3f2a", at=4, error=error, reply=REPLY)
    assert sum(m.hits for m in after(queued(), sent(1), parked).minutes.values()) == 1
    assert sum(m.hits for m in after(queued(), refused(1, 9), parked).minutes.values()) == 1


def test_last_hour_by_minutes() -> None:
    """Tokens count in the minute in which their answer ended; after an hour they are forgotten."""
    state = after(finished(30), refused(59, 61), refused(61, 62), finished(3600 + 59))
    minutes = last_hour(state, 3600 + 59)
    assert [(m.tokens, m.hits) for m in minutes if m.tokens or m.hits] == [(0, 1), (1243, 0)]
    assert [(m.tokens, m.hits) for m in last_hour(after(finished(30), refused(59, 61)), 61)][
        -2:
    ] == [(1243, 1), (0, 0)]
    assert len(minutes) == 60


def test_reused_answers_use_nothing() -> None:
    """What came from the journal is no request of this session."""
    assert after(queued(), finished(2, reply=replace(REPLY, attempts=0))).last is None


def test_observations_that_were_not_made_change_nothing() -> None:
    """What is looked up rarely stays as it was seen last; a budget that is gone is gone."""
    seen = Observed(
        at=1, ever=UsageTotals(requests=9), elsewhere=OtherKernels(), budgets=("half of it",)
    )
    state = after(seen, Observed(at=2, session=UsageTotals(requests=1)))
    assert (state.ever, state.session) == (UsageTotals(requests=9), UsageTotals(requests=1))
    assert state.budgets == ()


def test_batch_of_many_requests_is_cheap() -> None:
    """Ten thousand open requests are not copied for each event."""
    began = time.process_time()
    after(*(queued(0, str(n)) for n in range(10_000)), *(sent(1, str(n)) for n in range(10_000)))
    assert time.process_time() - began < 2.0


# The words.


def snapshot(at: float) -> LimitSnapshot:
    """Return headers of a bucket that fills in twelve seconds."""
    return LimitSnapshot(
        at=at,
        tokens=LimitReading(limit=30_000, remaining=24_000, full_in=12.0),
        requests=LimitReading(limit=500, remaining=499, full_in=0.12),
    )


def limits(at: float, hold: Cooldown | None = None) -> Observed:
    """Return what is known of one bucket."""
    return Observed(at=at, limits={BUCKET: (snapshot(at), hold)})


NOTHING = """\
Codex monitor
no open requests
this session: 0 requests, 0 answered
last hour: 0 tokens, at most 0 a minute, limits met 0 times"""

BUSY = """\
Codex monitor
gpt-5.6-sol at api.openai.com/v1: ~29,000 of 30,000 tokens left · ~500 of 500 requests left · closed for another 5.0 s: tokens per minute (TPM) · 3 in line for up to 45,000 tokens, the last in 32.0 s or more
2 open requests · 1 waiting to retry:
  3f2a  waiting 5.0 s · tokens per minute (TPM): limit 30,000, used 22,999, requested 12,528 · ~812 in · no cost so far
  77aa  “Write a poem about the sea, and make it rhyme in every line” · queued 10.0 s
last request: gpt-5.6-sol · 812 in (512 cached) · 431 out (64 reasoning) · $0.0052 · 2 attempts, waited 7.4 s
this session: 3 requests, 1 answered · 812 in (512 cached) · 431 out (64 reasoning) · tokens of 1 unknown · $1.50, cost of 2 unknown · waited 1 min 12 s
all time: 60 answered · $12.00
last hour: 1,243 tokens, at most 1,243 a minute, a limit met once
budget: $1.50 of $5.00 for this session used (30%)
other kernels: 1 has 3 under way, 2 waiting, the next at 14:00:20
14:00:02  3f2a  attempt 1 refused, again in 13.0 s · tokens per minute (TPM): limit 30,000, used 22,999, requested 12,528"""  # noqa: E501 - as it is read


def busy() -> MonitorState:
    """Return a state in which there is something of everything."""
    totals = UsageTotals(
        requests=3, answers=1, usage=USED, cost=1.5, waited=72.0, unknown=1, unpriced=2
    )
    seen = Observed(
        at=0,
        session=totals,
        ever=UsageTotals(requests=70, answers=60, usage=Usage(), cost=12.0),
        elsewhere=OtherKernels(kernels=1, requests=3, waiting=2, resume_at=WALL + 20),
        budgets=("$1.50 of $5.00 for this session used (30%)",),
        lines={BUCKET: Line(waiting=3, asked=45_000.0)},
    )
    hold = Cooldown(until=15.0, limit=LIMIT)
    return after(
        *(queued(0, "9999"), finished(1, "9999"), queued(), sent(1), refused(2, 15)),
        *(replace(queued(0, "77aa"), prompt=PROMPT), limits(0, hold), seen),
    )


@pytest.mark.parametrize(("state", "text"), [(MonitorState(), NOTHING), (busy(), BUSY)])
def test_text_twin(state: MonitorState, text: str) -> None:
    """The text tells what the widget draws."""
    now = 0.0 if state == MonitorState() else 10.0
    assert status(state, now, WALL + now) == text


def test_simulated_requests_are_not_called_real() -> None:
    """While the demo answers, the counters of all time tell only what was really answered."""
    ever = Observed(at=2, ever=UsageTotals(requests=70, answers=60, usage=Usage()))
    state = after(queued(), finished(1, reply=replace(REPLY, simulated=True)), ever)
    assert "all time, real: 60 answered" in status(state, 3, WALL)


def test_all_time_tells_no_number_of_requests() -> None:
    """The journal's counter of requests holds the simulator's, too: it stands beside no answers."""
    ever = Observed(at=2, ever=UsageTotals(requests=4_031, answers=18, usage=Usage(), cost=12.0))
    assert "all time: 18 answered · $12.00\n" in status(after(ever), 3, WALL)


def in_line(*more: Any, kept: bool = True, hold: Cooldown | None = None) -> MonitorState:
    """Return a state in which three ask for 45,000 tokens where 24,000 are left, at second 100."""
    line = Line(waiting=3, asked=45_000.0, kept=kept)
    return after(limits(100, hold), Observed(at=100, lines={BUCKET: line}), *more)


def told(at: float, resume_at: float | None, **details: Any) -> events.CoolingDown:
    """Return the event of a request that is told when its turn comes."""
    return events.CoolingDown(
        **{"request_id": "77aa", "at": at, "limit": LIMIT, "resume_at": resume_at, "waited": 0.0}
        | details
    )


@pytest.mark.parametrize(
    ("state", "at"),
    [
        (in_line(), 142.0),
        (in_line(kept=False), None),
        (in_line(hold=Cooldown(until=150.0, limit=LIMIT)), 150.0),
        (in_line(queued(90), told(91, 160), kept=False), 160.0),
        (in_line(queued(90), told(91, 160, limit=None, queued=True), kept=False), 160.0),
        (in_line(queued(90), told(91, None, limit=None, queued=True), kept=False), None),
        (in_line(queued(90), told(91, 130)), 142.0),
        (in_line(hold=Cooldown(until=float("inf"), limit=LIMIT)), 142.0),
    ],
    ids=["limit", "refunds", "hold", "held", "queued", "unknown", "sooner", "for ever"],
)
def test_the_last_in_line_is_told_only_what_is_certain(state: MonitorState, at: float) -> None:
    """Its turn comes after every instant that is known: of the limit, the hold, and those before.

    Where the server gives back what was not used, the limit alone says nothing.
    """
    assert last_turn(state, BUCKET) == at
    assert picture(state, 110, WALL)["limits"][0]["line"]["last"] == (at and at * 1000)
    words = f", the last in {at - 110:.1f} s or more" if at else ""
    assert status(state, 110, WALL).splitlines()[1].endswith(f"for up to 45,000 tokens{words}")


def test_a_wait_that_its_user_chose_is_nobody_elses() -> None:
    """What is resumed at a moment, or waits at another model, is in no line of this one."""
    later = told(91, 9_000, limit=None)
    other = replace(queued(90, "88bb"), model="gpt-5.6-luna")
    elsewhere = told(91, 9_000, request_id="88bb")
    assert last_turn(in_line(queued(90), later, other, elsewhere), BUCKET) == 142.0


def test_one_model_at_two_servers_is_not_confused() -> None:
    """Where a request may wait in either of two lines, its moment is told of neither."""
    twin = {BUCKET: Line(waiting=3, asked=1.0), f"elsewhere {MODEL}": Line(waiting=1, asked=1.0)}
    state = after(queued(), told(1, 60), Observed(at=2, lines=twin))
    assert [last_turn(state, name) for name in twin] == [None, None]


def test_a_line_that_ends_is_said_without_a_moment() -> None:
    """Once nothing is certain any more, no time is told."""
    assert "3 in line for up to 45,000 tokens\n" in status(in_line(), 142, WALL)


@pytest.mark.parametrize(
    ("known", "told"),
    [
        ({"cost": 0.039, "unpriced": 1}, "≥ $0.039"),
        ({"cost": 0.039}, "$0.039"),
        ({"cost": 0.039, "usage": Usage(estimated=True)}, "~$0.039"),
        ({"unpriced": 2}, "unknown"),
        ({}, ""),
    ],
)
def test_cost_in_the_table(known: dict[str, Any], told: str) -> None:
    """A sum without some of its parts is at least so much; without all of them it is unknown."""
    state = after(Observed(at=0, session=UsageTotals(requests=2, **known)))
    drawn = picture(state, 1, WALL)
    assert drawn["sums"][1][1 + drawn["columns"].index("cost")] == told


def test_sums_of_estimates_are_estimates() -> None:
    """Where an answer broke off, nobody has counted: what is added up is about so much."""
    about = UsageTotals(requests=2, answers=1, usage=replace(USED, estimated=True), cost=0.5)
    state = after(Observed(at=0, session=about))
    assert picture(state, 1, WALL)["sums"][1][2:5] == ["~812", "~512", "~431"]
    assert "~812 in (512 cached) · ~431 out (64 reasoning) · ~$0.50\n" in status(state, 1, WALL)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "$0.0052"),
        ({"cost": None}, "unknown"),
        ({"cost": None, "simulated": True}, ""),
        ({"cost": None, "usage": Usage()}, ""),
        ({"cost": None, "usage": Usage(input_tokens=0, output_tokens=0)}, ""),
    ],
)
def test_cost_of_the_last_request(changes: dict[str, Any], told: str) -> None:
    """Tokens that were counted have cost something, known or not; simulated ones nothing."""
    drawn = picture(after(queued(), finished(1, reply=replace(REPLY, **changes))), 2, WALL)
    assert drawn["sums"][0][1 + drawn["columns"].index("cost")] == told


@pytest.mark.parametrize(
    "heard", [(), (refused(2, 9),), (refused(2, 9), sent(9, attempt=2)), (told(2, 9),)]
)
def test_attempts_are_counted_as_in_the_panel(heard: Any) -> None:
    """The monitor and the cell's own panel say the same number: of tries so far."""
    heard = (queued(), sent(1), *(replace(event, request_id="3f2a") for event in heard))
    state = after(*heard)
    row = state.open["3f2a"]
    shown = panel_widget._picture(row, ())["attempt"]
    assert picture(state, 3, WALL)["rows"][0]["attempt"] == shown
    assert f"attempt {shown + 1}" not in panel.status(row, 3, WALL)
    assert ("attempt 2 " in panel.status(row, 3, WALL)) == (shown == 2)


def test_row_tells_its_tokens_as_the_line_of_figures() -> None:
    """In a row as under an answer: how many in, how many out."""
    state = after(queued(), sent(1), Grown(request_id="3f2a", at=2, size=400))
    assert picture(state, 3, WALL)["rows"][0]["tokens"] == "~812 in, ~100 out"


def test_gauges_refill_to_their_limit_and_no_further() -> None:
    """The level is projected from the last headers: 500 tokens a second, up to the limit."""
    state = after(limits(100))
    for now, left in [(100, "24,000"), (104, "26,000"), (112, "30,000"), (9e5, "30,000")]:
        assert f"~{left} of 30,000 tokens left" in status(state, now, WALL)


def test_long_lists_are_cut() -> None:
    """Thousands of open requests are counted, and the oldest of them listed."""
    state = after(*(queued(0, f"{n:04}") for n in range(ROWS + 7)))
    assert "and 7 more" in status(state, 1, WALL)
    drawn = picture(state, 1, WALL)
    assert (drawn["open"], len(drawn["rows"])) == (ROWS + 7, ROWS)


@pytest.mark.parametrize("at", [float("inf"), float("nan"), 1e300, -1e300, -9223372036.0])
def test_no_moment_is_too_strange(at: float) -> None:
    """Whatever moment a server names, the picture is JSON, and the twin has words for it."""
    state = after(queued(), sent(1), refused(2, at), limits(0, Cooldown(until=at, limit=None)))
    json.dumps(picture(state, 2.0, WALL), allow_nan=False)
    assert "waiting" in status(state, 2.0, WALL)


@pytest.mark.slow
@given(st.text(), st.text())
def test_no_name_is_too_strange(model: str, server: str) -> None:
    """Whatever servers and models call themselves fits on a line."""
    state = after(Observed(at=0, limits={f"{server} x {model}": (None, None)}))
    assert len(status(state, 0, WALL).splitlines()) == 5


def test_time_alone_changes_no_picture() -> None:
    """What only ticks is not sent again: within a minute the picture stays the same."""
    state = busy()
    assert picture(state, 10.0, WALL + 10) == picture(state, 14.0, WALL + 14)


# What it hears and sends.


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """A monitor whose widget is never told anything by a thread, and what the widget sends."""
    monkeypatch.setenv("NBCODEX_HOME", str(tmp_path))
    sent: list[Any] = []
    monkeypatch.setattr(widget_base.Board, "send", lambda _, content: sent.append(content))
    monkeypatch.setattr(monitor_widget.Monitor, "_keep_up", lambda *_: None)
    client = Client()
    monitor = monitor_widget.Monitor(client)
    yield client, monitor, monitor._shown(), sent
    client.close()


def test_deltas_cost_a_number(board: Any) -> None:
    """A thousand deltas become one event when somebody looks."""
    client, _, _, _ = board
    (watch,) = [hears for hears in client.listeners if isinstance(hears, Watch)]
    for event in (queued(), sent(1)):
        watch(event)
    for _ in range(1000):
        watch(events.Delta(request_id="3f2a", at=2, text="word"))
    assert len(watch._heard) == 2
    assert "~1,000 out" in str(monitor_widget.Monitor(client))


def test_nobody_looks_and_nothing_piles_up(board: Any) -> None:
    """Without a monitor on the page a long map leaves no heap of events behind."""
    client, _, _, _ = board
    (watch,) = [hears for hears in client.listeners if isinstance(hears, Watch)]
    for number in range(5000):
        watch(queued(0, str(number)))
        watch(finished(1, str(number)))
    assert len(watch._heard) <= 4097
    assert len(client.listeners) == 2


def test_only_news_are_sent(board: Any) -> None:
    """A picture that is the same is not sent again."""
    _, monitor, widget, _ = board
    views: list[Any] = []
    widget.observe(lambda change: views.append(change["new"]), "view")
    monitor._send_news(widget)
    monitor._send_news(widget)
    assert views == []
    monitor._watch(queued())
    monitor._send_news(widget)
    assert [view["open"] for view in views] == [1]


def test_what_was_only_refused_has_no_unknown_cost() -> None:
    """Nothing was used, so nothing was paid: the sum of the others is no less certain for it."""
    refused = UsageTotals.of(Reply(id="a", status="parked", usage=NO_USAGE, attempts=1))
    assert refused.unpriced == 0
    assert refused.plus(UsageTotals.of(Reply(id="b", usage=USED, attempts=1))).unpriced == 1


def test_who_waits_in_line_is_looked_up() -> None:
    """A line knows whether the server keeps what it was asked for: only if it tells of limits."""
    bucket = LimitModel()
    blind = replace(limit_state(bucket, 0.0), waiting=2, waiting_tokens=90.0)
    lines = _lines({f"{MODEL} at x": replace(blind, declared=True), "other at x": blind})
    assert lines == {
        f"x {MODEL}": Line(waiting=2, asked=90.0),
        "x other": Line(waiting=2, asked=90.0, kept=False),
    }


@pytest.mark.parametrize(
    ("content", "answers"),
    [
        ({"type": "sync"}, [{"type": "heard", "id": 0}]),
        (
            {"type": "action", "name": "cancel", "request": "none", "id": 7},
            [{"type": "heard", "id": 7}],
        ),
        (
            {"type": "action", "name": "__class__", "request": "3f2a", "id": 7},
            [{"type": "heard", "id": 7}],
        ),
        ({"type": "action", "name": "cancel", "request": ["3f2a"], "id": 7}, []),
        (None, []),
        ("cancel", []),
    ],
)
def test_messages_of_the_browser(board: Any, content: Any, answers: Any) -> None:
    """Clicks are acknowledged, those on requests that have ended too; nonsense is not."""
    _, monitor, widget, sent = board
    monitor._hear(widget, content, [])
    assert sent == answers


def test_buttons_reach_their_request(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each button orders about the request of its row and no other, or all; none probes for all."""
    _, monitor, widget, _ = board
    orders: list[Any] = []

    class Handle:
        def __init__(self, id_: str) -> None:
            self.request = Request(prompt="Hello", id=id_)

        def cancel(self) -> None:
            orders.append((self.request.id, "cancel"))

        def park(self) -> None:
            orders.append((self.request.id, "park"))

        def retry_now(self) -> None:
            orders.append((self.request.id, "retry"))

    with monkeypatch.context() as patch:
        patch.setattr(Client, "active_handles", lambda _: [Handle("a"), Handle("b")])
        for name in ("cancel", "retry", "park"):
            monitor._hear(widget, {"type": "action", "name": name, "request": "b", "id": 1}, [])
        assert orders == [("b", "cancel"), ("b", "retry"), ("b", "park")]
        orders.clear()
        for name in ("cancel", "retry", "park"):
            monitor._hear(widget, {"type": "action", "name": name, "request": "all", "id": 1}, [])
    assert orders == [("a", "cancel"), ("b", "cancel"), ("a", "park"), ("b", "park")]


def test_two_views_are_one_widget(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown twice, it is the same widget: its views cannot disagree. Its twin is text."""
    _, monitor, widget, _ = board
    monkeypatch.setattr(monitor_widget.cell_output, "shows_widgets", lambda *_: True)
    bundles = [monitor._repr_mimebundle_()[0] for _ in range(2)]
    views = [bundle["application/vnd.jupyter.widget-view+json"] for bundle in bundles]
    assert views[0]["model_id"] == views[1]["model_id"] == widget.model_id
    assert bundles[0]["text/plain"] == NOTHING.replace(
        "limits met 0 times", "limits met 0 times\nother kernels: nothing under way"
    ).replace("this session: 0 requests, 0 answered", ZEROS)


ZEROS = """this session: 0 requests, 0 answered · 0 tokens
all time: 0 answered · 0 tokens"""


def test_monitor_is_text_where_widgets_are_not(board: Any) -> None:
    """In a terminal, nbclient and papermill it is its lines of text."""
    assert set(monitor_widget.Monitor(board[0])._repr_mimebundle_()) == {"text/plain"}


def test_one_monitor_per_process() -> None:
    """`nbcodex.monitor` returns the same one."""
    assert nbcodex.monitor() is nbcodex.monitor()


@pytest.mark.kernel
def test_monitor_in_a_kernel_without_widgets(simulator: Simulated) -> None:
    """Nbclient and papermill leave its lines in the notebook, with what was used so far."""
    with kernel(**simulator.environ) as cell:
        cell.run("%load_ext nbcodex")
        assert cell.run("%%codex\n[[echo: hello]]").status == "ok"
        for ran in (cell.run("%codex monitor"), cell.run("import nbcodex\nnbcodex.monitor()")):
            assert ran.plain.startswith("Codex monitor\n")
            assert "this session: 1 request, 1 answered" in ran.plain
            assert "no open requests" in ran.plain
