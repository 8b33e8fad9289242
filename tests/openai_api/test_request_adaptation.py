"""What is sent, adapted to what a server accepts, and to which model."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from nbcodex.errors import ConfigurationError, NbcodexError, TransientError
from nbcodex.models import Request
from nbcodex.openai_api.answers import Notice, TextDelta
from nbcodex.openai_api.api_client import ApiClient
from tests.openai_api.scripted import (
    KEY,
    MODEL,
    Script,
    Server,
    chunk,
    completed,
    event,
    fails,
    play,
    refusal,
    settings,
    text_of,
)
from tests.virtual import LoopClock, run_virtual

ANSWER = chunk("hi", finish="stop")


def test_second_attempt_sends_the_same_bytes() -> None:
    server = Server(refusal(429), Script([completed()]))
    api_client = ApiClient(clock=LoopClock(), transport=server)
    request = Request(prompt="Why?", system="Be brief.")

    async def run() -> None:
        for _ in range(2):
            with contextlib.suppress(TransientError):
                async for _ in api_client.stream(request, settings(), model=MODEL):
                    pass

    run_virtual(run())
    assert server.sent[0] == server.sent[1]
    assert server.sent[0]["input"] == "Why?"


def test_responses_body_stores_nothing_and_lets_params_win() -> None:
    server = Server(Script([completed()]))
    params = {"reasoning": {"summary": "auto"}, "temperature": 0.5}
    play(server, system="S", max_output=7, effort="low", params=params)
    assert server.sent == [
        {
            "model": MODEL,
            "input": "Why?",
            "instructions": "S",
            "stream": True,
            "store": False,
            "max_output_tokens": 7,
            "reasoning": {"effort": "low", "summary": "auto"},
            "temperature": 0.5,
        }
    ]


def test_openai_reasoning_models_return_encrypted_reasoning() -> None:
    server = Server(Script([completed()]))
    for model in (MODEL, "gpt-4o"):
        play(server, chosen=settings(base_url=None), model=model)
    assert [b.get("include") for b in server.sent] == [["reasoning.encrypted_content"], None]
    assert [b["store"] for b in server.sent] == [False, False]


@pytest.mark.parametrize(
    ("base_url", "name"), [(None, "max_completion_tokens"), ("https://gw.example", "max_tokens")]
)
def test_chat_body_names_the_output_bound_as_the_server_does(
    base_url: str | None, name: str
) -> None:
    server = Server(Script([ANSWER]))
    play(
        server,
        chosen=settings(api="chat", base_url=base_url),
        system="S",
        max_output=7,
        effort="low",
    )
    assert server.sent == [
        {
            "model": MODEL,
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "Why?"},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            name: 7,
            "reasoning_effort": "low",
        }
    ]


def played_twice(server: Server, **options: Any) -> list[str]:
    """Send a request twice with one client, and return the paths that were called."""
    chosen = settings(**options)
    api_client = ApiClient(clock=LoopClock(), transport=server)

    async def run() -> None:
        for _ in range(2):
            request = Request(prompt="Why?", max_output=7)
            async for _ in api_client.stream(request, chosen, model=MODEL):
                pass

    run_virtual(run())
    return [r.url.path for r in server.requests]


@pytest.mark.parametrize("status", [404, 405, 501])
def test_server_without_responses_gets_chat_and_is_remembered(status: int) -> None:
    server = Server(refusal(status), Script([ANSWER]))
    paths = played_twice(server, api="auto")
    assert paths == ["/v1/responses", "/v1/chat/completions", "/v1/chat/completions"]


def test_404_about_the_model_does_not_switch_to_chat() -> None:
    server = Server(refusal(404, code="model_not_found"), Script([ANSWER]))
    assert type(fails(server, chosen=settings(api="auto"))).__name__ == "ModelError"


@pytest.mark.parametrize(
    ("status", "is_unbilled"), [(500, True), (503, True), (502, False), (504, False)]
)
def test_gateway_timeout_may_have_been_charged(status: int, is_unbilled: bool) -> None:
    assert fails(Server(refusal(status))).is_unbilled is is_unbilled


def test_404_of_openai_does_not_switch_to_chat() -> None:
    server = Server(refusal(404), Script([ANSWER]))
    error = fails(server, chosen=settings(api="auto", base_url=None))
    assert type(error).__name__ == "ModelError"
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 403, 404, 415])
def test_rejected_stream_options_are_left_out_and_remembered(status: int) -> None:
    server = Server(
        refusal(status, "Unrecognized request argument supplied: stream_options"), Script([ANSWER])
    )
    played_twice(server, api="chat")
    assert ["stream_options" in b for b in server.sent] == [True, False, False]


@pytest.mark.parametrize(
    ("status", "message"), [(401, "Unknown: stream_options"), (404, "Unknown address"), (429, "no")]
)
def test_refusal_about_no_parameter_leaves_none_out(status: int, message: str) -> None:
    server = Server(refusal(status, message), Script([ANSWER]))
    fails(server, chosen=settings(api="chat"))
    assert len(server.requests) == 1


UNVERIFIED = (
    "Your organization must be verified to stream this model. Please go to: https://platform"
    ".openai.com/settings/organization/general and click on Verify Organization."
)
SAID = {"type": "output_text", "text": "hi"}
WHOLE: dict[str, Any] = {
    "responses": {"status": "completed", "output": [{"type": "message", "content": [SAID]}]},
    "chat": {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]},
}
REFUSED_VALUE = {
    "message": "Unsupported value: 'stream' does not support true with this model.",
    "type": "invalid_request_error",
    "param": "stream",
    "code": "unsupported_value",
}
WRAPPED = f"litellm.BadRequestError: OpenAIException - Error code: 400 - {REFUSED_VALUE}\nModel=m"


@pytest.mark.parametrize("api", ["responses", "chat"])
@pytest.mark.parametrize(
    ("message", "param"),
    [
        (UNVERIFIED, None),
        ("That value cannot be had.", "stream"),
        ("Streaming is not supported for this model.", None),
        (WRAPPED, None),
        ("litellm.BadRequestError: 'stream' does not support true with this model.", None),
        ("This model does not support streaming.", None),
        ("Streaming is disabled; `stream` must be set to false.", None),
        ("该模型不支持流式输出", None),
    ],
)
def test_unverified_organization_gets_the_answer_in_one_piece(
    api: Any, message: str, param: str | None
) -> None:
    server = Server(
        refusal(400, message, param=param),
        Script([json.dumps({"model": MODEL} | WHOLE[api]).encode()]),
    )
    played_twice(server, api=api)
    assert [b.get("stream", False) for b in server.sent] == [True, False, False]
    assert "stream_options" not in server.sent[1]
    events = play(
        Server(refusal(400, message, param=param), server.answers[0]), chosen=settings(api=api)
    )
    assert [p.text for p in events if isinstance(p, Notice | TextDelta)] == [
        "hi",
        "in one piece: the server does not stream this model to your account",
    ]


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_refusal_to_stream_is_understood_where_a_relay_quotes_it(api: str) -> None:
    whole = Script([json.dumps({"model": MODEL} | WHOLE[api]).encode()])
    server = Server(refusal(500, WRAPPED, code="500"), whole)
    assert text_of(play(server, chosen=settings(api=api))) == "hi"
    assert [b.get("stream", False) for b in server.sent] == [True, False]


@pytest.mark.parametrize("is_json", [False, True])
@pytest.mark.parametrize(
    ("api", "message", "param"),
    [
        ("responses", WRAPPED, "stream"),
        ("chat", WRAPPED, "stream"),
        ("chat", "Unsupported parameter: 'max_tokens'", "max_tokens"),
    ],
)
def test_next_attempt_lacks_what_an_error_with_status_200_refuses(
    api: str, message: str, param: str, is_json: bool
) -> None:
    error = {"message": message, "code": None}
    failed = Script([event({"error": error} if api == "chat" else {"type": "error", **error})])
    if is_json:
        body = json.dumps({"error": error}).encode()
        failed = Script([body], 200, {"content-type": "application/json"})
    server = Server(failed, Script([json.dumps({"model": MODEL} | WHOLE[api]).encode()]))
    api_client = ApiClient(clock=LoopClock(), transport=server)
    options: dict[str, Any] = {"chosen": settings(api=api), "max_output": 5}
    assert isinstance(fails(server, api_client=api_client, **options), TransientError)
    assert text_of(play(server, api_client=api_client, **options)) == "hi"
    assert [bool(body.get(param)) for body in server.sent] == [True, False]


def test_name_of_the_output_bound_is_learned() -> None:
    server = Server(
        refusal(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        Script([ANSWER]),
    )
    played_twice(server, api="chat")
    names = [[n for n in b if n.startswith("max")] for b in server.sent]
    assert names == [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"]]


def test_adaptations_of_one_request_are_bounded() -> None:
    server = Server(refusal(400, "unsupported max_tokens max_completion_tokens stream_options"))
    error = fails(server, chosen=settings(api="chat"), max_output=5)
    assert type(error).__name__ == "RequestError"
    assert len(server.requests) <= 4


def listing(*names: object) -> Script:
    return Script([json.dumps({"data": [{"id": n} for n in names]}).encode()])


def test_only_model_of_a_server_is_used() -> None:
    server = Server(listing("tiny"), Script([completed()]))
    play(server, chosen=settings(model=None))
    assert server.sent_models == ["tiny"]


@pytest.mark.parametrize(
    ("names", "expected"), [(["b", "a"], "offers a, b"), ([], "offers no model")]
)
def test_several_models_are_listed_in_the_error(names: list[str], expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        play(Server(listing(*names)), chosen=settings(model=None))


def test_default_model_is_used_at_openai_only() -> None:
    server = Server(Script([completed()]))
    play(server, chosen=settings(model=None, base_url=None))
    assert server.sent_models == [MODEL]
    azure = settings(model=None, base_url="https://me.openai.azure.com/openai/v1")
    with pytest.raises(ConfigurationError, match="deployment"):
        play(server, chosen=azure)


@pytest.mark.parametrize(
    "script",
    [
        Script([b"<html>"]),
        Script([b"{}"]),
        Script([b"[]"]),
        listing(KEY, 5, None, "x" * 999, "\x1b"),
    ],
)
def test_malformed_list_of_models_gives_short_names_or_an_error(script: Script) -> None:
    async def run() -> list[str]:
        return await ApiClient(clock=LoopClock(), transport=Server(script)).list_models(settings())

    with contextlib.suppress(NbcodexError):
        names = run_virtual(run())
        assert all(len(n) <= 100 and n.isprintable() and KEY not in n for n in names)
