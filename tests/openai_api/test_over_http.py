"""`nbcodex.ask` against a small HTTP server that answers as compatible servers have been seen to.

Each test goes through the whole package: journal, limiter, retries and a real connection.
"""

from __future__ import annotations

import base64
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import nbcodex
from nbcodex import client, errors, host
from nbcodex.events import BackingOff, Delta, Event
from nbcodex.models import Request, Usage, UsageTotals
from nbcodex.openai_api import pricing
from nbcodex.rendering.figures import figures_line, totals_line
from nbcodex.requests import runner
from nbcodex.requests.budget import Budget, RequestEstimate
from tests.openai_api.scripted import DONE, KEY, chunk, completed, delta, event
from tests.openai_api.test_schemas_and_images import PNG
from tests.virtual import LoopClock

pytestmark = pytest.mark.slow

APIS = pytest.mark.parametrize("api", ["responses", "chat"])
SSE, JSON = {"content-type": "text/event-stream"}, {"content-type": "application/json"}
USAGE = {
    "responses": {"input_tokens": 1000, "output_tokens": 1000},
    "chat": {"prompt_tokens": 1000, "completion_tokens": 1000},
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Answer:
    """One response of the server."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: SSE)


def refused(status: int, message: str, **error: Any) -> Answer:
    return Answer(json.dumps({"error": {"message": message, **error}}).encode(), status, JSON)


def streamed(api: str, text: str, *, model: str = "gpt-5", **response: Any) -> Answer:
    """Return an answer in the events of an API, with its usage and further members."""
    if api == "chat":
        usage = event({"choices": [], "usage": USAGE["chat"], **response})
        return Answer(chunk(text, model=model) + chunk(finish="stop") + usage + DONE)
    response = {"model": model, "usage": USAGE["responses"], **response}
    return Answer(delta(text) + completed(**response))


@dataclass
class Server:
    """A server that gives the answers of a list, the last one repeatedly, and records requests."""

    url: str
    answers: list[Answer] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)  # the bodies
    events: list[Event] = field(default_factory=list)  # of the client

    def next_answer(self, body: bytes) -> Answer:
        self.sent.append(json.loads(body))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def backed_off(self) -> list[BackingOff]:
        return [each for each in self.events if isinstance(each, BackingOff)]


@contextmanager
def serving() -> Iterator[Server]:
    server = Server("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            answer = server.next_answer(body)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that the environment names, and a client that knows nothing of other servers."""
    with serving() as running:
        monkeypatch.setenv("OPENAI_BASE_URL", running.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("NBCODEX_MODEL", "gpt-5")
        monkeypatch.setattr(client, "_current", None)
        monkeypatch.setattr(host, "current", host.Host(is_script=False))  # as in a notebook
        monkeypatch.setattr(runner, "_exponential_wait", lambda _: 0.01)  # the backoff in seconds
        client.get_client().listeners.append(running.events.append)
        yield running
        client.get_client().close()


@pytest.fixture
def priced(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, with the prices of OpenAI."""
    monkeypatch.setattr(pricing, "_OPENAI_HOST", "127.0.0.1")
    return server


def fails(**options: Any) -> Any:
    with pytest.raises(nbcodex.NbcodexError) as caught:
        nbcodex.ask("Why?", **options)
    return caught.value


# Groq validates a schema itself, and returns what it generated in an error (langchain #31459).


def failed_generation(api: str, *, in_stream: bool) -> Answer:
    error = {
        "message": "Failed to validate JSON.",
        "type": "invalid_request_error",
        "code": "json_validate_failed",
        "failed_generation": '{"name": 3}',
    }
    if in_stream:
        begun = chunk("{") if api == "chat" else delta("{")
        return Answer(begun + event({"error": error}, "error"))
    return refused(400, **error)


@APIS
@pytest.mark.parametrize("in_stream", [True, False])
def test_failed_generation_is_repaired_once(server: Server, api: str, in_stream: bool) -> None:
    server.answers = [failed_generation(api, in_stream=in_stream), streamed(api, '{"name": "Lem"}')]
    reply = nbcodex.ask("Who?", api=api, schema=SCHEMA)
    assert reply.parsed == {"name": "Lem"}
    assert len(server.sent) == 2
    assert "does not fit" in json.dumps(server.sent[1])


@APIS
def test_second_failed_generation_ends_with_its_text_kept(server: Server, api: str) -> None:
    server.answers = [failed_generation(api, in_stream=False)]
    error = fails(api=api, schema=SCHEMA)
    assert isinstance(error, errors.AnswerError)
    assert error.reply.text == '{"name": 3}'
    assert len(server.sent) == 2


# Capacity of a tier.


@APIS
@pytest.mark.parametrize(
    ("status", "code", "tier"),
    [(429, "resource_unavailable", "flex"), (429, None, "flex"), (498, "capacity_exceeded", None)],
)
def test_missing_capacity_of_a_tier_closes_no_limit(
    server: Server, api: str, status: int, code: str | None, tier: str | None
) -> None:
    server.answers = [refused(status, "Resource unavailable.", code=code), streamed(api, "hi")]
    params = {"service_tier": tier} if tier else None
    assert nbcodex.ask("Why?", api=api, params=params).attempts == 2
    [wait] = server.backed_off()
    assert isinstance(wait.error, errors.OverloadedError)
    assert wait.limit is None


@pytest.mark.parametrize(
    "message",
    [
        "Rate limit reached for m on requests per min (RPM): Limit 3, Used 3, Requested 1.",
        "Too many concurrent requests.",
    ],
)
def test_limit_that_is_named_stays_a_limit_in_the_flex_tier(server: Server, message: str) -> None:
    server.answers = [refused(429, f"{message} Try again in 10ms."), streamed("chat", "hi")]
    nbcodex.ask("Why?", api="chat", params={"service_tier": "flex"})
    [wait] = server.backed_off()
    assert isinstance(wait.error, errors.LimitError)


@APIS
@pytest.mark.parametrize(
    ("words", "headers"),
    [
        ("API rate limit exceeded", {"x-ratelimit-limit-minute": "240", "retry-after-ms": "10",
                                     "x-ratelimit-remaining-minute": "0"}),
        ("Too many requests", {"ratelimit-limit": "240", "ratelimit-remaining": "0",
                               "retry-after-ms": "10"}),
        ("Slow down", {"ratelimit": '"default";r=0', "ratelimit-policy": '"default";q=240;w=60',
                       "retry-after-ms": "10"}),
        ("Rate limit exceeded. Limit: 240, Used: 240. Please try again in 10ms.", {}),
    ],
    ids=["Kong", "older IETF draft", "newer IETF draft", "words"],
)  # fmt: skip
def test_limit_that_does_not_say_what_it_counts_admits_long_prompts(
    server: Server, api: str, words: str, headers: dict[str, str]
) -> None:
    """Taken for a limit on tokens, one of 240 would never admit these prompts."""
    limited = replace(refused(429, words), headers=JSON | headers)
    server.answers = [limited, streamed(api, "hi")]
    prompt = "lorem ipsum dolor " * 100
    assert nbcodex.ask(prompt, api=api, patience=10).attempts == 2
    [wait] = server.backed_off()
    assert wait.limit is not None
    assert (wait.limit.resource, wait.limit.limit) == (None, 240)
    replies = nbcodex.map("{} " + prompt, ["a", "b", "c"], api=api, patience=10)
    assert [reply.text for reply in replies] == ["hi"] * 3


def test_usage_limit_of_a_plan_waits_as_stated(server: Server) -> None:
    server.answers = [
        refused(429, "The usage limit has been reached", type="usage_limit_reached",
                resets_in_seconds=7200)
    ]  # fmt: skip
    error = fails(api="responses", patience=60)
    assert isinstance(error, errors.ParkedError)
    assert isinstance(error.cause, errors.LimitError)
    assert error.cause.wait == 7200


# The price of the tier that was used.


@APIS
@pytest.mark.parametrize(("tier", "factor"), [("flex", 0.5), ("priority", 2.0)])
def test_cost_is_that_of_the_tier_that_answered(
    priced: Server, api: str, tier: str, factor: float
) -> None:
    priced.answers = [streamed(api, "hi"), streamed(api, "hi", service_tier=tier)]
    plain, other = (nbcodex.ask("Why?", api=api) for _ in range(2))
    assert plain.cost
    assert other.cost == pytest.approx(plain.cost * factor)


def estimate(server: Server, **options: Any) -> RequestEstimate:
    request = Request(prompt="Why?", model="gpt-5", max_output=1000, **options)
    return Budget(LoopClock()).estimate(request, model="gpt-5", base_url=server.url)


@pytest.mark.parametrize(("tier", "factor"), [("flex", 0.5), ("priority", 2.0)])
def test_estimate_has_the_price_of_the_requested_tier(
    priced: Server, tier: str, factor: float
) -> None:
    # Params count as input: these have as many characters.
    plain = estimate(priced, params={"service_t": "x" * (len(tier) + 3)}).cost
    assert plain
    assert estimate(priced, params={"service_tier": tier}).cost == pytest.approx(plain * factor)


# Schemas that a server refuses.


@APIS
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "Unknown name \"$defs\" at 'generation_config.response_schema': no such field."),
        (500, "response_format: {'type': 'json_schema'} is not supported: input should be 'text'"),
    ],
)
def test_refused_schema_is_told_in_words(
    server: Server, api: str, status: int, message: str
) -> None:
    server.answers = [refused(status, message), streamed(api, '{"name": "Lem"}')]
    reply = nbcodex.ask("Who?", api=api, schema=SCHEMA)
    assert (reply.parsed, reply.attempts) == ({"name": "Lem"}, 1)
    assert "JSON schema" in json.dumps(server.sent[1])
    assert not {"response_format", "text"} & server.sent[1].keys()


# LiteLLM.


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("requests", "Requests limit reached: limit 3"),
        ("tokens", "Tokens limit reached: limit 3"),
        ("max_parallel_requests", "Parallel requests limit reached: limit 3"),
    ],
)
def test_limit_of_a_litellm_key_is_named(server: Server, kind: str, named: str) -> None:
    message = (
        f"Rate limit exceeded for api_key: 88dc28. Limit type: {kind}. Current limit: 3, "
        "Remaining: 0. Limit resets at: 2099-01-01 00:00:00 UTC"
    )
    server.answers = [refused(429, message, type="None", param="None", code="429")]
    error = fails(api="chat", patience=0.1)
    assert isinstance(error, errors.ParkedError)
    assert named in error.message
    assert "'None'" not in error.message
    # A slot for another request is free at any moment; the other limits state when they reset.
    assert len(server.sent) == 1 or "parallel" in kind


@APIS
@pytest.mark.parametrize(
    "message",
    [
        "litellm.RateLimitError: You exceeded your current quota, please check your plan.",
        "No deployments available - crossed budget: Exceeded budget for provider openai: 5 >= 5",
    ],
)
def test_quota_behind_litellm_is_permanent(server: Server, api: str, message: str) -> None:
    server.answers = [refused(429, message, type="throttling_error", param="None", code="429")]
    assert isinstance(fails(api=api), errors.QuotaError)
    assert len(server.sent) == 1


@APIS
def test_invalid_model_name_of_litellm_advises_the_list_of_models(server: Server, api: str) -> None:
    message = "/chat/completions: Invalid model name passed in model=m. Call `/v1/models` to view."
    server.answers = [refused(400, message, type="None", param="None", code="400")]
    error = fails(api=api)
    assert isinstance(error, errors.ModelError)
    assert "%codex models" in error.advice
    assert len(server.sent) == 1


# A stream that ends empty where the server would have refused (llama-cpp-python).


@APIS
def test_after_two_empty_streams_the_reason_is_asked_for_without_streaming(
    server: Server, api: str
) -> None:
    message = "This model's maximum context length is 512 tokens, however you requested 900."
    server.answers = [Answer(b""), Answer(b""), refused(400, message)]
    assert isinstance(fails(api=api), errors.TooLargeError)
    assert [body.get("stream", False) for body in server.sent] == [True, True, False]


@APIS
def test_answers_are_streamed_again_after_empty_streams(server: Server, api: str) -> None:
    message = {"type": "message", "content": [{"type": "output_text", "text": "hi"}]}
    whole = {
        "responses": {"status": "completed", "output": [message]},
        "chat": {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]},
    }[api]
    in_one_piece = Answer(json.dumps(whole).encode(), 200, JSON)
    server.answers = [Answer(b""), Answer(b""), in_one_piece, streamed(api, "hi")]
    first, second = (nbcodex.ask("Why?", api=api) for _ in range(2))
    assert (first.text, first.attempts, first.notes) == ("hi", 3, ())
    assert (second.text, second.attempts) == ("hi", 1)
    assert [body.get("stream", False) for body in server.sent] == [True, True, False, True]


# Reasoning of an answer in one piece.


@APIS
def test_reasoning_of_an_answer_in_one_piece_is_shown(server: Server, api: str) -> None:
    reasoning = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
    message = {"type": "message", "content": [{"type": "output_text", "text": "hi"}]}
    body = {
        "responses": {"status": "completed", "output": [reasoning, message]},
        "chat": {
            "choices": [
                {"message": {"content": "hi", "reasoning_content": "Hm."}, "finish_reason": "stop"}
            ]
        },
    }[api]
    server.answers = [Answer(json.dumps(body).encode(), 200, JSON)]
    assert nbcodex.ask("Why?", api=api).text == "hi"
    shown = [each.text for each in server.events if isinstance(each, Delta) and each.reasoning]
    assert shown == ["Hm."]


# A server that demands the reasoning of earlier answers (vellum #30878).

NEEDED = "The `reasoning_content` in the thinking mode must be passed back to the API."


def thoughtful(text: str, thought: str) -> Answer:
    reasoning = event({"choices": [{"index": 0, "delta": {"reasoning_content": thought}}]})
    return Answer(reasoning + chunk(text) + chunk(finish="stop") + DONE)


def test_demanded_reasoning_is_sent_back_and_the_demand_remembered(server: Server) -> None:
    server.answers = [
        thoughtful("one", "Hm."),
        refused(400, NEEDED, type="invalid_request_error"),
        thoughtful("two", "Aha."),
    ]
    for _ in range(3):
        reply = nbcodex.ask("Go on.", api="chat", thread="talk")
    assert (reply.text, reply.notes) == ("two", ())
    messages = [body["messages"] for body in server.sent]
    assert "reasoning_content" not in json.dumps(messages[:2])
    assert messages[2][1] == {"role": "assistant", "content": "one", "reasoning_content": "Hm."}
    thoughts = [message.get("reasoning_content") for message in messages[3]]
    assert thoughts == [None, "Hm.", None, "Aha.", None]
    assert len(messages) == 4


UNSUPPORTED = "'messages.1': property 'reasoning_content' is unsupported"


@pytest.mark.parametrize("backends", ["D", "DR", "RD", "DDR", "RRD", "DDDRRR"])
def test_relay_with_backends_that_demand_and_refuse_reasoning_answers_every_prompt(
    server: Server, monkeypatch: pytest.MonkeyPatch, backends: str
) -> None:
    order = itertools.cycle(backends)  # D demands the reasoning of earlier turns, R refuses it

    def next_answer(body: bytes) -> Answer:
        server.sent.append(json.loads(body))
        earlier = server.sent[-1]["messages"][:-1]
        has_reasoning = "reasoning_content" in json.dumps(earlier)
        is_demanding = next(order) == "D"
        if earlier and has_reasoning != is_demanding:
            text = NEEDED if is_demanding else UNSUPPORTED
            return refused(400, text, type="invalid_request_error")
        return thoughtful("hi", "Hm.")

    monkeypatch.setattr(server, "next_answer", next_answer)
    replies = [nbcodex.ask("Go on.", api="chat", thread="talk") for _ in range(6)]
    assert [(reply.text, reply.attempts, reply.notes) for reply in replies] == [("hi", 1, ())] * 6


def test_demand_for_reasoning_is_explained_in_any_case(server: Server) -> None:
    demand = "Thinking blocks MUST BE passed back."
    server.answers = [streamed("chat", "one"), refused(400, demand, type="invalid_request_error")]
    nbcodex.ask("Go on.", api="chat", thread="talk")
    with pytest.raises(errors.RequestError) as caught:
        nbcodex.ask("Go on.", api="chat", thread="talk")
    assert "--new" in caught.value.advice


@APIS
def test_turns_without_the_demanded_reasoning_are_left_out_and_counted(
    server: Server, api: str
) -> None:
    server.answers = [
        streamed(api, "one"),
        refused(400, NEEDED, type="invalid_request_error"),
        streamed(api, "two"),
    ]
    for _ in range(2):
        reply = nbcodex.ask("Go on.", api=api, thread="talk")
    assert reply.text == "two"
    assert "one" not in json.dumps(server.sent[-1])
    [note] = reply.notes
    assert "earlier turns left out (1)" in note
    assert "--new" in note


@APIS
def test_demand_that_cannot_be_met_advises_a_new_conversation(server: Server, api: str) -> None:
    server.answers = [streamed(api, "one"), refused(400, NEEDED, type="invalid_request_error")]
    nbcodex.ask("Go on.", api=api, thread="talk")
    error = fails(api=api, thread="talk")
    assert isinstance(error, errors.RequestError)
    assert "--new" in error.advice


# Servers that refuse the reasoning of earlier turns: OpenAI and Azure (codex #8119), gateways with
# several accounts (QwenPaw #7296), and Anthropic behind LiteLLM.

THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
REASONED = completed(
    output=[THOUGHT, {"type": "message", "content": [{"type": "output_text", "text": "one"}]}]
)
INVALID = {"type": "invalid_request_error", "code": "invalid_encrypted_content"}
NOT_VERIFIED = "The encrypted content gAAA...c90= could not be verified."
REFUSALS_OF_REASONING = [
    (400, {"message": NOT_VERIFIED, **INVALID}),
    (400, {"message": NOT_VERIFIED, "code": None, "type": "invalid_request_error"}),
    (400, {"message": "Referenced reasoning item 'rs_1' was not found or has expired."}),
    (404, {"message": "Item with id 'rs_1' not found. Items are not persisted when `store` is set "
                      "to false.", "type": "invalid_request_error", "param": "input"}),
    (400, {"message": "Item 'rs_1' of type 'reasoning' was provided without its required following "
                      "item."}),
    (422, {"message": "input[1].type: 'reasoning' is not one of ['message']"}),
    (502, {"message": NOT_VERIFIED, "type": "upstream_error"}),
    (400, {"message": "messages.1.content.0: Invalid `signature` in `thinking` block"}),
]  # fmt: skip


def has_reasoning(body: dict[str, Any]) -> bool:
    return any(item.get("type") == "reasoning" for item in body["input"])


@pytest.mark.parametrize("api", ["auto", "responses"])
@pytest.mark.parametrize(("status", "error"), REFUSALS_OF_REASONING)
def test_refused_reasoning_of_earlier_turns_is_left_out_and_that_remembered(
    server: Server, api: str, status: int, error: dict[str, Any]
) -> None:
    refusal = Answer(json.dumps({"error": error}).encode(), status, JSON)
    server.answers = [Answer(REASONED), refusal, Answer(REASONED), Answer(REASONED)]
    replies = [nbcodex.ask("Go on.", api=api, thread="talk") for _ in range(3)]
    assert [(reply.text, reply.attempts, reply.notes) for reply in replies] == [("one", 1, ())] * 3
    assert [has_reasoning(body) for body in server.sent[1:]] == [True, False, False]
    turns = server.sent[-1]["input"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant", "user"]


@pytest.mark.parametrize("form", ["error event", "failed response", "JSON"])
@pytest.mark.parametrize("error", [error for _, error in REFUSALS_OF_REASONING])
def test_reasoning_refused_after_the_headers_is_left_out(
    server: Server, form: str, error: dict[str, Any]
) -> None:
    response = {"id": "r", "status": "failed", "output": [], "error": error}
    refusal = {
        "error event": Answer(event({"type": "error", "error": error})),
        "failed response": Answer(event({"type": "response.failed", "response": response})),
        "JSON": Answer(json.dumps({"error": error}).encode(), headers=JSON),
    }[form]
    server.answers = [Answer(REASONED), refusal, Answer(REASONED), Answer(REASONED)]
    replies = [nbcodex.ask("Go on.", api="responses", thread="talk") for _ in range(3)]
    assert [(reply.text, reply.attempts) for reply in replies] == [
        ("one", 1),
        ("one", 2),
        ("one", 1),
    ]
    assert [has_reasoning(body) for body in server.sent[1:]] == [True, False, False]


def test_reasoning_refused_for_ever_is_one_error(server: Server) -> None:
    refusal = refused(400, NOT_VERIFIED, **INVALID)
    server.answers = [Answer(REASONED), refusal]
    nbcodex.ask("Go on.", api="responses", thread="talk")
    error = fails(api="responses", thread="talk")
    assert isinstance(error, errors.RequestError)
    assert NOT_VERIFIED in error.message
    assert len(server.sent) == 3


def test_other_refusal_keeps_the_reasoning_of_earlier_turns(server: Server) -> None:
    server.answers = [
        Answer(REASONED),
        refused(400, "Unsupported value: 'reasoning.effort' does not support 'xhigh'."),
        Answer(REASONED),
    ]
    nbcodex.ask("Go on.", api="responses", thread="talk")
    fails(api="responses", thread="talk")
    nbcodex.ask("Go on.", api="responses", thread="talk")
    assert [has_reasoning(body) for body in server.sent[1:]] == [True, True]


# Paid tools.

SEARCHES = [
    {"type": "web_search_call", "action": {"type": "search", "query": "sky"}},
    {"type": "web_search_call", "action": {"type": "open_page", "url": "https://example.org"}},
    {"type": "web_search_call", "action": {"type": "search", "query": "sea"}},
]
MESSAGE = {"type": "message", "content": [{"type": "output_text", "text": "hi"}]}


def cost_of_tokens(server: Server) -> float:
    cost = pricing.cost(Usage(input_tokens=1000, output_tokens=1000), "gpt-5", server.url)
    assert cost
    return cost


@pytest.mark.parametrize(
    ("output", "more", "calls"),
    [
        (SEARCHES, {}, 0.02),
        (SEARCHES, {"tool_usage": {"web_search": {"num_requests": 1}}}, 0.01),
        ([{"type": "file_search_call"}], {}, 0.0025),
        ([], {}, 0.0),
    ],
    ids=["searches in the output", "searches that the server counts", "file search", "none"],
)
def test_calls_of_tools_with_a_price_are_in_the_cost(
    priced: Server, output: list[Any], more: dict[str, Any], calls: float
) -> None:
    priced.answers = [streamed("responses", "hi", output=[*output, MESSAGE], **more)]
    reply = nbcodex.ask("Why?", api="responses", params={"tools": [{"type": "web_search"}]})
    assert reply.cost == pytest.approx(cost_of_tokens(priced) + calls)
    assert reply.unpriced_tools == ()
    assert "at least" not in figures_line(reply)


@pytest.mark.parametrize("tool", ["code_interpreter", "image_generation"])
def test_calls_of_tools_without_a_price_make_the_cost_a_lower_bound(
    priced: Server, tool: str
) -> None:
    output = [{"type": f"{tool}_call"}, *SEARCHES, MESSAGE]
    priced.answers = [streamed("responses", "hi", output=output)]
    reply = nbcodex.ask("Why?", api="responses", params={"tools": [{"type": tool}]})
    assert reply.cost == pytest.approx(cost_of_tokens(priced) + 0.02)
    assert reply.unpriced_tools == (tool,)
    assert f"at least ${reply.cost:.3f}" in figures_line(reply)
    assert f"without {tool}" in figures_line(reply)
    assert f" · at least ${reply.cost:.3f}" in totals_line(UsageTotals.of(reply))
    assert "unknown" not in totals_line(UsageTotals.of(reply))


@APIS
def test_picture_whose_call_is_not_listed_makes_the_cost_a_lower_bound(
    priced: Server, api: str
) -> None:
    encoded = base64.b64encode(PNG).decode()
    if api == "chat":
        url = {"url": f"data:image/png;base64,{encoded}"}
        image = event({"choices": [{"delta": {"images": [{"image_url": url}]}}]})
    else:
        item = {"type": "image_generation_call", "result": encoded}
        image = event({"type": "response.output_item.done", "item": item})
    rest = streamed(api, "hi", output=[MESSAGE])
    priced.answers = [Answer(image + rest.body)]
    reply = nbcodex.ask("Draw.", api=api)
    assert [each.data for each in reply.images] == [PNG]
    assert reply.unpriced_tools == ("image_generation",)
    assert "at least $" in figures_line(reply)


@pytest.mark.parametrize(
    ("model", "params"),
    [("gpt-5", {"web_search_options": {}}), ("gpt-4o-search-preview", {})],
)
def test_search_of_chat_completions_is_in_the_cost_or_makes_it_a_lower_bound(
    priced: Server, model: str, params: dict[str, Any]
) -> None:
    priced.answers = [streamed("chat", "hi", model=model)]
    reply = nbcodex.ask("Why?", api="chat", model=model, params=params)
    tokens = pricing.cost(Usage(input_tokens=1000, output_tokens=1000), model, priced.url)
    assert tokens
    is_priced = model == "gpt-5"
    assert reply.cost == pytest.approx(tokens + 0.01 * is_priced)
    assert reply.unpriced_tools == (() if is_priced else ("web_search",))


def test_cost_of_tools_in_an_attempt_that_broke_off_is_a_lower_bound(priced: Server) -> None:
    priced.answers = [Answer(delta("Be")), streamed("responses", "hi", output=[MESSAGE])]
    reply = nbcodex.ask("Why?", api="responses", params={"tools": [{"type": "web_search"}]})
    assert reply.attempts == 2
    assert reply.unpriced_tools == ("web_search",)


@APIS
def test_providers_own_cost_includes_its_tools(server: Server, api: str) -> None:
    server.answers = [streamed(api, "hi", usage={**USAGE[api], "cost": 0.05})]
    params = {"tools": [{"type": "web_search"}]} if api == "responses" else {}
    reply = nbcodex.ask("Why?", api=api, params=params)
    assert (reply.cost, reply.unpriced_tools) == (0.05, ())


@pytest.mark.parametrize(
    ("tool", "calls"),
    [("web_search_preview", 0.01), ("file_search", 0.0025), ("computer_use_preview", 0.0)],
)
def test_estimate_reserves_one_call_of_each_tool_with_a_price(
    priced: Server, tool: str, calls: float
) -> None:
    plain = estimate(priced, params={"tools": [{"typ": f"{tool} "}]})
    expected = estimate(priced, params={"tools": [{"type": tool}]})
    assert plain.cost
    assert expected.cost == pytest.approx(plain.cost + calls)
    assert "about" in str(plain)
    assert "at least" in str(expected)


def test_computer_call_is_no_answer(server: Server) -> None:
    action = {"type": "computer_call", "action": {"type": "screenshot"}}
    server.answers = [streamed("responses", "", output=[action])]
    error = fails(api="responses", params={"tools": [{"type": "computer"}]})
    assert isinstance(error, errors.AnswerError)
    assert "computer" in error.message


@pytest.mark.parametrize("in_one_piece", [False, True])
def test_gateway_that_answers_each_path_with_chat_is_asked_for_it(
    server: Server, in_one_piece: bool
) -> None:
    answer = Answer(chunk("Hi", object="chat.completion.chunk") + chunk(finish="stop") + DONE)
    if in_one_piece:
        message = {"message": {"content": "Hi"}, "finish_reason": "stop"}
        body = {"object": "chat.completion", "choices": [message]}
        answer = Answer(json.dumps(body).encode(), headers=JSON)
    server.answers = [answer]
    assert nbcodex.ask("Why?").text == "Hi"
    assert ["input" in body for body in server.sent] == [True, False]


def test_failure_that_mentions_chat_completions_does_not_change_the_api(server: Server) -> None:
    error = {"message": "The chat.completion cannot be made.", "code": "server_error"}
    failure = event({"type": "response.failed", "response": {"error": error}})
    server.answers = [Answer(failure), streamed("responses", "Hi")]
    assert nbcodex.ask("Why?").text == "Hi"
    assert ["input" in body for body in server.sent] == [True, True]
