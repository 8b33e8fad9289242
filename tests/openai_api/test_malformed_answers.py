"""Any response, however malformed, is an answer or one of our errors with a valid wait."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from nbcodex.errors import MAX_MESSAGE_CHARS, NbcodexError
from nbcodex.openai_api.answers import CompletedAnswer
from nbcodex.openai_api.rate_limits import MAX_WAIT_S
from tests.openai_api.scripted import Script, Server, chunk, completed, delta, play, settings

WORDS = [
    "type", "error", "code", "message", "delta", "response", "output", "content", "text", "usage",
    "choices", "index", "finish_reason", "model", "id", "status", "refusal", "incomplete_details",
    "reasoning", "input_tokens", "input_tokens_details", "prompt_tokens", "event",
]  # fmt: skip
TYPES = [
    "response.output_text.delta", "response.completed", "response.failed", "response.incomplete",
    "error", "response.output_text.done", "response.created", "stop", "length", "message",
]  # fmt: skip
KIND = st.sampled_from(TYPES)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | KIND,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=15,
)  # fmt: skip
EVENT = st.builds(
    lambda kind, more: b"data: " + json.dumps({**more, "type": kind}).encode() + b"\n\n",
    st.sampled_from(TYPES),
    st.dictionaries(st.sampled_from(WORDS), VALUE, max_size=5),
)
GOOD = st.sampled_from(
    [delta("a"), chunk("a"), chunk("b", finish="stop"), completed(), b"data: [DONE]\n\n"]
)
PART = (
    GOOD
    | EVENT
    | st.binary(max_size=30)
    | st.sampled_from([b"\r", b"\n", b"data: ", b"{", b"\xff"])
)
HEADERS = st.dictionaries(
    st.sampled_from(["retry-after", "retry-after-ms", "date", "content-type", "location"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
)


@pytest.mark.slow
@effort(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from([200, 200, 200, 204, 302, 400, 404, 429, 500]),
    HEADERS,
    st.lists(PART, max_size=6),
    st.sampled_from(["responses", "chat", "auto"]),
)
@example(200, {}, [b"data: " + b"[" * 100_000 + b"\n\n"], "chat")
@example(429, {"retry-after": "1e999"}, [b"{" * 100_000], "responses")
def test_any_response_is_an_answer_or_one_of_our_errors(
    status: int, headers: dict[str, str], parts: list[bytes], api: str
) -> None:
    outcome: Any
    try:
        outcome = play(Server(Script(parts, status, headers)), chosen=settings(api=api))[-1]
    except NbcodexError as error:
        outcome = error
    if isinstance(outcome, CompletedAnswer):
        outcome.text.encode()
        return
    wait = getattr(outcome, "wait", None)
    assert wait is None or 0 <= wait <= MAX_WAIT_S
    assert len(outcome.message) <= MAX_MESSAGE_CHARS
    assert outcome.message.isprintable()


BIG = b"x" * 10_000_000


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, BIG),
        (200, b"data: " + BIG + b"\n\n"),
        (200, b"data: {\"type\": \"error\", \"message\": \"try again in 1" + BIG + b"\"}\n\n"),
        (200, b"data: {\"type\": \"response.output_text.delta\", \"delta\": \"" + BIG + b"\"}\n\n"),
        (200, b": " * 5_000_000),
        (200, b"\n" * 10_000_000),
        (200, b"{\"a\": \"" + BIG + b"\"}"),
        (200, b"<" + BIG),
        (429, b"{\"error\": \"" + BIG + b"\"}"),
    ],
    ids=range(9),
)  # fmt: skip
def test_large_malformed_body_takes_linear_time(status: int, body: bytes) -> None:
    parts = [body[i : i + 65_536] for i in range(0, len(body), 65_536)]
    before = time.process_time()
    with pytest.raises(NbcodexError):
        play(Server(Script(parts, status)), chosen=settings(max_answer=10**8))
    assert time.process_time() - before < 10.0
