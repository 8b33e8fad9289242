"""A real redis-server on a free port of the loopback: killed, stopped and restarted at will."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbcodex.settings import Secret
from tests.servers.processes import free_port

STARTING = 30.0
"""Seconds that it has to answer; a busy machine takes its time."""


class RedisServer:
    """One redis-server, kept in memory only.

    Parameters
    ----------
    folder : Path
        Where it may put its log.
    options : sequence of str
        Its command line.
    host : str
        The address that it listens at.
    """

    def __init__(self, folder: Path, *options: str, host: str = "127.0.0.1") -> None:
        self._folder, self._options, self._host = folder, options, host
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def url(self, password: str = "", user: str = "") -> Secret:
        """Return the URL that leads here."""
        login = f"{user}:{password}@" if password else ""
        return Secret(f"redis://{login}{self._host}:{self.port}/0")

    def start(self) -> None:
        """Start it, and go on when it answers."""
        options = ["--save", "", "--appendonly", "no", "--protected-mode", "no", *self._options]
        command = [program(), "--port", str(self.port), "--bind", self._host, *options]
        with (self._folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self._folder, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + STARTING
        while b"PONG" not in (said := self.ask("PING")) and b"NOAUTH" not in said:
            assert time.monotonic() < end, (self._folder / "redis.log").read_text()
            time.sleep(0.02)

    def ask(self, *words: str) -> bytes:
        """Return what redis-cli prints."""
        command = ["redis-cli", "-h", self._host, "-p", str(self.port), *words]
        done = subprocess.run(command, capture_output=True, timeout=STARTING)
        return done.stdout + done.stderr

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def program() -> str:
    """Return redis-server; where there is none a test is skipped, but fails in CI."""
    found = shutil.which("redis-server")
    if found is None:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up("there is no redis-server")
    return found


@contextmanager
def redis_server(folder: Path, *options: str, host: str = "127.0.0.1") -> Iterator[RedisServer]:
    """Start a redis-server; end it afterwards."""
    server = RedisServer(folder, *options, host=host)
    try:
        server.start()
        yield server
    finally:
        server.stop()
