"""The life of a request, in virtual time: no limit, fault or order leaves it without an ending."""

from __future__ import annotations

import asyncio
import itertools
import re
from dataclasses import replace
from typing import Any

import pytest

from nbcodex import events
from nbcodex.errors import (
    LimitError,
    NbcodexError,
    OverloadedError,
    QuotaError,
    RequestError,
    ServerError,
    TooLargeError,
    TransportError,
)
from nbcodex.events import BackingOff, CoolingDown, Delta, Event, Finished, Parked, Restarted, Sent
from nbcodex.models import Limit, Request, Resumption, Usage
from nbcodex.openai_api.answers import CompletedAnswer, TextDelta
from nbcodex.requests.runner import RequestRunner
from tests.scripted import OPENED, SETTINGS, Stage, answer, ending
from tests.virtual import EPOCH, run_virtual

TPM = Limit(resource="tokens", window=60.0, limit=30_000, used=22_999, requested=12_528)


def refusal(wait: float | None = 11.0) -> LimitError:
    return LimitError("Rate limit reached.", limit=TPM, wait=wait)


def play(*acts: Any, request: Request | None = None, orders: Any = ()) -> tuple[list[Event], Stage]:
    """Play the acts for one request; return its events and the stage."""

    async def main() -> tuple[list[Event], Stage]:
        stage = Stage(*acts)
        return await stage.play(request or Request(prompt="hello"), *orders), stage

    return run_virtual(main())


def kinds(heard: list[Event]) -> list[str]:
    return [type(event).__name__ for event in heard]


def test_parked_in_a_wait_says_what_it_waited_for() -> None:
    """Who parks a request reads which limit it is, when it can go, and that nothing was paid."""
    heard, _ = play([refusal(11.0)], orders=[(2.0, "park")])
    error = heard[-1].error  # type: ignore[attr-defined]
    assert isinstance(heard[-1], Parked)
    assert (error.title, error.limit) == ("Parked by you", TPM)
    assert error.resume_at - EPOCH - heard[-1].at == pytest.approx(9.0, abs=0.6)
    assert re.fullmatch(
        r"Rate limit reached\. It can go at \d\d:\d\d:\d\d \(in \d+\.\d s\)\. "
        r"It has cost nothing so far\.",
        error.message,
    )


def test_what_the_simulator_refuses_is_no_use_of_anything() -> None:
    """A request that was only ever refused by the simulator ends as a simulated one."""
    refused = refusal(11.0)
    refused.simulated = True
    heard, _ = play([refused], orders=[(2.0, "cancel")])
    assert ending(heard).reply.simulated


def test_who_never_reached_a_simulator_is_simulated_all_the_same() -> None:
    """Where one request has heard that the server is a simulator, another's wait is no real one."""
    refused = refusal(11.0)
    refused.simulated = True

    async def main() -> Any:
        stage = Stage([refused])
        first = stage.start(Request(id="first", prompt="hello"))
        await asyncio.sleep(1.0)
        heard = await stage.play(Request(id="second", prompt="hello"), (2.0, "cancel"))
        first.end("cancel")
        await asyncio.wait([first.task])
        return ending(heard).reply

    reply = run_virtual(main())
    assert (reply.attempts, reply.simulated) == (0, True)


def test_a_simulator_is_known_from_its_first_word() -> None:
    """Not at the end of the first answer, when its reader has long taken it for a real one."""
    heard, _ = play([replace(OPENED, simulated=True), *list(answer("hi"))[1:]])
    assert [event.simulated for event in heard if isinstance(event, Delta)] == [True]


@pytest.mark.parametrize(
    ("acts", "orders", "used"),
    [
        ([[refusal(11.0)]], [(2.0, "cancel")], 0),
        ([[RequestError("It cannot be.")]], [], 0),
        ([[ServerError("It broke.")], [refusal(11.0)]], [(5.0, "cancel")], None),
        ([[refusal(11.0)], [30.0]], [(20.0, "cancel")], None),
        ([[OPENED, refusal(11.0)]], [(2.0, "cancel")], None),
    ],
)
def test_who_was_only_refused_has_used_nothing(
    acts: list[Any], orders: list[Any], used: int | None
) -> None:
    """Whatever else befell an attempt, nobody knows what it has used without an answer."""
    heard, _ = play(*acts, orders=orders)
    assert ending(heard).reply.usage.total_tokens == used


