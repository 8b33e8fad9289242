"""The fallback from Redis to a local store and back."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nbcodex.ratelimit.charge_policy import Need, Permit
from nbcodex.ratelimit.rate_limiter import RateLimiter
from nbcodex.ratelimit.sharing import LEASE_S
from nbcodex.ratelimit.stores import MemoryStore, redis
from nbcodex.ratelimit.stores.redis import (
    MIN_LOCAL_S,
    FallbackStore,
    RedisStore,
    UnreachableError,
)
from nbcodex.ratelimit.worker import open_store
from nbcodex.settings import Secret
from tests.redis_server import RedisServer, redis_server
from tests.servers.processes import free_port

pytestmark = pytest.mark.slow

EVENT_TIMEOUT_S = 20.0  # for changes that happen by themselves, on a busy machine
# An unreachable Redis may delay an operation by a second; a busy machine may add the rest.
MAX_DELAY_S = 20.0


class SwitchableStore(MemoryStore):
    """A remote store that a test makes unreachable with `up`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.checks, self.done = True, 0, 0

    def transaction(self, name: str, operation: Callable[[Any], Any]) -> Any:
        self.done += 1
        result = super().transaction(name, operation)
        if not self.up:
            raise UnreachableError("Redis cannot be reached.")
        return result

    def reconnect(self) -> None:
        self.checks += 1
        if not self.up:
            raise UnreachableError("Redis cannot be reached.")

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def brief_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnect at short intervals."""
    monkeypatch.setattr(redis, "MAX_CHECK_INTERVAL_S", 0.1)
    monkeypatch.setattr(redis, "MIN_LOCAL_S", 0.0)


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def remote() -> SwitchableStore:
    return SwitchableStore()


@pytest.fixture
def store(
    remote: SwitchableStore, notices: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[FallbackStore]:
    monkeypatch.setattr(redis, "RECONNECT_WAIT_S", 0.01)
    with closing(FallbackStore(remote, MemoryStore(), notify=notices.append)) as made:
        yield made


def count(shared: Any) -> int:
    shared.model.permit_count += 1
    sent: int = shared.model.permit_count
    return sent


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + EVENT_TIMEOUT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_reachable_shared_store_is_used_alone(store: FallbackStore, notices: list[str]) -> None:
    """Nothing is reported, and nothing is done twice."""
    assert [store.transaction("b", count) for _ in range(3)] == [1, 2, 3]
    assert notices == []


def test_unreachable_shared_store_is_replaced_by_the_local_one(
    remote: SwitchableStore, store: FallbackStore, notices: list[str]
) -> None:
    """Operations go on, and the reason is reported once."""
    remote.up = False
    assert [store.transaction("b", count) for _ in range(3)] == [1, 2, 3]
    assert len(notices) == 1
    assert notices[0].startswith("Redis cannot be reached.")


def test_shared_store_is_used_again_once_reachable(
    remote: SwitchableStore, store: FallbackStore, notices: list[str]
) -> None:
    """Its return is reported."""
    store.transaction("b", count)
    remote.up = False
    assert store.transaction("b", count) == 1
    remote.up = True
    before = remote.done
    until(lambda: store.transaction("other", count) > 0 and remote.done > before)
    assert len(notices) == 2
    assert "again" in notices[1]


def test_flapping_store_is_reported_once_a_minute(
    remote: SwitchableStore, store: FallbackStore, notices: list[str]
) -> None:
    for _ in range(5):
        remote.up = False
        store.transaction("b", count)
        remote.up = True
        before = remote.done
        until(lambda before=before: store.transaction("b", count) > 0 and remote.done > before)  # type: ignore[misc]
    assert len(notices) == 2


def test_local_store_is_kept_until_the_shared_lease_has_expired(
    remote: SwitchableStore, notices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its requests in flight there would count twice."""
    monkeypatch.setattr(redis, "RECONNECT_WAIT_S", 0.01)
    assert MIN_LOCAL_S > LEASE_S
    monkeypatch.setattr(redis, "MIN_LOCAL_S", MIN_LOCAL_S)
    with closing(FallbackStore(remote, MemoryStore(), notify=notices.append)) as store:
        store.transaction("b", count)
        remote.up = False
        store.transaction("b", count)
        remote.up, checks = True, remote.checks
        until(lambda: remote.checks > checks)
        done = remote.done
        store.transaction("b", count)
        assert remote.done == done


def test_permit_of_one_store_counts_nothing_in_the_other(
    remote: SwitchableStore, store: FallbackStore
) -> None:
    own = store._local
    limiter = RateLimiter(store, process_id="me")
    permit = limiter.try_acquire(limiter.enqueue("b", Need(10, 90), lambda: None), 1.0)
    assert isinstance(permit, Permit)
    remote.up = False
    limiter.observe(permit, None, 2.0)
    limiter.release(permit, 3.0)
    counts = own.transaction(
        "b",
        lambda s: (
            s.model.awaiting_response,
            s.model.output.in_flight,
            s.model.max_awaiting_response,
        ),
    )
    assert counts == (0, 0, 1)


