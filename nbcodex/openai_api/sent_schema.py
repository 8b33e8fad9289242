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

JsonSchema = dict[str, Any]

VALUE_FIELD = "value"  # of the object around an answer that is not an object itself
MAX_SCHEMA_DEPTH = 60

_DEFINITIONS = ("$defs", "definitions")
# Keywords whose value is a schema or a list of schemas, and those that map names to schemas.
_SCHEMA_KEYWORDS = (
    "items prefixItems anyOf oneOf allOf additionalProperties additionalItems not if then else "
    "contains propertyNames unevaluatedItems unevaluatedProperties"
)
_MAPPING_KEYWORDS = ("properties", "patternProperties", "dependentSchemas", *_DEFINITIONS)

# What strict mode knows: https://platform.openai.com/docs/guides/structured-outputs, "Supported
# schemas". All fields have to be required, and no others allowed; a `$ref` stands alone.
_KEPT_KEYWORDS = (
    "title description enum const multipleOf minimum maximum exclusiveMinimum exclusiveMaximum "
    "minItems maxItems"
)
_KNOWN_FORMATS = "date-time time date duration email hostname ipv4 ipv6 uuid"
# Strict mode lacks these; without them, it would forbid what the user's schema requires.
_FATAL_KEYWORDS = "patternProperties if then else dependentSchemas $dynamicRef $recursiveRef"
_TYPE_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


class _NotStrictError(Exception):
    """Strict mode has no equivalent of a schema."""


def sent_form(schema: Schema) -> tuple[JsonSchema, bool]:
    """Return the schema to send, and whether it is in the terms of strict mode."""
    text, is_strict = _sent_form(json.dumps(dict(schema.definition), default=str), schema.strict)
    return json.loads(text), is_strict


def is_object(schema: Mapping[str, Any]) -> bool:
    """Whether a schema describes an object, as servers require of the outermost schema."""
    kind = schema.get("type", "object" if "properties" in schema else None)
    return kind == "object" and "$ref" not in schema


def as_object(schema: Mapping[str, Any]) -> JsonSchema:
    """Return a schema of an object: the given one, or that of an object that holds its value."""
    inner = copy.deepcopy(dict(schema))
    if is_object(inner):
        return {"type": "object", **inner}
    for name in ("$schema", "$id"):
        inner.pop(name, None)
    definitions = {name: inner.pop(name) for name in _DEFINITIONS if name in inner}
    # The schema moves to another place of the document: references into it have to be rewritten.
    names = definitions.get("$defs", {})
    name = next(n for n in ("Answer", "Answer_", "Answer__") if n not in names)
    has_references = False
    for subschema in (*subschemas(inner), *subschemas(definitions)):
        root, *path = str(subschema.get("$ref")).split("/")
        if root == "#" and not (path and path[0] in _DEFINITIONS):
            subschema["$ref"] = "/".join(["#/$defs", name, *path])
            has_references = True
    if has_references:
        definitions["$defs"] = {**names, name: inner}
        inner = {"$ref": f"#/$defs/{name}"}
    return {
        "type": "object",
        "properties": {VALUE_FIELD: inner},
        "required": [VALUE_FIELD],
        "additionalProperties": False,
        **definitions,
    }


