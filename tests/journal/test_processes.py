"""Several processes, killed, forked and ended in every way."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from nbcodex.journal.journal import Journal

from .conftest import output

pytestmark = pytest.mark.slow

Open = Callable[..., Journal]
Child = Callable[..., subprocess.Popen[str]]
posix = pytest.mark.skipif(sys.platform == "win32", reason="no fork, no SIGKILL")

WRITES_UNTIL_KILLED = """
    journal, n = Journal(folder), 0
    report("ready")
    async def main():
        global n
        while True:
            n += 1
            asked = Request(prompt=f"prompt {n}")
            await journal.insert(asked)
            report("added", asked.id)
            await journal.start_attempt(asked.id, 1)
            await journal.update_text(asked.id, f"half {n}")
            await journal.set_response_id(asked.id, "resp")
            report("kept", asked.id, n)
            await journal.finish(Reply(id=asked.id, text=f"whole {n}"))
            report("done", asked.id, n)
    asyncio.run(main())
"""

WRITES_FOR_A_WHILE = """
    database.LOCK_TIMEOUT_S = 100.0
    journal = Journal(folder)
    until = time.monotonic() + float(sys.argv[2])
    async def one(n):
        asked = Request(prompt="p" * 500, origin=Origin(notebook=str(os.getpid())))
        await journal.insert(asked)
        await journal.start_attempt(asked.id, 1)
        for part in range(1, 4):
            await journal.update_text(asked.id, "half " * 50 * part)
        await journal.finish(Reply(id=asked.id, text=str(n)))
    async def main():
        n = 0
        while time.monotonic() < until:
            await asyncio.gather(*[one(n + i) for i in range(4)])
            n += 4
        return n
    n = asyncio.run(main())
    assert journal.problem is None, journal.problem
    report(n)
"""


def kill_at_random(child: Child, open_journal: Open, *, rounds: int) -> None:
    """Kill a writer `rounds` times, and check every write that had been committed."""
    dice, reported = random.Random(), []
    for _ in range(rounds):
        process = child(WRITES_UNTIL_KILLED)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        time.sleep(dice.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        reported += [line.split() for line in process.stdout.read().splitlines() if line]
    journal = open_journal(clock=None)
    entries = {entry.id: entry for entry in journal.recent_entries(1_000_000)}
    for event, id_, *n in reported:
        match event:
            case "added":
                assert id_ in entries
            case "kept":
                assert entries[id_].reply.text in (f"half {n[0]}", f"whole {n[0]}")
            case "done":
                assert entries[id_].reply.text == f"whole {n[0]}"
    assert all(entry.resumable or entry.reply for entry in entries.values())
    assert len([entry for entry in entries.values() if entry.resumable]) <= rounds
    assert journal.problem is None
    assert len(reported) > rounds, "they were killed before they wrote anything"


@posix
def test_sigkill_loses_no_committed_write(child: Child, open_journal: Open) -> None:
    """The process is killed at random moments."""
    kill_at_random(child, open_journal, rounds=8)


@posix
@pytest.mark.long
def test_sigkill_loses_no_committed_write_200_times(child: Child, open_journal: Open) -> None:
    """The same, 200 times."""
    kill_at_random(child, open_journal, rounds=200)


def write_from_twenty_processes(child: Child, open_journal: Open, *, seconds: float) -> None:
    """Let 20 processes write to a new file at once, and count what they wrote."""
    writers = [child(WRITES_FOR_A_WHILE, str(seconds)) for _ in range(20)]
    written = sum(int(output(writer)[0]) for writer in writers)
    journal = open_journal(clock=None)
    assert journal.read_totals().requests == journal.read_totals().answers == written
    assert len(journal.recent_entries(1_000_000)) == written
    assert written >= 20 * 4
    assert journal.resumable_entries(notebook=None) == []
    assert journal.problem is None


def test_twenty_kernels_write_at_once(child: Child, open_journal: Open) -> None:
    """No kernel fails because of a lock, and no entry is lost."""
    write_from_twenty_processes(child, open_journal, seconds=2.0)


@pytest.mark.long
def test_twenty_kernels_write_for_a_minute(child: Child, open_journal: Open) -> None:
    """The same, for a minute."""
    write_from_twenty_processes(child, open_journal, seconds=60.0)


@posix
def test_forked_child_opens_its_own_connection(child: Child, open_journal: Open) -> None:
    """It writes as an owner of its own, and both processes continue."""
    process = child("""
        journal = Journal(folder)
        first, second, third = (Request(prompt=p) for p in "abc")
        asyncio.run(journal.insert(first))
        if (pid := os.fork()) == 0:
            assert not journal.find_entry(first.id).abandoned
            asyncio.run(journal.insert(second))
            journal.close()
            del journal
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        asyncio.run(journal.insert(third))
        assert journal.problem is None
        entries = {e.request.prompt: e.abandoned for e in journal.recent_entries()}
        assert entries == {"a": False, "b": True, "c": False}, entries
        report("fine")
    """)
    assert output(process) == ["fine"]
    assert [entry.request.prompt for entry in open_journal(clock=None).recent_entries()] == [
        "c",
        "b",
        "a",
    ]


@posix
def test_child_forked_during_writes_leaves_locks_and_log_alone(
    child: Child, open_journal: Open
) -> None:
    """Children end in every way while the parent writes."""
    process = child("""
        import threading
        journal, n, stop = Journal(folder), 0, threading.Event()
        async def write():
            global n
            while not stop.is_set():
                asked = Request(prompt=str(n))
                await journal.insert(asked)
                await journal.finish(Reply(id=asked.id))
                n += 1
        thread = threading.Thread(target=lambda: asyncio.run(write()))
        thread.start()
        for turn in range(30):
            if (pid := os.fork()) == 0:
                if turn % 3 == 0:
                    os._exit(0)
                if turn % 3 == 1:
                    journal.read_totals()
                sys.exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        stop.set()
        thread.join()
        assert journal.problem is None
        report(n)
    """)
    written = int(output(process)[0])
    journal = open_journal(clock=None)
    assert len(journal.recent_entries(1_000_000)) == written > 0
    check = journal._worker.call(
        lambda c: c.execute("PRAGMA integrity_check").fetchone()[0], default=""
    )
    assert check == "ok"


@pytest.mark.parametrize("folder_", ["folder", "None"])
def test_process_with_a_journal_ends_silently(child: Child, folder_: str) -> None:
    """A journal that was not closed leaves no warning on stderr."""
    process = child(f"""
        journal = Journal({folder_})
        asyncio.run(journal.insert(Request(prompt="p")))
        report("added")
    """)
    assert output(process) == ["added"]


def test_write_during_exit_is_committed(child: Child, open_journal: Open) -> None:
    process = child("""
        journal = Journal(folder)
        async def main():
            for n in range(200):
                asyncio.ensure_future(journal.insert(Request(prompt=str(n))))
            await asyncio.sleep(0)
        asyncio.run(main())
    """)
    assert output(process) == []
    assert len(open_journal(clock=None).recent_entries(1000)) == 200