BROKEN = [OPENED, TextDelta("word " * 40), TransportError("It broke.")]
"""An attempt that brings about 50 tokens and breaks off."""


@pytest.mark.parametrize(
    ("acts", "orders", "output"),
    [
        ([BROKEN, answer("hi")], [], 50 + 5),
        ([BROKEN, BROKEN, answer("hi")], [], 2 * 50 + 5),
        ([BROKEN], [(0.5, "cancel")], 50),
        ([BROKEN, [refusal(60.0)]], [(30.0, "park")], 50),
        ([BROKEN, [30.0]], [(20.0, "cancel")], 50),
        ([[OPENED, TransportError("It broke.")], answer("hi")], [], 5),
    ],
)
def test_what_broke_off_is_counted_too(acts: list[Any], orders: list[Any], output: int) -> None:
    """Tokens that were generated are paid, whether or not the attempt came to an end: once each."""
    heard, _ = play(*acts, orders=orders)
    usage = ending(heard).reply.usage
    assert usage.output_tokens == output
    assert usage.estimated is (output != 5)


def test_who_answers_in_a_simulators_place_is_none() -> None:
    """An address at which a simulator once was is believed anew with every answer."""
    refused = refusal(11.0)
    refused.simulated = True
    heard, _ = play([refused], answer("hi"))
    assert not ending(heard).reply.simulated


def test_a_request_is_known_by_its_prompts_beginning() -> None:
    """The first event tells how the prompt begins, on one line and briefly."""
    heard, _ = play(answer("hi"), request=Request(prompt="Write\na poem " + "about it " * 20))
    assert isinstance(heard[0], events.Queued)
    assert heard[0].prompt.startswith("Write a poem about it ")
    assert len(heard[0].prompt) == 60


def test_an_answer_is_told_in_order() -> None:
    """Without limits a request is queued, sent, streamed and finished."""
    heard, _ = play(answer("hi"))
    assert kinds(heard) == ["Queued", "Sent", "Delta", "Finished"]
    assert heard[-1].reply.text == "hi"  # type: ignore[attr-defined]


def test_a_limit_is_waited_out() -> None:
    """After a 429 the same request goes again, never sooner than the server said."""
    heard, stage = play([refusal(11.0)], answer("hi"))
    assert kinds(heard) == ["Queued", "Sent", "BackingOff", "Sent", "Delta", "Finished"]
    (first, _), (second, _) = stage.api_client.seen
    assert 11.0 <= second - first <= 11.0 * 1.05 + 0.1


def test_the_countdown_tells_the_truth() -> None:
    """The moment that `BackingOff` names is the moment at which the request is sent again."""
    heard, stage = play([refusal(11.0)], answer("hi"))
    (told,) = [e.resume_at for e in heard if isinstance(e, BackingOff)]
    assert stage.api_client.seen[1][0] == pytest.approx(told, abs=0.01)


def test_the_prompt_is_sent_again_intact() -> None:
    """The retried request is the request, not an empty one."""
    asked = Request(prompt="the whole prompt", system="be brief")
    _, stage = play([OPENED, TextDelta("par"), refusal(1.0)], answer("hi"), request=asked)
    assert [request for _, request in stage.api_client.seen] == [asked, asked]


def test_a_sixth_stream_failure_is_survived() -> None:
    """Patience is a time, not a count: after the fifth broken stream it still goes on."""
    broken = [[OPENED, TextDelta("x"), TransportError("cut")] for _ in range(6)]
    heard, _ = play(*broken, answer("hi"))
    assert ending(heard).reply.attempts == 7


def test_opening_the_stream_again_is_protected() -> None:
    """A failure of the retried attempt's very opening is retried like the first."""
    heard, _ = play([OPENED, refusal(1.0)], [TransportError("refused")], answer("hi"))
    assert isinstance(ending(heard), Finished)


