"""pandas and polars: frames as rows, and answers as columns beside the user's.

Imports neither: a frame is told by what it can do, and whoever has one has its library loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from nbcodex.errors import ConfigurationError
from nbcodex.mapping.inputs import InputData, Row
from nbcodex.models import Reply
from nbcodex.templating import ITEM

ADDED = ("answer", "input_tokens", "output_tokens", "cost", "error", "id")
"""The columns that are added, in order; ``parsed`` comes after ``answer`` where there is any."""

_WHOLE, _REAL = {"input_tokens", "output_tokens"}, {"cost"}


def frame_of(data: Any, limit: int | None) -> InputData | None:
    """Return the shape of a pandas or polars frame or series; None of anything else.

    Raises
    ------
    ConfigurationError
        If it is a polars query that is yet to be run.
    """
    library = type(data).__module__.partition(".")[0]
    if library == "polars" and type(data).__name__ == "LazyFrame":
        raise ConfigurationError(
            "The data is a query that is yet to be run.", advice="Pass data.collect()."
        )
    if _has(data, "iloc", "index"):
        one = _has(data, "to_frame") and not _has(data, "columns")
        return Pandas(_framed(data, "iloc") if one else data, limit, series=one)
    if library == "polars" and _has(data, "head", "to_frame", "dtype"):
        return Polars(_framed(data, "polars"), limit, series=True)
    if _has(data, "iter_rows", "with_columns"):
        return Polars(data, limit)
    return None


def _framed(series: Any, kind: str) -> Any:
    """Return a series as a frame, with a name for its one column."""
    if kind == "polars":
        return series.to_frame(series.name or ITEM)
    return series.to_frame(ITEM if series.name is None else series.name)


class Pandas:
    """A pandas frame; back comes a copy with columns added."""

    def __init__(self, data: Any, limit: int | None, *, series: bool = False) -> None:
        self._data = data if limit is None else data.iloc[:limit]
        self._series = series
        self._names = [str(name) for name in data.columns]
        self.columns: Sequence[str] | None = [*self._names, *_alias(series)]
        self.total: int | None = len(self._data)

    def rows(self) -> Iterator[Row]:
        """Return the rows, each called by its index."""
        labelled = zip(self._data.index, self._data.itertuples(index=False, name=None), strict=True)
        for index, (label, values) in enumerate(labelled):
            yield _row(index, str(label), self._names, values, series=self._series)

    def back(self, replies: Sequence[Reply]) -> Any:
        """Return a copy of the frame with the answers' columns."""
        pandas = sys.modules["pandas"]
        kept = self._data.copy()
        for name, (kind, values) in added(replies, self._names).items():
            types = dict.fromkeys(_WHOLE, "Int64") | dict.fromkeys(_REAL, "Float64")
            dtype = types.get(kind, object if kind == "parsed" else None)
            kept[name] = pandas.Series(values, index=kept.index, dtype=dtype)
        return kept


class Polars:
    """A polars frame; back comes one with columns added."""

    def __init__(self, data: Any, limit: int | None, *, series: bool = False) -> None:
        self._data = data if limit is None else data.head(limit)
        self._series = series
        self._names = list(data.columns)
        self.columns: Sequence[str] | None = [*self._names, *_alias(series)]
        self.total: int | None = self._data.height

    def rows(self) -> Iterator[Row]:
        """Return the rows, each called by its position."""
        for index, values in enumerate(self._data.iter_rows()):
            yield _row(index, str(index), self._names, values, series=self._series)

    def back(self, replies: Sequence[Reply]) -> Any:
        """Return the frame with the answers' columns."""
        polars = sys.modules["polars"]
        types = dict.fromkeys(_WHOLE, polars.Int64) | dict.fromkeys(_REAL, polars.Float64)
        types["parsed"] = polars.Object
        return self._data.with_columns(
            polars.Series(name, values, dtype=types.get(kind, polars.String))
            for name, (kind, values) in added(replies, self._names).items()
        )


def added(replies: Sequence[Reply], taken: Collection[str]) -> dict[str, tuple[str, list[Any]]]:
    """Return the columns to add: kind and values by name.

    Where one of the names is taken, all get the same number: ``answer_2``, ``error_2``.
    """
    kinds = [*ADDED]
    if any(reply.parsed is not None for reply in replies):
        kinds.insert(1, "parsed")
    number, suffix = 1, ""
    while any(kind + suffix in taken for kind in kinds):
        number += 1
        suffix = f"_{number}"
    return {kind + suffix: (kind, [_cell(kind, reply) for reply in replies]) for kind in kinds}


def _cell(kind: str, reply: Reply) -> Any:
    match kind:
        case "answer":
            return reply.text if reply else None
        case "input_tokens" | "output_tokens":
            return getattr(reply.usage, kind)
        case _:
            return getattr(reply, kind)


def _row(
    index: int, label: str, names: Sequence[str], values: Sequence[Any], *, series: bool
) -> Row:
    columns = dict(zip(names, values, strict=True))
    if series:
        return Row(index, label, values[0], {ITEM: values[0], **columns})
    return Row(index, label, columns, columns)


def _alias(series: bool) -> list[str]:
    return [ITEM] if series else []


def _has(value: object, *names: str) -> bool:
    # asked of the type: a proxy or a mock has every attribute
    return all(hasattr(type(value), name) for name in names)
