"""Evaluates chains of attributes, indexes and calls that begin with a name: ``df.head()[0]``.

Owns which expressions are a chain. A chain is walked, not compiled and run, so it can do no more
than the objects in it. Must not know prompts.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

from nbcodex.errors import shorten


def parse(source: str) -> ast.expr | None:
    """Return the chain in `source`; None for any other text."""
    # `{ name }` is more likely JavaScript or a set than a field.
    if source != source.strip():
        return None
    try:
        node = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # ast.parse raises all of them
        return None
    return node if _is_chain(node) else None


def is_known(node: ast.expr, namespace: Mapping[str, object]) -> bool:
    """Whether the namespace has every name in a chain."""
    return all(part.id in namespace for part in ast.walk(node) if isinstance(part, ast.Name))


def is_restricted(node: ast.expr, namespace: Mapping[str, object]) -> bool:
    """Whether a chain, or one in it, begins with a module or has a name with `_` in front."""
    for part in ast.walk(node):
        match part:
            case ast.Name(id=name) | ast.Attribute(attr=name) if name.startswith("_"):
                return True
            case ast.Name(id=name) if isinstance(namespace.get(name), ModuleType):
                return True
    return False


def evaluate(node: ast.expr | None, namespace: Mapping[str, object]) -> Any:
    """Return the value of a chain, or of an index or argument in it."""
    value_of = partial(evaluate, namespace=namespace)
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


def describe_error(error: Exception) -> str:
    """Describe an error of a chain in a few words."""
    try:
        message = shorten(str(error), 200)
    except Exception:  # the `__str__` of a user's own exception may raise
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


# Operators, comparisons, lambdas and comprehensions are left out on purpose: braces around them are
# far more often code in the prompt than a request to evaluate it.
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
        # -1 is an operator on a constant to Python's parser.
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _is_argument(operand)
        case _:
            return _is_chain(node)
