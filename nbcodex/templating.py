"""Templates with ``{name}`` fields, for prompts of cells and of maps.

Decides which braces are a field; all others (JSON, LaTeX, code) are text and stay as they are.
Values are sent whole, or their text says what is left out: libraries shorten arrays and tables.
"""

from __future__ import annotations

import ast
import re
import string
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice, repeat
from math import prod
from numbers import Real
from typing import Any, Generic, TypeVar

from nbcodex.errors import ConfigurationError, shorten

ExpressionT = TypeVar("ExpressionT")

MAX_FIELD_CHARS = 500  # bounds the search for a closing brace, so that its time is linear
ITEM = "item"  # the column that `{}` in a map's template stands for: the row's data itself

# A LaTeX command with its optional argument, such as ``\sqrt[3]``, or a single brace.
_COMMAND_OR_BRACE = re.compile(r"\\[A-Za-z]+\*?(?:\[[^\[\]{}\n]*\])?|[{}]")
# Within an expression: a bracket, what can end the expression, or a whole string, so that brackets
# in it do not count.
_TOKEN = re.compile(r"""[\[\](){}:!\n]|"(?:[^"\\\n]|\\.)*+"|'(?:[^'\\\n]|\\.)*+'""")
# Behind an expression: ``}``, ``!r}``, ``:.2f}`` or ``!s:>{width}}``.
_AFTER_EXPRESSION = re.compile(r"(?:!([rsa]))?(?::((?:[^{}\n]|\{[^{}\n]*+\})*+))?\}")
# What `format` accepts for numbers and strings: ``.2f``, ``>10``, ``,``. A blank as a sign counts
# only before a width and a type, because `{n: 2}` is more likely JavaScript.
_NUMBER_FORMAT = re.compile(
    r"(?:.?[<>=^])?(?:[+-]|[ ](?=[\d.,#]+[a-zA-Z%]))?z?#?0?\d{0,4}[,_]?(?:\.\d{1,4})?"
    r"[bcdeEfFgGnosxX%]?"
)
_DATE_FORMAT = re.compile(r"[^{}\n]*%[a-zA-Z][^{}\n]*")  # ``%d.%m.%Y``
_NESTED_FORMAT = re.compile(r"[^{}\s]*\{")  # the start of ``>{width}``
# A column, and a path into its value: ``name``, ``name[0].first``, ``[0]`` (of the item).
_COLUMN_PATH = re.compile(r"([^\W\d]\w*|)((?:\.[^\W\d]\w*|\[[^\[\]]+\])*)")
# Braces that are not fields: ``\frac{a}{b}``, ``${a}``, ``{{a}}``, and any other ``{a}``, which may
# be a misspelt field.
_OTHER_BRACES = re.compile(
    r"\\[A-Za-z]+\*?(?:\[[^\[\]{}\n]*\])?(?:\{[^{}\n]*\})+|\$\{[^{}\n]*\}|\{\{[^{}\n]*\}\}"
    r"|\{(?P<body>[^{}\n]*)\}"
)
_FORMATTER = string.Formatter()

# How much of a DataFrame a prompt holds; 20,000 characters are about 5,000 tokens.
MAX_TABLE_ROWS, MAX_TABLE_COLUMNS, MAX_CELL_CHARS = 60, 20, 200
MAX_TABLE_CHARS = 20_000
MAX_ARRAY_VALUES = 50_000  # an array with more is an error, as even its text would take seconds

# `struct` formats by the dtypes of columns whose floats are less precise than Python's.
_STRUCT_FORMATS = {"float16": "e", "float32": "f"}


