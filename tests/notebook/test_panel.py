"""The panel without a browser: state, texts, messages, and a click in a real kernel."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import start_new_kernel

from nbcodex import events
from nbcodex.errors import LimitError, OverloadedError, ParkedError, RequestError
from nbcodex.models import Limit, Rates, Reply, Usage
from nbcodex.notebook.display import text_views, widget_views
from nbcodex.notebook.display.panel import PanelState, apply_event, disabled_reason, status_line
from nbcodex.notebook.display.text_views import EMPTY_BUNDLE, MAX_LIVE_CHARS
from nbcodex.notebook.widget_base import CodexWidget
from nbcodex.rendering.figures import figures_line

WALL = time.mktime((2026, 11, 24, 14, 0, 0, 0, 0, -1))
LIMIT = Limit(resource="tokens", window=60.0, limit=30_000, used=22_999, requested=12_528)
REFUSED = LimitError("Too many tokens.", limit=LIMIT)
REPLY = Reply(
    id="3f2a",
    text="Hello",
    model="gpt-5.6-sol",
    usage=Usage(input_tokens=812, cached_tokens=512, output_tokens=431),
    cost=0.0052,
    attempts=2,
    waited=7.4,
    seconds=11.3,
)


def queued(at: float = 0.0) -> events.Queued:
    """Return the event that begins a request."""
    return events.Queued(request_id="3f2a", at=at, model="gpt-5.6-sol", patience=600.0)


def simulated_error() -> OverloadedError:
    """Return the error of a simulated refusal."""
    error = OverloadedError("Later.")
    error.simulated = True
    return error


def sent(
    at: float, attempt: int = 1, rates: Rates | None = None, *, simulated: bool = False
) -> events.Sent:
    """Return the start of an attempt."""
    return events.Sent(
        request_id="3f2a",
        at=at,
        attempt=attempt,
        model="gpt-5.6-sol",
        input_tokens=812,
        rates=rates,
        simulated=simulated,
    )


def delta(at: float, text: str, *, reasoning: bool = False) -> events.Delta:
    """Return the event of more text."""
    return events.Delta(request_id="3f2a", at=at, text=text, reasoning=reasoning)


def refused(at: float, resume_at: float, error: Any = REFUSED) -> events.BackingOff:
    """Return the event of a first attempt that failed."""
    return events.BackingOff(
        request_id="3f2a", at=at, error=error, attempt=1, resume_at=resume_at, waited=0.0
    )


def cooldown(at: float, resume_at: float, waited: float = 0.0) -> events.CoolingDown:
    """Return the event of a closed model."""
    return events.CoolingDown(
        request_id="3f2a", at=at, limit=LIMIT, resume_at=resume_at, waited=waited
    )


def restarted(at: float) -> events.Restarted:
    """Return the event of an answer that starts again."""
    return events.Restarted(request_id="3f2a", at=at)


def state_after(*stream: events.Event) -> PanelState:
    """Return the state after these events."""
    state = PanelState()
    for event in stream:
        state = apply_event(state, event)
    return state


def ended(kind: Any, at: float = 9.0, **details: Any) -> events.Event:
    """Return an event of the kind that ends a request."""
    event: events.Event = kind(request_id="3f2a", at=at, **details)
    return event


# The state.


@pytest.mark.parametrize(
    ("stream", "phase"),
    [
        ([queued()], "queued"),
        ([queued(), cooldown(1, 8)], "cooldown"),
        ([queued(), sent(1)], "sending"),
        ([queued(), sent(1), delta(2, "Hm", reasoning=True)], "thinking"),
        ([queued(), sent(1), delta(2, "Hi")], "streaming"),
        ([queued(), sent(1), refused(2, 9)], "waiting"),
        ([queued(), sent(1), refused(2, 9), sent(9, 2)], "sending"),
        ([queued(), ended(events.Finished, reply=REPLY)], "done"),
        (
            [
                queued(),
                ended(
                    events.Parked,
                    error=ParkedError("Later."),
                    reply=replace(REPLY, status="parked"),
                ),
            ],
            "parked",
        ),
        (
            [queued(), ended(events.Interrupted, reply=replace(REPLY, status="interrupted"))],
            "interrupted",
        ),
        (
            [queued(), ended(events.Cancelled, reply=replace(REPLY, status="cancelled"))],
            "cancelled",
        ),
        (
            [
                queued(),
                ended(
                    events.Failed, error=RequestError("No."), reply=replace(REPLY, status="failed")
                ),
            ],
            "failed",
        ),
    ],
)
def test_event_leads_to_its_phase(stream: list[events.Event], phase: str) -> None:
    assert state_after(*stream).phase == phase


def test_sending_ends_the_wait() -> None:
    """Of the limit, only the time waited is left."""
    state = state_after(queued(), sent(1), refused(2, 9), sent(9.5, 2))
    assert (state.limit, state.resume_at, state.waited, state.attempt) == (None, None, 7.5, 2)


def test_prolonged_cooldown_is_one_wait() -> None:
    """A prolonged cooldown keeps its start, and no second is counted twice."""
    state = state_after(queued(), cooldown(1, 8), cooldown(5, 20, waited=4.0))
    assert (state.phase_started_at, state.resume_at, state.total_waited(6)) == (1, 20, 5)
    assert apply_event(state, sent(20)).waited == 19


def test_text_of_failed_attempt_is_stale_until_replaced() -> None:
    broken = state_after(queued(), sent(1), delta(2, "Hel"), refused(3, 4), sent(4, 2))
    assert (str(broken.text), broken.stale) == ("Hel", True)
    anew = apply_event(apply_event(broken, restarted(5)), delta(5, "Hello"))
    assert (str(anew.text), anew.stale, anew.usage.output_tokens) == ("Hello", False, 2)


def test_reasoning_of_second_attempt_leaves_stale_text() -> None:
    """Reasoning before the restart neither counts the stale text nor becomes an answer."""
    state = state_after(
        queued(),
        sent(1),
        delta(2, "x" * 400),
        refused(3, 4),
        sent(4, 2),
        delta(5, "Hm, ", reasoning=True),
    )
    assert (state.phase, state.usage.output_tokens) == ("thinking", 1)


def test_speed_starts_with_the_first_delta() -> None:
    """The time before the first delta does not count; the first second has no speed."""
    begun = state_after(queued(), sent(1), delta(10, "x" * 40))
    assert begun.tokens_per_second is None
    assert apply_event(begun, delta(12, "x" * 40)).tokens_per_second == 10


@given(st.lists(st.text()))
def test_state_keeps_its_text(pieces: list[str]) -> None:
    """A state keeps its text, even if two others grow from it."""
    states = [PanelState()]
    for number, piece in enumerate(pieces):
        states.append(apply_event(states[-1], delta(number, piece)))
    branch = [apply_event(state, delta(99, "!")) for state in states]
    for number, state in enumerate(states):
        assert str(state.text) == "".join(pieces[:number])
        assert str(branch[number].text) == "".join(pieces[:number]) + "!"


def test_delta_copies_no_earlier_text() -> None:
    """Ten thousand deltas share one list of chunks."""
    state = state_after(queued(), sent(1), delta(2, "first "))
    later = state
    for number in range(10_000):
        later = apply_event(later, delta(2 + number / 100, "word "))
    assert later.text.extends(state.text)
    assert later.text.text_after(state.text.chunk_count) == "word " * 10_000


@pytest.mark.parametrize(
    ("stream", "action", "possible"),
    [
        ([queued()], "cancel", True),
        ([queued(), sent(1)], "retry", False),
        ([queued(), cooldown(1, 9)], "retry", True),
        ([queued(), sent(1), refused(2, 9)], "retry", True),
        ([queued(), sent(1), refused(2, 9)], "park", True),
    ],
)
def test_button_is_disabled_if_it_would_do_nothing(
    stream: list[events.Event], action: Any, possible: bool
) -> None:
    assert (disabled_reason(state_after(*stream), action) == "") is possible


# The cost.

RATES = Rates(input=1e-6, output=1e-5)


def test_cost_grows_with_the_answer() -> None:
    """Estimated tokens are priced while the answer streams."""
    state = state_after(queued(), sent(1, rates=RATES), delta(2, "x" * 400))
    assert state.cost_text == "~$0.0018 so far"
    assert status_line(state, 2.0, WALL).endswith("~100 out · ~$0.0018 so far")


def test_cost_includes_broken_attempts() -> None:
    """The cost of a failed attempt stays, and that of the next one is added."""
    broken = state_after(queued(), sent(1, rates=RATES), delta(2, "x" * 400), refused(3, 5))
    assert broken.cost_text == "~$0.0018 so far"
    again = broken
    for event in (sent(5, 2, RATES), restarted(6), delta(6, "x" * 400)):
        again = apply_event(again, event)
    assert again.cost_text == "~$0.0036 so far"


def test_request_refused_by_a_limit_has_no_cost() -> None:
    """After any other failure, the cost is not known."""
    assert state_after(queued(), sent(1), refused(2, 5)).cost_text == "no cost so far"
    assert state_after(queued(), sent(1), refused(2, 5, OverloadedError("later"))).cost_text == ""
    thought = delta(2, "Hm", reasoning=True)
    assert state_after(queued(), sent(1), thought, refused(3, 5)).cost_text == ""
    assert (
        state_after(
            queued(), sent(1), refused(2, 5, OverloadedError("x")), cooldown(5, 9)
        ).cost_text
        == ""
    )
    assert state_after(queued(), sent(1), delta(2, "x" * 400)).cost_text == ""


def test_unknown_price_is_shown_once_there_is_output() -> None:
    begun = replace(sent(1), unpriced=True)
    assert state_after(queued(), begun).cost_text == ""
    assert state_after(queued(), begun, delta(2, "x" * 400)).cost_text == "cost unknown"
    assert (
        state_after(queued(), replace(begun, simulated=True), delta(2, "x" * 400)).cost_text == ""
    )


# The texts.


@pytest.mark.parametrize(
    ("stream", "now", "line"),
    [
        ([queued()], 2.0, "queued 2.0 s"),
        ([queued(), sent(1)], 3.0, "sent, no answer yet after 2.0 s · ~812 in"),
        (
            [queued(), sent(1), refused(2, 9.4)],
            2.0,
            "waiting 7.4 s · tokens per minute (TPM): limit 30,000, used 22,999, requested 12,528"
            " · ~812 in · no cost so far",
        ),
        (
            [queued(), sent(1), refused(2, 74)],
            2.0,
            "waiting 1 min 12 s (until 14:01:12) · tokens per minute (TPM): limit 30,000,"
            " used 22,999, requested 12,528 · ~812 in · no cost so far",
        ),
        (
            [queued(), cooldown(1, 3)],
            8.0,
            "cooldown, due now · tokens per minute (TPM): limit 30,000, used 22,999,"
            " requested 12,528 (reached earlier) · no cost so far",
        ),
        (
            [queued(), sent(1), refused(2, 9, OverloadedError("Come\x1b[31m back\nlater."))],
            2.0,
            "waiting 7.0 s · Server overloaded: Come [31m back later. · ~812 in",
        ),
        (
            [queued(), sent(1), delta(2, "x" * 40), delta(4, "x" * 40)],
            4.0,
            "answering · ~812 in · ~20 out · ~10 tokens/s",
        ),
        (
            [queued(), sent(1, simulated=True), delta(2, "x" * 40)],
            2.0,
            "answering · ~812 in · ~10 out · simulated",
        ),
        (
            [queued(), sent(1), refused(2, 9, simulated_error())],
            2.0,
            "waiting 7.0 s · Server overloaded: Later. · ~812 in · simulated",
        ),
    ],
)
def test_status_line(stream: list[events.Event], now: float, line: str) -> None:
    assert status_line(state_after(*stream), now, WALL) == line


@pytest.mark.parametrize("resume_at", [float("inf"), float("nan"), 1e300, -1e300, -9223372036.0])
def test_status_line_accepts_any_resume_time(resume_at: float) -> None:
    """Whatever time a server sends, the countdown is never negative, and nothing fails."""
    state = state_after(queued(), sent(1), refused(2, resume_at))
    assert "waiting" in status_line(state, 2.0, WALL)
    assert state.seconds_left(2.0) is None or state.seconds_left(2.0) >= 0
    json.dumps(widget_views.time_data(state, 2.0, WALL), allow_nan=False)


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (
            REPLY,
            "gpt-5.6-sol · 812 in (512 cached) · 431 out · $0.0052 · 11.3 s"
            " · 2 attempts, waited 7.4 s",
        ),
        (Reply(id="1", seconds=3.9), "3.9 s"),
        (
            Reply(id="1", model="m", usage=Usage(input_tokens=8, output_tokens=9)),
            "m · 8 in · 9 out · cost unknown",
        ),
        (
            Reply(
                id="1",
                status="interrupted",
                cost=0.5,
                usage=Usage(input_tokens=8, output_tokens=9, estimated=True),
            ),
            "~8 in · ~9 out · ~$0.50 · interrupted",
        ),
        (
            Reply(id="1", usage=Usage(input_tokens=8, output_tokens=90, reasoning_tokens=64)),
            "8 in · 90 out (64 reasoning) · cost unknown",
        ),
        (Reply(id="1", waited=72.0), "waited 1 min 12 s"),
        (Reply(id="1", waited=72.0, queued=9.0), "waited 1 min 12 s · queued 9.0 s"),
        (Reply(id="1", queued=0.9), ""),
        (
            Reply(id="1", cut="max_output_tokens"),
            "cut at max_output_tokens or the model's own limit",
        ),
        (
            Reply(id="1", cut="content_filter"),
            "cut by content_filter: this is not the whole answer",
        ),
        (Reply(id="1", simulated=True), "simulated"),
        (Reply(id="1", reused=True, cost=0.5), "reused, 0 tokens"),
        (Reply(id="1", model="evil\n\x1b[2Jmodel"), "evil [2Jmodel"),
        (Reply(id="1", cost=0.0), "$0.00"),
        (Reply(id="1", cost=0.0000123), "$0.000012"),
        (Reply(id="1", cost=1234.5), "$1,234.50"),
    ],
)
def test_figures_line(reply: Reply, line: str) -> None:
    """Unknown figures are left out, estimates are marked."""
    assert figures_line(reply) == line


# The messages to the page.


class StillClock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.at = 100.0

    def now(self) -> float:
        """Return the instant."""
        return self.at

    def wall(self) -> float:
        """Return seconds since the epoch."""
        return WALL + self.at

    async def wait(self, until: float, *, unless: object = None) -> bool:
        """Fail: a view does not wait."""
        raise AssertionError("a view does not wait")


class PanelHarness:
    """A `WidgetView` without a kernel, and what it sends and shows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
        self.clock, self.pressed, self.sent, self.received = StillClock(), [], [], []
        self.shown: list[tuple[str, Any]] = []
        monkeypatch.setattr(
            widget_views.CodexWidget, "send", lambda _, content: self.sent.append(content)
        )
        monkeypatch.setattr(text_views, "display", self._show("display", fails=fails))
        monkeypatch.setattr(text_views, "update_display", self._show("update"))
        self.view = widget_views.WidgetView(self.pressed.append, self.clock)

    def _show(self, verb: str, *, fails: bool = False) -> Any:
        def show(thing: Any, **options: Any) -> None:
            if fails and isinstance(thing, widget_views.CodexWidget):
                raise RuntimeError("no display")
            self.shown.append((verb, thing))

        return show

    def open(self, state: PanelState) -> widget_views.CodexWidget:
        """Open the view; return its widget."""
        self.view.open(state)
        panel = self.shown[0][1]
        assert isinstance(panel, widget_views.CodexWidget)
        panel.observe(lambda change: self.received.append(change["new"]), "data")
        return panel

    def render(self, state: PanelState, *, later: float = 0.1) -> None:
        """Update the view, some seconds later."""
        self.clock.at += later
        self.view.render(state)

    def receive(self, content: Any) -> None:
        """Send `content` as the page does."""
        widget = self.view._widget
        assert widget is not None
        widget._receive(widget, content, [])

    @property
    def texts(self) -> list[tuple[int, str, bool]]:
        """The messages with text: number, text, and whether it is all of it."""
        return [(m["seq"], m["text"], m["whole"]) for m in self.sent if m["type"] == "text"]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> PanelHarness:
    """A view whose messages are collected."""
    return PanelHarness(monkeypatch)


