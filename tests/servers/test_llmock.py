"""Cells against llmock: its faults and limits are survived, and it finds nothing to object to."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pytest

from tests.kernel_client import CellResult, Kernel
from tests.servers.conftest import Connect
from tests.servers.mock import ANSWER, TOKENS_PER_MINUTE, Mock

pytestmark = [pytest.mark.server, pytest.mark.kernel]

APIS = pytest.mark.parametrize("api", ["responses", "chat"])

# Idle timeout; before the first text, five times as much silence is allowed. llmock sends an event
# every 10 ms: on a busy machine the pauses are longer, and must not be taken for silence.
IDLE_TIMEOUT_S = 1.0

BREAKS: dict[str, dict[str, Any]] = {
    "connection dropped": {"kind": "disconnect"},
    "clean end too early": {"kind": "truncate"},
    "broken JSON": {"kind": "malformed"},
    # So long that a slow client, too, meets its own timeout first.
    "silence": {"kind": "stall", "stall_seconds": 60},
}
REFUSALS: dict[str, dict[str, Any]] = {
    "429 with Retry-After": {"status": 429, "retry_after": 1.1},
    "503 with Retry-After": {"status": 503, "retry_after": 0.5},
}
# Events before a stream breaks; the first four of the Responses API contain no text.
BEFORE_TEXT, AFTER_TEXT = 0, 7


@pytest.fixture
def server(llmock_process: Mock) -> Mock:
    """An llmock without the requests and faults of other tests."""
    llmock_process.reset()
    return llmock_process


@pytest.fixture
def cell(connect: Connect, server: Mock) -> Kernel:
    """A kernel that uses the server."""
    return connect(server.environ)


def ask(kernel: Kernel, api: str) -> CellResult:
    return kernel.run(f"%%codex --api {api} -o reply\nSay twenty words.")


def check_answer(kernel: Kernel, ran: CellResult, *, attempts: int) -> float:
    """Check that the whole answer is shown once; return the seconds waited."""
    assert ran.status == "ok", ran.shown_error
    assert ANSWER in ran.markdown
    assert ran.markdown.count("word0") == 1
    figures = kernel.run("bool(reply), reply.text, reply.attempts, reply.waited").plain
    finished, text, tries, waited = ast.literal_eval(figures)
    assert (finished, text, tries) == (True, ANSWER, attempts)
    return float(waited)


@APIS
@pytest.mark.parametrize("after", [BEFORE_TEXT, AFTER_TEXT], ids=["before text", "after text"])
@pytest.mark.parametrize("fault", BREAKS)
def test_broken_stream_is_retried_and_the_answer_shown_once(
    cell: Kernel, server: Mock, fault: str, after: int, api: str
) -> None:
    if fault == "silence":
        cell.run(f"%config Codex.idle_timeout = '{IDLE_TIMEOUT_S}s'")
    server.script({"type": "stream_fault", "after_chunks": after, **BREAKS[fault]})
    check_answer(cell, ask(cell, api), attempts=2)
    first, second = server.requests()
    assert first["fault"] == f"stream:{BREAKS[fault]['kind']}@{after}"
    assert first["body"] == second["body"]
    assert server.findings() == []


@APIS
@pytest.mark.parametrize("refusal", REFUSALS)
def test_refused_request_is_sent_again_after_retry_after(
    cell: Kernel, server: Mock, refusal: str, api: str
) -> None:
    server.script({"type": "fail", **REFUSALS[refusal]})
    waited = check_answer(cell, ask(cell, api), attempts=2)
    assert waited >= REFUSALS[refusal]["retry_after"]
    assert server.findings() == []


@APIS
def test_slow_first_token_does_not_cause_a_retry(cell: Kernel, server: Mock, api: str) -> None:
    cell.run(f"%config Codex.idle_timeout = '{IDLE_TIMEOUT_S}s'")
    server.script({"type": "slow_first_token", "seconds": 2 * IDLE_TIMEOUT_S})
    check_answer(cell, ask(cell, api), attempts=1)
    assert server.findings() == []


LIMITS: dict[str, tuple[Callable[[Mock], None], str]] = {
    "requests": (Mock.use_up_requests, ""),
    "tokens": (lambda mock: mock.use_up_tokens(but=3_000), "--max-output 4500"),
}


@APIS
@pytest.mark.parametrize("limit", LIMITS)
def test_exhausted_limit_shows_a_wait_and_then_the_answer(
    cell: Kernel, server: Mock, limit: str, api: str
) -> None:
    use_up, options = LIMITS[limit]
    use_up(server)
    run_id = cell.start(f"%%codex --api {api} -o reply {options}\nSay twenty words.")
    cell.wait_for(run_id, "waiting")
    waited = check_answer(cell, cell.finish(run_id), attempts=2)
    assert waited > 0.0
    refused, _ = server.requests()
    assert refused["fault"] == f"ratelimit:{limit}"
    assert server.findings() == []


@APIS
def test_rejected_request_ends_in_a_short_error_after_one_attempt(
    cell: Kernel, server: Mock, api: str
) -> None:
    server.script({"type": "fail", "status": 400, "code": "context_length_exceeded"})
    ran = ask(cell, api)
    assert ran.status == "error"
    assert ran.shown_error[0].startswith("Too large")
    assert len(ran.shown_error) <= 6
    assert len(server.requests()) == 1
    assert server.findings() == []


def test_limits_command_shows_the_limits_of_the_headers(cell: Kernel, server: Mock) -> None:
    ask(cell, "responses")
    ran = cell.run("%codex limits")
    shown = ran.stream + ran.plain + ran.markdown
    assert f"{TOKENS_PER_MINUTE:,}" in shown