@dataclass(frozen=True, slots=True)
class Field(Generic[ExpressionT]):
    """A field of a template, such as ``{price:.2f}``."""

    start: int  # position of its first brace in the text
    end: int  # position after its last brace
    source: str  # the expression as it is written
    expression: ExpressionT  # what `recognise` returned for it
    is_known: bool = True  # whether all names in the expression exist
    conversion: str = ""  # ``r``, ``s`` or ``a``, which follows ``!``
    spec: str = ""  # the format, which follows ``:``
    # Whether the braces are doubled: `{{name}}` is the text `{name}`.
    is_literal: bool = False

    @property
    def has_nested_format(self) -> bool:
        """Whether the format has braces of its own, which only f-strings fill in."""
        return "{" in self.spec

    def format(self, value: Any, *, before: str = "") -> str:
        """Return a value's text after `before`, with the field's conversion and format."""
        # A frame or a series becomes a table, which is cut.
        is_array = type_has(value, "shape") and not type_has(value, "columns")
        if is_array and not type_has(value, "to_frame") and prod(value.shape) > MAX_ARRAY_VALUES:
            what = f"an array of shape {tuple(value.shape)} has {prod(value.shape):,} values"
            raise ValueError(f"{what}, a prompt takes {MAX_ARRAY_VALUES:,}: select a part of it")
        if self.conversion or self.spec:
            convert, conversion = _FORMATTER.convert_field, self.conversion or None
            return _whole_text(value, lambda given: format(convert(given, conversion), self.spec))
        if (table := _format_table(value)) is not None:
            # Markdown recognises a table only on lines of its own.
            return table if not before or before.endswith("\n") else f"\n\n{table}"
        return _whole_text(_plain_data(value))


# Returns a text's expression, and whether all names in it exist; None if it is not an expression.
Recogniser = Callable[[str], tuple[ExpressionT, bool] | None]


def parse_fields(
    text: str, recognise: Recogniser[ExpressionT], names: Collection[str] = ()
) -> Iterator[Field[ExpressionT]]:
    """Yield the fields of `text`, from left to right.

    `names` are expressions even if they contain spaces, dots or brackets. The arguments of a LaTeX
    command are not fields.
    """
    # `latex_end`: where a LaTeX command, or an argument of one, has just ended.
    position, latex_end = 0, -1
    is_argument: list[bool] = []  # for each open brace, whether it began an argument of LaTeX
    while found := _COMMAND_OR_BRACE.search(text, position):
        start, position = found.start(), found.end()
        match found[0]:
            case "{" if start == latex_end:
                is_argument.append(True)
            case "{":
                field = _field_at(text, start, recognise, names)
                # `{a:{b}}` with an unknown `a` may be code or JSON around the field `{b}`.
                if field and (field.is_known or not field.has_nested_format):
                    position = field.end
                    yield field
                else:
                    is_argument.append(False)
            case "}":
                latex_end = position if is_argument and is_argument.pop() else -1
            case _:
                latex_end = position


def _field_at(
    text: str, start: int, recognise: Recogniser[ExpressionT], names: Collection[str]
) -> Field[ExpressionT] | None:
    """Return the field whose first brace is at `start`, if there is one."""
    # `${name}` is a variable of a shell or of JavaScript.
    if start and text[start - 1] == "$":
        return None
    is_literal = text.startswith("{", start + 1)  # the braces are doubled
    if not (found := _split_field(text, start + 1 + is_literal, names)):
        return None
    end, source, conversion, spec = found
    is_closed = not is_literal or text.startswith("}", end)
    if not is_closed or not (recognised := recognise(source)):
        return None
    return Field(start, end + is_literal, source, *recognised, conversion, spec, is_literal)


