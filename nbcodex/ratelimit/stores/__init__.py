"""Where observed buckets are kept: in memory, or where several processes or hosts share them."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from operator import attrgetter
from typing import Any, Protocol, TypeVar, get_args, get_origin, get_type_hints

from nbcodex.ratelimit.sharing import SharedModel

T = TypeVar("T")

COMMON_SALT = b"nbcodex, shared by hosts"
"""Names buckets where hosts share them: nothing has to be agreed upon, and what reaches Redis is a
slow hash of such a name."""


class StoreError(Exception):
    """The store cannot be used; says why, in a sentence without a secret."""


class UnreachableError(StoreError):
    """A store on another machine cannot be used now."""


class Store(Protocol):
    """What the ledger asks of a store."""

    salt: bytes
    """Makes the buckets' names, the same for all who share the store."""

    def transaction(self, name: str, deed: Callable[[SharedModel], T]) -> T:
        """Let `deed` read and change the bucket `name`, undisturbed, and return what it returns.

        It may be done more than once, each time on other numbers; only the last time counts.

        Raises
        ------
        StoreError
            If the store cannot be used.
        """
        ...

    def batch(self) -> AbstractContextManager[None]:
        """Return a block in which deeds may share one write.

        Raises
        ------
        StoreError
            At its end, if that fails: none of them is kept then.
        """
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


class MemoryStore:
    """Keeps buckets for as long as it lives. Used from one thread at a time."""

    def __init__(self) -> None:
        self.salt = secrets.token_bytes(16)
        self._models: dict[str, SharedModel] = {}

    def transaction(self, name: str, deed: Callable[[SharedModel], T]) -> T:
        """Let `deed` read and change the bucket `name`, and return what it returns."""
        return deed(self._models.setdefault(name, SharedModel()))

    def batch(self) -> AbstractContextManager[None]:
        """Each deed is done at once, whatever stands around it."""
        return nullcontext()

    def close(self) -> None:
        """There is nothing to let go of."""


_PLAIN = frozenset({float, int, bool, str, type(None)})


def pack(value: Any) -> Any:
    """Return a dataclass as a list of its fields' values, all the way down."""
    kind: Any = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [pack(item) for item in value]
    if kind is dict:
        return {key: pack(item) for key, item in value.items()}
    return _writer(kind)(value)


def unpack(kind: type[T], data: Any) -> T:
    """Return the dataclass `kind` that was packed.

    Raises
    ------
    ValueError, TypeError
        If `data` is not what `pack` makes of one.
    """
    wanted: Any = kind
    found: T = _reader(wanted)(data)
    return found


def shape(kind: Any) -> str:
    """Return a name for what the lists of `kind` look like: equal only for those of equal form."""
    return hashlib.blake2b(_form(kind).encode(), digest_size=4).hexdigest()


def _form(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        hints: dict[str, Any] = get_type_hints(kind)
        return f"{[(name, _form(hint)) for name, hint in hints.items()]}"
    return f"{get_origin(kind) or kind}{[_form(each) for each in get_args(kind)]}"


@cache
def _writer(kind: Any) -> Callable[[Any], list[Any]]:
    """Return what makes a list of an instance of the dataclass `kind`."""
    names, hints = _names(kind), get_type_hints(kind)
    inner = [place for place, name in enumerate(names) if hints[name] not in _PLAIN]
    get = attrgetter(names[0], *names)  # one name alone would give no tuple

    def write(value: Any) -> list[Any]:
        _, *values = get(value)
        for place in inner:
            values[place] = pack(values[place])
        return values

    return write


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """Return what makes a value of the type `kind` from plain data."""
    if dataclasses.is_dataclass(kind):
        return _dataclass_reader(kind)
    if get_origin(kind) is list:
        item = _reader(get_args(kind)[0])
        return lambda data: [item(each) for each in data]
    if get_origin(kind) is dict:
        item = _reader(get_args(kind)[1])
        return lambda data: {key: item(each) for key, each in data.items()}
    inner: list[Any] = [k for k in get_args(kind) if dataclasses.is_dataclass(k)]
    if inner:
        read = _reader(inner[0])
        return lambda data: None if data is None else read(data)
    return lambda data: data


def _dataclass_reader(kind: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    names = _names(kind)
    plain = {n for n in names if hints[n] in _PLAIN}
    readers = [(n, None if n in plain else _reader(hints[n])) for n in names]

    def read(data: Any) -> Any:
        pairs = zip(readers, data, strict=True)
        return kind(**{n: each if r is None else r(each) for (n, r), each in pairs})

    return read


def move(shared: SharedModel, by: float) -> None:
    """Add `by` seconds to every instant in a bucket; what is relative to them stays."""
    bucket = shared.bucket
    windows = [*bucket.windows]
    for tank in (*bucket.tokens.tanks, bucket.requests, *(w.tank for w in windows)):
        tank.at += by
        tank.seen_at += by
        tank.hid_at += by
    for window in windows:
        window.met_at += by
    if bucket.tokens.since is not None:
        bucket.tokens.since += by
    bucket.until += by
    bucket.sent_at += by
    bucket.first_at += by
    bucket.later_at += by
    bucket.output.starts += by * bucket.output.under_way
    for share in shared.holders.values():
        share.seen_at += by
        share.due_at += by
        share.starts += by * share.under_way


_SALT = b"nbcodex, a bucket's name in Redis"

CHECK = "nbcodex:{check}"
"""The key of no bucket, on which a store is tried out."""


@cache
def key_of(name: str) -> str:
    """Return the key of a bucket: in braces its tag, by which a cluster keeps together what is one.

    The key ends in the layout of a bucket, so that two versions do not undo each other's work.
    """
    tag = hashlib.scrypt(name.encode(), salt=_SALT, n=2**14, r=8, p=1, dklen=16).hex()
    return f"nbcodex:{{{tag}}}:20302231"
