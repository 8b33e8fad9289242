"""llmock breaks what it can; the cell gets its answer, and llmock has nothing against us."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pytest

from tests.kernel_client import Kernel, Ran
from tests.servers.conftest import Connect
from tests.servers.mock import ANSWER, TOKENS_PER_MINUTE, Mock

pytestmark = [pytest.mark.server, pytest.mark.kernel]

APIS = pytest.mark.parametrize("api", ["responses", "chat"])

IDLE = 0.3
"""Seconds of silence that break a stream here; before its first word five times as many."""

BREAKS: dict[str, dict[str, Any]] = {
    "connection dropped": {"kind": "disconnect"},
    "clean end too early": {"kind": "truncate"},
    "broken JSON": {"kind": "malformed"},
    "silence": {"kind": "stall", "stall_seconds": 5 * IDLE + 0.5},
}
REFUSALS: dict[str, dict[str, Any]] = {
    "429 with Retry-After": {"status": 429, "retry_after": 1.1},
    "503 with Retry-After": {"status": 503, "retry_after": 0.5},
}
BEFORE_TEXT, AFTER_TEXT = 0, 7
"""Events that come before a stream breaks; the first four of the Responses API hold no text."""


@pytest.fixture
def server(llmock_process: Mock) -> Mock:
    """An llmock that remembers no other test."""
    llmock_process.reset()
    return llmock_process


@pytest.fixture
def cell(connect: Connect, server: Mock) -> Kernel:
    """A kernel that asks it."""
    return connect(server.environ)


def ask(kernel: Kernel, api: str) -> Ran:
    return kernel.run(f"%%codex --api {api} -o reply\nSay twenty words.")


def check_answer(kernel: Kernel, ran: Ran, *, attempts: int) -> float:
    """Check that the answer is whole, and there once; return how many seconds it was waited for."""
    assert ran.status == "ok", ran.shown_error
    assert ANSWER in ran.markdown
    assert ran.markdown.count("word0") == 1
    told = kernel.run("bool(reply), reply.text, reply.attempts, reply.waited").plain
    finished, text, tries, waited = ast.literal_eval(told)
    assert (finished, text, tries) == (True, ANSWER, attempts)
    return float(waited)


@APIS
@pytest.mark.parametrize("after", [BEFORE_TEXT, AFTER_TEXT], ids=["before text", "after text"])
@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_stream_is_asked_for_again(
    cell: Kernel, server: Mock, fault: str, after: int, api: str
) -> None:
    """However a stream breaks, the whole answer stands in the cell, once."""
    if fault == "silence":
        cell.run(f"%config Codex.idle_timeout = '{IDLE}s'")
    server.script({"type": "stream_fault", "after_chunks": after, **BREAKS[fault]})
    check_answer(cell, ask(cell, api), attempts=2)
    first, second = server.requests()
    assert first["fault"] == f"stream:{BREAKS[fault]['kind']}@{after}"
    assert first["body"] == second["body"]
    assert server.findings() == []


@APIS
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_waited_out(cell: Kernel, server: Mock, refusal: str, api: str) -> None:
    """After a refusal the request goes again, not before the server wants it to."""
    server.script({"type": "fail", **REFUSALS[refusal]})
    waited = check_answer(cell, ask(cell, api), attempts=2)
    assert waited >= REFUSALS[refusal]["retry_after"]
    assert server.findings() == []


@APIS
def test_a_slow_first_token_is_no_fault(cell: Kernel, server: Mock, api: str) -> None:
    """A model that thinks longer than a stream may be silent is not asked twice."""
    cell.run(f"%config Codex.idle_timeout = '{IDLE}s'")
    server.script({"type": "slow_first_token", "seconds": 2 * IDLE})
    check_answer(cell, ask(cell, api), attempts=1)
    assert server.findings() == []


LIMITS: dict[str, tuple[Callable[[Mock], None], str]] = {
    "requests": (Mock.use_up_requests, ""),
    "tokens": (lambda mock: mock.use_up_tokens(but=3_000), "--max-output 4500"),
}


@APIS
@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_is_met_and_survived(cell: Kernel, server: Mock, limit: str, api: str) -> None:
    """Where others have used up a minute's share, the cell waits for its turn, and says so."""
    use_up, options = LIMITS[limit]
    use_up(server)
    asked = cell.start(f"%%codex --api {api} -o reply {options}\nSay twenty words.")
    cell.wait_for(asked, "waiting")
    waited = check_answer(cell, cell.finish(asked), attempts=2)
    assert 0.0 < waited < 4.0
    refused, _ = server.requests()
    assert refused["fault"] == f"ratelimit:{limit}"
    assert server.findings() == []


@APIS
def test_what_cannot_succeed_is_not_asked_again(cell: Kernel, server: Mock, api: str) -> None:
    """A rejected request ends in a short error after one attempt."""
    server.script({"type": "fail", "status": 400, "code": "context_length_exceeded"})
    ran = ask(cell, api)
    assert ran.status == "error"
    assert ran.shown_error[0].startswith("Too large")
    assert len(ran.shown_error) <= 6
    assert len(server.requests()) == 1
    assert server.findings() == []


def test_its_limits_are_known(cell: Kernel, server: Mock) -> None:
    """What its headers tell of the limits is what `%codex limits` shows."""
    ask(cell, "responses")
    ran = cell.run("%codex limits")
    shown = ran.stream + ran.plain + ran.markdown
    assert f"{TOKENS_PER_MINUTE:,}" in shown
