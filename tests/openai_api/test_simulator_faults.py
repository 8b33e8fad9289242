"""The API client against the simulator, which were written independently."""

from __future__ import annotations

from typing import Any

import pytest

from nbcodex.errors import LimitError, NbcodexError
from nbcodex.models import DAY, MINUTE
from nbcodex.openai_api.answers import CompletedAnswer, ResponseStarted, StreamEvent
from nbcodex.simulator import Fault, Knobs, Simulator
from nbcodex.simulator.knobs import FAULT_KINDS
from tests.openai_api.scripted import ApiClient, Request, ending_of, settings
from tests.simulator_transport import SimulatorTransport
from tests.virtual import LoopClock, run_virtual

PROMPT = "[[tokens=30]] [[echo: one two three four five six seven eight]]"
TEXT = "one two three four five six seven eight"

OUTCOMES = {
    "http": "ServerError",
    "tokens_per_minute": "LimitError",
    "requests_per_minute": "LimitError",
    "tokens_per_day": "LimitError",
    "requests_per_day": "LimitError",
    "too_large": "TooLargeError",
    "quota": "QuotaError",
    "azure": "LimitError",
    "overloaded": "OverloadedError",
    "html_429": "LimitError",
    "html_502": "ServerError",
    "redirect": "RequestError",
    "refused": "TransportError",
    "slow": "CompletedAnswer",
    "headers": "CompletedAnswer",
    "absurd_headers": "CompletedAnswer",
    "error_event": "LimitError",
    "flat_error_event": "LimitError",
    "failed": "LimitError",
    "azure_failed": "LimitError",
    "truncated": "TransportError",
    "dropped": "TransportError",
    "cut": "TransportError",
    "malformed": "ServerError",
    "stalled": "TransportError",
    "huge_line": "CompletedAnswer",
}


def ask(fault: Fault | None, *, api: str, **knobs: Any) -> list[StreamEvent]:
    async def run() -> list[StreamEvent]:
        simulator = Simulator(Knobs(**knobs), clock=LoopClock())
        simulator.script([fault])
        api_client = ApiClient(clock=LoopClock(), transport=SimulatorTransport(simulator))
        request, chosen = Request(prompt=PROMPT), settings(api=api)
        model = await api_client.resolve_model(request, chosen)
        return [each async for each in api_client.stream(request, chosen, model=model)]

    return run_virtual(run())


def outcome(fault: Fault, *, api: str) -> StreamEvent | NbcodexError:
    try:
        return ask(fault, api=api)[-1]
    except NbcodexError as error:
        return error


@pytest.mark.parametrize("api", ["responses", "chat"])
@pytest.mark.parametrize("after", [-1, 0, 3])
@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_simulated_fault_becomes_its_error(kind: str, after: int, api: str) -> None:
    came = outcome(Fault(kind=kind, after=after), api=api)  # type: ignore[arg-type]
    assert type(came).__name__ == OUTCOMES[kind]


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_simulated_answer_has_text_usage_and_limits(api: str) -> None:
    events = ask(None, api=api)
    ending, opened = ending_of(events), events[0]
    assert isinstance(ending, CompletedAnswer)
    assert TEXT in ending.text
    assert ending.usage.total_tokens
    assert isinstance(opened, ResponseStarted)
    assert opened.simulated
    assert opened.snapshot.tokens
    assert opened.snapshot.requests


@pytest.mark.parametrize(
    ("kind", "resource", "window"),
    [
        ("tokens_per_minute", "tokens", MINUTE),
        ("requests_per_minute", "requests", MINUTE),
        ("tokens_per_day", "tokens", DAY),
        ("requests_per_day", "requests", DAY),
    ],
)
def test_limit_error_has_resource_window_and_wait(kind: str, resource: str, window: float) -> None:
    error = outcome(Fault(kind=kind, seconds=7.0), api="responses")  # type: ignore[arg-type]
    assert isinstance(error, LimitError)
    assert (error.limit.resource, error.limit.window) == (resource, window)
    assert error.wait == pytest.approx(7.0, abs=1.0)


@pytest.mark.parametrize("kind", ["http", "tokens_per_minute", "quota"])
def test_simulated_refusal_is_marked(kind: str) -> None:
    with pytest.raises(NbcodexError) as refusal:
        ask(Fault(kind), api="responses")
    assert refusal.value.simulated


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_unstreamed_answer_may_take_minutes(api: str) -> None:
    assert ending_of(ask(None, api=api, allow_streaming=False, latency=400.0)).text == TEXT
