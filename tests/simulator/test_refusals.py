"""How the server says no: statuses, bodies and headers, compared with those of public threads."""

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
from tests.simulator.asking import KEY, MODEL, call, fetch, refusal, simulator
from tests.virtual import EPOCH, START, run_virtual

TPM = (
    r"Rate limit reached for gpt-5\.6-sol in organization org-simulated on tokens per min \(TPM\): "
    r"Limit 30000, Used 22999, Requested 12528\. Please try again in 11\.054s\. Visit \S+ to learn "
    r"more\."
)


@pytest.mark.parametrize(
    ("seconds", "said"),
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
def test_durations_are_printed_as_go_does(seconds: float, said: str) -> None:
    """Waits and resets look like the real server's, and never say less than is meant."""
    assert go_duration(seconds) == said


def test_a_reached_limit_says_what_the_real_one_says() -> None:
    """The figures of a 429 in a public thread give its very text, and its headers."""

    async def main() -> tuple[int, dict[str, str], dict[str, Any]]:
        server = simulator(tpm=30_000)
        server.account("key-1", MODEL).charge(22_999, server.clock.now())
        body = {"model": MODEL, "input": "x" * 4 * 2_528, "max_output_tokens": 10_000}
        return await refusal(server, call(body=body))

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
    ("fault", "status", "kind", "code", "says"),
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
def test_each_scripted_refusal_has_its_words(
    fault: str, status: int, kind: str | None, code: str | None, says: str
) -> None:
    """Status, type, code and text are those of the real error."""

    async def main() -> tuple[int, dict[str, str], dict[str, Any]]:
        server = simulator()
        server.script([fault])
        return await refusal(server, call())

    got, _, error = run_virtual(main())
    assert (got, error.get("type"), error["code"]) == (status, kind, code)
    assert says in error["message"]
    assert ("try again in 1.2s" in error["message"]) == ("_per_" in fault)


@pytest.mark.parametrize(
    ("which", "told"),
    [
        ("both", {"retry-after": "2", "retry-after-ms": "1200"}),
        ("seconds", {"retry-after": "2"}),
        ("ms", {"retry-after-ms": "1200"}),
        ("none", {}),
    ],
)
def test_the_wait_is_in_the_headers_that_were_chosen(which: str, told: dict[str, str]) -> None:
    """Each kind of server can be had: with either header, both, or none."""

    async def main() -> dict[str, str]:
        server = simulator(retry_after=which)
        server.script(["tokens_per_minute"])
        return (await refusal(server, call()))[1]

    headers = run_virtual(main())
    assert {k: v for k, v in headers.items() if k.startswith("retry-after")} == told


def test_the_wait_can_be_a_date() -> None:
    """`retry-after` as an HTTP date names the moment, rounded up to a second."""

    async def main() -> dict[str, str]:
        server = simulator(retry_after="date")
        server.script([Fault("tokens_per_minute", seconds=30)])
        return (await refusal(server, call()))[1]

    stated = parsedate_to_datetime(run_virtual(main())["retry-after"]).timestamp()
    assert stated == EPOCH + START + 30


def test_a_fault_can_choose_its_own_words_and_headers() -> None:
    """What a fault says replaces the usual; an empty header is taken away."""
    fault = Fault(
        "tokens_per_minute", message="Slow down", code="slow_down", headers={"retry-after": ""}
    )

    async def main() -> tuple[int, dict[str, str], dict[str, Any]]:
        server = simulator()
        server.script([fault])
        return await refusal(server, call())

    _, headers, error = run_virtual(main())
    assert (error["message"], error["code"], error["type"]) == ("Slow down", "slow_down", "tokens")
    assert "retry-after" not in headers
    assert "retry-after-ms" in headers


CHAT = "/v1/chat/completions"
HELLO = {"model": MODEL, "input": "hello"}


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "says"),
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
def test_a_wrong_request_is_refused_as_the_real_server_does(
    path: str, body: Any, status: int, code: str | None, says: str
) -> None:
    """Status, code and text for what can never succeed."""

    async def main() -> tuple[int, dict[str, str], dict[str, Any]]:
        return await refusal(simulator(context=1_000), call(path, body))

    got, _, error = run_virtual(main())
    assert (got, error["code"]) == (status, code)
    assert says in error["message"]


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
def test_only_the_right_key_opens_the_door(path: str, headers: dict[str, str], status: int) -> None:
    """A bearer key opens every door, `api-key` Azure's only; a wrong or missing one is a 401."""

    async def main() -> tuple[int, dict[str, str], bytes]:
        return await fetch(simulator(keys=(KEY,)), call(path, **headers))

    assert run_virtual(main())[0] == status


