"""One request in virtual time: nothing that happens to it leaves it without an ending."""

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
from nbcodex.openai_api.endpoints import Endpoint
from nbcodex.ratelimit.backoff import RetryBudget
from nbcodex.requests.handle import Handle
from nbcodex.requests.runner import RequestRunner
from nbcodex.settings import Secret
from tests.scripted import SETTINGS, STARTED, ScriptedServices, answer, ending
from tests.virtual import EPOCH, run_virtual

TPM = Limit(resource="tokens", window=60.0, limit=30_000, used=22_999, requested=12_528)


def refusal(wait: float | None = 11.0) -> LimitError:
    return LimitError("Rate limit reached.", limit=TPM, wait=wait)


def run_request(
    *attempts: Any, request: Request | None = None, actions: Any = ()
) -> tuple[list[Event], ScriptedServices]:
    """Run one request through these attempts; return its events and the services."""

    async def main() -> tuple[list[Event], ScriptedServices]:
        scripted = ScriptedServices(*attempts)
        return await scripted.run(request or Request(prompt="hello"), *actions), scripted

    return run_virtual(main())


def kinds(received: list[Event]) -> list[str]:
    return [type(event).__name__ for event in received]


def test_parking_during_a_wait_names_the_limit_and_the_time() -> None:
    received, _ = run_request([refusal(11.0)], actions=[(2.0, "park")])
    error = received[-1].error  # type: ignore[attr-defined]
    assert isinstance(received[-1], Parked)
    assert (error.title, error.limit) == ("Parked by you", TPM)
    assert error.resume_at - EPOCH - received[-1].at == pytest.approx(9.0, abs=0.6)
    assert re.fullmatch(
        r"Rate limit reached\. The request can be sent at \d\d:\d\d:\d\d at the earliest "
        r"\(in \d+\.\d s\)\. The request has cost nothing so far\.",
        error.message,
    )


def test_request_refused_by_simulator_is_simulated() -> None:
    refused = refusal(11.0)
    refused.simulated = True
    received, _ = run_request([refused], actions=[(2.0, "cancel")])
    assert ending(received).reply.simulated


def test_waiting_request_is_simulated_once_another_met_the_simulator() -> None:
    refused = refusal(11.0)
    refused.simulated = True

    async def main() -> Any:
        scripted = ScriptedServices([refused])
        first = scripted.start(Request(id="first", prompt="hello"))
        await asyncio.sleep(1.0)
        received = await scripted.run(Request(id="second", prompt="hello"), (2.0, "cancel"))
        first.end("cancel")
        await asyncio.wait([first.task])
        return ending(received).reply

    reply = run_virtual(main())
    assert (reply.attempts, reply.simulated) == (0, True)


def test_first_delta_says_that_the_server_is_simulated() -> None:
    received, _ = run_request([replace(STARTED, simulated=True), *list(answer("hi"))[1:]])
    assert [event.simulated for event in received if isinstance(event, Delta)] == [True]


@pytest.mark.parametrize(
    ("attempts", "actions", "used"),
    [
        ([[refusal(11.0)]], [(2.0, "cancel")], 0),
        ([[RequestError("It cannot be.")]], [], 0),
        ([[ServerError("It broke.")], [refusal(11.0)]], [(5.0, "cancel")], None),
        ([[refusal(11.0)], [30.0]], [(20.0, "cancel")], None),
        ([[STARTED, refusal(11.0)]], [(2.0, "cancel")], None),
    ],
)
def test_request_that_was_only_refused_has_used_nothing(
    attempts: list[Any], actions: list[Any], used: int | None
) -> None:
    received, _ = run_request(*attempts, actions=actions)
    assert ending(received).reply.usage.total_tokens == used


# An attempt that brings about 50 tokens and breaks off.
BROKEN = [STARTED, TextDelta("word " * 40), TransportError("It broke.")]


