"""Durable answers on the wire: marked as they are read, picked up at the mark, paid once."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from nbcodex.errors import CredentialsError, GoneError, LimitError, NbcodexError, TransportError
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
from nbcodex.simulator.transport import SimulatorTransport
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
from tests.virtual import LoopClock, run_virtual

WORDS = "one two three four five six seven eight nine ten"
REQUEST = Request(prompt=f"[[echo: {WORDS}]]", durable=True)


class Reader:
    """Reads durable answers of one server as the engine does, and keeps what came."""

    def __init__(self, transport: Any, **chosen: Any) -> None:
        self.settings = settings(**chosen)
        self.api_client = ApiClient(clock=LoopClock(), transport=transport)
        self.pieces: list[StreamEvent] = []

    @property
    def text(self) -> str:
        return text_of(self.pieces)

    @property
    def mark(self) -> StreamPosition:
        return [piece for piece in self.pieces if isinstance(piece, StreamPosition)][-1]

    async def ask(self, request: Request = REQUEST) -> NbcodexError | None:
        return await self._gather(self.api_client.stream(request, self.settings, model=MODEL))

    async def go_on(
        self, mark: StreamPosition | None = None, text: str | None = None
    ) -> NbcodexError | None:
        return await self._gather(
            self.api_client.resume_stream(
                REQUEST,
                self.settings,
                mark=mark or self.mark,
                text=self.text if text is None else text,
            )
        )

    async def _gather(self, pieces: Any) -> NbcodexError | None:
        try:
            async for piece in pieces:
                self.pieces.append(piece)
        except NbcodexError as error:
            return error
        return None


def with_simulator(deed: Callable[[Reader, Simulator], Any], *faults: Any) -> Any:
    """Run `deed` with a reader of a simulator that has these faults in its script."""

    async def run() -> Any:
        simulator = Simulator(Knobs(), clock=LoopClock())
        simulator.script(faults)
        return await deed(Reader(SimulatorTransport(simulator)), simulator)

    return run_virtual(run())


def with_server(deed: Callable[[Reader], Any], server: Server, **chosen: Any) -> Any:
    """Run `deed` with a reader of a scripted server."""

    async def run() -> Any:
        return await deed(Reader(server, **chosen))

    return run_virtual(run())


def created(number: int = 0, **response: Any) -> bytes:
    made = {"id": "resp_1", "status": "queued", "background": True, "model": MODEL, **response}
    return event({"type": "response.created", "response": made, "sequence_number": number})


def said(text: str, number: int | None) -> bytes:
    numbered = {} if number is None else {"sequence_number": number}
    return event({"type": "response.output_text.delta", "delta": text, **numbered})


def done(number: int, background: Any = True) -> bytes:
    usage = {"input_tokens": 7, "output_tokens": 3}
    made = {"id": "resp_1", "status": "completed", "background": background, "usage": usage}
    return event({"type": "response.completed", "response": made, "sequence_number": number})


def whole(text: str, status: str = "completed") -> Script:
    item = {"type": "message", "content": [{"type": "output_text", "text": text}]}
    output = [item] if text else []
    body = {"id": "resp_1", "status": status, "background": True, "output": output}
    return Script([json.dumps(body).encode()], headers={"content-type": "application/json"})


BROKEN = httpx2.ReadError("reset")


def test_the_body_asks_for_it() -> None:
    """A durable request goes with background and store; any other has neither."""

    async def deed(reader: Reader, simulator: Simulator) -> None:
        await reader.ask()
        await reader.ask(Request(prompt="Why?"))
        durable, ordinary = (seen.body for seen in simulator.log)
        assert (durable["background"], durable["store"], durable["stream"]) == (True, True, True)
        assert ordinary["store"] is False
        assert "background" not in ordinary

    with_simulator(deed)


def test_the_name_comes_before_the_text_and_the_mark_behind_it() -> None:
    """Even where one network chunk brings both."""

    async def deed(reader: Reader) -> list[StreamEvent]:
        await reader.ask()
        return reader.pieces

    pieces = with_server(deed, Server(Script([created() + said("Hi", 1), done(2)])))
    assert isinstance(pieces[0], ResponseStarted)
    assert pieces[1:4] == [StreamPosition("resp_1"), TextDelta("Hi"), StreamPosition("resp_1", 1)]
    assert isinstance(pieces[-1], CompletedAnswer)


@pytest.mark.parametrize("after", [-1, 0, 1, 5, 9])
@pytest.mark.parametrize("kind", ["dropped", "cut", "truncated", "malformed", "stalled"])
def test_a_broken_stream_goes_on(kind: Any, after: int) -> None:
    """Whatever breaks the delivery, the rest is picked up: nothing doubled, nothing paid again."""

    async def deed(reader: Reader, simulator: Simulator) -> None:
        broke = await reader.ask()
        assert broke is not None
        if after < 0:
            assert reader.text == ""
            assert not [p for p in reader.pieces if isinstance(p, StreamPosition)]
            return
        assert await reader.go_on() is None
        assert reader.text.count(WORDS) == 1
        ending = reader.pieces[-1]
        assert isinstance(ending, CompletedAnswer)
        assert ending.text == reader.text
        assert ending.usage.output_tokens
        asked, *picked_up = simulator.log
        assert all(seen.charged == 0 for seen in picked_up)
        assert asked.finished

    with_simulator(deed, Fault(kind, after=after))


def test_every_break_is_picked_up() -> None:
    """A stream that breaks again and again still becomes the whole answer, paid once."""

    async def deed(reader: Reader, simulator: Simulator) -> None:
        assert await reader.ask()
        times = 0
        while await reader.go_on():
            times += 1
        assert times == 4
        assert reader.text.count(WORDS) == 1
        assert simulator.charged == simulator.log[0].charged

    breaks = [Fault("dropped", after=2), "cut", "truncated", "malformed", Fault("dropped", after=1)]
    with_simulator(deed, *[Fault(f, after=1) if isinstance(f, str) else f for f in breaks])


def test_what_the_redactor_holds_back_is_not_lost() -> None:
    """A break behind the beginning of a secret loses and doubles no character."""
    parts = [created(), said("your", 1), said(" thing", 2), said(f" is {KEY[:4]}", 3), BROKEN]

    async def deed(reader: Reader) -> None:
        assert await reader.ask()
        assert reader.text == "your thing"
        assert reader.mark == StreamPosition("resp_1", 2)
        assert await reader.go_on() is None

    rest = Script([said(f" is {KEY[:4]}", 3), said("y", 4), done(5)])
    server = Server(Script(parts), rest)
    reader = with_server(_kept(deed), server)
    assert reader.text == f"your thing is {KEY[:4]}y"


def _kept(deed: Callable[[Reader], Any]) -> Callable[[Reader], Any]:
    async def run(reader: Reader) -> Reader:
        await deed(reader)
        return reader

    return run


def test_a_server_that_begins_again_at_the_beginning_doubles_nothing() -> None:
    """Events that were read before are not read again."""
    events = [created(), said("one ", 1), said("two ", 2), said("three", 3), done(4)]

    async def deed(reader: Reader) -> None:
        assert await reader.ask()
        assert await reader.go_on() is None

    reader = with_server(_kept(deed), Server(Script([*events[:3], BROKEN]), Script(events)))
    assert reader.text == "one two three"


def test_a_finished_answer_is_fetched_whole() -> None:
    """Where the server has the answer but not its events, only the rest of it is added."""
    server = Server(
        Script([created(), said("one ", 1), BROKEN]), refusal(400, "no stream"), whole("one two")
    )

    async def deed(reader: Reader) -> None:
        assert await reader.ask()
        assert await reader.go_on() is None

    reader = with_server(_kept(deed), server)
    assert reader.text == "one two"
    assert reader.pieces[-1].text == "one two"
    streamed, fetched = (dict(request.url.params) for request in server.requests[1:])
    assert streamed == {"stream": "true", "starting_after": "1"}
    assert fetched == {}


def test_a_whole_answer_that_differs_replaces_what_was_shown() -> None:
    """The server's answer is the answer."""
    server = Server(Script([created(), said("one ", 1), BROKEN]), whole("uno due"))

    async def deed(reader: Reader) -> None:
        assert await reader.ask()
        assert await reader.go_on() is None

    pieces = with_server(_kept(deed), server).pieces
    assert pieces[-3:-1] == [Reset(), TextDelta("uno due")]
    assert pieces[-1].text == "uno due"


