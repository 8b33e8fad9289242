"""Deleted entries are in no file."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from nbcodex.errors import EntryError
from nbcodex.journal.journal import Journal
from nbcodex.models import DAY, Reply
from nbcodex.settings import JOURNAL_FILENAME, Settings, data_folder

from .conftest import ManualClock, added, request, run

pytestmark = pytest.mark.slow

Open = Callable[..., Journal]
SECRET = "the-word-that-must-not-stay"


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


def secretive(journal: Journal) -> str:
    """Return the id of an entry that has the secret in prompt, partial text and answer."""
    asked = request(SECRET * 200)
    run(journal.insert(asked), journal.start_attempt(asked.id, 1))
    for n in range(1, 5):
        run(journal.update_text(asked.id, SECRET * 300 * n))
    run(journal.finish(Reply(id=asked.id, text=SECRET * 900), error=SECRET))
    return asked.id


@pytest.mark.parametrize("what", ["one", "all"])
def test_deleted_text_is_in_no_file(
    journal: Journal, folder: Path, clock: ManualClock, what: str
) -> None:
    """Neither in the database nor in its log, while the journal is still open."""
    id_ = secretive(journal)
    clock.advance(10)
    kept = added(journal, status="done", text="innocent")
    assert SECRET.encode() in everything(folder)
    match what:
        case "one":
            erased = run(journal.delete(id_[:7]))
        case _:
            erased = run(journal.delete())
    assert erased == (2 if what == "all" else 1)
    assert SECRET.encode() not in everything(folder)
    assert [e.id for e in journal.recent_entries()] == ([] if what == "all" else [kept.id])


@pytest.mark.parametrize("seed", range(3))
def test_deleting_all_leaves_no_text_on_disk_while_the_journal_is_off(
    folder: Path, seed: int
) -> None:
    """`journal=False` keeps new requests in memory; those on disk are deleted too."""
    dice, words = random.Random(seed), []
    on_disk = Journal(folder)
    for number in range(150):
        word = f"secret-{seed}-{number}-{dice.getrandbits(60):x}"
        words.append(word.encode())
        asked = request(word * dice.randrange(1, 60), thread=dice.choice([None, "main"]))
        run(on_disk.insert(asked))
        for length in range(dice.randrange(4)):
            run(on_disk.update_text(asked.id, word * 40 * length))
        status = dice.choice(["done", "parked", "failed"])
        text = word * dice.randrange(300)
        run(on_disk.finish(Reply(id=asked.id, text=text, status=status), error=word))
    on_disk.close()
    settings = Settings(home=folder, journal=False)
    journal = Journal(data_folder(settings))
    assert run(journal.delete()) == 150
    assert not any(word in everything(folder) for word in words)
    journal.close()
    assert not any(word in everything(folder) for word in words)


def test_log_is_truncated_once_its_readers_finish(
    journal: Journal, folder: Path, clock: ManualClock
) -> None:
    secretive(journal)
    with closing(sqlite3.connect(folder / JOURNAL_FILENAME, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM totals").fetchall()
        run(journal.delete())
        assert SECRET.encode() in everything(folder)
    clock.advance(2)
    journal.read_totals()
    journal.read_totals()
    assert SECRET.encode() not in everything(folder)


def test_ambiguous_or_unknown_id_deletes_nothing(journal: Journal) -> None:
    for id_ in ["ab000000", "ab000001"]:
        run(journal.insert(request(id=id_)))
    for prefix in ["ab", "cd", ""]:
        with pytest.raises(EntryError):
            run(journal.delete(prefix))
    assert len(journal.recent_entries()) == 2


def test_totals_survive_deletion(journal: Journal) -> None:
    added(journal, status="done")
    run(journal.delete())
    assert journal.read_totals().answers == 1


def test_entries_expire_90_days_after_their_last_change(
    journal: Journal, open_journal: Open, clock: ManualClock, folder: Path
) -> None:
    """They are deleted when the journal is opened, whatever their status."""
    secretive(journal)
    parked = added(journal, status="parked")
    for _ in range(250):
        added(journal, status="done")
    clock.advance(89 * DAY)
    assert run(journal.claim(parked.id))
    journal.close()
    clock.advance(1.5 * DAY)
    later = open_journal()
    later.read_totals()
    while later._database._is_expiring:
        later.read_totals()
    assert [entry.id for entry in later.recent_entries()] == [parked.id]
    later.read_totals()
    assert SECRET.encode() not in everything(folder)
