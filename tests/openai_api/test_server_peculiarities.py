"""Answers and refusals as compatible servers really send them."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import httpx2
import pytest

from nbcodex.errors import ModelError, RequestError
from nbcodex.models import Schema, Source, Turn
from nbcodex.openai_api.answers import (
    CompletedAnswer,
    ReasoningDelta,
    Reset,
    StreamEvent,
    TextDelta,
)
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.openai_api.readers import ReasoningSplitter, split_reasoning
from tests.openai_api.scripted import (
    BASE,
    DONE,
    Script,
    Server,
    chunk,
    completed,
    delta,
    event,
    fails,
    play,
    refusal,
    settings,
)
from tests.virtual import LoopClock, run_virtual

JSON = {"content-type": "application/json"}
SCHEMA = Schema(name="pet", definition={"type": "object"})


def json_script(payload: object, status: int = 200) -> Script:
    return Script([json.dumps(payload).encode()], status, JSON)


def lm_studio(request: httpx2.Request) -> Script:
    """Answer any path but that of Chat Completions below /v1 as LM Studio does."""
    if request.url.path == "/v1/chat/completions":
        return Script([chunk("hi", finish="stop"), DONE])
    words = f"Unexpected endpoint or method. ({request.method} {request.url.path})"
    return json_script({"error": words})


def llama_cpp(request: httpx2.Request) -> Script:
    """Answer ``/v1/responses`` as llama.cpp's converter of input items does (b10902)."""
    items = json.loads(request.content)["input"]
    for item in [] if isinstance(items, str) else items:
        content = item["content"]
        types = [part.get("type") for part in content] if isinstance(content, list) else []
        if item["role"] == "assistant" and item.get("type") != "message":
            return refusal(400, "Cannot determine type of 'item'", type="invalid_request_error")
        if item["role"] == "assistant" and types != ["output_text"]:
            return refusal(400, "'type' must be 'output_text'", type="invalid_request_error")
    return Script([delta("hi"), completed()])


def test_second_turn_is_accepted_by_llama_cpp() -> None:
    turn = Turn(prompt="one", answer="two")
    assert shown(play(Server(llama_cpp), prompt="three", turns=(turn,))) == ("hi", "")


# Wrong addresses with HTTP 200.


def test_missing_responses_api_in_a_200_switches_to_chat_and_is_remembered() -> None:
    server = Server(lm_studio)
    api_client = ApiClient(clock=LoopClock(), transport=server)
    for _ in range(2):
        events = play(server, chosen=settings(api="auto"), api_client=api_client)
        assert shown(events) == ("hi", "")
    paths = [request.url.path for request in server.requests]
    assert paths == ["/v1/responses", "/v1/chat/completions", "/v1/chat/completions"]


@pytest.mark.parametrize("api", ["auto", "chat", "responses"])
def test_base_url_without_v1_is_an_error_that_suggests_it(api: str) -> None:
    server = Server(lm_studio)
    error = fails(server, chosen=settings(api=api, base_url="https://gateway.example"))
    assert isinstance(error, ModelError)
    assert "https://gateway.example/" in error.message
    assert "https://gateway.example/v1" in error.advice
    assert len(server.requests) == (2 if api == "auto" else 1)


@pytest.mark.parametrize(
    "answer", [lm_studio, Script([b"404 page not found"], 404), Script([b"\n<!doctype html><p>"])]
)
def test_list_of_models_at_a_wrong_address_is_an_error(answer: Any) -> None:
    async def main() -> None:
        api_client = ApiClient(clock=LoopClock(), transport=Server(answer))
        with pytest.raises(ModelError, match="not an address"):
            await api_client.list_models(settings(base_url="https://gateway.example"))

    run_virtual(main())


# Groq's validation of schemas.


@pytest.mark.parametrize("in_stream", [False, True])
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_generation_that_failed_validation_is_an_answer(in_stream: bool, api: str) -> None:
    error = {
        "message": "Failed to validate JSON",
        "type": "invalid_request_error",
        "code": "json_validate_failed",
        "failed_generation": '{"name": 3}',
    }
    begun = chunk("{") if api == "chat" else delta("{")
    failed = Script([begun, event({"error": error}, "error")])
    server = Server(failed if in_stream else json_script({"error": error}, 400))
    events = play(server, chosen=settings(api=api), schema=SCHEMA)
    assert shown(events) == ('{"name": 3}', "")
    assert events[-1].text == '{"name": 3}'  # type: ignore[union-attr]


