"""What hosts share through Redis: clocks, secrets, and what else may stand there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from nbcodex.models import Limit, LimitReading, LimitSnapshot, Usage
from nbcodex.ratelimit.charge_policy import Need, Permit
from nbcodex.ratelimit.limit_model import Refusal
from nbcodex.ratelimit.rate_limiter import Cooldown, RateLimiter, Wait
from nbcodex.ratelimit.sharing import LEASE_S, SharedModel, move_instants
from nbcodex.ratelimit.stores import StoreError, encode
from nbcodex.ratelimit.stores import redis as module
from nbcodex.ratelimit.stores.redis import (
    CLOCK_DRIFT,
    ClockOffset,
    RedisStore,
    UnreachableError,
    key_of,
)
from nbcodex.ratelimit.stores.sqlite import SqliteStore
from nbcodex.ratelimit.undeclared_limits import UndeclaredLimit
from nbcodex.ratelimit.worker import open_store
from nbcodex.runtime.clock import BootClock
from nbcodex.settings import Secret, Settings
from tests.redis_server import RedisServer, redis_server

HOUR = 3600.0
PASSWORD = "correct-horse-battery"


class Host:
    """A host whose clock is wrong by some seconds."""

    def __init__(self, server: RedisServer, name: str, wrong: float = 0.0) -> None:
        self.wrong, self.clock = wrong, BootClock()
        self.store = RedisStore(server.url())
        self.store._now = self.now
        self.limiter = RateLimiter(self.store, process_id=name)

    def now(self) -> float:
        return self.clock.now() + self.wrong

    def ask(self) -> Permit | Wait | Cooldown:
        entry = self.limiter.enqueue("b", Need(10, 90), lambda: None)
        answer = self.limiter.try_acquire(entry, self.now())
        self.limiter.dequeue(entry)
        return answer

    def close(self) -> None:
        self.store.close()


# Time.


def instants(kind: type, path: str = "") -> Iterator[str]:
    """Yield the paths of all numbers in a dataclass that may be instants."""
    for name, hint in get_type_hints(kind).items():
        inner = [k for k in (hint, *get_args(hint)) if dataclasses.is_dataclass(k)]
        if inner:
            yield from instants(inner[0], f"{path}{name}.")
        elif float in (hint, *get_args(hint)):
            yield path + name


BUCKETS = ("tokens.buckets", "requests", "undeclared.by_name.bucket")
MOVED = {"updated_at", "observed_at", "hidden_refusal_at"}
RELATIVE = {
    "limit",
    "rate",
    "level",
    "correction",
    "hidden_floor",
    "lowest_hidden_floor",
    "foreign_rate",
}


def test_each_number_of_a_model_either_moves_with_the_clock_or_does_not() -> None:
    """A field that is added must be entered here, and moved if it is an instant."""
    moved = {
        *(f"model.{bucket}.{f}" for bucket in BUCKETS for f in MOVED),
        "model.undeclared.by_name.refused_at",
        *(f"model.{f}" for f in ("tokens.period_start_at", "cooldown_until", "last_sent_at")),
        *(
            f"model.{f}"
            for f in ("rate_window_start_at", "next_window_start_at", "output.start_times_sum")
        ),
        *(f"model.{f}" for f in ("parallel.learned_at", "slowed_down_at")),
        *(f"processes.{f}" for f in ("renewed_at", "due_at", "start_times_sum")),
    }
    still = {
        *(f"model.{bucket}.{f}" for bucket in BUCKETS for f in RELATIVE),
        "model.undeclared.by_name.seconds",
        *(f"model.tokens.{f}" for f in ("scores", "period_errors", "typical_request")),
        *(f"model.output.{f}_output" for f in ("requested", "used")),
        *(f"model.output.{f}" for f in ("answer_seconds", "requested_in_flight")),
        *(f"model.cooldown_limit.{f}" for f in ("window", "limit", "used", "requested")),
        *(f"model.{f}" for f in ("input_ratio", "margin", "round_trip", "largest_admitted_tokens")),
        *(
            f"model.{f}"
            for f in ("rate_window_start_tokens", "next_window_start_tokens", "sent_tokens")
        ),
        *(
            f"model.{f}"
            for f in ("limit_before_reboot", "parallel.trial_interval", "slow_down_rate")
        ),
        *(f"processes.{f}_tokens" for f in ("served", "input", "waiting")),
        *(f"processes.{f}" for f in ("max_output", "requested_in_flight")),
        "virtual_time",
    }
    assert set(instants(SharedModel)) == moved | still
    shared = SharedModel()
    shared.issue_permit("b", "me", Need(1, 2), 100.0)
    shared.model.tokens.period_start_at = shared.model.cooldown_until = 100.0
    shared.model.parallel.learned_at = shared.model.slowed_down_at = 100.0
    shared.processes["me"].due_at = 100.0
    undeclared = UndeclaredLimit("requests", 86_400.0, refused_at=100.0)
    shared.model.undeclared.by_name["w"] = undeclared
    for bucket in (*shared.model.tokens.buckets, shared.model.requests, undeclared.bucket):
        bucket.hidden_refusal_at = 100.0
    before = encode(shared)
    move_instants(shared, 1.0)
    values = [list(numbers(json.loads(text))) for text in (before, encode(shared))]
    differ = sum(a != b for a, b in zip(*values, strict=True))
    assert differ == len(moved) + 2 * len(MOVED)  # three buckets of tokens
    move_instants(shared, -1.0)
    assert encode(shared) == before


def numbers(packed: Any) -> Iterator[Any]:
    if isinstance(packed, (list, dict)):
        for each in packed.values() if isinstance(packed, dict) else packed:
            yield from numbers(each)
    else:
        yield packed


def error_of(offset: ClockOffset) -> float:
    """Return by how much an offset may be wrong."""
    return (offset.high - offset.low) / 2


@pytest.mark.parametrize("there", [0.0, 0.2])
def test_clock_offset_lies_within_its_bounds(there: float) -> None:
    """However unequal the ways are; and the bounds do not widen."""
    offset, true, errors = ClockOffset(), 1e9, []
    for index in range(50):
        sent = index * 1.0
        received = sent + there + 0.01 * (index % 7 + 1)
        assert offset.narrow(sent + there + true, sent_at=sent, received_at=received)
        errors.append(error_of(offset))
        assert abs(offset.value - true) <= error_of(offset)
    assert max(errors[7:]) <= there / 2 + 0.005 + 7 * CLOCK_DRIFT


def test_clock_jump_starts_new_bounds() -> None:
    offset = ClockOffset()
    assert offset.narrow(100.0, sent_at=0.0, received_at=0.1)
    assert not offset.narrow(3701.0, sent_at=1.0, received_at=1.1)
    assert offset.value == pytest.approx(3699.95)


@pytest.mark.server
@pytest.mark.parametrize("wrong", [-HOUR, 0.0, HOUR])
def test_hosts_with_different_clocks_agree_on_a_cooldown(redis: RedisServer, wrong: float) -> None:
    """A model that one host closes for 30 s is closed for 30 s on the other's clock."""
    with closing(Host(redis, "a")) as one, closing(Host(redis, "b", wrong)) as other:
        permit = one.ask()
        assert isinstance(permit, Permit)
        # Each later exchange narrows the bounds, so they are read before each conversion.
        max_error = error_of(one.store._offset) + 1e-3
        until = one.now() + 30
        one.limiter.refuse(permit, Refusal(until), one.now())
        answer = other.ask()
        assert isinstance(answer, Wait | Cooldown)
        assert answer.until - other.now() > 5
        max_error += error_of(other.store._offset)
        seen_until = other.store.transaction("b", lambda shared: shared.model.cooldown_until)
        assert seen_until - wrong == pytest.approx(until, abs=max_error)


