"""A prompt's ``{names}``, filled in from the notebook; every other brace is the user's own.

Owns what counts as a name to fill in, and how a value reads in a prompt. Must not know IPython,
and imports no library whose values it shows: frames and images are told by what they can do.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from nbcodex.errors import ConfigurationError, brief

ROWS, COLUMNS, CELL = 60, 20, 200
"""How much of a frame a prompt holds: rows, columns, and characters of one cell."""

LONGEST = 500
"""Characters between two braces beyond which nobody means a name."""

_STEP = re.compile(r"\\[A-Za-z]+\*?(?:\[[^\[\]{}\n]*\])?|[{}]")
_NAME = re.compile(r"[^\W\d]\w*")
_TOKEN = re.compile(r"""[\[\](){}:!\n]|"(?:[^"\\\n]|\\.)*+"|'(?:[^'\\\n]|\\.)*+'""")
_ENDING = re.compile(r"(?:!([rsa]))?(?::([^{}\n]*))?\}")
_SPEC = re.compile(r"(?:.?[<>=^])?[+-]?z?#?0?\d{0,4}[,_]?(?:\.\d{1,4})?[bcdeEfFgGnosxX%]?")
_CONVERSIONS: dict[str, Callable[[object], str]] = {"r": repr, "s": str, "a": ascii}
_DATE = re.compile(r"[^{}\n]*%[a-zA-Z][^{}\n]*")


@dataclass(frozen=True, slots=True)
class Filled:
    """A prompt with its names filled in.

    Parameters
    ----------
    text : str
        The prompt as it will be sent.
    filled : tuple of str
        The expressions that were filled in, in order.
    missing : tuple of str
        The expressions that look meant, but begin with or use a name that is not there; they
        stand in `text` as they were.
    images : tuple
        Figures and images, in the order of their places ``[image 1]``, ``[image 2]`` …
    """

    text: str
    filled: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    images: tuple[object, ...] = ()


def fill(text: str, namespace: Mapping[str, object]) -> Filled:
    """Return `text` with ``{name}``, ``{name.attribute[0]:.2f}`` and the like filled in.

    Filled in is what begins with a name in `namespace` and is a chain of attributes, indexes and
    calls, unless it follows ``$`` or a LaTeX command. ``{{name}}`` is the literal ``{name}``. All
    else is left to the letter, and what was filled in is not read again.

    Parameters
    ----------
    text : str
        The prompt as the user wrote it.
    namespace : mapping
        The user's variables.

    Returns
    -------
    Filled
        The prompt, and what became of its names.

    Raises
    ------
    ConfigurationError
        An expression failed; the message names it and its failure.
    """
    draft = _Draft(namespace)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of the user's braces, not of our code
        warnings.simplefilter("ignore", DeprecationWarning)
        places = list(_places(text, namespace))
    done = 0
    for place in places:
        draft.parts.append(text[done : place.start])
        draft.add(place)
        done = place.end
    draft.parts.append(text[done:])
    return Filled(
        "".join(draft.parts), tuple(draft.filled), tuple(draft.missing), tuple(draft.images)
    )


