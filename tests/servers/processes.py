"""Runs servers of other projects as child processes on free ports."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 30.0  # a busy machine is slow
STOP_TIMEOUT_S = 5.0


def free_port() -> int:
    """Return an unused port of the loopback interface, below those that the system hands out.

    Otherwise another process could be given it before the server binds it.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def running(
    command: Sequence[str], *, port: int, log: Path, environ: Mapping[str, str] = os.environ
) -> Iterator[None]:
    """Start a server, wait until it listens on `port`, and stop it afterwards."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for(process, port, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    output = log.read_text("utf-8", "replace")
    raise AssertionError(f"{process.args!r} does not listen on port {port}; its output:\n{output}")
