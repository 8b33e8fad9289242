"""Files that fail: what is reported, and that requests go on."""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from nbcodex.errors import EntryError
from nbcodex.journal.codec import equality_key
from nbcodex.journal.database import LOCK_TIMEOUT_S
from nbcodex.journal.journal import Journal
from nbcodex.journal.schema import MIGRATIONS, SCHEMA_VERSION, migrate
from nbcodex.models import Origin, Reply
from nbcodex.runtime.sqlite_files import retry_while_locked
from nbcodex.settings import JOURNAL_FILENAME

from .conftest import ManualClock, added, request, run, stop_heartbeats

Open = Callable[..., Journal]
CONSEQUENCE = "in memory only"


@pytest.fixture
def disk(folder: Path) -> Iterator[Callable[..., None]]:
    """Put the journal's folder on a file system of 1 MB; return a function that remounts it."""
    folder.mkdir(mode=0o700)
    mount = shutil.which("mount")
    options = "size=1m,mode=0700"
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", options, "none", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("this user cannot mount a small file system")

    def remount(how: str) -> None:
        subprocess.run([mount, "-o", f"remount,{how},{options}", folder], check=True)

    yield remount
    subprocess.run(["umount", "--lazy", folder], check=True)


def run_requests(journal: Journal) -> list[str]:
    """Run a request to its answer, and park and claim another; return their ids."""
    first, second = request(origin=Origin(notebook="a")), request()
    key = equality_key(first, base_url="https://a/v1")
    run(
        journal.insert(first, key=key),
        journal.start_attempt(first.id, 1),
        journal.update_text(first.id, "half"),
        journal.record_wait(first.id, 1.8e9),
        journal.finish(Reply(id=first.id, text="whole")),
        journal.find_answer(key, reply_id="new"),
        journal.insert(second),
        journal.finish(Reply(id=second.id, status="parked")),
        journal.claim(second.id),
    )
    journal.recent_entries()
    journal.resumable_entries(notebook=None)
    journal.read_totals()
    with suppress(EntryError):
        journal.find_entry("0")
    return [first.id, second.id]


def works(journal: Journal) -> bool:
    """Return whether both requests are stored as they should be."""
    answered, running = run_requests(journal)
    return (journal.find_entry(answered).reply.text, journal.find_entry(running).status) == (
        "whole",
        "running",
    )


def fill(folder: Path) -> Path:
    """Leave no byte free in `folder`."""
    filler = folder / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    return filler


def test_full_disk_stops_no_request_and_loses_no_entry(
    disk: Any, folder: Path, journal: Journal, open_journal: Open, clock: ManualClock
) -> None:
    """Requests continue in memory; once there is room, all of them are in the file."""
    before = added(journal, notebook="a")
    run(journal.start_attempt(before.id, 1), journal.update_text(before.id, "half"))
    filler = fill(folder)
    ids = []
    while not journal.problem:
        ids.append(added(journal, status="done", text="x" * 9000).id)
    assert "is full" in journal.problem
    assert CONSEQUENCE in journal.problem
    assert journal.find_entry(before.id).reply.text == "half"
    run(journal.finish(Reply(id=before.id, text="whole")))
    assert works(journal)
    with pytest.raises(EntryError, match="is full"):
        run(journal.delete())
    filler.unlink()
    clock.advance(61)
    assert works(journal)
    assert journal.problem is None
    journal.close()
    later = open_journal()
    assert later.find_entry(before.id).reply.text == "whole"
    assert {entry.id for entry in later.recent_entries(1000)} > set(ids)
    assert later.read_totals().requests == len(later.recent_entries(1000))


def test_disk_full_from_the_start_is_used_at_the_end(
    disk: Any, folder: Path, open_journal: Open
) -> None:
    """The tables do not fit, so memory is used; closing the journal tries the file once more."""
    filler = fill(folder)
    journal = open_journal()
    assert works(journal)
    assert CONSEQUENCE in (journal.problem or "")
    kept = len(journal.recent_entries())
    filler.unlink()
    journal.close()
    later = open_journal()
    assert len(later.recent_entries()) == kept
    assert later.problem is None