def test_the_log_never_holds_a_key() -> None:
    """Keys are named in the order in which they were shown."""

    async def main() -> str:
        server = simulator()
        for key in (KEY, "sk-second", KEY):
            await fetch(server, call(authorization=f"Bearer {key}"))
        assert [seen.key for seen in server.log] == ["key-1", "key-2", "key-1"]
        return repr(server.log)

    told = run_virtual(main())
    assert KEY not in told
    assert "sk-second" not in told


def test_azure_speaks_its_own_words_when_a_limit_is_reached() -> None:
    """On Azure's paths a reached limit has code "429", no type, and whole seconds."""

    async def main() -> tuple[int, dict[str, str], dict[str, Any]]:
        server = simulator(tpm=2_000)
        server.account("key-1", MODEL).charge(2_000, server.clock.now())
        path = f"/openai/deployments/{MODEL}/chat/completions?api-version=2024-10-21"
        body = {"messages": [{"role": "user", "content": "hello"}]}
        return await refusal(server, call(path, body, api_key=KEY))

    status, headers, error = run_virtual(main())
    assert status == 429
    assert error.keys() == {"code", "message"}
    assert "Please retry after 31 seconds." in error["message"]
    assert headers["retry-after"] == "31"


def test_who_waits_as_told_is_answered() -> None:
    """Through the whole server: refused, waited for `retry-after-ms`, answered."""

    async def main() -> tuple[int, int]:
        server = simulator(tpm=1_500)
        await fetch(server, call())
        status, headers, _ = await refusal(server, call())
        await asyncio.sleep(int(headers["retry-after-ms"]) / 1000)
        return status, (await fetch(server, call()))[0]

    assert run_virtual(main()) == (429, 200)


def test_what_is_missing_is_missing() -> None:
    """Without limits or with headers off, no answer and no refusal has `x-ratelimit-*`."""

    async def main() -> list[dict[str, str]]:
        silent, endless = simulator(headers=False), simulator(tpm=None, rpm=None)
        silent.script(["tokens_per_minute", None])
        return [(await fetch(s, call()))[1] for s in (silent, silent, endless)]

    assert not [name for headers in run_virtual(main()) for name in headers if "ratelimit" in name]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(PARAMETERS["responses"])), json_values)
def test_nothing_in_a_body_breaks_the_server(name: str, value: Any) -> None:
    """Whatever a parameter holds, there is an HTTP response."""

    async def main() -> int:
        server = simulator(tpm=None, speed=1e6)
        body = HELLO | {"reasoning": {"effort": "low"}, name: value}
        return (await fetch(server, call(body=body)))[0]

    assert run_virtual(main()) in {200, 400, 404}


def test_some_requests_fail_by_chance_the_same_each_time() -> None:
    """A tenth of failures is about a tenth, counts as requests, and repeats with the seed."""

    async def main() -> list[int]:
        server = simulator(failures=0.1, tpm=None, speed=1e6, latency=0.0, seed=7)
        statuses = [(await fetch(server, call()))[0] for _ in range(200)]
        assert server.account("key-1", MODEL).requests[60.0].used(server.clock.now()) == 200
        return statuses

    first = run_virtual(main())
    assert 8 <= first.count(500) <= 35
    assert first == run_virtual(main())
