"""Only an answer that the model ended counts: as true, as a turn, and for `reuse`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

import nbcodex
from nbcodex import client
from nbcodex.client import Client
from nbcodex.runtime import event_loop
from tests.openai_api.scripted import (
    DONE,
    KEY,
    MODEL,
    Script,
    Server,
    chunk,
    completed,
    delta,
    event,
)

pytestmark = pytest.mark.slow

PIECES = st.lists(st.sampled_from(["a", "b c", "\n", " ", "é", "```"]), max_size=4)
UNKNOWN_ENDINGS = st.sampled_from(["weird", "paused", "unknown", "IN_PROGRESS"])
FAILED_ENDINGS = st.sampled_from(["error", "abort", "network_error", "timeout"])
FILTERS = st.sampled_from(["content_filter", "SAFETY", "recitation"])
NORMAL_ENDINGS = st.sampled_from(["stop", "STOP", "eos", "end_turn"])


@dataclass(frozen=True)
class Case:
    """The body of a response with HTTP 200, and the answer that it is; None if it is none."""

    api: str
    parts: tuple[bytes, ...]
    text: str | None


def success(text: str) -> str | None:
    return text if text.strip() else None


def tool_call() -> bytes:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    return event({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]})


@st.composite
def chat_cases(draw: st.DrawFn) -> Case:
    pieces = draw(PIECES)
    text, parts = "".join(pieces), [chunk(piece) for piece in pieces]
    match draw(st.sampled_from(["whole", "cut", "one piece", *BROKEN_CHAT])):
        case "whole":
            return Case("chat", (*parts, chunk(finish=draw(NORMAL_ENDINGS)), DONE), success(text))
        case "cut":
            return Case("chat", (*parts, chunk(finish="length"), DONE), success(text))
        case "one piece":
            choice = {"message": {"content": text}, "finish_reason": draw(NORMAL_ENDINGS)}
            return Case("chat", (json.dumps({"choices": [choice]}).encode(),), success(text))
        case kind:
            return Case("chat", (*parts, *draw(BROKEN_CHAT[kind])), None)


BROKEN_CHAT: dict[str, st.SearchStrategy[tuple[bytes, ...]]] = {
    "unknown ending": UNKNOWN_ENDINGS.map(lambda end: (chunk(finish=end), DONE)),
    "failed ending": FAILED_ENDINGS.map(lambda end: (chunk(finish=end), DONE)),
    "filter": FILTERS.map(lambda end: (chunk(finish=end), DONE)),
    "no ending": st.sampled_from([(), (DONE,)]),
    "error": st.sampled_from(["error", ""]).map(
        lambda name: (event({"error": {"message": "failed"}}, name), DONE)
    ),
    "tool call": st.just((tool_call(), chunk(finish="tool_calls"), DONE)),
    "half an event": st.just((chunk(finish="stop")[:-20],)),
}


def responses_text(text: str) -> list[dict[str, Any]]:
    return [{"type": "message", "content": [{"type": "output_text", "text": text}]}]


def incomplete(reason: str) -> bytes:
    response = {"status": "incomplete", "incomplete_details": {"reason": reason}}
    return event({"type": "response.incomplete", "response": response})


@st.composite
def responses_cases(draw: st.DrawFn) -> Case:
    pieces = draw(PIECES)
    text, parts = "".join(pieces), [delta(piece) for piece in pieces]
    match draw(st.sampled_from(["whole", "cut", "one piece", *BROKEN_RESPONSES])):
        case "whole":
            ending = completed(output=responses_text(text)) if draw(st.booleans()) else completed()
            return Case("responses", (*parts, ending), success(text))
        case "cut":
            return Case("responses", (*parts, incomplete("max_output_tokens")), success(text))
        case "one piece":
            body = {"status": "completed", "output": responses_text(text)}
            return Case("responses", (json.dumps(body).encode(),), success(text))
        case kind:
            return Case("responses", (*parts, *draw(BROKEN_RESPONSES[kind])), None)


BROKEN_RESPONSES: dict[str, st.SearchStrategy[tuple[bytes, ...]]] = {
    "unknown ending": UNKNOWN_ENDINGS.map(lambda end: (incomplete(end),)),
    "failed ending": st.sampled_from(["failed", "cancelled"]).map(
        lambda status: (event({"type": "response.completed", "response": {"status": status}}),)
    ),
    "filter": FILTERS.map(lambda end: (incomplete(end),)),
    "no ending": st.sampled_from([(), (DONE,)]),
    "error": st.sampled_from(["response.failed", "error"]).map(
        lambda kind: (event({"type": kind, "response": {"error": {"message": "failed"}}}),)
    ),
    "tool call": st.just(
        (completed(output=[{"type": "function_call", "name": "f", "arguments": "{}"}]),)
    ),
    "half an event": st.just((completed()[:-20],)),
}


NEXT = {"chat": chunk("next", finish="stop"), "responses": delta("next") + completed()}


class Replay(Server):
    """Answers each request with the parts that are set, and keeps what it was sent."""

    parts: tuple[bytes, ...] = ()

    def __init__(self) -> None:
        super().__init__(lambda _: self.response())

    def response(self) -> Script:
        kind = (
            "application/json"
            if self.parts[:1] and self.parts[0][:1] == b"{"
            else "text/event-stream"
        )
        return Script(self.parts, 200, {"content-type": kind})


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replay]:
    """A client of this process that reaches a server which replays."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "https://gateway.example/v1")
    monkeypatch.setenv("NBCODEX_MODEL", MODEL)
    server = Replay()
    made = Client(transport=server)
    monkeypatch.setattr(client, "_current", made)
    yield server
    made.close()
    event_loop.shared().submit(made.services().api_client.close()).result()


NUMBER = itertools.count()


@effort(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chat_cases() | responses_cases())
def test_only_an_answer_that_the_model_ended_counts(replay: Replay, case: Case) -> None:
    number = next(NUMBER)
    prompt = f"question {number}"

    def ask(prompt: str, **options: Any) -> Any:
        """Return the reply, or the error."""
        try:
            return nbcodex.ask(prompt, api=case.api, patience=0, **options)  # type: ignore[arg-type]
        except nbcodex.NbcodexError as error:
            return error

    replay.parts = case.parts
    outcome = ask(prompt, thread=f"t{number}")
    if case.text is None:
        assert isinstance(outcome, nbcodex.NbcodexError)
        assert not getattr(outcome, "reply", None)
    else:
        assert outcome
        # Blanks before an answer may have stood before its reasoning.
        assert outcome.text.lstrip() == case.text.lstrip()

    replay.parts = (NEXT[case.api],)
    known = len(replay.requests)
    assert ask(f"{prompt}, continued", thread=f"t{number}").text == "next"
    body = replay.sent[known]
    messages = body.get("messages") or body["input"]
    turns = 0 if isinstance(messages, str) else len(messages) - 1
    assert turns == (0 if case.text is None else 2)

    replay.parts = case.parts
    ask(f"{prompt}, alone")
    replay.parts = (NEXT[case.api],)
    again = ask(f"{prompt}, alone", reuse=True)
    assert again.reused is (case.text is not None)
