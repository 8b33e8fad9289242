"""Where limit models are kept: what a store must do, a store in memory, and the stored form.

`sqlite` shares models between the processes of a machine, `redis` between hosts. Must not know what
operations do.
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

# The errors of reading a stored form that is damaged, or was never ours.
DAMAGE = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)


class StoreError(Exception):
    """The store cannot be used; the message says why, without a secret."""


class UnreachableError(StoreError):
    """A store on another machine cannot be used at present."""


class Store(Protocol):
    """What the rate limiter needs of a store. Used from one thread at a time."""

    salt: bytes  # what names of limits are hashed with, the same for all that share the store

    def transaction(self, name: str, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        """Let `operation` read and change the model `name` in isolation; return its result.

        A new model is `SharedModel()`. If the operation raises, nothing is changed. It may be run
        more than once, each time on other numbers; only the last run counts. Raises `StoreError` if
        the store cannot be used.
        """

    def batch(self) -> AbstractContextManager[None]:
        """Return a context in which transactions may share one commit: if it fails, all are lost.

        By default each transaction is committed by itself.
        """
        return nullcontext()

    def close(self) -> None:
        """Release open resources; by default there are none."""
        return


class MemoryStore(Store):
    """Keeps models for as long as it lives."""

    def __init__(self) -> None:
        self.salt = secrets.token_bytes(16)
        self._models: dict[str, SharedModel] = {}

    def transaction(self, name: str, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        """Let `operation` read and change the model `name`, and return its result."""
        return operation(self._models.setdefault(name, SharedModel()))


# The stored form of a dataclass is the list of its values in the order of the fields, recursively.
# Without the names it has half the size. The reader and the writer of each class are made once:
# `dataclasses.astuple` took most of the time of a transaction.

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
    """Return the dataclass `kind` from its stored form; raise one of `DAMAGE` for anything else."""
    wanted: Any = kind
    found: KindT = _reader(wanted)(data)
    return found


@cache
def _writer(kind: Any) -> Callable[[Any], list[Any]]:
    names, hints = _names(kind), get_type_hints(kind)
    nested = [index for index, name in enumerate(names) if hints[name] not in _PLAIN]
    get = attrgetter(names[0], *names)  # twice, because a single name would return no tuple

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
    arguments: Any = get_args(kind)
    if get_origin(kind) is list:
        item = _reader(arguments[0])
        return lambda data: [item(each) for each in data]
    if get_origin(kind) is dict:
        item = _reader(arguments[1])
        return lambda data: {key: item(each) for key, each in data.items()}
    optional: list[Any] = [each for each in arguments if dataclasses.is_dataclass(each)]
    if optional:
        read = _reader(optional[0])
        return lambda data: None if data is None else read(data)
    return lambda data: data


def _names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