def test_only_new_text_is_sent(harness: PanelHarness) -> None:
    """Each message carries the text since the last one, numbered without gaps."""
    state = state_after(queued(), sent(1))
    harness.open(state)
    for piece in ("a", "b", "c"):
        state = apply_event(state, delta(2, piece))
        harness.render(state)
    assert harness.texts == [(1, "a", True), (2, "b", False), (3, "c", False)]


def test_update_is_one_message(harness: PanelHarness) -> None:
    """Figures travel with the text; when it pauses, the data confirm the last number."""
    state = state_after(queued(), sent(1), delta(2, "first"))
    harness.open(state)
    harness.render(state)
    harness.received.clear()
    for _ in range(5):
        state = apply_event(state, delta(2, "word " * 4))
        harness.render(state)
    assert harness.received == []
    assert harness.sent[-1]["changes"] == {"tokens_out": "~27"}
    for _ in range(5):
        harness.render(state, later=0.5)
    assert [data["seq"] for data in harness.received] == [6]


def test_huge_text_is_cut_to_its_end(harness: PanelHarness) -> None:
    """The end replaces what was shown."""
    state = state_after(queued(), sent(1), delta(2, "first"))
    harness.open(state)
    harness.render(state)
    harness.render(apply_event(state, delta(3, "x" * 1_000_000 + "end")))
    _seq, text, whole = harness.texts[-1]
    assert (len(text), text[0], text[-3:], whole) == (MAX_LIVE_CHARS + 1, "…", "end", True)


