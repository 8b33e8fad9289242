"""The panel without a browser: state, words, wire format, and a click in a real kernel."""

from __future__ import annotations

import json
import time
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
from nbcodex.notebook.display import widget
from nbcodex.notebook.display.panel import PanelState, reduce, refusal, status
from nbcodex.notebook.display.text import MOST
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


def simulator() -> OverloadedError:
    """Return what a simulator refuses with."""
    error = OverloadedError("Later.")
    error.simulated = True
    return error


def sent(
    at: float, attempt: int = 1, rates: Rates | None = None, *, simulated: bool = False
) -> events.Sent:
    """Return the event of an attempt that begins."""
    return events.Sent(
        request_id="3f2a",
        at=at,
        attempt=attempt,
        model="gpt-5.6-sol",
        input_tokens=812,
        rates=rates,
        simulated=simulated,
    )


def said(at: float, text: str, *, reasoning: bool = False) -> events.Delta:
    """Return the event of more text."""
    return events.Delta(request_id="3f2a", at=at, text=text, reasoning=reasoning)


def refused(at: float, resume_at: float, error: Any = REFUSED) -> events.BackingOff:
    """Return the event of a first attempt that failed."""
    return events.BackingOff(
        request_id="3f2a", at=at, error=error, attempt=1, resume_at=resume_at, waited=0.0
    )


def held(at: float, resume_at: float, waited: float = 0.0) -> events.CoolingDown:
    """Return the event of a model that is closed."""
    return events.CoolingDown(
        request_id="3f2a", at=at, limit=LIMIT, resume_at=resume_at, waited=waited
    )


def restarted(at: float) -> events.Restarted:
    """Return the event of an answer that begins anew."""
    return events.Restarted(request_id="3f2a", at=at)


def after(*stream: events.Event) -> PanelState:
    """Return the state after these events."""
    state = PanelState()
    for event in stream:
        state = reduce(state, event)
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
        ([queued(), held(1, 8)], "held"),
        ([queued(), sent(1)], "sending"),
        ([queued(), sent(1), said(2, "Hm", reasoning=True)], "thinking"),
        ([queued(), sent(1), said(2, "Hi")], "streaming"),
        ([queued(), sent(1), refused(2, 9)], "waiting"),
        ([queued(), sent(1), refused(2, 9), sent(9, 2)], "sending"),
        ([queued(), ended(events.Finished, reply=REPLY)], "done"),
        (
            [queued(), ended(events.Parked, error=ParkedError("Later."), reply=REPLY)],
            "parked",
        ),
        ([queued(), ended(events.Interrupted, reply=REPLY)], "interrupted"),
        ([queued(), ended(events.Cancelled, reply=REPLY)], "cancelled"),
        ([queued(), ended(events.Failed, error=RequestError("No."), reply=REPLY)], "failed"),
    ],
)
def test_phase(stream: list[events.Event], phase: str) -> None:
    """Each event leads to the phase that its name promises."""
    assert after(*stream).phase == phase


def test_wait_is_over_when_sent() -> None:
    """Once an attempt is sent, nothing of the limit is left but the time that was waited."""
    state = after(queued(), sent(1), refused(2, 9), sent(9.5, 2))
    assert (state.limit, state.resume_at, state.waited, state.attempt) == (None, None, 7.5, 2)


def test_wait_announced_again_is_the_same_wait() -> None:
    """A hold that is prolonged goes on from its beginning, and no second is counted twice."""
    state = after(queued(), held(1, 8), held(5, 20, waited=4.0))
    assert (state.since, state.resume_at, state.waited_by(6)) == (1, 20, 5)
    assert reduce(state, sent(20)).waited == 19


def test_text_of_failed_attempt_stays_until_replaced() -> None:
    """A broken answer is shown, marked as stale, until the next one begins."""
    broken = after(queued(), sent(1), said(2, "Hel"), refused(3, 4), sent(4, 2))
    assert (str(broken.text), broken.stale) == ("Hel", True)
    anew = reduce(reduce(broken, restarted(5)), said(5, "Hello"))
    assert (str(anew.text), anew.stale, anew.usage.output_tokens) == ("Hello", False, 2)


