"""The monitor without a browser: state, texts, messages, and what its buttons do."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nbcodex
from nbcodex import events, host
from nbcodex.client import Client
from nbcodex.errors import BudgetError, LimitError, OverloadedError, ParkedError
from nbcodex.journal.reads import OtherKernels
from nbcodex.models import ZERO_USAGE, Limit, LimitReading, Reply, Request, Usage, UsageTotals
from nbcodex.notebook import monitor as monitor_package
from nbcodex.notebook import widget_base
from nbcodex.notebook.display import panel
from nbcodex.notebook.display import widget_views as panel_widget
from nbcodex.notebook.monitor import MonitorCollector
from nbcodex.notebook.monitor.state import (
    MAX_LOG_ENTRIES,
    MonitorState,
    apply_events,
    earliest_last_send,
    last_hour,
)
from nbcodex.notebook.monitor.view import MAX_LISTED_REQUESTS, monitor_data, monitor_text
from nbcodex.ratelimit.sharing import SharedModel, limit_state
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
LABEL = f"{MODEL} at https://api.openai.com/v1 org"
PROMPT = "Write a poem about the sea, and make it rhyme in every line"


def queued(at: float = 0.0, id_: str = "3f2a") -> events.Queued:
    """Return the event that begins a request."""
    return events.Queued(request_id=id_, at=at, model="gpt-5.6-sol", patience=600.0)


def sent(at: float, id_: str = "3f2a", attempt: int = 1) -> events.Sent:
    """Return the event of an attempt that begins."""
    return events.Sent(
        request_id=id_, at=at, attempt=attempt, model="gpt-5.6-sol", input_tokens=812
    )


def delta(at: float, text: str, id_: str = "3f2a") -> events.Delta:
    """Return the event of more text."""
    return events.Delta(request_id=id_, at=at, text=text)


def refused(at: float, resume_at: float, id_: str = "3f2a", error: Any = REFUSED) -> Any:
    """Return the event of a first attempt that failed."""
    return events.BackingOff(
        request_id=id_, at=at, error=error, attempt=1, resume_at=resume_at, waited=0.0
    )


def finished(at: float, id_: str = "3f2a", reply: Reply = REPLY) -> events.Finished:
    """Return the event of an answer."""
    return events.Finished(request_id=id_, at=at, reply=replace(reply, id=id_))


def state_after(*inputs: Any) -> MonitorState:
    """Return the state after these events, and with these fields that were looked up."""
    state = MonitorState()
    for each in inputs:
        state = replace(state, **each) if isinstance(each, dict) else apply_events(state, [each])
    return state


# The state.


def test_request_is_open_until_it_ends() -> None:
    """A late event does not open it again."""
    state = state_after(queued(0, "a"), queued(0, "b"), sent(1, "a"), finished(2, "a"))
    assert list(state.open_requests) == ["b"]
    assert list(apply_events(state, [delta(3, "x", "a")]).open_requests) == ["b"]


def test_request_started_before_the_monitor_is_shown() -> None:
    """It is open from the first event that the monitor receives."""
    assert state_after(sent(5, "a")).open_requests["a"].phase == "sending"


def test_state_is_immutable() -> None:
    """Later events do not change an earlier state."""
    state = state_after(queued(0, "a"), finished(1, "b"))
    before = repr(state)
    apply_events(state, [queued(2, "c"), finished(2, "a"), refused(3, 9, "d")])
    assert repr(state) == before


def test_state_keeps_no_text() -> None:
    """Answers grow in numbers only: about four bytes a token."""
    grown = delta(2, "x" * 400)
    state = state_after(queued(), sent(1), grown, grown, finished(3))
    row = state_after(queued(), sent(1), grown, grown).open_requests["3f2a"]
    assert (row.phase, row.usage.output_tokens, row.text.chunk_count) == ("streaming", 200, 0)
    assert state.last_reply is not None
    assert (state.last_reply.text, state.last_reply.usage) == ("", USED)


def test_retries_and_failures_are_logged() -> None:
    """The newest entries are kept, up to a maximum."""
    error = OverloadedError("Come\x1b[31m back\nlater.")
    parked = events.Parked(request_id="3f2a", at=4, error=ParkedError("Later."), reply=REPLY)
    state = state_after(queued(), refused(1, 8.4), refused(2, 3, error=error), parked)
    assert [line.message for line in state.log] == [
        "attempt 1 refused, again in 7.4 s · tokens per minute (TPM): limit 30,000, used 22,999,"
        " requested 12,528",
        "attempt 1 failed, again in 1.0 s · Server overloaded: Come [31m back later.",
        "parked: Later.",
    ]
    many = state_after(*(refused(at, 2 * at) for at in range(3 * MAX_LOG_ENTRIES)))
    assert len(many.log) == MAX_LOG_ENTRIES
    assert many.log[-1].at == 3 * MAX_LOG_ENTRIES - 1


def test_equal_log_entries_are_one_line() -> None:
    """Fifty requests that a budget refuses do not push the retries out of the log."""
    kept = [
        events.Parked(
            request_id=f"r{n}", at=4 + n, error=BudgetError(f"{n} are used."), reply=REPLY
        )
        for n in range(50)
    ]
    state = state_after(queued(), refused(1, 9), *kept, refused(60, 68))
    assert [(line.times, line.at) for line in state.log] == [(1, 1), (50, 53), (1, 60)]
    assert "r0  parked: it would exceed your budget (50 times)\n" in monitor_text(state, 60, 60)


def test_refusal_that_parks_counts_as_limit_hit() -> None:
    error = ParkedError("Later.", cause=LimitError("Too many.", limit=LIMIT))
    parked = events.Parked(request_id="3f2a", at=4, error=error, reply=REPLY)
    assert sum(m.limit_hits for m in state_after(queued(), sent(1), parked).minutes.values()) == 1
    assert (
        sum(m.limit_hits for m in state_after(queued(), refused(1, 9), parked).minutes.values())
        == 1
    )


def test_plot_has_the_minutes_of_the_last_hour() -> None:
    """Tokens count in the minute in which their answer ended."""
    state = state_after(finished(30), refused(59, 61), refused(61, 62), finished(3600 + 59))
    minutes = last_hour(state, 3600 + 59)
    assert [(m.tokens, m.limit_hits) for m in minutes if m.tokens or m.limit_hits] == [
        (0, 1),
        (1243, 0),
    ]
    assert [
        (m.tokens, m.limit_hits) for m in last_hour(state_after(finished(30), refused(59, 61)), 61)
    ][-2:] == [(1243, 1), (0, 0)]
    assert len(minutes) == 60


def test_reused_answer_is_not_the_last_request() -> None:
    assert state_after(queued(), finished(2, reply=replace(REPLY, attempts=0))).last_reply is None


def test_many_open_requests_are_not_copied_for_each_event() -> None:
    began = time.process_time()
    opened = [queued(0, str(n)) for n in range(10_000)]
    apply_events(MonitorState(), [*opened, *(sent(1, str(n)) for n in range(10_000))])
    assert time.process_time() - began < 2.0


# The texts.


def limits(at: float = 0.0, *labels: str, **details: Any) -> dict[str, Any]:
    """Return the limits of a model, which are full after twelve seconds."""
    unknown = limit_state(SharedModel(), "", at)
    tokens = LimitReading(limit=30_000, remaining=24_000, full_in=12.0)
    requests = LimitReading(limit=500, remaining=499, full_in=0.12)
    known = {"tokens": tokens, "requests": requests, "has_limit_headers": True, "policy": "kept"}
    state = replace(unknown, **known | details)
    return {"limits": dict.fromkeys(labels or [LABEL], state), "limits_at": at}


NOTHING = """\
Codex monitor
no open requests
this session: 0 requests, 0 answered
last hour: 0 tokens, at most 0 a minute, limits reached 0 times"""

BUSY = """\
Codex monitor
gpt-5.6-sol at api.openai.com/v1: ~29,000 of 30,000 tokens left · ~500 of 500 requests left · closed for another 5.0 s: tokens per minute (TPM) · 3 queued for up to 45,000 tokens, the last for at least 32.0 s
2 open requests · 1 waiting to retry:
  3f2a  waiting 5.0 s · tokens per minute (TPM): limit 30,000, used 22,999, requested 12,528 · ~812 in · no cost so far
  77aa  “Write a poem about the sea, and make it rhyme in every line” · queued 10.0 s
