"""Input data as rows, and replies as the same kind of data.

Owns which kinds of data a map accepts, and the columns that a frame gets. A frame is recognised by
its methods: a process that holds one has imported pandas or polars, and no other should.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from typing import Any

from nbcodex.errors import ConfigurationError
from nbcodex.models import Reply
from nbcodex.templating import ITEM

# The column that holds the key of a dict's item.
KEY_COLUMN = "key"
# Items of a tuple or list that `{0}`, `{1}`, … can name; more would only cost memory.
MAX_POSITIONAL_COLUMNS = 50
# The columns that a frame gets, in order, and their types. With a schema, its fields and "parsed"
# follow "answer".
RESULT_COLUMNS = {
    "answer": "String",
    "finish": "String",
    "input_tokens": "Int64",
    "output_tokens": "Int64",
    "cost": "Float64",
    "error": "String",
    "id": "String",
}
# The ids of a map's rows, by which the result columns of an earlier run are recognised.
_ROW_ID = re.compile(r"m[0-9a-f]{8}-\d+")
# Whole numbers up to here are exact in a float.
_MAX_EXACT_INTEGER = 2**53


@dataclass(frozen=True, slots=True)
class Row:
    """One input."""

    index: int  # its position, from 0
    label: Hashable  # its name in listings
    item: Any  # what a function of the user's gets
    values: Mapping[str, Any]  # its columns


class InputData(ABC):
    """The rows of a map, of one kind of data."""

    # Recorded with the map, so that another process can return the same kind of result.
    kind: str
    # None for an iterator: its number of rows is unknown.
    total: int | None
    # None where each row has columns of its own.
    columns: Sequence[str] | None = None

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Return the rows in order; an iterator yields them only once."""

    @abstractmethod
    def with_replies(self, replies: Sequence[Reply]) -> Any:
        """Return the replies as the kind of data that was given."""


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
    if not isinstance(data, Iterable):
        raise ConfigurationError(
            f"The data is of type {type(data).__name__}, which cannot be iterated over.",
            advice="Pass a list, a dict, a pandas or polars frame, or an iterator.",
        )
    return ItemsInput(data, limit)


def _read_frame(data: Any, limit: int | None) -> FrameInput | None:
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
    return PolarsInput(data, limit) if _has_methods(data, "iter_rows", "with_columns") else None


def _has_methods(value: object, *names: str) -> bool:
    # Looked up on the type: a proxy or a mock has every attribute.
    return all(hasattr(type(value), name) for name in names)


class ItemsInput(InputData):
    """A list, a tuple, another sized iterable, the values of a mapping, or an iterator."""

    def __init__(self, data: Iterable[Any], limit: int | None) -> None:
        # An iterator is read only as far as rows can be started, and not kept.
        self.kind, self.total = "iterator", None
        self._keys: list[Any] | None = None
        self._items: Iterable[Any] = islice(data, limit)
        if isinstance(data, Mapping):
            self._keys, self._items = list(self._items), list(islice(data.values(), limit))
            self.kind, self.total = "dict", len(self._keys)
        elif isinstance(data, Sized):
            self._items = items = list(self._items)
            self.kind, self.total = "tuple" if isinstance(data, tuple) else "list", len(items)

    def rows(self) -> Iterator[Row]:
        """Return the items in order; those of a mapping have their keys as column ``key``."""
        for index, item in enumerate(self._items):
            if self._keys is None:
                yield Row(index, index, item, _columns_of(item))
            else:
                key = self._keys[index]
                # The item's own column `key` wins: it is what its author means by `{key}`.
                yield Row(index, key, item, {KEY_COLUMN: key, **_columns_of(item)})

    def with_replies(self, replies: Sequence[Reply]) -> Any:
        """Return the replies in order, or by key."""
        if self._keys is not None:
            return dict(zip(self._keys, replies, strict=True))
        return tuple(replies) if self.kind == "tuple" else list(replies)


def _columns_of(item: Any) -> dict[str, Any]:
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