def _split_field(text: str, start: int, names: Collection[str]) -> tuple[int, str, str, str] | None:
    """Return the end, expression (from `start` on), conversion and format of a field."""
    close = text.find("}", start, start + MAX_FIELD_CHARS)
    if text[start : max(close, start)] in names:
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
                rest = _AFTER_EXPRESSION.match(text, stop, stop + MAX_FIELD_CHARS)
                spec = (rest and rest[2]) or ""
                is_format = _NUMBER_FORMAT.fullmatch(spec) or _DATE_FORMAT.fullmatch(spec)
                if rest and (is_format or _NESTED_FORMAT.match(spec)):
                    return rest.end(), text[start:stop], rest[1] or "", spec
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
            # Never "known": a brace in a column's format begins a field of its own.
            return (found[1] or ITEM, found[2]), False

        self.fields = tuple(parse_fields(text, recognise, columns))
        filled = [field for field in self.fields if not field.is_literal]
        self.column_names = frozenset(field.expression[0] for field in filled)
        self._text = text

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return a row's prompt; raise a ConfigurationError for a column that cannot be filled."""
        prompt, end = "", 0
        for field in self.fields:
            literal = self._text[field.start + 1 : field.end - 1]
            prompt += self._text[end : field.start]
            prompt += literal if field.is_literal else _fill_column(field, values, prompt)
            end = field.end
        return prompt + self._text[end:]

    def check_misspelt_fields(self, columns: Collection[str]) -> None:
        """Raise a ConfigurationError for braces that are a misspelt or unsupported field."""
        text = self._text
        if not text.strip():
            raise ConfigurationError("The template is empty.", advice="Write 'Translate {text}'.")
        for field in self.fields:
            text = text[: field.start] + " " * (field.end - field.start) + text[field.end :]
        # Misspelt fields would be sent with every row. JSON, code and LaTeX are meant to be.
        for found in _OTHER_BRACES.finditer(text):
            if (body := found["body"]) and (column := _likely_column(body, columns)):
                raise ConfigurationError(
                    f"{{{shorten(body, 60)}}} in the template is not a field. Nothing was sent.",
                    advice=f"Write {{{column}}} for the column, or double the braces to send them.",
                )

    def check_columns(self, columns: Collection[str], *, data_name: str = "the data") -> None:
        """Raise a ConfigurationError if `columns`, those of `data_name`, lack a field's."""
        if not (missing := sorted(self.column_names - set(columns))):
            return
        needed = ", ".join(f"{{{name}}}" for name in missing)
        present = ", ".join(f"{{{name}}}" for name in list(columns)[:20]) or "nothing"
        raise ConfigurationError(
            f"The template has {needed}, {data_name} has {present}. Nothing was sent.",
            advice="Write {{name}} for a literal {name}.",
        )


def _likely_column(body: str, columns: Collection[str]) -> str | None:
    """Return the column that a text between braces is probably meant to name."""
    import difflib  # here, because `%load_ext` has to be fast

    name = re.split(r"[!:]", body)[0]
    if re.match(r"""\s*["']|[\w ]+:\s""", body):  # an object's key in JSON or JavaScript
        return None
    if "0" in columns and re.match(r"\d", body):  # rows are sequences, and the first is too short
        return "0"
    try:
        nodes = ast.walk(ast.parse(name.strip(), mode="eval"))
        names = [node.id for node in nodes if isinstance(node, ast.Name)]
    except (SyntaxError, ValueError):
        names = [" ".join(name.split())]
    by_folded_name = {column.casefold(): column for column in columns}
    for name in names:
        near = difflib.get_close_matches(name, columns, n=1, cutoff=0.8)
        if column := by_folded_name.get(name.casefold()) or next(iter(near), None):
            return column
    return None


def _fill_column(field: Field[ColumnPath], values: Mapping[str, Any], before: str) -> str:
    column, path = field.expression
    if column not in values:
        raise ConfigurationError(f"The row has no column {column!r}.")
    try:
        value = values[column]
        if path:
            # Not by the column's name, in which `get_field` would parse dots and brackets.
            value = _FORMATTER.get_field(f"{ITEM}{path}", (), {ITEM: value})[0]
        if _is_missing(value):
            raise ConfigurationError(f"The row has no value in its column {column!r}.")
        return field.format(value, before=before)
    except (LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{{{field.source or column}}} failed: {type(error).__name__}: {shorten(str(error))}"
        ) from error


def _is_missing(value: object) -> bool:
    """Whether there is no value: None, NaN and pandas' equivalents."""
    try:
        return value is None or bool(value != value)  # only NaN differs from itself
    except (TypeError, ValueError):  # pandas.NA has no truth value, an array has many
        return type(value).__name__ == "NAType"


# Values. Libraries' types are recognised by their methods, so that none of them is imported.


def type_has(value: object, *names: str) -> bool:
    """Return whether the type of `value` has all these attributes."""
    # An instance of a proxy or a mock would have every attribute.
    return all(hasattr(type(value), name) for name in names)