@pytest.mark.server
def test_redis_clock_set_back_an_hour_does_not_prolong_a_cooldown(redis: RedisServer) -> None:
    """What was written in the future counts as written at present."""
    with closing(Host(redis, "a")) as host:
        host.ask()
        state = json.loads(redis.ask("--raw", "HGET", key_of("b"), "state"))
        shared_at = state[0]
        moved = SharedModel()
        moved.model.cooldown_until = shared_at + HOUR + 20
        state = encode([shared_at + HOUR, moved])
        redis.ask("HSET", key_of("b"), "state", state, "version", "x")
        until = host.store.transaction("b", lambda shared: shared.model.cooldown_until)
        host.store.close()
        until = host.store.transaction("b", lambda shared: shared.model.cooldown_until)
        assert until - host.now() < 21


@pytest.mark.server
def test_share_of_a_dead_host_is_released_after_its_lease(redis: RedisServer) -> None:
    with closing(Host(redis, "dead")) as dead, closing(Host(redis, "live")) as live:
        dead.ask()
        live.store.transaction("b", lambda shared: shared.renew_lease("live", live.now()))
        live.store.transaction(
            "b", lambda shared: shared.renew_lease("live", live.now() + LEASE_S + 0.1)
        )
        left = live.store.transaction("b", lambda s: (set(s.processes), s.model.output.in_flight))
        assert left == ({"live"}, 0)