def test_validation_error_without_a_generation_stays_an_error() -> None:
    server = Server(refusal(400, "Failed to validate JSON", code="json_validate_failed"))
    assert isinstance(fails(server), RequestError)


# A relay that wraps a 400.


def test_output_bound_is_learned_from_a_wrapped_400() -> None:
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    wrapped = refusal(500, message, type="invalid_request_error", code="unsupported_parameter")
    server = Server(wrapped, Script([chunk("hi", finish="stop"), DONE]))
    play(server, chosen=settings(api="chat", base_url=BASE), max_output=9)
    first, second = server.sent
    assert "max_tokens" in first
    assert "max_completion_tokens" in second


def test_wrapped_400_of_the_users_parameter_is_not_retried() -> None:
    message = "Unsupported value: 'temperature' does not support 0."
    server = Server(refusal(500, message, type="invalid_request_error", code="unsupported_value"))
    error = fails(server, params={"temperature": 0})
    assert isinstance(error, RequestError)
    assert "temperature" in error.message
    assert len(server.requests) == 1


# Reasoning in the text.


def shown(events: list[StreamEvent]) -> tuple[str, str]:
    """Return the text and the reasoning after all events."""
    text = reasoning = ""
    for each in events:
        match each:
            case Reset():
                text = ""
            case TextDelta(more):
                text += more
            case ReasoningDelta(more):
                reasoning += more
    return text, reasoning


@pytest.mark.parametrize("is_tagged", [True, False])
@pytest.mark.parametrize(
    "pieces", [["The us", "The user asks.", "The user asks."], ["The user asks."]]
)
def test_repeated_reasoning_is_shown_once(pieces: list[str], is_tagged: bool) -> None:
    parts = []
    for at, piece in enumerate(pieces):
        tagged = "<think>The user asks." if is_tagged and at == 0 else ""
        message = {"content": tagged, "reasoning_content": piece}
        parts.append(event({"choices": [{"delta": message, "finish_reason": None}]}))
    parts.append(chunk("</think>4" if is_tagged else "4", finish="stop"))
    chosen = settings(api="chat", base_url="http://localhost:1/v1")
    assert shown(play(Server(Script([*parts, DONE])), chosen=chosen)) == ("4", "The user asks.")


def test_reasoning_in_equal_deltas_is_shown_whole() -> None:
    message = {"delta": {"reasoning_content": "again "}}
    parts = [event({"choices": [message]})] * 3
    received = play(
        Server(Script([*parts, chunk("4", finish="stop"), DONE])), chosen=settings(api="chat")
    )
    assert shown(received) == ("4", "again again again ")


@pytest.mark.parametrize("indexes", [(1, 2), (0, 1), ("0", "0"), (None, None)])
def test_index_of_the_only_choice_has_no_meaning(indexes: tuple[Any, Any]) -> None:
    """TGI counts the tokens in it (text-generation-inference #1648)."""
    choices = [
        {"index": indexes[0], "delta": {"content": "I"}},
        {"index": indexes[1], "delta": {"content": "'m"}, "finish_reason": "stop"},
    ]
    parts = [event({"choices": [choice]}) for choice in choices]
    received = play(Server(Script([*parts, DONE])), chosen=settings(api="chat"))
    assert shown(received) == ("I'm", "")


HARMONY = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>hi"
TAGGED = [
    HARMONY,
    "<thought>Hm.</thought>hi",
    "<think>Hm.</think>\n\nhi",
    "\n<think>\nHm.\n</think>hi",
    "<thinking>Hm.</thinking> hi",
    "[THINK]Hm.[/THINK]hi",
    "Hm.\n</think>\n\nhi",
    "Hm.</think>hi",
    "<think>Hm</think><think>.</think>hi",
]


