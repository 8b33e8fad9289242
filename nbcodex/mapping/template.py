"""A prompt with places for a row's columns: `Translate {text} to {lang}`.

Owns what counts as a place; every other brace (JSON, LaTeX) is left as it stands, as in a cell.
Must not know where rows come from.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nbcodex.errors import ConfigurationError, shorten

ITEM = "item"
"""What `{}` stands for."""

_BRACES = re.compile(
    r"""\\[A-Za-z]+\*?(?:\[[^\[\]{}\n]*\])?(?:\{[^{}\n]*\})+   # a LaTeX command
    | \$\{[^{}\n]*\}                                           # a variable of somebody else's
    | \{\{(?P<doubled>[^{}\n]*)\}\}
    | \{(?P<single>[^{}\n]*)\}""",
    re.VERBOSE,
)
_PLACE = re.compile(
    r"""(?P<path>(?P<name>[^\W\d]\w*|)(?:\.[^\W\d]\w*|\[[^\[\]]+\])*)
    (?:!(?P<conversion>[rsa]))?
    (?::(?P<spec>(?:.?[<>=^])?[+\- ]?\#?0?\d*[,_]?(?:\.\d+)?[a-zA-Z%]?))?""",
    re.VERBOSE,
)
_CONVERSIONS: dict[str, Callable[[object], str]] = {"r": repr, "s": str, "a": ascii}
_FORMATTER = string.Formatter()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value goes: a column, with what is taken of it and how it is written."""

    name: str
    path: str = ""
    conversion: str = ""
    spec: str = ""

    def show(self, values: Mapping[str, Any]) -> str:
        """Return the value's text.

        Raises
        ------
        ConfigurationError
            If the row lacks the column, or has nothing in it, or it cannot be written so.
        """
        if self.name not in values:
            raise ConfigurationError(f"The row has no column {self.name!r}.")
        try:
            value = values[self.name]
            if self.path:
                value = _FORMATTER.get_field(self.path, (), values)[0]
            if _is_missing(value):
                raise ConfigurationError(f"The row has nothing in its column {self.name!r}.")
            if self.conversion:
                value = _CONVERSIONS[self.conversion](value)
            return format(value, self.spec) if self.spec else str(value)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"{{{self.path or self.name}}} failed: {type(error).__name__}: "
                f"{shorten(str(error))}"
            ) from error


class Template:
    """A prompt with places.

    Parameters
    ----------
    text : str
        The prompt. ``{name}`` is a column; ``{name[0]}``, ``{name.attribute}``, ``{price:.2f}``
        and ``{text!r}`` work as in `str.format`; ``{}`` and ``{item}`` are a plain item itself;
        ``{{name}}`` is the literal ``{name}``.
    columns : collection of str
        The columns that are known: any of them may stand in braces, whatever it is called.
    """

    def __init__(self, text: str, columns: Collection[str] = ()) -> None:
        self.text = text
        self._parts: list[str | Place] = []
        done = 0
        for braces in _BRACES.finditer(text):
            part: str | Place | None
            if (body := braces["single"]) is not None:
                part = _place(body, columns)
            elif (body := braces["doubled"]) is not None:
                part = f"{{{body}}}" if _place(body, columns) else None
            else:
                part = None
            if part is not None:
                self._parts += [text[done : braces.start()], part]
                done = braces.end()
        self._parts.append(text[done:])
        self.names = frozenset(part.name for part in self._parts if isinstance(part, Place))

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return the prompt for one row.

        Raises
        ------
        ConfigurationError
            If a column is missing or empty in this row.
        """
        return "".join(part if isinstance(part, str) else part.show(values) for part in self._parts)

    def check(self, columns: Collection[str], *, row: str = "") -> None:
        """Refuse rows that lack a column.

        Raises
        ------
        ConfigurationError
            It names the columns that are missing, and those that there are.
        """
        if not (missing := sorted(self.names - set(columns))):
            return
        told = ", ".join(f"{{{name}}}" for name in missing)
        there = ", ".join(f"{{{name}}}" for name in list(columns)[:20]) or "nothing"
        raise ConfigurationError(
            f"The template has {told}, {row or 'the data'} has {there}. Nothing was sent.",
            advice="Write {{name}} for a literal {name}.",
        )


def _place(body: str, columns: Collection[str]) -> Place | None:
    """Return the place that stands between two braces, if it is one."""
    if body in columns:
        return Place(body)
    found = _PLACE.fullmatch(body)
    if found is None:
        return None
    name, path = found["name"] or ITEM, found["path"]
    if not found["name"]:
        path = ITEM + path
    return Place(name, path if path != name else "", found["conversion"] or "", found["spec"] or "")


def _is_missing(value: object) -> bool:
    """Whether there is no value: None, NaN, and what pandas has for them."""
    if value is None:
        return True
    if isinstance(value, str | int | list | dict | tuple):
        return False
    try:
        return bool(value != value)  # only NaN differs from itself
    except (TypeError, ValueError):  # pandas.NA has no truth, an array has many
        return type(value).__name__ == "NAType"