# With a real Redis.


class TimedStore:
    """A store that falls back from a real Redis, and the longest time of an operation."""

    def __init__(self, url: Secret) -> None:
        self.notices: list[str] = []
        self.longest = 0.0
        self.store = FallbackStore(RedisStore(url), MemoryStore(), notify=self.notices.append)

    def transaction(self) -> int:
        began = time.monotonic()
        try:
            return self.store.transaction("b", count)
        finally:
            self.longest = max(self.longest, time.monotonic() - began)

    def is_lost(self) -> bool:
        self.transaction()
        return len(self.notices) == 1

    def is_back(self) -> bool:
        self.transaction()
        return len(self.notices) == 2


@pytest.fixture
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow Redis all the time it needs, so that it does not seem to hang."""
    monkeypatch.setattr(redis, "TIMEOUT_S", EVENT_TIMEOUT_S)
    monkeypatch.setattr(redis, "CONNECT_WAIT_S", EVENT_TIMEOUT_S)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.mark.server
def test_killed_redis_is_bridged_until_it_is_restarted(own_redis: RedisServer) -> None:
    """Nothing fails or waits long, and both changes are reported."""
    timed = TimedStore(own_redis.url())
    with closing(timed.store):
        assert [timed.transaction() for _ in range(3)] == [1, 2, 3]
        own_redis.stop()
        until(timed.is_lost)
        assert "cannot be reached" in timed.notices[0]
        own_redis.start()
        until(timed.is_back)
    assert timed.longest < MAX_DELAY_S


@pytest.mark.server
def test_hanging_redis_delays_no_operation_for_long(own_redis: RedisServer) -> None:
    """Stopped by a signal, it accepts connections and answers none."""
    timed = TimedStore(own_redis.url())
    with closing(timed.store):
        timed.transaction()
        own_redis.send(signal.SIGSTOP)
        until(timed.is_lost)
        assert "does not answer" in timed.notices[0]
        own_redis.send(signal.SIGCONT)
        until(timed.is_back)
    assert timed.longest < MAX_DELAY_S


@pytest.mark.server
def test_dropped_connection_is_reopened_without_fallback(
    own_redis: RedisServer, slow_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis, "RECONNECT_WAIT_S", EVENT_TIMEOUT_S)
    timed = TimedStore(own_redis.url())
    with closing(timed.store):
        timed.transaction()
        own_redis.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert timed.transaction() == 2
    assert timed.notices == []


def test_missing_redis_at_the_start_delays_the_first_operation_briefly() -> None:
    """The local store is used, and that is reported."""
    timed = TimedStore(Secret(f"redis://127.0.0.1:{free_port()}"))
    with closing(timed.store):
        assert [timed.transaction(), timed.transaction()] == [1, 2]
    assert len(timed.notices) == 1
    assert timed.longest < MAX_DELAY_S


def test_server_that_never_answers_delays_no_operation_for_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        timed = TimedStore(Secret(f"redis://127.0.0.1:{silent.getsockname()[1]}"))
        with closing(timed.store):
            timed.transaction()
    assert timed.longest < MAX_DELAY_S


FULL = ("CONFIG", "SET", "maxmemory", "1")
EMPTY = ("CONFIG", "SET", "maxmemory", "0")
LOCKED = ("CONFIG", "SET", "requirepass", "new")
OPEN = ("-a", "new", "CONFIG", "SET", "requirepass", "")
CUT = ("-a", "new", "CLIENT", "KILL", "TYPE", "normal")


@pytest.mark.server
@pytest.mark.parametrize(
    ("make_unusable", "repair", "reason"),
    [([FULL], EMPTY, "no memory"), ([LOCKED, CUT], OPEN, "refuses the password")],
    ids=["full", "locked"],
)
def test_unusable_redis_is_bridged_until_it_is_usable(
    own_redis: RedisServer,
    slow_machine: None,
    make_unusable: list[tuple[str, ...]],
    repair: tuple[str, ...],
    reason: str,
) -> None:
    """Memory runs out, or a password is required, for a while."""
    timed = TimedStore(own_redis.url())
    with closing(timed.store):
        timed.transaction()
        for words in make_unusable:
            own_redis.ask(*words)
        until(timed.is_lost)
        assert reason in timed.notices[0]
        own_redis.ask(*repair)
        until(timed.is_back)


@pytest.mark.server
def test_open_store_with_a_url_shares_limits_through_redis(
    own_redis: RedisServer, tmp_path: Path
) -> None:
    made = [
        open_store(tmp_path / host, redis_url=own_redis.url(), notify=pytest.fail) for host in "ab"
    ]
    assert [store.transaction("b", count) for store in made] == [1, 2]
    for store in made:
        assert isinstance(store, FallbackStore)
        store.close()
