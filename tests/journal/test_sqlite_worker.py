"""How jobs are taken from the queue: those that are taken together share a transaction."""

from __future__ import annotations

from queue import SimpleQueue

import pytest

from nbcodex.journal import sqlite_worker
from nbcodex.journal.sqlite_worker import Commit, Job, JobQueue, take_jobs


def job(level: Commit) -> Job:
    return Job(lambda _: None, level)


def test_jobs_that_arrive_before_the_next_commit_share_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A write that waits for the next commit takes what has arrived meanwhile."""
    jobs: JobQueue = SimpleQueue()
    first, second = job(Commit.POWER_SAFE), job(Commit.POWER_SAFE)
    jobs.put(first)
    monkeypatch.setattr(sqlite_worker.time, "sleep", lambda _: jobs.put(second))
    assert take_jobs(jobs, 1.0, not_before=float("inf")) == [first, second]


def test_a_read_does_not_wait_for_the_next_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: JobQueue = SimpleQueue()
    read = job(Commit.READ_ONLY)
    jobs.put(read)
    monkeypatch.setattr(sqlite_worker.time, "sleep", lambda _: pytest.fail("it waited"))
    assert take_jobs(jobs, 1.0, not_before=float("inf")) == [read]
