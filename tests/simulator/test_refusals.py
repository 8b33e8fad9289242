"""Refusals: statuses, bodies and headers, compared with those of public threads."""

from __future__ import annotations

import asyncio
import re
from email.utils import parsedate_to_datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbcodex.simulator import Fault
from nbcodex.simulator.http_messages import go_duration
from nbcodex.simulator.parsed_request import PARAMETERS
from tests.simulator.helpers import KEY, MODEL, fetch, post, refusal, simulator
from tests.virtual import EPOCH, START, run_virtual

TPM = (
    r"Rate limit reached for gpt-5\.6-sol in organization org-simulated on tokens per min \(TPM\): "
    r"Limit 30000, Used 22999, Requested 12528\. Please try again in 11\.054s\. Visit \S+ to learn "
    r"more\."
)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0s"),
        (0.086, "86ms"),
        (1, "1s"),
        (11.054, "11.054s"),
        (360, "6m0s"),
        (432, "7m12s"),
        (531.438, "8m51.438s"),
        (3600, "1h0m0s"),
        (4320.0004, "1h12m0.001s"),
    ],
)
def test_durations_follow_gos_format_and_round_up(seconds: float, expected: str) -> None:
    assert go_duration(seconds) == expected


def test_429_matches_the_text_and_headers_of_a_public_thread() -> None:
    async def main() -> tuple[int, dict[str, str], dict[str, Any]]:
        server = simulator(tpm=30_000)
        server.account("key-1", MODEL).charge_tokens(22_999, server.clock.now())
        body = {"model": MODEL, "input": "x" * 4 * 2_528, "max_output_tokens": 10_000}
        return await refusal(server, post(body=body))

    status, headers, error = run_virtual(main())
    assert status == 429
    assert (error["type"], error["code"], error["param"]) == ("tokens", "rate_limit_exceeded", None)
    assert re.fullmatch(TPM, error["message"])
    assert headers["retry-after-ms"] == "11054"
    assert headers["retry-after"] == "12"
    assert headers["x-ratelimit-limit-tokens"] == "30000"
    assert headers["x-ratelimit-remaining-tokens"] == "7001"
    assert headers["x-ratelimit-reset-tokens"] == "45.998s"


@pytest.mark.parametrize(
    ("fault", "status", "kind", "code", "words"),
    [
        ("tokens_per_minute", 429, "tokens", "rate_limit_exceeded", "on tokens per min (TPM)"),
        ("requests_per_minute", 429, "requests", "rate_limit_exceeded", "requests per min (RPM)"),
        ("tokens_per_day", 429, "tokens", "rate_limit_exceeded", "on tokens per day (TPD)"),
        ("requests_per_day", 429, "requests", "rate_limit_exceeded", "on requests per day (RPD)"),
        ("too_large", 429, "tokens", "rate_limit_exceeded", "Request too large for gpt-5.6-sol"),
        ("quota", 429, "insufficient_quota", "insufficient_quota", "exceeded your current quota"),
        ("azure", 429, None, "429", "Please retry after 2 seconds."),
        ("overloaded", 503, "service_unavailable_error", "server_is_overloaded", "overloaded"),
        ("http", 500, "server_error", None, "The server had an error while processing"),
    ],
)
def test_scripted_refusal_has_status_type_code_and_text_of_the_real_error(
    fault: str, status: int, kind: str | None, code: str | None, words: str
) -> None:
    async def main() -> tuple[int, dict[str, str], dict[str, Any]]:
        server = simulator()
        server.script([fault])
        return await refusal(server, post())

    got, _, error = run_virtual(main())
    assert (got, error.get("type"), error["code"]) == (status, kind, code)
    assert words in error["message"]
    assert ("try again in 1.2s" in error["message"]) == ("_per_" in fault)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("both", {"retry-after": "2", "retry-after-ms": "1200"}),
        ("seconds", {"retry-after": "2"}),
        ("ms", {"retry-after-ms": "1200"}),
        ("none", {}),
    ],
)
def test_retry_after_setting_selects_the_wait_headers(which: str, expected: dict[str, str]) -> None:
    async def main() -> dict[str, str]:
        server = simulator(retry_after=which)
        server.script(["tokens_per_minute"])
        return (await refusal(server, post()))[1]

    headers = run_virtual(main())
    assert {k: v for k, v in headers.items() if k.startswith("retry-after")} == expected


def test_retry_after_can_be_an_http_date_rounded_up() -> None:
    async def main() -> dict[str, str]:
        server = simulator(retry_after="date")
        server.script([Fault("tokens_per_minute", seconds=30)])
        return (await refusal(server, post()))[1]

    stated = parsedate_to_datetime(run_virtual(main())["retry-after"]).timestamp()
    assert stated == EPOCH + START + 30


def test_fault_overrides_code_message_and_headers() -> None:
    """An empty header removes the usual one."""
    fault = Fault(
        "tokens_per_minute", message="Slow down", code="slow_down", headers={"retry-after": ""}
    )

    async def main() -> tuple[int, dict[str, str], dict[str, Any]]:
        server = simulator()
        server.script([fault])
        return await refusal(server, post())

    _, headers, error = run_virtual(main())
    assert (error["message"], error["code"], error["type"]) == ("Slow down", "slow_down", "tokens")
    assert "retry-after" not in headers
    assert "retry-after-ms" in headers