def test_text_is_replaced_not_repeated() -> None:
    """What a broken attempt showed is shown until the next one's text replaces it."""
    heard, _ = play([OPENED, TextDelta("Hello wor"), TransportError("cut")], answer("Hello world"))
    assert kinds(heard)[-3:] == ["Restarted", "Delta", "Finished"]
    after = heard[[isinstance(e, Restarted) for e in heard].index(True) :]
    assert "".join(e.text for e in after if isinstance(e, Delta)) == "Hello world"
    assert ending(heard).reply.text == "Hello world"


@pytest.mark.parametrize("error", [QuotaError("no credit"), TooLargeError("too large")])
def test_what_can_never_succeed_stops_at_once(error: NbcodexError) -> None:
    """A permanent failure is told after one attempt, with no wait at all."""
    heard, stage = play([error])
    assert ending(heard).error is error
    assert len(stage.api_client.seen) == 1
    assert heard[-1].at == heard[0].at


def test_a_wait_longer_than_the_patience_parks_at_once() -> None:
    """Nobody waits for what cannot come in time; the moment is named."""
    heard, stage = play([refusal(432.0)], request=Request(prompt="x", patience=60.0))
    parked = ending(heard)
    assert isinstance(parked, Parked)
    assert parked.at == heard[0].at
    assert parked.error.resume_at == pytest.approx(EPOCH + parked.at + 432.0, abs=10.0)
    assert len(stage.api_client.seen) == 1
    assert "7 min" in str(parked.error)


def test_patience_adds_up_over_attempts() -> None:
    """Each wait uses up patience; the one that would exceed it parks."""
    acts = [[refusal(20.0)] for _ in range(9)]
    heard, stage = play(*acts, request=Request(prompt="x", patience=70.0))
    assert isinstance(ending(heard), Parked)
    assert len(stage.api_client.seen) == 4
    assert ending(heard).reply.waited <= 70.0


def test_a_silent_server_uses_up_patience() -> None:
    """Seconds of silence before a fault are waiting, too."""
    acts = [[OPENED, 50.0, TransportError("silent")] for _ in range(9)]
    heard, stage = play(*acts, request=Request(prompt="x", patience=120.0))
    assert isinstance(ending(heard), Parked)
    assert len(stage.api_client.seen) == 3


def test_unstated_limits_back_off_exponentially() -> None:
    """Where the server says nothing, each wait is about twice the last."""
    acts = [[refusal(None)] for _ in range(5)]
    _, stage = play(*acts, answer("hi"))
    sent = [at for at, _ in stage.api_client.seen]
    waits = [b - a for a, b in itertools.pairwise(sent)]
    for number, wait in enumerate(waits):
        assert 2.0**number <= wait <= 2.0**number + 1.1


def test_an_hour_of_waiting_passes() -> None:
    """A day's limit is waited out where the patience allows, on the clock that counts."""
    heard, _ = play([refusal(3600.0)], answer("hi"), request=Request(prompt="x", patience=7200.0))
    assert 3600 <= ending(heard).reply.waited <= 3606


def test_others_are_held_by_one_refusal() -> None:
    """A 429 closes the model for all: the refused one backs off, the others are held."""

    async def main() -> Stage:
        stage = Stage([refusal(30.0)], answer("a"), answer("b"), answer("c"))
        runs = [stage.start(Request(prompt="first"))]
        await asyncio.sleep(1)
        runs += [stage.start(Request(prompt=p)) for p in ("second", "third")]
        await asyncio.wait([run.task for run in runs])
        return stage

    stage = run_virtual(main())
    first, second, third = stage.events.values()
    assert kinds(first).count("BackingOff") == 1
    for heard in (second, third):
        (held,) = [e for e in heard if isinstance(e, CoolingDown)]
        assert held.limit == TPM
        assert isinstance(ending(heard), Finished)


