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
Ask = Callable[..., Notebook]

PROMPT = "[[echo: this is **the answer**]]"


@pytest.fixture
def simulator() -> Iterator[Simulated]:
    """A simulator that answers at once."""
    with simulated(tpm=30_000, rpm=500, latency=0.05, speed=2_000.0) as running:
        yield running


@pytest.fixture
def ask(notebook: Callable[..., Notebook], simulator: Simulated) -> Ask:
    """Return a function that opens a notebook whose second cell waits for its answer."""

    def start(cell: str, *more: str) -> Notebook:
        nb = notebook(simulator.setup, cell, *more)
        nb.run(0)
        nb.wait()
        nb.run(1)
        expect(nb.panel).to_have_attribute("data-phase", "sending")
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
def test_answer_is_shown(ask: Ask, simulator: Simulated, page: Page, commands: list[str]) -> None:
    with simulator.held(PROMPT):
        nb = ask(f"%%codex\n{PROMPT}", "'another cell'")
        run_command(nb, *commands)
    shown = page.locator(".jp-OutputArea-output strong", has_text="the answer")
    expect(shown).to_have_count(1, timeout=40_000)
    expect(shown).to_be_visible()


def test_pasted_cell_says_where_the_answer_is(ask: Ask, simulator: Simulated) -> None:
    """JupyterLab sends no output to a cell that was cut and pasted while it ran."""
    with simulator.held(PROMPT):
        nb = ask(f"%%codex -o answer\n{PROMPT}", "'another cell'")
        run_command(nb, "cut-cell", "paste-cell-below")
    expect(nb.panel).to_have_attribute("data-phase", "ended", timeout=40_000)
    expect(nb.panel).to_contain_text(re.compile(r"`%codex journal \w{12}` prints it"))
    expect(nb.panel.get_by_role("button")).to_have_count(0)


def test_reloaded_page_says_where_a_background_answer_is(ask: Ask, simulator: Simulated) -> None:
    with simulator.held(PROMPT):
        nb = ask(f"%%codex -b -o answer\n{PROMPT}", "%codex journal")
        nb.wait()
        nb.save()
        nb.reload()
        nb.wait_until_ready()
    expect(nb.panel).to_have_attribute("data-phase", "ended", timeout=40_000)
    expect(nb.panel).to_contain_text(re.compile(r"`%codex journal \w{12}` prints it"))


def test_reloaded_page_says_where_the_answer_is(ask: Ask, simulator: Simulated) -> None:
    """The page that runs the cell is reloaded: its panel comes back when the cell has ended."""
    with simulator.held(PROMPT):
        nb = ask(f"%%codex -o answer\n{PROMPT}")
        nb.save()
        nb.reload()
    nb.wait_until_ready()
    expect(nb.panel).to_have_attribute("data-phase", "ended", timeout=40_000)


@pytest.mark.parametrize(
    ("options", "prompt", "result"),
    [("", PROMPT, "this is the answer"), ("--map rows", "About {}", "map m")],
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
