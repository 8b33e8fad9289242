"""All kinds of failures, on both APIs, before and after some text, in a real kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from nbcodex.simulator import Fault
from tests.kernel_client import CellResult, Kernel
from tests.simulated import Simulated

pytestmark = pytest.mark.kernel

RECOVERS = {
    "1 status 500": Fault("http", status=500),
    "1 status 503 overloaded": Fault("overloaded"),
    "1 tokens per minute": Fault("tokens_per_minute", seconds=0.3),
    "1 requests per minute": Fault("requests_per_minute", seconds=0.3),
    "1 Azure's 429": Fault("azure", seconds=1),
    "1 gateway's 429": Fault("html_429"),
    "2 nested error event": Fault("error_event", seconds=0.3),
    "3 flat error event": Fault("flat_error_event", seconds=0.3),
    "4 response.failed": Fault("failed", seconds=0.3),
    "5 Azure's response.failed": Fault("azure_failed", seconds=1),
    "6 clean end too early": Fault("truncated"),
    "7 connection dropped": Fault("dropped"),
    "7 connection cut in a chunk": Fault("cut"),
    "8 broken JSON": Fault("malformed"),
    "9 HTML 502": Fault("html_502"),
    "10 silence": Fault("stalled"),
}
# Those numbered 1 and 9 come instead of a stream, never after text.
INSTEAD = {name for name in RECOVERS if name[0] in "19" and name[1] == " "}
ENDS = {
    "quota": (Fault("quota"), "Quota exhausted"),
    "too large": (Fault("too_large"), "Too large"),
    "a day's limit": (Fault("requests_per_day", seconds=7 * 3600), "Parked"),
    "401": (Fault("http", status=401, code="invalid_api_key"), "Not allowed"),
    "400": (Fault("http", status=400, code="invalid_prompt"), "Request rejected"),
    "404": (Fault("http", status=404, code="model_not_found"), "Model not found"),
    "redirect": (Fault("redirect"), ""),
}


@pytest.fixture
def cell(shared_kernel: Kernel, simulator: Simulated) -> Iterator[Kernel]:
    """A kernel that sends its requests to the simulator."""
    variables = "".join(f"os.environ[{k!r}] = {v!r}\n" for k, v in simulator.environ.items())
    shared_kernel.run(f"import os\n{variables}%reload_ext nbcodex\n")
    yield shared_kernel
    shared_kernel.run("%reset -f")


def ask(kernel: Kernel, api: str) -> CellResult:
    return kernel.run(f"%%codex --api {api} -o reply\n[[echo: one two three four five six]]")


# Silence before text ends an attempt after five times the idle timeout, so one API is enough.
CASES = [
    pytest.param(shape, after, api, id=f"{shape}, {'before' if after < 0 else 'after'} text-{api}")
    for shape in RECOVERS
    for after in ((-1,) if shape in INSTEAD else (-1, 3))
    for api in ("responses", "chat")
    if (shape, after, api) != ("10 silence", -1, "chat")
]


@pytest.mark.parametrize(("shape", "after", "api"), CASES)
def test_the_answer_is_complete_and_not_doubled(
    cell: Kernel, simulator: Simulated, shape: str, after: int, api: str
) -> None:
    """After each transient failure the whole answer stands in the cell, once."""
    simulator.core.script([replace(RECOVERS[shape], after=after)])
    # A busy machine may need a second for a chunk, which must not count as silence.
    cell.run(f"%config Codex.idle_timeout = '{3 if shape == '10 silence' else 60}s'")
    ran = ask(cell, api)
    assert ran.status == "ok", ran.shown_error
    assert ran.markdown.count("one two three four five six") == 1
    assert len(simulator.prompts) == 2
    assert len(set(simulator.prompts)) == 1


@pytest.mark.parametrize("api", ["responses", "chat"])
@pytest.mark.parametrize("case", ENDS)
def test_a_final_failure_is_a_short_error(
    cell: Kernel, simulator: Simulated, case: str, api: str
) -> None:
    """A request that cannot be answered ends after one attempt, in six lines at most."""
    fault, title = ENDS[case]
    simulator.core.script([fault])
    ran = ask(cell, api)
    assert ran.status == "error"
    assert ran.shown_error[0].startswith(title)
    assert len(ran.shown_error) <= 6
    assert any("→" in line for line in ran.shown_error)
    assert len(simulator.prompts) == 1
    assert cell.lives()