@pytest.mark.parametrize("status", ["queued", "in_progress"])
def test_an_answer_that_is_still_being_made_is_waited_for(status: str) -> None:
    """Neither finished nor lost: there is more to come, and another attempt brings it."""
    server = Server(Script([created(), BROKEN]), refusal(404), whole("", status))

    async def deed(reader: Reader) -> NbcodexError | None:
        await reader.ask()
        return await reader.go_on()

    assert isinstance(with_server(deed, server), TransportError)


def test_an_unfinished_answer_in_one_piece_tells_its_name() -> None:
    """A server that keeps answers and does not stream them is not paid for each look."""
    server = Server(whole("", "queued"), whole("", "in_progress"), whole("there it is"))

    async def deed(reader: Reader) -> None:
        assert await reader.ask()
        assert reader.mark == StreamPosition("resp_1")

    assert with_server(_kept(deed), server).text == ""


@pytest.mark.parametrize(
    "answers",
    [
        [refusal(404)],
        [refusal(400)],
        [whole("", "failed")],
        [whole("", "cancelled")],
        [Script([event({"type": "response.failed", "response": {}})]), whole("", "failed")],
        [Script([]), whole("", "cancelled")],
    ],
    ids=["unknown", "refused", "failed", "cancelled", "failed in its stream", "ended stream"],
)
def test_a_lost_answer(answers: list[Any]) -> None:
    """What the server no longer has, or what failed there, has to be asked anew."""

    async def deed(reader: Reader) -> NbcodexError | None:
        return await reader.go_on(StreamPosition("resp_1", 3), "text")

    assert isinstance(with_server(deed, Server(*answers)), GoneError)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refusal(401), CredentialsError),
        (refusal(429, "slow down", code="rate_limit_exceeded"), LimitError),
        (refusal(500), NbcodexError),
        (httpx2.ConnectError("refused"), TransportError),
    ],
)
def test_not_every_failure_means_that_the_answer_is_lost(answer: Any, kind: type) -> None:
    """A key that is refused, a limit, a server in trouble: the answer is not asked anew."""

    async def deed(reader: Reader) -> NbcodexError | None:
        return await reader.go_on(StreamPosition("resp_1", 3), "text")

    error = with_server(deed, Server(answer))
    assert isinstance(error, kind)
    assert not isinstance(error, GoneError)


