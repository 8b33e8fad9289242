"""The conversation in a real JupyterLab, which names its cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.browser.lab import Notebook
from tests.simulated import Simulated, simulated

pytestmark = pytest.mark.browser


@pytest.fixture
def simulator() -> Iterator[Simulated]:
    """A simulator that answers at once."""
    with simulated(tpm=10**8, rpm=10**6, latency=0.01, speed=5_000.0) as running:
        yield running


def test_cell_keeps_its_place_in_the_conversation(
    notebook: Callable[..., Notebook], simulator: Simulated
) -> None:
    """Run again, a cell sees the cells above it, and later cells see its new answer once."""
    nb = notebook(simulator.setup, "%%codex\none", "%%codex\ntwo", "%%codex\nthree")
    for index in (0, 1, 2, 2, 1, 3):
        nb.run(index)
        nb.wait()
    asked = [seen.body["input"] for seen in simulator.core.log if seen.api]
    prompts = [
        [body] if isinstance(body, str) else [i["content"] for i in body if i["role"] == "user"]
        for body in asked
    ]
    both = ["one", "two"]
    assert prompts == [["one"], both, both, ["one"], [*both, "three"]]
    assert "2 earlier turns" in nb.outputs(3)[-1]["data"]["text/plain"]