@pytest.mark.parametrize(
    ("attempts", "actions", "output"),
    [
        ([BROKEN, answer("hi")], [], 50 + 5),
        ([BROKEN, BROKEN, answer("hi")], [], 2 * 50 + 5),
        ([BROKEN], [(0.5, "cancel")], 50),
        ([BROKEN, [refusal(60.0)]], [(30.0, "park")], 50),
        ([BROKEN, [30.0]], [(20.0, "cancel")], 50),
        ([[STARTED, TransportError("It broke.")], answer("hi")], [], 5),
    ],
)
def test_tokens_of_broken_attempts_count_once(
    attempts: list[Any], actions: list[Any], output: int
) -> None:
    received, _ = run_request(*attempts, actions=actions)
    usage = ending(received).reply.usage
    assert usage.output_tokens == output
    assert usage.estimated is (output != 5)


STATED = Usage(input_tokens=100, output_tokens=50, cached_tokens=8, stated_cost=0.01)


@pytest.mark.parametrize(
    ("failures", "actions", "total"),
    [
        (1, [], Usage(input_tokens=110, output_tokens=55, cached_tokens=8, stated_cost=0.01)),
        (2, [], Usage(input_tokens=210, output_tokens=105, cached_tokens=16, stated_cost=0.02)),
        (1, [(0.5, "cancel")], STATED),
    ],
)
def test_stated_usage_of_failed_attempts_is_counted_as_stated(
    failures: int, actions: list[Any], total: Usage
) -> None:
    failure = ServerError("It failed.")
    failure.usage = STATED
    broken = [STARTED, TextDelta("word " * 40), failure]
    received, _ = run_request(*[broken] * failures, answer("hi"), actions=actions)
    assert ending(received).reply.usage == total


def test_real_server_at_a_simulators_address_is_recognized() -> None:
    refused = refusal(11.0)
    refused.simulated = True
    received, _ = run_request([refused], answer("hi"))
    assert not ending(received).reply.simulated


def test_queued_event_previews_the_prompt() -> None:
    received, _ = run_request(
        answer("hi"), request=Request(prompt="Write\na poem " + "about it " * 20)
    )
    assert isinstance(received[0], events.Queued)
    assert received[0].prompt.startswith("Write a poem about it ")
    assert len(received[0].prompt) == 60


def test_request_without_limits_is_queued_sent_streamed_finished() -> None:
    received, _ = run_request(answer("hi"))
    assert kinds(received) == ["Queued", "Sent", "Delta", "Finished"]
    assert received[-1].reply.text == "hi"  # type: ignore[attr-defined]


def test_429_is_retried_no_sooner_than_stated() -> None:
    received, scripted = run_request([refusal(11.0)], answer("hi"))
    assert kinds(received) == ["Queued", "Sent", "BackingOff", "Sent", "Delta", "Finished"]
    (first, _), (second, _) = scripted.api_client.seen
    assert 11.0 <= second - first <= 11.0 * 1.05 + 0.1


def test_request_is_sent_again_when_announced() -> None:
    received, scripted = run_request([refusal(11.0)], answer("hi"))
    (reported,) = [e.resume_at for e in received if isinstance(e, BackingOff)]
    assert scripted.api_client.seen[1][0] == pytest.approx(reported, abs=0.01)


def test_retry_sends_the_same_request() -> None:
    asked = Request(prompt="the whole prompt", system="be brief")
    _, scripted = run_request(
        [STARTED, TextDelta("par"), refusal(1.0)], answer("hi"), request=asked
    )
    assert [request for _, request in scripted.api_client.seen] == [asked, asked]


def test_sixth_stream_failure_is_retried() -> None:
    """The patience limits time, not attempts."""
    broken = [[STARTED, TextDelta("x"), TransportError("cut")] for _ in range(6)]
    received, _ = run_request(*broken, answer("hi"))
    assert ending(received).reply.attempts == 7