class FrameInput(InputData):
    """A frame or series; the result is a frame with columns added."""

    def __init__(self, frame: Any, names: Sequence[str], total: int, *, is_series: bool) -> None:
        for position, name in enumerate(names):
            if (first := names.index(name)) != position:
                raise ConfigurationError(
                    f"Columns {first} and {position} of the frame have the same name {name!r}, "
                    "so that it is unclear which one a template means. Nothing was sent.",
                    advice="Rename one of them.",
                )
        self._frame, self._names, self._is_series = frame, names, is_series
        self.columns = [*names, ITEM] if is_series else names
        self.total = total
        # The fields of the map's schema, each of which becomes a column.
        self.fields: Sequence[str] = ()
        # Whether the columns of an earlier run are filled again, instead of adding further ones.
        self.replaces_previous = False

    @abstractmethod
    def _column(self, name: str) -> Sequence[Any]:
        """Return the values of a column."""

    @cached_property
    def previous(self) -> list[str]:
        """The result columns of the latest earlier run, if there are any; the last is its id."""
        # Columns before "answer" and after "id" are the user's own.
        for end in range(len(self._names), 0, -1):
            block = self._names[:end]
            if _base_name(block[-1]) == "id":
                ids = [id_ for id_ in self._column(block[-1]) if isinstance(id_, str)]
                if ids and all(map(_ROW_ID.fullmatch, ids)):
                    answers = [n for n in range(end) if _base_name(block[n]) == "answer"]
                    # A schema's field `answer` comes after the column of whole answers.
                    own = answers[:-1] if "answer" in self.fields else answers
                    return [*block[own[-1] if own else -1 :]]
        return []

    def previous_ids(self, limit: int) -> list[tuple[Row, str]]:
        """Return the first `limit` rows that an earlier run had, with their ids."""
        if not self.previous:
            return []
        ids = self._column(self.previous[-1])
        # pandas has NaN for rows that were added since.
        pairs = zip(self.rows(), ids, strict=True)
        return list(islice((pair for pair in pairs if isinstance(pair[1], str)), limit))

    def _row(self, index: int, label: Hashable, values: Sequence[Any]) -> Row:
        columns = dict(zip(self._names, values, strict=True))
        # A series has one value per row, which `{}` and `{item}` mean as they do for a list.
        if self._is_series:
            return Row(index, label, values[0], {ITEM: values[0], **columns})
        return Row(index, label, columns, columns)

    def _result_columns(self, replies: Sequence[Reply]) -> dict[str, tuple[str, list[Any]]]:
        """Return types and values by name. A type is empty where it depends on the values."""
        # As JSON values, which is also how a resume reads them from the journal.
        parsed = [
            value.model_dump(mode="json", by_alias=True) if hasattr(value, "model_dump") else value
            for value in (reply.parsed for reply in replies)
        ]
        objects = [each if isinstance(each, dict) else {} for each in parsed]
        previous = sorted(self.previous, key=lambda name: (len(name), name))
        taken = set(self._names)

        def free_name(base: str) -> str:
            """Return `base`, with a number if the user has a column of that name."""
            for name in previous if self.replaces_previous else ():
                if _base_name(name) == _base_name(base):
                    previous.remove(name)
                    return name
            numbered = (f"{base}_{n}" if n > 1 else base for n in count(1))
            name = next(each for each in numbered if each not in taken)
            taken.add(name)
            return name

        # Named before the fields of a schema, so that `answer` and `cost` always mean the same.
        results = {
            free_name(column): (kind, [_result_value(column, reply) for reply in replies])
            for column, kind in RESULT_COLUMNS.items()
        }
        fields = {
            free_name(field): ("", [each.get(field) for each in objects]) for field in self.fields
        }
        if any(each is not None for each in parsed):
            fields[free_name("parsed")] = "", parsed
        answer, *others = results.items()
        return dict([answer, *fields.items(), *others])


def _base_name(column: str) -> str:
    return re.sub(r"_\d+$", "", column)


def _result_value(column: str, reply: Reply) -> Any:
    match column:
        case "answer":
            return reply.text if reply else None
        case "finish":
            return (reply.cut or "stop") if reply else None
        case "input_tokens" | "output_tokens":
            return getattr(reply.usage, column)
        case _:
            return getattr(reply, column)


