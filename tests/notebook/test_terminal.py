"""`%%codex` in a terminal IPython: readable text, deltas as they come, a countdown on one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from nbcodex.simulator import Fault
from tests.simulated import KEY, Simulated

pytestmark = pytest.mark.kernel

CELL = "get_ipython().run_cell_magic('codex', '-o r', '[[echo: first line and the second]]')\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A file of one `%%codex` cell, as IPython runs it."""
    path = tmp_path / "cell.ipy"
    path.write_text(f"%load_ext nbcodex\n{CELL}print('after', bool(r))\n")
    return path


def environ(simulator: Simulated, home: Path) -> dict[str, str]:
    return {
        **os.environ,
        **simulator.environ,
        "IPYTHONDIR": str(home),
        "TERM": "xterm",
        "COLUMNS": "120",
    }


def in_terminal(script: Path, simulator: Simulated, home: Path) -> str:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "IPython", "--no-banner", str(script)],
        env=environ(simulator, home),
        encoding="utf-8",
        timeout=120,
        dimensions=(40, 120),
    )
    child.expect(pexpect.EOF)
    child.close()
    return str(child.before)


def test_terminal_shows_answer_and_figures(
    script: Path, simulator: Simulated, tmp_path: Path
) -> None:
    """The answer is text, not the repr of an object, and one line of figures follows."""
    shown = in_terminal(script, simulator, tmp_path)
    assert shown.count("first line and the second") == 1
    assert re.search(r"gpt-5.6-sol · \d+ in · \d+ out", shown)
    assert "after True" in shown
    assert "<" not in shown.split("after")[0]


def test_terminal_counts_down_on_one_line(
    script: Path, simulator: Simulated, tmp_path: Path
) -> None:
    """The wait is rewritten in place, names its limit, and leaves nothing behind."""
    simulator.core.script([Fault("tokens_per_minute", seconds=4.0)])
    shown = in_terminal(script, simulator, tmp_path)
    ticks = re.findall(r"\r\x1b\[Kwaiting (\d\.\d) s · tokens per minute \(TPM\)", shown)
    assert len(ticks) >= 2
    assert ticks == sorted(ticks, reverse=True)
    lines = [line.rpartition("\x1b[K")[2] for line in shown.split("\r\n")]
    assert not any("waiting" in line for line in lines)
    assert shown.count("first line and the second") == 1


def test_terminal_marks_an_answer_that_starts_again(
    script: Path, simulator: Simulated, tmp_path: Path
) -> None:
    """Printed text stays, and a line separates it from the new answer."""
    simulator.core.script([Fault("dropped", after=2)])
    shown = in_terminal(script, simulator, tmp_path)
    assert "the answer starts again" in shown
    assert "first line and the second" in shown.split("the answer starts again")[1]


def test_terminal_has_conversation_and_last_error(simulator: Simulated, tmp_path: Path) -> None:
    """Variables, errors and earlier turns work without a notebook; each terminal has its own."""
    path = tmp_path / "cell.ipy"
    ask = "get_ipython().run_cell_magic('codex', '', {!r})\n"
    path.write_text(
        "%load_ext nbcodex\nx = 6\nget_ipython().run_cell('1/0', store_history=True)\n"
        + ask.format("is {x} a number?")
        + ask.format("explain {Err[-1]}")
        + "%codex history\n"
    )
    for _ in range(2):
        shown = in_terminal(path, simulator, tmp_path)
        *earlier, last = [item["content"] for item in simulator.core.log[-1].body["input"]]
        assert earlier[0] == "is 6 a number?"
        assert len(earlier) == 2
        assert last.endswith("ZeroDivisionError: division by zero")
        assert "2 turns, about" in shown


def test_pipe_gets_lines(script: Path, simulator: Simulated, tmp_path: Path) -> None:
    """Without a terminal the wait is printed once, without control characters."""
    simulator.core.script([Fault("tokens_per_minute", seconds=1.5)])
    ran = subprocess.run(
        [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", str(script)],
        env=environ(simulator, tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.stdout.count("[waiting") == 1
    assert "\x1b" not in ran.stdout
    assert "\r" not in ran.stdout
    assert KEY not in ran.stdout + ran.stderr


def test_escape_sequences_of_an_answer_are_removed(tmp_path: Path, simulator: Simulated) -> None:
    path = tmp_path / "cell.ipy"
    path.write_text(
        "%load_ext nbcodex\nget_ipython().run_cell_magic('codex', '', "
        "'[[echo: \\x1b[2J\\x1bcowned evil]]')\n"
    )
    shown = in_terminal(path, simulator, tmp_path)
    assert "evil" in shown
    assert "\x1bc" not in shown
    assert "\x1b[2J" not in shown


def test_all_formats_are_text_in_a_terminal(tmp_path: Path, simulator: Simulated) -> None:
    """A terminal shows the answer's own text, and code is never run."""
    path = tmp_path / "cell.ipy"
    cells = {
        "code": "Try\\n```python\\nprint(6 * 7)\\n```",
        "json": '{\\"a\\": 1}',
        "html": "<b>bold</b>",
    }
    cells_text = "".join(
        f"get_ipython().run_cell_magic('codex', '-f {form}', \"[[echo: {text}]]\")\n"
        for form, text in cells.items()
    )
    path.write_text(f"%load_ext nbcodex\n{cells_text}%codex insert\n")
    shown = in_terminal(path, simulator, tmp_path)
    for part in ("```python", "print(6 * 7)", '{"a": 1}', "<b>bold</b>"):
        assert part in shown
    assert "42" not in shown
    assert "Copy" not in shown


def test_terminal_shows_heading_then_answer_once(tmp_path: Path, simulator: Simulated) -> None:
    """`fix` names the error and streams; for an image, the line says where its data is."""
    path = tmp_path / "cell.ipy"
    path.write_text(
        "%load_ext nbcodex\nget_ipython().run_cell('1/0', store_history=True)\n%codex fix\n"
        "get_ipython().run_cell_magic('codex', '-f image', 'a cat')\n"
    )
    shown = in_terminal(path, simulator, tmp_path)
    assert shown.count("This is a simulated answer") == 1
    assert shown.index("division by zero in cell") < shown.index("This is a simulated answer")
    assert re.search(r"no pictures in a terminal: .images\[0\].data is image/png, \d+ bytes", shown)


def test_map_in_a_terminal_is_one_line(tmp_path: Path, simulator: Simulated) -> None:
    """The line is rewritten while the map runs, and one line of figures stays."""
    script = tmp_path / "map.ipy"
    script.write_text(
        "%load_ext nbcodex\nimport nbcodex\n"
        "r = nbcodex.map('[[tokens=300]] {}', list(range(40)))\nprint('after', all(r))\n"
    )
    shown = in_terminal(script, simulator, tmp_path)
    assert re.search(r"\r\x1b\[K\d+ of 40 rows answered", shown)
    assert re.search(r"\r\x1b\[Kmap m\w{8} · 40 answered · gpt-5.6-sol · ", shown)
    assert "after True" in shown
