"""Evaluates chains of attributes, indexes and calls that begin with a name: ``df.head()[0]``.

A chain is interpreted node by node instead of being compiled, so that it cannot do anything but
access attributes and items of the named objects, and call them.
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
    return all(inner.id in namespace for inner in ast.walk(node) if isinstance(inner, ast.Name))


def is_restricted(node: ast.expr, namespace: Mapping[str, object]) -> bool:
    """Whether a chain, or one inside of it, begins with a module or has a name with a leading _."""
    for inner in ast.walk(node):
        match inner:
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
        case ast.Attribute(value=base, attr=name):
            return getattr(value_of(base), name)
        case ast.Subscript(value=base, slice=index):
            return value_of(base)[value_of(index)]
        case ast.Call(func=func, args=args, keywords=keywords):
            function, positional = value_of(func), [value_of(arg) for arg in args]
            return function(*positional, **{str(k.arg): value_of(k.value) for k in keywords})
        case ast.Slice(lower=lower, upper=upper, step=step):
            return slice(value_of(lower), value_of(upper), value_of(step))
        case ast.UnaryOp(operand=operand):
            return -value_of(operand)
        case ast.Tuple(elts=elements):
            return tuple(map(value_of, elements))
        case ast.List(elts=elements):
            return list(map(value_of, elements))
        case _:  # an absent bound of a slice
            return None


def describe_error(error: Exception) -> str:
    """Describe an error of a chain in a few words."""
    try:
        message = shorten(str(error), 200)
    except Exception:  # the `__str__` of a user's own exception may raise
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


# Operators, comparisons, lambdas and comprehensions are no chains: in braces, they are far more
# often code that belongs to the prompt than an expression to evaluate.
def _is_chain(node: ast.expr) -> bool:
    match node:
        case ast.Name():
            return True
        case ast.Attribute(value=base):
            return _is_chain(base)
        case ast.Subscript(value=base, slice=index):
            return _is_chain(base) and _is_index(index)
        case ast.Call(func=func, args=args, keywords=keywords):
            arguments = [*args, *(keyword.value for keyword in keywords)]
            has_no_dictionary = all(keyword.arg for keyword in keywords)  # such as ``**options``
            return _is_chain(func) and has_no_dictionary and all(map(_is_argument, arguments))
    return False


def _is_index(node: ast.expr) -> bool:
    match node:
        case ast.Slice(lower=lower, upper=upper, step=step):
            return all(map(_is_argument, filter(None, (lower, upper, step))))
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return all(map(_is_index, elements))
    return _is_argument(node)


def _is_argument(node: ast.expr) -> bool:
    # Python's parser reads -1 as an operator and the constant 1.
    while isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) or _is_chain(node)