def test_failure_to_open_a_retry_is_retried() -> None:
    received, _ = run_request([STARTED, refusal(1.0)], [TransportError("refused")], answer("hi"))
    assert isinstance(ending(received), Finished)


def test_text_of_broken_attempt_is_replaced_not_repeated() -> None:
    received, _ = run_request(
        [STARTED, TextDelta("Hello wor"), TransportError("cut")], answer("Hello world")
    )
    assert kinds(received)[-3:] == ["Restarted", "Delta", "Finished"]
    after = received[[isinstance(e, Restarted) for e in received].index(True) :]
    assert "".join(e.text for e in after if isinstance(e, Delta)) == "Hello world"
    assert ending(received).reply.text == "Hello world"


@pytest.mark.parametrize("error", [QuotaError("no credit"), TooLargeError("too large")])
def test_permanent_error_fails_without_retry(error: NbcodexError) -> None:
    received, scripted = run_request([error])
    assert ending(received).error is error
    assert len(scripted.api_client.seen) == 1
    assert received[-1].at == received[0].at


def test_wait_longer_than_patience_parks_at_once() -> None:
    received, scripted = run_request([refusal(432.0)], request=Request(prompt="x", patience=60.0))
    parked = ending(received)
    assert isinstance(parked, Parked)
    assert parked.at == received[0].at
    assert parked.error.resume_at == pytest.approx(EPOCH + parked.at + 432.0, abs=10.0)
    assert len(scripted.api_client.seen) == 1
    assert "7 min" in str(parked.error)


def test_patience_is_used_up_over_attempts() -> None:
    attempts = [[refusal(20.0)] for _ in range(9)]
    received, scripted = run_request(*attempts, request=Request(prompt="x", patience=70.0))
    assert isinstance(ending(received), Parked)
    assert len(scripted.api_client.seen) == 4
    assert ending(received).reply.waited <= 70.0


@pytest.mark.parametrize(
    ("stated", "grown"), [(0.006, 2.0), (1.0, 20.0), (20.0, 20.0), (300.0, 300.0)]
)
def test_stated_wait_that_proves_too_short_grows(stated: float, grown: float) -> None:
    attempts = [[refusal(stated)] for _ in range(10)]
    request = Request(prompt="x", patience=10_000.0)
    _, scripted = run_request(*attempts, answer("hi"), request=request)
    sent = [at for at, _ in scripted.api_client.seen]
    waits = [b - a for a, b in itertools.pairwise(sent)]
    assert stated <= waits[0] <= 1.1 * stated + 0.1  # the first is as stated
    assert waits == sorted(waits) or stated >= 20.0
    assert all(wait >= stated for wait in waits)
    assert grown <= waits[-1] <= max(62.0, 1.1 * stated)


def test_repeated_short_stated_waits_stay_within_patience() -> None:
    attempts = [[refusal(0.006)] for _ in range(99)]
    received, scripted = run_request(*attempts, request=Request(prompt="x", patience=3.0))
    assert isinstance(ending(received), Parked)
    assert len(scripted.api_client.seen) < 15
    assert 2.9 <= ending(received).reply.waited <= 3.0


def test_silence_before_a_fault_uses_patience() -> None:
    attempts = [[STARTED, 50.0, TransportError("silent")] for _ in range(9)]
    received, scripted = run_request(*attempts, request=Request(prompt="x", patience=120.0))
    assert isinstance(ending(received), Parked)
    assert len(scripted.api_client.seen) == 3


def test_limit_without_stated_wait_backs_off_exponentially() -> None:
    attempts = [[refusal(None)] for _ in range(5)]
    _, scripted = run_request(*attempts, answer("hi"))
    sent = [at for at, _ in scripted.api_client.seen]
    waits = [b - a for a, b in itertools.pairwise(sent)]
    for number, wait in enumerate(waits):
        assert 2.0**number <= wait <= 2.0**number + 1.1