def test_thinking_of_second_attempt_is_not_streaming() -> None:
    """Thoughts that precede the restart neither count the stale text nor pass for an answer."""
    state = after(
        queued(),
        sent(1),
        said(2, "x" * 400),
        refused(3, 4),
        sent(4, 2),
        said(5, "Hm, ", reasoning=True),
    )
    assert (state.phase, state.usage.output_tokens) == ("thinking", 1)


def test_servers_usage_replaces_estimates() -> None:
    """When the server has counted, its figures stand; where it has not, ours stay marked."""
    live = after(queued(), sent(1), said(2, "Hello"))
    assert reduce(live, ended(events.Finished, reply=REPLY)).usage == REPLY.usage
    kept = reduce(live, ended(events.Interrupted, reply=Reply(id="3f2a", status="interrupted")))
    assert kept.usage == Usage(input_tokens=812, output_tokens=2, estimated=True)


def test_speed_counts_from_the_first_word() -> None:
    """Tokens a second do not count the time before the first word, and need a second to tell."""
    begun = after(queued(), sent(1), said(10, "x" * 40))
    assert begun.speed is None
    assert reduce(begun, said(12, "x" * 40)).speed == 10


@given(st.lists(st.text()))
def test_state_never_changes(pieces: list[str]) -> None:
    """A state keeps its text, whatever grows from it, and from it twice."""
    states = [PanelState()]
    for number, piece in enumerate(pieces):
        states.append(reduce(states[-1], said(number, piece)))
    branch = [reduce(state, said(99, "!")) for state in states]
    for number, state in enumerate(states):
        assert str(state.text) == "".join(pieces[:number])
        assert str(branch[number].text) == "".join(pieces[:number]) + "!"


def test_delta_costs_the_same_however_long_the_answer() -> None:
    """Ten thousand deltas share one list of chunks, and none of them is copied."""
    state = after(queued(), sent(1), said(2, "first "))
    later = state
    for number in range(10_000):
        later = reduce(later, said(2 + number / 100, "word "))
    assert later.text.grew_from(state.text)
    assert later.text.since(len(state.text)) == "word " * 10_000


@pytest.mark.parametrize(
    ("stream", "action", "possible"),
    [
        ([queued()], "cancel", True),
        ([queued(), sent(1)], "retry", False),
        ([queued(), held(1, 9)], "retry", True),
        ([queued(), sent(1), refused(2, 9)], "retry", True),
        ([queued(), sent(1), refused(2, 9)], "park", True),
        ([ended(events.Cancelled, reply=Reply(id="3f2a", status="cancelled"))], "cancel", False),
    ],
)
def test_buttons(stream: list[events.Event], action: Any, possible: bool) -> None:
    """A button is refused with a reason exactly when it would do nothing."""
    assert (refusal(after(*stream), action) == "") is possible


# The cost.

RATES = Rates(input=1e-6, output=1e-5)


def test_cost_grows_with_the_answer() -> None:
    """While it streams, the tokens estimated are reckoned at their price."""
    state = after(queued(), sent(1, rates=RATES), said(2, "x" * 400))
    assert state.price == "~$0.0018 so far"
    assert status(state, 2.0, WALL).endswith("~100 out · ~$0.0018 so far")


def test_cost_of_a_broken_attempt_stays() -> None:
    """What broke off was paid for, too: the next attempt's cost comes on top of it."""
    broken = after(queued(), sent(1, rates=RATES), said(2, "x" * 400), refused(3, 5))
    assert broken.price == "~$0.0018 so far"
    again = broken
    for event in (sent(5, 2, RATES), restarted(6), said(6, "x" * 400)):
        again = reduce(again, event)
    assert again.price == "~$0.0036 so far"


def test_refused_request_has_cost_nothing() -> None:
    """Whom a limit refuses is charged nothing; of a fault, nothing is said."""
    assert after(queued(), sent(1), refused(2, 5)).price == "no cost so far"
    assert after(queued(), sent(1), refused(2, 5, OverloadedError("later"))).price == ""
    thought = said(2, "Hm", reasoning=True)
    assert after(queued(), sent(1), thought, refused(3, 5)).price == ""
    assert after(queued(), sent(1), refused(2, 5, OverloadedError("x")), held(5, 9)).price == ""
    assert after(queued(), sent(1), said(2, "x" * 400)).price == ""


