"""Requests through nginx: its HTML pages, limits and timeouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbcodex.simulator import Fault
from tests.kernel_client import CellResult, Kernel
from tests.servers.conftest import Connect
from tests.servers.gateway import gateway
from tests.servers.processes import free_port
from tests.simulated import KEY, Simulated

pytestmark = [pytest.mark.server, pytest.mark.kernel]

ANSWER = "one two three four five six"
PROMPT = f"[[echo: {ANSWER}]]"

STREAMING = "proxy_buffering off; proxy_http_version 1.1; proxy_set_header Connection '';"
BUFFERED = ""
SHORT_TIMEOUT = "proxy_read_timeout 2s;"  # long enough for a busy machine to answer in


def ask(kernel: Kernel, options: str = "") -> CellResult:
    return kernel.run(f"%%codex --api responses -o reply {options}\n{PROMPT}")


def check_answer(kernel: Kernel, ran: CellResult, *, attempts: int | range) -> None:
    """Check that the whole answer is shown once."""
    assert ran.status == "ok", ran.shown_error
    assert ran.markdown.count(ANSWER) == 1
    assert kernel.run("bool(reply), reply.text").plain == repr((True, ANSWER))
    allowed = attempts if isinstance(attempts, range) else [attempts]
    assert int(kernel.run("reply.attempts").plain) in allowed


def check_error(ran: CellResult, title: str) -> None:
    """Check that the cell ends in a short error without HTML of the gateway."""
    assert ran.status == "error"
    assert ran.shown_error[0].startswith(title)
    assert len(ran.shown_error) <= 6
    assert "<" not in "".join(ran.shown_error)


@pytest.mark.parametrize("status", [429, 503])
def test_gateway_limit_in_html_is_retried(
    connect: Connect, simulator: Simulated, tmp_path: Path, status: int
) -> None:
    # A request every five seconds: the second cell runs earlier, on a busy machine too.
    limit = f"limit_req zone=all; limit_req_status {status};"
    with gateway(tmp_path, upstream=simulator.url, directives=limit, rate="12r/m") as url:
        cell = connect({**simulator.environ, "OPENAI_BASE_URL": f"{url}/v1"})
        check_answer(cell, ask(cell), attempts=1)
        check_answer(cell, ask(cell), attempts=range(2, 9))
    assert "limiting requests" in (tmp_path / "error.log").read_text()
    assert len(simulator.prompts) == 2


@pytest.mark.parametrize(
    ("fault", "passing"),
    [
        (Fault("stalled", after=3), STREAMING),
        (Fault("stalled", after=3), BUFFERED),
        (Fault("slow", seconds=60), BUFFERED),
    ],
    ids=["in mid-stream", "with buffered text", "504 before the stream"],
)
def test_gateway_timeout_costs_an_attempt_but_not_the_answer(
    connect: Connect, simulator: Simulated, tmp_path: Path, fault: Fault, passing: str
) -> None:
    with gateway(tmp_path, upstream=simulator.url, directives=passing + SHORT_TIMEOUT) as url:
        cell = connect({**simulator.environ, "OPENAI_BASE_URL": f"{url}/v1"})
        simulator.core.script([fault])
        check_answer(cell, ask(cell), attempts=2)
    assert "upstream timed out" in (tmp_path / "error.log").read_text()
    assert len(set(simulator.prompts)) == 1


@pytest.mark.parametrize(
    ("refusal", "title"),
    [
        ("client_max_body_size 10;", "Too large"),
        ("return 401;", "Not allowed"),
        ("return 301 https://example.org/;", "Request rejected"),
    ],
    ids=["413", "401", "301"],
)
def test_final_refusal_of_a_gateway_ends_in_a_short_error(
    connect: Connect, simulator: Simulated, tmp_path: Path, refusal: str, title: str
) -> None:
    with gateway(tmp_path, upstream=simulator.url, directives=refusal) as url:
        cell = connect({**simulator.environ, "OPENAI_BASE_URL": f"{url}/v1"})
        check_error(ask(cell), title)
        assert cell.run("reply.status, reply.attempts").plain == "('failed', 1)"
    assert simulator.prompts == []


def test_lasting_502_parks_the_request_within_its_patience(
    connect: Connect, tmp_path: Path
) -> None:
    with gateway(tmp_path, upstream=f"http://127.0.0.1:{free_port()}") as url:
        environ = {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": KEY}
        cell = connect({**environ, "NBCODEX_MODEL": "gpt-5.6-sol"})
        ran = ask(cell, "--patience 6s")
        check_error(ran, "Parked")
        assert "502" in ran.shown_error[0]
        # It waits for about one and two seconds; the third wait would be four.
        outcome = "reply.status, reply.attempts in (2, 3), reply.waited <= 6"
        assert cell.run(outcome).plain == "('parked', True, True)"