@dataclass(frozen=True, slots=True)
class _Field:
    """What stands between two braces, if it is a chain."""

    end: int
    source: str
    node: ast.expr
    conversion: str = ""
    spec: str = ""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a chain stands in a prompt; `literal` where its braces are doubled."""

    start: int
    end: int
    raw: str
    field: _Field
    literal: bool


def _places(text: str, namespace: Mapping[str, object]) -> Iterator[_Place]:
    """Yield each chain in `text`, but those that belong to a LaTeX command or follow ``$``."""
    at, latex = 0, -1  # `latex`: where a command, or one of its arguments, has just ended
    open_braces: list[bool] = []
    chains: dict[str, ast.expr | None] = {}
    while step := _STEP.search(text, at):
        start, at = step.start(), step.end()
        match step[0]:
            case "{" if start == latex:
                open_braces.append(True)
            case "{":
                place = _place(text, start, chains)
                if place and (not place.literal or _known(place.field.node, namespace)):
                    at = place.end
                    yield place
                elif place:
                    at = place.end
                else:
                    open_braces.append(False)
            case "}":
                latex = at if open_braces and open_braces.pop() else -1
            case _:
                latex = at


def _place(text: str, start: int, chains: dict[str, ast.expr | None]) -> _Place | None:
    if start and text[start - 1] == "$":
        return None
    if found := _field(text, start + 1, chains):
        return _Place(start, found.end, text[start : found.end], found, literal=False)
    found = _field(text, start + 2, chains) if text.startswith("{", start + 1) else None
    if found and text.startswith("}", found.end):
        return _Place(start, found.end + 1, text[start + 1 : found.end], found, literal=True)
    return None


def _field(text: str, start: int, chains: dict[str, ast.expr | None]) -> _Field | None:
    """Return the chain that begins at `start` and ends with a brace, if one does."""
    if not _NAME.match(text, start):
        return None
    depth = 0
    for token in _TOKEN.finditer(text, start, start + LONGEST):
        match token[0]:
            case "[" | "(":
                depth += 1
            case "]" | ")":
                depth -= 1
            case "}" | ":" | "!" if depth == 0:
                return _ending(text, start, token.start(), chains)
            case "{" | "}" | "\n" | "!":
                return None
    return None


def _ending(text: str, start: int, stop: int, chains: dict[str, ast.expr | None]) -> _Field | None:
    ending = _ENDING.match(text, stop, stop + LONGEST)
    if not ending:
        return None
    conversion, spec = ending[1] or "", ending[2] or ""
    if not (_SPEC.fullmatch(spec) or _DATE.fullmatch(spec)):
        return None
    source = text[start:stop]
    if source not in chains:
        chains[source] = _parse(source)
    node = chains[source]
    return None if node is None else _Field(ending.end(), source, node, conversion, spec)


def _parse(source: str) -> ast.expr | None:
    if source[-1].isspace():
        return None
    try:
        node = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return node if _is_chain(node) else None


def _is_chain(node: ast.expr) -> bool:
    match node:
        case ast.Name():
            return True
        case ast.Attribute(value=value):
            return _is_chain(value)
        case ast.Subscript(value=value, slice=index):
            return _is_chain(value) and _is_index(index)
        case ast.Call(func=func, args=args, keywords=keywords):
            given = [*args, *(keyword.value for keyword in keywords)]
            named = all(keyword.arg for keyword in keywords)
            return _is_chain(func) and named and all(map(_is_argument, given))
        case _:
            return False


def _is_index(node: ast.expr) -> bool:
    match node:
        case ast.Slice(lower=lower, upper=upper, step=step):
            return all(part is None or _is_argument(part) for part in (lower, upper, step))
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return all(map(_is_index, parts))
        case _:
            return _is_argument(node)


def _is_argument(node: ast.expr) -> bool:
    match node:
        case ast.Constant():
            return True
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _is_argument(operand)
        case _:
            return _is_chain(node)


def _known(node: ast.expr, namespace: Mapping[str, object]) -> bool:
    return all(part.id in namespace for part in ast.walk(node) if isinstance(part, ast.Name))


@dataclass(slots=True)
class _Draft:
    """The prompt so far."""

    namespace: Mapping[str, object]
    parts: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    images: list[object] = field(default_factory=list)

    def add(self, place: _Place) -> None:
        """Add what stands at `place`: the value, the literal text, or what the user wrote."""
        if place.literal:
            self.parts.append(place.raw)
        elif _known(place.field.node, self.namespace):
            self.parts.append(self._fill(place.field))
            self.filled.append(place.field.source)
        else:
            self.parts.append(place.raw)
            self.missing.append(place.field.source)

    def _fill(self, part: _Field) -> str:
        try:
            value = _evaluate(part.node, self.namespace)
            return self._show(value, part)
        except Exception as error:
            raise ConfigurationError(
                f"{{{brief(part.source, 80)}}} in the prompt failed: {_describe(error)}.",
                advice="Nothing was sent. Write {{name}} for a literal {name}, or use --raw.",
            ) from error

    def _show(self, value: Any, part: _Field) -> str:
        if part.conversion or part.spec:
            if part.conversion:
                value = _CONVERSIONS[part.conversion](value)
            return format(value, part.spec)
        if _is_image(value):
            return self._place_image(value)
        table = _table(value)
        if table is None:
            return str(value)
        before = next((text for text in reversed(self.parts) if text), "\n")
        return table if before.endswith("\n") else f"\n\n{table}"

    def _place_image(self, value: object) -> str:
        for number, image in enumerate(self.images, 1):
            if image is value:
                return f"[image {number}]"
        self.images.append(value)
        return f"[image {len(self.images)}]"


def _describe(error: Exception) -> str:
    try:
        message = brief(str(error), 200)
    except Exception:  # an exception of the user's own may fail to say what it is
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _evaluate(node: ast.expr | None, namespace: Mapping[str, object]) -> Any:
    """Return the value of a chain, or of what may stand in its brackets."""

    def value_of(part: ast.expr | None) -> Any:
        return _evaluate(part, namespace)

    match node:
        case ast.Name(id=name):
            return namespace[name]
        case ast.Constant(value=value):
            return value
        case ast.Attribute(value=owner, attr=name):
            return getattr(value_of(owner), name)
        case ast.Subscript(value=owner, slice=index):
            return value_of(owner)[value_of(index)]
        case ast.Call(func=func, args=args, keywords=keywords):
            function = value_of(func)
            given = [value_of(arg) for arg in args]
            return function(*given, **{str(k.arg): value_of(k.value) for k in keywords})
        case ast.Slice(lower=lower, upper=upper, step=step):
            return slice(value_of(lower), value_of(upper), value_of(step))
        case ast.UnaryOp(operand=operand):
            return -value_of(operand)
        case ast.Tuple(elts=parts):
            return tuple(map(value_of, parts))
        case ast.List(elts=parts):
            return list(map(value_of, parts))
        case _:
            return None


def _has(value: object, *names: str) -> bool:
    # asked of the type: a proxy or a mock has every attribute
    return all(hasattr(type(value), name) for name in names)


def _is_image(value: object) -> bool:
    """Return whether `value` is a matplotlib figure or a PIL image."""
    return _has(value, "savefig", "add_subplot") or _has(value, "save", "tobytes", "thumbnail")


def _table(value: Any) -> str | None:
    """Return a pandas or polars frame or series as a Markdown table; None for anything else."""
    if _has(value, "to_frame") and not _has(value, "columns"):
        value = value.to_frame()
    rows: Iterable[tuple[object, ...]]
    names = list(getattr(value, "columns", ())) if _has(value, "columns", "shape") else []
    if _has(value, "columns", "shape", "itertuples"):
        plain = type(value.index).__name__ == "RangeIndex" and value.index.name is None
        rows = value.itertuples(index=not plain, name=None)
        labels = [] if plain else [value.index.name or ""]
    elif _has(value, "columns", "shape", "iter_rows"):
        rows, labels = value.iter_rows(), []
    else:
        return None
    width = len(labels) + COLUMNS
    lines = [_row([*labels, *names][:width])]
    lines.append("|" + " --- |" * min(width, len(labels) + len(names)))
    lines += [_row(row[:width]) for row in islice(rows, ROWS)]
    lines += _cut(value.shape[0] - ROWS, "row") + _cut(len(names) - COLUMNS, "column")
    return "\n".join(lines) + "\n"


def _cut(more: int, what: str) -> list[str]:
    return [f"… {more:,} more {what}{'s' * (more > 1)}"] if more > 0 else []


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return brief(text, CELL).replace("|", "\\|")