def test_text_rate_is_limited(harness: PanelHarness) -> None:
    """A fast answer is sent at a limited rate; the rest follows in pauses."""
    state = state_after(queued(), sent(1), delta(2, "first "))
    harness.open(state)
    harness.render(state)
    state = apply_event(state, delta(3, "word " * 1_000))
    for _ in range(10):
        harness.render(state)
    assert (
        sum(len(text) for _, text, _ in harness.texts)
        == len("first ") + widget_views.MAX_CHARS_PER_S
    )
    harness.render(state, later=0.5)
    assert "".join(text for _, text, _ in harness.texts) == "first " + "word " * 1_000


def test_unsent_text_is_sent_when_the_stream_breaks(harness: PanelHarness) -> None:
    """A request that waits shows all that there is of its answer."""
    state = state_after(queued(), sent(1), delta(2, "word " * 1_000))
    harness.open(state)
    harness.render(state)
    assert harness.texts[-1][1] < "word " * 1_000
    harness.render(apply_event(state, refused(3, 20)))
    assert "".join(text for _, text, _ in harness.texts) == "word " * 1_000


def test_restart_replaces_the_text(harness: PanelHarness) -> None:
    state = state_after(queued(), sent(1), delta(2, "Hel"))
    harness.open(state)
    harness.render(state)
    harness.render(apply_event(apply_event(state, restarted(3)), delta(3, "Anew")))
    assert harness.texts == [(1, "Hel", True), (2, "Anew", True)]