def test_daily_limit_is_waited_out_within_patience() -> None:
    received, _ = run_request(
        [refusal(3600.0)], answer("hi"), request=Request(prompt="x", patience=7200.0)
    )
    assert 3600 <= ending(received).reply.waited <= 3606


def test_one_refusal_closes_the_model_for_all() -> None:
    async def main() -> ScriptedServices:
        scripted = ScriptedServices([refusal(30.0)], answer("a"), answer("b"), answer("c"))
        runs = [scripted.start(Request(prompt="first"))]
        await asyncio.sleep(1)
        runs += [scripted.start(Request(prompt=p)) for p in ("second", "third")]
        await asyncio.wait([run.task for run in runs])
        return scripted

    scripted = run_virtual(main())
    first, second, third = scripted.events.values()
    assert kinds(first).count("BackingOff") == 1
    for received in (second, third):
        (cooldown,) = [e for e in received if isinstance(e, CoolingDown)]
        assert cooldown.limit == TPM
        assert isinstance(ending(received), Finished)


def test_end_of_cooldown_sends_only_what_fits() -> None:
    empty = Limit(resource="tokens", window=60.0, limit=30_000, used=30_000, requested=14_000)
    refused = LimitError("Rate limit reached.", limit=empty, wait=30.0)

    async def main() -> ScriptedServices:
        scripted = ScriptedServices([refused], [2.0, refused], *[answer("x")] * 6)
        runs = [scripted.start(Request(prompt="0", max_output=14_000))]
        await asyncio.sleep(1)
        runs += [scripted.start(Request(prompt=str(n), max_output=14_000)) for n in range(1, 6)]
        await asyncio.wait([run.task for run in runs])
        return scripted

    scripted = run_virtual(main())
    start = scripted.api_client.seen[0][0]
    assert len([at for at, _ in scripted.api_client.seen if at - start < 60.0]) == 2


def test_retry_now_probes_the_cooldown() -> None:
    async def main() -> ScriptedServices:
        scripted = ScriptedServices([refusal(300.0)], answer("hi"))
        run = scripted.start(Request(prompt="x"))
        asyncio.get_running_loop().call_later(5.0, run.retry_now)
        await asyncio.wait([run.task])
        return scripted

    scripted = run_virtual(main())
    (first, _), (second, _) = scripted.api_client.seen
    assert second - first == pytest.approx(5.0, abs=0.01)


def test_refused_probe_keeps_the_cooldown() -> None:
    async def main() -> ScriptedServices:
        scripted = ScriptedServices([refusal(300.0)], [refusal(400.0)], answer("hi"))
        run = scripted.start(Request(prompt="x"))
        asyncio.get_running_loop().call_later(5.0, run.retry_now)
        await asyncio.wait([run.task])
        return scripted

    scripted = run_virtual(main())
    (received,) = scripted.events.values()
    moments = {e.resume_at for e in received if isinstance(e, BackingOff)}
    assert len(moments) == 1
    assert scripted.api_client.seen[2][0] == pytest.approx(moments.pop(), abs=0.01)


@pytest.mark.parametrize(
    ("what", "kind"), [("stop", "Interrupted"), ("cancel", "Cancelled"), ("park", "Parked")]
)
@pytest.mark.parametrize(
    "attempt",
    [[refusal(100.0)], [STARTED, TextDelta("partial"), 100.0], [100.0], [TransportError("cut")]],
    ids=["countdown", "stream", "stall", "backoff"],
)
def test_stop_cancel_and_park_end_a_request_anywhere(attempt: Any, what: Any, kind: str) -> None:
    """Its text is kept."""
    at = 0.5
    received, _ = run_request(attempt, request=Request(prompt="x"), actions=[(at, what)])
    assert type(ending(received)).__name__ == kind
    assert received[-1].at - received[0].at == pytest.approx(at, abs=0.01)
    assert ending(received).reply.text == ("partial" if TextDelta("partial") in attempt else "")
    assert not ending(received).reply


