"""What goes wrong: each failure shape, as the official SDK meets it."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest

from nbcodex.simulator import Fault, Simulator
from nbcodex.simulator.knobs import KINDS, parse_fault
from tests.simulator.asking import MODEL, call, fetch, sdk, simulator
from tests.simulator_transport import SimulatorTransport
from tests.virtual import run_virtual

APIS = ("responses", "chat")
PROMPT = "[[tokens=30]] [[echo: one two three four five six seven eight]]"


async def stream(server: Simulator, api: str, **options: Any) -> tuple[str, list[Any], Any]:
    """Return the text that a stream gave, its events, and what it raised."""
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


def meet(fault: Fault | str, api: str, **options: Any) -> tuple[str, list[Any], Any]:
    """Return what a stream that meets `fault` comes to."""

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
def test_a_stream_that_breaks_raises(
    api: str, after: int, kind: Any, raised: type[Exception], cause: type[Exception] | None
) -> None:
    """Shapes 2, 7 and 8: the error's class, and the text of exactly `after` deltas before it."""
    text, _, error = meet(Fault(kind, after=after), api)
    assert type(error) is raised
    assert cause is None or isinstance(error.__cause__, cause)
    assert text == " one two three"[1:] * (after == 3)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("after", [-1, 0, 3])
def test_an_early_end_raises_nothing(api: str, after: int) -> None:
    """Shape 6: the stream just ends, without its terminal event."""
    text, events, error = meet(Fault("truncated", after=after), api)
    assert error is None
    assert text == "one two three" * (after == 3)
    assert not [e for e in events if getattr(e, "type", "") == "response.completed"]


def test_the_nested_error_event_has_no_status() -> None:
    """Shape 2: a plain `APIError` with code and type, without status or response."""
    _, _, error = meet(Fault("error_event", seconds=11.054), "responses")
    assert (error.code, error.type) == ("rate_limit_exceeded", "tokens")
    assert "Please try again in 11.054s" in error.message
    assert not hasattr(error, "status_code")


def test_the_flat_error_event_is_an_event() -> None:
    """Shape 3: no exception, an event that says the wait."""
    _, events, error = meet(Fault("flat_error_event", after=2, seconds=5), "responses")
    assert error is None
    assert (events[-1].type, events[-1].code) == ("error", "rate_limit_exceeded")
    assert "Please try again in 5s" in events[-1].message
    assert events[-1].sequence_number == events[-2].sequence_number + 1


def test_a_failed_response_is_an_event() -> None:
    """Shape 4: no exception, `response.failed` with its error and without usage."""
    _, events, error = meet(Fault("failed", after=2, code="server_error"), "responses")
    assert error is None
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    assert events[-1].response.usage is None


