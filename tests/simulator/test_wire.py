"""Answers of both APIs, as the official SDK receives them."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest

from nbcodex.simulator import Simulator
from nbcodex.simulator.generated_answers import SIMULATED_NOTICE
from tests.simulator.helpers import KEY, MODEL, fetch, post, sdk, simulator
from tests.simulator_transport import SimulatorTransport
from tests.virtual import run_virtual

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


def test_responses_stream_has_the_real_sequence_of_events_and_usage() -> None:
    async def main() -> tuple[list[Any], Simulator]:
        server = simulator()
        async with sdk(server) as client:
            stream = await client.responses.create(model=MODEL, input="hello", stream=True)
            return [event async for event in stream], server

    events, server = run_virtual(main())
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(e.type for e in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    done = events[-1].response
    assert text == done.output_text
    assert SIMULATED_NOTICE in text
    assert done.usage.input_tokens == 1
    assert done.usage.output_tokens == server.log[0].output_tokens
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens


def test_responses_events_are_valid_by_the_sdks_models() -> None:
    """At run time, the SDK does not validate them."""
    from openai.types.responses import ResponseStreamEvent
    from pydantic import TypeAdapter

    reasoning = {"effort": "low", "summary": "auto"}
    options = {"reasoning": reasoning, "include": ["reasoning.encrypted_content"], "stream": True}
    body = {"model": MODEL, "input": "hello", "background": True, **options}

    async def main() -> bytes:
        return (await fetch(simulator(), post(body=body)))[2]

    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    events = [line[6:] for line in run_virtual(main()).splitlines() if line.startswith(b"data: ")]
    kinds = {adapter.validate_json(event).type for event in events}
    assert len(kinds) == 14


FUNCTION: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.mark.parametrize(
    ("choice", "is_called"),
    [
        ("required", True),
        ({"type": "function", "name": "weather"}, True),
        ({"type": "function", "name": "another"}, False),
        ("auto", False),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_required_function_is_called_instead_of_a_message(
    stream: bool, choice: Any, is_called: bool
) -> None:
    async def main() -> Any:
        options = {"tools": [FUNCTION], "tool_choice": choice}
        async with sdk(simulator()) as client:
            if not stream:
                return await client.responses.create(model=MODEL, input="hello", **options)
            events = await client.responses.create(
                model=MODEL, input="hello", stream=True, **options
            )
            seen = [event async for event in events]
        if is_called:
            name = "response.function_call_arguments"
            arguments = "".join(event.delta for event in seen if event.type == f"{name}.delta")
            assert arguments == '{"city": "simulated"}'
        return seen[-1].response

    (item,) = run_virtual(main()).output
    assert item.type == ("function_call" if is_called else "message")
    if is_called:
        assert (item.name, json.loads(item.arguments)) == ("weather", {"city": "simulated"})


def test_compaction_has_one_encrypted_item() -> None:
    async def main() -> Any:
        async with sdk(simulator()) as client:
            return await client.responses.compact(model=MODEL, input="hello")

    compacted = run_virtual(main())
    assert compacted.object == "response.compaction"
    assert [item.type for item in compacted.output] == ["compaction"]


def test_compaction_without_a_model_is_a_400() -> None:
    async def main() -> int:
        return (await fetch(simulator(), post("/v1/responses/compact", {"input": "hello"})))[0]

    assert run_virtual(main()) == 400


def test_chat_chunks_are_valid_by_the_sdks_models() -> None:
    from openai.types.chat import ChatCompletionChunk

    body = {"model": MODEL, "messages": MESSAGES, "stream": True}

    async def main() -> bytes:
        with_usage = body | {"stream_options": {"include_usage": True}}
        return (await fetch(simulator(), post("/v1/chat/completions", with_usage)))[2]

    lines = [line[6:] for line in run_virtual(main()).splitlines() if line]
    assert lines[-1] == b"[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(line, strict=True) for line in lines[:-1]]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_sdk_reads_a_chat_completion(stream: bool) -> None:
    async def main() -> tuple[str, Any]:
        async with sdk(simulator()) as client:
            answer = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=stream
            )
            if not isinstance(answer, openai.AsyncStream):
                return answer.choices[0].message.content or "", answer.usage
            chunks = [chunk async for chunk in answer]
            return "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].usage

    text, usage = run_virtual(main())
    assert text.startswith("# Hello")
    assert (usage is None) == stream


@pytest.mark.parametrize("stream", [False, True])
def test_max_output_makes_the_answer_incomplete(stream: bool) -> None:
    async def main() -> Any:
        async with sdk(simulator()) as client:
            answer = await client.responses.create(
                model=MODEL, input="hello", max_output_tokens=20, stream=stream
            )
            if not isinstance(answer, openai.AsyncStream):
                return answer
            return [event async for event in answer][-1].response

    answer = run_virtual(main())
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 20


def test_reasoning_has_a_summary_and_counts_as_output() -> None:
    async def main() -> list[Any]:
        async with sdk(simulator()) as client:
            stream = await client.responses.create(
                model=MODEL,
                input="hello",
                stream=True,
                reasoning={"effort": "low", "summary": "auto"},
            )
            return [event async for event in stream]

    events = run_virtual(main())
    summary = [e.delta for e in events if e.type == "response.reasoning_summary_text.delta"]
    done = events[-1].response
    assert "".join(summary) == done.output[0].summary[0].text
    assert done.usage.output_tokens_details.reasoning_tokens == 64
    assert done.usage.output_tokens > 64


def test_repeated_long_prefix_is_read_from_the_cache() -> None:
    async def main() -> list[int]:
        async with sdk(simulator(tpm=None)) as client:
            return [
                answer.usage.input_tokens_details.cached_tokens
                for end in ("a", "b")
                if (
                    answer := await client.responses.create(model=MODEL, input="x" * 5_000 + end)
                ).usage
            ]

    assert run_virtual(main()) == [0, 1_024]


def test_listing_models_charges_no_limit() -> None:
    async def main() -> list[str]:
        async with sdk(simulator(models=("a", "b"), rpm=1)) as client:
            await client.models.list()
            return [model.id async for model in await client.models.list()]

    assert run_virtual(main()) == ["a", "b"]


def test_azure_client_is_answered_on_both_apis() -> None:
    async def main() -> tuple[list[str], str | None, str]:
        server = simulator()
        client = openai.AsyncAzureOpenAI(
            azure_endpoint="https://simulated.test",
            api_key=KEY,
            api_version="2025-04-01-preview",
            max_retries=0,
            http_client=httpx2.AsyncClient(transport=SimulatorTransport(server)),
        )
        async with client:
            chat = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
            answer = await client.responses.create(model=MODEL, input="hello")
        paths = [seen.path.partition("?")[0] for seen in server.log]
        return paths, chat.choices[0].message.content, answer.output_text

    paths, chat, answer = run_virtual(main())
    assert paths == [f"/openai/deployments/{MODEL}/chat/completions", "/openai/responses"]
    assert chat == answer


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"model": "no", "input": "hello"}, openai.NotFoundError),
        ({"model": MODEL, "input": "x" * 4_000_000}, openai.BadRequestError),
        ({"model": MODEL, "input": "hello", "max_output_tokens": 40_000}, openai.RateLimitError),
    ],
)
def test_http_errors_become_the_sdks_typed_errors(
    body: dict[str, Any], error: type[openai.APIStatusError]
) -> None:
    async def main() -> openai.APIStatusError:
        async with sdk(simulator()) as client:
            with pytest.raises(error) as caught:
                await client.responses.create(**body)
            return caught.value

    raised = run_virtual(main())
    assert raised.code in {"model_not_found", "context_length_exceeded", "rate_limit_exceeded"}
    assert raised.response.headers["x-nbcodex-simulated"] == "true"


def test_headers_of_a_stream_state_the_limits_at_admission() -> None:
    async def main() -> tuple[float, dict[str, str]]:
        server = simulator(latency=2.0, tpm=30_000)
        began = server.clock.now()
        answer = await server.answer(
            post(body={"model": MODEL, "input": "x" * 4_000, "stream": True})
        )
        waited = server.clock.now() - began
        await answer.aclose()
        return waited, answer.headers

    waited, headers = run_virtual(main())
    assert waited == pytest.approx(2.0)
    assert headers["openai-processing-ms"] == "2000"
    assert headers["x-ratelimit-remaining-tokens"] == "28000"
    assert headers["x-ratelimit-reset-tokens"] == "4s"
    assert headers["x-ratelimit-remaining-requests"] == "499"
    assert headers["x-ratelimit-reset-requests"] == "120ms"


def test_answer_takes_latency_and_time_per_token() -> None:
    async def main() -> float:
        server = simulator(latency=0.5, speed=100)
        began = server.clock.now()
        body = {"model": MODEL, "input": "[[tokens=800]]", "stream": True}
        await fetch(server, post(body=body))
        return server.clock.now() - began

    assert run_virtual(main()) == pytest.approx(0.5 + 7.99, abs=0.01)


@pytest.mark.parametrize(
    ("policy", "charged"), [("kept", 1_003), ("refunded", 103), ("actual", 103)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_log_has_prompt_tokens_and_charge_by_policy(
    policy: str, charged: int, stream: bool
) -> None:
    async def main() -> Simulator:
        server = simulator(policy=policy)
        body = {"model": MODEL, "input": "[[tokens=100]]", "stream": stream}
        await fetch(server, post(body=body, host="here"))
        return server

    server = run_virtual(main())
    (seen,) = server.log
    assert (seen.api, seen.model, seen.prompt, seen.host) == (
        "responses",
        MODEL,
        "[[tokens=100]]",
        "here",
    )
    assert (seen.status, seen.input_tokens, seen.output_tokens) == (200, 4, 100)
    assert seen.finished
    assert seen.charged == charged + 1


def test_closed_stream_is_charged_for_generated_tokens_only() -> None:
    async def main() -> Simulator:
        server = simulator(policy="refunded", speed=10)
        body = {"model": MODEL, "input": "[[tokens=500]]", "stream": True}
        answer = await server.answer(post(body=body))
        async for chunk in answer.body:
            if b"output_text.delta" in chunk and server.clock.now() > 5_005:
                break
        await answer.aclose()
        return server

    (seen,) = run_virtual(main()).log
    assert not seen.finished
    assert 40 <= seen.output_tokens <= 50
    assert seen.charged == seen.input_tokens + seen.output_tokens


def test_unread_answer_is_charged_for_its_input_only() -> None:
    async def main() -> Simulator:
        server = simulator(policy="refunded")
        body = {"model": MODEL, "input": "hello", "stream": True}
        await (await server.answer(post(body=body))).aclose()
        return server

    assert run_virtual(main()).log[0].charged == 1


def test_missing_api_is_a_404() -> None:
    async def main() -> int:
        return (await fetch(simulator(apis=("chat",)), post()))[0]

    assert run_virtual(main()) == 404


def test_changed_limit_shows_in_the_next_answer() -> None:
    async def main() -> str:
        server = simulator()
        await fetch(server, post())
        server.change_knobs(tpm=60_000)
        return (await fetch(server, post()))[1]["x-ratelimit-limit-tokens"]

    assert run_virtual(main()) == "60000"


def test_schema_gets_an_answer_that_the_sdk_parses() -> None:
    from pydantic import BaseModel

    class Step(BaseModel):
        title: str
        minutes: int

    class Recipe(BaseModel):
        name: str
        vegan: bool
        steps: list[Step]

    async def main() -> Recipe | None:
        async with sdk(simulator()) as client:
            answer = await client.responses.parse(model=MODEL, input="hello", text_format=Recipe)
            return answer.output_parsed

    recipe = run_virtual(main())
    assert recipe is not None
    assert recipe.steps[0].minutes == 1
    assert json.loads(recipe.model_dump_json())["vegan"] is True