last request: gpt-5.6-sol · 812 in (512 cached) · 431 out (64 reasoning) · $0.0052 · 2 attempts, waited 7.4 s
this session: 3 requests, 1 answered · 812 in (512 cached) · 431 out (64 reasoning) · tokens of 1 unknown · at least $1.50 · waited 1 min 12 s (sum over requests)
all time: 60 answered · $12.00
last hour: 1,243 tokens, at most 1,243 a minute, a limit reached once
budget: $1.50 of $5.00 for this session used (30%)
other kernels: 1 has 3 open, 2 waiting, the next at 14:00:20
14:00:02  3f2a  attempt 1 refused, again in 13.0 s · tokens per minute (TPM): limit 30,000, used 22,999, requested 12,528"""  # noqa: E501 - as it is read


def busy() -> MonitorState:
    """Return a state in which there is something of everything."""
    totals = UsageTotals(
        requests=3, answers=1, usage=USED, cost=1.5, waited=72.0, unknown=1, unpriced=2
    )
    seen = {
        "session": totals,
        "all_time": UsageTotals(requests=70, answers=60, usage=Usage(), cost=12.0),
        "other_kernels": OtherKernels(kernels=1, requests=3, waiting=2, resume_at=WALL + 20),
        "budgets": ("$1.50 of $5.00 for this session used (30%)",),
        **limits(cooldown_until=15.0, cooldown_limit=LIMIT, waiting=3, waiting_tokens=45_000.0),
    }
    return state_after(
        *(queued(0, "9999"), finished(1, "9999"), queued(), sent(1), refused(2, 15)),
        *(replace(queued(0, "77aa"), prompt=PROMPT), seen),
    )


@pytest.mark.parametrize(("state", "text"), [(MonitorState(), NOTHING), (busy(), BUSY)])
def test_monitor_text(state: MonitorState, text: str) -> None:
    """The text has what the widget draws."""
    now = 0.0 if state == MonitorState() else 10.0
    assert monitor_text(state, now, WALL + now) == text


def test_all_time_is_labelled_real_while_simulated() -> None:
    """While the simulator answers, the counters of all time show only real answers."""
    ever = {"all_time": UsageTotals(requests=70, answers=60, usage=Usage())}
    state = state_after(queued(), finished(1, reply=replace(REPLY, simulated=True)), ever)
    assert "all time, real: 60 answered" in monitor_text(state, 3, WALL)


def test_all_time_shows_no_number_of_requests() -> None:
    """The journal's counter of requests includes simulated ones."""
    ever = {"all_time": UsageTotals(requests=4_031, answers=18, usage=Usage(), cost=12.0)}
    assert "all time: 18 answered · $12.00\n" in monitor_text(state_after(ever), 3, WALL)


