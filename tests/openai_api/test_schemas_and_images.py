"""Schemas and pictures: how they are requested, and how servers answer."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import pytest

from nbcodex.errors import ConfigurationError, ModelError, RequestError
from nbcodex.models import Schema
from nbcodex.openai_api import request_body
from nbcodex.openai_api.answers import Notice
from tests.openai_api.scripted import (
    KEY,
    Script,
    Server,
    chunk,
    completed,
    delta,
    ending_of,
    event,
    fails,
    play,
    refusal,
    settings,
)

SCHEMA = Schema(name="pet", definition={"type": "object", "properties": {"a": {}}})
PNG = b"\x89PNG\r\n\x1a\n and the rest"


def picture(data: bytes | str) -> dict[str, Any]:
    result = data if isinstance(data, str) else b64encode(data).decode()
    return {"type": "image_generation_call", "status": "completed", "result": result}


@pytest.mark.parametrize(
    ("api", "name", "message"),
    [
        ("responses", "text", "Unsupported parameter: 'text.format' is not supported."),
        ("chat", "response_format", "response_format json_schema is unavailable for this model"),
        ("chat", "response_format", "Invalid schema for response_format 'pet': 'a' is missing"),
    ],
)
def test_refused_schema_mode_moves_the_schema_into_the_prompt(
    api: Any, name: str, message: str
) -> None:
    good = completed() if api == "responses" else chunk("{}", finish="stop") + b"data: [DONE]\n\n"
    server = Server(refusal(400, message), Script([delta("{}"), good][api == "chat" :]))
    events = play(server, chosen=settings(api=api), schema=SCHEMA, system="Be brief.")
    first, second = server.sent
    assert name in first
    assert name not in second
    system = second.get("instructions") or second["messages"][0]["content"]
    assert system.startswith("Be brief.")
    assert '"properties"' in system
    assert [p.text for p in events if isinstance(p, Notice)] == [
        "the server does not accept this JSON schema: it is in the prompt, and checked here"
    ]


def test_empty_schema_adds_nothing_to_the_body() -> None:
    server = Server(Script([delta("[1]"), completed()]))
    play(server, schema=Schema(name="json", definition={}))
    assert "text" not in server.sent[0]


def test_schema_that_contains_the_key_is_refused() -> None:
    schema = Schema(name="x", definition={"type": "object", "description": KEY})
    error = fails(Server(Script()), schema=schema)
    assert isinstance(error, ConfigurationError)
    assert KEY not in str(error)


@pytest.mark.parametrize(
    "parts",
    [
        [event({"type": "response.refusal.delta", "delta": "No."}), completed()],
        [
            completed(
                output=[{"type": "message", "content": [{"type": "refusal", "refusal": "No."}]}]
            )
        ],
    ],
)
def test_refusal_of_responses_is_text_and_marked(parts: list[bytes]) -> None:
    done = ending_of(play(Server(Script(parts))))
    assert (done.text, done.declined) == ("No.", True)


def test_refusal_of_chat_is_text_and_marked() -> None:
    choice = {"index": 0, "delta": {"refusal": "No."}, "finish_reason": "stop"}
    parts = event({"choices": [choice]}) + b"data: [DONE]\n\n"
    done = ending_of(play(Server(Script([parts])), chosen=settings(api="chat")))
    assert (done.text, done.declined) == ("No.", True)


@pytest.mark.parametrize("twice", [False, True])
def test_picture_repeated_in_the_final_event_counts_once(twice: bool) -> None:
    item = {"type": "response.output_item.done", "item": picture(PNG)}
    end = completed(output=[picture(PNG)]) if twice else completed()
    done = ending_of(play(Server(Script([event(item), end])), params=request_body.IMAGE_PARAMS))
    assert [(i.data, i.media_type) for i in done.images] == [(PNG, "image/png")]


@pytest.mark.parametrize(
    "data", [b"<svg onload=alert(1)>", "no base64!", "", b"", b"\x89PNX", b"<html>"]
)
def test_data_without_an_image_signature_is_left_out(data: Any) -> None:
    done = ending_of(play(Server(Script([completed(output=[picture(data)])]))))
    assert done.images == ()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refusal(400, "Tool 'image_generation' is not supported with this model."), RequestError),
        (refusal(404, "Not Found"), ModelError),
    ],
)
def test_error_of_a_server_without_image_tool_names_the_tool(answer: Script, kind: type) -> None:
    error = fails(Server(answer), params=request_body.IMAGE_PARAMS)
    assert isinstance(error, kind)
    assert error.advice == request_body.NO_IMAGES_ADVICE


@pytest.mark.parametrize("name", ["store", "background"])
def test_params_cannot_make_the_provider_store_answers(name: str) -> None:
    error = fails(Server(Script()), params={name: True})
    assert "--durable" in str(error)
