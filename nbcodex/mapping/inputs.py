"""Turns the data of a map into rows, and the replies into the same kind of data.

A frame is recognised by its methods, without importing pandas or polars, which takes seconds: where
there is a frame, its library has been imported already.
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
from nbcodex.templating import ITEM, type_has

KEY_COLUMN = "key"  # the column that holds the key of each item of a dict
# Elements of a row that is a tuple or list, which `{0}`, `{1}`, … can name: more cost memory.
MAX_POSITIONAL_COLUMNS = 50
# The columns that a frame gets, in order: the type of each as polars names it, and what it
# holds of a reply. With a schema, its fields and "parsed" follow "answer".
RESULT_COLUMNS: dict[str, tuple[str, Any]] = {
    "answer": ("String", lambda reply: reply.text if reply else None),
    "finish": ("String", lambda reply: (reply.cut or "stop") if reply else None),
    "input_tokens": ("Int64", lambda reply: reply.usage.input_tokens),
    "output_tokens": ("Int64", lambda reply: reply.usage.output_tokens),
    "cost": ("Float64", lambda reply: reply.cost),
    "error": ("String", lambda reply: reply.error),
    "id": ("String", lambda reply: reply.id),
}
# A row's id, such as ``m3f2a9c1d-17``: the result columns of a map end with a column of ids.
_ROW_ID = re.compile(r"m[0-9a-f]{8}-\d+")
_MAX_EXACT_INTEGER = 2**53  # whole numbers up to here are exact in a float


@dataclass(frozen=True, slots=True)
class Row:
    """One input."""

    index: int  # its position, from 0
    label: Hashable  # its name in listings and errors, unless there is a row key
    item: Any  # the argument of a function that makes prompts or row keys
    values: Mapping[str, Any]  # its values by column


class InputData(ABC):
    """The rows of a map, of one kind of data."""

    # ``list``, ``pandas`` and so on. Stored with the map, so that another process can return the
    # same kind of data.
    kind: str
    # The number of rows; None for an iterator, where it is unknown.
    total: int | None
    # The columns that all rows have; None where each row has columns of its own.
    columns: Sequence[str] | None = None
    # The number of rows whose data is known to another process only, and not to the journal.
    unstored_rows = 0

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Return the rows in order; an iterator yields them only once."""

    @abstractmethod
    def with_replies(self, replies: Sequence[Reply]) -> Any:
        """Return the replies as the kind of data that was given."""


def read_input(data: Any, *, limit: int | None = None) -> InputData:
    """Return `data`, or its first `limit` rows; raise a ConfigurationError if it has no rows."""
    # Frames first, because iterating over one yields its column names.
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
    if type_has(data, "iloc", "index"):
        if type_has(data, "to_frame") and not type_has(data, "columns"):
            name = ITEM if data.name is None else data.name
            return PandasInput(data.to_frame(name), limit, is_series=True)
        return PandasInput(data, limit)
    if library == "polars" and type_has(data, "head", "to_frame", "dtype"):
        return PolarsInput(data.to_frame(data.name or ITEM), limit, is_series=True)
    return PolarsInput(data, limit) if type_has(data, "iter_rows", "with_columns") else None


