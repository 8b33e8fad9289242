"""What one kernel sees of the others' requests."""

from __future__ import annotations

from collections.abc import Callable

from nbcodex.journal.journal import Journal
from nbcodex.journal.reads import OTHER_KERNELS_QUERY, OtherKernels
from tests.journal.conftest import ManualClock, added, run, stop_heartbeats

Open = Callable[..., Journal]


def test_requests_of_other_kernels_are_counted(
    journal: Journal, open_journal: Open, clock: ManualClock
) -> None:
    """Not counted are our own, and those that are parked or have ended."""
    other = open_journal()
    added(journal)
    for status in ("done", "parked", "failed"):
        added(other, status=status)
    assert journal.other_kernels() == OtherKernels()
    first, second, _ = (added(other) for _ in range(3))
    run(other.record_wait(first.id, 1.8e9 + 20), other.record_wait(second.id, 1.8e9 + 10))
    other.read_totals()
    assert journal.other_kernels() == OtherKernels(
        kernels=1, requests=3, waiting=2, resume_at=1.8e9 + 10
    )


def test_requests_of_dead_kernels_are_not_counted(
    journal: Journal, open_journal: Open, clock: ManualClock
) -> None:
    other = open_journal()
    added(other)
    stop_heartbeats(other)
    clock.advance(61)
    assert journal.other_kernels() == OtherKernels()


def test_counting_other_kernels_uses_the_index_of_open_entries(journal: Journal) -> None:
    plan = journal._worker.call(
        lambda connection: connection.execute(
            f"EXPLAIN QUERY PLAN {OTHER_KERNELS_QUERY}", (0,)
        ).fetchall(),
        default=[],
    )
    steps = [row[3] for row in plan]
    assert any("USING INDEX entries_open" in line for line in steps), steps
    assert not [line for line in steps if line.startswith("SCAN") and "INDEX" not in line]
