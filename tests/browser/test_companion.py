"""The companion notebook in a real JupyterLab: its cells run, and what they put below is seen."""

from __future__ import annotations

import nbformat
import pytest
from playwright.sync_api import Page

from tests.browser.lab import Lab, Notebook
from tests.companion import RERUN_BEFORE, expectations, read_notebook

pytestmark = pytest.mark.browser

_CELLS = "const cells = window.jupyterapp.shell.currentWidget.content.widgets;"


def place(nb: Notebook, name: str) -> int:
    """Return where the cell of that id stands now."""
    found: int = nb.page.evaluate(
        f"(id) => {{ {_CELLS} return cells.findIndex((cell) => cell.model.id === id); }}", name
    )
    return found


def seen_at(nb: Notebook, index: int) -> tuple[str, str]:
    """Return what a reader who scrolls there sees of a cell: its number, and its text."""
    cell = nb.page.evaluate_handle(
        f"(index) => {{ {_CELLS} cells[index].node.scrollIntoView(); return cells[index].node; }}",
        index,
    ).as_element()
    assert cell is not None
    cell.wait_for_selector(".cm-line", state="visible")
    box, window = cell.bounding_box(), nb.page.viewport_size
    assert box is not None
    assert window is not None
    assert 0 <= box["y"] < window["height"] - 50
    number = cell.wait_for_selector(".jp-InputPrompt", state="visible")
    return (number.inner_text() if number else "").replace(
        "\N{NO-BREAK SPACE}", " "
    ), cell.inner_text()


def test_every_cell_runs_and_new_ones_appear(page: Page, lab: Lab) -> None:
    """`-f code` and `fix` add a cell that is not run; all other cells show what they should."""
    notebook = read_notebook()
    names = [cell.id for cell in notebook.cells if cell.cell_type == "code"]
    nbformat.write(notebook, lab.folder / "companion.ipynb")
    nb = Notebook(page, lab, "companion.ipynb").open()
    count = len(notebook.cells)
    for name in names:
        for each in filter(None, (RERUN_BEFORE.get(name), name)):
            nb.run(place(nb, each))
            nb.wait()
        if name in {"code", "fix"}:
            count += 1
            page.wait_for_function(
                f"(count) => {{ {_CELLS} return cells.length === count; }}", arg=count
            )
            number, text = seen_at(nb, place(nb, name) + 1)
            assert number.strip() == "[ ]:"
            assert "def wait(used" in text
    saved = {cell.id: cell for cell in nb.save().cells}
    assert len(saved) == count
    for cell in map(saved.__getitem__, names):
        outputs = str(cell.outputs)
        assert [
            text for text in expectations(cell).get("shows", []) if text not in outputs
        ] == [], cell.id
    assert "2 turns" in str(saved["history-again"].outputs)
