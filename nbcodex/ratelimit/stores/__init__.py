"""Stores of models, each a `SharedModel`: the protocol, a store in memory, and the stored form.

`sqlite` shares the models between the processes of a machine, `redis` between machines.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Protocol, TypeVar, get_args, get_origin, get_type_hints

from nbcodex.ratelimit.sharing import SharedModel

ResultT = TypeVar("ResultT")
RecordT = TypeVar("RecordT")

MAX_STORED_NUMBER = 1e19  # larger ones are not ours; `sharing.NEVER_DUE` is the largest of ours
# The errors of reading a stored form that is damaged, or that another program wrote.
DAMAGE = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)


class StoreError(Exception):
    """The store cannot be used; the message says why, without a secret."""


class Store(Protocol):
    """What the rate limiter needs of a store. Used from one thread at a time."""

    salt: bytes  # what limits ids are hashed with, the same for all that share the store
    # Called when a stored model is dropped because it is damaged.
    on_damage: Callable[[], object] = staticmethod(lambda: None)

    def transaction(self, name: str, operation: Callable[[SharedModel], ResultT]) -> ResultT:
        """Let `operation` read and change the model `name` in isolation; return its result.

        The name is the limits id. A new model is `SharedModel()`. If the operation raises, nothing
        is changed. It may be run more than once, each time on a newly read model; only the last run
        counts. Raises `StoreError` if the store cannot be used.
        """

    def batch(self) -> AbstractContextManager[None]:
        """Return a context whose transactions may share a commit: if it fails, all are lost."""
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


# The stored form is JSON in which each dataclass is the list of its values in the order of its
# fields: without their names it has half the size. Fields that an earlier release did not have are
# missing at the end, and get their defaults.
encode = json.JSONEncoder(
    check_circular=False,
    separators=(",", ":"),
    default=lambda value: [getattr(value, name) for name in value.__slots__],
).encode


def decode(record_type: type[RecordT], data: Any) -> RecordT:
    """Return the dataclass that a list of values holds; raise one of `DAMAGE` if it holds none."""
    return _reader(record_type)(data)  # type: ignore[arg-type, no-any-return]


@cache
def _reader(type_: Any, default: object = None) -> Callable[[Any], Any]:
    """Return a function that turns a field's JSON data into a value of its type, or raises."""
    arguments: Any = get_args(type_)
    if dataclasses.is_dataclass(type_):
        make: Any = type_
        hints = get_type_hints(type_)
        readers = [(f.name, _reader(hints[f.name], f.default)) for f in dataclasses.fields(make)]

        def read_fields(data: Any) -> Any:
            if len(data) > len(readers):
                raise ValueError("too many values")
            pairs = zip(readers, data, strict=False)
            return make(**{name: read(value) for (name, read), value in pairs})

        return read_fields
    if get_origin(type_) is list:
        item = _reader(arguments[0])
        return lambda data: [item(each) for each in data]
    if get_origin(type_) is dict:
        item = _reader(arguments[1])
        return lambda data: {key: item(each) for key, each in data.items()}
    for each in arguments:
        if dataclasses.is_dataclass(each):  # it is optional
            read = _reader(each)  # type: ignore[arg-type]
            return lambda data: None if data is None else read(data)
    # JSON has no literals, and may hold a float as an integer.
    if "Literal" in str(type_):
        type_ = str | None
    elif "float" in str(type_):
        type_ |= int

    def check(value: Any) -> Any:
        # An infinite number is allowed only as the default, where it means "unknown".
        is_absurd = isinstance(value, float | int) and not abs(value) <= MAX_STORED_NUMBER
        if not isinstance(value, type_) or (is_absurd and value != default):
            raise ValueError("a value of another type, or an absurd number")
        return value

    return check