def test_database_that_cannot_grow_falls_back_to_memory(
    journal: Journal, clock: ManualClock
) -> None:
    """The same without root: a limit of pages simulates the full disk."""
    added(journal)
    journal._worker.call(lambda c: c.execute("PRAGMA max_page_count = 1").fetchall(), default=None)
    for _ in range(200):
        added(journal, status="parked", text="x" * 1000)
    assert "is full" in (journal.problem or "")
    assert len(journal.recent_entries(1000)) == 201
    clock.advance(61)
    added(journal)
    assert journal.problem is None
    assert len(journal.recent_entries(1000)) == 202


@pytest.mark.parametrize("exists", [True, False])
def test_read_only_folder_falls_back_to_memory(
    disk: Any, journal: Journal, open_journal: Open, exists: bool
) -> None:
    """On a real read-only file system."""
    if exists:
        added(journal)
        journal.close()
    disk("ro")
    later = open_journal()
    assert works(later)
    assert CONSEQUENCE in (later.problem or "")
    assert "read" in (later.problem or "").lower()


def test_file_system_that_turns_read_only_is_used_again_later(
    disk: Any, journal: Journal, clock: ManualClock
) -> None:
    """Linux remounts a disk with errors read-only."""
    asked = added(journal)
    journal.close()
    journal.read_totals()
    subprocess.run(["sync"], check=True)
    journal.close()
    disk("ro")
    assert works(journal)
    assert journal.problem
    disk("rw")
    clock.advance(61)
    assert works(journal)
    assert journal.problem is None
    assert journal.find_entry(asked.id).abandoned


@pytest.fixture
def written(journal: Journal, folder: Path) -> Path:
    """Return the file of a closed journal with some entries."""
    for n in range(40):
        added(journal, status="done" if n % 2 else "parked", text="text " * 300, notebook="a")
    journal.close()
    return folder / JOURNAL_FILENAME


@pytest.mark.parametrize("left", [0.02, 0.3, 0.5, 0.9, 0.999])
def test_truncated_file_is_reported_as_damaged(
    written: Path, open_journal: Open, left: float
) -> None:
    content = written.read_bytes()
    written.write_bytes(content[: int(len(content) * left)])
    journal = open_journal()
    assert works(journal)
    assert works(journal)
    assert "damaged" in (journal.problem or "")
    assert "move it away" in (journal.problem or "")


def test_file_of_zeros_is_reported(written: Path, open_journal: Open) -> None:
    """A power failure may leave such a file."""
    written.write_bytes(bytes(len(written.read_bytes())))
    journal = open_journal()
    assert works(journal)
    assert journal.problem


@pytest.mark.slow
def test_flipped_bits_do_not_raise(written: Path, open_journal: Open) -> None:
    """Whichever bit is wrong, a request is finished, in the file or in memory."""
    content, dice, problems = written.read_bytes(), random.Random(7), 0
    for _ in range(120):
        damaged = bytearray(content)
        for _ in range(dice.choice([1, 1, 20])):
            place = dice.choice([dice.randrange(len(content)), dice.randrange(5000)])
            damaged[place] ^= 1 << dice.randrange(8)
        for leftover in written.parent.iterdir():
            leftover.unlink()
        written.write_bytes(damaged)
        written.chmod(0o600)
        journal = open_journal()
        run_requests(journal)
        assert works(journal) or journal.problem
        problems += journal.problem is not None
        journal.close()
    assert problems, "nothing was damaged at all"