# What stands in Redis.

HOSTILE = [
    "",
    "nonsense",
    "[]",
    "null",
    "[1]",
    "[1, [[1], {}]]",
    "[" * 5000,
    "[NaN, NaN]",
    '["x", []]',
    "\x00\xff",
    "9" * 5000,
    "x" * 1_000_001,
]


def spoilt(value: str) -> str:
    """Return a state of the right form in which one number is none, in each place at once."""
    shared = SharedModel()
    shared.issue_permit("b", "other", Need(1, 2), 100.0)
    text = encode([0.0, shared])
    return text.replace("-1003.0", value).replace("0.0", value)


@pytest.mark.server
@pytest.mark.parametrize(
    "state",
    [*HOSTILE, *map(spoilt, ["NaN", "Infinity", '"x"', "null", "[]", "{}"])],
    ids=range(len(HOSTILE) + 6),  # the states differ from run to run
)
def test_damaged_or_foreign_state_is_replaced(redis: RedisServer, state: str) -> None:
    damaged: list[bool] = []
    with closing(Host(redis, "a")) as host:
        import redis as client

        host.store.on_damage = lambda: damaged.append(True)
        with closing(client.Redis(port=redis.port)) as other:
            other.hset(key_of("b"), mapping={"version": "v", "state": state})
        permit = host.ask()
        assert isinstance(permit, Permit)
        assert permit.sequence_number == 1
        # Redis itself deletes a state that is too long.
        assert bool(damaged) == (0 < len(state) <= 1_000_000)  # the bound in the script
        host.store.close()
        assert host.store.transaction("b", lambda shared: shared.model.permit_count) == 1


@pytest.mark.server
def test_key_of_another_redis_type_is_replaced(redis: RedisServer) -> None:
    redis.ask("SET", key_of("b"), "mine")
    with closing(Host(redis, "a")) as host:
        assert isinstance(host.ask(), Permit)
    assert redis.ask("TYPE", key_of("b")).strip() == b"hash"


@pytest.mark.server
def test_model_expires_ten_minutes_after_its_last_use(redis: RedisServer) -> None:
    with closing(Host(redis, "a")) as host:
        host.ask()
    assert 500_000 < int(redis.ask("PTTL", key_of("b"))) <= 600_000


@pytest.mark.server
def test_model_that_redis_lost_starts_anew(redis: RedisServer) -> None:
    """A late answer is not mixed up with the new numbers."""
    with closing(Host(redis, "a")) as host:
        permit = host.ask()
        assert isinstance(permit, Permit)
        redis.ask("FLUSHALL")
        host.limiter.release(permit, host.now())
        state = host.store.transaction(
            "b", lambda s: (s.model.awaiting_response, s.model.output.in_flight)
        )
        assert state == (0, 0)


