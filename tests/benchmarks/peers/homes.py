"""The virtual environments that peers live in, made when they are first needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.peers.roster import Peer

PATIENCE = 900.0
"""Seconds that an installation may take."""


class NoHomeError(Exception):
    """A peer cannot be installed here; the message says why, for the table."""


def python_of(peer: Peer, cache: Path) -> str:
    """Return the interpreter that has `peer`, installed by its name if it is not yet there.

    Raises
    ------
    NoHomeError
        If it cannot be.
    """
    if not peer.home:
        return sys.executable
    home = cache / peer.home
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        try:
            subprocess.run([_base(peer), "-m", "venv", str(home)], check=True, timeout=PATIENCE)
            command = [str(python), "-m", "pip", "install", "--quiet", *peer.needs]
            subprocess.run(command, check=True, timeout=PATIENCE)
        except (OSError, subprocess.SubprocessError) as exc:
            raise NoHomeError("could not be installed") from exc
        (home / "complete").touch()
    return str(python)


def _base(peer: Peer) -> str:
    """Return an interpreter that is new enough for `peer`."""
    if not peer.python:
        return sys.executable
    for name in (sys.executable, f"python{peer.python}", "python3"):
        found = shutil.which(name)
        if found and _is_new_enough(found, peer.python):
            return found
    raise NoHomeError(f"needs Python {peer.python}, which is not here")


def _is_new_enough(python: str, least: str) -> bool:
    wanted = tuple(int(part) for part in least.split("."))
    code = f"import sys; sys.exit(sys.version_info < {wanted})"
    return subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL).returncode == 0
