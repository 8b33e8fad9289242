"""What one kernel sees of the others' requests."""

from __future__ import annotations

from collections.abc import Callable

from nbcodex.journal.journal import Journal
from nbcodex.journal.reads import OTHER_KERNELS_QUERY, OtherKernels
from tests.journal.conftest import HandClock, added, fall_silent, run

Open = Callable[..., Journal]


def test_others_requests_are_counted(
    journal: Journal, open_journal: Open, clock: HandClock
) -> None:
    """Those under way in other kernels; neither our own, nor what is parked or has ended."""
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


def test_kernels_that_are_gone_do_not_count(
    journal: Journal, open_journal: Open, clock: HandClock
) -> None:
    """What a dead kernel left is abandoned, and not under way."""
    other = open_journal()
    added(other)
    fall_silent(other)
    clock.pass_(61)
    assert journal.other_kernels() == OtherKernels()


def test_nothing_is_scanned(journal: Journal) -> None:
    """The look goes by the index of what is open, however long the journal is."""
    plan = journal._worker.call(
        lambda connection: connection.execute(
            f"EXPLAIN QUERY PLAN {OTHER_KERNELS_QUERY}", (0,)
        ).fetchall(),
        default=[],
    )
    told = [row[3] for row in plan]
    assert any("USING INDEX entries_open" in line for line in told), told
    assert not [line for line in told if line.startswith("SCAN") and "INDEX" not in line]
