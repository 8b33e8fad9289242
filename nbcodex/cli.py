"""The command `nbcodex`: the demo, and the doctor."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

_HERE = Path(__file__).parent
_NEEDS_LAB = "The demo needs JupyterLab: pip install 'nbcodex[lab]'"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="nbcodex", description=__doc__)
    words = parser.add_subparsers(dest="word", required=True)
    demo = words.add_parser(
        "demo",
        help="open the quick start on simulated limits, no key needed; further options go to Lab",
    )
    demo.add_argument(
        "--headless", action="store_true", help="run it in a kernel and print what happens"
    )
    words.add_parser("doctor", help="tell which settings are in force")
    chosen, rest = parser.parse_known_args(arguments)
    if rest and (chosen.word == "doctor" or chosen.headless):
        parser.error(f"there is no option {rest[0]}")
    if chosen.word == "doctor":
        return _doctor()
    if find_spec("jupyterlab") is None:
        print(_NEEDS_LAB, file=sys.stderr)
        return 1
    return _headless() if chosen.headless else _lab(rest)


def quickstart() -> Path:
    """Return the path of the quick start: in the package, or beside it in a checkout."""
    installed = _HERE / "quickstart.ipynb"
    return installed if installed.exists() else _HERE.parent / "notebooks" / "quickstart.ipynb"


def _doctor() -> int:
    from nbcodex import doctor
    from nbcodex.client import current
    from nbcodex.settings import Settings

    findings = []
    for finding in doctor.report(Settings.read(), current()):
        print(finding, flush=True)
        findings.append(finding)
    return 1 if any(finding.wrong for finding in findings) else 0


def _lab(options: list[str]) -> int:
    """Open JupyterLab on a copy of the quick start, which the user may change."""
    if getattr(os, "geteuid", lambda: 1)() == 0:
        # Lab refuses to run as root, as one is in containers; here it listens on loopback alone.
        options = ["--allow-root", *options]
    folder = Path(tempfile.mkdtemp(prefix="nbcodex-demo-"))
    copy = shutil.copy(quickstart(), folder)
    print(f"The quick start is a copy: {copy}")
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--notebook-dir",
        str(folder),
        *options,
        str(copy),
    ]
    return subprocess.call(command)  # noqa: S603 - our own interpreter, no shell


def _headless() -> int:
    from nbcodex import transcript

    return transcript.play(quickstart())
