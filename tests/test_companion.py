"""The companion notebook shows what its text says, in a real kernel with the simulator."""

from __future__ import annotations

import re

import nbformat
import pytest
from nbformat import NotebookNode

from nbcodex.rendering.html import printable
from tests.companion import PATH, NotebookRunner, expectations, read_notebook

pytestmark = pytest.mark.kernel

VARIABLE_PARTS = re.compile(r"\w*\d[\w.,]*")  # times, ids, ports and figures
CODE_CELLS = [cell.id for cell in read_notebook().cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def executed() -> NotebookNode:
    """Return the notebook after one run."""
    return NotebookRunner(read_notebook()).run()


def find_cell(notebook: NotebookNode, name: str) -> NotebookNode:
    return next(cell for cell in notebook.cells if cell.id == name)


def output_text(cell: NotebookNode) -> str:
    """Return what is shown below a cell, as text."""
    texts = (
        output.get("text") or output.get("data", {}).get("text/plain", output.get("evalue", ""))
        for output in cell.outputs
    )
    return printable("\n".join(texts))


@pytest.mark.parametrize("name", CODE_CELLS)
def test_cell_shows_what_its_metadata_expects(executed: NotebookNode, name: str) -> None:
    """The cell shows the expected texts, and ends in the expected error or in none."""
    cell = find_cell(executed, name)
    for text in expectations(cell).get("shows", []):
        assert text in output_text(cell)
    errors = [output.ename for output in cell.outputs if output.output_type == "error"]
    assert errors == list(filter(None, [expectations(cell).get("error")]))


@pytest.mark.parametrize("name", ["code", "fix"])
def test_code_is_inserted_below_and_not_run(executed: NotebookNode, name: str) -> None:
    """A new cell follows, with the code that can be copied, and without output."""
    names = [cell.id for cell in executed.cells]
    below = executed.cells[names.index(name) + 1]
    assert below.source.startswith("def wait(")
    assert below.execution_count is None
    assert below.outputs == []
    copies = [output.data.get("text/html", "") for output in find_cell(executed, name).outputs]
    assert "Copy</button>" in "".join(copies)


def test_cell_that_ran_twice_has_one_turn(executed: NotebookNode) -> None:
    """The second run sees the turns before the cell, and replaces the first one."""
    two = find_cell(executed, "two")
    assert two.execution_count > find_cell(executed, "history").execution_count
    assert "1 earlier turn" in output_text(two)
    again, history = (find_cell(executed, name) for name in ("history-again", "history"))
    assert output_text(again) == output_text(history)


def test_background_answer_is_shown_in_its_cell(executed: NotebookNode) -> None:
    """The answer of a cell with `-b` is shown below this cell, whole and with its figures."""
    background = output_text(find_cell(executed, "background"))
    assert "Name three uses" in background
    assert "simulated" in background.splitlines()[-1]


def test_saved_outputs_are_those_of_a_run(executed: NotebookNode) -> None:
    """The file holds the outputs of a run; `python -m tests.companion` renews them."""
    saved = nbformat.read(PATH, as_version=4)
    assert [cell.id for cell in saved.cells] == [cell.id for cell in executed.cells]
    for old, new in zip(saved.cells, executed.cells, strict=True):
        if new.cell_type == "code":
            texts = [VARIABLE_PARTS.sub("#", output_text(cell)) for cell in (old, new)]
            assert texts[0] == texts[1], new.id
            assert new.outputs == [] or old.outputs


def test_saved_outputs_need_no_widget(executed: NotebookNode) -> None:
    """The saved notebook is complete in every front end."""
    assert "widget-view" not in nbformat.writes(executed)
