"""What self-hosted servers, gateways and relays refuse is judged by what their words say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nbcodex import errors
from nbcodex.models import DAY
from nbcodex.openai_api import rate_limits
from tests.openai_api.scripted import DONE, Script, Server, chunk, event, fails, settings
from tests.openai_api.test_error_bodies import read
from tests.openai_api.test_sse_decoder import fed


def failure_in_stream(payload: object, api: str = "chat") -> errors.NbcodexError:
    """Return the error of a stream in which `payload` follows half an answer."""
    begun = chunk("Half")
    if api == "responses":
        begun = event({"type": "response.output_text.delta", "delta": "Half"})
    script = Script([begun, event(payload, "error"), DONE])
    return fails(Server(script), chosen=settings(api=api))


@pytest.mark.parametrize("status", [400, 403])
@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("user quota is not enough (request id: 2024)", "insufficient_user_quota"),
        ("user [3446] quota [-2]preConsumedQuota [743]is not enough", "insufficient_user_quota"),
        ("user quota is not enough", ""),
        ("用户额度不足, 剩余额度: -0.002000", ""),
        ("该令牌额度已用尽", ""),
        ("预扣费额度失败, 用户剩余额度: 0.1", ""),
        ("Insufficient credits. Add more using https://x.example/credits", 403),
        ("You exceeded your monthly spend limit for this key", None),
        ("no", "pre_consume_token_quota_failed"),
        ("Key limit exceeded (monthly limit). Manage it using https://x.example/keys", 403),
        ("Key limit exceeded (total limit).", 403),
        ("This API key has reached its monthly budget.", None),
    ],
)
def test_used_up_credit_is_not_blamed_on_the_key(message: str, code: object, status: int) -> None:
    error = read(status, {"error": {"message": message, "type": "new_api_error", "code": code}})
    assert isinstance(error, errors.QuotaError)
    assert isinstance(failure_in_stream({"error": {"message": message, "code": code}}), type(error))


def test_input_tokens_per_minute_are_a_rate_limit() -> None:
    error = read(429, {"error": {"message": "Your input tokens per minute exceed the limit"}})
    assert isinstance(error, errors.LimitError)


def test_rate_limit_of_a_key_is_not_its_spending_limit() -> None:
    assert isinstance(read(429, {"error": "API key limit exceeded"}), errors.LimitError)


TOO_LONG = [
    "The input (61709 tokens) is longer than the model's context length (40960 tokens).",
    "Input length (160062 tokens) exceeds the maximum allowed length (59862 tokens).",
    "The number of tokens to keep from the initial prompt is greater than the context length.",
    "The prompt exceeds the model's maximum sequence length of 4096.",
    "Input tokens (5000) exceed the configured limit of 4096 tokens.",
    "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
    "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000",
    "Invalid request: Your request exceeded model token limit: 8192",
    "Context size has been exceeded.",
    "Range of input length should be [1, 30720]",
]


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("message", TOO_LONG)
def test_input_longer_than_the_context_is_too_large(message: str, api: str) -> None:
    assert isinstance(read(400, {"message": message, "code": 400}), errors.TooLargeError)
    assert isinstance(read(400, {"error": message}), errors.TooLargeError)
    for payload in ({"error": {"message": message}}, {"error": message, "message": message}):
        assert isinstance(failure_in_stream(payload, api), errors.TooLargeError)


@pytest.mark.parametrize(
    "what", ["Image exceeds the maximum allowed size", "Stop exceeds the length"]
)
def test_too_large_part_is_not_a_prompt_longer_than_the_context(what: str) -> None:
    assert isinstance(read(400, {"error": what}), errors.RequestError)


@pytest.mark.parametrize(
    "error",
    [
        {"message": "Unable to access non-serverless model m.", "code": "model_not_available"},
        {"message": "It is not running.", "code": "dedicated_endpoint_not_running"},
        {"message": "The dedicated endpoint for a/b-0.1 is not running. Start it."},
        {"message": "Invocation of model ID m-1:0 with on-demand throughput isn\u2019t supported."},
        {"message": "The model m is not available for serverless inference"},
        {"message": "... with on-demand throughput isn't supported. Retry with the ARN of an i..."},
    ],
)
def test_model_that_needs_an_endpoint_is_about_the_model(error: dict[str, Any]) -> None:
    failure = read(400, {"error": {"type": "invalid_request_error", **error}})
    assert isinstance(failure, errors.ModelError)
    assert "another" in failure.advice


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("request_timeout", "no"),
        ("server_error", "no"),
        ("upstream_error", "no"),
        ("stream_read_error", "no"),
        ("processing_error", "An error occurred. You can retry your request."),
        (None, "stream disconnected before completion: stream closed before response.completed"),
    ],
)
def test_passing_failure_is_retried_despite_a_generic_type(
    code: str | None, message: str, api: str
) -> None:
    error = {"type": "invalid_request_error", "code": code, "message": message}
    assert isinstance(failure_in_stream({"type": "error", "error": error}, api), errors.ServerError)
    assert isinstance(read(400, {"error": error}), errors.ServerError)
    assert isinstance(read(500, {"error": error}), errors.ServerError)


@pytest.mark.parametrize("detail", ["Function id 'a': DEGRADED function cannot be invoked"])
def test_degraded_function_is_retried(detail: str) -> None:
    error = read(400, {"status": 400, "title": "Bad Request", "detail": detail})
    assert isinstance(error, errors.ServerError)
    assert detail in error.message


@pytest.mark.parametrize(
    "words",
    [
        "Function 'a-1': Not found for account 'x'",
        "Specified function in account 'x' is not found",
        "The deployment gpt-x does not exist",
    ],
)
def test_missing_function_is_not_blamed_on_the_address(words: str) -> None:
    error = read(404, {"status": 404, "title": "Not Found", "detail": words})
    assert isinstance(error, errors.ModelError)
    assert "address" not in error.message


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (
            {"error": [{"code": 2009, "message": "Unauthorized"}], "name": "AiGatewayError"},
            ["2009", "AiGatewayError"],
        ),
        ({"error": {"message": "Forbidden.", "code": "E17", "type": "a_error"}}, ["E17"]),
    ],
)
def test_message_of_one_word_is_shown_with_code_and_name(body: object, names: list[str]) -> None:
    error = read(401, body)
    assert all(name in error.message for name in names)


def test_refusal_of_a_gateway_names_both_causes() -> None:
    body = {"error": [{"code": 2009, "message": "Unauthorized"}], "name": "AiGatewayError"}
    error = read(401, body)
    assert isinstance(error, errors.CredentialsError)
    assert "does not accept" not in error.message
    assert "too fast" in error.advice


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5.03:23:11", 5 * DAY + 12_191),
        ("22.14:18:12", 22 * DAY + 51_492),
        ("00:00:30.5000000", 30.5),
        ("5 days, 3:23:11", 5 * DAY + 12_191),
        ("1 day, 0:00:01.250000", DAY + 1.25),
        ("P5DT23H", 5 * DAY + 82_800),
        ("PT1M30.5S", 90.5),
        ("P1W", 7 * DAY),
        ("PT45S", 45),
    ],
)
def test_wait_in_the_notation_of_a_platform_is_read(text: str, seconds: float) -> None:
    headers = {"retry-after": text}
    assert rate_limits.wait_in_headers(headers, wall_time=0.0) == seconds
    for message in (f"Quota will be replenished in {text}.", f"Retry after {text}"):
        assert rate_limits.wait_in_message(message) == seconds


@pytest.mark.parametrize("text", ["P", "PT", "P1M", "5.3:2:1", "the P5D", "PT1X"])
def test_what_is_no_duration_is_not_read_as_one(text: str) -> None:
    assert rate_limits.parse_duration(text) is None


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("space", ["", " "])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"code": 400, "message": "exceeds the available context size"}, errors.TooLargeError),
        ({"code": 500, "message": "KV cache is full"}, errors.ServerError),
        (
            {"code": 400, "message": "prompt is too long", "type": "invalid_request_error"},
            errors.TooLargeError,
        ),
    ],
)
def test_error_in_a_field_of_its_own_is_read(
    error: dict[str, Any], kind: type[Exception], space: str, api: str
) -> None:
    field = f"error:{space}{json.dumps(error)}\n\n".encode()
    begun = [] if api == "responses" else [chunk("Half")]
    for parts in ([field, DONE], [field], [*begun, field, DONE]):
        failure = fails(Server(Script(parts)), chosen=settings(api=api))
        assert isinstance(failure, kind)
        assert error["message"] in failure.message
    assert error["message"] in read(500, field.decode()).message


def test_unknown_fields_of_an_event_are_ignored() -> None:
    assert fed(b'error: words\nerrors: {"a": 1}\nx: {}\ndata: a\n\n') == [("", "a")]
    assert fed(b'data: a\nerror: {"b": 1}\n\n') == [("error", '{"b": 1}'), ("", "a")]
