"""How a row becomes a request.

Owns the template or function, the options that all rows share, and row keys. A function is called
in the thread that asks for a request. Must not know what becomes of it.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nbcodex.errors import ConfigurationError, NbcodexError, shorten
from nbcodex.mapping.inputs import InputData, Row
from nbcodex.models import DAY, Origin, Request
from nbcodex.requests.options import build_request
from nbcodex.settings import Settings
from nbcodex.templating import Template

PATIENCE = 365 * DAY
"""Seconds that a row waits for limits and faults: as long as it takes, unless said otherwise."""

RowKey = str | Callable[[Any], object] | None
Words = str | Callable[[Any], object]

_OF_ONE = {"prompt", "settings", "origin", "thread", "turns"}
_OPTIONS = frozenset(inspect.signature(build_request).parameters) - _OF_ONE


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that say anything.

    Raises
    ------
    ConfigurationError
        If there is no such option; it names the nearest.
    """
    for name in options:
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, n=1)
            raise ConfigurationError(
                f"There is no option {name[:40]!r}"
                + (f"; did you mean {near[0]!r}?" if near else "."),
                advice="Options are those of nbcodex.ask without a thread: rows do not converse.",
            )
    said = {name: value for name, value in options.items() if value is not None}
    if isinstance(images := said.get("images"), Iterator):  # which would reach one row alone
        said["images"] = tuple(images)
    return said


def completed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that all rows share: what is `given`, and what holds where nothing is."""
    return {"patience": PATIENCE, "reuse": True, **given(options)}


@dataclass(frozen=True, slots=True)
class RowRequests:
    """What a map asks.

    Parameters
    ----------
    words : str or callable
        A template, or a function that returns a row's prompt, or a mapping of ``prompt`` and
        options for this row.
    options : mapping
        Options of all rows, `completed`.
    row_key : str, callable or None
        Names a row: a column, or a function of the item.
    settings : Settings
        What is not said in the options.
    origin : Origin
        Where it is asked, and the map's id.
    """

    words: Template | Callable[[Any], object]
    options: Mapping[str, Any]
    row_key: RowKey
    settings: Settings
    origin: Origin

    @property
    def calls(self) -> bool:
        """Whether a function of the user's makes the prompts."""
        return not isinstance(self.words, Template)

    def check(self, shape: InputData) -> None:
        """Refuse what would fail in every row, before anything is sent.

        Raises
        ------
        ConfigurationError
            If a column is missing in the data, or in a row of data that is here already.
        """
        build_request("?", self.settings, **self.options)
        named = frozenset({self.row_key} if isinstance(self.row_key, str) else ())
        if shape.columns is not None:
            self._check(shape.columns, named)
        elif shape.total is not None and (isinstance(self.words, Template) or named):
            for row in shape.rows():
                self._check(row.values, named, row=f"row {shorten(row.label, 60)}")

    def _check(self, columns: Any, named: frozenset[str], *, row: str = "") -> None:
        if isinstance(self.words, Template):
            self.words.check(columns, row=row)
        if missing := named.difference(columns):
            raise ConfigurationError(
                f"The row key {min(missing)!r} is no column of {row or 'the data'}.",
                advice="It is the name of a column, or a function of a row.",
            )

    def label(self, row: Row) -> str:
        """Return what a row is called: its row key, else its index, key or position."""
        key = self._key(row)
        return row.label if key is None else key

    def request(self, row: Row) -> Request:
        """Return the request that a row makes.

        Raises
        ------
        NbcodexError
            If the row makes none; the message says why.
        """
        prompt, options = self._prompt(row), self.options
        if isinstance(prompt, Mapping):
            own = dict(prompt)
            prompt, options = own.pop("prompt", None), {**options, **given(own)}
        if not isinstance(prompt, str):
            raise ConfigurationError(
                f"The function returned {type(prompt).__name__}, not a prompt.",
                advice="Return a text, or a dict of 'prompt' and options.",
            )
        where = replace(self.origin, row_index=row.index)
        request = build_request(prompt, self.settings, **options, origin=where)
        return replace(request, id=f"{where.map_id}-{row.index}", row=self._key(row))

    def mark(self, row: Row) -> int | None:
        """Return the same number for rows that ask the same; None where nobody can say.

        No function of the user's is called for it.
        """
        if not isinstance(self.words, Template) or callable(self.row_key):
            return None
        if not self.options["reuse"]:  # then equal rows are asked one by one
            return None
        try:
            return hash((self.words.fill(row.values), self._key(row)))
        except NbcodexError:
            return None

    def _prompt(self, row: Row) -> object:
        if isinstance(self.words, Template):
            return self.words.fill(row.values)
        try:
            return self.words(row.item)
        except NbcodexError:
            raise
        except Exception as error:
            told = shorten(f"{type(error).__name__}: {error}", 200)
            raise ConfigurationError(f"The function failed: {told}") from error

    def _key(self, row: Row) -> str | None:
        if self.row_key is None:
            return None
        if isinstance(self.row_key, str):
            return str(row.values.get(self.row_key, row.label))
        try:
            return str(self.row_key(row.item))
        except Exception as error:
            told = shorten(f"{type(error).__name__}: {error}", 200)
            raise ConfigurationError(f"The row key failed: {told}") from error


def _known(shape: InputData) -> Collection[str]:
    """Return the columns of the data, as far as it can be looked at without being used up."""
    if shape.columns is not None or shape.total is None:
        return shape.columns or ()
    return next((row.values.keys() for row in shape.rows()), ())


def recipe(
    words: Words,
    shape: InputData,
    options: Mapping[str, Any],
    *,
    row_key: RowKey,
    settings: Settings,
    origin: Origin,
) -> RowRequests:
    """Return how the rows of `shape` become requests, checked as far as nothing need be sent.

    Raises
    ------
    ConfigurationError
        If that makes no sense.
    """
    if not (row_key is None or isinstance(row_key, str) or callable(row_key)):
        raise ConfigurationError("row_key is the name of a column, or a function of a row.")
    if isinstance(words, str):
        if not words.strip():
            raise ConfigurationError("The template is empty.", advice="Write 'Translate {text}'.")
        parsed: Template | Callable[[Any], object] = Template(words, _known(shape))
    elif callable(words):
        parsed = words
    else:
        raise ConfigurationError(
            f"The template is {type(words).__name__}.", advice="Give a text or a function of a row."
        )
    made = RowRequests(parsed, completed(options), row_key, settings, origin)
    made.check(shape)
    return made
