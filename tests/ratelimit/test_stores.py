"""The contract of all stores, and the stored form."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from nbcodex.models import DAY, Limit
from nbcodex.ratelimit.charge_policy import Need, Permit
from nbcodex.ratelimit.rate_limiter import RateLimiter
from nbcodex.ratelimit.sharing import SharedModel, limit_state
from nbcodex.ratelimit.stores import MemoryStore, Store, decode, encode
from nbcodex.ratelimit.stores.redis import RedisStore, key_of
from nbcodex.ratelimit.stores.sqlite import EARLIER_TABLES, TABLE, SqliteStore
from nbcodex.ratelimit.token_bucket import TokenBucket
from nbcodex.ratelimit.worker import DAMAGE_NOTICE, open_store
from nbcodex.settings import LIMITER_FILENAME, Secret
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
    shared.issue_permit("b", "me", Need(10, 90), 100.0 + shared.model.permit_count)
    return shared.model.permit_count


def test_transaction_persists(store: Store) -> None:
    assert [store.transaction("b", take) for _ in range(3)] == [1, 2, 3]


def test_batched_transactions_see_each_other_and_persist(store: Store) -> None:
    with store.batch():
        assert [store.transaction("b", take) for _ in range(3)] == [1, 2, 3]
    assert store.transaction("b", take) == 4


@pytest.mark.parametrize("store", COMMITTING, indirect=True)
def test_failed_transaction_in_a_batch_is_undone_alone(store: Store) -> None:
    def fail(shared: SharedModel) -> None:
        take(shared)
        raise KeyError("no")

    with store.batch():
        store.transaction("b", take)
        with pytest.raises(KeyError):
            store.transaction("b", fail)
        assert store.transaction("b", take) == 2
    assert store.transaction("b", take) == 3


def test_models_of_different_names_are_independent(store: Store) -> None:
    store.transaction("a", take)
    assert store.transaction("b", take) == 1


def test_decoded_model_equals_the_encoded_one() -> None:
    shared = SharedModel()
    take(shared)
    shared.model.cooldown_limit = Limit(
        resource="tokens", window=60.0, limit=600, used=1, requested=2
    )
    assert decode(SharedModel, json.loads(encode(shared))) == shared


STORED_BY_0_1 = (
    "[[[[[60000,1000.0,60000,220.1,59780.8,0.0,Infinity,-Infinity,9.15,218.0],[60000,1000.0"
    ",60000,220.1,59780.8,0.0,Infinity,-Infinity,9.15,218.0],[60000,1000.0,60000,220.1,4880"
    ".8,0.0,Infinity,-Infinity,459.1,218.0]],[0.0,0.0,0.0],[-36.1,-36.1,-1836.1],214.0,0,10"
    '03.5],[500,8.3,500,220.1,488.7,0.0,Infinity,-Infinity,0.1,218.0],[{"requests 86400":["'
    'requests",86400.0,[200,0.0023,0.0,220.1,0.0,0.0,Infinity,-Infinity,0.0,0.0],220.1,61]}'
    '],[54000.0,18000.0,60.0,60,0,0.0,0.0],1.07,250.0,["requests",86400.0,200,200,1,null],0'
    '.005,null,0,false,false,220.0,100.0,0.0,162.0,60000,61,60,0.05,106.96,Infinity],{"me":'
    '[220.1,61000.0,-1e+18,100,900,0.0,0,0,0.0,0.0,65937982]},12497117,60000.0,1000,"me"]'
)


def form_of(kind: Any) -> Any:
    """Return the types of all fields in their order, all the way down."""
    if dataclasses.is_dataclass(kind):
        return [form_of(hint) for hint in get_type_hints(kind).values()]
    return [str(get_origin(kind) or kind), *map(form_of, get_args(kind))]


def test_stored_form_has_not_changed_under_its_name() -> None:
    """A new form needs a new table and Redis key, as versions run side by side."""
    digest = hashlib.blake2b(json.dumps(form_of(SharedModel)).encode(), digest_size=4).hexdigest()
    assert f"model_{digest}" == TABLE
    assert key_of("b").endswith(f":{digest}")


@pytest.mark.parametrize("table", EARLIER_TABLES)
def test_model_stored_by_an_earlier_release_is_read(tmp_path: Path, table: str) -> None:
    """Limits, cooldown and charge policy of release 0.1 are known after an update."""
    store = SqliteStore(tmp_path / "l", boot="one")
    with sqlite3.connect(tmp_path / "l") as other:
        other.execute(f"INSERT INTO {table} VALUES ('b', 'one', ?)", (STORED_BY_0_1,))
    other.close()
    state = store.transaction("b", lambda shared: limit_state(shared, "new", 221.0))
    assert state.tokens is not None
    assert (state.tokens.limit, state.cooldown_until) == (60_000, 250.0)
    assert [(each.name, each.limit) for each in state.undeclared] == [
        ("requests per day (RPD)", 200)
    ]
    assert state.cooldown_limit is not None
    assert state.cooldown_limit.window == 86_400.0
    assert (state.policy, state.output_share) == ("kept", pytest.approx(0.38, abs=0.01))
    assert store.transaction("b", lambda shared: shared.model.input_ratio) == 1.07
    store.close()
    assert (
        SqliteStore(tmp_path / "l", boot="one").transaction("b", lambda s: s.model.permit_count)
        == 61
    )


@pytest.mark.parametrize("store", COMMITTING, indirect=True)
def test_failed_transaction_changes_nothing(store: Store) -> None:
    """The store stays usable."""

    def fail(shared: SharedModel) -> None:
        take(shared)
        raise KeyError

    with pytest.raises(KeyError):
        store.transaction("b", fail)
    assert store.transaction("b", take) == 1


def test_instants_of_another_boot_are_dropped(tmp_path: Path) -> None:
    """The boot clock starts anew, and so do the numbers; the limit is still shown."""
    SqliteStore(tmp_path / "l", boot="one").transaction("b", take)

    def learn(shared: SharedModel) -> None:
        shared.model.tokens.bucket.set_limit(6_000, 100, now=100.0, stated_at=100.0)

    SqliteStore(tmp_path / "l", boot="one").transaction("b", learn)
    after = SqliteStore(tmp_path / "l", boot="two")
    assert after.transaction("b", take) == 1
    state = after.transaction("b", lambda shared: limit_state(shared, "me", 101.0))
    assert (state.tokens, state.limit_before_reboot) == (None, 6_000)


@pytest.mark.parametrize("state", ["", "[]", "{}", "[[1], {}]", "nonsense", "null", "[" * 5000])
def test_damaged_row_is_replaced(tmp_path: Path, state: str) -> None:
    store = SqliteStore(tmp_path / "l", boot="one")
    with sqlite3.connect(tmp_path / "l") as other:
        other.execute(f"INSERT INTO {TABLE} VALUES ('b', 'one', ?)", (state,))
    other.close()
    assert store.transaction("b", take) == 1
    store.close()


def spoilt_states() -> Iterator[str]:
    """Yield states in which one number is nonsense."""
    shared = SharedModel()
    shared.model.cooldown_until = 1234.5
    shared.issue_permit("other", "b", Need(1, 2), 100.0)
    text = encode(shared)
    for value in ("Infinity", "NaN", '"text"', "null", "[]", "1e300"):
        yield text.replace("1234.5", value)


@pytest.mark.parametrize("state", [*spoilt_states()], ids=range(6))  # the states differ in ids
def test_nonsense_in_the_shared_file_is_dropped_and_reported_once(
    tmp_path: Path, state: str
) -> None:
    notices: list[str] = []
    store = open_store(tmp_path / "home", notify=notices.append)
    with sqlite3.connect(tmp_path / "home" / LIMITER_FILENAME) as other:
        for name in "bc":
            row = (name, store._boot, state)  # type: ignore[attr-defined]
            other.execute(f"INSERT INTO {TABLE} VALUES (?, ?, ?)", row)
    other.close()
    assert [store.transaction(name, take) for name in "bc"] == [1, 1]
    assert notices == [DAMAGE_NOTICE]
    store.close()


@pytest.mark.parametrize("days", [368, 1000, 1e12])
def test_cooldown_longer_than_a_server_s_is_dropped(store: Store, days: float) -> None:
    def close(shared: SharedModel) -> None:
        shared.model.cooldown_until = 100.0 + days * DAY

    store.transaction("b", close)
    state = store.transaction("b", lambda shared: limit_state(shared, "me", 100.0))
    assert state.cooldown_until is None
    limiter = RateLimiter(store, process_id="me")
    answer = limiter.try_acquire(limiter.enqueue("b", Need(1, 2), lambda: None), 100.0)
    assert isinstance(answer, Permit)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda shared: setattr(shared.model.requests, "level", -1e15),
        lambda shared: setattr(shared.model.requests, "rate", 0.0),
        lambda shared: setattr(shared.model.requests, "updated_at", 1e12),
        lambda shared: setattr(shared.model.output, "in_flight", 1_000),
        lambda shared: setattr(shared.model.parallel, "trial_interval", 0.0),
        lambda shared: setattr(shared.model, "slow_down_rate", 0.0),
        lambda shared: setattr(shared.processes["me"], "renewed_at", 1e12),
    ],
)
def test_absurd_numbers_of_another_program_are_dropped(
    spoil: Callable[[SharedModel], None],
) -> None:
    shared = SharedModel()
    shared.renew_lease("me", 100.0)
    shared.model.requests = TokenBucket(60.0, 1.0, 0.0, 100.0)
    model_id = shared.model_id
    shared.renew_lease("me", 101.0)
    assert shared.model_id == model_id
    spoil(shared)
    shared.renew_lease("you", 101.0)
    assert shared.model_id != model_id
    assert set(shared.processes) == {"you"}


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
def test_concurrent_processes_lose_no_transaction(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = str(tmp_path / "l")
    if kind == "redis":
        place = request.getfixturevalue("redis").url().reveal()
    open_at(place).close()
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=work, args=(place, 100)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    store = open_at(place)
    assert store.transaction("b", take) == 301
    store.close()
