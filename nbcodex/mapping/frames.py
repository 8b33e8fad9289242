"""pandas and polars frames as rows, and replies as columns beside the user's.

Owns the result columns: their names, types, and how those of an earlier run are recognised. Never
imports pandas or polars: a frame is recognised by its methods, and a process that holds one has
loaded its library.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from itertools import count, islice
from typing import Any

from nbcodex.errors import ConfigurationError
from nbcodex.mapping.rows import InputData, Row
from nbcodex.models import Reply
from nbcodex.templating import ITEM

# The columns that a frame gets, in order. With a schema, its fields and "parsed" follow "answer".
RESULT_COLUMNS = ("answer", "finish", "input_tokens", "output_tokens", "cost", "error", "id")
# pandas turns integers beside a missing value into floats unless the column's type is nullable.
_INTEGER_COLUMNS, _FLOAT_COLUMNS = ("input_tokens", "output_tokens"), ("cost",)
# The ids of a map's rows, by which the result columns of an earlier run are recognised.
_ROW_ID = re.compile(r"m[0-9a-f]{8}-\d+")
# Whole numbers up to here are exact in a float.
_MAX_EXACT_INTEGER = 2**53


def read_frame(data: Any, limit: int | None) -> InputData | None:
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


class FrameInput:
    """What both kinds of frames share.

    Attributes
    ----------
    fields : sequence of str
        The fields of the map's schema, each of which becomes a column.
    replaces_previous : bool
        Whether the columns of an earlier run are filled again, instead of adding further ones.
    """

    def __init__(self, frame: Any, names: Sequence[str], total: int, *, is_series: bool) -> None:
        for position, name in enumerate(names):
            if (first := names.index(name)) != position:
                raise ConfigurationError(
                    f"Columns {first} and {position} of the frame have the same name {name!r}, "
                    "so that it is unclear which one a template means. Nothing was sent.",
                    advice="Rename one of them.",
                )
        self._frame, self._names, self._is_series = frame, names, is_series
        self.columns: Sequence[str] | None = [*names, ITEM] if is_series else names
        self.total: int | None = total
        self.fields: Sequence[str] = ()
        self.replaces_previous = False

    kind = ""

    def _column(self, name: str) -> Sequence[Any]:
        raise NotImplementedError

    @cached_property
    def previous(self) -> list[str]:
        """The result columns of the latest earlier run, if there are any; the last one is its id.

        Columns before "answer" and after "id" are the user's own.
        """
        for end in range(len(self._names), 0, -1):
            block = self._names[:end]
            if _base_name(block[-1]) == "id":
                ids = [id_ for id_ in self._column(block[-1]) if isinstance(id_, str)]
                if ids and all(map(_ROW_ID.fullmatch, ids)):
                    answers = [n for n in range(end) if _base_name(block[n]) == "answer"]
                    # The field `answer` of a schema stands behind the answer itself.
                    own = answers[:-1] if "answer" in self.fields else answers
                    return [*block[own[-1] if own else -1 :]]
        return []

    def previous_ids(self, limit: int) -> list[tuple[Row, str]]:
        """Return the first `limit` rows that an earlier run had, with their ids."""
        if not self.previous:
            return []
        ids = self._column(self.previous[-1])
        pairs = ((row, id_) for row, id_ in zip(self.rows(), ids, strict=True) if id_)
        return list(islice(pairs, limit))

    def rows(self) -> Iterator[Row]:
        """Return the rows in order."""
        raise NotImplementedError

    def _row(self, index: int, label: Hashable, values: Sequence[Any]) -> Row:
        columns = dict(zip(self._names, values, strict=True))
        # A series has one value per row, which `{}` and `{item}` mean as they do for a list.
        if self._is_series:
            return Row(index, label, values[0], {ITEM: values[0], **columns})
        return Row(index, label, columns, columns)

    def _result_columns(self, replies: Sequence[Reply]) -> dict[str, tuple[str, list[Any]]]:
        """Return the columns to fill: kind and values by name. Names of the user's get a number."""
        parsed = [to_plain(reply.parsed) for reply in replies]
        objects = [each if isinstance(each, dict) else {} for each in parsed]
        previous = sorted(self.previous, key=lambda name: (len(name), name))
        taken = set(self._names)

        def name_for(base: str) -> str:
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
            name_for(kind): (kind, [_cell(kind, reply) for reply in replies])
            for kind in RESULT_COLUMNS
        }
        fields = {
            name_for(field): ("", [each.get(field) for each in objects]) for field in self.fields
        }
        if any(each is not None for each in parsed):
            fields[name_for("parsed")] = "", parsed
        answer, *others = results.items()
        return dict([answer, *fields.items(), *others])


class PandasInput(FrameInput):
    """A pandas frame or series; the result is a copy with columns added."""

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
        pandas = sys.modules["pandas"]
        result = self._frame.copy()
        for name, (kind, values) in self._result_columns(replies).items():
            result[name] = pandas.Series(values, index=result.index, dtype=_dtype(kind, values))
        return result


def _holds_integers(column: Any) -> bool:
    """Return whether a float column holds integers that pandas converted for a missing value."""
    if not str(column.dtype).startswith("float"):  # nullable types keep integers by themselves
        return False
    present = column.dropna()
    if not 0 < len(present) < len(column) or present.abs().max() > _MAX_EXACT_INTEGER:
        return False
    return bool((present % 1 == 0).all())


def _dtype(kind: str, values: Sequence[Any]) -> Any:
    """Return a pandas type that has the same values whether some are missing or not."""
    if kind in _INTEGER_COLUMNS or kind in _FLOAT_COLUMNS:
        return "Int64" if kind in _INTEGER_COLUMNS else "Float64"
    types = {type(value) for value in values if value is not None}
    if types == {bool}:
        return "boolean"
    if types == {int}:
        return "Int64"
    return "Float64" if types and types <= {int, float} else object


class PolarsInput(FrameInput):
    """A polars frame or series; the result is a frame with columns added."""

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
        polars = sys.modules["polars"]
        types: dict[str, Any] = dict.fromkeys(_INTEGER_COLUMNS, polars.Int64)
        types |= dict.fromkeys(_FLOAT_COLUMNS, polars.Float64)
        types |= dict.fromkeys(("answer", "finish", "error", "id"), polars.String)
        # Values of a schema get the type that they have, such as a struct, which can be saved.
        return self._frame.with_columns(
            polars.Series(name, values, dtype=types.get(kind), strict=False)
            for name, (kind, values) in self._result_columns(replies).items()
        )


def to_plain(value: Any) -> Any:
    """Return a parsed answer as JSON values, as it also comes back from the journal."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", by_alias=True)
    return value


def _base_name(column: str) -> str:
    return re.sub(r"_\d+$", "", column)


def _cell(kind: str, reply: Reply) -> Any:
    match kind:
        case "answer":
            return reply.text if reply else None
        case "finish":
            return (reply.cut or "stop") if reply else None
        case "input_tokens" | "output_tokens":
            return getattr(reply.usage, kind)
        case _:
            return getattr(reply, kind)


def _has_methods(value: object, *names: str) -> bool:
    # Looked up on the type: a proxy or a mock has every attribute.
    return all(hasattr(type(value), name) for name in names)
