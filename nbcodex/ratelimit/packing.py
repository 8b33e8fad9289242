"""Turns what the ledger keeps into plain lists of numbers, and back."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

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
