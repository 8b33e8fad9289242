"""The companion notebook does what it tells, cell by cell, in a real kernel against the demo."""

from __future__ import annotations

import re

import nbformat
import pytest
from nbformat import NotebookNode

from nbcodex.rendering.html import printable
from tests.companion import PATH, Player, read, said

pytestmark = pytest.mark.kernel

VARIES = re.compile(r"\w*\d[\w.,]*")
"""Times, identifiers, ports and figures."""
CODE = [cell.id for cell in read().cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def played() -> NotebookNode:
    """The notebook after one run."""
    return Player(read()).play()


def cell(notebook: NotebookNode, name: str) -> NotebookNode:
    return next(cell for cell in notebook.cells if cell.id == name)


def shown(ran: NotebookNode) -> str:
    """Return what stands below a cell, as text."""
    texts = (
        output.get("text") or output.get("data", {}).get("text/plain", output.get("evalue", ""))
        for output in ran.outputs
    )
    return printable("\n".join(texts))


@pytest.mark.parametrize("name", CODE)
def test_a_cell_does_what_it_says(played: NotebookNode, name: str) -> None:
    """It shows what its metadata promise, and ends in the error that they name or in none."""
    ran = cell(played, name)
    for text in said(ran).get("shows", []):
        assert text in shown(ran)
    errors = [output.ename for output in ran.outputs if output.output_type == "error"]
    assert errors == list(filter(None, [said(ran).get("error")]))


@pytest.mark.parametrize("name", ["code", "fix"])
def test_code_is_put_below_and_not_run(played: NotebookNode, name: str) -> None:
    """A new cell follows, with the code that can be copied, and without output."""
    names = [cell.id for cell in played.cells]
    below = played.cells[names.index(name) + 1]
    assert below.source.startswith("def wait(")
    assert below.execution_count is None
    assert below.outputs == []
    copies = [output.data.get("text/html", "") for output in cell(played, name).outputs]
    assert "Copy</button>" in "".join(copies)


def test_a_cell_that_ran_twice_has_one_turn(played: NotebookNode) -> None:
    """The second run sees what stands before it, and takes the first one's place."""
    assert cell(played, "two").execution_count > cell(played, "history").execution_count
    assert "1 earlier turn" in shown(cell(played, "two"))
    assert shown(cell(played, "history-again")) == shown(cell(played, "history"))


def test_the_background_answer_lands_in_its_cell(played: NotebookNode) -> None:
    """What was asked with `-b` is shown where it was asked, whole and with its figures."""
    assert "Name three uses" in shown(cell(played, "background"))
    assert "simulated" in shown(cell(played, "background")).splitlines()[-1]


def test_what_is_saved_is_what_a_run_shows(played: NotebookNode) -> None:
    """The file holds the outputs of a run; `python -m tests.companion` renews them."""
    saved = nbformat.read(PATH, as_version=4)
    assert [cell.id for cell in saved.cells] == [cell.id for cell in played.cells]
    for was, now in zip(saved.cells, played.cells, strict=True):
        if now.cell_type == "code":
            assert VARIES.sub("#", shown(was)) == VARIES.sub("#", shown(now)), now.id
            assert now.outputs == [] or was.outputs


def test_nothing_in_it_needs_a_widget(played: NotebookNode) -> None:
    """What is saved shows everywhere."""
    assert "widget-view" not in nbformat.writes(played)