def test_request_stopped_before_its_first_step_is_never_sent() -> None:
    async def main() -> ScriptedServices:
        scripted = ScriptedServices(answer("hi"))
        run = scripted.start(Request(prompt="x"))
        run.end("stop")
        await asyncio.wait([run.task])
        return scripted

    scripted = run_virtual(main())
    (received,) = scripted.events.values()
    assert kinds(received) == ["Queued", "Interrupted"]
    assert scripted.api_client.seen == []


def test_usage_of_stopped_answer_is_estimated() -> None:
    received, _ = run_request([STARTED, TextDelta("partial"), 9.0], actions=[(1.0, "stop")])
    usage = ending(received).reply.usage
    assert usage.estimated
    assert usage.output_tokens >= 1


def test_raising_listener_does_not_end_the_request() -> None:
    async def main() -> list[Event]:
        scripted = ScriptedServices(answer("hi"))
        received: list[Event] = []

        def fail(event: Event) -> None:
            raise RuntimeError(f"a defect of the listener of {event}")

        request, listeners = Request(prompt="x"), (fail, received.append)
        handle = Handle(request, SETTINGS, services=lambda: scripted.services, listeners=listeners)
        run = RequestRunner(scripted.services, request, SETTINGS, handle._on_event).start()
        await asyncio.wait([run.task])
        return received

    assert kinds(run_virtual(main()))[-1] == "Finished"


def test_defect_ends_in_a_failed_event() -> None:
    received, _ = run_request([ZeroDivisionError("oops")])
    assert isinstance(ending(received), events.Failed)


def test_retry_budget_bounds_retries_in_an_outage() -> None:
    async def main() -> ScriptedServices:
        scripted = ScriptedServices(*[[ServerError("500")] for _ in range(2000)])
        runs = [scripted.start(Request(prompt=str(n), patience=120.0)) for n in range(100)]
        await asyncio.wait([run.task for run in runs])
        return scripted

    scripted = run_virtual(main())
    retries = len(scripted.api_client.seen) - 100
    assert retries <= 10 + 0.1 * 125 + 1


def test_recovered_server_is_soon_used_fully_again() -> None:
    """A burst of failures must not delay or park the rest of a map (langextract #240)."""

    async def main() -> tuple[ScriptedServices, float]:
        failures = [[OverloadedError("503")] for _ in range(100)]
        scripted = ScriptedServices(*failures, *[answer("hi") for _ in range(100)])
        runs = [scripted.start(Request(prompt=str(n), patience=60.0)) for n in range(100)]
        started_at = asyncio.get_running_loop().time()
        await asyncio.wait([run.task for run in runs])
        return scripted, asyncio.get_running_loop().time() - started_at

    scripted, seconds = run_virtual(main())
    assert len(scripted.api_client.seen) == 200
    assert seconds < 15


def test_success_does_not_shorten_the_wait_that_the_server_has_stated() -> None:
    async def main() -> ScriptedServices:
        failures = [[OverloadedError("503", wait=30.0)] for _ in range(20)]
        scripted = ScriptedServices(*failures, *[answer("hi") for _ in range(30)])
        runs = [scripted.start(Request(prompt=str(n), patience=600.0)) for n in range(20)]
        await asyncio.sleep(1.0)
        runs += [scripted.start(Request(prompt="later", patience=600.0)) for _ in range(10)]
        await asyncio.wait([run.task for run in runs])
        return scripted

    sent = [at for at, _ in run_virtual(main()).api_client.seen]
    assert [at - sent[0] >= 30.0 for at in sent[30:]] == [True] * 20


