"""Templates with ``{name}`` fields, for prompts of cells and of maps.

Owns which braces are a field; all others (JSON, LaTeX, code) are text and stay as they are. Must
not know where values come from, nor IPython.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from nbcodex.errors import ConfigurationError, shorten

ExpressionT = TypeVar("ExpressionT")

MAX_FIELD_CHARS = 500  # bounds the search for a closing brace: time grows with the text's length
ITEM = "item"  # the name that `{}` in a map's template stands for

# A LaTeX command with its optional argument, or a single brace.
_STEP = re.compile(r"\\[A-Za-z]+\*?(?:\[[^\[\]{}\n]*\])?|[{}]")
# What can end an expression or nest in it; strings are tokens, so that their braces do not count.
_TOKEN = re.compile(r"""[\[\](){}:!\n]|"(?:[^"\\\n]|\\.)*+"|'(?:[^'\\\n]|\\.)*+'""")
_ENDING = re.compile(r"(?:!([rsa]))?(?::((?:[^{}\n]|\{[^{}\n]*+\})*+))?\}")
# A sign of " " counts only before a width and a type: `{n: 2}` is more likely JavaScript.
_NUMBER_FORMAT = re.compile(
    r"(?:.?[<>=^])?(?:[+-]|[ ](?=[\d.,#]+[a-zA-Z%]))?z?#?0?\d{0,4}[,_]?(?:\.\d{1,4})?"
    r"[bcdeEfFgGnosxX%]?"
)
_DATE_FORMAT = re.compile(r"[^{}\n]*%[a-zA-Z][^{}\n]*")
_NESTED_FORMAT = re.compile(r"[^{}\s]*\{")
_COLUMN_PATH = re.compile(r"([^\W\d]\w*|)((?:\.[^\W\d]\w*|\[[^\[\]]+\])*)")
_CONVERSIONS: dict[str, Callable[[object], str]] = {"r": repr, "s": str, "a": ascii}
_FORMATTER = string.Formatter()


@dataclass(frozen=True, slots=True)
class Field(Generic[ExpressionT]):
    """A field of a template, such as ``{price:.2f}``."""

    start: int  # position of its first brace in the text
    end: int  # position after its last brace
    source: str  # the expression as it is written
    expression: ExpressionT  # what `recognise` made of it
    is_known: bool = True  # whether all names in the expression exist
    conversion: str = ""  # what follows ``!``
    spec: str = ""  # what follows ``:``
    # Whether the braces are doubled, to keep a single pair of them in the text.
    is_literal: bool = False

    @property
    def has_nested_format(self) -> bool:
        """Whether the format has braces of its own, which only f-strings fill in."""
        return "{" in self.spec

    def format(self, value: object) -> str:
        """Return a value's text with the field's conversion and format."""
        if self.conversion:
            value = _CONVERSIONS[self.conversion](value)
        return format(value, self.spec)


Recogniser = Callable[[str], tuple[ExpressionT, bool] | None]


def parse_fields(
    text: str, recognise: Recogniser[ExpressionT], names: Collection[str] = ()
) -> Iterator[Field[ExpressionT]]:
    """Yield the fields of `text`, from left to right.

    `recognise` returns the expression in a text, and whether its names are known; None for a text
    that is not an expression. `names` are expressions even if they contain spaces, dots or
    brackets. The arguments of a LaTeX command are not fields.
    """
    at, latex_end = 0, -1  # `latex_end`: where a command, or one of its arguments, has just ended
    is_argument: list[bool] = []  # for each open brace, whether it began an argument of LaTeX
    while step := _STEP.search(text, at):
        start, at = step.start(), step.end()
        match step[0]:
            case "{" if start == latex_end:
                is_argument.append(True)
            case "{":
                field = _field_at(text, start, recognise, names)
                # `{a:{b}}` with an unknown `a` may be code or JSON around the field `{b}`.
                if field and (field.is_known or not field.has_nested_format):
                    at = field.end
                    yield field
                else:
                    is_argument.append(False)
            case "}":
                latex_end = at if is_argument and is_argument.pop() else -1
            case _:
                latex_end = at


def _field_at(
    text: str, start: int, recognise: Recogniser[ExpressionT], names: Collection[str]
) -> Field[ExpressionT] | None:
    """Return the field whose first brace is at `start`, if there is one."""
    # `${name}` is a variable of a shell or of JavaScript.
    if start and text[start - 1] == "$":
        return None
    is_doubled = text.startswith("{", start + 1)
    if not (found := _split_field(text, start + 1 + is_doubled, names)):
        return None
    end, source, conversion, spec = found
    is_closed = not is_doubled or text.startswith("}", end)
    if not is_closed or not (expression := recognise(source)):
        return None
    return Field(start, end + is_doubled, source, *expression, conversion, spec, is_doubled)


