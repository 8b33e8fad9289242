"""The quick start does what it tells a newcomer, in a real kernel against the simulator."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbcodex import transcript

pytestmark = pytest.mark.kernel


def test_the_demo_shows_a_limit_and_its_recovery() -> None:
    """The transcript holds a 429's figures, its countdown, the answer, and a parked request."""
    ran = subprocess.run(
        [sys.executable, "-m", "nbcodex", "demo", "--headless"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout
    first, last = ran.stdout.split("Parked:")
    for part, least in ((first, 4), (last, 2)):
        waits = [
            float(seconds)
            for seconds in re.findall(r"waiting (\d+\.\d) s · tokens per minute \(TPM\)", part)
        ]
        assert len(waits) >= least
        assert waits == sorted(waits, reverse=True)
        assert re.search(r"2 attempts, waited \d", part.split("[waiting")[-1])


def test_a_cell_that_does_not_do_what_it_should_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's exit status is 0 only if every cell did what it should."""
    cells = [
        {"cell_type": "code", "source": ["print('here')"], "metadata": {"nbcodex": {"shows": [s]}}}
        for s in ("here", "never")
    ]
    path = tmp_path / "notebook.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert transcript.play(path) == 1
    told = capsys.readouterr().out
    assert "'never' was not shown" in told
    assert "'here' was not shown" not in told
