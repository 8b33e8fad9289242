"""Redis is lost and comes back, and no request notices more than a moment of it."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nbcodex.ratelimit.charge_policy import Cost, Permit
from nbcodex.ratelimit.rate_limiter import RateLimiter
from nbcodex.ratelimit.sharing import LEASE_S
from nbcodex.ratelimit.stores import MemoryStore, UnreachableError, redis
from nbcodex.ratelimit.stores.redis import MIN_LOCAL_S, FallbackStore, RedisStore
from nbcodex.ratelimit.worker import open_store
from nbcodex.settings import Secret
from tests.redis_server import RedisServer, redis_server
from tests.servers.processes import free_port

PATIENT = 20.0
"""Seconds in which what must come by itself has come, on a busy machine."""
LONGEST = 1.0
"""Seconds that a operation may wait because of Redis, and what a busy machine adds."""
BUSY = 1.0


class Shaky(MemoryStore):
    """A remote store that can be used or not, as the test says."""

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
    """Looks for Redis follow fast on each other."""
    monkeypatch.setattr(redis, "MAX_CHECK_INTERVAL_S", 0.1)
    monkeypatch.setattr(redis, "MIN_LOCAL_S", 0.0)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def shaky() -> Shaky:
    return Shaky()


@pytest.fixture
def store(
    shaky: Shaky, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[FallbackStore]:
    monkeypatch.setattr(redis, "RECONNECT_WAIT_S", 0.01)
    with closing(FallbackStore(shaky, MemoryStore(), notify=said.append)) as made:
        yield made


def count(shared: Any) -> int:
    shared.model.sent += 1
    sent: int = shared.model.sent
    return sent


def until(condition: Callable[[], bool]) -> None:
    """Wait for what comes by itself."""
    end = time.monotonic() + PATIENT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_reachable_shared_store_is_used_alone(store: FallbackStore, said: list[str]) -> None:
    """Nothing is reported, and nothing is done twice."""
    assert [store.transaction("b", count) for _ in range(3)] == [1, 2, 3]
    assert said == []


def test_unreachable_shared_store_is_replaced_by_the_local_one(
    shaky: Shaky, store: FallbackStore, said: list[str]
) -> None:
    """Operations go on, and the reason is reported once."""
    shaky.up = False
    assert [store.transaction("b", count) for _ in range(3)] == [1, 2, 3]
    assert len(said) == 1
    assert said[0].startswith("Redis cannot be reached.")


def test_shared_store_is_used_again_once_reachable(
    shaky: Shaky, store: FallbackStore, said: list[str]
) -> None:
    """Its return is reported."""
    store.transaction("b", count)
    shaky.up = False
    assert store.transaction("b", count) == 1
    shaky.up = True
    before = shaky.done
    until(lambda: store.transaction("other", count) > 0 and shaky.done > before)
    assert len(said) == 2
    assert "again" in said[1]


def test_flapping_store_is_reported_once_a_minute(
    shaky: Shaky, store: FallbackStore, said: list[str]
) -> None:
    for _ in range(5):
        shaky.up = False
        store.transaction("b", count)
        shaky.up = True
        before = shaky.done
        until(lambda before=before: store.transaction("b", count) > 0 and shaky.done > before)  # type: ignore[misc]
    assert len(said) == 2


def test_local_store_is_kept_until_the_shared_lease_has_expired(
    shaky: Shaky, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what it had under way there would count twice."""
    monkeypatch.setattr(redis, "RECONNECT_WAIT_S", 0.01)
    assert MIN_LOCAL_S > LEASE_S
    monkeypatch.setattr(redis, "MIN_LOCAL_S", MIN_LOCAL_S)
    with closing(FallbackStore(shaky, MemoryStore(), notify=said.append)) as store:
        store.transaction("b", count)
        shaky.up = False
        store.transaction("b", count)
        shaky.up, checks = True, shaky.checks
        until(lambda: shaky.checks > checks)
        done = shaky.done
        store.transaction("b", count)
        assert shaky.done == done


def test_permit_of_one_store_counts_nothing_in_the_other(
    shaky: Shaky, store: FallbackStore
) -> None:
    own = store._local
    limiter = RateLimiter(store, holder="me")
    given = limiter.try_acquire(limiter.enqueue("b", Cost(10, 90), lambda: None), 1.0)
    assert isinstance(given, Permit)
    shaky.up = False
    limiter.observe(given, None, 2.0)
    limiter.release(given, 3.0)
    counts = own.transaction(
        "b", lambda s: (s.model.unanswered, s.model.output.in_flight, s.model.max_unanswered)
    )
    assert counts == (0, 0, 1)


