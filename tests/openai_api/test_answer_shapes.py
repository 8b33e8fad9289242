"""Answers whose text, ending or reasoning is not where OpenAI's servers put it."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from typing import Any

import httpx2
import pytest

from nbcodex.errors import AnswerError, NbcodexError, TransientError
from nbcodex.models import Request, Schema
from nbcodex.openai_api.answers import (
    MAX_HOSTED_TOOL_CALLS,
    MAX_IMAGES,
    CompletedAnswer,
    ReasoningDelta,
    StreamEvent,
    judge,
)
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.openai_api.batches import Batch, BatchClient
from nbcodex.openai_api.readers import ReasoningSplitter
from tests.openai_api.scripted import (
    DONE,
    Part,
    Script,
    Server,
    Silence,
    chunk,
    completed,
    delta,
    ending_of,
    event,
    fails,
    play,
    settings,
    text_of,
)
from tests.openai_api.test_server_peculiarities import TAGGED
from tests.virtual import LoopClock, run_virtual

PNG = b64encode(b"\x89PNG\r\n\x1a\n" + bytes(9)).decode()
USAGE = {"prompt_tokens": 9, "completion_tokens": 4}
BROKEN = httpx2.ReadError("reset")


def choices(**members: Any) -> bytes:
    """Return a chunk with one choice."""
    return event({"choices": [{"index": 0, **members}]})


def thought(text: str, finish: str | None = None) -> bytes:
    return choices(delta={"reasoning_content": text}, finish_reason=finish)


def body(payload: dict[str, Any]) -> list[Part]:
    return [json.dumps(payload).encode()]


def message(content: object = "hi", **members: Any) -> dict[str, Any]:
    if isinstance(content, str):
        content = [{"type": "output_text", "text": content}]
    return {"type": "message", "status": "completed", "content": content, **members}


def item_done(item: dict[str, Any]) -> bytes:
    return event({"type": "response.output_item.done", "item": item})


def run(parts: list[Part], api: str = "chat", **options: Any) -> list[StreamEvent]:
    return play(Server(Script(parts)), chosen=settings(api=api), **options)


def answer(parts: list[Part], api: str = "chat", **options: Any) -> CompletedAnswer:
    """Return the answer of a response, whose deltas must show the same text."""
    events = run(parts, api, **options)
    done = events[-1]
    assert isinstance(done, CompletedAnswer)
    assert text_of(events) == done.text
    return done


def reasoning_of(events: list[StreamEvent]) -> str:
    return "".join(each.text for each in events if isinstance(each, ReasoningDelta))


def batch_answer(payload: dict[str, Any], **options: Any) -> CompletedAnswer | NbcodexError:
    """Return what a batch has for a request whose result file has this body."""

    async def main() -> CompletedAnswer | NbcodexError:
        line = {"custom_id": "a", "response": {"status_code": 200, "body": payload}}
        server = Server(Script([json.dumps(line).encode()]))
        batches = BatchClient(ApiClient(clock=LoopClock(), transport=server), settings())
        batch = Batch(id="b", status="completed", files=("f",))
        found = [each async for each in batches.results(batch, Request(prompt="Why?", **options))]
        return found[0][1]

    return run_virtual(main())


# Endings of streams.


@pytest.mark.parametrize(
    "parts",
    [
        [chunk("a ", finish="stop"), chunk("b", finish="stop"), DONE],
        [chunk("a ", finish="stop"), Silence(9), chunk("b", finish="stop"), DONE],
        [thought("Hm.", "stop"), Silence(9), chunk("a b", finish="stop"), DONE],
        [chunk("a ", finish="stop"), chunk("b", finish="stop"), chunk(usage=USAGE)],
        [chunk("a b", finish="stop")],
        [chunk("a b", finish="stop"), chunk(usage=USAGE), BROKEN],
        [chunk("a b"), chunk(finish="stop"), BROKEN],
    ],
    ids=range(7),
)
def test_finish_reason_beside_text_does_not_end_the_answer(parts: list[Part]) -> None:
    done = answer(parts)
    assert (done.text, done.cut) == ("a b", None)


@pytest.mark.parametrize(
    "parts",
    [
        [chunk("a ", finish="stop"), BROKEN],
        [chunk("a ", finish="stop"), chunk("b", finish="stop"), BROKEN],
        [chunk("a ", finish="stop"), chunk("b", finish="stop")],
        [chunk("a ", finish="stop"), chunk("b", finish="stop"), Silence(999), DONE],
        [chunk("a ", finish="stop"), event({"error": {"message": "gone", "code": 502}}), DONE],
        [chunk("a "), chunk(finish="stop"), chunk("b"), BROKEN],
    ],
    ids=range(6),
)
def test_break_after_a_finish_reason_beside_text_is_retried(parts: list[Part]) -> None:
    assert isinstance(fails(Server(Script(parts)), chosen=settings(api="chat")), TransientError)


@pytest.mark.parametrize(
    ("parts", "cut"),
    [
        ([chunk("hi", finish="null"), chunk(finish="stop"), DONE], None),
        ([chunk("hi", finish="None"), chunk(finish="length"), DONE], "max_output_tokens"),
        ([chunk("hi"), choices(delta={}, finish_reason=None, finishReason="STOP"), DONE], None),
        ([chunk("hi"), event({"choices": [], "finish_reason": "stop"}), DONE], None),
        ([choices(index="0", delta={"content": "hi"}, finish_reason="stop"), DONE], None),
        ([chunk("hi", finish="EndTurn"), DONE], None),
        ([chunk("hi", finish="stop_str"), DONE], None),
        ([chunk("hi", finish="model_context_window_exceeded"), DONE], "max_output_tokens"),
        ([chunk("hi", finish="length_exceeded"), DONE], "max_output_tokens"),
        ([chunk("hi", finish="IMAGE_SAFETY"), DONE], "content_filter"),
        ([chunk("hi", finish="guardrail_intervened"), DONE], "content_filter"),
    ],
    ids=range(11),
)
def test_ending_is_read_in_other_spellings(parts: list[Part], cut: str | None) -> None:
    done = answer(parts)
    assert (done.text, done.cut) == ("hi", cut)


@pytest.mark.parametrize(
    "parts",
    [
        [chunk("hi", finish="null"), BROKEN],
        [chunk("hi"), chunk(finish="engine_error"), DONE],
        [chunk("hi"), chunk(finish="rate_limit"), DONE],
        body({"choices": [{"message": {"content": "hi"}, "finish_reason": None}]}),
        [event({"message": "Invalid key", "code": 500})],
        [b"event: error\ndata: out of memory\n\n"],
    ],
    ids=range(6),
)
def test_failure_in_other_spellings_is_retried(parts: list[Part]) -> None:
    error = fails(Server(Script(parts)), chosen=settings(api="chat"))
    assert isinstance(error, TransientError)
    assert b"memory" not in parts[0] or "memory" in error.message  # type: ignore[operator]


@pytest.mark.parametrize("outer", [{"choices": None, "id": None}, {"choices": []}, {"ok": True}])
@pytest.mark.parametrize("name", ["provider", "data"])
def test_answer_that_is_nested_in_a_member_is_read(name: str, outer: dict[str, Any]) -> None:
    choice = {"message": {"content": "hi"}, "finish_reason": "stop"}
    parts = body({**outer, name: {"choices": [choice], "usage": USAGE}})
    answer = ending_of(play(Server(Script(parts)), chosen=settings(api="chat")))
    assert (answer.text, answer.cut) == ("hi", None)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([chunk("hi"), chunk(usage=USAGE), DONE], "did not state how"),
        (body({"choices": [{"message": {"content": "hi"}}], "usage": USAGE}), "did not state how"),
        (body({"choices": None, "usage": USAGE}), "probably blocked"),
        ([event({"choices": [], "usage": USAGE}), DONE], "probably blocked"),
    ],
    ids=range(4),
)
def test_second_answer_without_an_ending_is_an_error_that_keeps_the_text(
    parts: list[Part], words: str
) -> None:
    server, request = Server(Script(parts)), Request(prompt="Why?")
    chosen = settings(api="chat")

    async def main() -> None:
        client = ApiClient(clock=LoopClock(), transport=server)
        with pytest.raises(TransientError):
            [each async for each in client.stream(request, chosen, model="m")]
        *_, done = [each async for each in client.stream(request, chosen, model="m")]
        assert isinstance(done, CompletedAnswer)
        assert done.text in ("hi", "")
        with pytest.raises(AnswerError, match=words):
            judge(done)

    run_virtual(main())


@pytest.mark.parametrize("status", ["expired", "error", "requires_action", "in_progress", 7])
def test_unknown_status_of_a_response_is_never_a_success(status: object) -> None:
    payload = {"output": [message()], "status": status}
    for parts in (
        body(payload),
        [delta("hi"), completed(**payload)],
        [delta("hi"), completed(output=[], status=status)],
    ):
        with pytest.raises(NbcodexError):
            judge(answer(parts, "responses"))
    found = batch_answer(payload)
    if isinstance(found, CompletedAnswer):
        with pytest.raises(AnswerError):
            judge(found)


@pytest.mark.parametrize(
    "payload",
    [
        {"output": [message()], "incomplete_details": {"reason": "max_output_tokens"}},
        {"output": [message(status="incomplete")], "status": "completed"},
        {"output": [message()], "usage": {"input_tokens": 9, "output_tokens": 16}},
    ],
    ids=["details", "item", "usage"],
)
def test_cut_response_that_says_completed_is_shown_as_cut(payload: dict[str, Any]) -> None:
    for parts in (body(payload), [delta("hi"), completed(**payload)]):
        assert answer(parts, "responses", max_output=16).cut == "max_output_tokens"
    found = batch_answer(payload, max_output=16)
    assert isinstance(found, CompletedAnswer)
    assert found.cut == "max_output_tokens"


def test_cut_chat_answer_that_says_stop_is_shown_as_cut() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 16}
    parts: list[Part] = [chunk("hi"), chunk(finish="stop"), chunk(usage=usage), DONE]
    assert answer(parts, max_output=16).cut == "max_output_tokens"
    assert answer(parts, max_output=17).cut is None


@pytest.mark.parametrize(
    "parts",
    [
        [delta("hi"), event({"type": "response.done", "response": {"output": [message()]}})],
        [delta("hi"), item_done(message())],
        [delta("hi"), item_done(message()), DONE],
    ],
    ids=["response.done", "end", "marker"],
)
def test_response_without_the_completed_event_is_complete(parts: list[Part]) -> None:
    assert answer(parts, "responses").text == "hi"


@pytest.mark.parametrize(
    "parts",
    [
        [delta("h"), item_done(message("h", status="incomplete"))],
        [delta("h"), item_done(message("h", phase="commentary"))],
        [delta("h"), item_done(message("h")), event({"type": "response.output_item.added"})],
        [delta("h"), item_done(message("h")), BROKEN],
    ],
    ids=["incomplete", "commentary", "more", "broken"],
)
def test_response_that_ends_in_the_middle_is_retried(parts: list[Part]) -> None:
    assert isinstance(fails(Server(Script(parts))), TransientError)


@pytest.mark.parametrize("status", ["COMPLETED", "Failed", "EXPIRED"])
def test_status_of_a_batch_is_read_in_any_case(status: str) -> None:
    async def main() -> None:
        server = Server(Script(body({"id": "b", "object": "batch", "status": status})))
        batches = BatchClient(ApiClient(clock=LoopClock(), transport=server), settings())
        assert (await batches.retrieve_batch("b", Request(prompt="x"))).ended

    run_virtual(main())


# LiteLLM (rowboat #113).
@pytest.mark.parametrize("status", [None, ""])
def test_response_with_an_empty_status_is_complete(status: object) -> None:
    payload = {"output": [message()], "status": status, "usage": None}
    for parts in (
        body(payload),
        [delta("hi"), completed(**payload)],
        [delta("hi"), completed(output=[], status=status)],
        [event({"type": "response.done", "response": payload})],
    ):
        found = answer(parts, "responses")
        judge(found)
        assert found.text == "hi"


# Texts.

CREATED = event({"type": "response.created", "response": {"id": "r"}})
FINISHED = completed(output=[message("a b c")])


@pytest.mark.parametrize(
    "parts",
    [
        [delta("a "), delta("a "), delta("b c"), FINISHED],
        [delta("a "), delta("c"), FINISHED],
        [delta("a "), FINISHED],
        [CREATED, delta("a "), CREATED, delta("a b c"), FINISHED],
        [CREATED, delta("a "), item_done(message("a b c")), completed(output=[])],
        [
            delta("a c"),
            event({"type": "response.output_text.done", "text": "a b c"}),
            completed(),
        ],
        [delta("a b c"), completed(output=[message(" ")])],
    ],
    ids=["twice", "lost", "tail", "restarted", "item", "done", "blank"],
)
def test_final_text_replaces_deltas_that_differ(parts: list[Part]) -> None:
    assert answer(parts, "responses").text == "a b c"


# vLLM (#30223) and others state as the whole text what came last.
@pytest.mark.parametrize("final", [" c", "b c", "c"])
@pytest.mark.parametrize("place", ["output", "item", "done"])
def test_final_text_that_is_only_the_end_of_the_deltas_does_not_win(final: str, place: str) -> None:
    ends = {
        "output": [completed(output=[message(final)])],
        "item": [item_done(message(final)), completed(output=[])],
        "done": [event({"type": "response.output_text.done", "text": final}), completed()],
    }
    assert answer([delta("a "), delta("b"), delta(" c"), *ends[place]], "responses").text == "a b c"


def test_text_before_the_answer_that_is_commentary_is_replaced() -> None:
    commentary = {**message("Hm. "), "phase": "commentary"}
    finished = completed(output=[commentary, message("a b c")])
    assert answer([delta("Hm. a"), delta(" b c"), finished], "responses").text == "a b c"


# A relay that asks again within one stream (mnfst/llm-gateway #2072), and an agent's server that
# runs the functions itself (openai-agents-python #2427).

CREATED_AGAIN = event({"type": "response.created", "response": {"id": "r2"}})
CALL = {"type": "function_call", "name": "look_up", "arguments": "{}", "call_id": "c1"}
ASKED_TO_CALL = completed(output=[CALL], usage={"input_tokens": 9, "output_tokens": 5})
LAST = completed(output=[], usage={"input_tokens": 20, "output_tokens": 6})


@pytest.mark.parametrize("again", [CREATED, CREATED_AGAIN], ids=["same id", "another id"])
@pytest.mark.parametrize(
    "before",
    [
        [delta("Bon")],
        [delta("Bon<"), delta("thi")],
        [delta("Bon"), item_done(message("Bon"))],
        [item_done(CALL)],
        [],
    ],
    ids=["half", "half tag", "item", "call", "nothing"],
)
def test_response_that_begins_again_replaces_what_came_before(
    before: list[Part], again: bytes
) -> None:
    found = answer([CREATED, *before, again, delta("Bonjour!"), LAST], "responses")
    judge(found)
    assert (found.text, found.usage.input_tokens) == ("Bonjour!", 20)


@pytest.mark.parametrize("together", [True, False])
def test_answer_after_a_call_that_the_server_ran_counts(together: bool) -> None:
    parts = [CREATED, item_done(CALL), ASKED_TO_CALL, CREATED_AGAIN, delta("Sunny."), LAST]
    found = answer([b"".join(parts)] if together else parts, "responses")
    judge(found)
    assert (found.text, found.response_id, found.tool_calls) == ("Sunny.", "r2", ())
    assert (found.usage.input_tokens, found.usage.output_tokens) == (29, 11)


@pytest.mark.parametrize(
    "rest",
    [[], [DONE], [delta("more")], [event({"type": "error", "message": "x"})], [ASKED_TO_CALL]],
)
def test_call_alone_stays_a_failure(rest: list[Part]) -> None:
    with pytest.raises(AnswerError, match="look_up"):
        judge(answer([CREATED, delta("One"), ASKED_TO_CALL, *rest], "responses"))


PART_DONE = {"type": "response.content_part.done", "part": {"type": "output_text", "text": "hi"}}


@pytest.mark.parametrize(
    ("api", "parts"),
    [
        ("chat", [choices(message={"content": "hi"}, finish_reason="stop"), DONE]),
        ("chat", [choices(text="hi", finish_reason="stop"), DONE]),
        ("chat", [chunk("h"), chunk("i"), choices(delta={}, message={"content": "hi"},
                                                  finish_reason="stop"), DONE]),
        ("chat", body({"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]})),
        ("chat", body({"choices": [{"text": "hi", "finish_reason": "stop"}]})),
        ("chat", body({"choices": [{"message": {"content": [{"type": "text", "text": {
            "value": "hi"}}]}, "finish_reason": "stop"}]})),
        ("chat", [choices(delta={"audio": {"transcript": "hi"}}, finish_reason="stop"), DONE]),
        ("chat", body({"choices": [{"message": {"content": None, "audio": {"transcript": "hi"}},
                                    "finish_reason": "stop"}]})),
        ("responses", [item_done(message()), completed()]),
        ("responses", [event(PART_DONE), completed(output=[])]),
        ("responses", body({"output": [{"type": "message", "content": "hi"}]})),
        ("responses", [completed(output=[{"type": "message", "content": "hi"}])]),
        ("responses", body({"output": [], "output_text": "hi"})),
        ("responses", body({"output": [message([{"type": "text", "text": {"value": "hi"}}])]})),
    ],
    ids=range(14),
)  # fmt: skip
def test_text_is_read_from_any_member(api: str, parts: list[Part]) -> None:
    assert answer(parts, api).text == "hi"


def test_parsed_object_without_content_is_its_json() -> None:
    choice = {"message": {"content": None, "parsed": {"a": 1}}, "finish_reason": "stop"}
    assert answer(body({"choices": [choice]})).text == '{"a": 1}'


@pytest.mark.parametrize(
    "part",
    [
        {"content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}]},
        {"images": [f"data:image/png;base64,{PNG}"]},
        {"images": [{"type": "image_url", "image_url": f"data:image/png;base64,{PNG}"}]},
        {"images": [{"b64_json": PNG}]},
    ],
)
def test_picture_is_read_in_every_shape(part: dict[str, Any]) -> None:
    for parts in (
        [choices(delta=part, finish_reason="stop"), DONE],
        body({"choices": [{"message": part, "finish_reason": "stop"}]}),
    ):
        done = answer(parts)
        assert len(done.images) == 1
        judge(done)


def test_pictures_of_an_answer_are_bounded() -> None:
    pictures = [b64encode(b"\x89PNG\r\n\x1a\n" + bytes([at])).decode() for at in range(200)]
    done = answer([choices(delta={"images": pictures}, finish_reason="stop"), DONE])
    assert len(done.images) == MAX_IMAGES
    assert done.images[0].data.endswith(b"\0")


@pytest.mark.parametrize("streamed", [True, False])
def test_hosted_calls_of_an_answer_are_bounded(streamed: bool) -> None:
    items = [{"type": "web_search_call", "id": f"{at}"} for at in range(1_500)]
    items += [{"type": "image_generation_call", "result": PNG}]
    received = [item_done(item) for item in items]
    parts = [*received, completed(output=items)] if streamed else body({"output": items})
    assert len(answer(parts, "responses").usage.hosted_tool_calls) == MAX_HOSTED_TOOL_CALLS


@pytest.mark.parametrize(
    "part", [{"content": [{"type": "refusal", "refusal": "no"}]}, {"refusal": "no"}]
)
def test_refusal_is_read_in_every_shape(part: dict[str, Any]) -> None:
    for parts in (
        [choices(delta=part, finish_reason="stop"), DONE],
        body({"choices": [{"message": part, "finish_reason": "stop"}]}),
    ):
        done = answer(parts)
        assert (done.text, done.declined) == ("no", True)


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "", "type": "", "param": "", "code": None}},
        {"error_code": 0, "error_msg": "success"},
        {"error": False},
    ],
)
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_error_without_content_beside_an_answer_is_none(error: dict[str, Any], api: str) -> None:
    choice = {"delta": {"content": "hi"}, "finish_reason": "stop"}
    whole = {"choices": [choice]} if api == "chat" else {"output": [message()]}
    streamed = event({**whole, **error}) if api == "chat" else completed(**whole, **error)
    for parts in (body({**whole, **error}), [streamed, DONE]):
        assert answer(parts, api).text == "hi"


@pytest.mark.parametrize("text", ["\u200b", "<|im_end|>", "\u2060\ufeff\n", "</s>"])
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_answer_without_anything_visible_is_empty(text: str, api: str) -> None:
    parts = (
        [chunk(text), chunk(finish="stop"), DONE]
        if api == "chat"
        else [delta(text), completed(output=[message(text)])]
    )
    with pytest.raises(AnswerError, match="empty"):
        judge(answer(parts, api))


@pytest.mark.parametrize(
    "text", ["hi<|im_end|>", "hi</s>", "hi<end_of_turn>\n", "hi</s> <|im_end|>"]
)
@pytest.mark.parametrize("size", [1, 3, 99])
def test_special_token_at_the_end_is_removed(text: str, size: int) -> None:
    received = [chunk(text[at : at + size]) for at in range(0, len(text), size)]
    events = run([*received, chunk(finish="stop"), DONE])
    assert text_of(events) == "hi"
    assert not any(type(each).__name__ == "Reset" for each in events)
    assert answer(body({"choices": [choice_of(text)]})).text == "hi"


@pytest.mark.parametrize(
    "text", ["Write <|im_end|> last.", "`<|im_end|>`", "a <b", "a </s> b", "</s> <b>"]
)
def test_special_token_within_a_text_stays(text: str) -> None:
    assert answer([*map(chunk, text), chunk(finish="stop"), DONE]).text == text


# Reasoning.


def choice_of(text: str) -> dict[str, Any]:
    return {"message": {"content": text}, "finish_reason": "stop"}


@pytest.mark.parametrize("text", TAGGED)
def test_reasoning_in_tags_of_a_batch_is_separated(text: str) -> None:
    for payload in ({"choices": [choice_of(text)]}, {"output": [message(text)]}):
        done = batch_answer(payload)
        assert isinstance(done, CompletedAnswer)
        assert done.text == "hi"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "reasoning", "text": "Hm."},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
    ],
)
def test_reasoning_part_of_a_content_list_is_not_text(part: dict[str, Any]) -> None:
    content = [part, {"type": "text", "text": "hi"}]
    for parts in (
        [choices(delta={"content": content}, finish_reason="stop"), DONE],
        body({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}),
    ):
        events = run(parts)
        assert (text_of(events), reasoning_of(events)) == ("hi", "Hm.")


MENTIONS = [
    "First it thinks. The tag </think> closes the thought.",
    "Use this:\n\n    <think>\n    why\n    </think>\n    what\n\nThen parse it.",
    "Use this:\n\n<think>\nwhy\n</think>\nwhat",
    "1. Write <think>.\n2. Write </think>.\n3. Answer.",
]


@pytest.mark.parametrize("text", MENTIONS)
@pytest.mark.parametrize("size", [1, 7, 999])
def test_mention_of_a_closing_tag_is_part_of_the_answer(text: str, size: int) -> None:
    received = [chunk(text[at : at + size]) for at in range(0, len(text), size)]
    assert answer([*received, chunk(finish="stop"), DONE]).text == text


def test_many_mentions_of_a_closing_tag_take_linear_time() -> None:
    text = "a" + " </think>" * 1_000_000 + " end"
    splitter = ReasoningSplitter("compatible")
    before = time.process_time()
    assert splitter.feed(text) == (text, "")
    # In quadratic time it would be hours.
    assert time.process_time() - before < 10.0


@pytest.mark.parametrize("server", ["azure", "openai"])
def test_unopened_closing_tag_counts_only_at_compatible_servers(server: str) -> None:
    splitter = ReasoningSplitter(server)
    assert splitter.feed("Hm.\n</think>\nhi") == ("Hm.\n</think>\nhi", "")


SAID = message("Let me see.", phase="commentary")
FINAL = message("hi", phase="final_answer")
ADDED = {"type": "response.output_item.added", "item": {"type": "message", "phase": "commentary"}}


@pytest.mark.parametrize(
    "parts",
    [
        body({"output": [SAID, FINAL]}),
        [delta("Let me see."), delta("hi"), completed(output=[SAID, FINAL])],
        [
            event({**ADDED, "output_index": 0}),
            event(
                {"type": "response.output_text.delta", "delta": "Let me see.", "output_index": 0}
            ),
            event({"type": "response.output_text.delta", "delta": "hi", "output_index": 1}),
            completed(output=[SAID, FINAL]),
        ],
    ],
    ids=["body", "stream", "announced"],
)
def test_commentary_is_shown_as_reasoning(parts: list[Part]) -> None:
    events = run(parts, "responses")
    assert (text_of(events), reasoning_of(events)) == ("hi", "Let me see.")
    assert answer(parts, "responses").text == "hi"


def part_done(text: str, kind: str = "output_text", index: int = 0) -> bytes:
    part = {"type": kind, "text": text}
    return event({"type": "response.content_part.done", "part": part, "output_index": index})


def test_done_part_of_reasoning_is_not_the_answer() -> None:
    thought_done = part_done("Hm.", "reasoning_text")
    reasoning = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}
    cut = {"output": [reasoning], "incomplete_details": {"reason": "max_output_tokens"}}
    done = answer(
        [thought_done, event({"type": "response.incomplete", "response": cut})], "responses"
    )
    assert (done.text, done.cut) == ("", "max_output_tokens")
    parts = [thought_done, part_done("hi", index=1), completed(output=[])]
    assert answer(parts, "responses").text == "hi"


def test_done_part_of_commentary_is_not_the_answer() -> None:
    announced = event({**ADDED, "output_index": 0})
    parts = [announced, part_done("Let me see."), part_done("hi", index=1), completed(output=[])]
    assert answer(parts, "responses").text == "hi"


def test_encrypted_reasoning_is_read_from_done_items() -> None:
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
    parts = [item_done(reasoning), item_done(message()), completed(output=[])]
    assert answer(parts, "responses").reasoning == (reasoning,)


# Calls.


@pytest.mark.parametrize(
    "item",
    [
        {"type": "mcp_approval_request", "name": "search"},
        {"type": "local_shell_call", "action": {}},
        {"type": "apply_patch_call"},
    ],
)
def test_call_that_only_the_client_could_run_is_an_error(item: dict[str, Any]) -> None:
    for parts in (
        body({"output": [message(), item]}),
        [item_done(item), completed(output=[message(), item])],
    ):
        with pytest.raises(AnswerError, match="asked to call"):
            judge(answer(parts, "responses"))


@pytest.mark.parametrize(
    "part",
    [
        {"content": "hi", "tool_calls": [{"id": "x", "function": {"name": None}}]},
        {"content": '<tool_call>\n{"name": "search"}\n</tool_call>'},
        {"content": '[TOOL_CALLS][{"name": "search"}]'},
    ],
)
def test_call_in_another_shape_is_an_error(part: dict[str, Any]) -> None:
    for parts in (
        [choices(delta=part, finish_reason="stop"), DONE],
        body({"choices": [{"message": part, "finish_reason": "stop"}]}),
    ):
        with pytest.raises(AnswerError, match="asked to call"):
            judge(answer(parts))


@pytest.mark.parametrize(
    ("finish", "cut"),
    [("length", "max_output_tokens"), ("content_filter", "content_filter"), ("tool_calls", None)],
)
def test_schema_answered_by_a_call_that_is_cut_is_shown_as_cut(
    finish: str, cut: str | None
) -> None:
    schema = Schema(name="pet", definition={"type": "object"})
    function = {"name": "pet", "arguments": '{"a":'}
    parts = [choices(delta={"tool_calls": [{"function": function}]}), chunk(finish=finish), DONE]
    done = answer(parts, schema=schema)
    assert (done.text, done.cut) == ('{"a":', cut)


@pytest.mark.parametrize("name", ["pet", "json_tool_call"])
def test_schema_answered_by_a_call_of_its_name_is_an_answer(name: str) -> None:
    schema = Schema(name="pet", definition={"type": "object"})
    function = {"name": name, "arguments": '{"a":'}
    call = {"type": "function_call", "name": name, "arguments": '{"a": 1}'}
    for api, parts in (
        ("chat", [choices(delta={"tool_calls": [{"function": function}]}),
                  choices(delta={"tool_calls": [{"function": {"arguments": " 1}"}}]}),
                  chunk(finish="tool_calls"), DONE]),
        ("responses", [item_done(call), completed(output=[call])]),
    ):  # fmt: skip
        done = answer(parts, api, schema=schema)
        judge(done)
        assert done.text == '{"a": 1}'
    found = batch_answer({"output": [call]}, schema=schema)
    assert isinstance(found, CompletedAnswer)
    assert found.text == '{"a": 1}'
    with pytest.raises(AnswerError, match=name):
        judge(answer(parts, api))


# Framing.

HELLO = b'{"choices":[{"delta":{"content":"hi"}}]}'
STOP = b'{"choices":[{"delta":{},"finish_reason":"stop"}]}'


@pytest.mark.parametrize(
    "parts",
    [
        [chunk("hi"), b"event: ping\ndata: 2026-11-30T17:00:00Z\n\n", chunk(finish="stop"), DONE],
        [b"data: keep-alive\n\n", chunk("hi"), chunk(finish="stop"), DONE],
        [b"data: " + HELLO + b"\ndata: " + STOP + b"\ndata: [DONE]\n"],
        [HELLO + b"\n", STOP + b"\n"],
        [HELLO + b"\n\n" + STOP],
    ],
    ids=["ping", "word", "newlines", "lines of JSON", "JSON between blank lines"],
)
def test_framing_that_departs_from_the_standard_is_read(parts: list[Part]) -> None:
    assert answer(parts).text == "hi"


@pytest.mark.parametrize(
    "damaged",
    [b"data: data: " + HELLO, b"data: \xef\xbb\xbf" + HELLO, b"data: " + HELLO[1:]],
    ids=["prefix", "byte order mark", "first byte"],
)
def test_damaged_event_is_a_fault_that_is_retried(damaged: bytes) -> None:
    parts = [chunk("Oh, "), damaged + b"\n\n", chunk(finish="stop"), DONE]
    assert isinstance(fails(Server(Script(parts)), chosen=settings(api="chat")), TransientError)
    half = b'data: "type":"response.output_text.delta","delta":"hi"}\n\n'
    parts = [delta("Oh, "), half, completed(output=[])]
    assert isinstance(fails(Server(Script(parts))), TransientError)


def test_error_event_with_braces_in_its_words_keeps_them() -> None:
    parts = [b"event: error\ndata: out of memory {gpu 0}\n\n"]
    assert "out of memory {gpu 0}" in fails(Server(Script(parts))).message
