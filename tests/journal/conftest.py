"""Journals on a clock that only tests move, and processes that use one for real."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nbcodex.journal.journal import Journal
from nbcodex.models import Origin, Reply, Request

ROOT = Path(__file__).parents[2]


class ManualClock:
    """A clock whose two times are set by hand, each by itself."""

    def __init__(self) -> None:
        self.boot, self.epoch = 5_000.0, 1_800_000_000.0

    def now(self) -> float:
        return self.boot

    def wall(self) -> float:
        return self.epoch

    async def wait(self, until: float, *, unless: asyncio.Event | None = None) -> bool:
        raise AssertionError("the journal never waits")

    def advance(self, seconds: float) -> None:
        """Advance both times."""
        self.boot += seconds
        self.epoch += seconds


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal-home"


@pytest.fixture
def open_journal(folder: Path, clock: ManualClock) -> Iterator[Callable[..., Journal]]:
    """Return a function that opens journals in one folder, as several kernels do."""
    with ExitStack() as stack:

        def make(where: Path | None = folder, **options: Any) -> Journal:
            journal = Journal(where, **{"clock": clock, **options})
            stack.callback(journal.close)
            return journal

        yield make


@pytest.fixture
def journal(open_journal: Callable[..., Journal]) -> Journal:
    return open_journal()


def run(*steps: Any) -> Any:
    """Await `steps` in order on a loop of their own; return what the last one returned."""

    async def all_of_them() -> Any:
        result = None
        for step in steps:
            result = await step
        return result

    return asyncio.run(all_of_them())


def request(prompt: str = "Why is the sky blue?", **fields: Any) -> Request:
    return Request(prompt=prompt, **fields)


def added(
    journal: Journal,
    *,
    status: str | None = None,
    text: str = "",
    key: bytes | None = None,
    attempt: int | None = None,
    **origin: Any,
) -> Request:
    """Return a request that `journal` holds, finished with `status` if one is given."""
    asked = request(origin=Origin(**origin))
    run(journal.insert(asked, key=key, attempt=attempt))
    if status is not None:
        run(journal.finish(Reply(id=asked.id, text=text, status=status)))  # type: ignore[arg-type]
    return asked


def stop_heartbeats(journal: Journal) -> None:
    """Stop the heartbeats of `journal`, as a frozen machine does."""
    journal._database.maintain = lambda: None  # type: ignore[method-assign]


PRELUDE = """
import asyncio, os, sys, time
from pathlib import Path
from nbcodex.journal import database
from nbcodex.journal.journal import Journal
from nbcodex.models import Origin, Reply, Request
folder = Path(sys.argv[1])
def report(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""


@pytest.fixture
def child(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts Python processes, with the journal's folder as ``folder``."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, *arguments: str) -> subprocess.Popen[str]:
        whole = PRELUDE + textwrap.dedent(script)
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", whole, str(folder), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def output(process: subprocess.Popen[str]) -> list[str]:
    """Return what a child printed; fail if it wrote to stderr."""
    out, err = process.communicate(timeout=300)
    assert not err, err
    assert process.returncode == 0
    return out.splitlines()
