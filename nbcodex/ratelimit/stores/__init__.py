"""Where limit models are kept: what a store must do, a store in memory, and the stored form.

`sqlite` shares models between the processes of a machine, `redis` between hosts, and `fallback`
bridges the time in which Redis cannot be used. Must not know what operations do.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from operator import attrgetter
from typing import Any, Protocol, TypeVar, get_args, get_origin, get_type_hints

from nbcodex.ratelimit.sharing import SharedModel

ResultT = TypeVar("ResultT")
KindT = TypeVar("KindT")

# What reading numbers can raise that are damaged, or were never ours.
DAMAGE = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)


class StoreError(Exception):
    """The store cannot be used; says why, in a sentence without a secret."""


class UnreachableError(StoreError):
    """A store on another machine cannot be used at present."""


class Store(Protocol):
    """What the rate limiter asks of a store."""

    salt: bytes  # what names of limits are hashed with, the same for all that share the store

    def transaction(self, name: str, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        """Let `operation` read and change the model `name` in isolation; return its result.

        It may be done more than once, each time on other numbers; only the last time counts. A
        `StoreError` says that the store cannot be used.
        """

    def batch(self) -> AbstractContextManager[None]:
        """Return a block of transactions that may share one write: if that fails, none is kept.

        By default, each one is done by itself.
        """
        return nullcontext()

    def close(self) -> None:
        """Release what is open; by default, nothing is."""
        return


class MemoryStore(Store):
    """Keeps models for as long as it lives. Used from one thread at a time."""

    def __init__(self) -> None:
        self.salt = secrets.token_bytes(16)
        self._models: dict[str, SharedModel] = {}

    def transaction(self, name: str, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        """Let `operation` read and change the model `name`, and return its result."""
        return operation(self._models.setdefault(name, SharedModel()))


# The stored form: the values of a dataclass as a list, in the order of its fields, all the way
# down. Names are left out, which halves the size. Reader and writer of each class are made once:
# with `dataclasses.astuple`, packing was most of a transaction's time.

_PLAIN = frozenset({float, int, bool, str, type(None)})


def pack(value: Any) -> Any:
    """Return a dataclass in its stored form."""
    kind: Any = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [pack(item) for item in value]
    if kind is dict:
        return {key: pack(item) for key, item in value.items()}
    return _writer(kind)(value)


def unpack(kind: type[KindT], data: Any) -> KindT:
    """Return the dataclass `kind` from its stored form; one of `DAMAGE` is raised for any other."""
    wanted: Any = kind
    found: KindT = _reader(wanted)(data)
    return found


@cache
def _writer(kind: Any) -> Callable[[Any], list[Any]]:
    names, hints = _names(kind), get_type_hints(kind)
    nested = [index for index, name in enumerate(names) if hints[name] not in _PLAIN]
    get = attrgetter(names[0], *names)  # one name alone would give no tuple

    def write(value: Any) -> list[Any]:
        _, *values = get(value)
        for index in nested:
            values[index] = pack(values[index])
        return values

    return write


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        readers = [(n, None if hints[n] in _PLAIN else _reader(hints[n])) for n in _names(kind)]
        make: Any = kind

        def read_fields(data: Any) -> Any:
            pairs = zip(readers, data, strict=True)
            return make(**{n: v if reader is None else reader(v) for (n, reader), v in pairs})

        return read_fields
    if get_origin(kind) is list:
        item = _reader(get_args(kind)[0])
        return lambda data: [item(each) for each in data]
    if get_origin(kind) is dict:
        item = _reader(get_args(kind)[1])
        return lambda data: {key: item(each) for key, each in data.items()}
    optional: list[Any] = [k for k in get_args(kind) if dataclasses.is_dataclass(k)]
    if optional:
        read = _reader(optional[0])
        return lambda data: None if data is None else read(data)
    return lambda data: data


def _names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