def test_an_unknown_price_is_said_to_be_unknown() -> None:
    """As soon as there is something to pay, and where it is sure that nobody knows."""
    begun = replace(sent(1), unpriced=True)
    assert after(queued(), begun).price == ""
    assert after(queued(), begun, said(2, "x" * 400)).price == "cost unknown"
    assert after(queued(), replace(begun, simulated=True), said(2, "x" * 400)).price == ""


# The words.


@pytest.mark.parametrize(
    ("stream", "now", "line"),
    [
        ([queued()], 2.0, "queued 2.0 s"),
        ([queued(), sent(1)], 3.0, "sent, no word yet for 2.0 s · ~812 in"),
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
            [queued(), held(1, 3)],
            8.0,
            "held, due now · tokens per minute (TPM): limit 30,000, used 22,999,"
            " requested 12,528 (met by another request) · no cost so far",
        ),
        (
            [queued(), sent(1), refused(2, 9, OverloadedError("Come\x1b[31m back\nlater."))],
            2.0,
            "waiting 7.0 s · Server overloaded: Come [31m back later. · ~812 in",
        ),
        (
            [queued(), sent(1), said(2, "x" * 40), said(4, "x" * 40)],
            4.0,
            "answering · ~812 in · ~20 out · ~10 tokens/s",
        ),
        (
            [queued(), sent(1, simulated=True), said(2, "x" * 40)],
            2.0,
            "answering · ~812 in · ~10 out · simulated",
        ),
        (
            [queued(), sent(1), refused(2, 9, simulator())],
            2.0,
            "waiting 7.0 s · Server overloaded: Later. · ~812 in · simulated",
        ),
        (
            [queued(), ended(events.Cancelled, reply=Reply(id="3f2a", status="cancelled"))],
            9.0,
            "cancelled",
        ),
    ],
)
def test_status(stream: list[events.Event], now: float, line: str) -> None:
    """The text twin says on one line what the panel shows."""
    assert status(after(*stream), now, WALL) == line


@pytest.mark.parametrize("resume_at", [float("inf"), float("nan"), 1e300, -1e300, -9223372036.0])
def test_no_moment_is_too_strange(resume_at: float) -> None:
    """Whatever moment a server names, the countdown is never negative, and nothing fails."""
    state = after(queued(), sent(1), refused(2, resume_at))
    assert "waiting" in status(state, 2.0, WALL)
    assert state.left(2.0) is None or state.left(2.0) >= 0
    json.dumps(widget._moving(state, 2.0, WALL), allow_nan=False)


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
        (Reply(id="1", cut="max_output_tokens"), "cut at max_output_tokens"),
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
def test_figures(reply: Reply, line: str) -> None:
    """The line under an answer leaves out what is unknown, and marks what is estimated."""
    assert figures_line(reply) == line


# The wire format.


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
        """Fail: a display does not wait."""
        raise AssertionError("a display does not wait")


class Stage:
    """A `WidgetDisplay` without a kernel: what it sends, and where it shows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
        self.clock, self.pressed, self.sent, self.views = StillClock(), [], [], []
        self.shown: list[tuple[str, Any]] = []
        monkeypatch.setattr(widget.Panel, "send", lambda _, content: self.sent.append(content))
        monkeypatch.setattr(widget, "display", self._show("display", fails=fails))
        monkeypatch.setattr(widget, "update_display", self._show("update"))
        self.display = widget.WidgetDisplay(
            self.pressed.append, self.clock, offers=("cancel", "retry")
        )

    def _show(self, verb: str, *, fails: bool = False) -> Any:
        def show(thing: Any, **options: Any) -> None:
            if fails and isinstance(thing, widget.Panel):
                raise RuntimeError("no display")
            self.shown.append((verb, thing))

        return show

    def open(self, state: PanelState) -> widget.Panel:
        """Open the display; return the panel that it shows."""
        self.display.open(state)
        panel = self.shown[0][1]
        assert isinstance(panel, widget.Panel)
        panel.observe(lambda change: self.views.append(change["new"]), "view")
        return panel

    def paint(self, state: PanelState, *, later: float = 0.1) -> None:
        """Paint, some seconds later."""
        self.clock.at += later
        self.display.paint(state)

    def hear(self, content: Any) -> None:
        """Play the browser: send `content`."""
        self.display._hear(None, content, [])

    @property
    def texts(self) -> list[tuple[int, str, bool]]:
        """The messages of text: number, text, and whether it is the whole."""
        return [(m["seq"], m["text"], m["whole"]) for m in self.sent if m["type"] == "text"]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A display whose messages are collected."""
    return Stage(monkeypatch)


