"""Each fault, as the official SDK receives it."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest

from nbcodex.simulator import Fault, Simulator
from nbcodex.simulator.knobs import FAULT_KINDS, parse_fault
from tests.simulator.helpers import MODEL, fetch, post, sdk, simulator
from tests.simulator_transport import SimulatorTransport
from tests.virtual import run_virtual

APIS = ("responses", "chat")
PROMPT = "[[tokens=30]] [[echo: one two three four five six seven eight]]"


async def stream(server: Simulator, api: str, **options: Any) -> tuple[str, list[Any], Any]:
    """Return the text of a stream, its events, and the error that it raised."""
    text, events = "", []
    async with sdk(server, **options) as client:
        try:
            if api == "chat":
                async for chunk in await client.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": PROMPT}], stream=True
                ):
                    events.append(chunk)
                    text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            else:
                async for event in await client.responses.create(
                    model=MODEL, input=PROMPT, stream=True
                ):
                    events.append(event)
                    text += event.delta if event.type == "response.output_text.delta" else ""
        except (openai.APIError, json.JSONDecodeError) as exc:
            return text, events, exc
    return text, events, None


def stream_with(fault: Fault | str, api: str, **options: Any) -> tuple[str, list[Any], Any]:
    """Return the text, the events and the error of a stream with `fault`."""

    async def main() -> tuple[str, list[Any], Any]:
        server = simulator()
        server.script([fault])
        return await stream(server, api, **options)

    return run_virtual(main())


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("after", [-1, 0, 3])
@pytest.mark.parametrize(
    ("kind", "raised", "cause"),
    [
        ("error_event", openai.APIError, None),
        ("dropped", openai.APIConnectionError, httpx2.ReadError),
        ("cut", openai.APIConnectionError, httpx2.RemoteProtocolError),
        ("malformed", json.JSONDecodeError, None),
    ],
)
def test_broken_stream_raises_after_exactly_the_given_deltas(
    api: str, after: int, kind: Any, raised: type[Exception], cause: type[Exception] | None
) -> None:
    text, _, error = stream_with(Fault(kind, after=after), api)
    assert type(error) is raised
    assert cause is None or isinstance(error.__cause__, cause)
    assert text == " one two three"[1:] * (after == 3)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("after", [-1, 0, 3])
def test_truncated_stream_ends_without_error_or_final_event(api: str, after: int) -> None:
    text, events, error = stream_with(Fault("truncated", after=after), api)
    assert error is None
    assert text == "one two three" * (after == 3)
    assert not [e for e in events if getattr(e, "type", "") == "response.completed"]


def test_nested_error_event_raises_an_api_error_without_status() -> None:
    _, _, error = stream_with(Fault("error_event", seconds=11.054), "responses")
    assert (error.code, error.type) == ("rate_limit_exceeded", "tokens")
    assert "Please try again in 11.054s" in error.message
    assert not hasattr(error, "status_code")


def test_flat_error_event_raises_nothing_and_states_the_wait() -> None:
    _, events, error = stream_with(Fault("flat_error_event", after=2, seconds=5), "responses")
    assert error is None
    assert (events[-1].type, events[-1].code) == ("error", "rate_limit_exceeded")
    assert "Please try again in 5s" in events[-1].message
    assert events[-1].sequence_number == events[-2].sequence_number + 1


def test_failed_response_raises_nothing_and_has_no_usage() -> None:
    _, events, error = stream_with(Fault("failed", after=2, code="server_error"), "responses")
    assert error is None
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    assert events[-1].response.usage is None


def test_azure_failure_states_the_wait_in_a_header_of_the_200() -> None:
    """`response.failed` without an error comes next, then an error event."""

    async def main() -> tuple[dict[str, str], bytes]:
        server = simulator()
        server.script([Fault("azure_failed", after=1, seconds=37)])
        body = {"model": MODEL, "input": PROMPT, "stream": True}
        status, headers, data = await fetch(server, post("/openai/v1/responses", body))
        assert status == 200
        return headers, data

    headers, data = run_virtual(main())
    assert headers["retry-after"] == "37"
    events = [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: ")]
    assert [e["type"] for e in events[-2:]] == ["response.failed", "error"]
    assert events[-2]["response"]["error"] is None
    _, seen, error = stream_with(Fault("azure_failed"), "responses")
    assert seen[-1].type == "response.failed"
    assert type(error) is openai.APIError


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("kind", "status", "raised"),
    [
        ("html_502", 502, openai.InternalServerError),
        ("html_429", 429, openai.RateLimitError),
    ],
)
def test_gateway_page_has_neither_code_nor_type(
    api: str, kind: str, status: int, raised: type[openai.APIStatusError]
) -> None:
    _, _, error = stream_with(kind, api)
    assert type(error) is raised
    assert (error.status_code, error.code, error.type) == (status, None, None)
    assert "<html>" in error.response.text


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("after", [-1, 0, 3])
def test_stalled_stream_reaches_the_read_timeout(api: str, after: int) -> None:
    text, _, error = stream_with(Fault("stalled", after=after), api, timeout=20)
    assert isinstance(error, openai.APIConnectionError)
    assert isinstance(error, openai.APITimeoutError)
    assert text == "one two three" * (after == 3)


@pytest.mark.parametrize("api", APIS)
def test_stall_with_an_end_is_followed_by_the_rest(api: str) -> None:
    text, _, error = stream_with(Fault("stalled", after=3, seconds=15), api, timeout=20)
    assert error is None
    assert text == "one two three four five six seven eight"


@pytest.mark.parametrize("api", APIS)
def test_slow_first_byte_reaches_the_read_timeout(api: str) -> None:
    assert isinstance(
        stream_with(Fault("slow", seconds=30), api, timeout=20)[2], openai.APITimeoutError
    )
    assert stream_with(Fault("slow", seconds=10), api, timeout=20)[2] is None


@pytest.mark.parametrize("api", APIS)
def test_refused_connection_ends_without_a_response(api: str) -> None:
    error = stream_with("refused", api)[2]
    assert type(error) is openai.APIConnectionError
    assert "without sending a response" in str(error.__cause__)


def test_cut_chunk_is_partly_delivered_before_the_error() -> None:
    data: list[bytes] = []

    async def main() -> None:
        server = simulator()
        server.script([Fault("cut", after=1)])
        body = {"model": MODEL, "input": PROMPT, "stream": True}
        headers = {"authorization": "Bearer sk-one"}
        async with (
            httpx2.AsyncClient(transport=SimulatorTransport(server), headers=headers) as client,
            client.stream("POST", "https://simulated.test/v1/responses", json=body) as answer,
        ):
            async for chunk in answer.aiter_raw():
                data.append(chunk)  # noqa: PERF401 - what came before the break counts

    with pytest.raises(httpx2.RemoteProtocolError):
        run_virtual(main())
    events = b"".join(data).split(b"\n\n")
    assert b'"delta":"one"' in events[-2]
    assert events[-1].startswith(b"event: response.output_text.delta\ndata: {")
    assert not events[-1].endswith(b"}")


@pytest.mark.parametrize("api", APIS)
def test_huge_line_arrives_in_full_before_the_rest(api: str) -> None:
    async def main() -> bytes:
        server = simulator()
        server.script([Fault("huge_line", after=1)])
        path = "/v1/responses" if api == "responses" else "/v1/chat/completions"
        key = "input" if api == "responses" else "messages"
        value: Any = PROMPT if api == "responses" else [{"role": "user", "content": PROMPT}]
        return (await fetch(server, post(path, {"model": MODEL, key: value, "stream": True})))[2]

    data = run_virtual(main())
    lengths = sorted(map(len, data.splitlines()))
    assert lengths[-1] > 10_000_000 > 100_000 > lengths[-2]
    assert b" eight" in data


@pytest.mark.parametrize("api", APIS)
def test_absurd_headers_come_with_a_whole_answer(api: str) -> None:
    async def main() -> tuple[str, dict[str, str]]:
        server = simulator()
        server.script(["absurd_headers", "absurd_headers"])
        return (await stream(server, api))[0], (await fetch(server, post()))[1]

    text, headers = run_virtual(main())
    assert text == "one two three four five six seven eight"
    assert headers["x-ratelimit-reset-tokens"] == "NaN"
    assert len(headers["x-request-id"]) > 8_000


@pytest.mark.parametrize("status", [301, 307, 308])
def test_redirect_has_the_status_of_its_fault(status: int) -> None:
    async def main() -> int:
        server = simulator()
        server.script([Fault("redirect", status=status)])
        return (await fetch(server, post()))[0]

    assert run_virtual(main()) == status


def test_redirect_is_followed_without_the_key() -> None:
    async def main() -> list[tuple[str, str]]:
        server = simulator()
        server.script([Fault("redirect", location="https://elsewhere.test/v1/responses"), None])
        transport, body = SimulatorTransport(server), {"model": MODEL, "input": PROMPT}
        headers = {"authorization": "Bearer sk-one"}
        async with httpx2.AsyncClient(transport=transport, follow_redirects=True) as client:
            url = "https://simulated.test/v1/responses"
            await client.post(url, json=body, headers=headers)
        return [(seen.host, seen.key) for seen in server.log]

    assert run_virtual(main()) == [("simulated.test", "key-1"), ("elsewhere.test", "")]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("kind", ["dropped", "stalled", "malformed", "error_event", "failed"])
def test_fault_makes_an_unstreamed_answer_fail(api: str, kind: str) -> None:
    async def main() -> None:
        server = simulator()
        server.script([kind])
        async with sdk(server, timeout=20) as client:
            if api == "responses":
                await client.responses.create(model=MODEL, input=PROMPT)
            else:
                await client.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": PROMPT}]
                )

    with pytest.raises((openai.APIError, json.JSONDecodeError)):
        run_virtual(main())


def test_script_applies_its_faults_in_order_and_once() -> None:
    async def main() -> list[tuple[int, str]]:
        server = simulator()
        server.script(["quota", None, Fault("http", status=503)])
        for _ in range(5):
            await fetch(server, post())
        return [(seen.status, seen.fault) for seen in server.log]

    assert run_virtual(main()) == [(429, "quota"), (200, ""), (503, "http"), (200, ""), (200, "")]


def test_fault_directive_applies_to_each_attempt_of_its_prompt() -> None:
    async def main() -> list[int]:
        server = simulator()
        bad = {"model": MODEL, "input": "[[fault=http status=400]]"}
        return [(await fetch(server, post(body=b)))[0] for b in (bad, None, bad)]

    assert run_virtual(main()) == [400, 200, 400]


@pytest.mark.parametrize(
    "prompt",
    [
        "[[fault=nonsense]]",
        "[[fault=http status=x]]",
        "[[fault=]]",
        "[[fault=http a]]",
        '[[fault=slow seconds="1"]]',
    ],
)
def test_invalid_fault_directive_is_a_400(prompt: str) -> None:
    async def main() -> int:
        return (await fetch(simulator(), post(body={"model": MODEL, "input": prompt})))[0]

    assert run_virtual(main()) == 400


@pytest.mark.parametrize("data", ["nonsense", 7, [], {"kind": "http", "more": 1}, {"after": 1}])
def test_invalid_fault_data_is_a_value_error(data: Any) -> None:
    with pytest.raises(ValueError, match=r"fault|argument"):
        parse_fault(data)


def test_each_kind_is_parsed_by_its_name_and_null_is_none() -> None:
    assert [fault.kind for kind in FAULT_KINDS if (fault := parse_fault(kind))] == list(FAULT_KINDS)
    assert parse_fault(None) is None


def test_stream_failures_setting_breaks_some_streams() -> None:
    async def main() -> int:
        server = simulator(stream_failures=0.5, tpm=None, rpm=None)
        errors = [(await stream(server, "responses"))[2] for _ in range(20)]
        return sum(error is not None for error in errors)

    assert 3 <= run_virtual(main()) <= 17