@pytest.mark.parametrize("kind", ["error_event", "flat_error_event", "failed", "azure_failed"])
def test_a_failure_of_the_generation_is_final(kind: Any) -> None:
    """An answer that failed at the server is not read again and again."""

    async def deed(reader: Reader, simulator: Simulator) -> None:
        assert isinstance(await reader.ask(), LimitError)
        assert isinstance(await reader.go_on(), GoneError)

    with_simulator(deed, Fault(kind, after=3))


def test_an_error_event_is_not_the_end_of_an_answer_that_goes_on() -> None:
    """Whether the stream or the answer failed, the server is asked; what goes on is not lost."""
    server = Server(
        Script([said("a", 4), event({"type": "error", "code": "server_error"})]),
        whole("", "in_progress"),
    )

    async def deed(reader: Reader) -> NbcodexError | None:
        return await reader.go_on(StreamPosition("resp_1", 3), "text")

    assert isinstance(with_server(deed, server), TransportError)


def test_an_end_that_repeats_the_answer_doubles_nothing() -> None:
    """Where only the last event is missing, the text in it is not added to what was shown."""
    item = {"type": "message", "content": [{"type": "output_text", "text": "all of it"}]}
    made = {"id": "resp_1", "status": "completed", "output": [item]}
    end = event({"type": "response.completed", "response": made, "sequence_number": 9})

    async def deed(reader: Reader) -> None:
        assert await reader.ask()
        assert await reader.go_on() is None

    server = Server(Script([created(), said("all of it", 8), BROKEN]), Script([end]))
    reader = with_server(_kept(deed), server)
    assert reader.text == reader.pieces[-1].text == "all of it"