# A real one.


class Rig:
    """A store that falls back from a real Redis, and how long its deeds took."""

    def __init__(self, url: Secret) -> None:
        self.said: list[str] = []
        self.longest = 0.0
        self.store = FallbackStore(RedisStore(url), MemoryStore(), notify=self.said.append)

    def transaction(self) -> int:
        began = time.monotonic()
        try:
            return self.store.transaction("b", count)
        finally:
            self.longest = max(self.longest, time.monotonic() - began)

    def fallen(self) -> bool:
        self.transaction()
        return len(self.said) == 1

    def back(self) -> bool:
        self.transaction()
        return len(self.said) == 2


@pytest.fixture
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis has all the time it needs, so that it is not taken for one that hangs."""
    monkeypatch.setattr(redis, "TIMEOUT_S", PATIENT)
    monkeypatch.setattr(redis, "CONNECT_WAIT_S", PATIENT)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.mark.server
def test_killed_redis_is_bridged_until_it_is_restarted(own_redis: RedisServer) -> None:
    """Nothing fails or waits long, and both changes are reported."""
    rig = Rig(own_redis.url())
    with closing(rig.store):
        assert [rig.transaction() for _ in range(3)] == [1, 2, 3]
        own_redis.stop()
        until(rig.fallen)
        assert "cannot be reached" in rig.said[0]
        own_redis.start()
        until(rig.back)
    assert rig.longest < LONGEST + BUSY


@pytest.mark.server
def test_hanging_redis_delays_no_operation_for_long(own_redis: RedisServer) -> None:
    """Stopped by a signal, it accepts connections and answers none."""
    rig = Rig(own_redis.url())
    with closing(rig.store):
        rig.transaction()
        own_redis.send(signal.SIGSTOP)
        until(rig.fallen)
        assert "does not answer" in rig.said[0]
        own_redis.send(signal.SIGCONT)
        until(rig.back)
    assert rig.longest < LONGEST + BUSY


@pytest.mark.server
def test_dropped_connection_is_reopened_without_fallback(
    own_redis: RedisServer, slow_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis, "RECONNECT_WAIT_S", PATIENT)
    rig = Rig(own_redis.url())
    with closing(rig.store):
        rig.transaction()
        own_redis.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert rig.transaction() == 2
    assert rig.said == []


@pytest.mark.slow
def test_missing_redis_at_the_start_delays_the_first_operation_briefly() -> None:
    """The local store is used, and that is reported."""
    rig = Rig(Secret(f"redis://127.0.0.1:{free_port()}"))
    with closing(rig.store):
        assert [rig.transaction(), rig.transaction()] == [1, 2]
    assert len(rig.said) == 1
    assert rig.longest < redis.CONNECT_WAIT_S + BUSY


def test_server_that_never_answers_delays_no_operation_for_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        rig = Rig(Secret(f"redis://127.0.0.1:{silent.getsockname()[1]}"))
        with closing(rig.store):
            rig.transaction()
    assert rig.longest < redis.CONNECT_WAIT_S + BUSY


FULL = ("CONFIG", "SET", "maxmemory", "1")
EMPTY = ("CONFIG", "SET", "maxmemory", "0")
LOCKED = ("CONFIG", "SET", "requirepass", "new")
OPEN = ("-a", "new", "CONFIG", "SET", "requirepass", "")
CUT = ("-a", "new", "CLIENT", "KILL", "TYPE", "normal")


@pytest.mark.server
@pytest.mark.parametrize(
    ("spoil", "mend", "word"),
    [([FULL], EMPTY, "no memory"), ([LOCKED, CUT], OPEN, "refuses the password")],
    ids=["full", "locked"],
)
def test_unusable_redis_is_bridged_until_it_is_usable(
    own_redis: RedisServer,
    slow_machine: None,
    spoil: list[tuple[str, ...]],
    mend: tuple[str, ...],
    word: str,
) -> None:
    """Memory runs out, or a password is required; then it is mended."""
    rig = Rig(own_redis.url())
    with closing(rig.store):
        rig.transaction()
        for words in spoil:
            own_redis.ask(*words)
        until(rig.fallen)
        assert word in rig.said[0]
        own_redis.ask(*mend)
        until(rig.back)


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
