"""How far a server's clock is ahead of ours, from round trips. Pure; bounded, not just estimated.

A stamp that the server made between our sending and our receiving bounds the difference from both
sides, whatever the way took in each direction. The narrowest bounds are kept, and widened by what
the clocks may drift apart meanwhile.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from nbcodex.errors import ConfigurationError
from nbcodex.ratelimit.sharing import SharedModel
from nbcodex.ratelimit.stores import (
    CHECK,
    COMMON_SALT,
    UnreachableError,
    key_of,
    move,
    pack,
    unpack,
)
from nbcodex.runtime.clock import BootClock
from nbcodex.settings import Secret

DRIFT = 5e-4
"""Seconds by which two clocks may part in a second: as fast as one that is being put right."""


@dataclass(slots=True)
class Offset:
    """The bounds of server time minus our time.

    Parameters
    ----------
    low, high : float
        The bounds; infinite before the first stamp.
    at : float
        When they were found, by our clock.
    """

    low: float = -math.inf
    high: float = math.inf
    at: float = 0.0

    @property
    def value(self) -> float:
        """The offset in seconds, wrong by at most `error`."""
        return (self.low + self.high) / 2

    @property
    def error(self) -> float:
        """By how much `value` may be wrong."""
        return (self.high - self.low) / 2

    def observe(self, stamp: float, *, sent_at: float, received_at: float) -> bool:
        """Learn from the server's `stamp`; return False if one of the clocks has jumped.

        The bounds are then those of this stamp alone.
        """
        wider = DRIFT * max(0.0, received_at - self.at)
        low, high = stamp - received_at, stamp - sent_at
        steady = low <= self.high + wider and high >= self.low - wider
        if steady:
            low, high = max(low, self.low - wider), min(high, self.high + wider)
        self.low, self.high, self.at = low, high, received_at
        return steady


T = TypeVar("T")

TIMEOUT = 0.25
"""Seconds that Redis has for each step."""
BUSY = 0.5
"""Seconds after which a deed that others are always faster than is given up."""
TRIES, CLAIM, PAUSE = 3, 0.05, 0.001
"""How often one may be too slow before a claim; the seconds that it lasts at most, in which the
others look again after each pause."""
LIFE = 600.0
"""Seconds after its last use when a bucket is forgotten."""
LARGEST = 1_000_000
"""Bytes of the largest state that is looked at; that of a thousand hosts is smaller."""
JUMP = 1.0
"""Seconds by which a state may be from the future: more, and Redis's clock was put back."""

_SCRIPT = f"""
local now = redis.call('TIME')
local instant = now[1] + now[2] / 1000000
local key = KEYS[1]
local kept = redis.pcall('HMGET', key, 'version', 'state', 'claimed_by', 'claimed_until')
if kept.err or redis.call('HSTRLEN', key, 'state') > {LARGEST} then
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
  local taken = claimed and 1 or 0
  return {{0, now[1], now[2], kept[1] or '', kept[2] or '', taken}}
end
redis.call('HSET', key, 'version', ARGV[2], 'state', ARGV[3], 'claimed_until', 0)
redis.call('PEXPIRE', key, ARGV[4])
return {{1, now[1], now[2]}}
"""
_DIGEST = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()

_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)
"""What comes of numbers that are none of ours."""

_ADVICE = (
    "Write it like redis://:PASSWORD@HOST:6379/0 (rediss:// for TLS), with what is special in the "
    "password percent-encoded."
)


@dataclass(slots=True)
class _Kept:
    """A bucket as Redis has it, its instants in Redis's time; no version: it has none."""

    version: bytes
    shared: SharedModel
    fresh: bool
    claimed: bool = False


@dataclass(slots=True)
class _Doubt:
    """A deed of which nobody knows whether Redis has kept it: its answer was lost."""

    deed: Callable[[SharedModel], Any]
    version: bytes
    result: Any