@pytest.mark.server
@pytest.mark.parametrize("what", ["reserve", "settle"])
def test_operation_whose_answer_was_lost_is_not_done_twice(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Redis has kept it without answering in time: calling it again returns its result."""
    host = Host(redis, "a")
    transaction, script, lost = host.store.transaction, host.store._script, []

    def repeat_once(name: str, operation: Any) -> Any:
        with contextlib.suppress(UnreachableError):
            return transaction(name, operation)
        return transaction(name, operation)

    def lose_reply(**arguments: Any) -> Any:
        reply = script(**arguments)
        if lost and reply[0] == 1:
            raise TimeoutError(lost.pop())
        return reply

    monkeypatch.setattr(host.store, "_script", lose_reply)
    monkeypatch.setattr(host.store, "transaction", repeat_once)
    for later in (10, 20):
        lost.extend([what] if what == "reserve" else [])
        now = host.now() + later
        sent = host.limiter.try_acquire(host.limiter.enqueue("b", Need(10, 90), lambda: None), now)
        assert isinstance(sent, Permit)
        host.limiter.observe(
            sent, LimitSnapshot(at=now, tokens=LimitReading(limit=6_000, remaining=5_000)), now
        )
        lost.extend([what] if what == "settle" else [])
        host.limiter.settle(sent, Usage(input_tokens=10, output_tokens=40), now)
    bucket = host.store.transaction("b", lambda shared: shared.model)
    assert not lost
    assert (bucket.permit_count, bucket.awaiting_response) == (2, 0)
    assert (bucket.output.ended_answers, bucket.output.in_flight) == (2, 0)
    host.close()


def test_redis_holds_neither_names_nor_secrets(redis: RedisServer) -> None:
    """Neither keys nor values show the base URL, the model or the API key."""
    name = "https://api.example.org/v1 sk-secret-key gpt-model"
    with closing(RedisStore(redis.url())) as store:
        limiter = RateLimiter(store, process_id="f00")
        entry = limiter.enqueue(name, Need(1, 2), lambda: None)
        permit = limiter.try_acquire(entry, 1.0)
        assert isinstance(permit, Permit)
        limit = Limit(resource="tokens", limit=600, used=1, requested=2, model="gpt-model")
        limiter.refuse(permit, Refusal(9.0, limit), 2.0)
    keys = redis.ask("--raw", "KEYS", "*").split()
    kept = b"".join([*keys, *(redis.ask("--raw", "HGETALL", key.decode()) for key in keys)])
    assert b"tokens" in kept
    for word in (b"example", b"sk-", b"gpt", b"http"):
        assert word not in kept


def test_script_uses_one_key_with_one_cluster_tag() -> None:
    key = key_of("a name")
    assert key.count("{") == key.count("}") == 1
    assert len(key[key.index("{") + 1 : key.index("}")]) == 32
    assert module._SCRIPT.count("KEYS[") == 1
    assert key_of("a name") == key != key_of("another name")


# What users see.


@pytest.mark.parametrize(
    "url",
    [
        f"http://:{PASSWORD}@localhost",
        f"redis://:{PASSWORD}@localhost:port",
        f"redis://:x/{PASSWORD}@localhost:6379",
        f"redis://:{PASSWORD}@localhost:99999999",
        f"redis://:{PASSWORD}@localhost?nonsense=1",
        f"redis://:{PASSWORD}@[::1",
        PASSWORD,
    ],
)
def test_invalid_url_is_reported_without_its_password(url: str) -> None:
    """The error says how to write it."""
    with pytest.raises(StoreError, match="redis://:PASSWORD@HOST") as caught:
        RedisStore(Secret(url))
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


def test_missing_redis_py_is_reported_with_the_extra_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [n for n in sys.modules if n == "redis" or n.startswith("redis.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(StoreError, match=r"nbcodex\[redis\]"):
        RedisStore(Secret("redis://localhost"))


def test_open_store_without_a_url_is_the_machine_s_own(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert isinstance(store, SqliteStore)
    store.close()


def test_open_store_with_an_invalid_url_raises_store_error(tmp_path: Path) -> None:
    """For which memory stands in."""
    with pytest.raises(StoreError, match="NBCODEX_REDIS_URL is not the URL of a Redis"):
        open_store(tmp_path, redis_url=Secret("http://x"))


def test_redis_url_is_a_secret_in_settings() -> None:
    settings = Settings.read(environ={"NBCODEX_REDIS_URL": f"redis://:{PASSWORD}@host"})
    assert isinstance(settings.redis_url, Secret)
    assert PASSWORD not in repr(settings)


@pytest.mark.server
@pytest.mark.parametrize(
    ("options", "login", "said"),
    [
        (["--requirepass", PASSWORD], "wrong-" + PASSWORD, "refuses the password"),
        (["--requirepass", PASSWORD], "", "refuses the password"),
        (["--maxmemory", "1"], "", "has no memory left"),
        (["--replicaof", "127.0.0.1", "1"], "", "is a replica"),
    ],
)
def test_reason_why_redis_is_unusable_is_reported_without_the_password(
    tmp_path: Any, options: list[str], login: str, said: str
) -> None:
    with redis_server(tmp_path, *options) as server:
        store = RedisStore(server.url(login))
        with closing(store), pytest.raises(UnreachableError, match=said) as caught:
            store.reconnect()
    assert PASSWORD not in repr(store) + "".join(traceback.format_exception(caught.value))