def in_queue(*events: Any, **details: Any) -> MonitorState:
    """Return a state with a queue for 45,000 tokens, of which 24,000 are left, at second 100."""
    return state_after(limits(100, waiting=3, waiting_tokens=45_000.0, **details), *events)


def cooldown(at: float, resume_at: float | None, **details: Any) -> events.CoolingDown:
    """Return the event of a closed model."""
    return events.CoolingDown(
        **{"request_id": "77aa", "at": at, "limit": LIMIT, "resume_at": resume_at, "waited": 0.0}
        | details
    )


UNCERTAIN = {"policy": "refunded"}


@pytest.mark.parametrize(
    ("state", "at"),
    [
        (in_queue(), 142.0),
        (in_queue(**UNCERTAIN), None),
        (in_queue(has_limit_headers=False), None),
        (in_queue(cooldown_until=150.0), 150.0),
        (in_queue(queued(90), cooldown(91, 160), **UNCERTAIN), 160.0),
        (in_queue(queued(90), cooldown(91, 160, limit=None, queued=True), **UNCERTAIN), 160.0),
        (in_queue(queued(90), cooldown(91, None, limit=None, queued=True), **UNCERTAIN), None),
        (in_queue(queued(90), cooldown(91, 130)), 142.0),
        (in_queue(cooldown_until=float("inf")), 142.0),
    ],
    ids=[
        "limit",
        "refunds",
        "undeclared",
        "closed",
        "cooldown",
        "queued",
        "unknown",
        "sooner",
        "for ever",
    ],
)
def test_last_send_is_bounded_by_what_is_certain(state: MonitorState, at: float) -> None:
    """The bound is the latest certain instant; a server that refunds makes the limit uncertain."""
    assert earliest_last_send(state, LABEL) == at
    drawn = monitor_data(state, 110, WALL)["limits"][0]["queue"]
    assert drawn["last"] == (at and at * 1000)
    text = f", the last for at least {at - 110:.1f} s" if at else ""
    line = monitor_text(state, 110, WALL).splitlines()[1]
    assert line.endswith(f"for up to 45,000 tokens{text}")


