"""Background responses: they outlive their connection, and are paid once."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from nbcodex.simulator import Fault, Simulator
from tests.simulator.asking import MODEL, call, fetch, refusal, sdk, simulator
from tests.virtual import run_virtual

PROMPT = "[[tokens=100]]"


async def begin(client: openai.AsyncOpenAI, events: list[Any]) -> None:
    """Stream a background response into `events`, until it breaks."""
    stream = await client.responses.create(
        model=MODEL, input=PROMPT, background=True, stream=True, store=True
    )
    async for event in stream:
        events.append(event)  # noqa: PERF401 - what came before the break counts


def test_a_broken_stream_goes_on_where_it_broke() -> None:
    """What is picked up after event N and what came before are one whole, paid once."""

    async def main() -> tuple[list[Any], Simulator]:
        server, events = simulator(), []
        server.script([Fault("dropped", after=30), None])
        async with sdk(server) as client:
            with pytest.raises(openai.APIConnectionError):
                await begin(client, events)
            made = events[0].response.id
            last = events[-1].sequence_number
            more = await client.responses.retrieve(made, stream=True, starting_after=last)
            events += [event async for event in more]
        return events, server

    events, server = run_virtual(main())
    assert [e.sequence_number for e in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == events[-1].response.output_text
    assert [seen.charged for seen in server.log] == [1_004, 0]
    assert {seen.response_id for seen in server.log} == {events[0].response.id}


def test_it_goes_on_when_nobody_reads() -> None:
    """A response whose reader has left is complete after its time."""

    async def main() -> tuple[str, str, float]:
        server = simulator(speed=10, latency=1.0)
        began = server.clock.now()
        async with sdk(server) as client:
            made = await client.responses.create(model=MODEL, input=PROMPT, background=True)
            await asyncio.sleep(5)
            between = await client.responses.retrieve(made.id)
            await asyncio.sleep(10)
            done = await client.responses.retrieve(made.id)
        assert made.status == "queued"
        assert done.output_text
        return between.status or "", done.status or "", server.clock.now() - began

    assert run_virtual(main())[:2] == ("in_progress", "completed")


def test_it_can_be_cancelled() -> None:
    """Cancelling ends the generation and its streams; what is not generated is given back."""

    async def main() -> tuple[list[str | None], Simulator]:
        server, events = simulator(speed=10, policy="refunded"), []
        async with sdk(server) as client:
            reader = asyncio.create_task(begin(client, events))
            await asyncio.sleep(5)
            made = events[0].response.id
            statuses = [(await client.responses.cancel(made)).status for _ in range(2)]
            await reader
            statuses.append((await client.responses.retrieve(made)).status)
        return statuses, server

    statuses, server = run_virtual(main())
    assert statuses == ["cancelled"] * 3
    assert server.log[0].charged < 60


def test_a_failure_of_the_generation_is_final() -> None:
    """A response that failed stays failed, however often it is picked up."""

    async def main() -> tuple[str | None, list[str]]:
        server, events = simulator(), []
        server.script([Fault("failed", after=2)])
        async with sdk(server) as client:
            await begin(client, events)
            made = events[0].response.id
            again = await client.responses.retrieve(made, stream=True)
            kinds = [event.type async for event in again]
            assert kinds == [event.type for event in events]
            return (await client.responses.retrieve(made)).status, kinds

    status, kinds = run_virtual(main())
    assert status == "failed"
    assert kinds[-1] == "response.failed"


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/v1/responses/resp_none", "sk-one", 404),
        ("/v1/responses/{id}", "sk-two", 404),
        ("/v1/responses/{id}", "sk-one", 200),
        ("/v1/responses/{id}?stream=true", "sk-one", 400),
        ("/openai/v1/responses/{id}", "sk-one", 200),
    ],
)
def test_only_its_owner_finds_a_response(path: str, key: str, status: int) -> None:
    """Another key, or another id, finds nothing; a stream must have been one from the start."""

    async def main() -> int:
        server = simulator()
        bearer = {"authorization": "Bearer sk-one"}
        body = {"model": MODEL, "input": PROMPT, "background": True}
        await fetch(server, call(body=body, **bearer))
        asked = call(path.format(id=server.log[0].response_id), authorization=f"Bearer {key}")
        return (
            await fetch(server, type(asked)(method="GET", path=asked.path, headers=asked.headers))
        )[0]

    assert run_virtual(main()) == status


def test_what_is_not_stored_has_no_background() -> None:
    """`store=False` and `background` exclude each other."""

    async def main() -> int:
        body = {"model": MODEL, "input": PROMPT, "background": True, "store": False}
        return (await refusal(simulator(), call(body=body)))[0]

    assert run_virtual(main()) == 400


def test_picking_up_can_fail_too() -> None:
    """The script's next fault meets who picks up: a refusal first, then a break, then the rest."""

    async def main() -> list[int]:
        server, events = simulator(), []
        server.script([Fault("dropped", after=3), "tokens_per_minute", Fault("cut", after=3), None])
        async with sdk(server) as client:
            with pytest.raises(openai.APIConnectionError):
                await begin(client, events)
            made = events[0].response.id
            with pytest.raises(openai.RateLimitError):
                await client.responses.retrieve(made, stream=True)
            again = await client.responses.retrieve(made, stream=True)
            with pytest.raises(openai.APIConnectionError):
                assert [event async for event in again]
            rest = await client.responses.retrieve(made, stream=True)
            assert [event async for event in rest][-1].type == "response.completed"
        return [seen.charged for seen in server.log]

    assert run_virtual(main()) == [1_004, 0, 0, 0]
