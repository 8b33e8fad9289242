"""Input data as rows, and replies as the same kind of data.

Owns which kinds of data a map accepts; what is special about frames is in `frames`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import (
    AsyncIterable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Sized,
)
from itertools import islice
from typing import Any

from nbcodex.errors import ConfigurationError
from nbcodex.mapping.frames import FrameInput, PandasInput, PolarsInput, read_frame
from nbcodex.mapping.rows import InputData, Row
from nbcodex.models import Reply
from nbcodex.templating import ITEM

# The column that holds the key of a dict's item.
KEY_COLUMN = "key"
# Items of a tuple or list that `{0}`, `{1}`, … can name; more would only cost memory.
MAX_POSITIONAL_COLUMNS = 50


def read_input(data: Any, *, limit: int | None = None) -> InputData:
    """Return `data`, or its first `limit` rows; raise a ConfigurationError if it has no rows."""
    # Frames first: they are sized iterables, too, but of their column names.
    if frame := read_frame(data, limit):
        return frame
    if isinstance(data, str | bytes | bytearray):
        raise ConfigurationError(
            "The data is one text, not many inputs.", advice="Put it in a list: [text]."
        )
    if isinstance(data, AsyncIterable):
        raise ConfigurationError(
            "The data is an async iterator, which a map cannot read.",
            advice="Collect it first: [item async for item in data].",
        )
    if isinstance(data, Mapping):
        return DictInput(data, limit)
    if isinstance(data, Sized) and isinstance(data, Iterable):
        return ListInput(data, limit)
    if isinstance(data, Iterable):
        return IteratorInput(data, limit)
    raise ConfigurationError(
        f"The data is of type {type(data).__name__}, which cannot be iterated over.",
        advice="Pass a list, a dict, a pandas or polars frame, or an iterator.",
    )


class ListInput:
    """A list, a tuple, or another sized iterable; the result is a list or a tuple."""

    columns: Sequence[str] | None = None

    def __init__(self, data: Iterable[Any], limit: int | None) -> None:
        self._items = list(islice(data, limit))
        self.kind = "tuple" if isinstance(data, tuple) else "list"
        self.total: int | None = len(self._items)

    def rows(self) -> Iterator[Row]:
        """Return the items in order."""
        return _item_rows(self._items)

    def with_replies(self, replies: Sequence[Reply]) -> list[Reply] | tuple[Reply, ...]:
        """Return the replies in order."""
        return tuple(replies) if self.kind == "tuple" else list(replies)


class DictInput:
    """A mapping, whose values are the items; the result is a dict with the same keys."""

    columns: Sequence[str] | None = None
    kind = "dict"

    def __init__(self, data: Mapping[Any, Any], limit: int | None) -> None:
        self._items = dict(islice(data.items(), limit))
        self.total: int | None = len(self._items)

    def rows(self) -> Iterator[Row]:
        """Return the values in order, with their keys as column ``key``."""
        for index, (key, item) in enumerate(self._items.items()):
            # The item's own column `key` wins: it is what its author means by `{key}`.
            yield Row(index, key, item, {KEY_COLUMN: key, **columns_of(item)})

    def with_replies(self, replies: Sequence[Reply]) -> dict[Any, Reply]:
        """Return the replies by key."""
        return dict(zip(self._items, replies, strict=True))


class IteratorInput:
    """An iterator: read only as far as rows can be started, and never kept."""

    columns: Sequence[str] | None = None
    kind = "iterator"
    total: int | None = None

    def __init__(self, data: Iterable[Any], limit: int | None) -> None:
        self._items = islice(iter(data), limit)

    def rows(self) -> Iterator[Row]:
        """Return what the iterator still has."""
        return _item_rows(self._items)

    def with_replies(self, replies: Sequence[Reply]) -> list[Reply]:
        """Return the replies in order."""
        return list(replies)


def _item_rows(items: Iterable[Any]) -> Iterator[Row]:
    return (Row(index, index, item, columns_of(item)) for index, item in enumerate(items))


def columns_of(item: Any) -> dict[str, Any]:
    """Return an item's columns: its keys, fields or positions, if any, and ``item`` itself."""
    match item:
        case Mapping():
            named = {str(name): value for name, value in item.items()}
        case tuple() if hasattr(item, "_asdict"):
            named = item._asdict()
        case _ if dataclasses.is_dataclass(item) and not isinstance(item, type):
            named = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
        case tuple() | list():
            named = {str(n): value for n, value in enumerate(item[:MAX_POSITIONAL_COLUMNS])}
        case _:
            named = {}
    return {ITEM: item, **named}


class JournalInput:
    """The rows of a map of another process, from the journal: their data is not known.

    `unknown` rows never reached the journal. Of a frame, the result has the result columns alone,
    with the rows' keys, or else their positions, as index.
    """

    columns: Sequence[str] | None = None

    def __init__(self, labels: Sequence[Hashable], fields: Sequence[str], kind: str) -> None:
        self._labels, self._fields, self.kind = labels, fields, kind
        self.total: int | None = len(labels)
        self.unknown = 0

    def rows(self) -> Iterator[Row]:
        """Return nothing: the known rows are restored from their entries."""
        return iter(())

    def with_replies(self, replies: Sequence[Reply]) -> Any:
        """Return the replies as the kind of data that was given."""
        frame: FrameInput
        if self.kind == "pandas":
            pandas = importlib.import_module("pandas")
            frame = PandasInput(pandas.DataFrame(index=list(self._labels)), None)
        elif self.kind == "polars":
            polars = importlib.import_module("polars")
            frame = PolarsInput(
                polars.DataFrame({"row": [str(each) for each in self._labels]}), None
            )
        else:
            return tuple(replies) if self.kind == "tuple" else list(replies)
        frame.fields = self._fields
        return frame.with_replies(replies)
