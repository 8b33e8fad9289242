"""Background responses: they continue without their connection and are charged once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import openai
import pytest

from nbcodex.simulator import Fault, Simulator
from tests.simulator.helpers import MODEL, fetch, post, refusal, sdk, simulator
from tests.virtual import run_virtual

PROMPT = "[[tokens=100]]"


async def stream_background(client: openai.AsyncOpenAI, events: list[Any]) -> None:
    """Stream a background response into `events`, until it breaks."""
    stream = await client.responses.create(
        model=MODEL, input=PROMPT, background=True, stream=True, store=True
    )
    async for event in stream:
        events.append(event)  # noqa: PERF401 - what came before the break counts


def test_broken_stream_continues_after_its_last_event_and_is_paid_once() -> None:
    async def main() -> tuple[list[Any], Simulator]:
        server, events = simulator(), []
        server.script([Fault("dropped", after=30), None])
        async with sdk(server) as client:
            with pytest.raises(openai.APIConnectionError):
                await stream_background(client, events)
            response_id = events[0].response.id
            last = events[-1].sequence_number
            more = await client.responses.retrieve(response_id, stream=True, starting_after=last)
            events += [event async for event in more]
        return events, server

    events, server = run_virtual(main())
    assert [e.sequence_number for e in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == events[-1].response.output_text
    assert [seen.charged for seen in server.log] == [1_004, 0]
    assert {seen.response_id for seen in server.log} == {events[0].response.id}


def test_background_response_completes_without_a_reader() -> None:
    async def main() -> tuple[str, str, float]:
        server = simulator(speed=10, latency=1.0)
        began = server.clock.now()
        async with sdk(server) as client:
            response = await client.responses.create(model=MODEL, input=PROMPT, background=True)
            await asyncio.sleep(5)
            between = await client.responses.retrieve(response.id)
            await asyncio.sleep(10)
            done = await client.responses.retrieve(response.id)
        assert response.status == "queued"
        assert done.output_text
        return between.status or "", done.status or "", server.clock.now() - began

    assert run_virtual(main())[:2] == ("in_progress", "completed")


def test_cancelled_response_ends_its_streams_and_refunds_the_rest() -> None:
    async def main() -> tuple[list[str | None], Simulator]:
        server, events = simulator(speed=10, policy="refunded"), []
        async with sdk(server) as client:
            reader = asyncio.create_task(stream_background(client, events))
            await asyncio.sleep(5)
            response_id = events[0].response.id
            statuses = [(await client.responses.cancel(response_id)).status for _ in range(2)]
            await reader
            statuses.append((await client.responses.retrieve(response_id)).status)
        return statuses, server

    statuses, server = run_virtual(main())
    assert statuses == ["cancelled"] * 3
    assert server.log[0].charged < 60


def test_failed_response_stays_failed() -> None:
    async def main() -> tuple[str | None, list[str]]:
        server, events = simulator(), []
        server.script([Fault("failed", after=2)])
        async with sdk(server) as client:
            await stream_background(client, events)
            response_id = events[0].response.id
            again = await client.responses.retrieve(response_id, stream=True)
            kinds = [event.type async for event in again]
            assert kinds == [event.type for event in events]
            return (await client.responses.retrieve(response_id)).status, kinds

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
def test_response_is_found_by_its_owner_only(path: str, key: str, status: int) -> None:
    """A stream can be continued only if the response was created as one."""

    async def main() -> int:
        server = simulator()
        bearer = {"authorization": "Bearer sk-one"}
        body = {"model": MODEL, "input": PROMPT, "background": True}
        await fetch(server, post(body=body, **bearer))
        request = post(path.format(id=server.log[0].response_id), authorization=f"Bearer {key}")
        return (await fetch(server, replace(request, method="GET", body=b"")))[0]

    assert run_virtual(main()) == status


@pytest.mark.parametrize(("key", "status", "status_after"), [("one", 200, 404), ("two", 404, 200)])
def test_response_is_deleted_by_its_owner_only(key: str, status: int, status_after: int) -> None:
    async def main() -> list[int]:
        server = simulator()
        body = {"model": MODEL, "input": PROMPT, "background": True}
        await fetch(server, post(body=body, authorization="Bearer sk-one"))
        path = f"/v1/responses/{server.log[0].response_id}"
        statuses = []
        for method, name in (("DELETE", key), ("GET", "one")):
            request = post(path, authorization=f"Bearer sk-{name}")
            statuses.append((await fetch(server, replace(request, method=method, body=b"")))[0])
        return statuses

    assert run_virtual(main()) == [status, status_after]


def test_background_without_store_is_a_400() -> None:
    async def main() -> int:
        body = {"model": MODEL, "input": PROMPT, "background": True, "store": False}
        return (await refusal(simulator(), post(body=body)))[0]

    assert run_virtual(main()) == 400


def test_scripted_faults_apply_to_continued_streams() -> None:
    async def main() -> list[int]:
        server, events = simulator(), []
        server.script([Fault("dropped", after=3), "tokens_per_minute", Fault("cut", after=3), None])
        async with sdk(server) as client:
            with pytest.raises(openai.APIConnectionError):
                await stream_background(client, events)
            response_id = events[0].response.id
            with pytest.raises(openai.RateLimitError):
                await client.responses.retrieve(response_id, stream=True)
            again = await client.responses.retrieve(response_id, stream=True)
            with pytest.raises(openai.APIConnectionError):
                assert [event async for event in again]
            rest = await client.responses.retrieve(response_id, stream=True)
            assert [event async for event in rest][-1].type == "response.completed"
        return [seen.charged for seen in server.log]

    assert run_virtual(main()) == [1_004, 0, 0, 0]