class ItemsInput(InputData):
    """A list, a tuple, another sized iterable, the values of a mapping, or an iterator."""

    def __init__(self, data: Iterable[Any], limit: int | None = None) -> None:
        # Items of an iterator are read only when their rows can be started, and not kept.
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
                yield Row(index, label=index, item=item, values=_columns_of(item))
            else:
                key = self._keys[index]
                # If the item has a column `key` itself, `{key}` means that one.
                values = {KEY_COLUMN: key, **_columns_of(item)}
                yield Row(index, label=key, item=item, values=values)

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
        # The fields of the map's schema, each of which becomes a column; None without a schema.
        self.schema_fields: Sequence[str] | None = None
        # Whether the result columns of an earlier map are filled again, instead of adding others.
        self.refills_columns = False

    @abstractmethod
    def _column(self, name: str) -> Sequence[Any]:
        """Return the values of a column."""

    @cached_property
    def earlier_columns(self) -> list[str]:
        """The result columns of the latest earlier map, from ``answer`` to ``id``, if any."""
        # Columns to the left of "answer" and to the right of "id" are the user's own.
        for end in range(len(self._names), 0, -1):
            names = self._names[:end]
            if _base_name(names[-1]) == "id":
                ids = [id_ for id_ in self._column(names[-1]) if isinstance(id_, str)]
                if ids and all(map(_ROW_ID.fullmatch, ids)):
                    starts = [n for n in range(end) if _base_name(names[n]) == "answer"]
                    # A field `answer` of the schema comes after the column of whole answers.
                    starts = starts[:-1] if "answer" in (self.schema_fields or ()) else starts
                    return [*names[starts[-1] if starts else -1 :]]
        return []

    def rows_with_earlier_ids(self, limit: int) -> list[tuple[Row, str]]:
        """Return the first `limit` rows that the earlier map had, each with its id there."""
        if not self.earlier_columns:
            return []
        ids = self._column(self.earlier_columns[-1])
        # The id of a row that was added since is NaN in pandas.
        pairs = zip(self.rows(), ids, strict=True)
        return list(islice((pair for pair in pairs if isinstance(pair[1], str)), limit))

    def _row(self, index: int, label: Hashable, values: Sequence[Any]) -> Row:
        columns = dict(zip(self._names, values, strict=True))
        # A series has one value per row, which `{}` and `{item}` stand for, as in a list.
        if self._is_series:
            return Row(index, label, item=values[0], values={ITEM: values[0], **columns})
        return Row(index, label, item=columns, values=columns)

    def _result_columns(self, replies: Sequence[Reply]) -> dict[str, tuple[str, list[Any]]]:
        """Return polars' type and the values by column; "" where the values determine the type."""
        # Objects become JSON values: a resume, which reads the journal, has nothing else.
        parsed = [
            value.model_dump(mode="json", by_alias=True) if hasattr(value, "model_dump") else value
            for value in (reply.parsed for reply in replies)
        ]
        objects = [each if isinstance(each, dict) else {} for each in parsed]
        # Shortest first: "answer" before "answer_2", "answer_9" before "answer_10".
        refilled = sorted(self.earlier_columns, key=lambda name: (len(name), name))
        taken = set(self._names)

        def column_name(base: str) -> str:
            """Return the earlier column of this name, else `base` with a number if it is taken."""
            for name in refilled if self.refills_columns else ():
                if _base_name(name) == _base_name(base):
                    refilled.remove(name)
                    return name
            numbered = (f"{base}_{n}" if n > 1 else base for n in count(1))
            name = next(each for each in numbered if each not in taken)
            taken.add(name)
            return name

        # Named before the fields of a schema, so that `answer` and `cost` always mean the same.
        results = {
            column_name(column): (type_, list(map(value_of, replies)))
            for column, (type_, value_of) in RESULT_COLUMNS.items()
        }
        fields = {
            column_name(field): ("", [each.get(field) for each in objects])
            for field in self.schema_fields or ()
        }
        # A template that is a function may state a schema for a row where the map has none.
        if self.schema_fields is not None or any(each is not None for each in parsed):
            fields[column_name("parsed")] = "", parsed
        answer, *others = results.items()
        return dict([answer, *fields.items(), *others])


def _base_name(column: str) -> str:
    """Return a column's name without the number at its end: ``answer`` for ``answer_2``."""
    return re.sub(r"_\d+$", "", column)


