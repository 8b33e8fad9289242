"""A look-alike: the official SDK takes the simulator for the real server."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest

from nbcodex.simulator import Simulator
from nbcodex.simulator.generated_answers import SIMULATED_NOTICE
from tests.simulator.asking import KEY, MODEL, call, fetch, sdk, simulator
from tests.simulator_transport import SimulatorTransport
from tests.virtual import run_virtual

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


def test_responses_stream_the_real_sequence_of_events() -> None:
    """Typed events, numbered without a gap, from `created` to `completed`, with the usage."""

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


def test_every_event_holds_against_the_sdks_types() -> None:
    """Each event is valid by the SDK's own models, which at run time let everything pass."""
    from openai.types.responses import ResponseStreamEvent
    from pydantic import TypeAdapter

    asked = {"effort": "low", "summary": "auto"}
    options = {"reasoning": asked, "include": ["reasoning.encrypted_content"], "stream": True}
    body = {"model": MODEL, "input": "hello", "background": True, **options}

    async def main() -> bytes:
        return (await fetch(simulator(), call(body=body)))[2]

    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    events = [line[6:] for line in run_virtual(main()).splitlines() if line.startswith(b"data: ")]
    kinds = {adapter.validate_json(event).type for event in events}
    assert len(kinds) == 14


def test_chat_chunks_hold_against_the_sdks_types() -> None:
    """Each chunk is valid; the last but `[DONE]` has no choices, and the usage."""
    from openai.types.chat import ChatCompletionChunk

    body = {"model": MODEL, "messages": MESSAGES, "stream": True}

    async def main() -> bytes:
        asked = body | {"stream_options": {"include_usage": True}}
        return (await fetch(simulator(), call("/v1/chat/completions", asked)))[2]

    lines = [line[6:] for line in run_virtual(main()).splitlines() if line]
    assert lines[-1] == b"[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(line, strict=True) for line in lines[:-1]]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_chat_answers(stream: bool) -> None:
    """The SDK reads the text of a completion, streamed or not, without usage unless asked."""

    async def main() -> tuple[str, Any]:
        async with sdk(simulator()) as client:
            made = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=stream
            )
            if not isinstance(made, openai.AsyncStream):
                return made.choices[0].message.content or "", made.usage
            chunks = [chunk async for chunk in made]
            return "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].usage

    text, usage = run_virtual(main())
    assert text.startswith("# Hello")
    assert (usage is None) == stream


@pytest.mark.parametrize("stream", [False, True])
def test_max_output_cuts_an_answer(stream: bool) -> None:
    """An answer that is cut is `incomplete`, says why, and has exactly so many tokens."""

    async def main() -> Any:
        async with sdk(simulator()) as client:
            made = await client.responses.create(
                model=MODEL, input="hello", max_output_tokens=20, stream=stream
            )
            if not isinstance(made, openai.AsyncStream):
                return made
            return [event async for event in made][-1].response

    made = run_virtual(main())
    assert made.status == "incomplete"
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.usage.output_tokens == 20


def test_reasoning_is_shown_and_counted() -> None:
    """With an effort the model thinks first: a summary if asked for, tokens within the output."""

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


def test_a_long_beginning_seen_before_is_cached() -> None:
    """The second of two requests with the same long beginning reads it from the cache."""

    async def main() -> list[int]:
        async with sdk(simulator(tpm=None)) as client:
            return [
                made.usage.input_tokens_details.cached_tokens
                for end in ("a", "b")
                if (
                    made := await client.responses.create(model=MODEL, input="x" * 5_000 + end)
                ).usage
            ]

    assert run_virtual(main()) == [0, 1_024]


def test_models_are_listed() -> None:
    """`/models` tells the models that exist, and takes nothing of any limit."""

    async def main() -> list[str]:
        async with sdk(simulator(models=("a", "b"), rpm=1)) as client:
            await client.models.list()
            return [model.id async for model in await client.models.list()]

    assert run_virtual(main()) == ["a", "b"]


def test_the_azure_client_is_answered() -> None:
    """The SDK's Azure client finds the deployment's chat, and Responses beside it."""

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
            made = await client.responses.create(model=MODEL, input="hello")
        paths = [seen.path.partition("?")[0] for seen in server.log]
        return paths, chat.choices[0].message.content, made.output_text

    paths, chat, made = run_virtual(main())
    assert paths == [f"/openai/deployments/{MODEL}/chat/completions", "/openai/responses"]
    assert chat == made


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"model": "no", "input": "hello"}, openai.NotFoundError),
        ({"model": MODEL, "input": "x" * 4_000_000}, openai.BadRequestError),
        ({"model": MODEL, "input": "hello", "max_output_tokens": 40_000}, openai.RateLimitError),
    ],
)
def test_failures_become_the_sdks_own_errors(
    body: dict[str, Any], error: type[openai.APIStatusError]
) -> None:
    """Each HTTP error is the typed error of its status, with its code and its headers."""

    async def main() -> openai.APIStatusError:
        async with sdk(simulator()) as client:
            with pytest.raises(error) as caught:
                await client.responses.create(**body)
            return caught.value

    raised = run_virtual(main())
    assert raised.code in {"model_not_found", "context_length_exceeded", "rate_limit_exceeded"}
    assert raised.response.headers["x-nbcodex-simulated"] == "true"