def test_sync_sends_text_and_data(harness: PanelHarness) -> None:
    """The page gets the whole text and a countdown that is right at this moment."""
    state = state_after(queued(100), sent(101), delta(102, "Hel"), refused(103, 110))
    harness.open(state)
    harness.render(state)
    harness.clock.at = 105.0
    harness.receive({"type": "sync"})
    assert harness.texts[-1] == (2, "Hel", True)
    assert (harness.received[-1]["remaining_ms"], harness.received[-1]["seq"]) == (5000, 2)
    assert harness.received[-1]["deadline_ms"] == round((WALL + 110) * 1000)


def test_updates_are_sent_ten_times_a_second(harness: PanelHarness) -> None:
    """A new phase is sent at once."""
    state = state_after(queued(100), sent(101))
    harness.open(state)
    for _ in range(100):
        state = apply_event(state, delta(harness.clock.at, "word "))
        harness.render(state, later=0.01)
    assert 10 <= len(harness.texts) <= 13
    before = len(harness.received)
    harness.render(apply_event(state, refused(harness.clock.at, 120)), later=0.0)
    assert len(harness.received) == before + 1


def test_wait_sends_nothing_while_only_time_passes(harness: PanelHarness) -> None:
    state = state_after(queued(100), sent(101), refused(102, 160))
    harness.open(state)
    for _ in range(50):
        harness.render(state, later=1.0)
    assert (harness.received, harness.sent) == ([], [])