def test_requests_outside_of_the_queue_do_not_bound_it() -> None:
    """A moment that the user chose, or a wait for another model, says nothing about this queue."""
    later = cooldown(91, 9_000, limit=None)
    other = replace(queued(90, "88bb"), model="gpt-5.6-luna")
    other_wait = cooldown(91, 9_000, request_id="88bb")
    state = in_queue(queued(90), later, other, other_wait)
    assert earliest_last_send(state, LABEL) == 142.0


def test_request_between_two_queues_bounds_neither() -> None:
    """A request knows its model but not its server."""
    two = limits(2, LABEL, f"{MODEL} at elsewhere", waiting=3, tokens=None)
    state = state_after(queued(), cooldown(1, 60), two)
    assert [earliest_last_send(state, label) for label in state.limits] == [None, None]


def test_queue_without_a_bound_shows_no_time() -> None:
    assert "3 queued for up to 45,000 tokens\n" in monitor_text(in_queue(), 142, WALL)


@pytest.mark.parametrize(
    ("known", "text"),
    [
        ({"cost": 0.039, "unpriced": 1}, "≥ $0.039"),
        ({"cost": 0.039}, "$0.039"),
        ({"cost": 0.039, "usage": Usage(estimated=True)}, "~$0.039"),
        ({"unpriced": 2}, "unknown"),
        ({}, ""),
    ],
)
def test_incomplete_cost_is_a_lower_bound(known: dict[str, Any], text: str) -> None:
    """Without any known part it is unknown."""
    state = state_after({"session": UsageTotals(requests=2, **known)})
    drawn = monitor_data(state, 1, WALL)
    assert drawn["totals"][1][1 + drawn["columns"].index("cost")] == text


def test_totals_with_estimates_are_marked() -> None:
    about = UsageTotals(requests=2, answers=1, usage=replace(USED, estimated=True), cost=0.5)
    state = state_after({"session": about})
    assert monitor_data(state, 1, WALL)["totals"][1][2:5] == ["~812", "~512", "~431"]
    assert "~812 in (512 cached) · ~431 out (64 reasoning) · ~$0.50\n" in monitor_text(
        state, 1, WALL
    )


def test_exact_count_of_the_last_request_is_no_lower_bound() -> None:
    """The server counted the input only: the output is empty, and the input is exact."""
    reply = replace(REPLY, usage=Usage(input_tokens=812))
    drawn = monitor_data(state_after(queued(), finished(1, reply=reply)), 2, WALL)
    columns = [1 + drawn["columns"].index(name) for name in ("input", "output")]
    assert [drawn["totals"][0][column] for column in columns] == ["812", ""]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "$0.0052"),
        ({"cost": None}, "unknown"),
        ({"cost": None, "simulated": True}, ""),
        ({"cost": None, "usage": Usage()}, ""),
        ({"cost": None, "usage": Usage(input_tokens=0, output_tokens=0)}, ""),
    ],
)
def test_cost_of_the_last_request(changes: dict[str, Any], text: str) -> None:
    """Counted tokens have a cost, known or not; simulated ones have none."""
    drawn = monitor_data(
        state_after(queued(), finished(1, reply=replace(REPLY, **changes))), 2, WALL
    )
    assert drawn["totals"][0][1 + drawn["columns"].index("cost")] == text


@pytest.mark.parametrize(
    "changes", [(), (refused(2, 9),), (refused(2, 9), sent(9, attempt=2)), (cooldown(2, 9),)]
)
def test_attempts_are_counted_as_in_the_panel(changes: Any) -> None:
    """The monitor and the panel of the cell show the same number of attempts."""
    own = [replace(event, request_id="3f2a") for event in changes]
    state = state_after(queued(), sent(1), *own)
    row = state.open_requests["3f2a"]
    shown = panel_widget.panel_data(row)["attempt"]
    assert monitor_data(state, 3, WALL)["requests"][0]["attempt"] == shown
    assert f"attempt {shown + 1}" not in panel.status_line(row, 3, WALL)
    assert ("attempt 2 " in panel.status_line(row, 3, WALL)) == (shown == 2)


def test_row_shows_tokens_like_the_line_of_figures() -> None:
    state = state_after(queued(), sent(1), delta(2, "x" * 400))
    assert monitor_data(state, 3, WALL)["requests"][0]["tokens"] == "~812 in, ~100 out"


