"""Limit models of all hosts that share a key, in Redis. Sole user of redis-py.

Optimistic: an operation is done here, on the newest numbers that this process knows, and one
script commits the outcome if no other host was faster; else it is done again on what is there. In
Redis, instants are in its own time, by which no two hosts can differ; here, in the host's. Blocks
for at most `TIMEOUT_S` a step, so it is used off the event loop, and from one thread at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

from nbcodex.errors import ConfigurationError
from nbcodex.ratelimit.sharing import LEASE_S, SharedModel
from nbcodex.ratelimit.stores import DAMAGE, ResultT, Store, UnreachableError, pack, unpack
from nbcodex.runtime.clock import BootClock
from nbcodex.settings import Secret

# For each step; and for an operation that other hosts are always faster with.
TIMEOUT_S, BUSY_TIMEOUT_S = 0.25, 0.5
# A host that was too slow this often may claim the model, for so many seconds at most; the others
# look again after each pause. Without claims, a host 5 ms away from three near ones at 200
# operations/s needed 505 ms for one and gave up every second; with them 28 ms, and none is given
# up. A lock of redis-py would take two round trips more: here the commit that failed claims.
TRIES_BEFORE_CLAIM, CLAIM_S, CLAIM_PAUSE_S = 3, 0.05, 0.001
# A model is forgotten so long after its last use.
EXPIRY_S = 600.0
# The largest state that is read; that of a thousand hosts is smaller.
MAX_STATE_BYTES = 1_000_000
# If a state is from further in the future, Redis's clock was set back.
MAX_STATE_AHEAD_S = 1.0
# Two clocks part by at most this much in a second: as fast as one that is being slewed.
CLOCK_DRIFT = 5e-4

# There is no secret to agree on between hosts: names are hashed slowly instead (`key_of`).
COMMON_SALT = b"nbcodex, shared by hosts"
_KEY_SALT = b"nbcodex, a bucket's name in Redis"
# Stands for the stored form, as the table's name does in SQLite.
_FORM = "20302231"

_SCRIPT = f"""
local now = redis.call('TIME')
local instant = now[1] + now[2] / 1000000
local key = KEYS[1]
local kept = redis.pcall('HMGET', key, 'version', 'state', 'claimed_by', 'claimed_until')
if kept.err or redis.call('HSTRLEN', key, 'state') > {MAX_STATE_BYTES} then
  redis.call('DEL', key)
  kept = {{}}
end
local ends = tonumber(kept[4] or 0) or 0
local claimed = kept[3] ~= ARGV[5] and ends > instant and ends < instant + 1
if ARGV[2] == '' or claimed or (kept[1] or '') ~= ARGV[1] then
  if ARGV[6] ~= '' and not claimed then
    redis.call('HSET', key, 'claimed_by', ARGV[5], 'claimed_until', instant + ARGV[6])
    redis.call('PEXPIRE', key, ARGV[4])
  end
  return {{0, now[1], now[2], kept[1] or '', kept[2] or '', claimed and 1 or 0}}
end
redis.call('HSET', key, 'version', ARGV[2], 'state', ARGV[3], 'claimed_until', 0)
redis.call('PEXPIRE', key, ARGV[4])
return {{1, now[1], now[2]}}
"""

_URL_ADVICE = (
    "Write it like redis://:PASSWORD@HOST:6379/0 (rediss:// for TLS), with special characters in "
    "the password percent-encoded."
)


@cache
def key_of(name: str) -> str:
    """Return the key of a model, the same on all hosts, with its cluster tag in braces.

    A slow hash: a weak API key behind the name cannot be tried out cheaply.
    """
    tag = hashlib.scrypt(name.encode(), salt=_KEY_SALT, n=2**14, r=8, p=1, dklen=16).hex()
    return f"nbcodex:{{{tag}}}:{_FORM}"


@dataclass(slots=True)
class ClockOffset:
    """Redis's time minus ours, bounded by round trips and not just estimated.

    A stamp that the server made between our sending and our receiving bounds it from both sides,
    however unequal the ways are. The narrowest bounds are kept, and widened by the clocks' drift.
    """

    low: float = -math.inf
    high: float = math.inf
    found_at: float = 0.0

    @property
    def value(self) -> float:
        """The offset in seconds, wrong by at most half of the bounds' distance."""
        return (self.low + self.high) / 2

    def narrow(self, stamp: float, *, sent_at: float, received_at: float) -> bool:
        """Learn from the server's `stamp`; return False if one of the clocks has jumped."""
        drift = CLOCK_DRIFT * max(0.0, received_at - self.found_at)
        low, high = stamp - received_at, stamp - sent_at
        is_steady = low <= self.high + drift and high >= self.low - drift
        if is_steady:
            low, high = max(low, self.low - drift), min(high, self.high + drift)
        self.low, self.high, self.found_at = low, high, received_at
        return is_steady


