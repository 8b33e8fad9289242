"""Cells whose output no update reaches: the answer is shown, or a line says where it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

from nbcodex.simulator import Fault
from tests.browser.lab import Notebook
from tests.simulated import Simulated, simulated

pytestmark = pytest.mark.browser
Waiting = Callable[..., Notebook]

ANSWER = "[[echo: this is **the answer**]]"
# Long enough for what a user does meanwhile, on a busy machine too.
WAIT_S = 8.0


@pytest.fixture
def simulator() -> Iterator[Simulated]:
    """A simulator that answers at once."""
    with simulated(tpm=30_000, rpm=500, latency=0.05, speed=2_000.0) as running:
        yield running


@pytest.fixture
def waiting(notebook: Callable[..., Notebook], simulator: Simulated) -> Waiting:
    """Return a function that opens a notebook whose second cell waits for a limit."""

    def start(cell: str, *more: str) -> Notebook:
        nb = notebook(simulator.setup, cell, *more)
        nb.run(0)
        nb.wait()
        simulator.core.script([Fault("tokens_per_minute", seconds=WAIT_S)])
        nb.run(1)
        expect(nb.panel).to_have_attribute("data-phase", "waiting")
        return nb

    return start


def run_command(nb: Notebook, *names: str) -> None:
    """Run JupyterLab's commands on the second cell."""
    nb.page.evaluate(
        """async (names) => {
          const app = window.jupyterapp;
          app.shell.currentWidget.content.activeCellIndex = 1;
          for (const name of names) await app.commands.execute(`notebook:${name}`);
        }""",
        list(names),
    )


@pytest.mark.parametrize(
    "commands",
    [["move-cell-down"], ["clear-cell-output"], ["delete-cell", "undo-cell-action"]],
    ids=["moved", "cleared", "deleted and undone"],
)
def test_answer_is_shown(waiting: Waiting, page: Page, commands: list[str]) -> None:
    nb = waiting(f"%%codex\n{ANSWER}", "'another cell'")
    run_command(nb, *commands)
    shown = page.locator(".jp-OutputArea-output strong", has_text="the answer")
    expect(shown).to_have_count(1, timeout=40_000)
    expect(shown).to_be_visible()


def test_pasted_cell_says_where_the_answer_is(waiting: Waiting, page: Page) -> None:
    """JupyterLab sends no output to a cell that was cut and pasted while it ran."""
    nb = waiting(f"%%codex -o answer\n{ANSWER}", "'another cell'")
    run_command(nb, "cut-cell", "paste-cell-below")
    expect(nb.panel).to_have_attribute("data-phase", "ended", timeout=40_000)
    expect(nb.panel).to_contain_text(re.compile(r"`%codex journal \w{12}` prints it"))
    expect(nb.panel.get_by_role("button")).to_have_count(0)


def test_reloaded_page_says_where_a_background_answer_is(waiting: Waiting) -> None:
    nb = waiting(f"%%codex -b -o answer\n{ANSWER}", "%codex journal")
    nb.wait()
    nb.save()
    nb.reload()
    expect(nb.panel).to_have_attribute("data-phase", "ended", timeout=40_000)
    expect(nb.panel).to_contain_text(re.compile(r"`%codex journal \w{12}` prints it"))


def test_reloaded_page_says_where_the_answer_is(waiting: Waiting) -> None:
    """The page that runs the cell is reloaded: its panel comes back when the cell has ended."""
    nb = waiting(f"%%codex -o answer\n{ANSWER}")
    nb.save()
    nb.reload()
    expect(nb.panel).to_have_attribute("data-phase", "ended", timeout=40_000)


@pytest.mark.parametrize(
    ("options", "prompt", "result"),
    [("", ANSWER, "this is the answer"), ("--map rows", "About {}", "map m")],
    ids=["request", "map"],
)
def test_output_widget_shows_the_result(
    notebook: Callable[..., Notebook],
    page: Page,
    simulator: Simulated,
    options: str,
    prompt: str,
    result: str,
) -> None:
    """`ipywidgets.Output` ignores updates of outputs."""
    nb = notebook(
        f"{simulator.setup}\nimport ipywidgets\nrows = ['one', 'two']",
        "output = ipywidgets.Output()\ndisplay(output)\nwith output:\n"
        f"    get_ipython().run_cell_magic('codex', {options!r}, {prompt!r})",
    )
    simulator.core.script([Fault("tokens_per_minute", seconds=1.0)] * 2)
    for index in range(2):
        nb.run(index)
        nb.wait()
    shown = page.locator(".jupyter-widgets .jp-RenderedMarkdown", has_text=result)
    expect(shown).to_have_count(1)
    expect(shown).to_be_visible()
