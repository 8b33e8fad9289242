"""Who runs an entry, and when it counts as abandoned."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from nbcodex.journal.journal import Journal
from nbcodex.journal.owner import Owner, is_gone, is_provably_dead, read_process
from nbcodex.models import NOTE_POSSIBLY_PAID, NOTE_POSSIBLY_PAID_TWICE, Reply

from .conftest import ManualClock, added, output, request, run, stop_heartbeats

Open = Callable[..., Journal]
HERE = Owner(id=1, machine="h", boot="b", pid_namespace="s", pid=100, start_ticks=5000)
OTHER = replace(HERE, id=2, pid=200, start_ticks=6000)


@pytest.mark.parametrize(
    ("owner", "seen", "dead"),
    [
        pytest.param(OTHER, ("S", 6000), False, id="alive"),
        pytest.param(OTHER, None, True, id="gone"),
        pytest.param(OTHER, ("S", 6001), True, id="its pid is used again"),
        pytest.param(OTHER, ("Z", 6000), True, id="zombie"),
        pytest.param(OTHER, ("T", 6000), False, id="only stopped"),
        pytest.param(OTHER, ("?", 0), False, id="cannot be read"),
        pytest.param(replace(OTHER, machine="g"), None, False, id="another host"),
        pytest.param(replace(OTHER, boot="c"), None, False, id="another boot"),
        pytest.param(replace(OTHER, pid_namespace="t"), None, False, id="another container"),
        pytest.param(replace(OTHER, boot=""), None, False, id="an unknown boot"),
        pytest.param(replace(OTHER, pid_namespace=""), None, False, id="an unknown container"),
        pytest.param(replace(OTHER, start_ticks=0), None, False, id="an unknown start"),
    ],
)
def test_process_is_provably_dead_only_on_the_same_machine(
    monkeypatch: pytest.MonkeyPatch, owner: Owner, seen: tuple[str, int] | None, dead: bool
) -> None:
    """A missing or different process is proof only where pids mean the same."""
    monkeypatch.setattr("nbcodex.journal.owner.read_process", lambda _: seen)
    assert is_provably_dead(owner, observer=HERE) is dead


def test_nothing_is_proven_on_a_platform_without_process_identity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nbcodex.journal.owner.read_process", lambda _: None)
    unknown = replace(HERE, boot="", pid_namespace="")
    assert not is_provably_dead(replace(unknown, pid=200), observer=unknown)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_real_process_is_dead_once_killed_even_as_a_zombie() -> None:
    """Reads /proc for a child that is alive, then a zombie, then reaped."""
    process = subprocess.Popen(["sleep", "60"])
    seen = read_process(process.pid)
    assert seen is not None
    owner = replace(Owner.of_this_process(), id=2, pid=process.pid, start_ticks=seen[1])
    assert not is_provably_dead(owner, observer=Owner.of_this_process())
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_provably_dead(owner, observer=Owner.of_this_process())
    process.wait()
    assert is_provably_dead(owner, observer=Owner.of_this_process())


def gone_check(owner: Owner, clock: ManualClock) -> Callable[[], bool]:
    """Return a function that asks whether an owner is gone whose heartbeat is of this moment."""
    connection: Any = SimpleNamespace(owner=HERE, clock=clock)
    row: Any = {
        "owner": owner.id,
        "host": owner.machine,
        "boot": owner.boot,
        "space": owner.pid_namespace,
        "pid": owner.pid,
        "start": owner.start_ticks,
        "beat_at": clock.wall(),
        "beat_now": clock.now(),
    }
    return lambda: is_gone(connection, row)


@pytest.mark.parametrize("jump", [3600.0, -3600.0, 86_400.0 * 365])
def test_wall_clock_jump_does_not_change_heartbeat_age_within_a_boot(
    clock: ManualClock, jump: float
) -> None:
    """Within a boot only the boot clock counts."""
    is_owner_gone = gone_check(replace(OTHER, pid_namespace="t"), clock)
    clock.epoch += jump
    assert not is_owner_gone()
    clock.boot += 61
    assert is_owner_gone()


def test_heartbeat_of_another_host_ages_by_the_wall_clock(clock: ManualClock) -> None:
    """A heartbeat from the future is a sign of life."""
    is_owner_gone = gone_check(replace(OTHER, machine="g", boot="c"), clock)
    clock.epoch += 60
    assert not is_owner_gone()
    clock.epoch += 1
    assert is_owner_gone()
    clock.epoch -= 3600
    assert not is_owner_gone()


@pytest.mark.parametrize("step", ["pending", "running", "waiting"])
def test_entry_without_heartbeat_is_abandoned_after_a_minute(
    journal: Journal, open_journal: Open, clock: ManualClock, step: str
) -> None:
    """After 60 s without a heartbeat another kernel sees it as abandoned, and may claim it."""
    asked = added(journal, notebook="a")
    if step != "pending":
        run(journal.start_attempt(asked.id, 1))
    if step == "waiting":
        run(journal.record_wait(asked.id, 1.8e9))
    other = open_journal()
    assert not other.find_entry(asked.id).abandoned
    assert not run(other.claim(asked.id))
    stop_heartbeats(journal)
    clock.advance(61)
    assert other.find_entry(asked.id).abandoned
    assert [entry.id for entry in other.resumable_entries(notebook="a")] == [asked.id]
    assert run(other.claim(asked.id))
    assert other.find_entry(asked.id).status == "running"


def test_heartbeats_continue_while_an_entry_is_active(
    journal: Journal, open_journal: Open, clock: ManualClock
) -> None:
    asked, other = added(journal), open_journal()
    for _ in range(20):
        clock.advance(11)
        journal.read_totals()
        assert not other.find_entry(asked.id).abandoned


def test_no_heartbeat_is_scheduled_without_active_entries(journal: Journal) -> None:
    """The thread then sleeps, and does not touch the disk."""
    asked = added(journal)
    assert journal._database._due_in() < math.inf
    run(journal.finish(Reply(id=asked.id)))
    assert journal._database._due_in() == math.inf


def test_own_entries_are_not_abandoned_after_sleep(journal: Journal, clock: ManualClock) -> None:
    asked = added(journal)
    clock.advance(8 * 3600)
    assert not journal.find_entry(asked.id).abandoned
    assert journal.resumable_entries(notebook=None) == []


def test_closing_a_journal_abandons_its_entries_at_once(
    journal: Journal, open_journal: Open
) -> None:
    asked = added(journal)
    journal.close()
    assert open_journal().find_entry(asked.id).abandoned


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_entries_of_a_killed_kernel_are_abandoned_at_once(
    open_journal: Open, child: Callable[..., subprocess.Popen[str]]
) -> None:
    process = child("""
        journal, asked = Journal(folder), Request(prompt="p")
        asyncio.run(journal.insert(asked))
        asyncio.run(journal.start_attempt(asked.id, 1))
        report(asked.id)
        time.sleep(60)
    """)
    assert process.stdout
    id_ = process.stdout.readline().strip()
    journal = open_journal(clock=None)
    assert not journal.find_entry(id_).abandoned
    process.send_signal(signal.SIGKILL)
    process.wait()
    entry = journal.find_entry(id_)
    assert (entry.abandoned, entry.possibly_paid) == (True, True)


@pytest.mark.parametrize(
    ("steps", "possibly"),
    [
        ([], False),
        (["start_attempt"], True),
        (["start_attempt", "set_response_id"], False),
        (["start_attempt", "record_wait"], False),
    ],
)
def test_only_an_attempt_without_response_id_is_possibly_paid(
    journal: Journal, open_journal: Open, steps: list[str], possibly: bool
) -> None:
    asked = added(journal)
    arguments: dict[str, tuple[Any, ...]] = {"start_attempt": (1,), "set_response_id": ("resp",)}
    for step in steps:
        run(getattr(journal, step)(asked.id, *arguments.get(step, ())))
    journal.close()
    assert open_journal().find_entry(asked.id).possibly_paid is possibly


@pytest.mark.parametrize("then", ["waiting", "running", "parked"])
def test_possibly_paid_note_survives_later_attempts(
    journal: Journal, open_journal: Open, then: str
) -> None:
    """The outcome of a lost attempt stays unknown, even if the next one has a response id."""
    asked = added(journal)
    run(
        journal.start_attempt(asked.id, 1),
        journal.record_wait(asked.id, notes=(NOTE_POSSIBLY_PAID_TWICE,)),
    )
    if then == "running":
        run(journal.start_attempt(asked.id, 2), journal.set_response_id(asked.id, "resp"))
    if then == "parked":
        notes = (NOTE_POSSIBLY_PAID,)
        run(journal.finish(Reply(id=asked.id, status="parked", notes=notes)))
    journal.close()
    assert open_journal().find_entry(asked.id).possibly_paid


@pytest.mark.parametrize(
    ("status", "granted"),
    [
        ("parked", True),
        ("interrupted", True),
        ("failed", True),
        ("done", False),
        ("cancelled", False),
        (None, False),
    ],
)
def test_claim_succeeds_only_for_resumable_statuses(
    journal: Journal, open_journal: Open, status: str | None, granted: bool
) -> None:
    asked = added(journal, status=status)
    assert run(open_journal().claim(asked.id)) is granted


def test_second_claim_fails(journal: Journal, open_journal: Open) -> None:
    """So does the claim of an entry that does not exist."""
    asked = added(journal, status="parked")
    assert run(open_journal().claim(asked.id))
    assert not run(open_journal().claim(asked.id))
    assert not run(open_journal().claim("ffffffff"))


def test_former_owner_can_write_only_an_answer(
    journal: Journal, open_journal: Open, clock: ManualClock
) -> None:
    """A kernel that was taken for dead and wakes up changes nothing, except by its answer."""
    asked, other = added(journal), open_journal()
    stop_heartbeats(journal)
    clock.advance(61)
    assert run(other.claim(asked.id))
    run(
        journal.start_attempt(asked.id, 9),
        journal.update_text(asked.id, "stale"),
        journal.finish(Reply(id=asked.id, status="parked")),
    )
    entry = other.find_entry(asked.id)
    assert (entry.status, entry.reply.text, entry.reply.attempts) == ("running", "", 0)
    run(journal.finish(Reply(id=asked.id, text="paid for")))
    assert other.find_entry(asked.id).reply.text == "paid for"


def test_late_answer_does_not_replace_an_answer(
    journal: Journal, open_journal: Open, clock: ManualClock
) -> None:
    asked, other = added(journal), open_journal()
    stop_heartbeats(journal)
    clock.advance(61)
    assert run(other.claim(asked.id))
    run(other.finish(Reply(id=asked.id, text="first")))
    run(journal.finish(Reply(id=asked.id, text="late")))
    assert other.find_entry(asked.id).reply.text == "first"


@pytest.mark.slow
def test_exactly_one_of_many_kernels_claims_an_entry(
    open_journal: Open, child: Callable[..., subprocess.Popen[str]]
) -> None:
    """In 200 rounds three processes claim the same entry at once: each time exactly one wins."""
    journal = open_journal(clock=None)
    ids = [added(journal, status="parked").id for _ in range(200)]
    claims = """
        journal = Journal(folder)
        async def main():
            for line in sys.stdin:
                report(int(await journal.claim(line.strip())))
            assert journal.problem is None, journal.problem
        asyncio.run(main())
    """
    kernels = [child(claims) for _ in range(3)]
    wins = []
    for id_ in ids:
        kernels.append(kernels.pop(0))
        for kernel in kernels:
            assert kernel.stdin
            print(id_, file=kernel.stdin, flush=True)
        wins.append([int(kernel.stdout.readline()) for kernel in kernels if kernel.stdout])
    assert [sum(round_) for round_ in wins] == [1] * len(ids)
    assert len(set(map(tuple, wins))) > 1, "the same one always came first"
    for kernel in kernels:
        output(kernel)


def test_entry_with_unknown_owner_is_abandoned(journal: Journal, open_journal: Open) -> None:
    """An entry whose owner is unknown to the file is abandoned, not lost."""
    asked = request()
    run(journal.insert(asked))
    journal._worker.call(lambda c: c.execute("DELETE FROM owners") and None, default=None)
    assert open_journal().find_entry(asked.id).abandoned
