"""A refusal whose words or code state the cause is about that cause, in any spelling."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nbcodex import errors
from nbcodex.errors import AnswerError
from nbcodex.models import Schema
from nbcodex.openai_api.answers import CompletedAnswer, ReasoningDelta, judge
from tests.openai_api.scripted import (
    DONE,
    Script,
    Server,
    chunk,
    completed,
    ending_of,
    event,
    fails,
    play,
    refusal,
    settings,
    text_of,
)
from tests.openai_api.test_error_bodies import read

PAGE = "<html><title>Error 400 (Bad Request)!!1</title></html>"
NO_ENDPOINTS = "No endpoints found that can handle the requested parameters."


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500])
@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("Organization has been restricted. Please reach out to support.", None),
        ("This organization has been disabled.", None),
        ("The account associated with this API key has been deactivated.", None),
        ("Permission denied: Consumer 'api_key:AB1.c' has been suspended.", None),
        ("Your account org-1 is suspended, please check your plan", None),
        ("x", "organization_restricted"),
        ("x", "account_deactivated"),
    ],
)
def test_closed_account_is_final_and_about_the_account(
    message: str, code: str | None, status: int
) -> None:
    error = read(status, {"error": {"message": message, "code": code}})
    assert isinstance(error, errors.CredentialsError)
    assert "account" in error.message
    assert "provider" in error.advice


@pytest.mark.parametrize(
    "message",
    [
        "Your account has been restricted for too many requests. Please try again in 20s.",
        "Rate limit reached for model `m` in organization `o`: Limit 3, Used 3.",
    ],
)
def test_account_that_has_to_wait_is_a_limit(message: str) -> None:
    assert isinstance(read(429, {"error": {"message": message}}), errors.LimitError)


@pytest.mark.parametrize("status", [400, 404, 410])
@pytest.mark.parametrize(
    "message",
    [
        "The model `llama-3.2-11b` has been decommissioned and is no longer supported.",
        "The model grok-2.5 was deprecated on 2025-09-15",
        "This model models/gemini-2.0-flash is no longer available to new users.",
        "model 'command-xlarge' was removed on September 15",
        "This model version has reached the end of its life.",
    ],
)
def test_retired_model_is_a_model_error(message: str, status: int) -> None:
    assert isinstance(read(status, {"error": {"message": message}}), errors.ModelError)


def test_objection_to_a_parameter_is_not_about_a_retired_model() -> None:
    error = read(400, {"error": {"message": "`temperature` is deprecated for this model."}})
    assert isinstance(error, errors.RequestError)


@pytest.mark.parametrize(
    "message",
    [
        "default chat template is no longer allowed, so you must provide a chat template",
        "tokenizer.chat_template is not set and no template argument was passed!",
        "Template error: template not found",
        '"nomic-embed-text" does not support chat',
    ],
)
def test_missing_chat_template_is_about_the_model(message: str) -> None:
    error = read(400, {"error": {"message": message, "code": 400}})
    assert isinstance(error, errors.ModelError)
    assert "chat template" in error.advice


@pytest.mark.parametrize("body", [PAGE, {"errors": [{"message": "No route for that URI"}]}])
@pytest.mark.parametrize("status", [400, 404, 422])
def test_page_or_missing_route_advises_to_check_the_base_url(body: object, status: int) -> None:
    assert "Check the base URL" in read(status, body).advice


def test_page_behind_a_failure_is_retried_and_names_the_base_url() -> None:
    error = read(502, PAGE)
    assert isinstance(error, errors.ServerError)
    assert "base URL" in error.advice


@pytest.mark.parametrize("body", [b"404 page not found", b'{"detail": "Not Found"}'])
def test_server_without_the_chosen_responses_api_advises_chat(body: bytes) -> None:
    error = fails(Server(Script([body], 404)), chosen=settings(api="responses"))
    assert "--api chat" in error.advice


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_schema_that_no_provider_accepts_is_sent_in_words_once(api: str) -> None:
    schema = Schema(name="n", definition={"type": "object", "properties": {}})
    answer: Any = [chunk("{}", finish="stop"), DONE]
    if api == "responses":
        item = {"type": "message", "content": [{"type": "output_text", "text": "{}"}]}
        answer = [completed(output=[item])]
    server = Server(refusal(404, NO_ENDPOINTS, code=404), Script(answer))
    assert text_of(play(server, chosen=settings(api=api), schema=schema)) == "{}"
    assert len(server.requests) == 2
    server = Server(refusal(404, NO_ENDPOINTS, code=404))
    error = fails(server, chosen=settings(api=api), schema=schema)
    assert len(server.requests) == 2
    assert "parameters" in error.advice


@pytest.mark.parametrize(
    ("reason", "cut"),
    [
        ("endturn", None),
        ("End Turn", None),
        ("STOP-SEQUENCE", None),
        ("maxTokens", "max_output_tokens"),
        ("Content Filter", "content_filter"),
        ("finishReasonMaxTokens", "max_output_tokens"),
    ],
)
def test_ending_is_read_without_case_and_separators(reason: str, cut: str | None) -> None:
    server = Server(Script([chunk("a"), chunk(finish=reason), DONE]))
    assert ending_of(play(server, chosen=settings(api="chat"))).cut == cut


def reasoning(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"reasoning": text}}]})


ITEM = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "It is Paris."}]}
WHOLE = {"message": {"content": None, "reasoning": "It is Paris."}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("api", "parts"),
    [
        ("chat", [reasoning("It is "), reasoning("Paris."), chunk(finish="stop"), DONE]),
        ("chat", [chunk("<think>It is Paris.</think>", finish="stop"), DONE]),
        ("chat", [json.dumps({"choices": [WHOLE]}).encode()]),
        ("responses", [json.dumps({"status": "completed", "output": [ITEM]}).encode()]),
        (
            "responses",
            [
                event({"type": "response.reasoning_text.delta", "delta": "It is Paris."}),
                completed(output=[]),
            ],
        ),
    ],
)
def test_text_that_came_as_reasoning_is_kept_and_said_to_be_so(api: str, parts: list[Any]) -> None:
    headers = {"content-type": "application/json" if len(parts) == 1 else "text/event-stream"}
    events = play(Server(Script(parts, 200, headers)), chosen=settings(api=api))
    assert any(isinstance(each, ReasoningDelta) for each in events)
    ending = events[-1]
    assert isinstance(ending, CompletedAnswer)
    assert text_of(events) == ending.text == "It is Paris."
    with pytest.raises(AnswerError, match="came as reasoning"):
        judge(ending)
