"""The stores: the same contract, whoever keeps the buckets."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbcodex.models import Limit
from nbcodex.ratelimit.charge_policy import Cost
from nbcodex.ratelimit.sharing import SharedModel
from nbcodex.ratelimit.stores import MemoryStore, Store, pack, unpack
from nbcodex.ratelimit.stores.redis import RedisStore
from nbcodex.ratelimit.stores.sqlite import TABLE, SqliteStore
from nbcodex.settings import Secret
from tests.redis_server import RedisServer

MAKERS: dict[str, Callable[[Path], Store]] = {
    "memory": lambda _: MemoryStore(),
    "sqlite": lambda folder: SqliteStore(folder / "ledger.sqlite", boot="one"),
}


COMMITTING = ["sqlite", pytest.param("redis", marks=pytest.mark.server)]


@pytest.fixture(params=["memory", *COMMITTING])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param != "redis":
        yield MAKERS[request.param](tmp_path)
        return
    server: RedisServer = request.getfixturevalue("redis")
    kept = RedisStore(server.url())
    yield kept
    kept.close()


def take(shared: SharedModel) -> int:
    shared.issue_permit("b", "me", Cost(10, 90), 100.0 + shared.model.sent)
    return shared.model.sent


def test_a_deed_stays_done(store: Store) -> None:
    """What one operation changes, the next one finds."""
    assert [store.transaction("b", take) for _ in range(3)] == [1, 2, 3]


def test_deeds_that_are_done_together_stay_done(store: Store) -> None:
    """Several in one write see one another, and all of them are there afterwards."""
    with store.batch():
        assert [store.transaction("b", take) for _ in range(3)] == [1, 2, 3]
    assert store.transaction("b", take) == 4


@pytest.mark.parametrize("store", COMMITTING, indirect=True)
def test_of_deeds_done_together_one_fails_alone(store: Store) -> None:
    """A operation that raises leaves no trace; those beside it do."""

    def fail(shared: SharedModel) -> None:
        take(shared)
        raise KeyError("no")

    with store.batch():
        store.transaction("b", take)
        with pytest.raises(KeyError):
            store.transaction("b", fail)
        assert store.transaction("b", take) == 2
    assert store.transaction("b", take) == 3


def test_buckets_are_apart(store: Store) -> None:
    """What happens to one bucket does not touch another."""
    store.transaction("a", take)
    assert store.transaction("b", take) == 1


def test_everything_survives_packing() -> None:
    """A bucket that was packed and unpacked through JSON is equal to itself."""
    shared = SharedModel()
    take(shared)
    shared.model.closing_limit = Limit(
        resource="tokens", window=60.0, limit=600, used=1, requested=2
    )
    assert unpack(SharedModel, json.loads(json.dumps(pack(shared)))) == shared


@pytest.mark.parametrize("store", COMMITTING, indirect=True)
def test_a_deed_that_fails_has_changed_nothing(store: Store) -> None:
    """An exception in a operation rolls it back, and the store can be used on."""

    def fail(shared: SharedModel) -> None:
        take(shared)
        raise KeyError

    with pytest.raises(KeyError):
        store.transaction("b", fail)
    assert store.transaction("b", take) == 1


def test_another_boot_s_instants_are_forgotten(tmp_path: Path) -> None:
    """After a restart of the machine its clock begins anew, and so does the ledger."""
    SqliteStore(tmp_path / "l", boot="one").transaction("b", take)
    assert SqliteStore(tmp_path / "l", boot="two").transaction("b", take) == 1


@pytest.mark.parametrize("state", ["", "[]", "{}", "[[1], {}]", "nonsense", "null", "[" * 5000])
def test_a_damaged_row_is_learnt_again(tmp_path: Path, state: str) -> None:
    """Whatever stands in the row, the ledger goes on."""
    store = SqliteStore(tmp_path / "l", boot="one")
    with sqlite3.connect(tmp_path / "l") as other:
        other.execute(f"INSERT INTO {TABLE} VALUES ('b', 'one', ?)", (state,))
    other.close()
    assert store.transaction("b", take) == 1
    store.close()


def open_at(place: str) -> SqliteStore | RedisStore:
    """Open a store that others have open, too: a file, or a server."""
    if "://" in place:
        return RedisStore(Secret(place))
    return SqliteStore(Path(place), boot="one")


def work(place: str, times: int) -> None:
    store = open_at(place)
    for _ in range(times):
        store.transaction("b", take)
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMITTING)
def test_processes_do_not_lose_each_other_s_deeds(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Deeds of several processes at once are all kept."""
    place = str(tmp_path / "l")
    if kind == "redis":
        place = request.getfixturevalue("redis").url().reveal()
    open_at(place).close()
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=work, args=(place, 100)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    store = open_at(place)
    assert store.transaction("b", take) == 301
    store.close()
