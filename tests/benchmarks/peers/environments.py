"""The virtual environments of the compared libraries, created when they are first needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.peers.definitions import Peer

INSTALL_TIMEOUT_S = 900.0


class EnvironmentUnavailableError(Exception):
    """A library cannot be installed here; the message says why, for the table."""


def interpreter_of(peer: Peer, cache: Path) -> str:
    """Return the interpreter of a peer's environment, which is created if it does not exist.

    Raises `EnvironmentUnavailableError` if it cannot be.
    """
    if not peer.environment:
        return sys.executable
    folder = cache / peer.environment
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        try:
            subprocess.run(
                [_base(peer), "-m", "venv", str(folder)], check=True, timeout=INSTALL_TIMEOUT_S
            )
            command = [str(python), "-m", "pip", "install", "--quiet", *peer.packages]
            subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S)
        except (OSError, subprocess.SubprocessError) as exc:
            raise EnvironmentUnavailableError("could not be installed") from exc
        (folder / "complete").touch()
    return str(python)


def _base(peer: Peer) -> str:
    """Return an interpreter that is new enough for `peer`."""
    if not peer.python:
        return sys.executable
    for name in (sys.executable, f"python{peer.python}", "python3"):
        found = shutil.which(name)
        if found and _is_new_enough(found, peer.python):
            return found
    raise EnvironmentUnavailableError(f"needs Python {peer.python}, which is not installed")


def _is_new_enough(python: str, least: str) -> bool:
    wanted = tuple(int(part) for part in least.split("."))
    code = f"import sys; sys.exit(sys.version_info < {wanted})"
    return subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL).returncode == 0
