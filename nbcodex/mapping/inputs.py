"""Input data as rows, and replies as the same kind of data.

Owns which kinds of data a map accepts. pandas and polars are never imported here: a frame is
recognised by its methods, and a process that holds one has loaded its library.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import AsyncIterable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from nbcodex.errors import ConfigurationError
from nbcodex.models import Reply
from nbcodex.templating import ITEM

# The column that holds the key of a dict's item.
KEY_COLUMN = "key"

# The columns that a frame gets, in order; "parsed" follows "answer" where there is any.
RESULT_COLUMNS = ("answer", "input_tokens", "output_tokens", "cost", "error", "id")
# pandas turns integers beside a missing value into floats unless the column's type is nullable.
_INTEGER_COLUMNS, _FLOAT_COLUMNS = ("input_tokens", "output_tokens"), ("cost",)


@dataclass(frozen=True, slots=True)
class Row:
    """One input: its position from 0, its name in listings, what a function gets, its columns."""

    index: int
    label: str
    item: Any
    values: Mapping[str, Any]


class InputData(Protocol):
    """A kind of data."""

    # None for an iterator: its number of rows is unknown.
    total: int | None
    # None where each row has columns of its own.
    columns: Sequence[str] | None

    def rows(self) -> Iterator[Row]:
        """Return the rows in order; an iterator yields them only once."""
        ...

    def with_replies(self, replies: Sequence[Reply]) -> Any:
        """Return the replies as the kind of data that was given."""
        ...


def read_input(data: Any, *, limit: int | None = None) -> InputData:
    """Return `data`, or its first `limit` rows; raise a ConfigurationError if it has no rows."""
    # Frames first: they are sized iterables, too, but of their column names.
    if frame := _read_frame(data, limit):
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
        self._is_tuple = isinstance(data, tuple)
        self.total: int | None = len(self._items)

    def rows(self) -> Iterator[Row]:
        """Return the items in order."""
        return _item_rows(self._items)

    def with_replies(self, replies: Sequence[Reply]) -> list[Reply] | tuple[Reply, ...]:
        """Return the replies in order."""
        return tuple(replies) if self._is_tuple else list(replies)


class DictInput:
    """A mapping, whose values are the items; the result is a dict with the same keys."""

    columns: Sequence[str] | None = None

    def __init__(self, data: Mapping[Any, Any], limit: int | None) -> None:
        self._items = dict(islice(data.items(), limit))
        self.total: int | None = len(self._items)

    def rows(self) -> Iterator[Row]:
        """Return the values in order, with their keys as column ``key``."""
        for index, (key, item) in enumerate(self._items.items()):
            # The item's own column `key` wins: it is what its author means by `{key}`.
            yield Row(index, str(key), item, {KEY_COLUMN: key, **columns_of(item)})

    def with_replies(self, replies: Sequence[Reply]) -> dict[Any, Reply]:
        """Return the replies by key."""
        return dict(zip(self._items, replies, strict=True))


class IteratorInput:
    """An iterator: read only as far as rows can be started, and never kept."""

    columns: Sequence[str] | None = None
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
    return (Row(index, str(index), item, columns_of(item)) for index, item in enumerate(items))


def columns_of(item: Any) -> dict[str, Any]:
    """Return an item's columns: its keys or fields, if it has any, and ``item`` itself."""
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


# Frames.


def _read_frame(data: Any, limit: int | None) -> InputData | None:
    """Return a pandas or polars frame or series as input data; None for anything else."""
    library = type(data).__module__.partition(".")[0]
    # Running a query may take hours and memory that its user did not ask for.
    if library == "polars" and type(data).__name__ == "LazyFrame":
        raise ConfigurationError(
            "The data is a polars query that has not been run.", advice="Pass data.collect()."
        )
    if _has_methods(data, "iloc", "index"):
        if _has_methods(data, "to_frame") and not _has_methods(data, "columns"):
            name = ITEM if data.name is None else data.name
            return PandasInput(data.to_frame(name), limit, is_series=True)
        return PandasInput(data, limit)
    if library == "polars" and _has_methods(data, "head", "to_frame", "dtype"):
        return PolarsInput(data.to_frame(data.name or ITEM), limit, is_series=True)
    if _has_methods(data, "iter_rows", "with_columns"):
        return PolarsInput(data, limit)
    return None