def test_file_overwritten_while_open_loses_no_active_entry(journal: Journal, folder: Path) -> None:
    asked = added(journal, notebook="a", variable="answer")
    run(journal.start_attempt(asked.id, 1))
    journal._worker.call(lambda c: c.execute("PRAGMA cache_size = 0").fetchall(), default=None)
    run(journal.update_text(asked.id, "half"))
    for name in [JOURNAL_FILENAME, f"{JOURNAL_FILENAME}-wal"]:
        path = folder / name
        with path.open("r+b") as file:
            file.seek(0)
            file.write(b"\xff" * path.stat().st_size)
    for _ in range(5):
        assert works(journal)
    entry = journal.find_entry(asked.id)
    origin = entry.request.origin
    assert (entry.request.prompt, origin.notebook, origin.variable) == (asked.prompt, "a", "answer")
    assert CONSEQUENCE in (journal.problem or "")


@pytest.mark.parametrize("column", ["request", "reply"])
def test_damaged_row_does_not_hide_others(journal: Journal, column: str) -> None:
    """Lists leave it out, and finding it by id reports that it is damaged."""
    key = equality_key(request(), base_url="https://a/v1")
    bad = added(journal, status="done", key=key)
    good = added(journal, status="done")
    wrong = [
        "{",
        "[]",
        "7",
        '{"__record__": "Request"}',
        '{"__record__": "Reply"}',
        "\x00",
        "[" * 9**5,
    ]
    for text in wrong:
        update = {
            "request": "UPDATE entries SET request = ? WHERE id = ?",
            "reply": "UPDATE entries SET reply = ? WHERE id = ?",
        }[column]
        journal._worker.call(
            lambda c, u=update, t=text: [c.execute(u, (t, bad.id))],  # type: ignore[misc]
            default=None,
        )
        assert [entry.id for entry in journal.recent_entries()] == [good.id]
        assert run(journal.find_answer(key, reply_id="new")) is None
        with pytest.raises(EntryError, match="damaged"):
            journal.find_entry(bad.id)


def test_file_of_a_newer_version_is_left_alone(written: Path, open_journal: Open) -> None:
    """The message says to update."""
    with closing(sqlite3.connect(written)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + len(MIGRATIONS) + 1}")
    content = written.read_bytes()
    journal = open_journal()
    assert works(journal)
    assert "newer nbcodex" in (journal.problem or "")
    journal.close()
    assert written.read_bytes() == content