def test_view_is_sent_after_the_machine_slept(harness: PanelHarness) -> None:
    """The browser's clock stood still during the sleep."""
    state = state_after(queued(100), sent(101), refused(102, 160))
    harness.open(state)
    harness.render(state, later=1.0)
    harness.render(state, later=20.0)
    harness.render(state, later=1.0)
    assert [data["remaining_ms"] for data in harness.received] == [39_000]


def test_prolonged_cooldown_is_sent(harness: PanelHarness) -> None:
    state = state_after(queued(100), cooldown(100, 110))
    harness.open(state)
    harness.render(apply_event(state, cooldown(100, 130)))
    assert [data["remaining_ms"] for data in harness.received] == [29_900]


def test_data_contain_no_text(harness: PanelHarness) -> None:
    panel = harness.open(state_after(queued(), sent(1), delta(2, "needle")))
    assert "needle" not in json.dumps(panel.data)


def test_click_is_acknowledged(harness: PanelHarness) -> None:
    """The click reaches the callback, and the page gets an acknowledgement."""
    harness.open(state_after(queued()))
    harness.receive({"type": "action", "name": "cancel", "id": 7})
    assert (harness.pressed, harness.sent) == (["cancel"], [{"type": "received", "id": 7}])


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        "cancel",
        {"type": "action", "name": ["cancel"], "id": 1},
        {"type": "action", "name": "cancel"},
    ],
)
def test_unknown_messages_do_nothing(harness: PanelHarness, content: Any) -> None:
    harness.open(state_after(queued()))
    harness.receive(content)
    assert (harness.pressed, harness.sent) == ([], [])


