"""The stores: the same contract, whoever keeps the buckets."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from nbcodex.pacing.packing import pack, unpack
from nbcodex.pacing.reservation import Cost
from nbcodex.pacing.shares import Shared
from nbcodex.pacing.stores import Store
from nbcodex.pacing.stores.memory import MemoryStore
from nbcodex.pacing.stores.sqlite import _TABLE, SqliteStore
from nbcodex.records import Limit

MAKERS: dict[str, Callable[[Path], Store]] = {
    "memory": lambda _: MemoryStore(),
    "sqlite": lambda folder: SqliteStore(folder / "ledger.sqlite", boot="one"),
}


@pytest.fixture(params=MAKERS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MAKERS[request.param](tmp_path)


def take(shared: Shared) -> int:
    shared.take("b", "me", Cost(10, 90), 100.0 + shared.bucket.sent)
    return shared.bucket.sent


def test_a_deed_stays_done(store: Store) -> None:
    """What one deed changes, the next one finds."""
    assert [store.deal("b", take) for _ in range(3)] == [1, 2, 3]


def test_buckets_are_apart(store: Store) -> None:
    """What happens to one bucket does not touch another."""
    store.deal("a", take)
    assert store.deal("b", take) == 1


def test_everything_survives_packing() -> None:
    """A bucket that was packed and unpacked through JSON is equal to itself."""
    shared = Shared()
    take(shared)
    shared.bucket.limit = Limit(resource="tokens", window=60.0, limit=600, used=1, requested=2)
    assert unpack(Shared, json.loads(json.dumps(pack(shared)))) == shared


def test_a_deed_that_fails_has_changed_nothing(tmp_path: Path) -> None:
    """An exception in a deed rolls it back, and the file can be used on."""
    store = MAKERS["sqlite"](tmp_path)

    def fail(shared: Shared) -> None:
        take(shared)
        raise KeyError

    with pytest.raises(KeyError):
        store.deal("b", fail)
    assert store.deal("b", take) == 1


def test_another_boot_s_instants_are_forgotten(tmp_path: Path) -> None:
    """After a restart of the machine its clock begins anew, and so does the ledger."""
    SqliteStore(tmp_path / "l", boot="one").deal("b", take)
    assert SqliteStore(tmp_path / "l", boot="two").deal("b", take) == 1


@pytest.mark.parametrize("state", ["", "[]", "{}", "[[1], {}]", "nonsense", "null", "[" * 5000])
def test_a_damaged_row_is_learnt_again(tmp_path: Path, state: str) -> None:
    """Whatever stands in the row, the ledger goes on."""
    store = SqliteStore(tmp_path / "l", boot="one")
    with sqlite3.connect(tmp_path / "l") as other:
        other.execute(f"INSERT INTO {_TABLE} VALUES ('b', 'one', ?)", (state,))
    other.close()
    assert store.deal("b", take) == 1
    store.close()


def work(path: Path, times: int) -> None:
    store = SqliteStore(path, boot="one")
    for _ in range(times):
        store.deal("b", take)
    store.close()


def test_processes_do_not_lose_each_other_s_deeds(tmp_path: Path) -> None:
    """Deeds of several processes at once are all kept."""
    path = tmp_path / "l"
    SqliteStore(path, boot="one").close()
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=work, args=(path, 100)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    store = SqliteStore(path, boot="one")
    assert store.deal("b", take) == 301
    store.close()