@pytest.mark.parametrize("text", TAGGED)
@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_reasoning_in_tags_is_not_part_of_the_answer(text: str, size: int, api: str) -> None:
    received = [text[at : at + size] for at in range(0, len(text), size)]
    if api == "chat":
        parts = [*map(chunk, received), chunk(finish="stop"), DONE]
    else:
        message = {"type": "message", "content": [{"type": "output_text", "text": text}]}
        parts = [*map(delta, received), completed(output=[message])]
    events = play(Server(Script(parts)), chosen=settings(api=api))
    answer, reasoning = shown(events)
    assert answer == "hi"
    assert reasoning.strip().partition("<|end|>")[0] == "Hm."
    assert events[-1].text == "hi"  # type: ignore[union-attr]


@pytest.mark.parametrize("text", TAGGED)
def test_reasoning_in_tags_of_an_answer_in_one_piece_is_separated(text: str) -> None:
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    events = play(Server(json_script({"choices": [choice]})), chosen=settings(api="chat"))
    answer, reasoning = shown(events)
    assert answer == "hi"
    assert reasoning.strip().partition("<|end|>")[0] == "Hm."


@pytest.mark.parametrize(
    "text",
    [
        "The tag `</think>` ends it.",
        "```\n</think>\n```\nIt ends.",
        'It is written "</think>".',
        "a < b and <thin lines> [THIN",
        "hi <think>no</think> there",
        "<",
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_tags_that_belong_to_the_answer_stay(text: str, size: int) -> None:
    splitter = ReasoningSplitter("compatible")
    if "<think>" in text:
        text = text.replace("hi <think>", "`<think>`").replace("</think>", "`</think>`")
    found = [splitter.feed(text[at : at + size]) for at in range(0, len(text), size)]
    found.append(splitter.flush())
    assert "".join(answer for answer, _ in found) == text
    assert "".join(reasoning for _, reasoning in found) == ""


def test_unclosed_reasoning_leaves_no_answer() -> None:
    assert split_reasoning("<think>Hm, so", "azure") == ("", "Hm, so")


@pytest.mark.parametrize(
    "delta_of_choice",
    [
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
                {"type": "text", "text": "hi"},
            ]
        },
        {"content": "hi", "reasoning_content": [{"type": "text", "text": "Hm."}]},
        {"content": "hi", "reasoning_content": "Hm."},
        {"content": "hi", "reasoning": "Hm."},
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
def test_reasoning_is_read_in_every_shape(delta_of_choice: dict[str, Any], streamed: bool) -> None:
    member = "delta" if streamed else "message"
    payload = {"choices": [{member: delta_of_choice, "finish_reason": "stop"}]}
    script = Script([event(payload), DONE]) if streamed else json_script(payload)
    assert shown(play(Server(script), chosen=settings(api="chat"))) == ("hi", "Hm.")


@pytest.mark.parametrize("streamed", [True, False])
def test_content_that_is_a_json_object_is_its_json(streamed: bool) -> None:
    member = "delta" if streamed else "message"
    payload = {"choices": [{member: {"content": {"name": "Ö"}}, "finish_reason": "stop"}]}
    script = Script([event(payload), DONE]) if streamed else json_script(payload)
    events = play(Server(script), chosen=settings(api="chat"))
    assert shown(events) == ('{"name": "Ö"}', "")


# Refusals of parameters.


@pytest.mark.parametrize(
    "message",
    [
        "System role not supported",
        "Developer instruction is not enabled for models/gemma-3",
        "Only user and assistant roles are supported!",
        "Conversation roles must alternate user/assistant/user/assistant/...",
    ],
)
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_refused_system_message_moves_before_the_prompt_and_is_remembered(
    message: str, api: str
) -> None:
    good = chunk("hi", finish="stop") + DONE if api == "chat" else delta("hi") + completed()
    server = Server(refusal(400, message), Script([good]))
    api_client = ApiClient(clock=LoopClock(), transport=server)
    for _ in range(2):
        play(server, chosen=settings(api=api), api_client=api_client, system="Be brief.")
    refused, *accepted = server.sent
    assert len(accepted) == 2
    assert "Be brief." in json.dumps(refused)
    for body in accepted:
        prompt = body["input"] if api == "responses" else body["messages"][0]["content"]
        assert prompt == "Be brief.\n\nWhy?"
        assert "instructions" not in body


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            400,
            "Invalid JSON payload: Unknown name \"$defs\" at 'generation_config.response_schema'",
        ),
        (500, "response_format json_schema: failed to parse grammar"),
    ],
)
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_schema_mode_refused_in_other_words_moves_into_the_prompt(
    status: int, message: str, api: str
) -> None:
    good = chunk("{}", finish="stop") + DONE if api == "chat" else delta("{}") + completed()
    server = Server(refusal(status, message), Script([good]))
    schema = Schema(name="pet", definition={"type": "object", "properties": {}})
    play(server, chosen=settings(api=api), schema=schema)
    _, second = server.sent
    assert "response_format" not in second
    assert "text" not in second


