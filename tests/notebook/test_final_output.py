"""Where the result of a cell is shown: as a new output, which every front end shows, and once."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from nbcodex.notebook.display import text_views
from nbcodex.notebook.display.text_views import EMPTY_BUNDLE, OutputSlot
from nbcodex.simulator import Fault
from tests.kernel_client import Kernel, kernel
from tests.simulated import Simulated, simulated

ANSWER = "%%codex\n[[echo: the answer]]"
JSON_ANSWER = '%%codex --raw -f json\n[[echo: {"value": "the answer"}]]'
MAP = "import nbcodex\nnbcodex.map('About {}', ['a', 'b'])\nNone"
IN_OUTPUT_WIDGET = """import ipywidgets
with ipywidgets.Output():
    get_ipython().run_cell_magic("codex", "", "[[echo: the answer]]")"""


@pytest.fixture(scope="module")
def slow() -> Iterator[Simulated]:
    """A simulator whose answers take long enough that a view opens."""
    with simulated(tpm=10_000_000, rpm=100_000, latency=0.5, speed=2_000.0) as running:
        yield running


@pytest.fixture(scope="module")
def cell(slow: Simulated) -> Iterator[Kernel]:
    """A kernel with the extension loaded."""
    with kernel(**slow.environ) as started:
        assert started.run("%load_ext nbcodex").status == "ok"
        yield started


def published(cell: Kernel, code: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Run a cell; return message type, display id and data of all that it displayed."""
    return [
        (message["msg_type"], content.get("transient", {}).get("display_id"), content["data"])
        for message in cell.messages(cell.start(code))
        if "display_data" in message["msg_type"] and (content := message["content"])
    ]


@pytest.mark.kernel
@pytest.mark.parametrize("display", ["text", "widget"])
@pytest.mark.parametrize(
    ("code", "result"),
    [
        (ANSWER, "the answer"),
        (JSON_ANSWER, "the answer"),
        (IN_OUTPUT_WIDGET, "the answer"),
        (MAP, "2 answered"),
    ],
    ids=["request", "two outputs", "in ipywidgets.Output", "map"],
)
def test_result_is_a_new_output(cell: Kernel, code: str, result: str, display: str) -> None:
    """The view's output is emptied, and the result follows it; no update carries it."""
    cell.run(f"%config Codex.display = {display!r}")
    outputs = published(cell, code)
    (index,) = (index for index, (_, _, data) in enumerate(outputs) if result in str(data))
    kind, display_id, _ = outputs[index]
    assert kind == "display_data"
    first_kind, first_id, _ = outputs[0]
    assert (first_kind, first_id != display_id) == ("display_data", True)
    last_update = [data for _, id_, data in outputs[:index] if id_ == first_id][-1]
    assert last_update == EMPTY_BUNDLE


@pytest.mark.kernel
def test_answer_in_the_background_replaces_its_output(cell: Kernel, slow: Simulated) -> None:
    """Other cells run meanwhile, and a new output would land below those."""
    cell.run("%config Codex.display = 'text'")
    asked = cell.start("%%codex -b -o answer\n[[echo: the answer]]")
    (first,) = [m for m in cell.messages(asked) if m["msg_type"] == "display_data"]
    display_id = first["content"]["transient"]["display_id"]
    assert "the answer" not in str(first["content"]["data"])
    while True:
        message = cell.client.get_iopub_msg(timeout=60)
        if "the answer" in str(message["content"].get("data", "")):
            break
    assert message["msg_type"] == "update_display_data"
    assert message["content"]["transient"]["display_id"] == display_id


@pytest.mark.kernel
def test_picture_of_an_answer_in_the_background_lands_in_its_cell(
    cell: Kernel, slow: Simulated
) -> None:
    """Only the answer's own output is reserved; a picture is a new one, which the thread adds."""
    pytest.importorskip("ipykernel", minversion="7")
    cell.run("%config Codex.display = 'text'")
    with slow.held("a cat"):
        tool = '{"tools": [{"type": "image_generation"}]}'
        asked = cell.start(f"%%codex --raw -b -o drawn -p '{tool}'\na cat")
        cell.finish(asked)
        cell.run("1 + 1")
    cell.start("len(drawn.images)")
    while True:
        message = cell.client.get_iopub_msg(timeout=60)
        if "image/png" in message["content"].get("data", {}):
            break
    assert message["parent_header"]["msg_id"] == asked