CHAT = "/v1/chat/completions"
HELLO = {"model": MODEL, "input": "hello"}


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "words"),
    [
        ("/v1/responses", b"{", 400, None, "could not parse the JSON body"),
        ("/v1/responses", b"[1]", 400, None, "could not parse the JSON body"),
        ("/v1/responses", {"model": MODEL}, 400, "missing_required_parameter", "'input'"),
        ("/v1/responses", HELLO | {"input": ""}, 400, "missing_required_parameter", "'input'"),
        ("/v1/responses", HELLO | {"foo": 1}, 400, "unknown_parameter", "parameter: 'foo'"),
        ("/v1/responses", HELLO | {"stream": "yes"}, 400, "invalid_type", "'stream'"),
        ("/v1/responses", HELLO | {"max_output_tokens": True}, 400, "invalid_type", "an integer"),
        (
            "/v1/responses",
            HELLO | {"max_output_tokens": 5},
            400,
            "integer_below_min_value",
            "Expected a value >= 16, but got 5",
        ),
        ("/v1/responses", HELLO | {"model": "no"}, 404, "model_not_found", "model `no` does not"),
        ("/v1/responses", HELLO | {"input": "x" * 4_100}, 400, "context_length_exceeded", ""),
        (CHAT, {"model": MODEL, "messages": []}, 400, "missing_required_parameter", "'messages'"),
        (CHAT, HELLO, 400, "unknown_parameter", "'input'"),
        ("/v1/answers", HELLO, 404, None, "Invalid URL (POST /v1/answers)"),
        ("/v1/models", HELLO, 405, "method_not_supported", "Not allowed to POST"),
        ("/openai/responses", HELLO, 404, "404", "Resource not found"),
        ("/openai/v1/responses", HELLO | {"model": "no"}, 404, "DeploymentNotFound", ""),
    ],
)
def test_invalid_request_gets_status_code_and_text_of_the_real_server(
    path: str, body: Any, status: int, code: str | None, words: str
) -> None:
    async def main() -> tuple[int, dict[str, str], dict[str, Any]]:
        return await refusal(simulator(context=1_000), post(path, body))

    got, _, error = run_virtual(main())
    assert (got, error["code"]) == (status, code)
    assert words in error["message"]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/responses", {"authorization": ""}, 401),
        ("/v1/responses", {"authorization": "Bearer sk-another-key-entirely"}, 401),
        ("/v1/responses", {"authorization": "", "api_key": KEY}, 401),
        ("/v1/responses", {}, 200),
        ("/openai/responses?api-version=2025-04-01-preview", {}, 200),
        ("/openai/v1/responses", {"authorization": "", "api_key": KEY}, 200),
        ("/openai/v1/responses", {"authorization": "", "api_key": "no"}, 401),
        ("/v1/models", {"authorization": ""}, 405),
    ],
)
def test_missing_or_wrong_key_is_a_401(path: str, headers: dict[str, str], status: int) -> None:
    """Azure's paths accept `api-key` as well."""

    async def main() -> tuple[int, dict[str, str], bytes]:
        return await fetch(simulator(keys=(KEY,)), post(path, **headers))

    assert run_virtual(main())[0] == status


def test_log_names_keys_in_order_and_never_contains_them() -> None:
    async def main() -> str:
        server = simulator()
        for key in (KEY, "sk-second", KEY):
            await fetch(server, post(authorization=f"Bearer {key}"))
        assert [seen.key for seen in server.log] == ["key-1", "key-2", "key-1"]
        return repr(server.log)

    log = run_virtual(main())
    assert KEY not in log
    assert "sk-second" not in log


def test_azure_limit_has_code_429_no_type_and_whole_seconds() -> None:
    async def main() -> tuple[int, dict[str, str], dict[str, Any]]:
        server = simulator(tpm=2_000)
        server.account("key-1", MODEL).charge_tokens(2_000, server.clock.now())
        path = f"/openai/deployments/{MODEL}/chat/completions?api-version=2024-10-21"
        body = {"messages": [{"role": "user", "content": "hello"}]}
        return await refusal(server, post(path, body, api_key=KEY))

    status, headers, error = run_virtual(main())
    assert status == 429
    assert error.keys() == {"code", "message"}
    assert "Please retry after 31 seconds." in error["message"]
    assert headers["retry-after"] == "31"


def test_request_is_answered_after_retry_after_ms() -> None:
    async def main() -> tuple[int, int]:
        server = simulator(tpm=1_500)
        await fetch(server, post())
        status, headers, _ = await refusal(server, post())
        await asyncio.sleep(int(headers["retry-after-ms"]) / 1000)
        return status, (await fetch(server, post()))[0]

    assert run_virtual(main()) == (429, 200)


def test_no_limit_headers_without_limits_or_with_headers_off() -> None:
    async def main() -> list[dict[str, str]]:
        silent, endless = simulator(headers=False), simulator(tpm=None, rpm=None)
        silent.script(["tokens_per_minute", None])
        return [(await fetch(s, post()))[1] for s in (silent, silent, endless)]

    assert not [name for headers in run_virtual(main()) for name in headers if "ratelimit" in name]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(PARAMETERS["responses"])), json_values)
def test_any_value_of_a_parameter_gets_an_http_response(name: str, value: Any) -> None:
    async def main() -> int:
        server = simulator(tpm=None, speed=1e6)
        body = HELLO | {"reasoning": {"effort": "low"}, name: value}
        return (await fetch(server, post(body=body)))[0]

    assert run_virtual(main()) in {200, 400, 404}


def test_random_failures_count_as_requests_and_repeat_with_the_seed() -> None:
    async def main() -> list[int]:
        server = simulator(failures=0.1, tpm=None, speed=1e6, latency=0.0, seed=7)
        statuses = [(await fetch(server, post()))[0] for _ in range(200)]
        assert server.account("key-1", MODEL).requests[60.0].used(server.clock.now()) == 200
        return statuses

    first = run_virtual(main())
    assert 8 <= first.count(500) <= 35
    assert first == run_virtual(main())
