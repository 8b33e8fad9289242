"""nginx stands between: its HTML pages, its limits and its timeouts are survived, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbcodex.simulator import Fault
from tests.kernel_client import Kernel, Ran
from tests.servers.conftest import Connect
from tests.servers.gateway import gateway
from tests.servers.processes import free_port
from tests.simulated import KEY, Simulated

pytestmark = [pytest.mark.server, pytest.mark.kernel]

ANSWER = "one two three four five six"
PROMPT = f"[[echo: {ANSWER}]]"

STREAMING = "proxy_buffering off; proxy_http_version 1.1; proxy_set_header Connection '';"
AS_IT_COMES = ""
CUTS = "proxy_read_timeout 300ms;"


def ask(kernel: Kernel, options: str = "") -> Ran:
    return kernel.run(f"%%codex --api responses -o reply {options}\n{PROMPT}")


def check_answer(kernel: Kernel, ran: Ran, *, attempts: int) -> None:
    """Check that the answer is whole, and there once."""
    assert ran.status == "ok", ran.shown_error
    assert ran.markdown.count(ANSWER) == 1
    told = kernel.run("bool(reply), reply.text, reply.attempts").plain
    assert told == repr((True, ANSWER, attempts))


def check_error(ran: Ran, title: str) -> None:
    """Check that a short error ends the cell, without a tag of the gateway's page."""
    assert ran.status == "error"
    assert ran.shown_error[0].startswith(title)
    assert len(ran.shown_error) <= 6
    assert "<" not in "".join(ran.shown_error)


@pytest.mark.parametrize("status", [429, 503])
def test_its_limit_is_waited_out(
    connect: Connect, simulator: Simulated, tmp_path: Path, status: int
) -> None:
    """A refusal in HTML, without a word about when to come again, is backed off from."""
    limit = f"limit_req zone=everybody; limit_req_status {status};"
    with gateway(tmp_path, upstream=simulator.url, directives=limit) as url:
        cell = connect({**simulator.environ, "OPENAI_BASE_URL": f"{url}/v1"})
        check_answer(cell, ask(cell), attempts=1)
        check_answer(cell, ask(cell), attempts=2)
    assert "limiting requests" in (tmp_path / "error.log").read_text()
    assert len(simulator.prompts) == 2


@pytest.mark.parametrize(
    ("fault", "passing"),
    [
        (Fault("stalled", after=3), STREAMING),
        (Fault("stalled", after=3), AS_IT_COMES),
        (Fault("slow", seconds=60), AS_IT_COMES),
    ],
    ids=["in the midst of a stream", "with its text still in a buffer", "before it, by a 504"],
)
def test_its_timeout_is_survived(
    connect: Connect, simulator: Simulated, tmp_path: Path, fault: Fault, passing: str
) -> None:
    """A gateway that gives up on the server costs an attempt, not the answer."""
    with gateway(tmp_path, upstream=simulator.url, directives=passing + CUTS) as url:
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
def test_its_own_refusals_are_final(
    connect: Connect, simulator: Simulated, tmp_path: Path, refusal: str, title: str
) -> None:
    """What a gateway will never let through ends at once, in our words, not in its page."""
    with gateway(tmp_path, upstream=simulator.url, directives=refusal) as url:
        cell = connect({**simulator.environ, "OPENAI_BASE_URL": f"{url}/v1"})
        check_error(ask(cell), title)
        assert cell.run("reply.status, reply.attempts").plain == "('failed', 1)"
    assert simulator.prompts == []


def test_a_server_that_is_down_parks_the_request(connect: Connect, tmp_path: Path) -> None:
    """A 502 that stays is tried again, and ends within the patience."""
    with gateway(tmp_path, upstream=f"http://127.0.0.1:{free_port()}") as url:
        environ = {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": KEY}
        cell = connect({**environ, "NBCODEX_MODEL": "gpt-5.6-sol"})
        ran = ask(cell, "--patience 2200ms")
        check_error(ran, "Parked")
        assert "502" in ran.shown_error[0]
        outcome = "reply.status, reply.attempts, reply.waited <= 2.2"
        assert cell.run(outcome).plain == "('parked', 2, True)"