def _split_field(text: str, start: int, names: Collection[str]) -> tuple[int, str, str, str] | None:
    """Return the end, expression, conversion and format of the text after a brace."""
    close = text.find("}", start, start + MAX_FIELD_CHARS)
    if names and text[start : max(close, start)] in names:
        return close + 1, text[start:close], "", ""
    # By tokens, so that an index such as `x["}"]` may contain a brace or a colon.
    depth = 0
    for token in _TOKEN.finditer(text, start, start + MAX_FIELD_CHARS):
        match token[0]:
            case "[" | "(":
                depth += 1
            case "]" | ")":
                depth -= 1
            case "}" | ":" | "!" if depth == 0:
                stop = token.start()
                ending = _ENDING.match(text, stop, stop + MAX_FIELD_CHARS)
                spec = (ending and ending[2]) or ""
                if ending and (
                    _NUMBER_FORMAT.fullmatch(spec)
                    or _DATE_FORMAT.fullmatch(spec)
                    or _NESTED_FORMAT.match(spec)
                ):
                    return ending.end(), text[start:stop], ending[1] or "", spec
                return None
            case "{" | "}" | "\n" | "!":
                return None
    return None


# A column of a row, and what is taken of its value, such as ``[0].name``.
ColumnPath = tuple[str, str]


class Template:
    """A map's prompt, with fields for the columns of a row.

    ``{name}`` is a column; ``{name[0]}``, ``{name.attribute}``, ``{price:.2f}`` and ``{text!r}``
    work as in `str.format`; ``{}`` and ``{item}`` are a plain item itself; ``{{name}}`` is the
    literal ``{name}``. Names in `columns` may contain any characters.
    """

    def __init__(self, text: str, columns: Collection[str] = ()) -> None:

        def recognise(source: str) -> tuple[ColumnPath, bool] | None:
            if source in columns:
                return (source, ""), False
            if not (found := _COLUMN_PATH.fullmatch(source)):
                return None
            # Never "known": no column's format swallows the fields that are nested in it.
            return (found[1] or ITEM, found[2]), False

        self.fields = tuple(parse_fields(text, recognise, columns))
        filled = [field for field in self.fields if not field.is_literal]
        self.names = frozenset(field.expression[0] for field in filled)
        self._parts: list[str | Field[ColumnPath]] = []
        done = 0
        for field in self.fields:
            literal = text[field.start + 1 : field.end - 1]
            self._parts += [text[done : field.start], literal if field.is_literal else field]
            done = field.end
        self._parts.append(text[done:])

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return a row's prompt; raise a ConfigurationError for a column that cannot be filled."""
        return "".join(
            part if isinstance(part, str) else _fill_column(part, values) for part in self._parts
        )

    def check(self, columns: Collection[str], *, row: str = "") -> None:
        """Raise a ConfigurationError that names the columns which `columns` lack, if any."""
        if not (missing := sorted(self.names - set(columns))):
            return
        needed = ", ".join(f"{{{name}}}" for name in missing)
        present = ", ".join(f"{{{name}}}" for name in list(columns)[:20]) or "nothing"
        raise ConfigurationError(
            f"The template has {needed}, {row or 'the data'} has {present}. Nothing was sent.",
            advice="Write {{name}} for a literal {name}.",
        )


def _fill_column(field: Field[ColumnPath], values: Mapping[str, Any]) -> str:
    column, path = field.expression
    if column not in values:
        raise ConfigurationError(f"The row has no column {column!r}.")
    try:
        value = values[column]
        if path:
            # The column's own name may contain dots and brackets, which get_field would parse.
            value = _FORMATTER.get_field(f"{ITEM}{path}", (), {ITEM: value})[0]
        if _is_missing(value):
            raise ConfigurationError(f"The row has no value in its column {column!r}.")
        return field.format(value)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{{{field.source or column}}} failed: {type(error).__name__}: {shorten(str(error))}"
        ) from error


def _is_missing(value: object) -> bool:
    """Whether there is no value: None, NaN and pandas' equivalents."""
    if value is None:
        return True
    if isinstance(value, str | int | list | dict | tuple):
        return False
    try:
        return bool(value != value)  # only NaN differs from itself
    except (TypeError, ValueError):  # pandas.NA has no truth value, an array has many
        return type(value).__name__ == "NAType"
