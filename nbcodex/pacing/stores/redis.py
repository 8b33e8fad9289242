"""Observed buckets of all hosts that share a key, in Redis.

Optimistic: a deed is done here, on the newest numbers that this process knows, and one script
commits the outcome if nobody was faster; else it hands back what is there, and the deed is done
again. So nobody holds a lock that could die with him, and an undisturbed deed costs one round trip.

In Redis, instants are in its own time, by which no two hosts can differ; here, in the host's.
Redis holds numbers, and under names that are salted, slow hashes. Blocks, for at most `TIMEOUT`
per step, so it is used off the event loop, and from one thread at a time. Sole user of redis-py.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar

from nbcodex.clock import BootClock
from nbcodex.errors import ConfigurationError
from nbcodex.pacing.packing import pack, unpack
from nbcodex.pacing.shares import Shared
from nbcodex.pacing.stores import COMMON_SALT, UnreachableError
from nbcodex.pacing.stores.instants import move
from nbcodex.pacing.stores.offset import Offset
from nbcodex.settings import Secret

T = TypeVar("T")

TIMEOUT = 0.25
"""Seconds that Redis has for each step."""
BUSY = 0.5
"""Seconds after which a deed that others are always faster than is given up."""
LIFE = 600.0
"""Seconds after its last use when a bucket is forgotten."""
LARGEST = 1_000_000
"""Bytes of the largest state that is looked at; that of a thousand hosts is smaller."""
JUMP = 1.0
"""Seconds by which a state may be from the future: more, and Redis's clock was put back."""

_SALT = b"nbcodex, a bucket's name in Redis"

_SCRIPT = f"""
local now = redis.call('TIME')
local key = KEYS[1]
local kept = redis.pcall('HMGET', key, 'version', 'state')
if kept.err or redis.call('HSTRLEN', key, 'state') > {LARGEST} then
  redis.call('DEL', key)
  kept = {{}}
end
if ARGV[2] == '' or (kept[1] or '') ~= ARGV[1] then
  return {{0, now[1], now[2], kept[1] or '', kept[2] or ''}}
end
redis.call('HSET', key, 'version', ARGV[2], 'state', ARGV[3])
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
    shared: Shared
    fresh: bool


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
        self._kept: dict[str, _Kept] = {}
        self.conflicts = 0

    def __repr__(self) -> str:
        return "<RedisStore>"

    @property
    def error(self) -> float:
        """Seconds by which instants of another host may be wrong here."""
        return self._offset.error

    def deal(self, name: str, deed: Callable[[Shared], T]) -> T:
        """Let `deed` read and change the bucket `name`, and return what it returns.

        It is done again, on newer numbers, when another host was faster.

        Raises
        ------
        UnreachableError
            If Redis cannot be used; whether the last deed was kept is unknown then.
        """
        return self._deal(key_of(name), deed)

    def _deal(self, key: str, deed: Callable[[Shared], T]) -> T:
        kept = self._kept.pop(key, None) or self._read(key)
        end = time.monotonic() + BUSY
        while True:
            result = self._do(kept, deed)
            newer = self._commit(key, kept)
            if newer is None:
                self._kept[key] = kept
                return result
            if time.monotonic() > end:
                raise UnreachableError("Redis is too busy.")
            self.conflicts += 1
            kept = newer

    def check(self) -> None:
        """Connect anew, and see whether Redis can be read and written.

        Raises
        ------
        UnreachableError
            If it cannot.
        """
        self.close()
        self._deal(f"nbcodex:{{check}}:{_layout()}", lambda _: None)

    def close(self) -> None:
        """Close the connection; the next deed opens another one."""
        self._kept.clear()
        self._connection.disconnect()

    def _do(self, kept: _Kept, deed: Callable[[Shared], T]) -> T:
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
            kept.shared, kept.fresh = Shared(), True
            return self._do(kept, deed)
        return result

    def _read(self, key: str) -> _Kept:
        return self._kept_in(self._run(key, b"", b"", ""))

    def _commit(self, key: str, kept: _Kept) -> _Kept | None:
        """Keep what a deed has made; return what is there instead, if another was faster."""
        version = secrets.token_bytes(8)
        answer = self._run(key, kept.version, version, self._packed(kept.shared))
        if answer[0] != 1:
            return self._kept_in(answer)
        kept.version, kept.fresh = version, False
        return None

    def _packed(self, shared: Shared) -> str:
        limit = shared.bucket.limit
        if limit and limit.model:
            shared.bucket.limit = replace(limit, model=None)  # a name is no number
        return json.dumps([self._now() + self._offset.value, pack(shared)])

    def _kept_in(self, answer: Any) -> _Kept:
        try:
            _, seconds, micros, version, state = answer
            if not state:
                return _Kept(version, Shared(), fresh=True)
            written_at, packed = json.loads(state, parse_constant=_constant)
            shared = unpack(Shared, packed)
            ahead = written_at - (int(seconds) + int(micros) / 1e6)
            if ahead > JUMP:
                move(shared, -ahead)
        except _DAMAGE:
            # Damaged, or never ours.
            return _Kept(version, Shared(), fresh=True)
        return _Kept(version, shared, fresh=False)

    def _run(self, key: str, known: bytes, version: bytes, state: str) -> Any:
        """Run the script, and learn from its stamp."""
        from redis.exceptions import NoScriptError, RedisError

        arguments = ("1", key, known, version, state, str(int(LIFE * 1000)))
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
        if not self._offset.observe(stamp, sent_at=way[0], received_at=way[1]):
            self._kept.clear()
        return answer

    def _ask(self, *words: str | bytes) -> tuple[Any, tuple[float, float]]:
        self._connection.connect()
        sent_at = self._now()
        self._connection.send_command(*words, check_health=False)
        answer = self._connection.read_response()
        return answer, (sent_at, self._now())


@cache
def key_of(name: str) -> str:
    """Return the key of a bucket: in braces its tag, by which a cluster keeps together what is one.

    A weak API key cannot be tried out on it cheaply, nor are two layouts of a bucket mixed up.
    """
    tag = hashlib.scrypt(name.encode(), salt=_SALT, n=2**14, r=8, p=1, dklen=16).hex()
    return f"nbcodex:{{{tag}}}:{_layout()}"


@cache
def _layout() -> str:
    """Return a name for how a bucket is packed."""
    return hashlib.blake2b(_form(Shared()).encode(), digest_size=4).hexdigest()


def _form(value: Any) -> str:
    if is_dataclass(value):
        return f"({' '.join(f.name + _form(getattr(value, f.name)) for f in fields(value))})"
    return "".join(map(_form, value)) if isinstance(value, list) else ""


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
