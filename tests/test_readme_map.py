"""The README's section on many prompts does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kernel_client import Kernel, kernel
from tests.simulated import Simulated

pytestmark = pytest.mark.kernel

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_snippets_run(simulator: Simulated, tmp_path: Path) -> None:
    """One after the other, in a notebook; the last at half the price."""
    section = README.partition("## Many prompts")[2].partition("\n## ")[0]
    cells = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(cells) == 3
    with kernel(**simulator.environ, NBCODEX_HOME=str(tmp_path / "kept")) as cell:
        cell.run("%load_ext nbcodex\nimport nbcodex")
        ran = cell.run(cells[0])
        assert (ran.error, "2 answered" in ran.plain) == ("", True)
        assert check(cell, "frame") == "answer cost error id input_tokens lang output_tokens text"
        ran = cell.run(cells[1])
        assert ran.error == ""
        assert "answer_2" in check(cell, "translated")
        ran = cell.run(cells[2])
        assert (ran.error, "2 answered" in ran.plain) == ("", True)
        assert simulator.core.library._files == {}


def check(cell: Kernel, name: str) -> str:
    return cell.run(f"print(*sorted({name}.columns))").stream.strip()
