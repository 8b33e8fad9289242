"""Which endings make an answer a success, a failure that is retried, or an error."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbcodex.errors import AnswerError, TransientError
from nbcodex.models import Request, Usage
from nbcodex.openai_api.answers import CompletedAnswer, judge
from nbcodex.openai_api.api_client import ApiClient
from tests.openai_api.scripted import (
    DONE,
    Script,
    Server,
    chunk,
    completed,
    delta,
    ending_of,
    event,
    fails,
    play,
    settings,
)
from tests.virtual import LoopClock, run_virtual

MESSAGE = {"type": "message", "content": [{"type": "output_text", "text": "hi"}]}
CALL = {"type": "function_call", "name": "look_up", "arguments": "{}"}


def incomplete(reason: str, **response: Any) -> bytes:
    details = {"incomplete_details": {"reason": reason}, "status": "incomplete", **response}
    return event({"type": "response.incomplete", "response": details})


def answer(api: str, *parts: bytes) -> CompletedAnswer:
    return ending_of(play(Server(Script(parts)), chosen=settings(api=api)))


@pytest.mark.parametrize("reason", ["stop", "STOP", "eos", "end_turn", "FINISH_REASON_STOP", "End"])
def test_normal_ending_in_any_spelling_is_a_success(reason: str) -> None:
    done = answer("chat", chunk("a"), chunk(finish=reason), DONE)
    assert done.cut is None
    judge(done)


@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS", "max_output_tokens", "model_length"])
def test_text_cut_by_max_output_is_a_success_that_says_so(reason: str) -> None:
    for done in (
        answer("chat", chunk("a", finish=reason), DONE),
        answer("responses", delta("a"), incomplete(reason)),
    ):
        assert done.cut == "max_output_tokens"
        judge(done)


@pytest.mark.parametrize("reason", ["content_filter", "SAFETY", "RECITATION"])
def test_filtered_answer_is_an_error_that_names_the_filter(reason: str) -> None:
    with pytest.raises(AnswerError, match="content filter withheld the rest"):
        judge(answer("chat", chunk("a", finish=reason), DONE))


@pytest.mark.parametrize("reason", ["banana", "OTHER", "incomplete"])
def test_unknown_ending_is_an_error_that_names_it(reason: str) -> None:
    for done in (
        answer("chat", chunk("a", finish=reason), DONE),
        answer("responses", delta("a"), incomplete(reason)),
    ):
        with pytest.raises(AnswerError, match=reason):
            judge(done)


@pytest.mark.parametrize(
    "reason",
    [
        "error",
        "error_finish",
        "ABORT",
        "cancelled",
        "insufficient_system_resource",
        "function_call_filter: MALFORMED_FUNCTION_CALL",
        "UNEXPECTED_TOOL_CALL",
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
def test_failed_ending_is_retried(reason: str, streamed: bool) -> None:
    parts = [chunk("Half of"), chunk(finish=reason), DONE]
    if not streamed:
        choice = {"message": {"content": "Half of"}, "finish_reason": reason}
        parts = [event({"choices": [choice]}).removeprefix(b"data: ")]
    error = fails(Server(Script(parts)), chosen=settings(api="chat"))
    assert isinstance(error, TransientError)
    assert reason in error.message


STATED = Usage(input_tokens=100, output_tokens=50, stated_cost=0.01)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    "choice",
    [
        {"finish_reason": "error"},
        {"finish_reason": "banana"},
        {"finish_reason": "error", "error": {"code": 502, "message": "upstream died"}},
    ],
)
def test_failed_chat_answer_has_its_stated_usage(choice: dict[str, Any], streamed: bool) -> None:
    usage = {"usage": {"prompt_tokens": 100, "completion_tokens": 50, "cost": 0.01}}
    choices = {"choices": [{"index": 0, "message": {"content": ""}, **choice}]}
    parts = [event(choices), event({"choices": [], **usage}), DONE]
    if not streamed:
        parts = [event({**choices, **usage}).removeprefix(b"data: ")]
    assert fails(Server(Script(parts)), chosen=settings(api="chat")).usage == STATED


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_failed_response_has_its_stated_usage(status: str) -> None:
    figures = {"input_tokens": 100, "output_tokens": 50, "cost": 0.01}
    error = {"code": "server_error", "message": "no"}
    response = {"status": status, "usage": figures, "output": [], "error": error}
    parts = [delta("Half of"), event({"type": f"response.{status}", "response": response})]
    assert fails(Server(Script(parts))).usage == STATED


def test_second_unknown_ending_without_text_in_a_row_is_an_error_without_a_kept_text() -> None:
    server = Server(Script([chunk(finish="banana"), DONE]))
    client = ApiClient(clock=LoopClock(), transport=server)
    request = Request(prompt="Why?")

    async def run() -> tuple[Exception, CompletedAnswer]:
        async def attempt() -> Any:
            stream = client.stream(request, settings(api="chat"), model="m")
            return [each async for each in stream][-1]

        with pytest.raises(TransientError, match="banana") as first:
            await attempt()
        return first.value, await attempt()

    _, done = run_virtual(run())
    with pytest.raises(AnswerError, match="banana") as caught:
        judge(done)
    assert "so far" not in caught.value.advice


@pytest.mark.parametrize(
    "parts",
    [
        [chunk("Half of"), DONE],
        [chunk("Half of")],
        [DONE],
        [chunk("Half of"), chunk(usage={"prompt_tokens": 3, "completion_tokens": 2}), DONE],
    ],
)
def test_stream_without_finish_reason_is_broken(parts: list[bytes]) -> None:
    assert isinstance(fails(Server(Script(parts)), chosen=settings(api="chat")), TransientError)


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_completed_event_with_a_failed_status_is_retried(status: str) -> None:
    server = Server(Script([delta("Half of"), completed(status=status)]))
    assert isinstance(fails(server), TransientError)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ({"text": "busy", "error_code": 50002}, "busy"),
        ({"error_code": 50002, "error_msg": "slow down"}, "slow down"),
        ({"error": {"message": "upstream died", "code": 502}}, "upstream died"),
        ({"choices": [{"error": {"code": 502, "message": "upstream died"}}]}, "upstream died"),
        ({"object": "error", "message": "busy"}, "busy"),
    ],
)
@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("streamed", [True, False])
def test_error_object_in_a_200_is_retried(
    payload: dict[str, Any], says: str, api: str, streamed: bool
) -> None:
    if api == "responses" and "choices" in payload:
        payload = payload["choices"][0]
    body = event(payload)
    parts = [body, DONE] if streamed else [body.removeprefix(b"data: ")]
    error = fails(Server(Script(parts)), chosen=settings(api=api))
    assert isinstance(error, TransientError)
    if api == "chat" or not streamed or "object" not in payload:
        assert says in error.message


@pytest.mark.parametrize(
    ("api", "parts"),
    [
        ("chat", [chunk(finish="stop"), DONE]),
        ("chat", [chunk(" \n", finish="stop"), DONE]),
        ("responses", [completed(output=[])]),
        ("responses", [completed(output=[{"type": "reasoning", "summary": []}])]),
    ],
)
def test_empty_answer_is_an_error(api: str, parts: list[bytes]) -> None:
    with pytest.raises(AnswerError, match="empty"):
        judge(answer(api, *parts))


def test_output_spent_on_reasoning_is_an_error_with_the_figures() -> None:
    chat = {"prompt_tokens": 9, "completion_tokens": 200}
    responses = {"input_tokens": 9, "output_tokens": 200}
    for done in (
        answer("chat", chunk(finish="length"), chunk(usage=chat), DONE),
        answer("responses", incomplete("max_output_tokens", usage=responses)),
    ):
        with pytest.raises(AnswerError, match="200 output tokens went into reasoning") as caught:
            judge(done)
        assert "--max-output" in caught.value.advice


@pytest.mark.parametrize(
    ("api", "parts"),
    [
        (
            "chat",
            [
                event(
                    {
                        "choices": [
                            {
                                "delta": {
                                    "tool_calls": [
                                        {
                                            "index": 0,
                                            "function": {"name": "look_up", "arguments": ""},
                                        }
                                    ]
                                }
                            }
                        ]
                    }
                ),
                chunk(finish="tool_calls"),
                DONE,
            ],
        ),
        (
            "chat",
            [
                event({"choices": [{"delta": {"function_call": {"name": "look_up"}}}]}),
                chunk(finish="stop"),
                DONE,
            ],
        ),
        ("responses", [event({"type": "response.output_item.done", "item": CALL}), completed()]),
        ("responses", [completed(output=[CALL])]),
    ],
)
def test_function_call_without_an_answer_is_an_error_that_names_it(
    api: str, parts: list[bytes]
) -> None:
    with pytest.raises(AnswerError, match="look_up"):
        judge(answer(api, *parts))


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("as_reasoning", [False, True])
def test_endless_answer_is_cut_at_the_bound(api: str, as_reasoning: bool) -> None:
    if as_reasoning:
        kind = "response.reasoning_text.delta"
        part = event({"choices": [{"delta": {"reasoning": "word "}}]})
        part = part if api == "chat" else event({"type": kind, "delta": "word "})
    else:
        part = chunk("word ") if api == "chat" else delta("word ")

    def endless() -> Any:
        while True:
            yield part

    server = Server(Script(endless()))
    done = ending_of(play(server, chosen=settings(api=api, max_answer=1_000)))
    assert server.bodies[0].closed
    assert done.cut == "max_answer"
    assert len(done.text) <= 1_010
    if as_reasoning:
        with pytest.raises(AnswerError, match="empty"):
            judge(done)
    else:
        judge(done)


CHUNKS = st.sampled_from(
    [
        chunk("text"),
        chunk(),
        chunk(finish="stop"),
        chunk(finish="length"),
        chunk(finish="error"),
        chunk(finish="banana"),
        chunk(finish="tool_calls"),
        event({"text": "busy", "error_code": 1}),
        DONE,
    ]
)
EVENTS = st.sampled_from(
    [
        delta("text"),
        completed(output=[]),
        completed(output=[MESSAGE]),
        completed(output=[CALL]),
        completed(status="failed"),
        incomplete("max_output_tokens"),
        incomplete("banana"),
        event({"type": "response.failed", "response": {"error": None}}),
        event({"text": "busy", "error_code": 1}),
        DONE,
    ]
)


def is_success(parts: list[bytes], api: str) -> bool:
    try:
        judge(answer(api, *parts))
    except (AnswerError, TransientError):
        return False
    return True


@given(st.lists(CHUNKS, max_size=5))
def test_only_finished_text_of_chat_is_ever_a_success(parts: list[bytes]) -> None:
    if is_success(parts, "chat"):
        finish = next(p for p in parts if b'"finish_reason": "' in p)
        assert finish in (chunk(finish="stop"), chunk(finish="length"))
        assert chunk("text") in parts


@given(st.lists(EVENTS, max_size=5))
def test_only_finished_text_of_responses_is_ever_a_success(parts: list[bytes]) -> None:
    if is_success(parts, "responses"):
        ends = (completed(output=[]), completed(output=[MESSAGE]), completed(output=[CALL]))
        end = next(p for p in parts if p in (*ends, incomplete("max_output_tokens")))
        assert delta("text") in parts or end == completed(output=[MESSAGE])
