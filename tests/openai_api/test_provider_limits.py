"""How limits, quotas and hopeless failures of many providers are worded, and what they mean."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbcodex.errors import LimitError, NbcodexError, ServerError
from nbcodex.models import DAY, LimitReading
from nbcodex.openai_api import api_errors, rate_limits
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.openai_api.api_errors import AnswerFailedError
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
)
from tests.openai_api.test_schemas_and_images import SCHEMA
from tests.virtual import LoopClock

WALL = 1_790_000_000.0  # 2026-09-21 14:13:20 UTC
HOUR = 3600.0
BUSY = {"error": {"message": "Too many requests"}}


def error_of(body: Any, status: int = 429, headers: dict[str, str] | None = None) -> NbcodexError:
    return api_errors.from_status(status, headers or {}, json.dumps(body), wall_time=WALL)


def quota(message: str) -> dict[str, Any]:
    kind = "insufficient_quota"
    return {"error": {"message": message, "type": kind, "code": kind, "param": None}}


@pytest.mark.parametrize(
    "message",
    [
        "Rate limit exceeded. Retry after: 42",
        "Please wait for 42 seconds and try again.",
        "Rate limit hit, resets in 42s.",
        "Too many requests, try again in 00:00:42.",
        "Next request allowed in 42 seconds",
        "Rate limit reached. Please wait at least 42 seconds.",
        "Slow down (retry_after: 42)",
        "Please try again at 2026-09-21T14:14:02Z.",
    ],
)
def test_wait_in_a_message_is_read(message: str) -> None:
    assert error_of({"error": {"message": message}}).wait == 42.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("message", "wait"),
    [
        ("Try again in one minute.", 60.0),
        ("Please slow down. Retry in a minute.", 60.0),
        ("Please retry in an hour", HOUR),
        ("Out of call volume quota. Quota will be replenished in 01:12:34.", 4354.0),
        # GLM's dates are those of Beijing.
        (
            "Usage limit reached for 5 hour. Your limit will reset at 2026-09-22 01:13:20",
            3 * HOUR,
        ),
        ("Please try again later.", None),
        ("Please wait before trying again.", None),
        ("Retry after the reset of version 7", None),
        ("Try again in 5-10 minutes", 600.0),
        ("Try again in 5\u201310 minutes", 600.0),
        ("Please try again in 5 to 10 minutes.", 600.0),
        ("Retry after 5-10", 10.0),
        ("Retry after 2.5", 2.5),
        ("Retry after 10:30 UTC", None),
        ("Retry after 10:30:00 UTC", None),
        ("Retry after 21.09.2026", None),
        ("Retry after 9/21/2026", None),
        ("Retry after 5-minute cooldown", None),
        ("Try again after 2026-09-21T14:14:02Z", 42.0),
        ("Retry after 2026-09-21 14:14:02 UTC", 42.0),
        ("Retry after 2026-09-21", None),
        # GitHub Copilot, ChatGPT's plans, Anthropic; without a zone, it is read as UTC.
        ("Please wait for your limit to reset on September 23, 2026 at 2:13 AM", 36 * HOUR - 20),
        ("Usage limit reached, try again at Sep 23rd, 2026 2:13 PM.", 48 * HOUR - 20),
        ("It resets on 22 Sep 2026 at 12:13 AM UTC, or sooner", 10 * HOUR - 20),
        ("You will regain access on 2026-10-21 at 14:13 UTC.", 30 * DAY - 20),
        ("Try again at September 41, 2026 99:13 PM", None),
    ],
)
def test_other_waits_in_messages(message: str, wait: float | None) -> None:
    assert rate_limits.wait_in_message(message, wall_time=WALL) == wait


@pytest.fixture
def local_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def select(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield select
    monkeypatch.undo()
    time.tzset()


GLM = "Usage limit reached for 5 hour. Your limit will reset at {}"
GLM_IN_CHINESE = "已达到 5 小时的使用上限。您的限额将在 {} 重置。"
FIVE_HOURS = "Your 5-hour limit is used up. It resets at {}"
IN_BEIJING, IN_UTC = "2026-09-22 01:13:20", "2026-09-21 17:13:20"  # three hours after WALL


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="a zone for one process needs tzset")
@pytest.mark.parametrize(
    ("message", "zone", "date"),
    [
        (GLM, "UTC", IN_BEIJING),
        (GLM, "UTC", IN_UTC),
        (GLM, "UTC", "2026-09-21T17:13:20Z"),
        (f"[1308][{GLM}][202609212213]", "UTC", IN_BEIJING),
        (GLM_IN_CHINESE, "America/New_York", IN_BEIJING),
        (GLM_IN_CHINESE, "UTC", IN_UTC),
        (FIVE_HOURS, "UTC", IN_UTC),
        (FIVE_HOURS, "UTC", IN_BEIJING),
        (FIVE_HOURS, "Asia/Tokyo", "2026-09-22 02:13:20"),
        ("Limit reached. It resets at {}", "America/New_York", "2026-09-21 13:13:20"),
        ("Limit reached. It resets at {}", "Asia/Tokyo", IN_UTC),
        ("Limit reached. It resets at {}", "Asia/Tokyo", "2026-09-22T01:13:20+08:00"),
        ("Limit reached. It resets at {} (UTC+8)", "UTC", IN_BEIJING),
    ],
)
def test_date_without_a_zone_is_read_in_the_zone_in_which_it_is_plausible(
    message: str, zone: str, date: str, local_zone: Callable[[str], None]
) -> None:
    local_zone(zone)
    stated = message.format(date)
    assert rate_limits.wait_in_message(stated, wall_time=WALL) == 3 * HOUR
    nested = json.dumps({"error": {"message": stated, "code": "1308"}})
    for body, status in ((stated, 429), (f"all failed: 429: {nested}", 502)):
        found = error_of({"error": {"message": body}}, status)
        assert isinstance(found, LimitError)
        assert found.wait == 3 * HOUR


@pytest.mark.parametrize(
    ("message", "wait"),
    [
        # It has just passed, whatever another zone makes of it.
        ("The limit per minute is reached. It resets at 2026-09-21 14:12:50", None),
        (GLM.format("2026-09-21 22:13:10"), None),
        # It is beyond the window in every zone.
        (GLM.format("2026-09-23 22:13:20"), 2 * DAY),
        (FIVE_HOURS.format("2026-09-23 14:13:20"), 2 * DAY),
    ],
)
def test_date_that_is_plausible_in_no_zone_is_read_in_the_first(message: str, wait: float) -> None:
    assert rate_limits.wait_in_message(message, wall_time=WALL) == wait


@pytest.mark.parametrize(
    "error",
    [
        {"code": "1308", "message": "Usage limit reached for 5 hour."},
        {"code": "1310", "message": "Weekly/Monthly Limit Exhausted."},
        {"message": "已达到 5 小时的使用上限。您的限额将在 2026-09-22 01:13:20 重置。"},
    ],
)
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_plan_limit_in_a_stream_is_a_limit(error: dict[str, str], api: str) -> None:
    failure = {"error": error} if api == "chat" else {"type": "error", **error}
    found = fails(Server(Script([event(failure)])), chosen=settings(api=api))
    assert isinstance(found, LimitError)
    assert ".." not in found.message
    assert "\u3002." not in found.message


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "Rate limited", "retry_after": 42}},
        {"error": {"message": "Rate limited"}, "retry_after_seconds": 42},
        {"error": {"message": "Rate limited", "metadata": {"retry_after_seconds": "42"}}},
        {"error": {"message": "Rate limited", "resets_at": WALL + 42}},
        {"error": {"message": "Rate limited", "resets_in_seconds": 42}},
    ],
)
def test_wait_in_a_body_is_read(body: dict[str, Any]) -> None:
    assert error_of(body).wait == 42.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("stated", ["42", "42, 42", "42 seconds", "42s"])
def test_wait_in_a_header_is_read(stated: str) -> None:
    assert rate_limits.wait_in_headers({"retry-after": stated}, wall_time=WALL) == 42.0


@pytest.mark.parametrize(
    ("headers", "wait", "tokens"),
    [
        # Anthropic: the week's limit is not what refused the request.
        (
            {
                "anthropic-ratelimit-unified-status": "rejected",
                "anthropic-ratelimit-unified-reset": f"{WALL + HOUR:.0f}",
                "anthropic-ratelimit-unified-5h-status": "rejected",
                "anthropic-ratelimit-unified-5h-reset": f"{WALL + HOUR:.0f}",
                "anthropic-ratelimit-unified-7d-status": "allowed",
                "anthropic-ratelimit-unified-7d-reset": f"{WALL + 5 * DAY:.0f}",
            },
            HOUR,
            None,
        ),
        # Mistral
        (
            {
                "ratelimitbysize-limit": "500000",
                "ratelimitbysize-remaining": "0",
                "ratelimitbysize-reset": "42",
            },
            42.0,
            LimitReading(limit=500_000.0, remaining=0.0, full_in=42.0),
        ),
    ],
)
def test_limit_that_refused_decides_the_wait(
    headers: dict[str, str], wait: float, tokens: LimitReading | None
) -> None:
    assert error_of(BUSY, headers=headers).wait == wait  # type: ignore[attr-defined]
    assert rate_limits.read_snapshot(headers, at=0.0).tokens == tokens


@pytest.mark.parametrize(
    "body",
    [
        {"message": "Too many tokens per day, please wait before trying again."},  # Bedrock
        {"message": "You are using a Trial key, which is limited to 1000 API calls / month."},
        {"error": "you (x) have reached your weekly usage limit, upgrade for higher limits"},
        {"errors": [{"message": "you have used up your daily free allocation", "code": 4006}]},
        {"error": {"message": "Token limit (500,000 per day) exceeded. Used: 508,311 tokens."}},
        {"message": "Minute limit: 0 / 1600000 tokens. Day limit: 2105 / 10 tokens."},
    ],
    ids=["Bedrock", "Cohere", "Ollama", "Cloudflare", "gpt4free", "DIAL"],
)
def test_long_window_without_a_stated_wait_is_not_asked_again_soon(body: Any) -> None:
    error: Any = error_of(body)
    assert type(error).__name__ == "LimitError"
    assert error.limit.window >= DAY
    assert error.wait >= HOUR
    assert "credit" not in error.message


@pytest.mark.parametrize(
    ("status", "body", "name"),
    [
        (403, {"message": "You have exceeded a secondary rate limit. Please wait."}, "LimitError"),
        (403, {"message": "Out of call volume quota. Quota will be replenished."}, "LimitError"),
        (400, {"__type": "ThrottlingException", "message": "Too many requests"}, "LimitError"),
        (400, {"error": {"message": "litellm: Too many requests, please wait."}}, "LimitError"),
        (400, {"error": {"message": "status 429. Rate limit is exceeded."}}, "LimitError"),
        (400, {"error": {"message": "Requests have exceeded call rate limit"}}, "LimitError"),
        (400, {"error": {"message": "Budget!", "type": "budget_exceeded"}}, "QuotaError"),
        (429, {"error": {"message": "Budget!", "type": "budget_exceeded"}}, "QuotaError"),
        (400, [{"error": {"message": "API key not valid.", "code": 400}}], "CredentialsError"),
        (400, {"error": {"message": "API key expired. Please renew."}}, "CredentialsError"),
        # The codes and the words of missing credit, but waiting helps.
        (
            429,
            quota("Exceeded your current quota: x.com/error-code#token-limit"),
            "LimitError",
        ),
        (429, quota("Allocated quota exceeded, please increase your limit."), "LimitError"),
        (429, quota("You exceeded your current quota. Please retry in 58 hours."), "LimitError"),
        (429, quota("You exceeded your current quota, check your plan."), "QuotaError"),
        (
            400,
            {
                "error": {
                    "type": "invalid_request_error",
                    "message": "You have reached your specified API usage limits. You will regain "
                    "access on 2026-10-01 at 00:00 UTC.",
                }
            },
            "LimitError",
        ),
        (403, {"error": {"code": "AccountOverdueError", "message": "no"}}, "QuotaError"),
        (
            403,
            {"code": 30001, "message": "Sorry, your account balance is insufficient"},
            "QuotaError",
        ),
        (403, {"code": 403, "reason": "X", "message": "not enough balance"}, "QuotaError"),
        (403, {"error": {"code": "AllocationQuota.FreeTierOnly", "message": "no"}}, "QuotaError"),
        (400, {"error": {"message": "hit", "code": "blocked_api_access"}}, "QuotaError"),
        (412, {"error": {"message": "due to reaching the monthly spending limit"}}, "QuotaError"),
        (500, {"error": {"message": "You exceeded your current quota, see plan"}}, "QuotaError"),
        # A relay's status, and the words of the provider's limit.
        (500, {"error": {"message": "Token limit (5 per day) exceeded. Used: 6"}}, "LimitError"),
        (502, {"error": {"message": "Rate limit exceeded: free-models-per-min."}}, "LimitError"),
        (404, {"error": {"message": "Unrecognized request argument: x"}}, "RequestError"),
        (429, {"error": {"message": "no", "code": "quota_exceeded"}}, "QuotaError"),
        (429, {"error": {"message": "Credit limit exceeded, see Billing"}}, "QuotaError"),
        (429, {"error": "You have exceeded your monthly included credits"}, "QuotaError"),
        (500, {"error": {"message": "Conversation roles must alternate"}}, "RequestError"),
        (
            500,
            {"error": {"message": "maximum context length is 4096 tokens", "code": 500}},
            "TooLargeError",
        ),
    ],
)
def test_refusal_is_what_its_words_say(status: int, body: Any, name: str) -> None:
    assert type(error_of(body, status)).__name__ == name


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        ({"error": {"message": "Incorrect API key provided"}}, "CredentialsError"),
        ({"base_resp": {"status_code": 1004, "status_msg": "login fail"}}, "CredentialsError"),
        ({"base_resp": {"status_code": 2013, "status_msg": "invalid params"}}, "RequestError"),
        (
            {"response": {"error": {"code": None, "message": "You exceeded your current quota"}}},
            "QuotaError",
        ),
        (
            {"error": {"code": "server_error", "message": "You exceeded your current quota"}},
            "QuotaError",
        ),
        (
            {"error": {"message": "the model is loaded with context length of only 4096 tokens"}},
            "TooLargeError",
        ),
    ],
)
def test_failure_with_status_200_is_what_its_words_say(payload: Any, name: str) -> None:
    error = api_errors.from_exception(AnswerFailedError(payload), wall_time=WALL)
    assert type(error).__name__ == name


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_error_of_minimax_is_read_from_a_stream_and_in_one_piece(api: str, streamed: bool) -> None:
    payload = {"choices": None, "base_resp": {"status_code": 1004, "status_msg": "login fail"}}
    parts = [event(payload), DONE] if streamed else [json.dumps(payload).encode()]
    error = fails(Server(Script(parts)), chosen=settings(api=api))
    assert type(error).__name__ == "CredentialsError"
    assert "login fail" in error.message


def test_x_should_retry_false_ends_the_retries() -> None:
    headers = {"x-should-retry": "false"}
    assert type(error_of({"error": {"message": "no"}}, 500, headers)).__name__ == "RequestError"


@pytest.mark.parametrize(
    ("words", "indent"), [("", 2), ("litellm.RateLimitError: VertexAIException - ", None)]
)
def test_error_as_json_in_a_message_is_read_as_if_it_came_alone(words: str, indent: int) -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "36s"}]
    said = "You exceeded your current quota, please check your plan."
    inner = {"error": {"code": 429, "message": said, "details": details}}
    message = words + json.dumps(inner, indent=indent) + "\n"
    error = error_of({"error": {"message": message, "code": 429, "status": "Too Many Requests"}})
    assert isinstance(error, LimitError)
    assert error.wait == 36.0
    assert error.message.endswith(f": {words}{said}")


def test_json_in_a_message_that_is_no_error_is_left_as_it_is() -> None:
    message = 'The schema {"type": "object", "text": "x"} is not valid.'
    error = error_of({"error": {"message": message}}, status=400)
    assert message in error.message


def test_credit_for_less_output_advises_less_output() -> None:
    message = "This request requires more credits, or fewer max_tokens. You can only afford 1234."
    error = error_of({"error": {"message": message, "code": 402}}, 402)
    assert type(error).__name__ == "QuotaError"
    assert "--max-output" in error.advice


def test_web_page_that_refuses_is_not_about_the_key() -> None:
    error = api_errors.from_status(403, {}, "<html><title>Just a moment</title>", wall_time=WALL)
    assert type(error).__name__ == "RequestError"
    assert "proxy" in error.advice


OK_CHAT = Script([chunk("Hi", finish="stop") + DONE])


@pytest.mark.parametrize(
    "answer",
    [
        refusal(400, "Azure OpenAI Responses API is enabled only for api-version 2025-03-01"),
        refusal(400, "Unsupported endpoint: /v1/responses", type="invalid_request_error"),
        refusal(500, "not implemented", code="convert_request_failed"),
        refusal(400, "messages: field required", type="invalid_request_error"),
        Script(
            [b'{"detail":[{"type":"missing","loc":["body","messages"],"msg":"Field required"}]}'],
            422,
            {"content-type": "application/json"},
        ),
        Script([b'{"message":"Missing Authentication Token"}'], 403),
    ],
    ids=["Azure", "endpoint", "new-api", "messages", "FastAPI", "AWS"],
)
def test_server_without_the_responses_api_gets_chat_completions(answer: Script) -> None:
    server = Server(answer, OK_CHAT)
    chosen = settings(api="auto", base_url="https://gateway.example/v1")
    assert ending_of(play(server, chosen=chosen)).text == "Hi"
    assert [request.url.path for request in server.requests] == [
        "/v1/responses",
        "/v1/chat/completions",
    ]


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_schema_whose_answer_is_empty_is_put_into_words_once(api: str) -> None:
    empty = {"chat": chunk(finish="stop") + DONE, "responses": completed(output=[])}
    server = Server(Script([empty[api]]))
    chosen = settings(api=api, base_url="http://localhost:1234/v1")
    client = ApiClient(clock=LoopClock(), transport=server)
    options: Any = {"chosen": chosen, "api_client": client, "schema": SCHEMA}
    assert isinstance(fails(server, **options), ServerError)
    assert ending_of(play(server, **options)).text == ""
    without, with_words = (request.content for request in server.requests)
    assert b"JSON schema" in with_words
    assert b"JSON schema" not in without


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("status", [404, 405, 424])
def test_schema_refused_with_another_status_than_400_is_put_into_words(
    status: int, api: str
) -> None:
    name = "response_format" if api == "chat" else "text"
    refused = refusal(status, f"Unrecognized request argument supplied: '{name}'")
    answer = OK_CHAT if api == "chat" else Script([delta("Hi"), completed()])
    server = Server(refused, answer)
    play(server, chosen=settings(api=api, base_url="https://x.example/v1"), schema=SCHEMA)
    assert [name in body for body in server.sent] == [True, False]


@pytest.mark.parametrize(
    "message",
    [
        "The specified schema produces a constraint that has too many states for serving.",
        "The schema exceeds the maximum allowed nesting depth",
    ],
)
def test_schema_that_gemini_refuses_is_put_into_words(message: str) -> None:
    server = Server(refusal(400, message), OK_CHAT)
    chosen = settings(
        api="chat", base_url="https://generativelanguage.googleapis.com/v1beta/openai"
    )
    play(server, chosen=chosen, schema=SCHEMA)
    without, with_words = (request.content for request in server.requests)
    assert b"JSON schema" in with_words
    assert b"JSON schema" not in without


FILTERED = "{'error': {'message': \"Azure's policy\", 'code': 'content_filter', 'status': 400}}"
FREE = {"error": {"message": "Rate limit exceeded: free-models-per-min.", "code": 429}}


@pytest.mark.parametrize(
    ("payload", "name", "words"),
    [
        ({"message": f"Error code: 400 - {FILTERED}"}, "RequestError", "Azure's policy"),
        (
            {"message": "Error code: 500 - " + str({"error": {"message": f"x: {FILTERED}"}})},
            "RequestError",
            "Azure's policy",
        ),
        ({"message": "HTTP 429: " + json.dumps(FREE)}, "LimitError", "free-models"),
        (
            {"message": "upstream", "details": {"status": 429, "body": json.dumps(FREE)}},
            "LimitError",
            "free-models",
        ),
        ({"message": "upstream", "cause": {"original": FREE}}, "LimitError", "free-models"),
        ({"message": "upstream", "original_error": FREE["error"]}, "LimitError", "free-models"),
    ],
)
@pytest.mark.parametrize("status", [None, 400, 500])
def test_error_that_a_relay_quotes_decides(
    payload: Any, name: str, words: str, status: int | None
) -> None:
    body = {"error": payload}
    failure = AnswerFailedError(body)
    error = error_of(body, status) if status else api_errors.from_exception(failure, wall_time=WALL)
    assert type(error).__name__ == name
    assert words in error.message