@dataclass(slots=True)
class _State:
    """A model as Redis has it, its instants in Redis's time."""

    version: bytes  # empty where Redis has none
    shared: SharedModel
    is_new: bool
    is_claimed: bool = False  # by another host


class RedisStore(Store):
    """Keeps models in a Redis that several hosts use at once. Connects at the first operation.

    The `url` is ``redis://``, ``rediss://`` or ``unix://``, with the password in it. A
    `ConfigurationError` says that it is not valid, or that redis-py is missing.
    """

    def __init__(self, url: Secret) -> None:
        self.salt = COMMON_SALT
        self._now = BootClock().now
        self._client = _client(url)
        self._script = self._client.register_script(_SCRIPT)
        self._offset = ClockOffset()
        self._host = secrets.token_hex(8)
        self._is_steady = True
        self._states: dict[str, _State] = {}
        # By key, an operation whose answer was lost: Redis may have kept it as this version.
        self._unconfirmed: dict[str, tuple[Callable[[SharedModel], Any], bytes, Any]] = {}

    def transaction(self, name: str, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        """Let `operation` read and change the model `name`, and return its result.

        After an `UnreachableError`, it is unknown whether the operation was kept: called again with
        the same one, this returns its result if it was and no other host came between.
        """
        key = key_of(name)
        state, unconfirmed = self._states.pop(key, None), self._unconfirmed.pop(key, None)
        state = state or self._state_in(self._run(key, b"", b"", ""))
        if unconfirmed and unconfirmed[0] is operation and unconfirmed[1] == state.version:
            self._states[key] = state
            return unconfirmed[2]  # type: ignore[no-any-return]
        give_up_at = time.monotonic() + BUSY_TIMEOUT_S
        for tries in itertools.count(1):
            result, version = self._perform(state, operation), secrets.token_bytes(8)
            self._unconfirmed[key] = operation, version, result
            claims = tries > TRIES_BEFORE_CLAIM
            packed = self._packed(state.shared)
            answer = self._run(key, state.version, version, packed, claims=claims)
            del self._unconfirmed[key]
            if answer[0] == 1:
                break
            if time.monotonic() > give_up_at:
                raise UnreachableError("Redis is too busy.")
            state = self._state_in(answer)
            if state.is_claimed:
                time.sleep(CLAIM_PAUSE_S)
        state.version, state.is_new = version, False
        if self._is_steady:
            self._states[key] = state
        return result

    def reconnect(self) -> None:
        """Connect anew, and raise an `UnreachableError` if Redis cannot be read and written."""
        self.close()
        self.transaction("", lambda _: None)

    def close(self) -> None:
        """Close the connection; the next operation opens another one."""
        self._states.clear()
        self._client.connection_pool.disconnect()

    def _perform(self, state: _State, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        """Do an operation in the host's time."""
        offset = self._offset.value
        try:
            state.shared.move_clock(-offset)
            result = operation(state.shared)
            state.shared.move_clock(offset)
        except DAMAGE:
            if state.is_new:
                raise
            # The form was right and the numbers were not: what was learned is learned again.
            state.shared, state.is_new = SharedModel(), True
            return self._perform(state, operation)
        return result

    def _packed(self, shared: SharedModel) -> str:
        limit = shared.model.closing_limit
        if limit and limit.model:
            shared.model.closing_limit = replace(limit, model=None)  # Redis holds no names
        return json.dumps([self._now() + self._offset.value, pack(shared)])

    def _state_in(self, answer: Any) -> _State:
        try:
            _, seconds, micros, version, state, claimed = answer
            if not state:
                return _State(version, SharedModel(), is_new=True, is_claimed=claimed == 1)
            if b"NaN" in state:  # which JSON allows here, as it does infinities
                raise ValueError
            written_at, packed = json.loads(state)
            shared = unpack(SharedModel, packed)
            ahead = written_at - (int(seconds) + int(micros) / 1e6)
            if ahead > MAX_STATE_AHEAD_S:
                shared.move_clock(-ahead)
        except DAMAGE:
            return _State(version, SharedModel(), is_new=True)
        return _State(version, shared, is_new=False, is_claimed=claimed == 1)

    def _run(
        self, key: str, known: bytes, version: bytes, state: str, *, claims: bool = False
    ) -> Any:
        """Run the script, and learn from its stamp; without a `version` it only reads."""
        from redis.exceptions import RedisError

        args = (known, version, state, int(EXPIRY_S * 1000), self._host, CLAIM_S if claims else "")
        sent_at = self._now()
        try:
            answer = self._script(keys=[key], args=args)
            received_at, stamp = self._now(), int(answer[1]) + int(answer[2]) / 1e6
        except (RedisError, OSError, *DAMAGE) as error:
            self.close()
            raise UnreachableError(_reason(error)) from None
        except BaseException:
            self.close()  # or the next operation would read this one's answer
            raise
        self._is_steady = self._offset.narrow(stamp, sent_at=sent_at, received_at=received_at)
        if not self._is_steady:
            self._states.clear()
        return answer


def _client(url: Secret) -> Any:
    """Return a client that has not connected yet."""
    try:
        from redis import ConnectionPool, Redis
        from redis.backoff import NoBackoff
        from redis.connection import parse_url
        from redis.retry import Retry
    except ImportError:
        raise ConfigurationError(
            "NBCODEX_REDIS_URL is set, but redis-py is not installed.",
            advice="Run: %pip install 'nbcodex[redis]'",
        ) from None
    try:
        options: dict[str, Any] = parse_url(url.reveal())  # type: ignore[no-untyped-call]
        options |= {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
        # A retry inside redis-py would commit an operation twice.
        options |= {"protocol": 2, "driver_info": None, "retry": Retry(NoBackoff(), 0)}
        pool = ConnectionPool(**options)
        pool.connection_class(**pool.connection_kwargs)  # raises what is wrong with the options
    except (ValueError, TypeError, AttributeError):
        # redis-py's own words quote the password.
        message = "NBCODEX_REDIS_URL is not the URL of a Redis server."
        raise ConfigurationError(message, advice=_URL_ADVICE) from None
    return Redis(connection_pool=pool)


def _reason(error: Exception) -> str:
    """Return what is wrong in our own words: a server's could say anything."""
    from redis import exceptions

    reasons: list[tuple[tuple[type[Exception], ...], str]] = [
        ((exceptions.AuthenticationError, exceptions.NoPermissionError), "refuses the password"),
        ((exceptions.BusyLoadingError,), "is still loading its data"),
        ((exceptions.ReadOnlyError,), "is a replica, which can only be read"),
        ((exceptions.OutOfMemoryError,), "has no memory left"),
        ((exceptions.MovedError, exceptions.ClusterError), "is a cluster of several nodes"),
        ((exceptions.TimeoutError, TimeoutError), "does not answer"),
        ((exceptions.ConnectionError, OSError), "cannot be reached"),
    ]
    found = (words for kinds, words in reasons if isinstance(error, kinds))
    return f"Redis {next(found, 'cannot be used')}."


# How long an operation waits for the shared store: for the first connection, and when it has just
# been lost.
CONNECT_WAIT_S, RECONNECT_WAIT_S = 1.0, 0.5
# After a change to the local store, stay there for so long: meanwhile the lease in the shared one
# expires, so what this process had in flight there does not count twice.
MIN_LOCAL_S = LEASE_S + 1.0
# Between two looks whether the shared store is back: at first, and at most.
FIRST_CHECK_INTERVAL_S, MAX_CHECK_INTERVAL_S = 0.05, 5.0
# A store that comes and goes is reported once in so long.
NOTICE_INTERVAL_S = 60.0


class RemoteStore(Store, Protocol):
    """A store on another machine."""

    def reconnect(self) -> None:
        """Connect anew; raise an `UnreachableError` if it cannot be used."""
        ...


class FallbackStore(Store):
    """Keeps models in a shared store, or else in a local one. Used from one thread at a time.

    `notify` is called when the shared store is lost, and when it is back.
    """

    def __init__(self, shared: RemoteStore, local: Store, *, notify: Callable[[str], None]) -> None:
        self.salt = shared.salt
        self._shared, self._local, self._notify = shared, local, notify
        self._reachable, self._closed = threading.Event(), threading.Event()
        self._checker: threading.Thread | None = None
        self._reason = "Redis does not answer."
        self._stay_until = self._quiet_until = 0.0
        self._patience = CONNECT_WAIT_S
        self._is_local = self._is_reported = False

    def transaction(self, name: str, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        """Let `operation` read and change the model `name`, in the store that can be used."""
        # Once more after a lost connection: the shared store returns the result of an operation
        # that it has done without its answer having arrived.
        for _ in range(1 if self._is_local else 2):
            if not self._is_ready():
                break
            try:
                result = self._shared.transaction(name, operation)
            except UnreachableError as error:
                self._reason = str(error)
                self._reachable.clear()
            else:
                self._use_shared()
                return result
        self._use_local()
        return self._local.transaction(name, operation)

    def close(self) -> None:
        """Close both for good."""
        self._closed.set()
        if self._checker is not None:
            self._checker.join()
        self._shared.close()
        self._local.close()

    def _is_ready(self) -> bool:
        if self._is_local:
            return self._reachable.is_set() and time.monotonic() >= self._stay_until
        if self._reachable.is_set():
            return True
        self._start_checks()
        is_back, self._patience = self._reachable.wait(self._patience), RECONNECT_WAIT_S
        return is_back

    def _use_local(self) -> None:
        self._start_checks()
        if self._is_local:
            return
        now = time.monotonic()
        self._is_local, self._stay_until = True, now + MIN_LOCAL_S
        if now >= self._quiet_until:
            self._is_reported, self._quiet_until = True, now + NOTICE_INTERVAL_S
            self._notify(
                f"{self._reason} Until it can be used, this machine does not share the limits with "
                "others, and may be refused more often."
            )

    def _use_shared(self) -> None:
        self._is_local, was_reported = False, self._is_local and self._is_reported
        if was_reported:
            self._is_reported = False
            self._notify("Redis can be used again: the limits are shared with the other machines.")

    # On a thread of its own, so that no request waits for a check.

    def _start_checks(self) -> None:
        is_checking = self._checker is not None and self._checker.is_alive()
        if not self._reachable.is_set() and not is_checking:
            self._checker = threading.Thread(target=self._check, name="nbcodex-redis", daemon=True)
            self._checker.start()

    def _check(self) -> None:
        interval = FIRST_CHECK_INTERVAL_S
        while not self._closed.is_set():
            try:
                self._shared.reconnect()
            except UnreachableError as error:
                self._reason = str(error)
            else:
                self._reachable.set()
                return
            self._closed.wait(interval)
            interval = min(2 * interval, MAX_CHECK_INTERVAL_S)
