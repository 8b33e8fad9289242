"""`SharedModel`s of machines with the same API key, in Redis; in a local store while it is lost.

The only module that imports redis-py. Optimistic locking: an operation is run on the newest model
that this process knows, and a script commits the result if no other process has committed
meanwhile; otherwise the operation is run again on the committed model. Instants are stored in
Redis's time, which all machines share. Calls block for up to `TIMEOUT_S`: not on the event loop.
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
from importlib.resources import files
from typing import Any

from nbcodex.ratelimit.sharing import LEASE_S, SharedModel, move_instants
from nbcodex.ratelimit.stores import DAMAGE, ResultT, Store, StoreError, decode, encode
from nbcodex.runtime.clock import BootClock
from nbcodex.settings import Secret

# For each call of Redis, and for an operation that is repeated since other machines commit before.
TIMEOUT_S, BUSY_TIMEOUT_S = 0.25, 0.5
# A store that failed to commit this often claims the model for up to CLAIM_S, in its next failed
# commit; the others read it again after each CLAIM_PAUSE_S. A machine 5 ms away from Redis, beside
# three near ones with 200 operations/s each, needed 505 ms for an operation without claims and
# often gave up; with them 28 ms, and it never did. A lock would take two more round trips.
TRIES_BEFORE_CLAIM, CLAIM_S, CLAIM_PAUSE_S = 3, 0.05, 0.001
EXPIRY_S = 600.0  # after its last use, a model expires
MAX_STATE_AHEAD_S = 1.0  # a state from further in the future shows that Redis's clock was set back
CLOCK_DRIFT = 5e-4  # seconds per second by which two clocks may drift apart while one is slewed
# How long an operation waits for the first connection; and for a new one after a loss.
CONNECT_WAIT_S, RECONNECT_WAIT_S = 1.0, 0.5
# The shortest use of the local store. Meanwhile this process's lease (see `sharing`) expires in
# Redis, so that its requests in flight do not count twice.
MIN_LOCAL_S = LEASE_S + 1.0
# Between two attempts to reconnect: the first interval, and the longest.
FIRST_CHECK_INTERVAL_S, MAX_CHECK_INTERVAL_S = 0.05, 5.0
NOTICE_INTERVAL_S = 60.0  # a loss of Redis is reported at most once in this time

# Machines have no secret in common, so limits ids are hashed by a slow function (`key_of`) instead.
COMMON_SALT = b"nbcodex, shared by hosts"
_KEY_SALT = b"nbcodex, a bucket's name in Redis"
_FORM_ID = "9de2eb31"  # of the stored form: versions with another one use other keys

_SCRIPT = files("nbcodex.ratelimit.stores").joinpath("commit_state.lua").read_text("utf-8")

_INVALID_URL = (
    "NBCODEX_REDIS_URL is not the URL of a Redis server. "
    "Write it like redis://:PASSWORD@HOST:6379/0 (rediss:// for TLS), with special characters in "
    "the password percent-encoded."
)

# How an error of redis-py or of the system is described, by the name of its class. The message of a
# server could contain anything, so it is not shown.
_REASONS = {
    "AuthenticationError": "refuses the password",
    "NoPermissionError": "refuses the password",
    "BusyLoadingError": "is still loading its data",
    "ReadOnlyError": "is a replica, which can only be read",
    "OutOfMemoryError": "has no memory left",
    "MovedError": "is a cluster of several nodes",
    "ClusterError": "is a cluster of several nodes",
    "TimeoutError": "does not answer",
    "ConnectionError": "cannot be reached",
    "OSError": "cannot be reached",
}


class UnreachableError(StoreError):
    """Redis cannot be used at present."""


@cache
def key_of(name: str) -> str:
    """Return the key of a model, the same on all machines, with Redis Cluster's tag in braces."""
    # A slow hash, so that a weak API key behind the limits id cannot be guessed cheaply.
    tag = hashlib.scrypt(name.encode(), salt=_KEY_SALT, n=2**14, r=8, p=1, dklen=16).hex()
    return f"nbcodex:{{{tag}}}:{_FORM_ID}"