def test_wait_for_the_retry_budget_that_has_ended_is_forgotten() -> None:
    """In an outage, waits end by time, and by Stop."""

    async def main() -> ScriptedServices:
        scripted = ScriptedServices(*[[ServerError("500")] for _ in range(2000)])
        runs = [scripted.start(Request(prompt=str(n), patience=60.0)) for n in range(50)]
        await asyncio.sleep(5.0)
        runs[0].end("stop")
        await asyncio.wait([run.task for run in runs])
        return scripted

    scripted = run_virtual(main())
    budgets = scripted.services.retry_budgets.values()
    assert [len(budget.waiting) for budget in budgets] == [0]


def test_retries_wait_while_no_request_succeeds() -> None:
    budget, events = RetryBudget(), [asyncio.Event() for _ in range(5)]
    budget.waiting.update(dict.fromkeys(events))
    budget.record_success(0.0)
    assert [event.is_set() for event in events] == [True, True, False, False, False]
    assert list(budget.waiting) == events[2:]


def test_overload_backs_off_without_closing_the_model() -> None:
    received, _ = run_request([OverloadedError("busy")], answer("hi"))
    (backing,) = [e for e in received if isinstance(e, BackingOff)]
    assert backing.limit is None
    assert [e for e in received if isinstance(e, Sent)][1].at >= received[0].at + 1.0


def test_waits_grow_even_where_short_ones_are_stated() -> None:
    attempts = [[ServerError("503", wait=0.2)] for _ in range(5)]
    _, scripted = run_request(*attempts, answer("hi"))
    sent = [at for at, _ in scripted.api_client.seen]
    for number, (first, second) in enumerate(itertools.pairwise(sent)):
        assert second - first >= 2.0**number


def test_usage_of_answer_without_figures_is_estimated() -> None:
    done = CompletedAnswer(text="hi", usage=Usage(), model="m-1", cut=None, response_id=None)
    received, _ = run_request([STARTED, TextDelta("hi"), done])
    assert ending(received).reply.usage.estimated