def test_azure_says_the_wait_only_in_the_header_of_its_200() -> None:
    """Shape 5: `Retry-After` on a 200, `response.failed` without error, then an error event."""

    async def main() -> tuple[dict[str, str], bytes]:
        server = simulator()
        server.script([Fault("azure_failed", after=1, seconds=37)])
        body = {"model": MODEL, "input": PROMPT, "stream": True}
        status, headers, data = await fetch(server, call("/openai/v1/responses", body))
        assert status == 200
        return headers, data

    headers, data = run_virtual(main())
    assert headers["retry-after"] == "37"
    events = [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: ")]
    assert [e["type"] for e in events[-2:]] == ["response.failed", "error"]
    assert events[-2]["response"]["error"] is None
    _, seen, error = meet(Fault("azure_failed"), "responses")
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
def test_a_gateway_answers_with_a_page(
    api: str, kind: str, status: int, raised: type[openai.APIStatusError]
) -> None:
    """Shape 9: HTML, so neither code nor type."""
    _, _, error = meet(kind, api)
    assert type(error) is raised
    assert (error.status_code, error.code, error.type) == (status, None, None)
    assert "<html>" in error.response.text


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("after", [-1, 0, 3])
def test_a_silent_stream_meets_the_read_timeout(api: str, after: int) -> None:
    """Shape 10: nothing comes, until the client's own timeout."""
    text, _, error = meet(Fault("stalled", after=after), api, timeout=20)
    assert isinstance(error, openai.APIConnectionError)
    assert isinstance(error, openai.APITimeoutError)
    assert text == "one two three" * (after == 3)


@pytest.mark.parametrize("api", APIS)
def test_a_silence_can_end(api: str) -> None:
    """A silence of some seconds is followed by the rest of the answer."""
    text, _, error = meet(Fault("stalled", after=3, seconds=15), api, timeout=20)
    assert error is None
    assert text == "one two three four five six seven eight"


@pytest.mark.parametrize("api", APIS)
def test_a_slow_first_byte_meets_the_read_timeout(api: str) -> None:
    """Headers that come late are late for the SDK too."""
    assert isinstance(meet(Fault("slow", seconds=30), api, timeout=20)[2], openai.APITimeoutError)
    assert meet(Fault("slow", seconds=10), api, timeout=20)[2] is None


@pytest.mark.parametrize("api", APIS)
def test_a_connection_can_end_unanswered(api: str) -> None:
    """`refused`: the server closes the connection instead of answering."""
    error = meet("refused", api)[2]
    assert type(error) is openai.APIConnectionError
    assert "without sending a response" in str(error.__cause__)


def test_a_chunk_is_cut_within() -> None:
    """What of a broken chunk was sent is read before the error."""
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
def test_a_huge_line_arrives_in_full(api: str) -> None:
    """A line of 10 MB comes in blocks, and the answer after it."""

    async def main() -> bytes:
        server = simulator()
        server.script([Fault("huge_line", after=1)])
        path = "/v1/responses" if api == "responses" else "/v1/chat/completions"
        key = "input" if api == "responses" else "messages"
        said: Any = PROMPT if api == "responses" else [{"role": "user", "content": PROMPT}]
        return (await fetch(server, call(path, {"model": MODEL, key: said, "stream": True})))[2]

    data = run_virtual(main())
    lengths = sorted(map(len, data.splitlines()))
    assert lengths[-1] > 10_000_000 > 100_000 > lengths[-2]
    assert b" eight" in data


@pytest.mark.parametrize("api", APIS)
def test_absurd_headers_do_not_harm_the_answer(api: str) -> None:
    """Nonsense in the headers comes with an answer that is whole."""

    async def main() -> tuple[str, dict[str, str]]:
        server = simulator()
        server.script(["absurd_headers", "absurd_headers"])
        return (await stream(server, api))[0], (await fetch(server, call()))[1]

    text, headers = run_virtual(main())
    assert text == "one two three four five six seven eight"
    assert headers["x-ratelimit-reset-tokens"] == "NaN"
    assert len(headers["x-request-id"]) > 8_000


def test_a_redirect_leads_elsewhere() -> None:
    """The client is sent to another host; where it goes, the log of that host can tell."""

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
def test_answers_that_are_not_streamed_fail_too(api: str, kind: str) -> None:
    """The same faults make an answer in one piece fail."""

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


def test_faults_come_in_order_and_then_no_more() -> None:
    """The script is played once: a fault, an answer, a fault, and answers from then on."""

    async def main() -> list[tuple[int, str]]:
        server = simulator()
        server.script(["quota", None, Fault("http", status=503)])
        for _ in range(5):
            await fetch(server, call())
        return [(seen.status, seen.fault) for seen in server.log]

    assert run_virtual(main()) == [(429, "quota"), (200, ""), (503, "http"), (200, ""), (200, "")]


def test_a_prompt_can_bring_its_own_fault() -> None:
    """`[[fault=…]]` strikes at each attempt of that prompt, and no other."""

    async def main() -> list[int]:
        server = simulator()
        bad = {"model": MODEL, "input": "[[fault=http status=400]]"}
        return [(await fetch(server, call(body=b)))[0] for b in (bad, None, bad)]

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
def test_a_fault_that_does_not_exist_is_a_bad_request(prompt: str) -> None:
    """Nonsense in a directive is a 400 that says so, not a crash."""

    async def main() -> int:
        return (await fetch(simulator(), call(body={"model": MODEL, "input": prompt})))[0]

    assert run_virtual(main()) == 400


@pytest.mark.parametrize("data", ["nonsense", 7, [], {"kind": "http", "more": 1}, {"after": 1}])
def test_nonsense_is_no_fault(data: Any) -> None:
    """What is no fault is a ValueError that says so."""
    with pytest.raises(ValueError, match=r"fault|argument"):
        parse_fault(data)


def test_every_kind_is_a_fault() -> None:
    """Each kind can be told by its name, and null is none."""
    assert [fault.kind for kind in KINDS if (fault := parse_fault(kind))] == list(KINDS)
    assert parse_fault(None) is None


def test_streams_can_break_by_chance() -> None:
    """`breaks` ends some streams with a rate-limit error, and charges them all the same."""

    async def main() -> int:
        server = simulator(stream_failures=0.5, tpm=None, rpm=None)
        errors = [(await stream(server, "responses"))[2] for _ in range(20)]
        return sum(error is not None for error in errors)

    assert 3 <= run_virtual(main()) <= 17
