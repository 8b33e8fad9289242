"""Durable answers: positions are yielded with the text, and broken streams are resumed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from nbcodex.errors import (
    AnswerLostError,
    CredentialsError,
    LimitError,
    NbcodexError,
    TransportError,
)
from nbcodex.models import Request, StreamPosition, Usage
from nbcodex.openai_api.answers import (
    CompletedAnswer,
    Notice,
    Reset,
    ResponseStarted,
    StreamEvent,
    TextDelta,
)
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.simulator import Fault, Knobs, Simulator
from tests.openai_api.scripted import (
    BASE,
    KEY,
    MODEL,
    Body,
    Script,
    Server,
    Silence,
    event,
    refusal,
    settings,
    text_of,
)
from tests.simulator_transport import SimulatorTransport
from tests.virtual import LoopClock, run_virtual

WORDS = "one two three four five six seven eight nine ten"
REQUEST = Request(prompt=f"[[echo: {WORDS}]]", durable=True)


class Reader:
    """Reads durable answers of one server as the runner does, and records the events."""

    def __init__(self, transport: Any, **chosen: Any) -> None:
        self.settings = settings(**chosen)
        self.api_client = ApiClient(clock=LoopClock(), transport=transport)
        self.received: list[StreamEvent] = []

    @property
    def text(self) -> str:
        return text_of(self.received)

    @property
    def position(self) -> StreamPosition:
        return [each for each in self.received if isinstance(each, StreamPosition)][-1]

    async def ask(self, request: Request = REQUEST) -> NbcodexError | None:
        return await self._gather(self.api_client.stream(request, self.settings, model=MODEL))

    async def go_on(
        self,
        position: StreamPosition | None = None,
        text: str | None = None,
        request: Request = REQUEST,
    ) -> NbcodexError | None:
        return await self._gather(
            self.api_client.resume_stream(
                request,
                self.settings,
                position=position or self.position,
                text=self.text if text is None else text,
            )
        )

    async def _gather(self, received: Any) -> NbcodexError | None:
        try:
            async for each in received:
                self.received.append(each)
        except NbcodexError as error:
            return error
        return None


def with_simulator(operation: Callable[[Reader, Simulator], Any], *faults: Any) -> Any:
    """Run `operation` with a reader of a simulator that has these faults in its script."""

    async def run() -> Any:
        simulator = Simulator(Knobs(), clock=LoopClock())
        simulator.script(faults)
        return await operation(Reader(SimulatorTransport(simulator)), simulator)

    return run_virtual(run())


def with_server(operation: Callable[[Reader], Any], server: Server, **chosen: Any) -> Any:
    """Run `operation` with a reader of a scripted server."""

    async def run() -> Any:
        return await operation(Reader(server, **chosen))

    return run_virtual(run())


def created(number: int = 0, **response: Any) -> bytes:
    made = {"id": "resp_1", "status": "queued", "background": True, "model": MODEL, **response}
    return event({"type": "response.created", "response": made, "sequence_number": number})


def text_event(text: str, number: int | None) -> bytes:
    numbered = {} if number is None else {"sequence_number": number}
    return event({"type": "response.output_text.delta", "delta": text, **numbered})


def done(number: int, background: Any = True) -> bytes:
    usage = {"input_tokens": 7, "output_tokens": 3}
    made = {"id": "resp_1", "status": "completed", "background": background, "usage": usage}
    return event({"type": "response.completed", "response": made, "sequence_number": number})


def whole_answer(text: str, status: str = "completed") -> Script:
    item = {"type": "message", "content": [{"type": "output_text", "text": text}]}
    output = [item] if text else []
    body = {"id": "resp_1", "status": status, "background": True, "output": output}
    return Script([json.dumps(body).encode()], headers={"content-type": "application/json"})


BROKEN = httpx2.ReadError("reset")


def test_only_a_durable_request_has_background_and_store() -> None:
    async def operation(reader: Reader, simulator: Simulator) -> None:
        await reader.ask()
        await reader.ask(Request(prompt="Why?"))
        durable, ordinary = (seen.body for seen in simulator.log)
        assert (durable["background"], durable["store"], durable["stream"]) == (True, True, True)
        assert ordinary["store"] is False
        assert "background" not in ordinary

    with_simulator(operation)


def test_position_is_yielded_before_and_after_the_text() -> None:

    async def operation(reader: Reader) -> list[StreamEvent]:
        await reader.ask()
        return reader.received

    received = with_server(operation, Server(Script([created() + text_event("Hi", 1), done(2)])))
    assert isinstance(received[0], ResponseStarted)
    assert received[1:4] == [StreamPosition("resp_1"), TextDelta("Hi"), StreamPosition("resp_1", 1)]
    assert isinstance(received[-1], CompletedAnswer)


def test_resumed_answer_that_used_all_its_output_is_cut() -> None:
    request = Request(prompt="Why?", durable=True, max_output=3)

    async def operation(reader: Reader) -> StreamEvent:
        assert await reader.ask(request) is not None
        assert await reader.go_on(request=request) is None
        return reader.received[-1]

    broken = Script([created() + text_event("Hi", 1), BROKEN])
    ending = with_server(operation, Server(broken, Script([done(2)])))
    assert isinstance(ending, CompletedAnswer)
    assert (ending.text, ending.cut) == ("Hi", "max_output_tokens")


@pytest.mark.parametrize("after", [-1, 0, 1, 5, 9])
@pytest.mark.parametrize("kind", ["dropped", "cut", "truncated", "malformed", "stalled"])
def test_broken_stream_is_resumed_without_repeats_or_charge(kind: Any, after: int) -> None:
    async def operation(reader: Reader, simulator: Simulator) -> None:
        broke = await reader.ask()
        assert broke is not None
        if after < 0:
            assert reader.text == ""
            assert not [p for p in reader.received if isinstance(p, StreamPosition)]
            return
        assert await reader.go_on() is None
        assert reader.text.count(WORDS) == 1
        ending = reader.received[-1]
        assert isinstance(ending, CompletedAnswer)
        assert ending.text == reader.text
        assert ending.usage.output_tokens
        first, *resumed = simulator.log
        assert all(seen.charged == 0 for seen in resumed)
        assert first.finished

    with_simulator(operation, Fault(kind, after=after))


def test_stream_that_breaks_repeatedly_is_completed_and_paid_once() -> None:
    async def operation(reader: Reader, simulator: Simulator) -> None:
        assert await reader.ask()
        times = 0
        while await reader.go_on():
            times += 1
        assert times == 4
        assert reader.text.count(WORDS) == 1
        assert sum(seen.charged for seen in simulator.log) == simulator.log[0].charged

    breaks = [Fault("dropped", after=2), "cut", "truncated", "malformed", Fault("dropped", after=1)]
    with_simulator(operation, *[Fault(f, after=1) if isinstance(f, str) else f for f in breaks])


def test_break_within_a_possible_secret_loses_no_text() -> None:
    parts = [
        created(),
        text_event("your", 1),
        text_event(" thing", 2),
        text_event(f" is {KEY[:4]}", 3),
        BROKEN,
    ]

    async def operation(reader: Reader) -> None:
        assert await reader.ask()
        assert reader.text == "your thing"
        assert reader.position == StreamPosition("resp_1", 2)
        assert await reader.go_on() is None

    rest = Script([text_event(f" is {KEY[:4]}", 3), text_event("y", 4), done(5)])
    server = Server(Script(parts), rest)
    reader = with_server(_kept(operation), server)
    assert reader.text == f"your thing is {KEY[:4]}y"


def _kept(operation: Callable[[Reader], Any]) -> Callable[[Reader], Any]:
    async def run(reader: Reader) -> Reader:
        await operation(reader)
        return reader

    return run


def test_repeated_events_are_skipped() -> None:
    events = [
        created(),
        text_event("one ", 1),
        text_event("two ", 2),
        text_event("three", 3),
        done(4),
    ]

    async def operation(reader: Reader) -> None:
        assert await reader.ask()
        assert await reader.go_on() is None

    reader = with_server(_kept(operation), Server(Script([*events[:3], BROKEN]), Script(events)))
    assert reader.text == "one two three"


def test_finished_answer_without_events_is_fetched() -> None:
    server = Server(
        Script([created(), text_event("one ", 1), BROKEN]),
        refusal(400, "no stream"),
        whole_answer("one two"),
    )

    async def operation(reader: Reader) -> None:
        assert await reader.ask()
        assert await reader.go_on() is None

    reader = with_server(_kept(operation), server)
    assert reader.text == "one two"
    assert reader.received[-1].text == "one two"
    streamed, fetched = (dict(request.url.params) for request in server.requests[1:])
    assert streamed == {"stream": "true", "starting_after": "1"}
    assert fetched == {}


def test_different_fetched_answer_replaces_the_text() -> None:
    server = Server(Script([created(), text_event("one ", 1), BROKEN]), whole_answer("uno due"))

    async def operation(reader: Reader) -> None:
        assert await reader.ask()
        assert await reader.go_on() is None

    received = with_server(_kept(operation), server).received
    assert received[-3:-1] == [Reset(), TextDelta("uno due")]
    assert received[-1].text == "uno due"


@pytest.mark.parametrize("status", ["queued", "in_progress"])
def test_answer_in_progress_is_a_transient_error(status: str) -> None:
    server = Server(Script([created(), BROKEN]), refusal(404), whole_answer("", status))

    async def operation(reader: Reader) -> NbcodexError | None:
        await reader.ask()
        return await reader.go_on()

    assert isinstance(with_server(operation, server), TransportError)


def test_unfinished_answer_in_one_piece_has_a_position() -> None:
    server = Server(
        whole_answer("", "queued"), whole_answer("", "in_progress"), whole_answer("there it is")
    )

    async def operation(reader: Reader) -> None:
        assert await reader.ask()
        assert reader.position == StreamPosition("resp_1")

    assert with_server(_kept(operation), server).text == ""


@pytest.mark.parametrize(
    "answers",
    [
        [refusal(404)],
        [refusal(400)],
        [whole_answer("", "failed")],
        [whole_answer("", "cancelled")],
        [Script([event({"type": "response.failed", "response": {}})]), whole_answer("", "failed")],
        [Script([]), whole_answer("", "cancelled")],
    ],
    ids=["unknown", "refused", "failed", "cancelled", "failed in its stream", "ended stream"],
)
def test_lost_answer_is_gone(answers: list[Any]) -> None:
    """The server no longer has it, or it failed there."""

    async def operation(reader: Reader) -> NbcodexError | None:
        return await reader.go_on(StreamPosition("resp_1", 3), "text")

    assert isinstance(with_server(operation, Server(*answers)), AnswerLostError)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refusal(401), CredentialsError),
        (refusal(429, "slow down", code="rate_limit_exceeded"), LimitError),
        (refusal(500), NbcodexError),
        (httpx2.ConnectError("refused"), TransportError),
    ],
)
def test_other_errors_do_not_mean_that_the_answer_is_lost(answer: Any, kind: type) -> None:
    async def operation(reader: Reader) -> NbcodexError | None:
        return await reader.go_on(StreamPosition("resp_1", 3), "text")

    error = with_server(operation, Server(answer))
    assert isinstance(error, kind)
    assert not isinstance(error, AnswerLostError)


@pytest.mark.parametrize("kind", ["error_event", "flat_error_event", "failed", "azure_failed"])
def test_answer_that_failed_at_the_server_is_gone(kind: Any) -> None:
    async def operation(reader: Reader, simulator: Simulator) -> None:
        assert isinstance(await reader.ask(), LimitError)
        assert isinstance(await reader.go_on(), AnswerLostError)

    with_simulator(operation, Fault(kind, after=3))


def test_error_event_of_a_running_answer_does_not_lose_it() -> None:
    server = Server(
        Script([text_event("a", 4), event({"type": "error", "code": "server_error"})]),
        whole_answer("", "in_progress"),
    )

    async def operation(reader: Reader) -> NbcodexError | None:
        return await reader.go_on(StreamPosition("resp_1", 3), "text")

    assert isinstance(with_server(operation, server), TransportError)


def test_final_event_with_the_whole_text_repeats_nothing() -> None:
    item = {"type": "message", "content": [{"type": "output_text", "text": "all of it"}]}
    made = {"id": "resp_1", "status": "completed", "output": [item]}
    end = event({"type": "response.completed", "response": made, "sequence_number": 9})

    async def operation(reader: Reader) -> None:
        assert await reader.ask()
        assert await reader.go_on() is None

    server = Server(Script([created(), text_event("all of it", 8), BROKEN]), Script([end]))
    reader = with_server(_kept(operation), server)
    assert reader.text == reader.received[-1].text == "all of it"


@pytest.mark.parametrize(
    ("error", "is_unbilled"),
    [
        (httpx2.ConnectError("refused"), True),
        (httpx2.ConnectTimeout("slow"), True),
        (httpx2.ReadError("reset"), False),
        (httpx2.ReadTimeout("slow"), False),
    ],
)
def test_unmade_connection_counts_as_not_sent(error: Exception, is_unbilled: bool) -> None:
    async def operation(reader: Reader) -> NbcodexError | None:
        return await reader.ask()

    failure = with_server(operation, Server(error))
    assert isinstance(failure, TransportError)
    assert failure.is_unbilled is is_unbilled


REFUSALS = {
    "unknown parameter": refusal(400, "Unknown parameter: 'background'.", param="background"),
    "extra forbidden": refusal(422, "Extra inputs are not permitted: background"),
    "zero retention": refusal(400, "Background mode is not available with Zero Data Retention."),
    "no right to it": refusal(403, "Your organization must not store responses."),
    "no such call": refusal(404, "Not Found"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_server_without_background_mode_gets_an_ordinary_request(why: str) -> None:
    """In the same attempt; one notice says so, and the server is remembered."""

    def answer(request: httpx2.Request) -> Script:
        first = json.loads(request.content)
        return (
            REFUSALS[why]
            if first.get("background")
            else Script([text_event("Hi", 1), done(2, False)])
        )

    server = Server(answer)

    async def operation(reader: Reader) -> None:
        assert await reader.ask() is None
        assert await reader.ask() is None

    reader = with_server(_kept(operation), server)
    assert [sent.get("background") for sent in server.sent] == [True, None, None]
    assert [sent["store"] for sent in server.sent] == [True, False, False]
    assert len([p for p in reader.received if isinstance(p, Notice)]) == 1
    assert not [p for p in reader.received if isinstance(p, StreamPosition)]


@pytest.mark.parametrize("background", [False, None, "true"])
def test_server_that_ignores_background_mode_is_detected(background: Any) -> None:
    server = Server(Script([created(background=background), text_event("Hi", 1), done(2, None)]))

    async def operation(reader: Reader) -> None:
        assert await reader.ask() is None

    received = with_server(_kept(operation), server).received
    assert not [p for p in received if isinstance(p, StreamPosition)]
    assert len([p for p in received if isinstance(p, Notice)]) == 1


@pytest.mark.parametrize("api", ["chat", "auto"])
def test_durable_request_over_chat_says_that_nothing_is_kept(api: Any) -> None:
    async def operation(reader: Reader, simulator: Simulator) -> None:
        simulator.change_knobs(apis=("chat",))
        reader.settings = settings(api=api)
        assert await reader.ask() is None
        assert len([p for p in reader.received if isinstance(p, Notice)]) == 1
        assert "background" not in simulator.log[-1].body

    with_simulator(operation)


def test_refused_prompt_is_not_sent_twice() -> None:
    server = Server(refusal(400, "This prompt is not allowed.", code="invalid_prompt"))

    async def operation(reader: Reader) -> NbcodexError | None:
        return await reader.ask()

    assert type(with_server(operation, server)).__name__ == "RequestError"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "name", ["../models", "..", "a/b", "a?b=c", "", "x" * 300, 7, None, f"resp_{KEY}", "r\n1"]
)
def test_invalid_response_id_is_not_used(name: Any) -> None:
    """Nor one that contains a secret."""

    async def operation(reader: Reader) -> None:
        await reader.ask()

    server = Server(Script([created(id=name), text_event("Hi", 1), BROKEN]))
    assert not [
        p for p in with_server(_kept(operation), server).received if isinstance(p, StreamPosition)
    ]


@pytest.mark.parametrize("name", ["..", "../models", "", "a b", "r\n1"])
def test_invalid_response_id_from_the_journal_is_gone(name: str) -> None:
    server = Server(refusal(500))

    async def operation(reader: Reader) -> NbcodexError | None:
        return await reader.go_on(StreamPosition(name, 1), "text")

    assert isinstance(with_server(operation, server), AnswerLostError)
    assert server.requests == []


@pytest.mark.parametrize("number", [None, -1, "three", True, 2.5, 10**40])
def test_invalid_sequence_number_resumes_from_the_beginning(number: Any) -> None:
    odd = event({"type": "response.output_text.delta", "delta": "Hi", "sequence_number": number})

    async def operation(reader: Reader) -> None:
        assert await reader.ask()
        assert reader.position.sequence in (None, 0)

    with_server(operation, Server(Script([created(), odd, BROKEN])))


def test_cancelling_ends_the_generation_at_the_server() -> None:
    async def operation(reader: Reader, simulator: Simulator) -> None:
        simulator.change_knobs(speed=1)
        reading = asyncio.create_task(reader.ask())
        await asyncio.sleep(3)
        await reader.api_client.cancel_response(REQUEST, reader.settings, position=reader.position)
        await reading
        assert simulator.log[-1].path.endswith("/cancel")
        assert not simulator.log[0].finished
        assert isinstance(await reader.go_on(), AnswerLostError)

    with_simulator(operation)


@pytest.mark.parametrize("answer", [BROKEN, refusal(500), Script([Silence(1e6)])])
def test_failing_cancellation_raises_nothing(answer: Any) -> None:
    async def operation(reader: Reader) -> float:
        began = asyncio.get_running_loop().time()
        await reader.api_client.cancel_response(
            REQUEST, reader.settings, position=StreamPosition("resp_1", 1)
        )
        return asyncio.get_running_loop().time() - began

    assert with_server(operation, Server(answer)) <= 5.0


def test_usage_is_reported_once() -> None:
    async def operation(reader: Reader) -> None:
        assert await reader.ask()
        assert await reader.go_on() is None

    server = Server(
        Script([created(), text_event("Hi", 1), BROKEN]), Script([text_event("!", 2), done(3)])
    )
    endings = [
        p for p in with_server(_kept(operation), server).received if isinstance(p, CompletedAnswer)
    ]
    assert [ending.usage for ending in endings] == [Usage(input_tokens=7, output_tokens=3)]
    assert endings[0].text == "Hi!"


def test_silent_resumed_stream_breaks_after_the_idle_timeout() -> None:
    server = Server(Script([Silence(1e6)]), whole_answer("", "in_progress"))

    async def operation(reader: Reader) -> float:
        began = asyncio.get_running_loop().time()
        assert isinstance(await reader.go_on(StreamPosition("resp_1", 3), "text"), TransportError)
        return asyncio.get_running_loop().time() - began

    assert with_server(operation, server, idle_timeout=60.0) == pytest.approx(60.0, abs=1.0)


def test_connections_of_failed_attempts_are_closed() -> None:
    server = Server(
        Script([created(), text_event("a", 1), BROKEN]),
        Script([text_event("b", 2), BROKEN]),
        refusal(404),
    )

    async def operation(reader: Reader) -> None:
        for _ in range(3):
            with contextlib.suppress(NbcodexError):
                await (reader.go_on() if reader.received else reader.ask())

    with_server(operation, server)
    assert all(isinstance(body, Body) and body.closed for body in server.bodies)
    assert str(server.requests[1].url).startswith(f"{BASE}/responses/resp_1")


async def deleted(reader: Reader, position: StreamPosition | None = None) -> bool:
    return await reader.api_client.delete_response(
        REQUEST, reader.settings, position=position or reader.position
    )


@pytest.mark.parametrize("is_running", [False, True])
def test_deleting_removes_the_answer_at_the_server(is_running: bool) -> None:
    """One that is gone already counts as deleted, too."""

    async def operation(reader: Reader, simulator: Simulator) -> None:
        if is_running:
            simulator.change_knobs(speed=1)
            reading = asyncio.create_task(reader.ask())
            await asyncio.sleep(3)
        else:
            await reader.ask()
        assert await deleted(reader)
        assert (simulator.log[-1].method, simulator._stored) == ("DELETE", {})
        assert await deleted(reader)
        if is_running:
            await reading

    with_simulator(operation)


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param([refusal(404), Script([created()])], id="the call is not offered"),
        pytest.param([refusal(405)], id="the method is not allowed"),
        pytest.param([refusal(500)], id="the server fails"),
        pytest.param([BROKEN], id="the connection breaks"),
    ],
)
def test_answer_that_may_still_be_there_is_not_reported_as_deleted(answers: Any) -> None:
    async def operation(reader: Reader) -> bool:
        return await deleted(reader, StreamPosition("resp_1", 1))

    assert with_server(operation, Server(*answers)) is False


def test_answer_that_the_server_does_not_know_is_deleted() -> None:
    async def operation(reader: Reader) -> bool:
        return await deleted(reader, StreamPosition("resp_1", 1))

    assert with_server(operation, Server(refusal(404))) is True


@pytest.mark.parametrize("name", ["..", "../models", "", "a b"])
def test_invalid_response_id_is_not_used_for_a_deletion(name: str) -> None:
    server = Server(refusal(404))

    async def operation(reader: Reader) -> bool:
        return await deleted(reader, StreamPosition(name, 1))

    assert with_server(operation, server) is False
    assert server.requests == []
