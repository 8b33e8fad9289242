"""Every way to fail becomes exactly one of our errors."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbcodex import errors
from nbcodex.errors import MAX_MESSAGE_CHARS, NbcodexError, TransientError
from nbcodex.openai_api import api_errors
from nbcodex.openai_api.rate_limits import MAX_WAIT_S

WALL = 1_800_000_000.0
TPM = (
    "Rate limit reached for m in organization o on tokens per min (TPM): "
    "Limit 30000, Used 22999, Requested 12528."
)
TOO_LARGE = (
    "Request too large for m in organization o on tokens per min (TPM): Limit 30000, "
    "Requested 36278. The input or output tokens must be reduced in order to run successfully."
)


def body(**error: Any) -> bytes:
    return json.dumps({"error": {"message": "no", "type": None, "param": None, **error}}).encode()


STATUSES = [
    (429, body(type="tokens", code="rate_limit_exceeded", message=TPM), "LimitError"),
    (429, body(type="requests", code="rate_limit_exceeded"), "LimitError"),
    (429, body(code="429", message="exceeded token rate limit"), "LimitError"),
    (429, b"<html><h1>429 Too Many Requests</h1><hr>nginx</html>", "LimitError"),
    (429, b"", "LimitError"),
    (403, body(code="rate_limit_exceeded"), "LimitError"),
    (429, body(type="tokens", code="rate_limit_exceeded", message=TOO_LARGE), "TooLargeError"),
    (429, body(type="insufficient_quota", code="insufficient_quota"), "QuotaError"),
    (402, body(message="Insufficient Balance"), "QuotaError"),
    (400, body(code="context_length_exceeded"), "TooLargeError"),
    (400, body(message="This model's maximum context length is 4096 tokens."), "TooLargeError"),
    (413, b"", "TooLargeError"),
    (401, body(code="invalid_api_key"), "CredentialsError"),
    (403, body(), "CredentialsError"),
    (407, b"", "ConnectionSettingsError"),
    (404, body(code="model_not_found"), "ModelError"),
    (403, body(code="model_not_found"), "ModelError"),
    (404, body(code="DeploymentNotFound"), "ModelError"),
    (404, b"not found", "ModelError"),
    (400, body(type="invalid_request_error", code="invalid_prompt"), "RequestError"),
    (400, b'{"detail": [{"loc": ["body", "x"], "msg": "Extra inputs"}]}', "RequestError"),
    (422, b'{"error": "just a string"}', "RequestError"),
    (400, b"[" * 100_000, "RequestError"),
    (302, b"", "RequestError"),
    (503, body(type="service_unavailable_error", code="server_is_overloaded"), "OverloadedError"),
    (429, body(code="slow_down"), "LimitError"),
    (503, body(type="server_error", code="slow_down"), "LimitError"),
    (503, b"<html>", "OverloadedError"),
    (529, b"", "OverloadedError"),
    (500, body(type="server_error"), "ServerError"),
    (500, body(message="the context window of the house is broken"), "ServerError"),
    (502, b"<html>Bad Gateway</html>", "ServerError"),
    (504, b"", "ServerError"),
    (408, b"", "ServerError"),
    (409, body(), "ServerError"),
    (425, b"", "ServerError"),
    (999, b"\x00\xff", "ServerError"),
]


@pytest.mark.parametrize(("status", "raw_body", "name"), STATUSES)
def test_status_and_body_become_one_error_with_advice(
    status: int, raw_body: bytes, name: str
) -> None:
    error = api_errors.from_status(status, {}, raw_body, wall_time=WALL)
    assert type(error).__name__ == name
    assert error.message
    assert error.advice
    assert "<" not in error.message


def from_event(payload: object, headers: dict[str, str] | None = None) -> NbcodexError:
    failed = api_errors.AnswerFailedError(payload)
    return api_errors.from_exception(failed, wall_time=WALL, headers=headers)


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (
            {"type": "error", "error": {"code": "rate_limit_exceeded", "type": "tokens"}},
            "LimitError",
        ),
        ({"type": "error", "code": "rate_limit_exceeded", "message": TPM}, "LimitError"),
        (
            {
                "type": "response.failed",
                "response": {"error": {"code": "rate_limit_exceeded", "message": TPM}},
            },
            "LimitError",
        ),
        ({"type": "response.failed", "response": {"id": "r", "error": None}}, "ServerError"),
        ({"error": {"code": 429, "message": "slow"}}, "LimitError"),
        ({"error": {"code": 502, "message": "upstream"}}, "ServerError"),
        ({"error": {"code": 400, "message": "bad"}}, "RequestError"),
        ({"error": {"code": "insufficient_quota"}}, "QuotaError"),
        ({"error": {"code": "context_length_exceeded"}}, "TooLargeError"),
        ({"error": {"code": "invalid_prompt"}}, "RequestError"),
        ({"error": {"code": "cyber_policy"}}, "RequestError"),
        ({"error": {"code": "server_error"}}, "ServerError"),
        ({"error": {"code": "server_is_overloaded"}}, "OverloadedError"),
        ({"error": {"code": "who knows"}}, "ServerError"),
        ({"error": "words"}, "ServerError"),
        ({"error": {"code": [1], "message": {"a": 1}, "type": 5}}, "ServerError"),
        ([], "ServerError"),
        (None, "ServerError"),
        (17, "ServerError"),
    ],
)
def test_error_event_is_classified_by_code_and_type(payload: object, name: str) -> None:
    assert type(from_event(payload)).__name__ == name


REQUEST = httpx2.Request("POST", "https://x.example/v1/responses")


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (openai.APITimeoutError(REQUEST), "TransportError"),
        (openai.APIConnectionError(request=REQUEST), "TransportError"),
        (openai.APIError("x", REQUEST, body={"code": "rate_limit_exceeded"}), "LimitError"),
        (openai.APIError("x", REQUEST, body=None), "ServerError"),
        (openai.OpenAIError("Missing credentials"), "ConfigurationError"),
        (httpx2.ReadError("gone"), "TransportError"),
        (httpx2.RemoteProtocolError("peer closed"), "TransportError"),
        (httpx2.ReadTimeout("slow"), "TransportError"),
        (httpx2.DecodingError("bad gzip"), "TransportError"),
        (ConnectionResetError(), "TransportError"),
        (TimeoutError(), "TransportError"),
        (json.JSONDecodeError("bad", "{", 1), "ServerError"),
        (RecursionError(), "ServerError"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), "ServerError"),
        (KeyError("x"), "ServerError"),
        (errors.QuotaError("same"), "QuotaError"),
    ],
)
def test_exceptions_of_sdk_http_and_decoder_become_our_errors(error: Exception, name: str) -> None:
    assert type(api_errors.from_exception(error, wall_time=WALL)).__name__ == name


@pytest.mark.parametrize("status", [429, 500, None])
def test_exhausted_quota_is_permanent_despite_status_429(status: int | None) -> None:
    raw_body = body(type="insufficient_quota", code="insufficient_quota", message="You exceeded …")
    if status is None:
        error = from_event(json.loads(raw_body), {"retry-after": "5"})
    else:
        error = api_errors.from_status(status, {"retry-after": "5"}, raw_body, wall_time=WALL)
    assert not isinstance(error, TransientError)


def test_request_above_the_whole_limit_is_too_large_and_says_by_how_much() -> None:
    raw_body = body(type="tokens", code="rate_limit_exceeded", message=TOO_LARGE)
    error = api_errors.from_status(429, {"retry-after": "1"}, raw_body, wall_time=WALL)
    assert isinstance(error, errors.TooLargeError)
    assert "6,278 over the limit of 30,000 tokens per minute" in error.message


@pytest.mark.parametrize(
    ("headers", "message", "wait"),
    [
        ({"retry-after-ms": "1500", "retry-after": "9"}, "Please try again in 5s.", 1.5),
        ({"retry-after": "9"}, "Please try again in 5s.", 9.0),
        ({}, f"{TPM} Please try again in 5s.", 5.0),
        ({}, TPM, 11.054),
        ({"retry-after": "nan"}, "No idea.", None),
    ],
)
def test_wait_sources_are_tried_in_order(
    headers: dict[str, str], message: str, wait: float | None
) -> None:
    """Milliseconds, then seconds, then the message, then its figures, then nothing."""
    raw_body = body(code="rate_limit_exceeded", message=message)
    error = api_errors.from_status(429, headers, raw_body, wall_time=WALL)
    assert isinstance(error, TransientError)
    assert error.wait == (wait and pytest.approx(wait, abs=1e-3))


def test_retry_after_counts_on_503() -> None:
    error = api_errors.from_status(503, {"retry-after": "7"}, b"", wall_time=WALL)
    assert isinstance(error, TransientError)
    assert error.wait == 7.0


def test_redirect_error_names_the_host_without_credentials() -> None:
    location = {"location": "https://user:pw@evil.example/path?q=1"}
    error = api_errors.from_status(307, location, b"", wall_time=WALL)
    assert "evil.example" in error.message
    assert "pw" not in error.message


def test_server_message_is_shortened_and_printable() -> None:
    error = api_errors.from_status(
        400, {}, body(message="\x1b[31m\r\n" + "x\u202e" * 9999), wall_time=WALL
    )
    assert len(error.message) <= MAX_MESSAGE_CHARS
    assert error.message.isprintable()


def test_echoed_secret_is_removed_even_across_a_cut() -> None:
    key = "sk-0123456789"

    def clean(text: str) -> str:
        return text.replace(key, "*")

    for gap in range(3960, 4010):
        raw_body = body(message=f"a{' ' * gap}{key}{key}", code=key, type=key)
        error = api_errors.from_status(
            400, {"location": key}, raw_body, wall_time=WALL, clean=clean
        )
        assert "sk-0" not in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "message", "code", "type", "response", "detail", "x"]), inner
        )
    ),
    max_leaves=12,
)


@given(st.integers(300, 600), JSON | st.binary(max_size=50), st.text(max_size=20))
def test_any_status_and_body_become_an_error_with_a_valid_wait(
    status: int, raw_body: Any, header: str
) -> None:
    raw = raw_body if isinstance(raw_body, bytes) else json.dumps(raw_body).encode()
    for error in (
        api_errors.from_status(status, {"retry-after": header}, raw, wall_time=WALL),
        from_event(raw_body, {"retry-after": header}),
    ):
        assert isinstance(error, NbcodexError)
        wait = getattr(error, "wait", None)
        assert wait is None or 0 <= wait <= MAX_WAIT_S
