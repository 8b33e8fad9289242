"""Errors as providers and gateways really send them (the reports are named in the code)."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from nbcodex.errors import (
    LimitError,
    ModelError,
    NbcodexError,
    OverloadedError,
    QuotaError,
    RequestError,
    TransientError,
)
from nbcodex.models import DAY, MINUTE
from nbcodex.openai_api import api_errors

WALL = datetime(2026, 11, 30, 8, 0, tzinfo=UTC).timestamp()


def error(status: int, body: object, headers: dict[str, str] | None = None) -> NbcodexError:
    raw = body if isinstance(body, str) else json.dumps(body)
    return api_errors.from_status(status, headers or {}, raw, wall_time=WALL)


def limit_error(
    body: object, headers: dict[str, str] | None = None, status: int = 429
) -> LimitError:
    found = error(status, body, headers)
    assert isinstance(found, LimitError)
    return found


def google(quota_id: str, value: str, delay: str, **more: Any) -> dict[str, Any]:
    failure = {
        "@type": "type.googleapis.com/google.rpc.QuotaFailure",
        "violations": [{"quotaId": quota_id, "quotaValue": value}],
    }
    retry = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}
    fields = {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": [failure, retry], **more}
    return {"error": {"message": "Quota exceeded, see the plan.", **fields}}


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize(
    "message",
    ["Quota exceeded, see the plan.", "You exceeded your current quota, please check your plan."],
)
def test_gemini_minute_limit_has_wait_and_figures(as_list: bool, message: str) -> None:
    quota_id = "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"
    body = google(quota_id, "10", "7.307s", message=message)
    found = limit_error([body] if as_list else body)
    assert found.wait == pytest.approx(7.307)
    assert (found.limit.resource, found.limit.window, found.limit.limit) == ("requests", MINUTE, 10)
    assert "Requests per minute" in found.message


@pytest.mark.parametrize(
    ("quota_id", "resource"),
    [
        ("GenerateRequestsPerDayPerProjectPerModel-FreeTier", "requests"),
        ("GenerateContentInputTokensPerModelPerDay-FreeTier", "tokens"),
    ],
)
def test_gemini_daily_limit_waits_until_midnight_pacific(quota_id: str, resource: str) -> None:
    quota_id = quota_id.replace("PerModelPerDay", "PerDayPerModel")
    found = limit_error(google(quota_id, "25", "5s"))
    assert (found.limit.resource, found.limit.window) == (resource, DAY)
    assert found.wait is not None
    assert found.wait >= 3600  # 8:00 UTC is midnight or 1:00 there
    assert found.wait <= DAY


@pytest.mark.parametrize(
    "body",
    [
        {
            "error": {
                "code": 429,
                "message": "Quota exceeded for metric: x/free_tier_requests, "
                "limit: 0, model: m-pro. Please retry in 4.6s.",
            }
        },
        google("GenerateRequestsPerDayPerProjectPerModel-FreeTier", "0", "5s"),
        {
            "error": {
                "message": "Rate limit reached for m on tokens per min (TPM): Limit 0, Used 0, "
                "Requested 9.",
                "type": "tokens",
                "code": "rate_limit_exceeded",
            }
        },
    ],
)
def test_limit_of_zero_is_permanent(body: dict[str, Any]) -> None:
    found = error(429, body)
    assert isinstance(found, QuotaError)
    assert "plan does not include this model" in found.message


@pytest.mark.parametrize("status", [429, 400])
@pytest.mark.parametrize(
    "raw",
    [
        "some/model is busy upstream, retry in 8 seconds or use your own key",
        json.dumps({"error": {"message": "Model is busy. Please try again in 8s.", "code": 429}}),
        {"error": {"message": "Too many requests: retry after 8 seconds"}},
    ],
)
def test_openrouter_quotes_the_provider_and_waits_as_it_asks(status: int, raw: Any) -> None:
    metadata = {"raw": raw, "provider_name": "HostX"}
    body = {"error": {"message": "Provider returned error", "code": status, "metadata": metadata}}
    found = error(status, body)
    assert isinstance(found, TransientError)
    assert found.wait == 8
    assert "HostX" in found.message
    assert "Provider returned error" not in found.message


def test_openrouter_permanent_error_of_the_provider_stays_permanent() -> None:
    metadata = {"raw": "temperature must be below 2", "provider_name": "HostX"}
    body = {"error": {"message": "Provider returned error", "code": 400, "metadata": metadata}}
    found = error(400, body)
    assert isinstance(found, RequestError)
    assert "temperature must be below 2" in found.message


@pytest.mark.parametrize("scale", [1, 1000])
def test_openrouter_daily_limit_is_in_the_headers_of_its_body(scale: int) -> None:
    headers = {
        "X-RateLimit-Limit": "50",
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": str(int(WALL + 5 * 3600) * scale),
    }
    message = "Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000."
    body = {"error": {"message": message, "code": 429, "metadata": {"headers": headers}}}
    found = limit_error(body)
    assert found.wait == pytest.approx(5 * 3600)
    assert (found.limit.resource, found.limit.window, found.limit.limit) == ("requests", DAY, 50)


@pytest.mark.parametrize(
    ("message", "resource", "window", "limit", "used"),
    [
        (
            "Limit crossed: TPM / RPM / parallel. current rpm: 1, rpm limit: 15, "
            "current tpm: 12260, tpm limit: 5000, current parallel: 1",
            "tokens",
            MINUTE,
            5000,
            12260,
        ),
        (
            "Crossed Limit. current rpm: 15, rpm limit: 15, current tpm: 12, tpm limit: 5000",
            "requests",
            MINUTE,
            15,
            15,
        ),
        (
            "Rate limit exceeded for api_key: x. Limit type: tokens. Current limit: 3, "
            "Remaining: 0. Limit resets at: 2026-11-30 08:00:40 UTC",
            "tokens",
            None,
            3,
            None,
        ),
    ],
)
def test_litellm_names_the_limit_that_was_crossed(
    message: str, resource: str, window: float | None, limit: float, used: float | None
) -> None:
    found = limit_error(
        {"error": {"message": message, "type": "None", "code": "429"}}, {"retry-after": "40"}
    )
    assert found.wait == 40
    named = found.limit
    assert (named.resource, named.window, named.limit) == (resource, window, limit)
    assert used is None or named.used == used


@pytest.mark.parametrize(
    ("message", "limit"),
    [
        (
            "Rate limit exceeded for api_key: x. Limit type: max_parallel_requests. Current limit: "
            "1, Remaining: 0. Limit resets at: 2026-11-30 08:00:40 UTC",
            1,
        ),
        ("request reached organization max concurrency: 3, please try again later", 3),
        ("Too many concurrent requests (limit 2).", 2),
        ("You have exceeded the maximum of 4 concurrent requests.", 4),
        ("Concurrency limit exceeded.", None),
    ],
)
def test_limit_on_parallel_requests_is_named(message: str, limit: float | None) -> None:
    found = limit_error({"error": {"message": message}}, {"retry-after": "60"})
    assert (found.limit.name, found.limit.limit) == ("parallel requests limit", limit)
    assert found.wait is None  # the minute of other limits
    assert "fewer requests at once" in found.advice


def test_short_wait_for_a_slot_is_kept() -> None:
    body = {"error": {"message": "Too many parallel requests.", "code": "1302"}}
    assert limit_error(body, {"retry-after": "2"}).wait == 2


def test_glm_code_of_too_many_requests_at_once_is_a_parallel_limit() -> None:
    body = {"error": {"message": "High concurrency usage of this API.", "code": "1302"}}
    assert limit_error(body).limit.resource == "parallel requests"


@pytest.mark.parametrize(
    ("kind", "advised"),
    [("tokens", True), ("requests", False), ("max_parallel_requests", False), ("x", False)],
)
def test_only_a_limit_on_tokens_advises_less_output(kind: str, *, advised: bool) -> None:
    body = {"error": {"message": f"Limit type: {kind}. Current limit: 3, Remaining: 0."}}
    assert ("--max-output" in limit_error(body).advice) == advised


def test_slow_down_is_named_as_traffic_that_grows_too_fast() -> None:
    body = {"error": {"message": "Slow down.", "code": "slow_down"}}
    found = limit_error(body, {"retry-after": "3"})
    assert (found.limit.name, found.wait) == ("traffic growth limit", 3)
    assert found.message.startswith("Traffic to the server has grown too fast (HTTP 429)")


def test_litellm_reset_in_the_message_is_the_wait() -> None:
    message = "Limit type: requests. Current limit: 3. Limit resets at: 2026-11-30 08:00:40 UTC"
    assert limit_error({"error": {"message": message}}).wait == pytest.approx(40)


PLAIN = {"error": {"message": "Too many requests"}}
ISO = "2026-11-30T08:00:50Z"


@pytest.mark.parametrize(
    ("headers", "wait", "resource", "window", "limit"),
    [
        (
            {
                "x-ratelimit-limit-requests": "60",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "59s",
            },
            59,
            "requests",
            None,
            60,
        ),
        (
            {"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"api";q=500;w=300'},
            55,
            None,
            300,
            500,
        ),
        ({"ratelimit": "limit=100, remaining=0, reset=30"}, 30, None, None, 100),
        (
            {"ratelimit-limit": "60", "ratelimit-remaining": "0", "ratelimit-reset": "9"},
            9,
            None,
            None,
            60,
        ),
        ({"x-ratelimit-reset": str(int(WALL) + 33)}, 33, None, None, None),
        ({"x-ratelimit-reset": str(int(WALL + 33) * 1000)}, 33, None, None, None),
        ({"x-ratelimit-reset-tokens": ISO}, 50, "tokens", None, None),
        (
            {
                "x-ratelimit-limit-requests-1h": "100",
                "x-ratelimit-remaining-requests-1h": "0",
                "x-ratelimit-reset-requests-1h": "1200",
            },
            1200,
            "requests",
            3600,
            100,
        ),
        (
            {
                "anthropic-ratelimit-input-tokens-limit": "40000",
                "anthropic-ratelimit-input-tokens-remaining": "0",
                "anthropic-ratelimit-input-tokens-reset": ISO,
                "anthropic-ratelimit-requests-limit": "50",
                "anthropic-ratelimit-requests-remaining": "49",
                "anthropic-ratelimit-requests-reset": ISO,
            },
            50,
            "tokens",
            None,
            40000,
        ),
        (
            {
                "x-ratelimit-limit-tokens-minute": "60000",
                "x-ratelimit-remaining-tokens-minute": "0",
                "x-ratelimit-reset-tokens-minute": "11.5",
                "x-ratelimit-limit-requests-day": "900",
                "x-ratelimit-remaining-requests-day": "899",
                "x-ratelimit-reset-requests-day": "80000",
            },
            11.5,
            "tokens",
            MINUTE,
            60000,
        ),
        (
            {
                "x-ratelimit-limit-tokens-5-minute": "500",
                "x-ratelimit-remaining-tokens-5-minute": "0",
                "x-ratelimit-reset-tokens-5-minute": "100",
            },
            100,
            "tokens",
            300,
            500,
        ),
        (
            {
                "x-ratelimit-limit-input-images": "10",
                "x-ratelimit-remaining-input-images": "0",
                "x-ratelimit-reset-input-images": "6s",
                "x-ratelimit-limit-requests": "500",
                "x-ratelimit-remaining-requests": "499",
            },
            6,
            "images",
            None,
            10,
        ),
        (
            {
                "x-ratelimit-limit-messages-day": "40",
                "x-ratelimit-remaining-messages-day": "0",
                "x-ratelimit-reset-messages-day": "90",
            },
            90,
            "messages",
            DAY,
            40,
        ),
        (
            {"x-rate-limit-limit": "10", "x-rate-limit-remaining": "0", "x-rate-limit-reset": "7"},
            7,
            None,
            None,
            10,
        ),
        (
            {
                "x-ratelimit-limit": "10, 10;w=60",
                "x-ratelimit-remaining": "0",
                "x-ratelimit-reset": "7",
            },
            7,
            None,
            None,
            10,
        ),
    ],
)
def test_wait_and_limit_are_read_from_headers_of_every_dialect(
    headers: dict[str, str],
    wait: float,
    resource: str | None,
    window: float | None,
    limit: float | None,
) -> None:
    found = limit_error(PLAIN, headers)
    assert found.wait == pytest.approx(wait)
    named = found.limit
    assert (named.resource, named.window, named.limit) == (resource, window, limit)


def test_limits_that_are_not_exhausted_give_no_wait() -> None:
    headers = {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "59s",
    }
    assert limit_error(PLAIN, headers).wait is None


@pytest.mark.parametrize("kind", ["insufficient_quota", "rate_limit_error", None])
@pytest.mark.parametrize(
    ("code", "says", "advises"),
    [
        ("credit_balance_exhausted", "no credit", "add credit"),
        ("organization_spend_limit_exceeded", "organization's monthly spend limit", "1 December"),
        ("project_spend_limit_exceeded", "project's monthly spend limit", "1 December"),
        ("organization_usage_limit_exceeded", "usage limit", "1 December"),
    ],
)
def test_billing_codes_are_permanent_whatever_the_type(
    kind: str | None, code: str, says: str, advises: str
) -> None:
    found = error(
        429, {"error": {"message": "no", "type": kind, "code": code}}, {"retry-after": "5"}
    )
    assert isinstance(found, QuotaError)
    assert says in found.message
    assert advises in found.advice


def test_spend_limit_that_only_the_type_names_is_not_missing_credit() -> None:
    kind = "project_spend_limit_exceeded"
    for code in (None, 429):
        found = error(429, {"error": {"message": "no", "type": kind, "code": code}})
        assert isinstance(found, QuotaError)
        assert "project's monthly spend limit" in found.message
        assert "1 December" in found.advice


@pytest.mark.parametrize(
    "message",
    [
        "litellm.RateLimitError: You exceeded your current quota, please check your plan.",
        "No deployments available - crossed budget: Exceeded budget for provider openai: 5 >= 5",
    ],
)
def test_quota_behind_a_proxy_is_permanent(message: str) -> None:
    body = {"error": {"message": message, "type": "throttling_error", "code": "429"}}
    assert isinstance(error(429, body), QuotaError)


@pytest.mark.parametrize(
    ("code", "param", "message"),
    [
        (
            "unsupported_value",
            "temperature",
            "Unsupported value: 'temperature' does not support 0.",
        ),
        ("unsupported_parameter", "temperature", "This model has a fixed one."),
        (None, "temperature", "Bad value"),
    ],
)
@pytest.mark.parametrize("status", [500, 502])
def test_wrapped_400_is_permanent_and_names_the_parameter(
    status: int, code: str | None, param: str, message: str
) -> None:
    body = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    found = error(status, {"error": body})
    assert isinstance(found, RequestError)
    assert param in found.message


@pytest.mark.parametrize(
    "body",
    [
        {
            "object": "error",
            "type": "invalid_request_error",
            "message": {
                "detail": [
                    {
                        "type": "extra_forbidden",
                        "loc": ["body", "frequency_penalty"],
                        "msg": "Extra inputs are not permitted",
                    }
                ]
            },
        },
        {
            "detail": [
                {"type": "extra_forbidden", "loc": ["body", "frequency_penalty"], "msg": "Extra"}
            ]
        },
        {"error": {"message": [{"loc": ["body", "frequency_penalty"], "msg": "Extra"}]}},
    ],
)
def test_validation_error_names_the_field(body: dict[str, Any]) -> None:
    found = error(422, body)
    assert isinstance(found, RequestError)
    assert "frequency_penalty: Extra" in found.message


@pytest.mark.parametrize(
    "framed",
    ["data: {}\n\ndata: [DONE]\n\n", "event: error\ndata: {}\n\n", "\n\ndata:{}\n\n"],
)
def test_error_body_framed_as_a_stream_is_read(framed: str) -> None:
    limited = json.dumps({"error": {"message": "slow", "code": "rate_limit_exceeded"}})
    missing = json.dumps({"error": {"message": "none", "code": "model_not_found"}})
    assert isinstance(error(400, framed.format(limited)), LimitError)
    assert isinstance(error(404, framed.format(missing)), ModelError)


@pytest.mark.parametrize(
    ("status", "code"), [(498, None), (429, "capacity_exceeded"), (503, "UNAVAILABLE")]
)
def test_missing_capacity_is_overload(status: int, code: str | None) -> None:
    assert isinstance(error(status, {"error": {"message": "no", "code": code}}), OverloadedError)
