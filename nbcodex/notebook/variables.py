"""What a cell's prompt takes from the notebook: variables, histories, tables, images, output.

Values of pandas, polars, matplotlib and the like are recognised by their methods, so that none of
these libraries is imported.
"""

from __future__ import annotations

import ast
import functools
import io
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import IPython
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

from nbcodex.errors import ConfigurationError, shorten
from nbcodex.models import Image
from nbcodex.notebook import safe_eval
from nbcodex.notebook.cell_errors import cell_errors
from nbcodex.notebook.identity import cell_number
from nbcodex.requests.options import is_drawable, to_image
from nbcodex.templating import Field, parse_fields

MAX_LISTED_NAMES = 5  # further names are only counted in the figures line

# Frames between the user's code and a magic: IPython's, ours, and those of its decorators.
_INTERNAL_FILES = (
    str(Path(IPython.__file__).parent) + os.sep,
    str(Path(__file__).parents[1]) + os.sep,
    "<decorator-gen",
)

_HISTORIES = ("In", "Out", "Err")
_NAME = re.compile(r"[^\W\d]\w*")  # an identifier: ``df2``


class _CellResults(dict[int, object]):
    """`Out`, with an error message that names the cell."""

    def __missing__(self, number: object) -> object:
        raise KeyError(f"cell {number} showed no result")


@dataclass(frozen=True, slots=True)
class CallerScope:
    """The variables of the code that calls a magic, beside the notebook's."""

    # Locals and globals of a function, or the globals of a script; empty for an ordinary cell.
    names: Mapping[str, object]
    # The globals of a script that `%run` executes, if the script calls the magic at its top level.
    script: dict[str, object] | None = None


def caller_scope(shell: InteractiveShell) -> CallerScope:
    """Return the scope of the code that calls a magic."""
    # IPython's decorator `needs_local_scope` gives a cell magic the notebook's namespace always.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_INTERNAL_FILES):
        frame = frame.f_back
    names: dict[str, object] = {}
    while frame is not None and frame.f_locals is not shell.user_ns:
        names = {**frame.f_locals, **names}
        # Until Python 3.12, a comprehension has a frame of its own within its function's.
        if frame.f_code.co_name not in {"<listcomp>", "<setcomp>", "<dictcomp>"}:
            break
        frame = frame.f_back
    if frame is None or frame.f_locals is shell.user_ns or frame.f_globals is shell.user_ns:
        return CallerScope(names)
    is_script = frame.f_locals is frame.f_globals
    return CallerScope({**frame.f_globals, **names}, script=frame.f_globals if is_script else None)


def user_variables(
    shell: InteractiveShell, scope: CallerScope, text: str = ""
) -> dict[str, object]:
    """Return the user's own variables, without what IPython adds (`exit`, `open` …)."""
    # A prompt never means a whole history: one is included only if `text` indexes it.
    added_by_ipython, absent = shell.user_ns_hidden, object()
    names = shell.user_ns | {k: v for k, v in scope.names.items() if not k.startswith("__")}
    indexed = {name for name in _HISTORIES if f"{{{name}[" in text}
    histories: dict[str, object] = {"Err": cell_errors} if "Err" in indexed else {}
    if "Out" in indexed and isinstance(results := shell.user_ns.get("Out"), dict):
        histories["Out"] = _CellResults(results)
    return {
        name: value
        for name, value in names.items()
        if name in indexed or value is not added_by_ipython.get(name, absent)
    } | histories