def test_level_refills_up_to_the_limit() -> None:
    """The level is projected from the last reading: 500 tokens a second."""
    state = state_after(limits(100))
    for now, left in [(100, "24,000"), (104, "26,000"), (112, "30,000"), (9e5, "30,000")]:
        assert f"~{left} of 30,000 tokens left" in monitor_text(state, now, WALL)


def test_long_list_of_requests_is_cut() -> None:
    """All open requests are counted, and the oldest are listed."""
    state = state_after(*(queued(0, f"{n:04}") for n in range(MAX_LISTED_REQUESTS + 7)))
    assert "and 7 more" in monitor_text(state, 1, WALL)
    drawn = monitor_data(state, 1, WALL)
    assert (drawn["open"], len(drawn["requests"])) == (MAX_LISTED_REQUESTS + 7, MAX_LISTED_REQUESTS)


@pytest.mark.parametrize("at", [float("inf"), float("nan"), 1e300, -1e300, -9223372036.0])
def test_view_accepts_any_resume_time(at: float) -> None:
    """Whatever time a server sends, the data are JSON, and the text has words for it."""
    state = state_after(queued(), sent(1), refused(2, at), limits(cooldown_until=at))
    json.dumps(monitor_data(state, 2.0, WALL), allow_nan=False)
    assert "waiting" in monitor_text(state, 2.0, WALL)


@pytest.mark.slow
@given(st.text(), st.text())
def test_any_name_fits_on_a_line(model: str, server: str) -> None:
    state = state_after(limits(0, f"{model} at {server}", tokens=None, requests=None))
    assert len(monitor_text(state, 0, WALL).splitlines()) == 5


def test_data_do_not_change_with_time_alone() -> None:
    """What only ticks is not sent again."""
    state = busy()
    assert monitor_data(state, 10.0, WALL + 10) == monitor_data(state, 14.0, WALL + 14)


# What it listens to and sends.