class SlotHarness:
    """An `OutputSlot` without a front end, and what it displays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[tuple[str, Any]] = []
        self.running_cell = 1
        for name in ("display", "update_display"):
            monkeypatch.setattr(text_views, name, self._show(name))
        monkeypatch.setattr(text_views, "cell_number", lambda _: self.running_cell)
        self.slot = OutputSlot()

    def _show(self, name: str) -> Any:
        return lambda content, **_: self.shown.append((name, content))


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> SlotHarness:
    """A slot whose outputs are collected."""
    return SlotHarness(monkeypatch)


RESULT = {"text/plain": "the answer"}


def test_result_replaces_the_output_once_another_cell_runs(harness: SlotHarness) -> None:
    """A thread may outlive its cell: a new output would land below another one."""
    harness.slot.show({"text/plain": "running"})
    harness.running_cell = 2
    harness.slot.finish(RESULT, as_update=False)
    assert harness.shown[1:] == [("update_display", RESULT)]


def test_result_without_an_earlier_output_is_the_only_one(harness: SlotHarness) -> None:
    harness.slot.finish(RESULT, as_update=False)
    assert harness.shown == [("display", RESULT)]


@pytest.mark.kernel
def test_jupyter_run_prints_the_answer(slow: Simulated, tmp_path: Path) -> None:
    """It ignores updates of outputs, as jupyter console does."""
    path = tmp_path / "cells.py"
    run = "get_ipython().run_cell_magic('codex', '', '[[echo: the answer]]')"
    path.write_text(f"%load_ext nbcodex\n{run}\n")
    ran = subprocess.run(
        [sys.executable, "-m", "jupyter_client.runapp", str(path)],
        env={**os.environ, **slow.environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert len(re.findall(r"^the answer\n\ngpt-5\.6-sol · \d+ in", ran.stdout, re.MULTILINE)) == 1


@pytest.mark.kernel
def test_papermill_logs_the_answer(
    slow: Simulated,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    papermill = pytest.importorskip("papermill")
    for name, value in slow.environ.items():
        monkeypatch.setenv(name, value)
    cells = [nbformat.v4.new_code_cell(source) for source in ("%load_ext nbcodex", ANSWER, MAP)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "in.ipynb")
    with caplog.at_level(logging.INFO, logger="papermill"):
        papermill.execute_notebook(
            tmp_path / "in.ipynb",
            None,
            kernel_name="python3",
            progress_bar=False,
            log_output=True,
        )
    logged = [record.getMessage() for record in caplog.records]
    assert len([line for line in logged if line.startswith("the answer\n")]) == 1
    assert len([line for line in logged if "2 answered" in line]) == 1


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("display", "fault", "shows"),
    [
        ("text", Fault("stalled", after=5, seconds=600.0), "answering"),
        ("widget", Fault("tokens_per_minute", seconds=1.0), "Codex request"),
    ],
    ids=["while it answers", "while it waits"],
)
def test_saved_output_says_how_to_go_on(
    simulator: Simulated, tmp_path: Path, display: str, fault: Fault, shows: str
) -> None:
    """A notebook that is saved while a cell runs names the request, which can be resumed."""
    environ = {**simulator.environ, "NBCODEX_HOME": str(tmp_path / "kept")}
    simulator.core.script([fault])
    with kernel(**environ) as first:
        first.run(f"%load_ext nbcodex\n%config Codex.display = {display!r}")
        asked = first.start("%%codex -o answer\n[[tokens=2000]] Hello")
        for message in first.messages(asked):
            if "display_data" in message["msg_type"]:
                saved = message["content"]["data"]["text/plain"]
                if shows in saved:
                    break
        first.manager.shutdown_kernel(now=True)
    resume = re.search(r"`(%codex resume \w+)`", saved)
    assert resume, saved
    with kernel(**environ) as second:
        second.run("%load_ext nbcodex")
        second.run(resume[1])
        assert second.run("answer.status").plain == "'done'"
