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
    delta,
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


FILTERS: list[tuple[Any, int]] = [
    (
        {
            "code": "The caller does not have permission to execute the specified operation",
            "error": "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_BIO",
        },
        403,
    ),
    ({"code": "data_inspection_failed", "message": "Output data may contain it."}, 400),
    ({"message": "<400> InternalError.Algo.DataInspectionFailed: Input text data"}, 400),
    ({"message": "Content Exists Risk", "type": "invalid_request_error"}, 400),
    ({"message": "The request was rejected because it was considered high risk"}, 400),
    ({"message": "Output blocked by content filtering policy"}, 400),
    ({"message": 'Your input was flagged for "violence".', "code": 403}, 403),
    ({"message": "系统检测到输入或生成内容可能包含不安全或敏感内容", "code": "1301"}, 400),
    ({"message": "Invalid prompt: your prompt was flagged as violating our usage policy."}, 400),
    ({"code": "OutputTextSensitiveContentDetected", "message": "may contain it"}, 400),
]


@pytest.mark.parametrize(("error", "status"), FILTERS)
def test_refused_content_is_about_the_content_and_not_the_key(
    error: dict[str, Any], status: int
) -> None:
    for each in (read(status, error), read(status, {"error": error}), read(500, {"error": error})):
        assert type(each) is errors.RequestError
        assert "content filter" in each.message
        assert "prompt" in each.advice
        assert "key" not in str(each)


@pytest.mark.parametrize("error", [error for error, _ in FILTERS[1:]])
@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("has_text", [True, False])
def test_answer_withheld_in_mid_stream_is_final(
    error: dict[str, Any], api: str, has_text: bool
) -> None:
    text = chunk("half") if api == "chat" else delta("half")
    failure = {"error": error} if api == "chat" else {**error, "type": "error"}
    server = Server(Script([text] * has_text + [event(failure)]))
    assert "content filter" in fails(server, chosen=settings(api=api)).message


@pytest.mark.parametrize(
    "message",
    [
        "Your account was banned for violating our usage policies.",
        "The organization has been disabled because its content violates the usage policy.",
    ],
)
def test_account_that_violated_a_policy_is_about_the_account(message: str) -> None:
    assert isinstance(read(403, {"error": {"message": message}}), errors.CredentialsError)


@pytest.mark.parametrize(
    "message",
    [
        "Invalid arguments passed to the model.",
        "Unsupported parameter: 'top_k'",
        "max_tokens must be at most 8192",
        "Missing required parameter: 'messages'.",
        "image input is not supported by this model",
        "Extra inputs are not permitted",
        "API 调用参数有误",
        "Parameter `top_k` for model m-1 is deprecated.",
        "`temperature` is not supported with this model.",
    ],
)
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_rejection_in_an_event_without_code_is_judged_by_its_words(message: str, api: str) -> None:
    stated = {"code": None, "message": message, "param": None}
    failure = {"error": stated} if api == "chat" else {"type": "error", **stated}
    error = fails(Server(Script([event(failure)])), chosen=settings(api=api))
    assert type(error) is errors.RequestError
    assert message in error.message


@pytest.mark.parametrize(
    "message",
    [
        "An error occurred while processing your request.",
        "Internal error: the worker has stopped",
        "upstream connect error or disconnect/reset before headers",
        "CUDA out of memory",
        "Service tier capacity exceeded for this model.",
    ],
)
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_other_failure_in_an_event_without_code_is_retried(message: str, api: str) -> None:
    stated = {"code": None, "message": message}
    failure = {"error": stated} if api == "chat" else {"type": "error", **stated}
    error = fails(Server(Script([event(failure)])), chosen=settings(api=api))
    assert isinstance(error, errors.TransientError)


def test_unknown_model_in_an_event_without_code_is_a_model_error() -> None:
    words = "The model `gpt-x` does not exist or you do not have access to it."
    server = Server(Script([event({"type": "error", "message": words})]))
    assert isinstance(fails(server), errors.ModelError)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (503, {"message": "Service tier capacity exceeded for this model."}),
        (500, {"message": "Service tier capacity exceeded for this model."}),
        (429, {"message": "Service tier capacity exceeded for this model."}),
        (400, {"message": "The model is currently overloaded."}),
        (500, {"message": "The server is busy, please try again later."}),
        (503, {"message": "no"}),
        (504, {"message": "no"}),
    ],
)
def test_words_or_status_that_say_retry_outrank_the_type(
    status: int, error: dict[str, Any]
) -> None:
    body = {"object": "error", "type": "invalid_request_error", "param": None, "code": None}
    for each in ({**body, **error}, {"error": {**body, **error}}):
        assert isinstance(read(status, each), errors.TransientError)