def test_file_of_another_program_is_left_alone(folder: Path, open_journal: Open) -> None:
    folder.mkdir(mode=0o700)
    with closing(sqlite3.connect(folder / JOURNAL_FILENAME)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    journal = open_journal()
    assert works(journal)
    assert "another program" in (journal.problem or "")
    journal.close()
    with closing(sqlite3.connect(folder / JOURNAL_FILENAME)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]


@pytest.mark.parametrize("when", ["from the start", "in mid-life"])
def test_locked_file_delays_a_request_and_stops_none(
    written: Path,
    open_journal: Open,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    monkeypatch.setattr("nbcodex.journal.database.LOCK_TIMEOUT_S", 0.05)
    journal = open_journal()
    if when == "in mid-life":
        journal.read_totals()
    with closing(sqlite3.connect(written, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE" if when != "in mid-life" else "SELECT 1")
        other.execute("BEGIN EXCLUSIVE")
        other.execute("DELETE FROM owners")
        assert works(journal)
        assert "locked" in (journal.problem or "")
        other.execute("ROLLBACK")
    clock.advance(61)
    assert works(journal)
    assert journal.problem is None
    journal.close()
    assert len(open_journal().recent_entries(1000)) == 44


@pytest.mark.parametrize("whole_folder", [True, False])
def test_writes_after_a_deletion_go_to_a_new_file(
    journal: Journal, open_journal: Open, folder: Path, whole_folder: bool
) -> None:
    """No other process could open the old one."""
    asked = added(journal)
    if whole_folder:
        shutil.rmtree(folder)
    else:
        (folder / JOURNAL_FILENAME).unlink()
    assert works(journal)
    run(journal.finish(Reply(id=asked.id, text="kept")))
    assert journal.problem is None
    assert open_journal().find_entry(asked.id).reply.text == "kept"


@pytest.mark.parametrize("event", ["outage", "checkpoint"])
def test_lock_timeout_stays_the_same(journal: Journal, folder: Path, event: str) -> None:
    """For what happens then it is shorter."""
    added(journal)
    if event == "outage":
        (folder / JOURNAL_FILENAME).unlink()
        added(journal)
    else:
        run(journal.delete())
    assert journal.problem is None
    found = journal._worker.call(
        lambda c: c.execute("PRAGMA busy_timeout").fetchone()[0], default=0
    )
    assert found == 1_000 * LOCK_TIMEOUT_S


def test_entry_claimed_during_an_outage_stays_with_its_new_owner(
    journal: Journal, open_journal: Open, clock: ManualClock
) -> None:
    asked = added(journal)
    journal._worker.call(lambda c: c.execute("PRAGMA max_page_count = 1").fetchall(), default=None)
    while not journal.problem:
        added(journal, status="parked", text="x" * 9000)
    other = open_journal()
    stop_heartbeats(journal)
    clock.advance(61)
    assert run(other.claim(asked.id))
    run(journal.update_text(asked.id, "ours"))
    assert journal.find_entry(asked.id).reply.text == ""
    assert journal.problem is None
    theirs = other.find_entry(asked.id)
    assert (theirs.status, theirs.reply.text) == ("running", "")


def test_rolled_back_heartbeat_is_written_again(journal: Journal) -> None:
    """Otherwise active entries would seem abandoned to another kernel."""

    def fail(_: sqlite3.Connection) -> None:
        raise ValueError("only this job fails")

    async def together() -> None:
        await asyncio.gather(journal.insert(request()), journal._worker.run(fail, default=None))

    asyncio.run(together())
    owners = journal._worker.call(
        lambda c: c.execute("SELECT count(*) FROM owners").fetchone()[0], default=0
    )
    assert owners == 1


def test_text_that_is_not_utf8_is_read_with_replacements(journal: Journal) -> None:
    asked = added(journal, status="done")
    journal._worker.call(
        lambda c: [c.execute("UPDATE entries SET text = CAST(x'61ff62' AS TEXT)")], default=None
    )
    assert journal.find_entry(asked.id).reply.text == "a\N{REPLACEMENT CHARACTER}b"
    assert journal.problem is None


@pytest.mark.parametrize(
    ("code", "timeout", "tries"), [("BUSY", 5.0, 3), ("BUSY", 0.0, 1), ("FULL", 5.0, 1)]
)
def test_only_locks_are_retried(code: str, timeout: float, tries: int) -> None:
    """They are retried until `timeout` ends; other errors are raised at once."""
    calls = []

    def step() -> str:
        calls.append(1)
        if len(calls) < 3:
            error = sqlite3.OperationalError(code)
            error.sqlite_errorcode = getattr(sqlite3, f"SQLITE_{code}")
            raise error
        return "done"

    with nullcontext() if tries == 3 else pytest.raises(sqlite3.OperationalError, match=code):
        assert retry_while_locked(step, timeout=timeout) == "done"
    assert len(calls) == tries


def test_two_processes_can_create_the_file_at_once(tmp_path: Path) -> None:
    """A process that reads a new file while another one fills it sees one state of it."""
    connections = [sqlite3.connect(tmp_path / "new", isolation_level=None) for _ in range(2)]
    with closing(connections[0]) as ours, closing(connections[1]) as theirs:
        ours.execute("PRAGMA journal_mode = WAL")

        def meanwhile(statement: str) -> None:
            if "sqlite_master" in statement:
                ours.set_trace_callback(None)
                migrate(theirs)

        ours.set_trace_callback(meanwhile)
        migrate(ours)
        assert ours.execute("SELECT count(*) FROM totals").fetchone() == (1,)