@pytest.fixture
def live_monitor(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """A monitor whose thread sends nothing, and what its widget sends."""
    monkeypatch.setenv("NBCODEX_HOME", str(tmp_path))
    sent: list[Any] = []
    monkeypatch.setattr(widget_base.CodexWidget, "send", lambda _, content: sent.append(content))
    monkeypatch.setattr(monitor_package.Monitor, "_refresh", lambda *_: None)
    client = Client()
    monitor = monitor_package.Monitor(client)
    yield client, monitor, monitor._live_widget(), sent
    client.close()


def test_deltas_are_added_up(live_monitor: Any) -> None:
    """A thousand deltas become one event when the state is asked for."""
    client, _, _, _ = live_monitor
    (collector,) = [each for each in client.listeners if isinstance(each, MonitorCollector)]
    for event in (queued(), sent(1)):
        collector(event)
    for _ in range(1000):
        collector(events.Delta(request_id="3f2a", at=2, text="word"))
    assert len(collector._pending) == 2
    assert "~1,000 out" in str(monitor_package.Monitor(client))


def test_state_keeps_what_is_not_looked_up_again(
    live_monitor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is not read each time; a budget that is gone is not shown."""
    client, monitor, _, _ = live_monitor
    usages = [["half of it"], []]

    async def budget_usage(*_: Any) -> list[str]:
        return usages.pop(0)

    monkeypatch.setattr(client, "budget_usage", budget_usage)
    before, after = (monitor._collector.state(host.current.settings()) for _ in range(2))
    assert (before.budgets, after.budgets) == (("half of it",), ())
    assert before.all_time == after.all_time is not None


def test_pending_events_are_bounded(live_monitor: Any) -> None:
    """Without a monitor on the page, a long map or a long answer does not fill the memory."""
    client, _, _, _ = live_monitor
    (collector,) = [each for each in client.listeners if isinstance(each, MonitorCollector)]
    for number in range(5000):
        collector(queued(0, str(number)))
        collector(finished(1, str(number)))
    assert len(collector._pending) <= 4097
    collector(queued(0, "long"))
    for _ in range(20):
        for _ in range(500):
            collector(delta(1, "word", "long"))
        collector(cooldown(1, 2, request_id="long"))
        collector(sent(1, "long"))
    texts = [each.text for each in collector._pending if isinstance(each, events.Delta)]
    texts += [each.text for parts in collector._deltas.values() for each in parts]
    assert len("".join(texts)) <= 4097 * len("word")
    assert (
        collector.state(host.current.settings()).open_requests["long"].text.utf8_bytes == 10_000 * 4
    )
    assert len(client.listeners) == 2


def test_equal_data_are_not_sent_again(live_monitor: Any) -> None:
    _, monitor, widget, _ = live_monitor
    received: list[Any] = []
    widget.observe(lambda change: received.append(change["new"]), "data")
    monitor._send_changes(widget)
    monitor._send_changes(widget)
    assert received == []
    monitor._collector(queued())
    monitor._send_changes(widget)
    assert [data["open"] for data in received] == [1]


def test_refused_request_has_no_unknown_cost() -> None:
    """A request without tokens cost nothing: the total of the others stays certain."""
    refused = UsageTotals.of(Reply(id="a", status="parked", usage=ZERO_USAGE, attempts=1))
    assert refused.unpriced == 0
    assert (refused + UsageTotals.of(Reply(id="b", usage=USED, attempts=1))).unpriced == 1


@pytest.mark.parametrize(
    ("content", "answers"),
    [
        ({"type": "sync"}, [{"type": "received", "id": 0}]),
        (
            {"type": "action", "name": "cancel", "request": "none", "id": 7},
            [{"type": "received", "id": 7}],
        ),
        (
            {"type": "action", "name": "__class__", "request": "3f2a", "id": 7},
            [{"type": "received", "id": 7}],
        ),
        (
            {"type": "action", "name": "cancel", "request": ["3f2a"], "id": 7},
            [{"type": "received", "id": 7}],
        ),
        (None, []),
        ("cancel", []),
    ],
)
def test_clicks_are_acknowledged(live_monitor: Any, content: Any, answers: Any) -> None:
    """Clicks on ended requests too; messages of any other form are ignored."""
    _, _, widget, sent = live_monitor
    widget._receive(widget, content, [])
    assert sent == answers


def test_button_acts_on_its_request_or_all(
    live_monitor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No button sends probes for all requests."""
    _, _, widget, _ = live_monitor
    orders: list[Any] = []

    def click(action: str, id_: str) -> None:
        content = {"type": "action", "name": action, "request": id_, "id": 1}
        widget._receive(widget, content, [])

    class Handle:
        def __init__(self, id_: str) -> None:
            self.request = Request(prompt="Hello", id=id_)

        def end(self, action: str) -> None:
            orders.append((self.request.id, action))

        def retry_now(self) -> None:
            orders.append((self.request.id, "retry"))

    with monkeypatch.context() as patch:
        patch.setattr(Client, "active_handles", lambda _: [Handle("a"), Handle("b")])
        for name in ("cancel", "retry", "park"):
            click(name, "b")
        assert orders == [("b", "cancel"), ("b", "retry"), ("b", "park")]
        orders.clear()
        for name in ("cancel", "retry", "park"):
            click(name, "all")
    assert orders == [("a", "cancel"), ("b", "cancel"), ("a", "park"), ("b", "park")]


def test_all_views_are_one_widget(live_monitor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown twice, it is the same widget, with the same plain text."""
    _, monitor, widget, _ = live_monitor
    monkeypatch.setattr(monitor_package.display, "can_show_widgets", lambda *_: True)
    bundles = [monitor._repr_mimebundle_()[0] for _ in range(2)]
    views = [bundle["application/vnd.jupyter.widget-view+json"] for bundle in bundles]
    assert views[0]["model_id"] == views[1]["model_id"] == widget.model_id
    assert bundles[0]["text/plain"] == NOTHING.replace(
        "limits reached 0 times", "limits reached 0 times\nother kernels: no open requests"
    ).replace("this session: 0 requests, 0 answered", ZEROS)


ZEROS = """this session: 0 requests, 0 answered · 0 tokens
all time: 0 answered · 0 tokens"""


def test_monitor_is_text_without_widgets(live_monitor: Any) -> None:
    assert set(monitor_package.Monitor(live_monitor[0])._repr_mimebundle_()) == {"text/plain"}


def test_one_monitor_per_process() -> None:
    assert nbcodex.monitor() is nbcodex.monitor()


@pytest.mark.kernel
def test_monitor_in_a_kernel_without_widgets(simulator: Simulated) -> None:
    """Nbclient and papermill store its text, with the totals so far."""
    with kernel(**simulator.environ) as cell:
        cell.run("%load_ext nbcodex")
        assert cell.run("%%codex\n[[echo: hello]]").status == "ok"
        for ran in (cell.run("%codex monitor"), cell.run("import nbcodex\nnbcodex.monitor()")):
            assert ran.plain.startswith("Codex monitor\n")
            assert "this session: 1 request, 1 answered" in ran.plain
            assert "no open requests" in ran.plain