@pytest.mark.parametrize("name", ["insert", "__class__", "stop"])
def test_unknown_actions_do_nothing(harness: PanelHarness, name: str) -> None:
    """Only buttons that are shown can be pressed."""
    harness.open(state_after(queued()))
    harness.receive({"type": "action", "name": name, "id": 1})
    assert harness.pressed == []


def test_answer_follows_the_emptied_panel(harness: PanelHarness) -> None:
    """Where the page still shows the panel, only a line in it says where the answer is."""
    panel = harness.open(state_after(queued()))
    harness.view.close({"text/plain": "Hello"})
    assert harness.shown[1:] == [("update", EMPTY_BUNDLE), ("display", {"text/plain": "Hello"})]
    assert panel.data["phase"] == "ended"
    assert "`%codex journal 3f2a`" in panel.data["line"]
    harness.view.render(state_after(queued(), sent(1)))
    harness.view.close({"text/plain": "Hello"})


def test_answer_is_shown_if_the_panel_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = PanelHarness(monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match="no display"):
        harness.view.open(state_after(queued()))
    harness.view.close({"text/plain": "Hello"})
    assert harness.shown == [("display", {"text/plain": "Hello"})]


def test_oldest_ended_panels_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the latest requests stay connected, for a page that has nothing else to show."""
    monkeypatch.setattr(widget_views, "_ended_widgets", deque())
    monkeypatch.setattr(widget_views, "MAX_ENDED_WIDGETS", 2)
    panels = []
    for _ in range(3):
        harness = PanelHarness(monkeypatch)
        panels.append(harness.open(state_after(queued())))
        harness.view.close({"text/plain": "Hello"})
    assert [panel.comm is None for panel in panels] == [True, False, False]


def test_panel_has_plain_text(harness: PanelHarness) -> None:
    """A front end without widgets, and a saved notebook, show what is open and how to go on."""
    panel = harness.open(state_after(queued(100), sent(100)))
    bundle = panel._repr_mimebundle_()
    assert bundle is not None
    assert bundle[0]["text/plain"].startswith("Codex request 3f2a · if it stays open: ")
    assert "`%codex resume 3f2a`" in bundle[0]["text/plain"]


def test_source_is_sent_again_until_a_page_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server may drop it in a flood; afterwards all panels refer to the same one."""
    monkeypatch.setattr(CodexWidget, "_sources", {})
    first, second = (CodexWidget("panel", {}, print) for _ in range(2))
    assert first.source != second.source
    second._receive(second, {"type": "sync"}, [])
    assert CodexWidget("panel", {}, print).source == second.source