def _plain_data(value: Any) -> Any:
    """Return data whose text its library shortens as an array, a list or a dict."""
    if isinstance(value, str | int | float):
        return value
    if type(value) is dict:
        return {name: _plain_data(each) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain_data, value))
    if type_has(value, "columns", "shape"):  # a frame in a list
        return {name: _plain_data(value[name]) for name in value.columns}
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(value, numpy.ndarray | numpy.generic):
        return value
    # Series, tensors of PyTorch, arrays of PyArrow.
    for name, *others in (("to_list", "shape"), ("tolist", "shape"), ("to_pylist",)):
        if type_has(value, name, *others):
            return getattr(value, name)()
    if numpy and type_has(value, "__array__", "shape"):  # xarray, TensorFlow
        return numpy.asarray(value)
    return value


def _whole_text(value: Any, text_of: Callable[[Any], str] = str) -> str:
    """Return the text of a value; NumPy's arrays in it are whole, with all their digits."""
    numpy = sys.modules.get("numpy")
    if numpy is None or isinstance(value, str | int | float):
        return text_of(value)
    with numpy.printoptions(threshold=sys.maxsize, floatmode="unique", suppress=False):
        return text_of(value)


def _format_table(value: Any) -> str | None:
    """Return a DataFrame or Series (pandas, polars) as a Markdown table; None for anything else."""
    if type_has(value, "to_frame") and not type_has(value, "columns"):
        value = value.to_frame()
    if not type_has(value, "columns", "shape"):
        return None
    columns, index_columns = list(value.columns), []
    rows: Iterable[tuple[object, ...]]
    if type_has(value, "itertuples"):  # pandas
        # A plain index only counts the rows; any other has a meaning, and becomes a column.
        is_plain = type(value.index).__name__ == "RangeIndex" and value.index.name is None
        rows = value.itertuples(index=not is_plain, name=None)
        index_columns = [] if is_plain else [value.index.name or ""]
    elif type_has(value, "iter_rows"):  # polars
        rows = value.iter_rows()
    else:
        return None
    width = len(index_columns) + MAX_TABLE_COLUMNS
    dtypes = [str(dtype).lower() for dtype in getattr(value, "dtypes", ())]
    formats = [""] * len(index_columns) + [_STRUCT_FORMATS.get(dtype, "") for dtype in dtypes]
    header = [*index_columns, *columns][:width]
    lines = [_table_row(header), _table_row(["---"] * len(header))]
    shown = chars = 0
    for row in islice(rows, MAX_TABLE_ROWS):
        line = _table_row(row[:width], formats)
        chars += len(line)
        if shown and chars > MAX_TABLE_CHARS:  # the first row is shown in any case
            break
        lines.append(line)
        shown += 1
    hidden = {"row": value.shape[0] - shown, "column": len(columns) - MAX_TABLE_COLUMNS}
    for unit, more in hidden.items():
        lines += [f"… {more:,} more {unit}{'s' * (more > 1)}"] if more > 0 else []
    return "\n".join(lines) + "\n"


def _table_row(cells: Iterable[object], formats: Iterable[str] = ()) -> str:
    texts = []
    for value, struct_format in zip(cells, chain(formats, repeat("")), strict=False):
        is_float = isinstance(value, Real) and hasattr(value, "is_integer")
        text = _float_text(value, struct_format) if is_float else str(value)
        texts.append(shorten(text, MAX_CELL_CHARS).replace("|", "\\|"))
    return f"| {' | '.join(texts)} |"


def _float_text(value: Any, struct_format: str) -> str:
    """Return the shortest text that reads back as the same number, in the column's precision."""
    if struct_format:
        # The rows hold Python's floats for columns of lower precision, too: 52.52 in a float32
        # column would read 52.52000045776367.
        for digits in range(1, 10):
            rounded = float(f"{value:.{digits}g}")
            with suppress(OverflowError):  # rounded beyond the largest number of the format
                if struct.pack(struct_format, rounded) == struct.pack(struct_format, value):
                    return str(rounded).removesuffix(".0")
    # Integers have no decimals: beside missing values, pandas keeps them as floats.
    return str(value).removesuffix(".0")