def test_nobody_wakes_as_a_herd() -> None:
    """After a hold only those go for whom there is room; if they are refused, no other was sent."""
    empty = Limit(resource="tokens", window=60.0, limit=30_000, used=30_000, requested=14_000)
    refused = LimitError("Rate limit reached.", limit=empty, wait=30.0)

    async def main() -> Stage:
        stage = Stage([refused], [2.0, refused], *[answer("x")] * 6)
        runs = [stage.start(Request(prompt="0", max_output=14_000))]
        await asyncio.sleep(1)
        runs += [stage.start(Request(prompt=str(n), max_output=14_000)) for n in range(1, 6)]
        await asyncio.wait([run.task for run in runs])
        return stage

    stage = run_virtual(main())
    start = stage.api_client.seen[0][0]
    assert len([at for at, _ in stage.api_client.seen if at - start < 60.0]) == 2


def test_retry_now_goes_through_the_hold() -> None:
    """A probe is sent at once, and finishes where the server lets it in."""

    async def main() -> Stage:
        stage = Stage([refusal(300.0)], answer("hi"))
        run = stage.start(Request(prompt="x"))
        asyncio.get_running_loop().call_later(5.0, run.retry_now)
        await asyncio.wait([run.task])
        return stage

    stage = run_virtual(main())
    (first, _), (second, _) = stage.api_client.seen
    assert second - first == pytest.approx(5.0, abs=0.01)


def test_a_refused_probe_leaves_the_hold() -> None:
    """A probe that is refused goes back to waiting for the moment that was announced."""

    async def main() -> Stage:
        stage = Stage([refusal(300.0)], [refusal(400.0)], answer("hi"))
        run = stage.start(Request(prompt="x"))
        asyncio.get_running_loop().call_later(5.0, run.retry_now)
        await asyncio.wait([run.task])
        return stage

    stage = run_virtual(main())
    (heard,) = stage.events.values()
    moments = {e.resume_at for e in heard if isinstance(e, BackingOff)}
    assert len(moments) == 1
    assert stage.api_client.seen[2][0] == pytest.approx(moments.pop(), abs=0.01)


@pytest.mark.parametrize(
    ("what", "kind"), [("stop", "Interrupted"), ("cancel", "Cancelled"), ("park", "Parked")]
)
@pytest.mark.parametrize(
    "act",
    [[refusal(100.0)], [OPENED, TextDelta("partial"), 100.0], [100.0], [TransportError("cut")]],
    ids=["countdown", "stream", "stall", "backoff"],
)
def test_orders_are_followed_at_once(act: Any, what: Any, kind: str) -> None:
    """Stop, Cancel and Park end a request wherever it is, and keep its text."""
    at = 0.5
    heard, _ = play(act, request=Request(prompt="x"), orders=[(at, what)])
    assert type(ending(heard)).__name__ == kind
    assert heard[-1].at - heard[0].at == pytest.approx(at, abs=0.01)
    assert ending(heard).reply.text == ("partial" if TextDelta("partial") in act else "")
    assert not ending(heard).reply


def test_an_order_before_the_first_step_counts() -> None:
    """A request that is stopped before it has begun is never sent."""

    async def main() -> Stage:
        stage = Stage(answer("hi"))
        run = stage.start(Request(prompt="x"))
        run.end("stop")
        await asyncio.wait([run.task])
        return stage

    stage = run_virtual(main())
    (heard,) = stage.events.values()
    assert kinds(heard) == ["Queued", "Interrupted"]
    assert stage.api_client.seen == []


def test_a_stopped_answer_is_estimated() -> None:
    """What an aborted stream cost is an estimate, and marked so."""
    heard, _ = play([OPENED, TextDelta("partial"), 9.0], orders=[(1.0, "stop")])
    usage = ending(heard).reply.usage
    assert usage.estimated
    assert usage.output_tokens >= 1


def test_a_raising_listener_disturbs_nobody() -> None:
    """A display that fails does not end the request."""

    async def main() -> list[Event]:
        stage = Stage(answer("hi"))
        heard: list[Event] = []

        def listen(event: Event) -> None:
            heard.append(event)
            raise RuntimeError("painted into a corner")

        run = RequestRunner(stage.services, Request(prompt="x"), SETTINGS, listen).start()
        await asyncio.wait([run.task])
        return heard

    assert kinds(run_virtual(main()))[-1] == "Finished"


