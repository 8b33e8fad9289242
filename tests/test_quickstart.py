"""The quick start does what it tells a newcomer, in a real kernel against the simulator."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbcodex import cli

pytestmark = pytest.mark.kernel


def test_the_demo_shows_a_limit_and_its_recovery() -> None:
    """The transcript holds a 429's figures, its countdown, the answer, and a parked request."""
    ran = subprocess.run(
        [sys.executable, "-m", "nbcodex", "demo", "--headless"],
        capture_output=True,
        text=True,
        timeout=120,
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


def test_a_cell_that_does_not_do_what_it_should_is_told(tmp_path: Path) -> None:
    """The demo's exit status is 0 only if every cell did what it should."""
    broken = (
        cli.quickstart().read_text(encoding="utf-8").replace('"shows": [', '"shows": ["never",')
    )
    copy = tmp_path / "quickstart.ipynb"
    copy.write_text(broken, encoding="utf-8")
    script = (
        "import pathlib, sys; from nbcodex import transcript\n"
        f"sys.exit(transcript.play(pathlib.Path({str(copy)!r})))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 1
    assert "'never' was not shown" in ran.stdout