# Pictures of Chat Completions.

PNG = b"\x89PNG\r\n\x1a\n" + bytes(9)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(("kind", "count"), [("png", 1), ("svg+xml", 0)])
def test_picture_of_a_chat_answer_is_kept(streamed: bool, kind: str, count: int) -> None:
    data = PNG if kind == "png" else b"<svg onload=alert(1)>"
    url = f"data:image/{kind};base64,{b64encode(data).decode()}"
    image = {"type": "image_url", "image_url": {"url": url}}
    member = "delta" if streamed else "message"
    payload = {"choices": [{member: {"content": "", "images": [image]}, "finish_reason": "stop"}]}
    script = Script([event(payload), DONE]) if streamed else json_script(payload)
    done = play(Server(script), chosen=settings(api="chat"))[-1]
    assert len(done.images) == count  # type: ignore[union-attr]


# Web pages that an answer cites.

PAGE = "https://example.org/sky"


def answer_of(events: list[StreamEvent]) -> CompletedAnswer:
    assert isinstance(events[-1], CompletedAnswer)
    return events[-1]


@pytest.mark.parametrize(
    ("api", "parts"),
    [
        (
            "chat",
            [
                chunk("Blue [1]."),
                event({"choices": [{"index": 0, "delta": {"annotations": [
                    {"type": "url_citation", "url_citation": {"url": PAGE, "title": "Sky"}}]}}]}),
                chunk(finish="stop"),
            ],
        ),
        (
            "chat",
            [chunk("Blue [1].", finish="stop", citations=[PAGE],
                   search_results=[{"title": "Sky", "url": PAGE, "date": "2026-01-01"}])],
        ),
        (
            "responses",
            [
                delta("Blue [1]."),
                event({"type": "response.output_text.annotation.added", "annotation": {
                    "type": "url_citation", "url": PAGE, "title": "Sky", "start_index": 0}}),
                completed(),
            ],
        ),
        (
            "responses",
            [
                delta("Blue [1]."),
                completed(output=[{"type": "message", "content": [{
                    "type": "output_text", "text": "Blue [1].", "annotations": [
                        {"type": "url_citation", "url": PAGE, "title": "Sky"},
                        {"type": "file_citation", "file_id": "f"}]}]}]),
            ],
        ),
    ],
    ids=["annotations of Chat Completions", "Perplexity", "event of Responses", "final output"],
)  # fmt: skip
def test_cited_pages_are_kept_in_order(api: str, parts: list[bytes]) -> None:
    answer = answer_of(play(Server(Script([*parts, DONE])), chosen=settings(api=api)))
    assert answer.text == "Blue [1]."
    assert answer.sources == (Source(PAGE, "Sky"),)


def test_cited_pages_of_one_piece_are_kept() -> None:
    message = {"role": "assistant", "content": "Blue [1] [2]."}
    payload = {
        "choices": [{"message": message, "finish_reason": "stop"}],
        "citations": [PAGE, "https://example.org/sea", PAGE],
    }
    answer = answer_of(play(Server(json_script(payload)), chosen=settings(api="chat")))
    assert [source.url for source in answer.sources] == [PAGE, "https://example.org/sea"]


@pytest.mark.parametrize("url", ["javascript:alert(1)", "file:///etc/passwd", "x" * 9, 7, None])
def test_citation_without_a_web_address_is_dropped(url: object) -> None:
    script = Script([chunk("Blue.", finish="stop", citations=[url, PAGE]), DONE])
    answer = answer_of(play(Server(script), chosen=settings(api="chat")))
    assert answer.sources == (Source(PAGE),)


def test_number_of_cited_pages_is_bounded() -> None:
    pages = [f"{PAGE}/{number}" for number in range(5_000)]
    script = Script([chunk("Blue.", finish="stop", citations=pages), DONE])
    answer = answer_of(play(Server(script), chosen=settings(api="chat")))
    assert len(answer.sources) == 100
