"""The structure that an answer must have: from the user's class to a JSON schema, and back.

Owns what counts as a success, and whether asking once more is worth it. Pydantic is recognized by
its methods, never imported. Must not know how a request is sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from nbcodex.errors import AnswerError, ConfigurationError, NbcodexError, shorten
from nbcodex.models import Reply, Request, Schema, Turn
from nbcodex.openai_api.answers import CompletedAnswer

ANY_JSON = Schema(name="json", definition={}, strict=False)  # accepts everything that is JSON

# Notes in the line of figures.
NOTE_ASKED_AGAIN = "asked again, because the answer did not fit"
NOTE_REFUSED = "the model refuses"
NOTE_MISMATCH = "not what was asked for"

MAX_SCHEMA_DEPTH = 60  # a recursive definition that was expanded would not end
MAX_ERRORS_SHOWN = 5

_FENCED = re.compile(r"\s*(`{3,}|~{3,})[ \t]*(?:json\w*)?[ \t]*\n(.*?)\n?[ \t]*\1\s*", re.DOTALL)
_INVALID_NAME_CHARS = re.compile(r"[^A-Za-z0-9_-]+")
_LIST_KEYWORDS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPPING_KEYWORDS = ("properties", "$defs", "definitions")


class SchemaMismatchError(ValueError):
    """An answer does not have the structure that was asked for; its text says why."""


def to_schema(given: object) -> Schema | None:
    """Return the schema that a pydantic class or a JSON schema stands for.

    Raises
    ------
    ConfigurationError
        If it is neither, or describes anything but an object.
    """
    if given is None or isinstance(given, Schema):
        return given
    if isinstance(given, type) and hasattr(given, "model_json_schema"):
        definition, name, model = _definition_of(given), given.__name__, given
    elif isinstance(given, Mapping):
        definition, name, model = _copy(given), str(given.get("title") or "answer"), None
    else:
        kind = type(given).__name__
        found = f"an object of {kind}" if hasattr(given, "model_json_schema") else kind
        raise ConfigurationError(
            f"A schema is a pydantic class or a JSON schema as a dict, not {found}.",
            advice="Give the class itself.",
        )
    if definition.get("type") != "object":
        raise ConfigurationError(
            "The schema of an answer must describe an object.",
            advice='Let it begin with {"type": "object", "properties": …}.',
        )
    strict = all(_can_be_strict(part) for part in _object_schemas(definition))
    for part in _object_schemas(definition) if strict else ():
        _make_strict(part)
    name = _INVALID_NAME_CHARS.sub("_", name)[:64] or "answer"
    return Schema(name=name, definition=definition, strict=strict, model=model)


def parse_answer(schema: Schema, text: str) -> Any:
    """Return the object in an answer: an instance of the class, else the JSON value.

    Raises
    ------
    SchemaMismatchError
        If it is not JSON, or has another structure.
    """
    text = _without_fence(text)
    model = schema.model
    if not schema.definition or not hasattr(model, "model_validate_json"):
        return _checked(schema.definition, parse_json(text))
    try:
        return model.model_validate_json(text)
    except Exception as error:  # a validator is the user's own code, and may raise anything
        raise SchemaMismatchError(_describe(error)) from None


def parse_json(text: str) -> Any:
    """Return the value of a JSON text by the standard, which has no NaN and no infinities.

    Raises
    ------
    SchemaMismatchError
        If it is not JSON.
    """
    try:
        return json.loads(text, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error) or "nested too deeply"
        raise SchemaMismatchError(f"It is not valid JSON ({shorten(reason, 100)}).") from None


def reusable(request: Request, reply: Reply | None) -> Reply | None:
    """Return an answer of the journal with its object; None if the schema has changed since."""
    if reply is None or request.schema is None:
        return reply
    try:
        return replace(reply, parsed=parse_answer(request.schema, reply.text))
    except SchemaMismatchError:
        return None


def check_repairable(
    request: Request, answer: CompletedAnswer, mismatch: SchemaMismatchError, *, waited: float
) -> None:
    """Raise an AnswerError if asking once more cannot help, or is not worth its cost."""
    schema = request.schema
    if answer.refused:
        raise AnswerError(
            f"The model refuses: {shorten(answer.text, 200)}", advice="Rephrase the prompt."
        )
    if answer.cut:
        advice = "Raise --max-output." if answer.cut.startswith("max") else "Rephrase the prompt."
        raise AnswerError(
            f"The answer was cut ({shorten(answer.cut, 40)}): {mismatch}", advice=advice
        )
    if schema is None or not schema.definition or waited >= request.patience:
        raise mismatch_error(schema, mismatch, asked="once")


def repair_request(request: Request, answer: str, mismatch: SchemaMismatchError) -> Request:
    """Return the request that asks for an answer once more, saying what is wrong with it."""
    schema = request.schema
    wanted = json.dumps(dict(schema.definition), ensure_ascii=False, default=str) if schema else ""
    return replace(
        request,
        turns=(*request.turns, Turn(prompt=request.prompt, answer=answer, images=request.images)),
        images=(),  # they are in the turn that is being corrected
        prompt=f"Your answer does not fit. {mismatch}\nAnswer again, with nothing but one JSON "
        f"object that fits this JSON schema:\n{wanted}",
    )


def mismatch_error(
    schema: Schema | None,
    mismatch: SchemaMismatchError,
    *,
    asked: Literal["once", "twice"],
    repair_error: NbcodexError | None = None,
) -> AnswerError:
    """Return the error of an answer that does not fit, and why it was not asked again."""
    wanted = f"the schema {schema.name}" if schema and schema.definition else "JSON"
    often = ", asked twice" if asked == "twice" else ""
    why = (
        f" It could not be asked again: {shorten(repair_error.message, 120)}"
        if repair_error
        else ""
    )
    return AnswerError(
        f"The answer does not fit {wanted}{often}. {mismatch}{why}",
        advice="Its text is kept: it is shown, in the Reply of -o, and in this error's `reply`.",
    )


def _definition_of(model: Any) -> dict[str, Any]:
    try:
        return _copy(model.model_json_schema())
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"{model.__name__} has no JSON schema ({shorten(str(error), 120)}).",
            advice="Use fields that JSON can hold.",
        ) from None


def _copy(definition: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a copy that may be changed, and is certainly JSON."""
    try:
        # Infinities and NaN pass `json.dumps` by default, but no server accepts them.
        copy: dict[str, Any] = json.loads(json.dumps(dict(definition), allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise ConfigurationError(
            "The schema is not JSON.", advice="Use text, numbers, true, false, null, lists."
        ) from None
    return copy


def _object_schemas(part: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yield every schema of an object within a schema, itself included."""
    if not isinstance(part, dict):
        return
    if depth > MAX_SCHEMA_DEPTH:
        raise ConfigurationError("The schema is nested too deeply.")
    if part.get("type") == "object" or "properties" in part:
        yield part
    children = [part.get("items"), part.get("additionalProperties")]
    for name in _LIST_KEYWORDS:
        children += part[name] if isinstance(part.get(name), list) else []
    for name in _MAPPING_KEYWORDS:
        children += part[name].values() if isinstance(part.get(name), dict) else []
    for child in children:
        yield from _object_schemas(child, depth + 1)


# The rules of strict mode: https://platform.openai.com/docs/guides/structured-outputs, "Supported
# schemas". All fields have to be required, and no others allowed; a `$ref` stands alone.


def _can_be_strict(part: dict[str, Any]) -> bool:
    closed = part.get("additionalProperties", False) is False
    return closed and "properties" in part and "patternProperties" not in part


def _make_strict(part: dict[str, Any]) -> None:
    part["additionalProperties"] = False
    part["required"] = list(part["properties"])
    for name, field in part["properties"].items():
        if isinstance(field, dict):
            field.pop("default", None)
            if "$ref" in field and len(field) > 1:
                part["properties"][name] = {"$ref": field["$ref"]}


def _without_fence(text: str) -> str:
    # Models that are asked for JSON alone still wrap it in a Markdown fence.
    found = _FENCED.fullmatch(text)
    return found[2] if found else text


def _checked(definition: Mapping[str, Any], value: Any) -> Any:
    if definition and not isinstance(value, dict):
        raise SchemaMismatchError(f"It is {_kind(value)}, not a JSON object.")
    required = definition.get("required")
    missing = [n for n in required if n not in value] if isinstance(required, list) else []
    if missing:
        raise SchemaMismatchError(f"It lacks {', '.join(map(str, missing[:MAX_ERRORS_SHOWN]))}.")
    return value


def _kind(value: object) -> str:
    kinds = {list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), "a number, true or false")


def _describe(error: Exception) -> str:
    """Return pydantic's findings, field by field; of other errors their own words."""
    try:
        found = error.errors(include_url=False, include_context=False)  # type: ignore[attr-defined]
        parts = [f"{'.'.join(map(str, e['loc'])) or 'It'}: {shorten(e['msg'], 100)}" for e in found]
    except Exception:
        return f"It does not fit ({type(error).__name__}: {shorten(str(error), 100)})."
    more = f"; and {len(parts) - MAX_ERRORS_SHOWN} more" if len(parts) > MAX_ERRORS_SHOWN else ""
    return f"{'; '.join(parts[:MAX_ERRORS_SHOWN])}{more}."


def _reject_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not valid JSON")