@pytest.mark.parametrize("status", [403, 429, 400, 502])
@pytest.mark.parametrize(
    "error",
    [
        {
            "message": "Your account org-xx<ak-xx> is not active, organization <org-xx> exceeded "
            "current quota, please check your plan and billing details",
            "type": "exceeded_current_quota_error",
        },
        {"message": "organization <org-xx> exceeded current quota"},
        {"message": "Your account is suspended", "type": "exceeded_current_quota_error"},
        {"message": "Your account is not active, please check your billing details on our site."},
    ],
)
def test_used_up_quota_is_not_blamed_on_the_key(error: dict[str, Any], status: int) -> None:
    assert isinstance(read(status, {"error": error}), errors.QuotaError)


@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize(
    "message",
    [
        "The parameter `max_tokens` for model gpt-5 is deprecated.",
        "Parameter top_k of the model m-1 was removed.",
        "For model m-1, `temperature` is deprecated.",
        "The argument `functions` is no longer supported by models like m-1.",
    ],
)
def test_deprecated_parameter_is_not_a_retired_model(message: str, status: int) -> None:
    assert isinstance(read(status, {"error": {"message": message}}), errors.RequestError)


@pytest.mark.parametrize(
    "message",
    [
        "Invalid parameter: model 'm-1' is deprecated.",
        "Parameter `model`: the model m-1 was retired.",
        "Support for model m-1 was removed; the model is deprecated.",
    ],
)
def test_retired_model_in_a_parameter_is_a_model_error(message: str) -> None:
    assert isinstance(read(400, {"error": {"message": message}}), errors.ModelError)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    "error",
    [
        {"code": "403", "message": "Access denied due to Virtual Network/Firewall rules."},
        {"message": "A Virtual Network is configured for this resource. Use the correct endpoint."},
        {"message": "Public access is disabled. Please configure private endpoint."},
        {"message": "Your IP address 1.2.3.4 is not in the allowed list of this project."},
        {"message": "x", "code": "ip_not_authorized"},
        {"message": "x", "details": [{"reason": "API_KEY_IP_ADDRESS_BLOCKED"}]},
    ],
)
def test_refusal_by_a_network_rule_is_not_about_the_key(error: dict[str, Any], status: int) -> None:
    refused = read(status, {"error": error})
    assert type(refused) is errors.NetworkRefusedError
    assert "network" in refused.message
    assert "VPN" in refused.advice
    assert type(read(status, error)) is errors.NetworkRefusedError


@pytest.mark.parametrize("status", [400, 403, 429])
@pytest.mark.parametrize(
    "error",
    [
        {"message": "Free allocated quota exceeded.", "code": "insufficient_quota"},
        {"message": "Free allocated quota exceeded."},
        {
            "message": "The free tier of the model has been exhausted. If you wish to continue "
            "access the model on a paid basis, please disable the mode.",
            "type": "invalid_request_error",
        },
        {"message": "该模型的免费额度已用完"},
    ],
)
def test_free_quota_that_is_used_up_is_a_quota(error: dict[str, Any], status: int) -> None:
    refused = read(status, {"error": error})
    assert isinstance(refused, errors.QuotaError)
    assert "free quota" in refused.message
    assert "paid" in refused.advice


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("INSUFFICIENT_G1_CREDITS_BALANCE", errors.QuotaError),
        ("MODEL_CAPACITY_EXHAUSTED", errors.OverloadedError),
        ("RATE_LIMIT_EXCEEDED", errors.LimitError),
    ],
)
def test_reason_in_google_details_is_a_code(reason: str, expected: type[Exception]) -> None:
    kind = "type.googleapis.com/google.rpc.ErrorInfo"
    details = [{"@type": kind, "reason": reason, "metadata": {"error_number": "2008"}}]
    message = "Resource has been exhausted (e.g. check quota)."
    body = {"code": 429, "message": message, "status": "RESOURCE_EXHAUSTED", "details": details}
    assert type(read(429, {"error": body})) is expected
    assert type(read(429, [{"error": body}])) is expected
