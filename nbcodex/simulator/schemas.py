"""Values that fit a JSON schema. Must not know who asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEEPEST = 6
"""Levels below which lists are empty."""


def example(
    schema: Mapping[str, Any], root: Mapping[str, Any] | None = None, depth: int = 0
) -> Any:
    """Return a value that has the JSON schema `schema`, as far as answers need it.

    Below `DEEPEST`, lists are empty, so that a tree of trees has an end.
    """
    root = schema if root is None else root

    def within(part: Mapping[str, Any]) -> Any:
        return example(part, root, depth + 1)

    match schema:
        case _ if depth > 2 * DEEPEST or not isinstance(schema, Mapping):
            return None
        case {"const": value} | {"enum": [value, *_]}:
            return value
        case {"$ref": str(ref)}:
            return within(_referred(ref, root))
        case {"anyOf": [first, *_]} | {"oneOf": [first, *_]} | {"allOf": [first, *_]}:
            return within(first)
        case {"type": [first, *_]}:
            return within({**schema, "type": first})
        case {"type": "array"}:
            return [within(schema.get("items", {}))] * 2 if depth < DEEPEST else []
        case {"type": "string"}:
            return "simulated"
        case {"type": "integer" | "number"}:
            return schema.get("minimum", 1)
        case {"type": "boolean"}:
            return True
        case {"type": "null"}:
            return None
        case _:
            given = schema.get("properties")
            fields = given if isinstance(given, Mapping) else {"simulated": {"const": True}}
            return {name: within(field) for name, field in fields.items()}


def _referred(ref: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of `root` that `ref` names; an empty schema where there is none."""
    found: Any = root
    for step in filter(None, ref.removeprefix("#").split("/")):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}