@dataclass(slots=True)
class ClockOffset:
    """Redis's time minus this machine's, within bounds.

    The server makes its time stamp between our sending and our receiving, which bounds the offset
    from both sides. The narrowest bounds are kept, and widened by the clocks' drift.
    """

    low: float = -math.inf
    high: float = math.inf
    found_at: float = 0.0

    @property
    def value(self) -> float:
        """The offset in seconds: the middle between the bounds."""
        return (self.low + self.high) / 2

    def narrow(self, stamp: float, *, sent_at: float, received_at: float) -> bool:
        """Narrow the bounds by the server's `stamp`; return False if a clock has jumped."""
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

    version: bytes  # empty if Redis has no such model
    shared: SharedModel
    is_new: bool  # Redis had no model, or a damaged one
    is_claimed: bool = False  # by another store


class RedisStore(Store):
    """Keeps models in a Redis that several machines use at once. Connects at the first operation.

    The `url` is ``redis://``, ``rediss://`` or ``unix://``, with the password in it. Raises
    `StoreError` if it is not valid, or if redis-py is missing.
    """

    def __init__(self, url: Secret) -> None:
        self.salt = COMMON_SALT
        self._now = BootClock().now
        self._client = _client(url)
        self._script = self._client.register_script(_SCRIPT)
        self._offset = ClockOffset()
        self._id = secrets.token_hex(8)  # names this store in its claims
        self._is_steady = True  # no clock has jumped since the last reply
        self._states: dict[str, _State] = {}  # by key, as they were last read or committed
        # By key, an operation whose reply was lost, with the version that Redis may have committed,
        # and the result.
        self._unconfirmed: dict[str, tuple[Callable[[SharedModel], Any], bytes, Any]] = {}

    def transaction(self, name: str, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        """Let `operation` read and change the model `name`, and return its result.

        After an `UnreachableError` the operation may or may not be committed. A second call with
        the same operation returns its result if it was committed and is still the last commit.
        """
        key = key_of(name)
        state, unconfirmed = self._states.pop(key, None), self._unconfirmed.pop(key, None)
        state = state or self._state_in(self._run(key))  # reads it
        if unconfirmed and unconfirmed[0] is operation and unconfirmed[1] == state.version:
            self._states[key] = state
            return unconfirmed[2]  # type: ignore[no-any-return]
        give_up_at = time.monotonic() + BUSY_TIMEOUT_S
        for tries in itertools.count(1):
            result, version = self._perform(state, operation), secrets.token_bytes(8)
            limit = state.shared.model.cooldown_limit
            if limit and limit.model:
                state.shared.model.cooldown_limit = replace(limit, model=None)  # Redis has no names
            text = encode([self._now() + self._offset.value, state.shared])
            self._unconfirmed[key] = operation, version, result
            reply = self._run(key, state.version, version, text, claims=tries > TRIES_BEFORE_CLAIM)
            del self._unconfirmed[key]
            if reply[0] == 1:  # it is committed
                break
            if time.monotonic() > give_up_at:
                raise UnreachableError("Redis is too busy.")
            state = self._state_in(reply)
            if state.is_claimed:
                time.sleep(CLAIM_PAUSE_S)
        state.version, state.is_new = version, False
        if self._is_steady:
            self._states[key] = state
        return result

    def reconnect(self) -> None:
        """Connect anew; raise an `UnreachableError` if Redis cannot be read and written."""
        self.close()
        self.transaction("", lambda _: None)  # writes a model that nothing uses

    def close(self) -> None:
        """Close the connection; the next operation opens another one."""
        self._states.clear()
        self._client.connection_pool.disconnect()

    def _perform(self, state: _State, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        """Run an operation in the machine's time."""
        offset = self._offset.value
        try:
            move_instants(state.shared, -offset)
            result = operation(state.shared)
            move_instants(state.shared, offset)
        except DAMAGE:
            if state.is_new:
                raise
            # The form was right and the numbers were not.
            self.on_damage()
            state.shared, state.is_new = SharedModel(), True
            return self._perform(state, operation)
        return result

    def _state_in(self, reply: Any) -> _State:
        """Return the state that the script returns if it has not committed."""
        _, seconds, micros, version, text, claimed = reply
        state = _State(version, SharedModel(), is_new=True, is_claimed=claimed == 1)
        if text:
            try:
                written_at, values = json.loads(text)
                shared = decode(SharedModel, values)
                ahead = written_at - (int(seconds) + int(micros) / 1e6)
                if ahead > MAX_STATE_AHEAD_S:
                    move_instants(shared, -ahead)
            except DAMAGE:
                self.on_damage()
            else:
                state.shared, state.is_new = shared, False
        return state

    def _run(
        self, key: str, old: bytes = b"", new: bytes = b"", state: str = "", *, claims: bool = False
    ) -> Any:
        """Replace the version `old` by `new`, or read without them; learn from the time stamp."""
        from redis.exceptions import RedisError

        args = (old, new, state, int(EXPIRY_S * 1000), self._id, CLAIM_S if claims else "")
        sent_at = self._now()
        try:
            reply = self._script(keys=[key], args=args)
            received_at, stamp = self._now(), int(reply[1]) + int(reply[2]) / 1e6
        except (RedisError, OSError, *DAMAGE) as error:
            self.close()
            names = [base.__name__ for base in type(error).__mro__]
            reason = next((_REASONS[name] for name in names if name in _REASONS), "cannot be used")
            raise UnreachableError(f"Redis {reason}.") from None
        except BaseException:
            self.close()  # otherwise the next operation would read this one's reply
            raise
        self._is_steady = self._offset.narrow(stamp, sent_at=sent_at, received_at=received_at)
        if not self._is_steady:
            self._states.clear()
        return reply


def _client(url: Secret) -> Any:
    try:
        from redis import ConnectionPool, Redis
        from redis.backoff import NoBackoff
        from redis.connection import parse_url
        from redis.retry import Retry
    except ImportError:
        raise StoreError(
            "NBCODEX_REDIS_URL is set, but redis-py is not installed. "
            "Run: %pip install 'nbcodex[redis]'"
        ) from None
    try:
        options: dict[str, Any] = parse_url(url.reveal())  # type: ignore[no-untyped-call]
        options |= {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
        # A retry inside redis-py would commit an operation twice. None saves `CLIENT SETINFO`.
        options |= {"protocol": 2, "driver_info": None, "retry": Retry(NoBackoff(), retries=0)}
        pool = ConnectionPool(**options)
        pool.connection_class(**pool.connection_kwargs)  # raises if an option is wrong
    except (ValueError, TypeError, AttributeError):
        raise StoreError(_INVALID_URL) from None  # redis-py's own message quotes the password
    return Redis(connection_pool=pool)


class FallbackStore(Store):
    """Keeps models in Redis, or while it is lost in a `local` store; `notify` reports both."""

    def __init__(self, shared: RedisStore, local: Store, *, notify: Callable[[str], None]) -> None:
        self.salt = shared.salt
        self._shared, self._local, self._notify = shared, local, notify
        self._reachable, self._closed = threading.Event(), threading.Event()
        self._checker: threading.Thread | None = None
        self._reason = "Redis does not answer."
        # There is no return to Redis, and no notice, before these instants.
        self._local_until = self._quiet_until = 0.0
        self._connect_wait = CONNECT_WAIT_S
        self._is_local = self._is_reported = False

    def transaction(self, name: str, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        """Let `operation` read and change the model `name`, in the store that can be used."""
        # A lost connection is tried once more: if the operation was committed and only the reply
        # was lost, Redis's store then returns its result.
        for _ in range(1 if self._is_local else 2):
            if not self._is_ready():
                break
            try:
                result = self._shared.transaction(name, operation)
            except UnreachableError as error:
                self._reason = str(error)
                self._reachable.clear()
                continue
            if self._is_reported:
                self._is_reported = False
                self._notify(
                    "Redis can be used again: the limits are shared with the other machines."
                )
            self._is_local = False
            return result
        self._start_checks()
        if not self._is_local:
            now = time.monotonic()
            self._is_local, self._local_until = True, now + MIN_LOCAL_S
            if now >= self._quiet_until:
                self._is_reported, self._quiet_until = True, now + NOTICE_INTERVAL_S
                self._notify(
                    f"{self._reason} Until it can be used, this machine does not share the limits "
                    "with others, and may be refused more often."
                )
        return self._local.transaction(name, operation)

    def close(self) -> None:
        """Close both stores for good."""
        self._closed.set()
        if self._checker is not None:
            self._checker.join()
        self._shared.close()
        self._local.close()

    def _is_ready(self) -> bool:
        """Return whether Redis is to be tried; wait briefly for a connection."""
        if self._is_local:
            return self._reachable.is_set() and time.monotonic() >= self._local_until
        self._start_checks()
        is_back, self._connect_wait = self._reachable.wait(self._connect_wait), RECONNECT_WAIT_S
        return is_back

    def _start_checks(self) -> None:
        is_checking = self._checker is not None and self._checker.is_alive()
        if not self._reachable.is_set() and not is_checking:
            self._checker = threading.Thread(target=self._check, name="nbcodex-redis", daemon=True)
            self._checker.start()

    def _check(self) -> None:
        """Reconnect, on a thread of its own so that no request waits for it."""
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
