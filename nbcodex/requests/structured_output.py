"""The shape that an answer is to have: from the user's class to a JSON schema, and back to objects.

Pydantic's models are told by what they can do, never imported. Must not know who asks, or how.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from nbcodex.errors import ConfigurationError, shorten
from nbcodex.models import Request, Schema, Turn

ANY_JSON = Schema(name="json", definition={}, strict=False)
"""Whatever is valid JSON."""

_DEEPEST, _NAMED = 60, 5
_FENCED = re.compile(r"\s*(`{3,}|~{3,})[ \t]*(?:json\w*)?[ \t]*\n(.*?)\n?[ \t]*\1\s*", re.DOTALL)
_UNNAMEABLE = re.compile(r"[^A-Za-z0-9_-]+")
_PARTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_FAMILIES = ("properties", "$defs", "definitions")


class MisfitError(ValueError):
    """An answer is not what was asked for; its text says why."""


def declare(given: object) -> Schema | None:
    """Return the schema that a user's pydantic class, or JSON schema, stands for.

    Raises
    ------
    ConfigurationError
        If it is neither, or describes anything but an object.
    """
    if given is None or isinstance(given, Schema):
        return given
    if isinstance(given, type) and hasattr(given, "model_json_schema"):
        definition, name, model = _told_by(given), given.__name__, given
    elif isinstance(given, Mapping):
        definition, name, model = _copied(given), str(given.get("title") or "answer"), None
    else:
        kind = type(given).__name__
        found = f"an object of {kind}" if hasattr(given, "model_json_schema") else kind
        raise ConfigurationError(
            f"A schema is a pydantic class or a JSON schema as a dict, not {found}.",
            advice="Give the class itself.",
        )
    if definition.get("type") != "object":
        raise ConfigurationError(
            "The schema of an answer describes an object.",
            advice='Let it begin with {"type": "object", "properties": …}.',
        )
    strict = all(_can_be_strict(part) for part in _objects(definition))
    for part in _objects(definition) if strict else ():
        _tighten(part)
    name = _UNNAMEABLE.sub("_", name)[:64] or "answer"
    return Schema(name=name, definition=definition, strict=strict, model=model)


def read(schema: Schema, text: str) -> Any:
    """Return the object that an answer holds: the class's instance, else what the JSON says.

    Raises
    ------
    MisfitError
        If it is no JSON, or has another shape.
    """
    text = _unfenced(text)
    model = schema.model
    if not schema.definition or not hasattr(model, "model_validate_json"):
        return _fitting(schema.definition, as_json(text))
    try:
        return model.model_validate_json(text)
    except Exception as error:  # a validator is the user's own code, and raises what it likes
        raise MisfitError(_complaint(error)) from None


def as_json(text: str) -> Any:
    """Return what `text` says in JSON as its standard has it, without NaN and infinities.

    Raises
    ------
    MisfitError
        If it is none.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        told = str(error) or "nested too deeply"
        raise MisfitError(f"It is not valid JSON ({shorten(told, 100)}).") from None


def again(request: Request, answer: str, misfit: MisfitError) -> Request:
    """Return the request that asks for an answer once more, saying what is wrong with it."""
    schema = request.schema
    wanted = json.dumps(dict(schema.definition), ensure_ascii=False, default=str) if schema else ""
    return replace(
        request,
        turns=(*request.turns, Turn(prompt=request.prompt, answer=answer, images=request.images)),
        images=(),
        prompt=f"Your answer does not fit. {misfit}\nAnswer again, with nothing but one JSON "
        f"object that fits this JSON schema:\n{wanted}",
    )


def _told_by(model: Any) -> dict[str, Any]:
    try:
        return _copied(model.model_json_schema())
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"{model.__name__} has no JSON schema ({shorten(str(error), 120)}).",
            advice="Use fields that JSON can hold.",
        ) from None


def _copied(definition: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a copy of a schema that may be changed, and is JSON for certain."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(definition), allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise ConfigurationError(
            "The schema is no JSON.", advice="Use text, numbers, true, false, null, lists."
        ) from None
    return copy


def _objects(part: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yield every schema of an object within a schema, itself included."""
    if not isinstance(part, dict):
        return
    if depth > _DEEPEST:
        raise ConfigurationError("The schema is nested too deeply.")
    if part.get("type") == "object" or "properties" in part:
        yield part
    within = [part.get("items"), part.get("additionalProperties")]
    for name in _PARTS:
        within += part[name] if isinstance(part.get(name), list) else []
    for name in _FAMILIES:
        within += part[name].values() if isinstance(part.get(name), dict) else []
    for inner in within:
        yield from _objects(inner, depth + 1)


def _can_be_strict(part: dict[str, Any]) -> bool:
    """Whether an object's fields are all known: OpenAI's strict mode takes no others."""
    closed = part.get("additionalProperties", False) is False
    return closed and "properties" in part and "patternProperties" not in part


def _tighten(part: dict[str, Any]) -> None:
    """Make an object's schema as OpenAI's guide to structured outputs demands of strict ones."""
    part["additionalProperties"] = False
    part["required"] = list(part["properties"])
    for name, field in part["properties"].items():
        if isinstance(field, dict):
            field.pop("default", None)
            if "$ref" in field and len(field) > 1:
                part["properties"][name] = {"$ref": field["$ref"]}


def _unfenced(text: str) -> str:
    found = _FENCED.fullmatch(text)
    return found[2] if found else text


def _fitting(definition: Mapping[str, Any], value: Any) -> Any:
    if definition and not isinstance(value, dict):
        raise MisfitError(f"It is {_kind(value)}, not a JSON object.")
    required = definition.get("required")
    missing = [n for n in required if n not in value] if isinstance(required, list) else []
    if missing:
        raise MisfitError(f"It lacks {', '.join(map(str, missing[:_NAMED]))}.")
    return value


def _kind(value: object) -> str:
    kinds = {list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), "a number, true or false")


def _complaint(error: Exception) -> str:
    """Return what pydantic finds wrong, field by field; of other errors their own words."""
    try:
        found = error.errors(include_url=False, include_context=False)  # type: ignore[attr-defined]
        parts = [f"{'.'.join(map(str, e['loc'])) or 'It'}: {shorten(e['msg'], 100)}" for e in found]
    except Exception:
        return f"It does not fit ({type(error).__name__}: {shorten(str(error), 100)})."
    more = f"; and {len(parts) - _NAMED} more" if len(parts) > _NAMED else ""
    return f"{'; '.join(parts[:_NAMED])}{more}."


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
