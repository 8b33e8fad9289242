"""A prompt's ``{names}``, filled in from the notebook; every other brace is the user's own.

Owns what counts as a name to fill in, and how a value reads in a prompt. Must not know IPython,
and imports no library whose values it shows.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nbcodex.errors import ConfigurationError, shorten
from nbcodex.notebook import safe_eval
from nbcodex.notebook.tables import table
from nbcodex.requests.images import is_drawable

LONGEST = 500
"""Characters between two braces beyond which nobody means a name."""

TOLD = 5
"""Names that are told to have been filled in, before the rest is counted."""

_STEP = re.compile(r"\\[A-Za-z]+\*?(?:\[[^\[\]{}\n]*\])?|[{}]")
_NAME = re.compile(r"[^\W\d]\w*")
_TOKEN = re.compile(r"""[\[\](){}:!\n]|"(?:[^"\\\n]|\\.)*+"|'(?:[^'\\\n]|\\.)*+'""")
_ENDING = re.compile(r"(?:!([rsa]))?(?::((?:[^{}\n]|\{[^{}\n]*+\})*+))?\}")
_NESTED = re.compile(r"[^{}\s]*\{")
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

    @property
    def notes(self) -> list[str]:
        """What its reader should know: what was filled in, and what was not found."""
        names = dict.fromkeys(f"{{{shorten(name, 40)}}}" for name in self.filled)
        some = [*names][:TOLD] + ([f"{len(names) - TOLD} more"] if len(names) > TOLD else [])
        told = [f"{', '.join(some)} filled in"] if some else []
        return told + [f"{{{shorten(name, 40)}}} not found" for name in dict.fromkeys(self.missing)]


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
    is_known: bool
    conversion: str = ""
    spec: str = ""

    @property
    def is_nested(self) -> bool:
        """Whether the format has braces of its own, which only an f-string fills in."""
        return "{" in self.spec


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a chain stands in a prompt; `literal` where its braces are doubled."""

    start: int
    end: int
    raw: str
    field: _Field
    literal: bool


class _Lexicon:
    """The chains of one prompt, each parsed and looked up once, however often it stands there."""

    def __init__(self, namespace: Mapping[str, object]) -> None:
        self._namespace = namespace
        self._chains: dict[str, tuple[ast.expr, bool] | None] = {}

    def chain(self, source: str) -> tuple[ast.expr, bool] | None:
        """Return the chain, and whether its names are there; None for anything else."""
        if source not in self._chains:
            node = safe_eval.parse(source)
            known = node is not None and safe_eval.is_known(node, self._namespace)
            self._chains[source] = None if node is None else (node, known)
        return self._chains[source]


def _places(text: str, namespace: Mapping[str, object]) -> Iterator[_Place]:
    """Yield each chain in `text`, but those that belong to a LaTeX command or follow ``$``."""
    at, latex = 0, -1  # `latex`: where a command, or one of its arguments, has just ended
    open_braces: list[bool] = []
    lexicon = _Lexicon(namespace)
    while step := _STEP.search(text, at):
        start, at = step.start(), step.end()
        match step[0]:
            case "{" if start == latex:
                open_braces.append(True)
            case "{":
                place = _place(text, start, lexicon)
                if place and (place.field.is_known or not place.field.is_nested):
                    at = place.end
                    if place.field.is_known or not place.literal:
                        yield place
                else:
                    open_braces.append(False)
            case "}":
                latex = at if open_braces and open_braces.pop() else -1
            case _:
                latex = at


def _place(text: str, start: int, lexicon: _Lexicon) -> _Place | None:
    if start and text[start - 1] == "$":
        return None
    if found := _field(text, start + 1, lexicon):
        return _Place(start, found.end, text[start : found.end], found, literal=False)
    found = _field(text, start + 2, lexicon) if text.startswith("{", start + 1) else None
    if found and text.startswith("}", found.end):
        return _Place(start, found.end + 1, text[start + 1 : found.end], found, literal=True)
    return None


def _field(text: str, start: int, lexicon: _Lexicon) -> _Field | None:
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
                return _ending(text, start, token.start(), lexicon)
            case "{" | "}" | "\n" | "!":
                return None
    return None


def _ending(text: str, start: int, stop: int, lexicon: _Lexicon) -> _Field | None:
    ending = _ENDING.match(text, stop, stop + LONGEST)
    if not ending:
        return None
    conversion, spec = ending[1] or "", ending[2] or ""
    if not (_SPEC.fullmatch(spec) or _DATE.fullmatch(spec) or _NESTED.match(spec)):
        return None
    source = text[start:stop]
    chain = lexicon.chain(source)
    return chain and _Field(ending.end(), source, *chain, conversion, spec)


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
        if place.literal or place.field.is_nested:
            self.parts.append(place.raw)
        elif place.field.is_known:
            self.parts.append(self._fill(place.field))
            self.filled.append(place.field.source)
        else:
            self.parts.append(place.raw)
            self.missing.append(place.field.source)

    def _fill(self, part: _Field) -> str:
        try:
            value = safe_eval.evaluate(part.node, self.namespace)
            return self._show(value, part)
        except Exception as error:
            raise ConfigurationError(
                f"{{{shorten(part.source, 80)}}} in the prompt failed: "
                f"{safe_eval.describe_error(error)}.",
                advice="Nothing was sent. Write {{name}} for a literal {name}, or use --raw.",
            ) from error

    def _show(self, value: Any, part: _Field) -> str:
        if part.conversion or part.spec:
            if part.conversion:
                value = _CONVERSIONS[part.conversion](value)
            return format(value, part.spec)
        if is_drawable(value):
            return self._place_image(value)
        rows = table(value)
        if rows is None:
            return str(value)
        before = next((text for text in reversed(self.parts) if text), "\n")
        return rows if before.endswith("\n") else f"\n\n{rows}"

    def _place_image(self, value: object) -> str:
        for number, image in enumerate(self.images, 1):
            if image is value:
                return f"[image {number}]"
        self.images.append(value)
        return f"[image {len(self.images)}]"
