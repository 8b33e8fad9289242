"""Jobs for the writer thread: what is to be done, how safely, and who hears of it.

Owns how jobs are taken from the queue and which of them share a transaction. Must not know SQL.
"""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

TOGETHER = 256
"""Jobs that share one transaction at most, and so one wait for the disk."""


class Level(IntEnum):
    """What a job needs: of several in one transaction, the highest counts."""

    READ = 0
    WRITE = 1  # survives the process
    SAFE = 2  # survives a power failure as well
    BARE = 3  # runs alone, outside of a transaction


@dataclass(frozen=True, slots=True)
class Job:
    """Something to do on the writer thread; `settle` takes the result or the error back."""

    work: Callable[[sqlite3.Connection], Any]
    level: Level
    default: Any
    settle: Callable[[Any, Exception | None], None]


Jobs = queue.SimpleQueue[Job | None]
"""Jobs in order; None is the word to stop."""


def take(jobs: Jobs, wait: float | None, *, not_before: float) -> list[Job | None]:
    """Return what is in the queue, after at most `wait` seconds.

    Before an instant of `time.monotonic` no writing is begun with, so that more can share a
    transaction; a reading takes along what is behind it.
    """
    taken: list[Job | None] = []
    with contextlib.suppress(queue.Empty):
        taken.append(first := jobs.get(timeout=wait))
        writes = first is not None and first.level is not Level.READ
        if writes and (rest := not_before - time.monotonic()) > 0:
            time.sleep(rest)
        while taken[-1] is not None and len(taken) < TOGETHER:
            taken.append(jobs.get_nowait())
    return taken


def groups_of(jobs: list[Job]) -> list[list[Job]]:
    """Divide `jobs` into those that share a transaction, in order."""
    groups: list[list[Job]] = []
    for job in jobs:
        alone = job.level is Level.BARE
        if not groups or alone or groups[-1][-1].level is Level.BARE:
            groups.append([])
        groups[-1].append(job)
    return groups


def resolve(future: Any, result: Any, error: Exception | None) -> None:
    """Give a future, of either kind, what came of its job, unless nobody wants it any more."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
