"""Both notebooks run in a new environment that has exactly what Binder installs.

The demo runs the quick start.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = """
import sys, nbformat
from tests.companion import NotebookRunner
NotebookRunner(nbformat.read(sys.argv[1], as_version=4)).run()
"""

pytestmark = [
    pytest.mark.server,
    pytest.mark.foreign,
    pytest.mark.skipif(
        "NBCODEX_FOREIGN_SERVERS" not in os.environ,
        reason="it installs JupyterLab into a new environment: run `.ci/foreign`",
    ),
]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment with `binder/requirements.txt`."""
    folder = tmp_path_factory.mktemp("binder")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "-r", "binder/requirements.txt"]
    subprocess.run(install, cwd=ROOT, check=True, timeout=900)
    return python


def test_companion_runs_in_the_environment_of_binder(python: Path, tmp_path: Path) -> None:
    # Away from the sources, so that the installed package is imported.
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "companion.py", tmp_path / "tests")
    notebook = tmp_path / "notebooks" / "companion.ipynb"
    check_run([python, "-c", RUN, notebook], tmp_path)


def test_demo_runs_in_the_environment_of_binder(python: Path, tmp_path: Path) -> None:
    check_run([python.with_name("nbcodex"), "demo", "--headless"], tmp_path)


def check_run(command: list[Path | str], folder: Path) -> None:
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-1000:] + ran.stderr[-3000:]