class PandasInput(FrameInput):
    """A pandas frame or series."""

    kind = "pandas"

    def __init__(self, data: Any, limit: int | None = None, *, is_series: bool = False) -> None:
        # A copy: if the user sorted the frame meanwhile, answers would get into other rows.
        frame = data.iloc[:limit].copy()
        names = [str(name) for name in data.columns]
        super().__init__(frame, names, len(frame), is_series=is_series)
        # Positions of these columns. All rows count, because the first `limit` may miss no value.
        self._integer_columns = [n for n in range(len(names)) if _holds_integers(data.iloc[:, n])]

    def _column(self, name: str) -> Sequence[Any]:
        return list(self._frame.iloc[:, self._names.index(name)])

    def rows(self) -> Iterator[Row]:
        """Return the rows, each labelled by its index."""
        tuples = self._frame.itertuples(index=False, name=None)
        labelled = zip(self._frame.index, tuples, strict=True)
        for index, (label, values) in enumerate(labelled):
            cells = list(values)
            for n in self._integer_columns:
                cells[n] = int(cells[n]) if cells[n] == cells[n] else None  # NaN equals nothing
            yield self._row(index, label, cells)

    def with_replies(self, replies: Sequence[Reply]) -> Any:
        """Return a copy of the frame with the result columns."""
        pandas = importlib.import_module("pandas")
        result = self._frame.copy()
        for name, (polars_type, values) in self._result_columns(replies).items():
            # Nullable types, so that the type does not depend on whether values are missing.
            types = {type(value) for value in values if value is not None}
            if polars_type in {"Int64", "Float64"}:
                dtype = polars_type
            elif len(types) == 1:
                dtype = {bool: "boolean", int: "Int64", float: "Float64"}.get(types.pop(), "object")
            else:
                dtype = "Float64" if types == {int, float} else "object"
            result[name] = pandas.Series(values, index=result.index, dtype=dtype)
        return result


def _holds_integers(column: Any) -> bool:
    """Return whether pandas made a column of integers one of floats, because values are missing."""
    if not str(column.dtype).startswith("float"):  # nullable types keep integers by themselves
        return False
    present = column.dropna()
    if not 0 < len(present) < len(column) or present.abs().max() > _MAX_EXACT_INTEGER:
        return False
    return bool((present % 1 == 0).all())


class PolarsInput(FrameInput):
    """A polars frame or series."""

    kind = "polars"

    def __init__(self, data: Any, limit: int | None = None, *, is_series: bool = False) -> None:
        # A copy that shares the values. The user may change the frame while the map is stopped.
        frame = data.clone() if limit is None else data.head(limit)
        super().__init__(frame, list(data.columns), frame.height, is_series=is_series)

    def _column(self, name: str) -> Sequence[Any]:
        return list(self._frame[name])

    def rows(self) -> Iterator[Row]:
        """Return the rows, each labelled by its position."""
        for index, values in enumerate(self._frame.iter_rows()):
            yield self._row(index, label=index, values=values)

    def with_replies(self, replies: Sequence[Reply]) -> Any:
        """Return the frame with the result columns."""
        polars = importlib.import_module("polars")
        # Values of a schema get the type that they have, such as a struct, which can be saved.
        return self._frame.with_columns(
            polars.Series(name, values, getattr(polars, type_) if type_ else None, strict=False)
            for name, (type_, values) in self._result_columns(replies).items()
        )


def rows_from_journal(
    labels: Sequence[Hashable], kind: str, schema_fields: Sequence[str] | None
) -> InputData:
    """Return the rows of a map of another process, whose data is not known: only its journal is."""
    if kind not in {"pandas", "polars"}:
        return ItemsInput(tuple(labels) if kind == "tuple" else list(labels))
    # A frame has the result columns only, beside the rows' keys, or else their positions.
    new_frame = importlib.import_module(kind).DataFrame
    if kind == "pandas":
        frame: FrameInput = PandasInput(new_frame(index=list(labels)))
    else:
        frame = PolarsInput(new_frame({"row": list(map(str, labels))}))
    frame.schema_fields = schema_fields
    return frame
