"""Turns rows into requests: by the template or function, the options of all rows, and row keys.

A user's function is called in the thread that executes the map.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from nbcodex.errors import ConfigurationError, NbcodexError, did_you_mean, shorten
from nbcodex.mapping.inputs import InputData, Row
from nbcodex.models import DAY, Origin, Request, RequestOptions, Schema
from nbcodex.requests.options import build_request
from nbcodex.settings import Settings
from nbcodex.templating import Template

# Without a patience of the user's, rows wait for limits and faults as long as necessary.
DEFAULT_PATIENCE_S = 365 * DAY

RowFunction = Callable[[Any], object]
PromptSource = str | RowFunction  # a template, or a function that returns a prompt
RowKey = str | RowFunction | None  # a column, or a function that returns the name of a row

# Rows cannot join a conversation: they would not see it, and each would become a turn of it.
_ROW_OPTIONS = frozenset(field.name for field in fields(RequestOptions)) - {"thread"}


class RowRequests:
    """Makes the requests of a map, checked as far as possible before any is sent."""

    def __init__(
        self,
        source: PromptSource,
        data: InputData,
        options: RequestOptions,
        *,
        row_key: RowKey,
        settings: Settings,
        origin: Origin,
    ) -> None:
        if not (row_key is None or isinstance(row_key, str) or callable(row_key)):
            raise ConfigurationError("row_key must be the name of a column or a function of a row.")
        self.template: Template | None = None
        self.row_key, self.settings, self.origin = row_key, settings, origin
        if isinstance(source, str):
            # Names of columns are template fields even if they contain spaces and punctuation.
            columns: Collection[str] = data.columns or ()
            if data.columns is None and data.total is not None:  # an iterator would be used up
                columns = next((row.values.keys() for row in data.rows()), ())
            self.template = Template(source, columns)
            self.template.check_misspelt_fields(columns)
        elif callable(source):
            self._function = source
        else:
            raise ConfigurationError(
                f"The template is of type {type(source).__name__}.",
                advice="Pass a text or a function of a row.",
            )
        # `reuse` is on, unlike for single requests: running a map again must not pay twice.
        if options.reuse is None:
            options = replace(options, reuse=True)
        if options.patience is None:
            options = replace(options, patience=DEFAULT_PATIENCE_S)
        if isinstance(options.images, Iterator):  # it would be used up by the first row
            options = replace(options, images=tuple(options.images))
        self.options = options
        # An invalid option would fail in every row: the error is raised here instead.
        self.schema = build_request("?", settings, options).schema
        # Frames have the same columns in every row. Of other data each row is looked at, but an
        # iterator would be used up by that: its rows fail one by one.
        columns_by_data: Iterable[tuple[str, Collection[str]]] = ()
        if data.columns is not None:
            columns_by_data = [("the data", data.columns)]
        elif data.total is not None and (self.template or isinstance(row_key, str)):
            columns_by_data = (
                (f"row {shorten(str(row.label), max_chars=60)}", row.values) for row in data.rows()
            )
        for data_name, columns in columns_by_data:
            if self.template:
                self.template.check_columns(columns, data_name=data_name)
            if isinstance(row_key, str) and row_key not in columns:
                raise ConfigurationError(
                    f"The row key {row_key!r} is not a column of {data_name}.",
                    advice="Pass the name of a column, or a function of a row.",
                )

    def label(self, row: Row) -> Hashable:
        """Return the name of a row: its row key, else its index, key or position."""
        key = self._row_key_of(row)
        return row.label if key is None else key

    def request(self, row: Row) -> Request:
        """Return the request of a row; raise a NbcodexError if none can be made of it."""
        prompt: object
        if self.template:
            prompt = self.template.fill(row.values)
        else:
            prompt = _call_function("The function", self._function, row.item)
        options = self.options
        if isinstance(prompt, Mapping):
            row_options = dict(prompt)
            prompt = row_options.pop("prompt", None)
            for name in row_options:
                if name not in _ROW_OPTIONS:
                    raise ConfigurationError(
                        f"There is no option {name[:40]!r}{did_you_mean(name, _ROW_OPTIONS)}",
                        advice="Rows accept the options of nbcodex.ask except thread.",
                    )
            given = {name: value for name, value in row_options.items() if value is not None}
            options = replace(options, **given)
        if not isinstance(prompt, str):
            raise ConfigurationError(
                f"The function returned {type(prompt).__name__} instead of a prompt.",
                advice="Return a text, or a dict of 'prompt' and options.",
            )
        origin = replace(self.origin, row_index=row.index)
        request = build_request(prompt, self.settings, options, origin=origin)
        key = self._row_key_of(row)
        row_key = None if key is None else str(key)
        # The id is derived, not random, so that a resume finds the row's entry by it.
        return replace(request, id=f"{origin.map_id}-{row.index}", row=row_key)

    def fingerprint(self, row: Row) -> int | None:
        """Return a number that rows with equal requests share; None where there is none."""
        # For an estimate, before the user agrees to the map: the user's functions are not called.
        # Without `reuse`, equal rows are sent one by one.
        if self.template is None or callable(self.row_key) or not self.options.reuse:
            return None
        try:
            return hash((self.template.fill(row.values), str(self._row_key_of(row))))
        except NbcodexError:
            return None

    def _row_key_of(self, row: Row) -> Hashable | None:
        if self.row_key is None:
            return None
        if isinstance(self.row_key, str):
            key: object = row.values.get(self.row_key, row.label)
        else:
            key = _call_function("The row key", self.row_key, row.item)
        # Keys keep their type, so that the user can index the data with those of failed rows.
        return key if isinstance(key, Hashable) else str(key)


def _call_function(name: str, function: RowFunction, item: Any) -> object:
    try:
        return function(item)
    except NbcodexError:
        raise
    except Exception as error:
        detail = shorten(f"{type(error).__name__}: {error}", max_chars=200)
        raise ConfigurationError(f"{name} failed: {detail}") from error


def schema_fields(schema: Schema | None) -> tuple[str, ...] | None:
    """Return the names of a schema's fields; None without a schema."""
    return tuple(schema.definition.get("properties", ())) if schema else None
