"""One attempt: all the shapes in which an answer arrives, or fails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import httpx2
import pytest

from nbcodex.errors import LimitError, ModelError, TransientError
from nbcodex.models import Request, Usage
from nbcodex.openai_api.answers import ReasoningDelta, ResponseStarted, StreamEvent, TextDelta
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.runtime.clock import BootClock
from tests.openai_api.scripted import (
    DONE,
    MODEL,
    Part,
    Script,
    Server,
    Silence,
    chunk,
    completed,
    delta,
    ending_of,
    event,
    failed,
    fails,
    play,
    refusal,
    settings,
)
from tests.virtual import LoopClock, run_virtual

TPM = (
    "Rate limit reached for m in organization o on tokens per min (TPM): Limit 30000, "
    "Used 22999, Requested 12528. Please try again in 11.054s."
)
FULL = {
    "input_tokens": 9,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens": 5,
    "output_tokens_details": {"reasoning_tokens": 2},
}
USAGE = Usage(input_tokens=9, cached_tokens=4, output_tokens=5, reasoning_tokens=2)
CHAT_USAGE = {
    "prompt_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens": 5,
    "completion_tokens_details": {"reasoning_tokens": 2},
}


# Answers.


def test_responses_events_become_text_usage_model_and_id() -> None:
    server = Server(
        Script([delta("Be"), delta("cause."), completed(id="resp_1", usage=FULL), DONE])
    )
    ending = ending_of(play(server))
    assert (ending.text, ending.usage, ending.model) == ("Because.", USAGE, MODEL)
    assert (ending.response_id, ending.cut) == ("resp_1", None)
    assert server.bodies[0].closed


def test_chat_chunks_become_text_and_usage() -> None:
    """The last chunk, without choices, has the usage."""
    usage = event({"choices": [], "usage": CHAT_USAGE})
    server = Server(Script([chunk("Be"), chunk("cause."), chunk(finish="stop"), usage, DONE]))
    ending = ending_of(play(server, chosen=settings(api="chat")))
    assert (ending.text, ending.usage, ending.model, ending.cut) == ("Because.", USAGE, "m", None)


@pytest.mark.parametrize(
    ("api", "parts", "cut"),
    [
        (
            "responses",
            [
                delta("a"),
                event(
                    {
                        "type": "response.incomplete",
                        "response": {"incomplete_details": {"reason": "max_output_tokens"}},
                    }
                ),
            ],
            "max_output_tokens",
        ),
        ("chat", [chunk("a", finish="length"), DONE], "max_output_tokens"),
        ("chat", [chunk("a", finish="content_filter"), DONE], "content_filter"),
        ("chat", [chunk("a", finish="stop"), DONE], None),
    ],
)
def test_cut_answer_is_complete_and_says_why(api: str, parts: list[bytes], cut: str | None) -> None:
    ending = ending_of(play(Server(Script(parts)), chosen=settings(api=api)))
    assert (ending.text, ending.cut) == ("a", cut)


@pytest.mark.parametrize(
    ("api", "parts", "text"),
    [
        (
            "responses",
            [
                completed(
                    output=[
                        {"type": "reasoning", "summary": []},
                        {"type": "message", "content": [{"type": "output_text", "text": "hi"}]},
                    ]
                )
            ],
            "hi",
        ),
        (
            "responses",
            [event({"type": "response.output_text.done", "text": "hi"}), completed()],
            "hi",
        ),
        (
            "responses",
            [event({"type": "response.refusal.delta", "delta": "No."}), completed()],
            "No.",
        ),
        (
            "chat",
            [event({"choices": [{"delta": {"refusal": "No."}, "finish_reason": "stop"}]}), DONE],
            "No.",
        ),
        (
            "chat",
            [
                event({"choices": [{"delta": {"content": [{"text": "hi"}]}}]}),
                chunk(finish="stop"),
            ],
            "hi",
        ),
        ("responses", [b": hello\n\n", b"data: \n\n", delta("hi"), completed()], "hi"),
        ("responses", [(delta("h") + delta("i") + completed()).replace(b"\n", b"\r\n")], "hi"),
        ("responses", [bytes([b]) for b in delta("hé😀") + completed()], "hé😀"),
        ("responses", [event({"delta": "hi"}, "response.output_text.delta"), completed()], "hi"),
        ("responses", [b"\xef\xbb\xbf" + delta("hi") + completed()], "hi"),
        ("responses", [b"\xef", b"\xbb\xbf", delta("hi") + completed()], "hi"),
        ("responses", [completed()], ""),
        (
            "responses",
            [b'{"output":[{"type":"message","content":[{"type":"output_text","text":"hi"}]}]}'],
            "hi",
        ),
        (
            "chat",
            [b' {"choices":[{"message":{"content":"hi"},', b'"finish_reason":"stop"}]}'],
            "hi",
        ),
    ],
)
def test_text_is_found_in_every_shape_of_answer(api: str, parts: list[bytes], text: str) -> None:
    """Text only in the final event, refusals, comments, CRLF, single bytes, plain JSON."""
    assert ending_of(play(Server(Script(parts)), chosen=settings(api=api))).text == text


def test_lone_surrogates_are_replaced() -> None:
    ending = ending_of(play(Server(Script([delta("a\ud83d"), completed()]))))
    assert ending.text == "a\ufffd"


def test_body_is_drained_so_that_the_connection_is_reused() -> None:
    read: list[str] = []

    def body() -> Iterator[bytes]:
        yield completed()
        yield DONE
        read.append("to the end")

    play(Server(Script(body())))
    assert read


def test_reasoning_is_not_part_of_the_text() -> None:
    thinking = event({"type": "response.reasoning_summary_text.delta", "delta": "Hm."})
    received = play(Server(Script([thinking, delta("hi"), completed()])))
    assert [p for p in received if isinstance(p, ReasoningDelta)] == [ReasoningDelta("Hm.")]
    assert ending_of(received).text == "hi"
    reasoning = event({"choices": [{"delta": {"reasoning_content": "Hm."}}]})
    received = play(
        Server(Script([reasoning, chunk("hi", finish="stop"), DONE])), chosen=settings(api="chat")
    )
    assert ReasoningDelta("Hm.") in received


def test_deltas_of_one_network_chunk_become_one_event() -> None:
    received = play(Server(Script([delta("a") * 1000, completed()])))
    assert [p.text for p in received if isinstance(p, TextDelta)] == ["a" * 1000]


def test_response_started_has_the_limits_before_any_text() -> None:
    headers = {
        "x-ratelimit-limit-tokens": "30000",
        "x-ratelimit-remaining-tokens": "20000",
        "x-request-id": "req_1",
        "x-nbcodex-simulated": "true",
    }
    opened = play(Server(Script([Silence(9), completed()], headers=headers)))[0]
    assert isinstance(opened, ResponseStarted)
    assert (opened.api, opened.simulated, opened.request_id) == ("responses", True, "req_1")
    assert opened.snapshot.at == 5000.0
    assert opened.snapshot.tokens


def test_connection_lost_after_finish_reason_leaves_usage_unknown() -> None:
    for after in (httpx2.ReadError("gone"), Silence(999), b"data: {broken\n\n", b""):
        server = Server(Script([chunk("hi"), chunk(finish="stop"), after, DONE]))
        ending = ending_of(play(server, chosen=settings(api="chat")))
        assert (ending.text, ending.usage) == ("hi", Usage())


@pytest.mark.parametrize("wrong", [-1, 2**53, 10**400, 1.5, True, "nine", None, [], {}])
def test_implausible_usage_is_unknown(wrong: object) -> None:
    """An unknown count is None, never 0."""
    figures = {"input_tokens": wrong, "output_tokens": wrong, "input_tokens_details": wrong}
    assert ending_of(play(Server(Script([completed(usage=figures)])))).usage == Usage()


# Failures, before any text and after.

TEXT: dict[str, list[Part]] = {
    "responses": [event({"type": "response.created", "response": {}}), delta("so far")],
    "chat": [chunk("so far")],
}
LIMITED = {"code": "rate_limit_exceeded", "type": "tokens", "message": TPM}
ENDS: list[tuple[str, str, list[Part], str, float | None]] = [
    ("2 nested", "responses", [event({"type": "error", "error": LIMITED})], "LimitError", 11.054),
    ("2 chat", "chat", [event({"error": LIMITED})], "LimitError", 11.054),
    ("2 named", "chat", [event({"code": 500, "message": "x"}, "error")], "ServerError", None),
    ("3 flat", "responses", [event({**LIMITED, "type": "error"})], "LimitError", 11.054),
    ("4 failed", "responses", [failed("rate_limit_exceeded", TPM)], "LimitError", 11.054),
    ("4 server", "responses", [failed("server_error")], "ServerError", None),
    ("4 quota", "responses", [failed("insufficient_quota")], "QuotaError", None),
    ("5 no reason", "responses", [failed(None)], "ServerError", None),
    ("5 silent", "responses", [failed(None), Silence(999)], "ServerError", None),
    ("5 broken", "responses", [failed(None), httpx2.ReadError("x")], "ServerError", None),
    ("5 nonsense", "responses", [failed(None), b"data: {x\n\n"], "ServerError", None),
    ("6 end", "responses", [], "TransportError", None),
    ("6 chat", "chat", [], "TransportError", None),
    ("6 done", "responses", [DONE], "TransportError", None),
    ("6 half", "responses", [b'data: {"type": "resp'], "TransportError", None),
    ("7 dropped", "responses", [httpx2.ReadError("x")], "TransportError", None),
    ("7 chat", "chat", [httpx2.RemoteProtocolError("x")], "TransportError", None),
    ("8 broken", "responses", [b"data: {x\n\n", completed()], "ServerError", None),
    ("8 deep", "responses", [b"data: " + b"[" * 99999 + b"\n\n"], "ServerError", None),
    ("8 digits", "responses", [b'data: {"id": ' + b"9" * 9999 + b"}\n\n"], "ServerError", None),
    ("8 array", "chat", [b"data: []\n\n"], "ServerError", None),
    ("10 silent", "responses", [Silence(999), completed()], "TransportError", None),
    ("10 chat", "chat", [Silence(999), DONE], "TransportError", None),
]


@pytest.mark.parametrize("begun", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("api", "parts", "name", "wait"), [e[1:] for e in ENDS], ids=[e[0] for e in ENDS]
)
def test_stream_failure_is_the_same_error_before_and_after_text(
    begun: bool, api: str, parts: list[Part], name: str, wait: float | None
) -> None:
    """The stream is closed, too."""
    server = Server(Script([*(TEXT[api] if begun else []), *parts]))
    error = fails(server, chosen=settings(api=api))
    assert type(error).__name__ == name
    assert getattr(error, "wait", None) == (wait and pytest.approx(wait))


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_429_before_the_stream_has_limit_and_snapshot(api: str) -> None:
    headers = {"x-ratelimit-limit-tokens": "30000", "x-ratelimit-remaining-tokens": "7"}
    error = fails(Server(refusal(429, TPM, headers=headers, code="x")), chosen=settings(api=api))
    assert isinstance(error, LimitError)
    assert (error.limit.limit, error.wait) == (30000, pytest.approx(11.054))
    assert error.snapshot
    assert error.snapshot.tokens
    assert error.snapshot.tokens.remaining == 7


def test_wait_of_a_failed_stream_comes_from_the_headers_of_its_200() -> None:
    """Azure: failed without a reason, then an error event, the wait in Retry-After."""
    reason = event({"type": "error", "error": {"code": "429", "message": "token rate limit"}})
    script = Script([delta("a"), failed(None), reason], headers={"retry-after": "37"})
    error = fails(Server(script))
    assert isinstance(error, LimitError)
    assert (error.wait, error.limit.resource) == (37.0, "tokens")


@pytest.mark.parametrize("api", ["auto", "chat", "responses"])
def test_web_page_in_a_200_is_a_wrong_address_at_once(api: str) -> None:
    error = fails(Server(Script([b"\n<!DOCTYPE html><p>Sorry"])), chosen=settings(api=api))
    assert isinstance(error, ModelError)
    assert "web page" in error.message
    assert "base URL" in error.advice
    assert "Sorry" not in str(error)


def test_web_page_of_a_failed_gateway_is_a_server_error_and_not_shown() -> None:
    error = fails(Server(Script([b"\n<!DOCTYPE html><p>Sorry"], 502)))
    assert type(error).__name__ == "ServerError"
    assert "Sorry" not in str(error)


def test_unreachable_server_is_a_transport_error_with_the_reason() -> None:
    error = fails(Server(httpx2.ConnectError("[Errno -2] Name or service not known")))
    assert type(error).__name__ == "TransportError"
    assert "Name or service not known" in error.message


@pytest.mark.parametrize(
    ("parts", "seconds"),
    [
        ([Silence(9999)], 50.0),
        ([delta("a"), Silence(9999)], 10.0),
        ([delta("a"), Silence(8), delta("b"), Silence(9999)], 18.0),
        ([delta("a"), *[Silence(4), b": ping\n\n"] * 99], 120.0),
        ([*[Silence(4), b": ping\n\n"] * 99], 124.0),
        ([delta("a"), *[Silence(4), event({"type": "keepalive"})] * 99], 120.0),
        ([delta("a"), *[Silence(4), b"data: : ping\n\n"] * 99], 120.0),
        ([delta("a"), *[Silence(4), event({}, "ping")] * 99], 120.0),
        ([delta("a"), *[Silence(4), b": ping\n\n"] * 9, Silence(9999)], 46.0),
    ],
)
def test_silence_breaks_a_stream_later_before_the_first_text(
    parts: list[Part], seconds: float
) -> None:
    """Keep-alives extend the wait, as long as the patience lasts."""

    async def run() -> float:
        clock = LoopClock()
        api_client = ApiClient(clock=clock, transport=Server(Script(parts)))
        chosen, request = settings(idle_timeout=10.0), Request(prompt="Why?", patience=120.0)
        await api_client.resolve_model(request, chosen)
        began = clock.now()
        with pytest.raises(TransientError, match="stopped sending"):
            async for _ in api_client.stream(request, chosen, model=MODEL):
                pass
        return clock.now() - began

    assert run_virtual(run()) == pytest.approx(seconds, abs=1)


@pytest.mark.parametrize("api", ["responses", "chat"])
@pytest.mark.parametrize(
    "ping",
    [b": ping\n\n", b"data: : ping\n\n", event({"type": "ping"}), event({}, "keepalive")],
)
def test_keep_alives_before_and_within_an_answer_do_not_break_it(api: str, ping: bytes) -> None:
    first, rest = chunk("a"), chunk("b", finish="stop") + DONE
    if api == "responses":
        first, rest = delta("a"), delta("b") + completed()
    parts = [*[Silence(5), ping] * 20, first, *[Silence(5), ping] * 20, rest]
    events = play(Server(Script(parts)), chosen=settings(api=api, idle_timeout=6.0))
    assert ending_of(events).text == "ab"


def test_slow_event_is_not_silence_while_data_arrives() -> None:
    text = delta("x" * 2000)
    parts: list[Part] = [delta("a")]
    for at in range(0, len(text), 100):
        parts += [Silence(8), text[at : at + 100]]
    server = Server(Script([*parts, completed()]))
    assert len(ending_of(play(server, chosen=settings(idle_timeout=10.0))).text) == 2001


def test_wait_for_headers_is_bounded() -> None:
    class Hanging(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            await asyncio.sleep(9999)
            raise AssertionError

    async def run() -> None:
        api_client = ApiClient(clock=LoopClock(), transport=Hanging())
        async for _ in api_client.stream(Request(prompt="Why?"), settings(), model=MODEL):
            pass

    with pytest.raises(TransientError, match="in time"):
        run_virtual(run())


def test_cancelled_task_closes_the_connection() -> None:
    server = Server(Script([delta("a"), Silence(50), completed()]))

    async def run() -> None:
        api_client = ApiClient(clock=LoopClock(), transport=server)

        async def read() -> None:
            async for _ in api_client.stream(Request(prompt="Why?"), settings(), model=MODEL):
                pass

        task = asyncio.create_task(read())
        await server.received.wait()
        await asyncio.sleep(1)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert server.bodies[0].closed

    run_virtual(run())


def test_stream_is_closed_before_completed_answer_is_yielded() -> None:
    server = Server(Script([delta("a"), completed()]))

    async def run() -> None:
        api_client = ApiClient(clock=LoopClock(), transport=server)
        async for each in api_client.stream(Request(prompt="Why?"), settings(), model=MODEL):
            last: StreamEvent = each
            if not isinstance(each, ResponseStarted | TextDelta):
                assert server.bodies[0].closed
        assert last

    run_virtual(run())


@pytest.mark.parametrize(
    ("url", "is_simulated"),
    [
        ("https://api.openai.com/v1/responses", False),
        ("https://gw.example/v1/chat/completions", False),
        ("http://10.0.0.7:8000/v1/responses", False),
        ("http://127.0.0.1:8000/v1/responses", True),
        ("http://localhost:8000/v1/responses", True),
    ],
)
def test_only_a_server_on_this_machine_is_believed_to_be_the_simulator(
    url: str, is_simulated: bool
) -> None:
    api_client = ApiClient(clock=BootClock())
    assert api_client.is_simulated({"x-nbcodex-simulated": "true"}, url) == is_simulated
