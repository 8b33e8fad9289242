"""The request bodies of conversations, pictures and schemas."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from nbcodex.errors import ConfigurationError
from nbcodex.models import Image, Request, Schema, Turn
from nbcodex.openai_api import pricing
from nbcodex.openai_api.answers import MAX_REASONING_CHARS, RawAnswer, Redactor
from nbcodex.openai_api.endpoints import Endpoint, check_for_secrets
from nbcodex.openai_api.request_body import DetectedApi, PreparedRequest, ServerCapabilities
from nbcodex.settings import Settings

REASONING = {"type": "reasoning", "encrypted_content": "…"}
TURN = Turn(prompt="one", answer="two", images=(Image(b"abc"),), carried=(REASONING,))
REQUEST = Request(
    prompt="three",
    turns=(TURN,),
    images=(Image(b"def", "image/jpeg"),),
    schema=Schema(
        name="shape",
        definition={
            "type": "object",
            "additionalProperties": False,
            "properties": {},
            "required": [],
        },
    ),
)


def body(request: Request, api: DetectedApi) -> dict[str, object]:
    endpoint = Endpoint(kind="compatible", base_url="https://api.example/v1", host="api.example")
    return PreparedRequest(request, endpoint, "m", api).body


def test_responses_body_has_turns_reasoning_and_images() -> None:
    first = [
        {"type": "input_text", "text": "one"},
        {"type": "input_image", "image_url": "data:image/png;base64,YWJj"},
    ]
    last = [
        {"type": "input_text", "text": "three"},
        {"type": "input_image", "image_url": "data:image/jpeg;base64,ZGVm"},
    ]
    assert body(REQUEST, "responses")["input"] == [
        {"role": "user", "content": first},
        REASONING,
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "two"}],
        },
        {"role": "user", "content": last},
    ]


def test_chat_body_has_turns_and_images_without_reasoning() -> None:
    messages = body(REQUEST, "chat")["messages"]
    assert messages == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "one"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,YWJj"}},
            ],
        },
        {"role": "assistant", "content": "two"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "three"},
                {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,ZGVm"}},
            ],
        },
    ]


def test_both_bodies_use_the_apis_schema_mode() -> None:
    shape = {"name": "shape", "schema": REQUEST.schema.definition, "strict": True}
    assert body(REQUEST, "responses")["text"] == {"format": {"type": "json_schema", **shape}}
    assert body(REQUEST, "chat")["response_format"] == {"type": "json_schema", "json_schema": shape}


@pytest.mark.parametrize(
    ("model", "base_url", "is_sent"),
    [
        (None, None, True),
        ("m", "https://api.example/v1", True),
        ("another", "https://api.example/v1", False),
        ("m", "https://other.example/v1", False),
    ],
)
def test_reasoning_is_sent_only_to_its_own_model_and_server(
    model: str | None, base_url: str | None, is_sent: bool
) -> None:
    turn = replace(TURN, model=model, base_url=base_url)
    endpoint = Endpoint(kind="openai", base_url="https://api.example/v1", host="api.example")
    request = replace(REQUEST, turns=(turn,))
    prepared = ServerCapabilities().prepare(request, Settings(), endpoint, "m")
    assert (REASONING in prepared.body["input"]) is is_sent


def test_unencrypted_secret_or_huge_reasoning_is_dropped() -> None:
    items = [
        {"type": "reasoning", "encrypted_content": "good", "extra": "x"},
        {"type": "reasoning", "summary": []},
        {"type": "reasoning", "encrypted_content": "sk-a-secret-key"},
        {"type": "reasoning", "encrypted_content": "x" * MAX_REASONING_CHARS},
    ]
    done = RawAnswer(reasoning=items).completed(
        "text", Redactor(["sk-a-secret-key"]), Request(prompt="Why?"), "openai"
    )
    assert done.reasoning == ({"type": "reasoning", "encrypted_content": "good"},)


def test_conversation_that_contains_the_key_is_refused() -> None:
    turn = replace(TURN, answer="it is sk-a-secret-key")
    with pytest.raises(ConfigurationError, match="conversation contains an API key"):
        check_for_secrets(replace(REQUEST, turns=(turn,)), ["sk-a-secret-key"])


@pytest.mark.parametrize(
    "name", [field.name for field in fields(Request) if str(field.type) in {"str", "str | None"}]
)
def test_text_option_that_contains_the_key_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"The {name} contains an API key"):
        check_for_secrets(replace(REQUEST, **{name: "it is sk-a-secret-key"}), ["sk-a-secret-key"])


@pytest.mark.parametrize("part", ["turns", "images", "schema"])
def test_turns_images_and_schema_count_as_input(part: str) -> None:
    plain = Request(prompt="three")
    with_part = Request(prompt="three", **{part: getattr(REQUEST, part)})
    assert pricing.estimate_request_tokens(with_part) > pricing.estimate_request_tokens(plain)