def test_a_defect_ends_in_an_event() -> None:
    """Whatever goes wrong inside, the request has an ending, and the kernel lives."""
    heard, _ = play([ZeroDivisionError("oops")])
    assert isinstance(ending(heard), events.Failed)


def test_an_outage_is_not_made_worse() -> None:
    """Faults draw on a budget shared by all: many requests retry little more than the floor."""

    async def main() -> Stage:
        stage = Stage(*[[ServerError("500")] for _ in range(2000)])
        runs = [stage.start(Request(prompt=str(n), patience=120.0)) for n in range(100)]
        await asyncio.wait([run.task for run in runs])
        return stage

    stage = run_virtual(main())
    retries = len(stage.api_client.seen) - 100
    assert retries <= 10 + 0.1 * 125 + 1


def test_an_overloaded_server_is_waited_for() -> None:
    """Overload is no limit of ours: it backs off like a fault, and no model is closed."""
    heard, _ = play([OverloadedError("busy")], answer("hi"))
    (backing,) = [e for e in heard if isinstance(e, BackingOff)]
    assert backing.limit is None
    assert [e for e in heard if isinstance(e, Sent)][1].at >= heard[0].at + 1.0


def test_a_server_in_trouble_is_asked_ever_more_slowly() -> None:
    """A fault that states a short wait again and again still makes for growing waits."""
    acts = [[ServerError("503", wait=0.2)] for _ in range(5)]
    _, stage = play(*acts, answer("hi"))
    sent = [at for at, _ in stage.api_client.seen]
    for number, (one, two) in enumerate(itertools.pairwise(sent)):
        assert two - one >= 2.0**number


def test_an_answer_without_figures_is_estimated() -> None:
    """A finished answer whose usage was lost is shown with an estimate, marked so."""
    done = CompletedAnswer(text="hi", usage=Usage(), model="m-1", cut=None, response_id=None)
    heard, _ = play([OPENED, TextDelta("hi"), done])
    assert ending(heard).reply.usage.estimated


def test_the_journal_is_a_gate() -> None:
    """A request is in the journal before it is sent, and its answer before it is told."""

    async def main() -> list[str]:
        stage = Stage(answer("hi"))
        log: list[str] = []
        stage.journal.written = _Tee(log)  # type: ignore[assignment]
        run = RequestRunner(
            stage.services,
            Request(prompt="x"),
            SETTINGS,
            lambda event: log.append(type(event).__name__),
        ).start()
        await asyncio.wait([run.task])
        return log

    assert run_virtual(main()) == [
        "Queued",
        "insert",
        "start_attempt",
        "Sent",
        "Delta",
        "finish",
        "Finished",
    ]


class _Tee:
    """Notes the verbs of a journal in a list of its own."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def append(self, written: tuple[str, Any]) -> None:
        self._log.append(written[0])


def test_text_is_kept_every_second() -> None:
    """Of a stream that goes on for long, no more than a second's text is unwritten."""
    pieces: list[Any] = [OPENED]
    for _ in range(50):
        pieces += [TextDelta("x"), 0.1]
    _, stage = play([*pieces, TransportError("cut")], orders=[(4.95, "stop")])
    kept = [text for verb, text in stage.journal.written if verb == "update_text"]
    assert len(kept) == 6
    lengths = [0, *map(len, kept)]
    assert max(b - a for a, b in itertools.pairwise(lengths)) <= 10
    assert len(kept[-1]) >= 40


def test_an_entry_of_another_kernel_is_not_sent() -> None:
    """Of two kernels that resume a request, the one that was too late sends nothing."""

    async def main() -> Stage:
        stage = Stage(answer("hi"))
        stage.journal.claimable = False
        heard: list[Event] = stage.events.setdefault("", [])
        run = RequestRunner(
            stage.services, Request(prompt="x"), SETTINGS, heard.append, resumption=Resumption()
        ).start()
        await asyncio.wait([run.task])
        return stage

    stage = run_virtual(main())
    assert isinstance(stage.events[""][-1], events.Failed)
    assert stage.api_client.seen == []
    assert [verb for verb, _ in stage.journal.written] == ["claim"]
