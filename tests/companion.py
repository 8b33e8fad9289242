"""The companion notebook as JupyterLab runs it: cells named, one run again, new cells put below.

``python -m tests.companion`` runs it and writes what came of it into its file.
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
AGAIN = {"history-again": "two"}
"""Cells that are run once more, and before which."""


class Player(NotebookClient):
    """Runs a notebook, and puts what a cell asks for into a new cell below it."""

    def __init__(self, notebook: NotebookNode) -> None:
        super().__init__(notebook, timeout=60, kernel_name="python3", record_timing=False)
        self.on_cell_start, self.on_cell_executed = self._name, self._insert

    def play(self) -> NotebookNode:
        """Run it, and return it with its outputs and new cells.

        Raises
        ------
        nbclient.exceptions.CellExecutionError
            If a cell that is not tagged ``raises-exception`` fails.
        """
        with TemporaryDirectory() as home, self.setup_kernel(env=_environ(home)):
            for cell in list(self.nb.cells):
                for id_ in filter(None, (AGAIN.get(cell.id), cell.id)):
                    index = next(i for i, other in enumerate(self.nb.cells) if other.id == id_)
                    self.execute_cell(self.nb.cells[index], index)
        return self.nb

    def _name(self, cell: NotebookNode, cell_index: int) -> None:
        self.kc.execute = functools.partial(_execute, self.kc, cell.id)

    def _insert(self, cell: NotebookNode, cell_index: int, execute_reply: dict[str, Any]) -> None:
        for payload in execute_reply["content"].get("payload", []):
            if payload["source"] == "set_next_input":
                below = nbformat.v4.new_code_cell(payload["text"], id=f"{cell.id}-below")
                below.metadata["nbcodex"] = {"inserted": True}
                self.nb.cells.insert(cell_index + 1, below)


def _environ(home: str) -> dict[str, str]:
    """Return nobody's environment: no keys, no settings, no name of a notebook."""
    strange = ("OPENAI_", "AZURE_OPENAI_", "NBCODEX_", "JPY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    return kept | {"NBCODEX_HOME": f"{home}/nbcodex", "IPYTHONDIR": f"{home}/ipython"}


def _execute(client: AsyncKernelClient, cell: str, code: str, **options: Any) -> str:
    """Do what `client.execute` does, and name the cell, as Lab does and nbclient does not."""
    content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False}
    content |= {name: value for name, value in options.items() if name in content}
    message = client.session.msg("execute_request", content, metadata={"cellId": cell})
    client.shell_channel.send(message)
    return str(message["header"]["msg_id"])


def read() -> NotebookNode:
    """Return the notebook as a user opens it for the first time: without what it put into it."""
    notebook = nbformat.read(PATH, as_version=4)
    notebook.cells = [c for c in notebook.cells if not said(c).get("inserted")]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def said(cell: NotebookNode) -> dict[str, Any]:
    """Return what a cell's metadata says that it does."""
    told: dict[str, Any] = cell.metadata.get("nbcodex", {})
    return told


if __name__ == "__main__":
    nbformat.write(Player(read()).play(), PATH)