class _FrameInput:
    """What both kinds of frames share."""

    def __init__(self, frame: Any, names: Sequence[str], total: int, *, is_series: bool) -> None:
        self._frame, self._names, self._is_series = frame, names, is_series
        self.columns: Sequence[str] | None = [*names, ITEM] if is_series else names
        self.total: int | None = total

    def _row(self, index: int, label: str, values: Sequence[Any]) -> Row:
        columns = dict(zip(self._names, values, strict=True))
        # A series has one value per row, which `{}` and `{item}` mean as they do for a list.
        if self._is_series:
            return Row(index, label, values[0], {ITEM: values[0], **columns})
        return Row(index, label, columns, columns)


class PandasInput(_FrameInput):
    """A pandas frame or series; the result is a copy with columns added."""

    def __init__(self, data: Any, limit: int | None, *, is_series: bool = False) -> None:
        frame = data if limit is None else data.iloc[:limit]
        names = [str(name) for name in data.columns]
        super().__init__(frame, names, len(frame), is_series=is_series)

    def rows(self) -> Iterator[Row]:
        """Return the rows, each labelled by its index."""
        labelled = zip(
            self._frame.index, self._frame.itertuples(index=False, name=None), strict=True
        )
        for index, (label, values) in enumerate(labelled):
            yield self._row(index, str(label), values)

    def with_replies(self, replies: Sequence[Reply]) -> Any:
        """Return a copy of the frame with the result columns."""
        # The caller's frame stays as it is: a cell that is run again starts from the same data.
        pandas = sys.modules["pandas"]
        types: dict[str, Any] = dict.fromkeys(_INTEGER_COLUMNS, "Int64")
        types |= dict.fromkeys(_FLOAT_COLUMNS, "Float64") | {"parsed": object}
        result = self._frame.copy()
        for name, (kind, values) in result_columns(replies, self._names).items():
            result[name] = pandas.Series(values, index=result.index, dtype=types.get(kind))
        return result


class PolarsInput(_FrameInput):
    """A polars frame or series; the result is a frame with columns added."""

    def __init__(self, data: Any, limit: int | None, *, is_series: bool = False) -> None:
        frame = data if limit is None else data.head(limit)
        super().__init__(frame, list(data.columns), frame.height, is_series=is_series)

    def rows(self) -> Iterator[Row]:
        """Return the rows, each labelled by its position."""
        for index, values in enumerate(self._frame.iter_rows()):
            yield self._row(index, str(index), values)

    def with_replies(self, replies: Sequence[Reply]) -> Any:
        """Return the frame with the result columns."""
        polars = sys.modules["polars"]
        types: dict[str, Any] = dict.fromkeys(_INTEGER_COLUMNS, polars.Int64)
        types |= dict.fromkeys(_FLOAT_COLUMNS, polars.Float64) | {"parsed": polars.Object}
        return self._frame.with_columns(
            polars.Series(name, values, dtype=types.get(kind, polars.String))
            for name, (kind, values) in result_columns(replies, self._names).items()
        )


def result_columns(
    replies: Sequence[Reply], taken: Collection[str]
) -> dict[str, tuple[str, list[Any]]]:
    """Return the columns to add: kind and values by name.

    Where one of the names is taken, all get the same number: ``answer_2``, ``error_2``.
    """
    kinds = [*RESULT_COLUMNS]
    if any(reply.parsed is not None for reply in replies):
        kinds.insert(1, "parsed")
    number, suffix = 1, ""
    while any(kind + suffix in taken for kind in kinds):
        number += 1
        suffix = f"_{number}"
    return {kind + suffix: (kind, [_cell(kind, reply) for reply in replies]) for kind in kinds}


def _cell(kind: str, reply: Reply) -> Any:
    if kind == "answer":
        return reply.text if reply else None
    return getattr(reply.usage if kind in _INTEGER_COLUMNS else reply, kind)


def _has_methods(value: object, *names: str) -> bool:
    # Looked up on the type: a proxy or a mock has every attribute.
    return all(hasattr(type(value), name) for name in names)