class RedisStore:
    """Keeps buckets in a Redis that several hosts use at once. Connects at the first deed.

    Parameters
    ----------
    url : Secret
        ``redis://``, ``rediss://`` or ``unix://``, with the password in it.
    now : callable or None
        The host's clock, which deeds speak in; None: time since boot.

    Attributes
    ----------
    conflicts : int
        How often a deed had to be done again, because another host was faster.

    Raises
    ------
    ConfigurationError
        If the URL is none, or redis-py is missing.
    """

    def __init__(self, url: Secret, *, now: Callable[[], float] | None = None) -> None:
        self.salt = COMMON_SALT
        self._now = now or BootClock().now
        self._connection = _connection(url)
        self._offset = Offset()
        self._me = secrets.token_hex(8)
        self._steady = True
        self._kept: dict[str, _Kept] = {}
        self._doubts: dict[str, _Doubt] = {}
        self.conflicts = 0

    def __repr__(self) -> str:
        return "<RedisStore>"

    @property
    def error(self) -> float:
        """Seconds by which instants of another host may be wrong here."""
        return self._offset.error

    def transaction(self, name: str, deed: Callable[[SharedModel], T]) -> T:
        """Let `deed` read and change the bucket `name`, and return what it returns.

        It is done again, on newer numbers, when another host was faster.

        Raises
        ------
        UnreachableError
            If Redis cannot be used; whether the deed was kept is unknown then. Who comes again with
            the same one is given its result, if it was and nobody was faster since.
        """
        return self._transaction(key_of(name), deed)

    def _transaction(self, key: str, deed: Callable[[SharedModel], T]) -> T:
        kept, doubt = self._kept.pop(key, None), self._doubts.pop(key, None)
        kept = kept or self._read(key)
        if doubt and doubt.deed is deed and doubt.version == kept.version:
            self._kept[key] = kept
            return doubt.result  # type: ignore[no-any-return]
        end = time.monotonic() + BUSY
        for tries in itertools.count(1):
            result, version = self._do(kept, deed), secrets.token_bytes(8)
            self._doubts[key] = _Doubt(deed, version, result)
            newer = self._commit(key, kept, version, claim=tries > TRIES)
            del self._doubts[key]
            if newer is None:
                break
            if time.monotonic() > end:
                raise UnreachableError("Redis is too busy.")
            self.conflicts += 1
            kept = newer
            if kept.claimed:
                time.sleep(PAUSE)
        if self._steady:
            self._kept[key] = kept
        return result

    def check(self) -> None:
        """Connect anew, and see whether Redis can be read and written.

        Raises
        ------
        UnreachableError
            If it cannot.
        """
        self.close()
        self._transaction(CHECK, lambda _: None)

    def batch(self) -> AbstractContextManager[None]:
        """Each deed is a script of its own."""
        return nullcontext()

    def close(self) -> None:
        """Close the connection; the next deed opens another one."""
        self._kept.clear()
        self._connection.disconnect()

    def _do(self, kept: _Kept, deed: Callable[[SharedModel], T]) -> T:
        """Do a deed in the host's time."""
        offset = self._offset.value
        try:
            move(kept.shared, -offset)
            result = deed(kept.shared)
            move(kept.shared, offset)
        except _DAMAGE:
            if kept.fresh:
                raise
            # The form was right and the numbers were not: what was learnt is learnt again.
            kept.shared, kept.fresh = SharedModel(), True
            return self._do(kept, deed)
        return result

    def _read(self, key: str) -> _Kept:
        return self._kept_in(self._run(key, b"", b"", ""))

    def _commit(self, key: str, kept: _Kept, version: bytes, *, claim: bool) -> _Kept | None:
        """Keep what a deed has made; return what is there instead, if another was faster."""
        answer = self._run(key, kept.version, version, self._packed(kept.shared), claim=claim)
        if answer[0] != 1:
            return self._kept_in(answer)
        kept.version, kept.fresh = version, False
        return None

    def _packed(self, shared: SharedModel) -> str:
        limit = shared.bucket.limit
        if limit and limit.model:
            shared.bucket.limit = replace(limit, model=None)  # a name is no number
        return json.dumps([self._now() + self._offset.value, pack(shared)])

    def _kept_in(self, answer: Any) -> _Kept:
        try:
            _, seconds, micros, version, state, claimed = answer
            if not state:
                return _Kept(version, SharedModel(), fresh=True, claimed=claimed == 1)
            written_at, packed = json.loads(state, parse_constant=_constant)
            shared = unpack(SharedModel, packed)
            ahead = written_at - (int(seconds) + int(micros) / 1e6)
            if ahead > JUMP:
                move(shared, -ahead)
        except _DAMAGE:
            # Damaged, or never ours.
            return _Kept(version, SharedModel(), fresh=True)
        return _Kept(version, shared, fresh=False, claimed=claimed == 1)

    def _run(
        self, key: str, known: bytes, version: bytes, state: str, *, claim: bool = False
    ) -> Any:
        """Run the script, and learn from its stamp."""
        from redis.exceptions import NoScriptError, RedisError

        life, lasts = str(int(LIFE * 1000)), str(CLAIM) if claim else ""
        arguments = ("1", key, known, version, state, life, self._me, lasts)
        try:
            try:
                answer, way = self._ask("EVALSHA", _DIGEST, *arguments)
            except NoScriptError:
                answer, way = self._ask("EVAL", _SCRIPT, *arguments)
            stamp = int(answer[1]) + int(answer[2]) / 1e6
        except (RedisError, OSError, *_DAMAGE) as error:
            self.close()
            raise UnreachableError(_reason(error)) from None
        except BaseException:
            self.close()  # or the next one would read this one's answer
            raise
        self._steady = self._offset.observe(stamp, sent_at=way[0], received_at=way[1])
        if not self._steady:
            self._kept.clear()
        return answer

    def _ask(self, *words: str | bytes) -> tuple[Any, tuple[float, float]]:
        self._connection.connect()
        sent_at = self._now()
        self._connection.send_command(*words, check_health=False)
        answer = self._connection.read_response()
        return answer, (sent_at, self._now())


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError(name)
    return float(name)


def _connection(url: Secret) -> Any:
    """Return a connection that is not open yet."""
    try:
        from redis.backoff import NoBackoff
        from redis.connection import Connection, parse_url
        from redis.retry import Retry
    except ImportError:
        raise ConfigurationError(
            "NBCODEX_REDIS_URL is set, but redis-py is not installed.",
            advice="Run: %pip install 'nbcodex[redis]'",
        ) from None
    parse: Any = parse_url
    try:
        options = parse(url.reveal())
        kind = options.pop("connection_class", Connection)
        bounds = {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT}
        return kind(**options | bounds, protocol=2, driver_info=None, retry=Retry(NoBackoff(), 0))
    except (ValueError, TypeError, AttributeError):
        # redis-py's own words quote the password.
        message = "NBCODEX_REDIS_URL is not the URL of a Redis."
        raise ConfigurationError(message, advice=_ADVICE) from None


def _reason(error: Exception) -> str:
    """Return what is wrong, in our own words: a server's could say anything."""
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
    said = next((words for kinds, words in reasons if isinstance(error, kinds)), "cannot be used")
    return f"Redis {said}."