def subschemas(schema: Any, depth: int = 0) -> Iterator[JsonSchema]:
    """Yield every schema within a schema, itself included; values and names are passed over."""
    if not isinstance(schema, dict) or depth > MAX_SCHEMA_DEPTH:
        return
    yield schema
    children: list[Any] = []
    for name in _SCHEMA_KEYWORDS.split():
        children += _as_list(schema.get(name))
    for name in _MAPPING_KEYWORDS:
        children += schema[name].values() if isinstance(schema.get(name), dict) else []
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
    user_schema = as_object(json.loads(text))
    try:
        if not strict:
            raise _NotStrictError
        sent = _strict(user_schema, depth=0)
        for name in _DEFINITIONS:
            if name in user_schema:
                sent[name] = {n: _strict(inner, depth=1) for n, inner in user_schema[name].items()}
        for subschema in subschemas(sent):
            if "$ref" in subschema and not isinstance(resolve(subschema["$ref"], sent), dict):
                raise _NotStrictError
    except (_NotStrictError, AttributeError, TypeError):  # malformed keywords raise the others
        for subschema in subschemas(user_schema):
            # `oneOf` is refused more often than `anyOf`, which accepts all that it accepts.
            if "anyOf" not in subschema and isinstance(subschema.get("oneOf"), list):
                subschema["anyOf"] = subschema.pop("oneOf")
                subschema.pop("discriminator", None)
        return json.dumps(user_schema), False
    return json.dumps(sent), True


def _strict(schema: Any, depth: int) -> JsonSchema:
    """Return a schema in the terms of strict mode, without its definitions."""
    is_usable = isinstance(schema, dict) and depth <= MAX_SCHEMA_DEPTH
    if not is_usable or {*_FATAL_KEYWORDS.split()} & {*schema}:
        raise _NotStrictError
    if "$ref" in schema:
        return {"$ref": schema["$ref"]}
    if isinstance(schema.get("allOf"), list):
        if len(schema["allOf"]) != 1 or not isinstance(schema["allOf"][0], dict):
            raise _NotStrictError
        others = {name: value for name, value in schema.items() if name != "allOf"}
        return _strict({**others, **schema["allOf"][0]}, depth + 1)
    sent = {name: schema[name] for name in _KEPT_KEYWORDS.split() if name in schema}
    for name in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(sent.get(name), bool):  # as in draft 4
            del sent[name]
    if choices := [schema[name] for name in ("anyOf", "oneOf") if name in schema]:
        if len(choices) > 1 or "properties" in schema:
            raise _NotStrictError
        return {**sent, "anyOf": [_strict(choice, depth + 1) for choice in choices[0]]}
    types = _types_of(schema)
    sent["type"] = types if len(types) > 1 else types[0]
    if schema.get("format") in _KNOWN_FORMATS.split():
        sent["format"] = schema["format"]
    # Strict mode compiles patterns without lookaround and inline flags.
    if "pattern" in schema and "(?" not in schema["pattern"]:
        sent["pattern"] = schema["pattern"]
    if "object" in types:
        _add_fields(sent, schema, depth)
    if "array" in types:
        sent["items"] = _items(schema, depth)
    return sent


def _types_of(schema: JsonSchema) -> list[str]:
    if given := schema.get("type"):
        return _as_list(given)
    values = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else []
    found = list(dict.fromkeys(_TYPE_NAMES.get(type(value), "") for value in values))
    if "properties" in schema:
        found = ["object"]
    elif "items" in schema or "prefixItems" in schema:
        found = ["array"]
    if not found or "" in found:
        raise _NotStrictError  # strict mode refuses a schema that accepts any type
    return found


def _add_fields(sent: JsonSchema, schema: JsonSchema, depth: int) -> None:
    if schema.get("additionalProperties", False) is not False or "properties" not in schema:
        raise _NotStrictError
    fields = {name: _strict(field, depth + 1) for name, field in schema["properties"].items()}
    required = schema.get("required", ())
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


def _items(schema: JsonSchema, depth: int) -> JsonSchema:
    """Return one schema for all items: strict mode has none for a single position."""
    given = [*_as_list(schema.get("prefixItems", [])), *_as_list(schema.get("items", []))]
    choices: list[JsonSchema] = []
    for item in given:
        if item is True:
            raise _NotStrictError
        if item is not False and (choice := _strict(item, depth + 1)) not in choices:
            choices.append(choice)
    if not choices:
        raise _NotStrictError
    return choices[0] if len(choices) == 1 else {"anyOf": choices}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
