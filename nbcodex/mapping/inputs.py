"""Data as rows, and answers as the same kind of data.

Owns which kinds of data there are. Imports none of the libraries that they come from: what frames
need is in `frames`, and told by what the data can do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from nbcodex.errors import ConfigurationError
from nbcodex.models import Reply
from nbcodex.templating import ITEM

KEY = "key"
"""The column that holds the key of a dict's item."""


@dataclass(frozen=True, slots=True)
class Row:
    """One input.

    Parameters
    ----------
    index : int
        Its position, from 0.
    label : str
        What it is called in listings and errors, unless a row key says otherwise.
    item : object
        The input as a function gets it.
    values : mapping
        Its columns by name.
    """

    index: int
    label: str
    item: Any
    values: Mapping[str, Any]


class InputData(Protocol):
    """A kind of data.

    Attributes
    ----------
    total : int or None
        Rows; None where that is not known before the last one.
    columns : sequence of str or None
        Columns of all rows; None where each row has its own.
    """

    total: int | None
    columns: Sequence[str] | None

    def rows(self) -> Iterator[Row]:
        """Return the rows in order; of an iterator, only once."""
        ...

    def back(self, replies: Sequence[Reply]) -> Any:
        """Return the replies as the kind of data that was given."""
        ...


def read_input(data: Any, *, limit: int | None = None) -> InputData:
    """Return `data`, or its first `limit` rows, as rows.

    Raises
    ------
    ConfigurationError
        If it is nothing to go through.
    """
    from nbcodex.mapping.frames import frame_of

    if frame := frame_of(data, limit):
        return frame
    if isinstance(data, str | bytes | bytearray):
        raise ConfigurationError(
            "The data is one text, not many inputs.", advice="Put it in a list: [text]."
        )
    if isinstance(data, AsyncIterable):
        raise ConfigurationError(
            "The data is an async iterator, which a map cannot read.",
            advice="Gather it first: [item async for item in data].",
        )
    if isinstance(data, Mapping):
        return Dict(data, limit)
    if isinstance(data, Sized) and isinstance(data, Iterable):
        return List(data, limit)
    if isinstance(data, Iterable):
        return Stream(data, limit)
    raise ConfigurationError(
        f"The data is {type(data).__name__}, which cannot be gone through.",
        advice="Give a list, a dict, a pandas or polars frame, or an iterator.",
    )


class List:
    """A list, a tuple, or anything else that has a length; back comes a list, or a tuple."""

    columns: Sequence[str] | None = None

    def __init__(self, data: Iterable[Any], limit: int | None) -> None:
        self._items = list(islice(data, limit))
        self._is_tuple = isinstance(data, tuple)
        self.total: int | None = len(self._items)

    def rows(self) -> Iterator[Row]:
        """Return the items in order."""
        return (plain(index, item) for index, item in enumerate(self._items))

    def back(self, replies: Sequence[Reply]) -> list[Reply] | tuple[Reply, ...]:
        """Return the replies in order."""
        return tuple(replies) if self._is_tuple else list(replies)


class Dict:
    """A mapping, whose values are the items; back comes a dict with the same keys."""

    columns: Sequence[str] | None = None

    def __init__(self, data: Mapping[Any, Any], limit: int | None) -> None:
        self._items = dict(islice(data.items(), limit))
        self.total: int | None = len(self._items)

    def rows(self) -> Iterator[Row]:
        """Return the values in order, with their keys as column ``key``."""
        for index, (key, item) in enumerate(self._items.items()):
            values = {KEY: key, **columns_of(item)}
            yield Row(index, str(key), item, values)

    def back(self, replies: Sequence[Reply]) -> dict[Any, Reply]:
        """Return the replies by key."""
        return dict(zip(self._items, replies, strict=True))


class Stream:
    """An iterator: read as far as there is something to do, and never kept."""

    columns: Sequence[str] | None = None
    total: int | None = None

    def __init__(self, data: Iterable[Any], limit: int | None) -> None:
        self._items = islice(iter(data), limit)

    def rows(self) -> Iterator[Row]:
        """Return what the iterator still has."""
        return (plain(index, item) for index, item in enumerate(self._items))

    def back(self, replies: Sequence[Reply]) -> list[Reply]:
        """Return the replies in order."""
        return list(replies)


def plain(index: int, item: Any) -> Row:
    """Return an item as a row."""
    return Row(index, str(index), item, columns_of(item))


def columns_of(item: Any) -> dict[str, Any]:
    """Return an item's columns: its keys or its fields, if it has any, and ``item`` itself."""
    match item:
        case Mapping():
            named = {str(name): value for name, value in item.items()}
        case tuple() if hasattr(item, "_asdict"):
            named = item._asdict()
        case _ if dataclasses.is_dataclass(item) and not isinstance(item, type):
            named = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
        case _:
            named = {}
    return {ITEM: item, **named}
