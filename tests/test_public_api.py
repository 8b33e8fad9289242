"""The names that users rely on, and the words that the package is written in."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from IPython.core.completer import IPCompleter, provisionalcompleter

import nbcodex
from nbcodex import errors
from nbcodex.models import RequestOptions

PACKAGE = Path(nbcodex.__file__).parent

# Words that would have to be guessed: the glossary in `nbcodex.models` has the terms instead.
UNCLEAR_WORDS = set(
    re.findall(
        r"\w+",
        """told tell tells telling hear hears heard deed deeds usher keeper story desk whoever
        whatever whichever nobody somebody anybody everybody wish wishes mishap mishaps shelf beat
        astray forsake endures endure heed passage deaf knock knocks rehearse heir linger promise
        promised""",
    )
)

# SQL columns of existing files are out of reach: `beat_at` and `beat_now` are such names.
ALLOWED_WORDS = frozenset({"beat"})


def test_public_names_are_listed_and_nothing_else() -> None:
    assert dir(nbcodex) == sorted(nbcodex.__all__)
    assert all(getattr(nbcodex, name) is not None for name in nbcodex.__all__)


def test_completion_offers_the_public_names() -> None:
    completer = IPCompleter(namespace={"nbcodex": nbcodex})
    with provisionalcompleter():
        offered = completer.completions("nbcodex.", len("nbcodex."))
        names = {each.text.rpartition(".")[2] for each in offered}
    assert {name for name in names if not name.startswith("_")} == set(nbcodex.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nbcodex.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["ask", "aask", "map", "amap"])
def test_options_are_explicit_keyword_parameters(name: str) -> None:
    parameters = inspect.signature(getattr(nbcodex, name)).parameters.values()
    assert not [p for p in parameters if p.kind in {p.VAR_KEYWORD, p.VAR_POSITIONAL}]
    given = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    options = {field.name for field in fields(RequestOptions)}
    assert options - given <= ({"thread"} if name in {"map", "amap"} else set())


def test_ask_and_aask_have_the_same_parameters() -> None:
    parameters = inspect.signature(nbcodex.aask).parameters
    assert parameters == inspect.signature(nbcodex.ask).parameters


def test_import_loads_nothing_heavy() -> None:
    heavy = ["IPython", "anywidget", "httpx2", "ipywidgets", "jsonschema", "openai", "pydantic"]
    heavy += ["sqlite3", "tenacity"]
    code = f"import sys, nbcodex; print([name for name in {heavy} if name in sys.modules])"
    process = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert process.stdout.strip() == "[]"


def test_loading_the_extension_imports_no_records() -> None:
    code = """
import sys
from IPython.core.interactiveshell import InteractiveShell
InteractiveShell.instance().run_line_magic("load_ext", "nbcodex")
print([name for name in ("nbcodex.models", "nbcodex.events") if name in sys.modules])
"""
    process = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert process.stdout.strip() == "[]"


def test_error_tree_in_the_documentation_is_complete() -> None:
    page = (PACKAGE / "docs" / "python.md").read_text(encoding="utf-8")
    tree = page.partition("The whole tree:")[2].split("```")[1]
    drawn = set(re.findall(r"\w+Error|Stopped", tree))
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, BaseException) and name[0] != "_"
    }
    assert classes - drawn <= {"BudgetError"}


def identifiers(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        name = getattr(node, "name", None) or getattr(node, "arg", None)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        if isinstance(name, str):
            names.add(name)
    return names


@pytest.mark.slow
def test_identifiers_use_the_words_of_the_glossary() -> None:
    found: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        for name in identifiers(ast.parse(path.read_text())):
            parts = {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
            for word in (parts & UNCLEAR_WORDS) - ALLOWED_WORDS:
                found[f"{path.relative_to(PACKAGE)}: {name} ({word})"] += 1
    assert not found