def test_click_while_the_request_ends_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may set the functions to None between their check and their call."""
    calls: list[str] = []
    widget = CodexWidget(
        "panel", {}, lambda name, _: calls.append(name), lambda: calls.append("sync")
    )

    def end(self: CodexWidget, _content: object) -> None:
        self.on_action = self.on_sync = None

    monkeypatch.setattr(CodexWidget, "send", end)
    on_action, on_sync = widget.on_action, widget.on_sync
    widget._receive(widget, {"type": "action", "name": "park", "id": 1}, [])
    widget.on_action, widget.on_sync = on_action, on_sync
    widget._receive(widget, {"type": "sync"}, [])
    assert calls == ["park", "sync"]


# A click in a blocked kernel.

BLOCKED = """
import time
from nbcodex.runtime.clock import BootClock
from nbcodex.notebook.display.panel import PanelState
from nbcodex.notebook.display.widget_views import WidgetView
pressed = []
view = WidgetView(pressed.append, BootClock())
view.open(PanelState())
end = time.monotonic() + 60
while not pressed and time.monotonic() < end:
    time.sleep(0.01)
view.close({"text/plain": "closed"})
print(pressed)
"""


@pytest.fixture
def kernel() -> Iterator[BlockingKernelClient]:
    """A kernel of our own."""
    manager, client = start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    manager.cleanup_resources()


@pytest.mark.kernel
def test_click_reaches_a_blocked_kernel(kernel: BlockingKernelClient) -> None:
    """While a cell blocks, a click that arrives in a subshell is served at once."""
    request = kernel.session.msg("create_subshell_request", {})
    kernel.control_channel.send(request)
    subshell = kernel.get_control_msg(timeout=60)["content"]["subshell_id"]
    kernel.execute(BLOCKED)
    comm_id = _await_panel(kernel)
    click = {"method": "custom", "content": {"type": "action", "name": "cancel", "id": 1}}
    message = kernel.session.msg("comm_msg", {"comm_id": comm_id, "data": click})
    message["header"]["subshell_id"] = subshell
    kernel.shell_channel.send(message)
    assert _printed(kernel) == "['cancel']\n"


def _await_panel(kernel: BlockingKernelClient) -> str:
    """Return the comm id of the panel, once it is displayed."""
    while True:
        message = kernel.get_iopub_msg(timeout=60)
        if message["msg_type"] == "display_data":
            view = message["content"]["data"]["application/vnd.jupyter.widget-view+json"]
            return str(view["model_id"])
        assert message["msg_type"] != "error", message["content"]


def _printed(kernel: BlockingKernelClient) -> str:
    while True:
        message = kernel.get_iopub_msg(timeout=60)
        if message["msg_type"] == "stream":
            return str(message["content"]["text"])
        assert message["msg_type"] != "error", message["content"]