class PandasInput(FrameInput):
    """A pandas frame or series."""

    kind = "pandas"

    def __init__(self, data: Any, limit: int | None, *, is_series: bool = False) -> None:
        frame = data if limit is None else data.iloc[:limit]
        names = [str(name) for name in data.columns]
        super().__init__(frame, names, len(frame), is_series=is_series)
        # Judged by all rows: the first few may happen to have no missing value.
        self._integers = [n for n in range(len(names)) if _holds_integers(data.iloc[:, n])]

    def _column(self, name: str) -> Sequence[Any]:
        return list(self._frame.iloc[:, self._names.index(name)])

    def rows(self) -> Iterator[Row]:
        """Return the rows, each labelled by its index."""
        tuples = self._frame.itertuples(index=False, name=None)
        labelled = zip(self._frame.index, tuples, strict=True)
        for index, (label, values) in enumerate(labelled):
            cells = list(values)
            for n in self._integers:
                cells[n] = int(cells[n]) if cells[n] == cells[n] else None
            yield self._row(index, label, cells)

    def with_replies(self, replies: Sequence[Reply]) -> Any:
        """Return a copy of the frame with the result columns."""
        # The caller's frame stays as it is: a cell that is run again starts from the same data.
        pandas = importlib.import_module("pandas")
        result = self._frame.copy()
        for name, (kind, values) in self._result_columns(replies).items():
            # Nullable types have the same values whether some are missing or not.
            types = {type(value) for value in values if value is not None}
            if kind in {"Int64", "Float64"}:
                dtype = kind
            elif types == {bool}:
                dtype = "boolean"
            elif types == {int}:
                dtype = "Int64"
            else:
                dtype = "Float64" if types and types <= {int, float} else "object"
            result[name] = pandas.Series(values, index=result.index, dtype=dtype)
        return result


def _holds_integers(column: Any) -> bool:
    """Return whether a float column holds integers that pandas converted for a missing value."""
    if not str(column.dtype).startswith("float"):  # nullable types keep integers by themselves
        return False
    present = column.dropna()
    if not 0 < len(present) < len(column) or present.abs().max() > _MAX_EXACT_INTEGER:
        return False
    return bool((present % 1 == 0).all())


class PolarsInput(FrameInput):
    """A polars frame or series."""

    kind = "polars"

    def __init__(self, data: Any, limit: int | None, *, is_series: bool = False) -> None:
        frame = data if limit is None else data.head(limit)
        super().__init__(frame, list(data.columns), frame.height, is_series=is_series)

    def _column(self, name: str) -> Sequence[Any]:
        return list(self._frame[name])

    def rows(self) -> Iterator[Row]:
        """Return the rows, each labelled by its position."""
        for index, values in enumerate(self._frame.iter_rows()):
            yield self._row(index, index, values)

    def with_replies(self, replies: Sequence[Reply]) -> Any:
        """Return the frame with the result columns."""
        polars = importlib.import_module("polars")
        # Values of a schema get the type that they have, such as a struct, which can be saved.
        return self._frame.with_columns(
            polars.Series(name, values, dtype=getattr(polars, kind) if kind else None, strict=False)
            for name, (kind, values) in self._result_columns(replies).items()
        )


class JournalInput(InputData):
    """The rows of a map of another process, from the journal: their data is not known."""

    def __init__(
        self, labels: Sequence[Hashable], fields: Sequence[str], kind: str, *, unknown: int
    ) -> None:
        self._labels, self._fields, self.kind = labels, fields, kind
        self.total = len(labels)
        self.unknown = unknown  # number of rows that never reached the journal

    def rows(self) -> Iterator[Row]:
        """Return nothing: the known rows are restored from their entries."""
        return iter(())

    def with_replies(self, replies: Sequence[Reply]) -> Any:
        """Return the replies as the kind of data that was given."""
        # A frame of the result columns only, with the rows' keys, or else their positions.
        frame: FrameInput
        if self.kind == "pandas":
            pandas = importlib.import_module("pandas")
            frame = PandasInput(pandas.DataFrame(index=list(self._labels)), None)
        elif self.kind == "polars":
            polars = importlib.import_module("polars")
            labels = [str(label) for label in self._labels]
            frame = PolarsInput(polars.DataFrame({"row": labels}), None)
        else:
            return tuple(replies) if self.kind == "tuple" else list(replies)
        frame.fields = self._fields
        return frame.with_replies(replies)