def test_only_new_text_is_sent(stage: Stage) -> None:
    """Each message carries what came since the last, numbered without gaps."""
    state = after(queued(), sent(1))
    stage.open(state)
    for piece in ("a", "b", "c"):
        state = reduce(state, said(2, piece))
        stage.paint(state)
    assert stage.texts == [(1, "a", True), (2, "b", False), (3, "c", False)]


def test_painting_is_one_message(stage: Stage) -> None:
    """In mid-answer the figures travel with the text; when it pauses, a view counts the last."""
    state = after(queued(), sent(1), said(2, "first"))
    stage.open(state)
    stage.paint(state)
    stage.views.clear()
    for _ in range(5):
        state = reduce(state, said(2, "word " * 4))
        stage.paint(state)
    assert stage.views == []
    assert stage.sent[-1]["news"] == {"tokens_out": "~27"}
    for _ in range(5):
        stage.paint(state, later=0.5)
    assert [view["seq"] for view in stage.views] == [6]


def test_flood_is_sent_in_part(stage: Stage) -> None:
    """Of more than anybody reads while it arrives, the end is sent, in place of what was shown."""
    state = after(queued(), sent(1), said(2, "first"))
    stage.open(state)
    stage.paint(state)
    stage.paint(reduce(state, said(3, "x" * 1_000_000 + "end")))
    _seq, text, whole = stage.texts[-1]
    assert (len(text), text[0], text[-3:], whole) == (MOST + 1, "…", "end", True)


def test_no_faster_than_anybody_reads(stage: Stage) -> None:
    """Of an answer at full speed so much is sent in a second; the rest follows in pauses."""
    state = after(queued(), sent(1), said(2, "first "))
    stage.open(state)
    stage.paint(state)
    state = reduce(state, said(3, "word " * 1_000))
    for _ in range(10):
        stage.paint(state)
    assert sum(len(text) for _, text, _ in stage.texts) == len("first ") + widget.FAST
    stage.paint(state, later=0.5)
    assert "".join(text for _, text, _ in stage.texts) == "first " + "word " * 1_000


def test_held_back_text_is_sent_when_the_stream_breaks(stage: Stage) -> None:
    """A request that waits shows all that there is of its answer."""
    state = after(queued(), sent(1), said(2, "word " * 1_000))
    stage.open(state)
    stage.paint(state)
    assert stage.texts[-1][1] < "word " * 1_000
    stage.paint(reduce(state, refused(3, 20)))
    assert "".join(text for _, text, _ in stage.texts) == "word " * 1_000


def test_restart_is_sent_whole(stage: Stage) -> None:
    """A restarted answer replaces what the browser shows."""
    state = after(queued(), sent(1), said(2, "Hel"))
    stage.open(state)
    stage.paint(state)
    stage.paint(reduce(reduce(state, restarted(3)), said(3, "Anew")))
    assert stage.texts == [(1, "Hel", True), (2, "Anew", True)]


def test_sync_gets_everything(stage: Stage) -> None:
    """A browser that missed something gets the whole text and a countdown that is right now."""
    state = after(queued(100), sent(101), said(102, "Hel"), refused(103, 110))
    stage.open(state)
    stage.paint(state)
    stage.clock.at = 105.0
    stage.hear({"type": "sync"})
    assert stage.texts[-1] == (2, "Hel", True)
    assert (stage.views[-1]["remaining_ms"], stage.views[-1]["seq"]) == (5000, 2)
    assert stage.views[-1]["deadline_ms"] == round((WALL + 110) * 1000)


def test_ten_paints_a_second(stage: Stage) -> None:
    """A painter in a hurry sends ten times a second, and a new phase at once."""
    state = after(queued(100), sent(101))
    stage.open(state)
    for _ in range(100):
        state = reduce(state, said(stage.clock.at, "word "))
        stage.paint(state, later=0.01)
    assert 10 <= len(stage.texts) <= 13
    before = len(stage.views)
    stage.paint(reduce(state, refused(stage.clock.at, 120)), later=0.0)
    assert len(stage.views) == before + 1