def test_headers_tell_the_limits_of_the_admission() -> None:
    """A stream's headers come with the first token; they are those of the moment of admission."""

    async def main() -> tuple[float, dict[str, str]]:
        server = simulator(latency=2.0, tpm=30_000)
        began = server.clock.now()
        answer = await server.answer(
            call(body={"model": MODEL, "input": "x" * 4_000, "stream": True})
        )
        waited = server.clock.now() - began
        await answer.body.aclose()
        return waited, answer.headers

    waited, headers = run_virtual(main())
    assert waited == pytest.approx(2.0)
    assert headers["openai-processing-ms"] == "2000"
    assert headers["x-ratelimit-remaining-tokens"] == "28000"
    assert headers["x-ratelimit-reset-tokens"] == "4s"
    assert headers["x-ratelimit-remaining-requests"] == "499"
    assert headers["x-ratelimit-reset-requests"] == "120ms"


def test_an_answer_takes_the_time_of_its_tokens() -> None:
    """800 tokens at 100 a second take 8 seconds after a latency of half a second."""

    async def main() -> float:
        server = simulator(latency=0.5, speed=100)
        began = server.clock.now()
        body = {"model": MODEL, "input": "[[tokens=800]]", "stream": True}
        await fetch(server, call(body=body))
        return server.clock.now() - began

    assert run_virtual(main()) == pytest.approx(0.5 + 7.99, abs=0.01)


@pytest.mark.parametrize(
    ("policy", "charged"), [("kept", 1_003), ("refunded", 103), ("actual", 103)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_log_says_what_was_asked_and_paid(policy: str, charged: int, stream: bool) -> None:
    """Prompt, tokens and charge of a request, by each policy, settled at its end."""

    async def main() -> Simulator:
        server = simulator(policy=policy)
        body = {"model": MODEL, "input": "[[tokens=100]]", "stream": stream}
        await fetch(server, call(body=body, host="here"))
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


def test_a_reader_who_leaves_pays_for_what_was_generated() -> None:
    """Closing a stream ends the generation; what was not generated is given back."""

    async def main() -> Simulator:
        server = simulator(policy="refunded", speed=10)
        body = {"model": MODEL, "input": "[[tokens=500]]", "stream": True}
        answer = await server.answer(call(body=body))
        async for chunk in answer.body:
            if b"output_text.delta" in chunk and server.clock.now() > 5_005:
                break
        await answer.body.aclose()
        return server

    (seen,) = run_virtual(main()).log
    assert not seen.finished
    assert 40 <= seen.output_tokens <= 50
    assert seen.charged == seen.input_tokens + seen.output_tokens


def test_a_reader_who_never_reads_is_settled_too() -> None:
    """An answer that is closed unread is charged its input alone, where the rest is refunded."""

    async def main() -> Simulator:
        server = simulator(policy="refunded")
        body = {"model": MODEL, "input": "hello", "stream": True}
        await (await server.answer(call(body=body))).body.aclose()
        return server

    assert run_virtual(main()).log[0].charged == 1


def test_chat_only_servers_can_be_had() -> None:
    """With `apis=("chat",)`, Responses are a 404, as on servers that do not know them."""

    async def main() -> int:
        return (await fetch(simulator(apis=("chat",)), call()))[0]

    assert run_virtual(main()) == 404


def test_limits_can_change_while_it_runs() -> None:
    """A step of the limit shows in the next answer."""

    async def main() -> str:
        server = simulator()
        await fetch(server, call())
        server.change_knobs(tpm=60_000)
        return (await fetch(server, call()))[1]["x-ratelimit-limit-tokens"]

    assert run_virtual(main()) == "60000"


def test_json_is_answered_where_json_is_asked_for() -> None:
    """A schema gets an answer that the SDK can parse into the class it came from."""
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
            made = await client.responses.parse(model=MODEL, input="hello", text_format=Recipe)
            return made.output_parsed

    recipe = run_virtual(main())
    assert recipe is not None
    assert recipe.steps[0].minutes == 1
    assert json.loads(recipe.model_dump_json())["vegan"] is True
