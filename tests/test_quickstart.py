"""The quick start in a real kernel against the simulator."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nbcodex import cli

pytestmark = pytest.mark.kernel


def test_the_demo_shows_a_limit_and_its_recovery() -> None:
    """The demo prints the figures of a 429, its countdown, the answer, and a parked request."""
    ran = subprocess.run(
        [sys.executable, "-m", "nbcodex", "demo", "--headless"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.count("You asked about *What is a token bucket?*") == 1  # not once per update
    assert 1 <= ran.stdout.count("if it stays open") <= 6  # nor this, which is in every update
    first, last = ran.stdout.split("Parked:")
    for part, least in ((first, 2), (last, 1)):
        waits = [
            float(seconds)
            for seconds in re.findall(r"waiting (\d+\.\d) s · tokens per minute \(TPM\)", part)
        ]
        assert len(waits) >= least
        assert waits == sorted(waits, reverse=True)
        assert re.search(r"2 attempts, waited \d", part.split("[waiting")[-1])


def test_cell_without_expected_output_fails_the_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's exit status is 0 only if every cell shows what its metadata expects."""
    cells = [
        {"cell_type": "code", "source": ["print('here')"], "metadata": {"nbcodex": {"shows": [s]}}}
        for s in ("here", "never")
    ]
    path = tmp_path / "notebook.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert cli.run_notebook(path) == 1
    printed = capsys.readouterr().out
    assert "missing output: 'never'" in printed
    assert "missing output: 'here'" not in printed


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_demo_ends_jupyterlab_when_it_is_asked_to_end(tmp_path: Path, name: str) -> None:
    package = tmp_path / "jupyterlab"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, time\nprint('child', os.getpid(), flush=True)\ntime.sleep(60)"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-m", "nbcodex", "demo"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout
        child = next(int(line.split()[1]) for line in demo.stdout if line.startswith("child"))
        demo.send_signal(getattr(signal, name))
        demo.wait(timeout=60)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
