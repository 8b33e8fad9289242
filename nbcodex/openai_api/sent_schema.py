"""Makes the JSON schema that is sent: a copy of the user's own, in the terms of strict mode.

Answers are validated against the user's own, so the copy may lack what a server cannot enforce.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from nbcodex.models import Schema

Definition = dict[str, Any]

VALUE_FIELD = "value"  # of the object around an answer that is not an object itself
MAX_SCHEMA_DEPTH = 60

_DEFINITIONS = ("$defs", "definitions")
_LIST_KEYWORDS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_MAPPING_KEYWORDS = ("properties", "patternProperties", "dependentSchemas", *_DEFINITIONS)
_SINGLE_KEYWORDS = (
    "items",
    "additionalProperties",
    "additionalItems",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
)

# What strict mode knows: https://platform.openai.com/docs/guides/structured-outputs, "Supported
# schemas". All fields have to be required, and no others allowed; a `$ref` stands alone.
_KEPT_KEYWORDS = (
    "title",
    "description",
    "enum",
    "const",
    "multipleOf",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "minItems",
    "maxItems",
)
_KNOWN_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")
)
# Without these, a closed object would forbid what the user's schema requires.
_UNSUPPORTED_KEYWORDS = frozenset(
    ("patternProperties", "if", "then", "else", "dependentSchemas", "$dynamicRef", "$recursiveRef")
)
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


class _NotStrictError(Exception):
    """Strict mode has no equivalent of a schema."""


def sent_form(schema: Schema) -> tuple[Definition, bool]:
    """Return the definition to send, and whether it is in the terms of strict mode."""
    text, is_strict = _sent_form(json.dumps(dict(schema.definition), default=str), schema.strict)
    return json.loads(text), is_strict


def is_object(definition: Mapping[str, Any]) -> bool:
    """Whether a schema describes an object, as servers require of the outermost schema."""
    kind = definition.get("type", "object" if "properties" in definition else None)
    return kind == "object" and "$ref" not in definition


def as_object(definition: Mapping[str, Any]) -> Definition:
    """Return a schema of an object: the given one, or that of an object that holds its value."""
    inner = copy.deepcopy(dict(definition))
    if is_object(inner):
        return {"type": "object", **inner}
    for name in ("$schema", "$id"):
        inner.pop(name, None)
    shared = {name: inner.pop(name) for name in _DEFINITIONS if name in inner}
    # The schema moves to another place of the document: references into it have to be rewritten.
    names = shared.get("$defs", {})
    name = next(n for n in ("Answer", "Answer_", "Answer__") if n not in names)
    has_moved = False
    for part in (*subschemas(inner), *subschemas(shared)):
        ref = part.get("$ref")
        if isinstance(ref, str) and (
            ref == "#" or (ref.startswith("#/") and ref.split("/")[1] not in _DEFINITIONS)
        ):
            part["$ref"] = f"#/$defs/{name}{ref[1:]}"
            has_moved = True
    if has_moved:
        shared["$defs"] = {**names, name: inner}
        inner = {"$ref": f"#/$defs/{name}"}
    return {
        "type": "object",
        "properties": {VALUE_FIELD: inner},
        "required": [VALUE_FIELD],
        "additionalProperties": False,
        **shared,
    }


def subschemas(part: Any, depth: int = 0) -> Iterator[Definition]:
    """Yield every schema within a schema, itself included; values and names are passed over."""
    if not isinstance(part, dict) or depth > MAX_SCHEMA_DEPTH:
        return
    yield part
    children = [part.get(name) for name in _SINGLE_KEYWORDS]
    for name in _LIST_KEYWORDS:
        children += part[name] if isinstance(part.get(name), list) else []
    for name in _MAPPING_KEYWORDS:
        children += part[name].values() if isinstance(part.get(name), dict) else []
    for child in children:
        yield from subschemas(child, depth + 1)


def resolve(ref: object, root: Mapping[str, Any]) -> Any:
    """Return the schema that a reference within `root` names; None if there is none."""
    if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
        return None
    found: Any = root
    for step in ref[2:].split("/") if len(ref) > 1 else ():
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            found = found.get(step) if isinstance(found, Mapping) else None
    return found


@lru_cache(maxsize=64)  # each attempt of each row of a map makes a body
def _sent_form(text: str, strict: bool) -> tuple[str, bool]:
    own = as_object(json.loads(text))
    try:
        if not strict:
            raise _NotStrictError
        sent = _strict(own, 0)
        for name in _DEFINITIONS:
            if name in own:
                sent[name] = {n: _strict(part, 1) for n, part in own[name].items()}
        for part in subschemas(sent):
            if "$ref" in part and not isinstance(resolve(part["$ref"], sent), dict):
                raise _NotStrictError
    except (_NotStrictError, AttributeError, TypeError):  # the latter: malformed keywords
        for part in subschemas(own):
            # `oneOf` is refused more often than `anyOf`, which accepts all that it accepts.
            if "anyOf" not in part and isinstance(part.get("oneOf"), list):
                part["anyOf"] = part.pop("oneOf")
                part.pop("discriminator", None)
        return json.dumps(own), False
    return json.dumps(sent), True


def _strict(part: Any, depth: int) -> Definition:
    """Return a schema in the terms of strict mode, without its definitions."""
    if not isinstance(part, dict) or depth > MAX_SCHEMA_DEPTH or _UNSUPPORTED_KEYWORDS & set(part):
        raise _NotStrictError
    if "$ref" in part:
        return {"$ref": part["$ref"]}
    if isinstance(part.get("allOf"), list):
        if len(part["allOf"]) != 1 or not isinstance(part["allOf"][0], dict):
            raise _NotStrictError
        rest = {name: value for name, value in part.items() if name != "allOf"}
        return _strict({**rest, **part["allOf"][0]}, depth + 1)
    sent = {name: part[name] for name in _KEPT_KEYWORDS if name in part}
    for name in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(sent.get(name), bool):  # as in draft 4
            del sent[name]
    choices = [part[name] for name in ("anyOf", "oneOf") if name in part]
    if choices:
        if len(choices) > 1 or "properties" in part:
            raise _NotStrictError
        return {**sent, "anyOf": [_strict(choice, depth + 1) for choice in choices[0]]}
    kinds = _types_of(part)
    sent["type"] = kinds if len(kinds) > 1 else kinds[0]
    if part.get("format") in _KNOWN_FORMATS:
        sent["format"] = part["format"]
    # Strict mode compiles patterns without lookaround and inline flags.
    if "pattern" in part and "(?" not in part["pattern"]:
        sent["pattern"] = part["pattern"]
    if "object" in kinds:
        _add_fields(sent, part, depth)
    if "array" in kinds:
        sent["items"] = _items(part, depth)
    return sent


def _types_of(part: Definition) -> list[str]:
    given = part.get("type")
    if given:
        return list(given) if isinstance(given, list) else [given]
    values = part["enum"] if "enum" in part else [part["const"]] if "const" in part else []
    found = list(dict.fromkeys(_TYPES.get(type(value), "") for value in values))
    if "properties" in part:
        found = ["object"]
    elif "items" in part or "prefixItems" in part:
        found = ["array"]
    if not found or "" in found:
        raise _NotStrictError  # strict mode refuses a schema that accepts any type
    return found


def _add_fields(sent: Definition, part: Definition, depth: int) -> None:
    if part.get("additionalProperties", False) is not False or "properties" not in part:
        raise _NotStrictError
    fields = {name: _strict(field, depth + 1) for name, field in part["properties"].items()}
    required = part.get("required", ())
    if any(name not in fields for name in required):
        raise _NotStrictError
    for name, field in fields.items():
        choices = field.get("anyOf", [field])
        is_nullable = any("null" in _as_list(choice.get("type")) for choice in choices)
        if name not in required and not is_nullable:
            # Strict mode makes optional fields required; null then stands for a field left out.
            kept = {**field, "anyOf": []} if "anyOf" in field else {}
            fields[name] = {**kept, "anyOf": [*choices, {"type": "null"}]}
    sent["properties"], sent["required"] = fields, list(fields)
    sent["additionalProperties"] = False


def _items(part: Definition, depth: int) -> Definition:
    """Return the one schema of all items: strict mode does not know positions."""
    given = [*_as_list(part.get("prefixItems", [])), *_as_list(part.get("items", []))]
    choices: list[Definition] = []
    for item in given:
        if isinstance(item, bool):
            if item:
                raise _NotStrictError
        elif (choice := _strict(item, depth + 1)) not in choices:
            choices.append(choice)
    if not choices:
        raise _NotStrictError
    return choices[0] if len(choices) == 1 else {"anyOf": choices}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