def test_nothing_is_sent_or_shown_before_it_is_committed() -> None:
    async def main() -> list[str]:
        scripted = ScriptedServices(answer("hi"))
        log: list[str] = []
        scripted.journal.written = CallRecorder(log)  # type: ignore[assignment]
        run = RequestRunner(
            scripted.services,
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


class CallRecorder:
    """Records the calls of a journal in a list."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def append(self, written: tuple[str, Any]) -> None:
        self._log.append(written[0])


def test_text_is_stored_every_second() -> None:
    pieces: list[Any] = [STARTED]
    for _ in range(50):
        pieces += [TextDelta("x"), 0.1]
    _, scripted = run_request([*pieces, TransportError("cut")], actions=[(4.95, "stop")])
    kept = [text for verb, text in scripted.journal.written if verb == "update_text"]
    assert len(kept) == 6
    lengths = [0, *map(len, kept)]
    assert max(b - a for a, b in itertools.pairwise(lengths)) <= 10
    assert len(kept[-1]) >= 40


def test_entry_claimed_by_another_kernel_is_not_sent() -> None:
    async def main() -> ScriptedServices:
        scripted = ScriptedServices(answer("hi"))
        scripted.journal.claimable = False
        received: list[Event] = scripted.events.setdefault("", [])
        run = RequestRunner(
            scripted.services,
            Request(prompt="x"),
            SETTINGS,
            received.append,
            resumption=Resumption(),
        ).start()
        await asyncio.wait([run.task])
        return scripted

    scripted = run_virtual(main())
    assert isinstance(scripted.events[""][-1], events.Failed)
    assert scripted.api_client.seen == []
    assert [verb for verb, _ in scripted.journal.written] == ["claim"]


@pytest.mark.parametrize(
    ("stated", "estimated"),
    [
        (Usage(input_tokens=0, output_tokens=0), True),
        (Usage(output_tokens=3), True),
        (Usage(input_tokens=7), True),
        (Usage(input_tokens=7, output_tokens=0), True),
        (Usage(input_tokens=7, output_tokens=3), False),
    ],
)
def test_estimate_counts_where_the_server_states_no_plausible_usage(
    stated: Usage, estimated: bool
) -> None:
    text = "a long enough answer"
    completed = CompletedAnswer(text=text, usage=stated, model="m-1", cut=None, response_id=None)
    received, _ = run_request([STARTED, TextDelta(text), completed])
    usage = ending(received).reply.usage
    assert usage.estimated == estimated
    assert usage.input_tokens
    assert usage.input_tokens == stated.input_tokens or stated.input_tokens in {None, 0}
    assert usage.output_tokens
    assert usage.output_tokens == stated.output_tokens or stated.output_tokens in {None, 0}


@pytest.mark.parametrize(
    ("written_for", "is_sent"),
    [(None, True), ("api.openai.com", True), ("gateway.example", False), ("localhost", False)],
)
@pytest.mark.parametrize("at_reset", [True, False])
def test_entry_is_resumed_only_at_the_server_that_it_was_written_for(
    written_for: str | None, is_sent: bool, at_reset: bool
) -> None:
    """Otherwise its entry is not touched, so that it can still be resumed at that server."""

    async def main() -> ScriptedServices:
        scripted = ScriptedServices(answer("hi"))
        received: list[Event] = scripted.events.setdefault("", [])
        run = RequestRunner(
            scripted.services,
            Request(prompt="x").with_server(written_for),
            SETTINGS,
            received.append,
            resumption=Resumption(EPOCH + 9_000.0 if at_reset else None),
        ).start()
        await asyncio.wait([run.task])
        return scripted

    scripted = run_virtual(main())
    last = scripted.events[""][-1]
    assert len(scripted.api_client.seen) == is_sent
    if is_sent:
        assert isinstance(last, events.Finished)
    else:
        assert isinstance(last, events.Failed)
        assert "Not sent" in str(last.error)
        assert scripted.journal.written == []
        assert not any(isinstance(e, CoolingDown) for e in scripted.events[""])


@pytest.mark.parametrize(
    ("written_for", "is_sent"), [("api.openai.com", True), ("gateway.example", False)]
)
def test_server_of_a_custom_client_is_known_before_an_entry_is_resumed(
    written_for: str, is_sent: bool
) -> None:
    """A client that an async factory makes has no address until it is made."""

    async def main() -> ScriptedServices:
        scripted = ScriptedServices(answer("hi"))
        client, endpoint = scripted.api_client, scripted.api_client.endpoint

        async def await_endpoint(request: Request, settings: Any) -> Endpoint:
            return endpoint(request, settings)

        def unknown(request: Request, settings: Any) -> Endpoint:
            return replace(endpoint(request, settings), base_url="", host="")

        client.await_endpoint, client.endpoint = await_endpoint, unknown  # type: ignore[method-assign]
        received: list[Event] = scripted.events.setdefault("", [])
        request = Request(prompt="x").with_server(written_for)
        run = RequestRunner(
            scripted.services, request, SETTINGS, received.append, resumption=Resumption()
        ).start()
        await asyncio.wait([run.task])
        return scripted

    scripted = run_virtual(main())
    assert len(scripted.api_client.seen) == is_sent
    assert isinstance(scripted.events[""][-1], events.Finished if is_sent else events.Failed)


@pytest.mark.parametrize(
    ("api_base", "server"), [(None, "api.openai.com"), ("http://127.0.0.1:1/v1", "localhost")]
)
def test_entry_names_the_server_that_it_was_written_for(api_base: str | None, server: str) -> None:
    async def main() -> ScriptedServices:
        scripted = ScriptedServices(answer("hi"))
        settings = replace(SETTINGS, keys={"127.0.0.1:*": Secret("k")})
        request = Request(prompt="x", api_base=api_base)
        run = RequestRunner(scripted.services, request, settings, lambda _: None).start()
        await asyncio.wait([run.task])
        return scripted

    verb, stored = run_virtual(main()).journal.written[0]
    assert (verb, stored.origin.server) == ("insert", server)