@dataclass(slots=True)
class FilledPrompt:
    """A prompt with its fields filled in."""

    text: str  # the prompt to send
    filled_fields: list[str] = field(default_factory=list)  # the expressions that were filled in
    # The expressions that use an unknown name; they stay in `text` as they were written.
    missing: list[str] = field(default_factory=list)
    # The expressions that are not evaluated because they use a module or a private name.
    restricted: list[str] = field(default_factory=list)
    # Figures and images, in the order of their placeholders ``[image 1]``, ``[image 2]`` ….
    images: list[object] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What the figures line says about the fields."""
        filled = list(dict.fromkeys(f"{{{shorten(name, 40)}}}" for name in self.filled_fields))
        more = len(filled) - MAX_LISTED_NAMES
        listed = filled[:MAX_LISTED_NAMES] + ([f"{more} more"] if more > 0 else [])
        notes = [f"{', '.join(listed)} filled in"] if listed else []
        for names, problem in ((self.missing, "not found"), (self.restricted, "left as written")):
            notes += [f"{{{shorten(name, 40)}}} {problem}" for name in dict.fromkeys(names)]
        return notes


def fill(text: str, namespace: Mapping[str, object]) -> FilledPrompt:
    """Return a prompt with ``{name}``, ``{name.attribute[0]:.2f}`` and the like filled in.

    A field is a chain of attributes, indexes and calls that begins with a name in `namespace`;
    ``{{name}}`` is the literal ``{name}``. Everything else stays as it is, and values are not
    searched for fields. An expression that fails raises a ConfigurationError.
    """

    # Returns the chain in `source`, and whether its names exist. Cached, as parsing costs the most.
    @functools.cache
    def recognise(source: str) -> tuple[ast.expr, bool] | None:
        node = safe_eval.parse(source) if _NAME.match(source) else None
        return None if node is None else (node, safe_eval.is_known(node, namespace))

    with warnings.catch_warnings():
        # Python warns about text in the user's braces, such as an invalid escape in a string.
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        fields = list(parse_fields(text, recognise))
    prompt, pieces, copied_end = FilledPrompt(""), list[str](), 0
    for found in fields:
        as_written = text[found.start : found.end]
        pieces.append(text[copied_end : found.start])
        copied_end = found.end
        if found.is_literal:
            pieces.append(as_written[1:-1] if found.is_known else as_written)
        elif not found.is_known:
            pieces.append(as_written)
            prompt.missing.append(found.source)
        elif found.has_nested_format:  # such as ``{price:>{width}}``
            pieces.append(as_written)
        elif safe_eval.is_restricted(found.expression, namespace):
            # In pasted code or logs, `{os.system('…')}` must not run.
            pieces.append(as_written)
            prompt.restricted.append(found.source)
        else:
            pieces.append(_field_text(found, namespace, pieces, prompt.images))
            prompt.filled_fields.append(found.source)
    prompt.text = "".join([*pieces, text[copied_end:]])
    return prompt


def _field_text(
    found: Field[ast.expr], namespace: Mapping[str, object], before: list[str], images: list[object]
) -> str:
    """Return the text of a field's value after the texts `before`; add an image to `images`."""
    try:
        value = safe_eval.evaluate(found.expression, namespace)
        if is_drawable(value) and not (found.conversion or found.spec):
            if not any(image is value for image in images):
                images.append(value)
            number = next(n for n, image in enumerate(images, 1) if image is value)
            return f"[image {number}]"
        return found.format(value, before=next((text for text in reversed(before) if text), ""))
    except Exception as error:
        raise ConfigurationError(
            f"{{{shorten(found.source, 80)}}} in the prompt failed: "
            f"{safe_eval.describe_error(error)}.",
            advice="Nothing was sent. Write {{name}} for a literal {name}, or use --raw.",
        ) from error


def images_of(
    expressions: Iterable[str], shell: InteractiveShell, scope: CallerScope
) -> list[Image]:
    """Return the images that `--image` names: paths of files, or expressions of variables."""
    images = []
    for text in expressions:
        # With the brace of a field, before which `user_variables` looks for indexed histories.
        names, name = user_variables(shell, scope, f"{{{text}"), _NAME.match(text)
        value: object = Path(text)
        # A file takes precedence, because `plot.png` could also be an attribute of a variable.
        is_file = os.path.isfile(text)  # noqa: PTH113 - `Path.is_file` raises for a long text
        if name and name[0] in names and not is_file and (expression := safe_eval.parse(text)):
            try:
                value = safe_eval.evaluate(expression, names)
            except Exception as error:
                raise ConfigurationError(
                    f"--image {shorten(text, 80)} failed: {safe_eval.describe_error(error)}.",
                    advice="Nothing was sent.",
                ) from error
        images.append(to_image(value))
    return images


def run_for_prompt(shell: InteractiveShell, cell: str, scope: CallerScope) -> FilledPrompt:
    """Run the user's cell for `--eval`, and return its output and its last value as the prompt."""
    # The cell runs as IPython would run it, except that it cannot use `await` at its top level.
    __tracebackhide__ = True  # a traceback then begins with the user's cell
    source = shell.transform_cell(cell)  # type: ignore[no-untyped-call]
    # A file name from IPython's compiler lets tracebacks show the cell's lines.
    name = shell.compile.cache(source, cell_number(shell), raw_code=cell)
    tree = shell.transform_ast(ast.parse(source, name))  # type: ignore[no-untyped-call]
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    flags, value = shell.compile.flags, None
    namespace = shell.user_ns
    if scope.names:
        # Within a function, what the cell assigns is local, as in Python.
        namespace = scope.script or {**shell.user_ns, **scope.names}
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, name, "exec", flags), namespace)  # noqa: S102 - the user's own cell
        if last is not None:
            expression = compile(ast.Expression(last.value), name, "eval", flags)
            value = eval(expression, namespace)  # noqa: S307 - the same
    value_text = FilledPrompt("") if value is None else fill("{value}", {"value": value})
    text = printed.getvalue() + value_text.text
    if not text.strip():
        raise UsageError("%%codex --eval: the cell printed nothing, so there is no prompt to send")
    return FilledPrompt(text.removesuffix("\n"), images=value_text.images)