@pytest.mark.parametrize(
    ("error", "was_sent"),
    [
        (httpx2.ConnectError("refused"), False),
        (httpx2.ConnectTimeout("slow"), False),
        (httpx2.ReadError("reset"), True),
        (httpx2.ReadTimeout("slow"), True),
    ],
)
def test_what_was_not_sent_cannot_be_paid(error: Exception, was_sent: bool) -> None:
    """A connection that was never made is told apart from one that broke."""

    async def deed(reader: Reader) -> NbcodexError | None:
        return await reader.ask()

    failure = with_server(deed, Server(error))
    assert isinstance(failure, TransportError)
    assert failure.was_sent is was_sent


REFUSALS = {
    "unknown parameter": refusal(400, "Unknown parameter: 'background'.", param="background"),
    "extra forbidden": refusal(422, "Extra inputs are not permitted: background"),
    "zero retention": refusal(400, "Background mode is not available with Zero Data Retention."),
    "no right to it": refusal(403, "Your organization must not store responses."),
    "no such call": refusal(404, "Not Found"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_where_the_server_cannot_an_ordinary_request_goes(why: str) -> None:
    """It falls back in the same attempt, says so once, and does not try again next time."""

    def answer(request: httpx2.Request) -> Script:
        asked = json.loads(request.content)
        return REFUSALS[why] if asked.get("background") else Script([said("Hi", 1), done(2, False)])

    server = Server(answer)

    async def deed(reader: Reader) -> None:
        assert await reader.ask() is None
        assert await reader.ask() is None

    reader = with_server(_kept(deed), server)
    assert [sent.get("background") for sent in server.sent] == [True, None, None]
    assert [sent["store"] for sent in server.sent] == [True, False, False]
    assert len([p for p in reader.pieces if isinstance(p, Notice)]) == 1
    assert not [p for p in reader.pieces if isinstance(p, StreamPosition)]


@pytest.mark.parametrize("background", [False, None, "true"])
def test_a_server_that_ignores_it_is_found_out(background: Any) -> None:
    """No word of background in what comes back: the answer is not durable, and that is said."""
    server = Server(Script([created(background=background), said("Hi", 1), done(2, None)]))

    async def deed(reader: Reader) -> None:
        assert await reader.ask() is None

    pieces = with_server(_kept(deed), server).pieces
    assert not [p for p in pieces if isinstance(p, StreamPosition)]
    assert len([p for p in pieces if isinstance(p, Notice)]) == 1


@pytest.mark.parametrize("api", ["chat", "auto"])
def test_chat_completions_keep_nothing(api: Any) -> None:
    """A server that speaks only the other API answers, and it is said that nothing is kept."""

    async def deed(reader: Reader, simulator: Simulator) -> None:
        simulator.change_knobs(apis=("chat",))
        reader.settings = settings(api=api)
        assert await reader.ask() is None
        assert len([p for p in reader.pieces if isinstance(p, Notice)]) == 1
        assert "background" not in simulator.log[-1].body

    with_simulator(deed)


def test_another_refusal_is_told_as_ever() -> None:
    """A prompt that is refused is not sent twice."""
    server = Server(refusal(400, "This prompt is not allowed.", code="invalid_prompt"))

    async def deed(reader: Reader) -> NbcodexError | None:
        return await reader.ask()

    assert type(with_server(deed, server)).__name__ == "RequestError"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "name", ["../models", "..", "a/b", "a?b=c", "", "x" * 300, 7, None, f"resp_{KEY}", "r\n1"]
)
def test_a_hostile_name_is_not_used(name: Any) -> None:
    """What cannot be a name is put in no address; a secret in it is kept nowhere."""

    async def deed(reader: Reader) -> None:
        await reader.ask()

    server = Server(Script([created(id=name), said("Hi", 1), BROKEN]))
    assert not [p for p in with_server(_kept(deed), server).pieces if isinstance(p, StreamPosition)]


@pytest.mark.parametrize("name", ["..", "../models", "", "a b", "r\n1"])
def test_a_damaged_journal_leads_nowhere(name: str) -> None:
    """A name from the journal that is none is asked of nobody."""
    server = Server(refusal(500))

    async def deed(reader: Reader) -> NbcodexError | None:
        return await reader.go_on(StreamPosition(name, 1), "text")

    assert isinstance(with_server(deed, server), GoneError)
    assert server.requests == []


@pytest.mark.parametrize("number", [None, -1, "3", True, 2.5, 10**40])
def test_a_hostile_sequence_number_is_none(number: Any) -> None:
    """Where events are not numbered, the answer is picked up from its beginning."""
    odd = event({"type": "response.output_text.delta", "delta": "Hi", "sequence_number": number})

    async def deed(reader: Reader) -> None:
        assert await reader.ask()
        assert reader.mark.sequence in (None, 0)

    with_server(deed, Server(Script([created(), odd, BROKEN])))


def test_a_cancelled_answer_ends_at_the_server() -> None:
    """Cancelling stops the generation there."""

    async def deed(reader: Reader, simulator: Simulator) -> None:
        simulator.change_knobs(speed=1)
        reading = asyncio.create_task(reader.ask())
        await asyncio.sleep(3)
        await reader.api_client.cancel_response(REQUEST, reader.settings, mark=reader.mark)
        await reading
        assert simulator.log[-1].path.endswith("/cancel")
        assert not simulator.log[0].finished
        assert isinstance(await reader.go_on(), GoneError)

    with_simulator(deed)


@pytest.mark.parametrize("answer", [BROKEN, refusal(500), Script([Silence(1e6)])])
def test_cancelling_is_tried_and_no_more(answer: Any) -> None:
    """A server that cannot be told holds nobody up."""

    async def deed(reader: Reader) -> float:
        began = asyncio.get_running_loop().time()
        await reader.api_client.cancel_response(
            REQUEST, reader.settings, mark=StreamPosition("resp_1", 1)
        )
        return asyncio.get_running_loop().time() - began

    assert with_server(deed, Server(answer)) <= 5.0


def test_the_figures_come_once() -> None:
    """The server's usage is in the one attempt that reads the end."""

    async def deed(reader: Reader) -> None:
        assert await reader.ask()
        assert await reader.go_on() is None

    server = Server(Script([created(), said("Hi", 1), BROKEN]), Script([said("!", 2), done(3)]))
    endings = [p for p in with_server(_kept(deed), server).pieces if isinstance(p, CompletedAnswer)]
    assert [ending.usage for ending in endings] == [Usage(input_tokens=7, output_tokens=3)]
    assert endings[0].text == "Hi!"


def test_silence_is_noticed_as_soon_as_in_any_stream() -> None:
    """Behind text that has begun, a silent pick-up breaks after the idle timeout."""
    server = Server(Script([Silence(1e6)]), whole("", "in_progress"))

    async def deed(reader: Reader) -> float:
        began = asyncio.get_running_loop().time()
        assert isinstance(await reader.go_on(StreamPosition("resp_1", 3), "text"), TransportError)
        return asyncio.get_running_loop().time() - began

    assert with_server(deed, server, idle_timeout=60.0) == pytest.approx(60.0, abs=1.0)


def test_every_connection_is_closed() -> None:
    """Also those of attempts that failed."""
    server = Server(
        Script([created(), said("a", 1), BROKEN]), Script([said("b", 2), BROKEN]), refusal(404)
    )

    async def deed(reader: Reader) -> None:
        for _ in range(3):
            with contextlib.suppress(NbcodexError):
                await (reader.go_on() if reader.pieces else reader.ask())

    with_server(deed, server)
    assert all(isinstance(body, Body) and body.closed for body in server.bodies)
    assert str(server.requests[1].url).startswith(f"{BASE}/responses/resp_1")