def test_a_wait_is_one_message(stage: Stage) -> None:
    """While nothing but time goes on, nothing is sent."""
    state = after(queued(100), sent(101), refused(102, 160))
    stage.open(state)
    for _ in range(50):
        stage.paint(state, later=1.0)
    assert (stage.views, stage.sent) == ([], [])


def test_a_sleep_is_made_up_for(stage: Stage) -> None:
    """After a machine's sleep the browser is told how long it still is: its clock stood still."""
    state = after(queued(100), sent(101), refused(102, 160))
    stage.open(state)
    stage.paint(state, later=1.0)
    stage.paint(state, later=20.0)
    stage.paint(state, later=1.0)
    assert [view["remaining_ms"] for view in stage.views] == [39_000]


def test_prolonged_wait_is_sent(stage: Stage) -> None:
    """A hold of which only the end has moved is sent anew."""
    state = after(queued(100), held(100, 110))
    stage.open(state)
    stage.paint(reduce(state, held(100, 130)))
    assert [view["remaining_ms"] for view in stage.views] == [29_900]


def test_view_holds_no_text(stage: Stage) -> None:
    """The text travels in messages alone, however often the view is sent."""
    panel = stage.open(after(queued(), sent(1), said(2, "needle")))
    assert "needle" not in json.dumps(panel.view)


def test_click_is_acknowledged(stage: Stage) -> None:
    """A click reaches the callback, and the browser learns that it did."""
    stage.open(after(queued()))
    stage.hear({"type": "action", "name": "cancel", "id": 7})
    assert (stage.pressed, stage.sent) == (["cancel"], [{"type": "heard", "id": 7}])


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        "cancel",
        {"type": "action", "name": "park", "id": 1},
        {"type": "action", "name": "__class__", "id": 1},
        {"type": "action", "name": ["cancel"], "id": 1},
        {"type": "action", "name": "cancel"},
    ],
)
def test_other_messages_do_nothing(stage: Stage, content: Any) -> None:
    """Only buttons that were offered can be pressed."""
    stage.open(after(queued()))
    stage.hear(content)
    assert (stage.pressed, stage.sent) == ([], [])


def test_answer_takes_the_panels_place(stage: Stage) -> None:
    """The same display is updated with the answer, and the widget is gone."""
    panel = stage.open(after(queued()))
    stage.display.close({"text/plain": "Hello"})
    assert stage.shown[-1] == ("update", {"text/plain": "Hello"})
    assert panel.comm is None
    stage.display.paint(after(queued(), sent(1)))
    stage.display.close({"text/plain": "Hello"})


def test_answer_is_shown_without_a_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the panel could not be shown, the answer still is."""
    stage = Stage(monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match="no display"):
        stage.display.open(after(queued()))
    stage.display.close({"text/plain": "Hello"})
    assert stage.shown == [("display", {"text/plain": "Hello"})]


def test_panel_has_a_text_twin(stage: Stage) -> None:
    """A front end without widgets shows the line of status."""
    panel = stage.open(after(queued(100), sent(100)))
    bundle = panel._repr_mimebundle_()
    assert bundle is not None
    assert bundle[0]["text/plain"] == "sent, no word yet for 0.0 s · ~812 in"


# A click in a blocked kernel.

BLOCKED = """
import time
from nbcodex.runtime.clock import BootClock
from nbcodex.notebook.display.panel import PanelState
from nbcodex.notebook.display.widget import WidgetDisplay
heard = []
screen = WidgetDisplay(heard.append, BootClock())
screen.open(PanelState())
end = time.monotonic() + 10
while not heard and time.monotonic() < end:
    time.sleep(0.01)
screen.close({"text/plain": "closed"})
print(heard)
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
    """While a cell blocks, a click that comes by a subshell is heard at once."""
    request = kernel.session.msg("create_subshell_request", {})
    kernel.control_channel.send(request)
    subshell = kernel.get_control_msg(timeout=10)["content"]["subshell_id"]
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
        message = kernel.get_iopub_msg(timeout=20)
        if message["msg_type"] == "display_data":
            view = message["content"]["data"]["application/vnd.jupyter.widget-view+json"]
            return str(view["model_id"])
        assert message["msg_type"] != "error", message["content"]


def _printed(kernel: BlockingKernelClient) -> str:
    while True:
        message = kernel.get_iopub_msg(timeout=20)
        if message["msg_type"] == "stream":
            return str(message["content"]["text"])
        assert message["msg_type"] != "error", message["content"]
