"""Runs the companion notebook as JupyterLab does: with named cells and inserted cells.

``python -m tests.companion`` runs the notebook and writes its outputs into its file.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from jupyter_client.asynchronous.client import AsyncKernelClient
from nbclient import NotebookClient
from nbformat import NotebookNode

PATH = Path(__file__).parents[1] / "notebooks" / "companion.ipynb"
RERUN_BEFORE = {"history-again": "two"}  # cell: the cell that is run once more before it


class NotebookRunner(NotebookClient):
    """Runs a notebook, and puts the code that a cell inserts into a new cell below it."""

    def __init__(self, notebook: NotebookNode) -> None:
        super().__init__(notebook, timeout=300, kernel_name="python3", record_timing=False)
        self.on_cell_start, self.on_cell_executed = self._name_cell, self._insert_cells

    def run(self) -> NotebookNode:
        """Run all cells; return the notebook with outputs and inserted cells.

        Raises
        ------
        nbclient.exceptions.CellExecutionError
            If a cell that is not tagged ``raises-exception`` fails.
        """
        with TemporaryDirectory() as home, self.setup_kernel(env=_clean_environment(home)):
            for cell in list(self.nb.cells):
                for cell_id in filter(None, (RERUN_BEFORE.get(cell.id), cell.id)):
                    index = next(i for i, other in enumerate(self.nb.cells) if other.id == cell_id)
                    self.execute_cell(self.nb.cells[index], index)
        return self.nb

    def _name_cell(self, cell: NotebookNode, cell_index: int) -> None:
        self.kc.execute = functools.partial(_execute, self.kc, cell.id)

    def _insert_cells(
        self, cell: NotebookNode, cell_index: int, execute_reply: dict[str, Any]
    ) -> None:
        for payload in execute_reply["content"].get("payload", []):
            if payload["source"] == "set_next_input":
                below = nbformat.v4.new_code_cell(payload["text"], id=f"{cell.id}-below")
                below.metadata["nbcodex"] = {"inserted": True}
                self.nb.cells.insert(cell_index + 1, below)


def _clean_environment(home: str) -> dict[str, str]:
    """Return the environment without keys, settings and the name of a notebook."""
    private = ("OPENAI_", "AZURE_OPENAI_", "NBCODEX_", "JPY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    return kept | {"NBCODEX_HOME": f"{home}/nbcodex", "IPYTHONDIR": f"{home}/ipython"}


def _execute(client: AsyncKernelClient, cell_id: str, code: str, **options: Any) -> str:
    """Do what `client.execute` does, and name the cell, as Lab does and nbclient does not."""
    content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False}
    content |= {name: value for name, value in options.items() if name in content}
    message = client.session.msg("execute_request", content, metadata={"cellId": cell_id})
    client.shell_channel.send(message)
    return str(message["header"]["msg_id"])


def read_notebook() -> NotebookNode:
    """Return the notebook without outputs and inserted cells."""
    notebook = nbformat.read(PATH, as_version=4)
    notebook.cells = [c for c in notebook.cells if not expectations(c).get("inserted")]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def expectations(cell: NotebookNode) -> dict[str, Any]:
    """Return what the metadata of a cell says about its outputs."""
    found: dict[str, Any] = cell.metadata.get("nbcodex", {})
    return found


if __name__ == "__main__":
    nbformat.write(NotebookRunner(read_notebook()).run(), PATH)
