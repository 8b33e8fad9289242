"""Many requests in the background of a real JupyterLab."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.browser.lab import Notebook
from tests.simulated import Simulated, simulated

pytestmark = pytest.mark.browser

MANY = 10


@pytest.fixture
def simulator() -> Iterator[Simulated]:
    """A simulator that takes one request a second, and no more: slower than cells are run."""
    with simulated(tpm=30_000, rpm=60, hidden_window=1.0, latency=0.05, speed=100.0) as running:
        yield running


def test_ten_answers_land_in_their_own_cells(
    notebook: Callable[..., Notebook], simulator: Simulated, page: Page
) -> None:
    """Cells return at once, limits are waited out, and each answer is in its cell and variable."""
    cells = [f"%%codex -b -o a{n}\n[[echo: **answer {n}** of ten]]" for n in range(MANY)]
    check = f"print([globals()[f'a{{n}}'].text for n in range({MANY})])"
    nb = notebook(simulator.setup, *cells, check)
    for index in range(MANY + 1):
        nb.run(index)
        nb.wait()
    known = len([seen for seen in simulator.core.log if seen.status == 200])
    assert known < MANY, "all were answered before the last cell had returned"
    nb.run(MANY + 1)
    nb.wait()
    assert nb.text(MANY + 1).strip() == str([f"**answer {n}** of ten" for n in range(MANY)])
    for n in range(MANY):
        nb.until(lambda n=n: [o["output_type"] for o in nb.outputs(n + 1)] == ["display_data"])
        nb.until(lambda n=n: "<sub>" in str(nb.outputs(n + 1)))
        answer = nb.outputs(n + 1)[0]["data"]["text/markdown"]
        assert [f"answer {m}**" in answer for m in range(MANY)] == [m == n for m in range(MANY)]
    shown = page.locator(".jp-RenderedMarkdown strong")
    expect(shown).to_have_text([f"answer {n}" for n in range(MANY)])
    expect(nb.panel).to_have_count(0)
    assert 429 in {seen.status for seen in simulator.core.log}


def test_answer_whose_output_was_cleared_is_in_its_variable_and_the_journal(
    notebook: Callable[..., Notebook], simulator: Simulated, page: Page
) -> None:
    """The cell stays empty, and neither the page nor the kernel reports an error."""
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    nb = notebook(
        simulator.setup,
        "%%codex -b -o late\n[[echo: the answer]]",
        "print(late.text)",
        "get_ipython().run_line_magic('codex', f'journal {late.id}')",
    )
    nb.run(0)
    nb.wait()
    with simulator.held("the answer"):
        nb.run(1)
        nb.wait()
        expect(nb.panel).to_have_count(1)
        nb.clear(1)
        expect(nb.panel).to_have_count(0)
    for index in (2, 3):
        nb.run(index)
        nb.wait()
        nb.until(lambda index=index: "the answer\n" in nb.text(index))
    assert [output["output_type"] for output in nb.outputs(3)] == ["stream"]
    assert nb.outputs(1) == []
    assert errors == []
