"""How a row becomes a request.

Owns the template or function, the options that all rows share, and row keys. A user's function is
called in the thread that asks for the request. Must not know what becomes of the request.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from nbcodex.errors import ConfigurationError, NbcodexError, shorten
from nbcodex.mapping.inputs import InputData, Row
from nbcodex.models import DAY, Origin, Request
from nbcodex.requests.options import RequestOptions, build_request
from nbcodex.settings import Settings
from nbcodex.templating import Template

# Rows wait for limits and faults as long as necessary, unless the user sets a patience.
DEFAULT_PATIENCE_S = 365 * DAY

PromptSource = str | Callable[[Any], object]
RowKey = str | Callable[[Any], object] | None

# Rows are no conversation: they would not see it, and each would become a turn of it.
_OPTION_NAMES = frozenset(field.name for field in fields(RequestOptions)) - {"thread"}


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are set; raise a ConfigurationError if one does not exist."""
    for name in options:
        if name not in _OPTION_NAMES:
            near = difflib.get_close_matches(name, _OPTION_NAMES, n=1)
            raise ConfigurationError(
                f"There is no option {name[:40]!r}"
                + (f"; did you mean {near[0]!r}?" if near else "."),
                advice="Rows accept the options of nbcodex.ask except thread.",
            )
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(images := given.get("images"), Iterator):
        given["images"] = tuple(images)  # an iterator would be used up by the first row
    return given


@dataclass(frozen=True, slots=True)
class RowRequests:
    """Makes the requests of a map. `options` hold for all rows."""

    source: Template | Callable[[Any], object]
    options: Mapping[str, Any]
    row_key: RowKey
    settings: Settings
    origin: Origin

    @property
    def uses_function(self) -> bool:
        """Whether a function of the user's makes the prompts."""
        return not isinstance(self.source, Template)

    def check(self, data: InputData) -> None:
        """Raise a ConfigurationError for what would fail in every row, before anything is sent."""
        build_request("?", self.settings, RequestOptions(**self.options))
        # Frames have the same columns in every row. Of other data each row is looked at, but an
        # iterator would be used up by that: its rows are refused one by one.
        if data.columns is not None:
            self._check_columns(data.columns, "the data")
        elif data.total is not None and (
            isinstance(self.source, Template) or isinstance(self.row_key, str)
        ):
            for row in data.rows():
                self._check_columns(row.values, f"row {shorten(row.label, 60)}")

    def _check_columns(self, columns: Collection[str], where: str) -> None:
        if isinstance(self.source, Template):
            self.source.check(columns, row=where)
        if isinstance(self.row_key, str) and self.row_key not in columns:
            raise ConfigurationError(
                f"The row key {self.row_key!r} is not a column of {where}.",
                advice="Pass the name of a column, or a function of a row.",
            )

    def label(self, row: Row) -> str:
        """Return the name of a row: its row key, else its index, key or position."""
        key = self._key(row)
        return row.label if key is None else key

    def request(self, row: Row) -> Request:
        """Return the request of a row; raise a NbcodexError if none can be made of it."""
        prompt, options = self._prompt(row), self.options
        if isinstance(prompt, Mapping):
            own = dict(prompt)
            prompt, options = own.pop("prompt", None), {**options, **given_options(own)}
        if not isinstance(prompt, str):
            raise ConfigurationError(
                f"The function returned {type(prompt).__name__} instead of a prompt.",
                advice="Return a text, or a dict of 'prompt' and options.",
            )
        # The id is derived, not random: a resume finds the entry of a row without a look-up table.
        origin = replace(self.origin, row_index=row.index)
        request = build_request(prompt, self.settings, RequestOptions(**options), origin=origin)
        return replace(request, id=f"{origin.map_id}-{row.index}", row=self._key(row))

    def fingerprint(self, row: Row) -> int | None:
        """Return a number that rows with equal requests share; None where it is unknown.

        The user's functions are not called: estimates use this before the user agreed to anything.
        """
        if not isinstance(self.source, Template) or callable(self.row_key):
            return None
        if not self.options["reuse"]:  # equal rows are then asked one by one
            return None
        try:
            return hash((self.source.fill(row.values), self._key(row)))
        except NbcodexError:
            return None

    def _prompt(self, row: Row) -> object:
        if isinstance(self.source, Template):
            return self.source.fill(row.values)
        return _call("The function", self.source, row.item)

    def _key(self, row: Row) -> str | None:
        if self.row_key is None:
            return None
        if isinstance(self.row_key, str):
            return str(row.values.get(self.row_key, row.label))
        return str(_call("The row key", self.row_key, row.item))


def _call(name: str, function: Callable[[Any], object], item: Any) -> object:
    try:
        return function(item)
    except NbcodexError:
        raise
    except Exception as error:
        detail = shorten(f"{type(error).__name__}: {error}", 200)
        raise ConfigurationError(f"{name} failed: {detail}") from error


def row_requests(
    source: PromptSource,
    data: InputData,
    options: Mapping[str, Any],
    *,
    row_key: RowKey,
    settings: Settings,
    origin: Origin,
) -> RowRequests:
    """Return how the rows of `data` become requests, checked as far as possible before sending."""
    if not (row_key is None or isinstance(row_key, str) or callable(row_key)):
        raise ConfigurationError("row_key must be the name of a column, or a function of a row.")
    if isinstance(source, str):
        if not source.strip():
            raise ConfigurationError("The template is empty.", advice="Write 'Translate {text}'.")
        parsed: Template | Callable[[Any], object] = Template(source, _known_columns(data))
    elif callable(source):
        parsed = source
    else:
        raise ConfigurationError(
            f"The template is of type {type(source).__name__}.",
            advice="Pass a text or a function of a row.",
        )
    # `reuse` is on, unlike for single requests: running a map again must not pay twice.
    shared = {"patience": DEFAULT_PATIENCE_S, "reuse": True, **given_options(options)}
    requests = RowRequests(parsed, shared, row_key, settings, origin)
    requests.check(data)
    return requests


def _known_columns(data: InputData) -> Collection[str]:
    """Return the columns of the data, as far as they can be read without using it up."""
    # Known names may contain spaces and punctuation, which the template would not recognise.
    if data.columns is not None or data.total is None:
        return data.columns or ()
    return next((row.values.keys() for row in data.rows()), ())
