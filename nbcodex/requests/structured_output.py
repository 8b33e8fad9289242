"""The structure that an answer must have: from the user's class to a JSON schema, and back.

An answer is validated against the user's own schema: by pydantic for types, by jsonschema for
dicts. If it does not fit, the request is sent once more where that can help.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from numbers import Integral, Real
from typing import Any, get_origin

from nbcodex.errors import Advice, AnswerError, ConfigurationError, NbcodexError, shorten
from nbcodex.models import Reply, Request, Schema, Turn
from nbcodex.openai_api import sent_schema
from nbcodex.openai_api.answers import CUT_MAX_OUTPUT, CompletedAnswer
from nbcodex.openai_api.sent_schema import is_object, resolve, sent_form, subschemas

ANY_JSON = Schema(name="json", definition={}, strict=False)  # accepts everything that is JSON

# Notes in the line of figures.
NOTE_ASKED_AGAIN = "asked again, because the answer did not fit"
NOTE_DECLINED = "the model refuses"
NOTE_MISMATCH = "not what was asked for"

# Of one answer, and of one violation of its schema.
MAX_ERRORS_SHOWN, MAX_ERROR_CHARS = 5, 100
MAX_PRUNING_STEPS = 10_000  # to remove nulls: each level of nested unions multiplies the steps

# Keywords beside a `$ref` that add no condition to the schema that it names.
_ANNOTATIONS = frozenset(
    ("$schema", "$id", "$defs", "definitions", "$comment", "title", "description", "examples")
)
# Matches "```json\n{}\n```": an answer that is one Markdown fence.
_FENCED = re.compile(r"\s*(`{3,}|~{3,})[ \t]*(?:json\w*)?[ \t]*\n(.*?)\n?[ \t]*\1\s*", re.DOTALL)
_BACKSLASH = re.compile(r"\\(.)", re.DOTALL)
# Matches the beginning of an object or a list, but not that of "[note]", "[1]" or "{name}".
_JSON_OPENING = re.compile(r'\{\s*["}]|\[(?!\d+\])\s*[\[{"\d\]-]')
_MAX_VALUES = 20  # in one answer; among more, none can be the one that is meant
# Of a pydantic TypeAdapter, of a NewType, and of an alias made by the statement `type`.
_TYPE_ATTRIBUTES = ("validate_json", "__supertype__", "__value__")
_INVALID_NAME_CHARS = re.compile(r"[^A-Za-z0-9_-]+")


class SchemaMismatchError(ValueError):
    """An answer does not have the structure that was asked for; the message says why."""


def to_schema(given: object) -> Schema | None:
    """Return the schema of a type, or of a JSON schema as a dict; else a ConfigurationError."""
    if given is None or isinstance(given, Schema):
        return given
    if isinstance(given, Mapping):
        return _schema_of_definition(json_text(given, "The schema"))
    # `get_origin` recognizes `list[Person]` and unions.
    is_type = isinstance(given, type) or get_origin(given) is not None
    if not (is_type or any(hasattr(given, name) for name in _TYPE_ATTRIBUTES)):
        name = type(given).__name__
        found = f"an object of {name}" if hasattr(given, "model_json_schema") else name
        raise ConfigurationError(
            f"A schema is a pydantic class or a JSON schema as a dict, or a type such as "
            f"list[Person], not {found}.",
            advice="Give the class itself.",
        )
    try:
        return _schema_of_type(given)
    except TypeError:  # it has no hash, such as Annotated[int, []]
        return _schema_of_type.__wrapped__(given)


def parse_answer(schema: Schema, text: str) -> Any:
    """Return an instance of the class, else the JSON value; or raise a SchemaMismatchError."""
    try:
        return _parse_whole(schema, text)
    except SchemaMismatchError:
        # Models introduce the JSON with a sentence, or add one (langgenius/dify#42451).
        fitting = []
        for value in _values_within(text):
            with contextlib.suppress(SchemaMismatchError):
                fitting.append(_parse_whole(schema, json.dumps(value, ensure_ascii=False)))
        if len(fitting) != 1:
            raise
        return fitting[0]


def _values_within(text: str) -> list[Any]:
    """Return the JSON objects and lists in a text; none if one of them is broken or cut."""
    # Backslashes of Markdown and line breaks in strings are not JSON, but clear (mem0ai/mem0#4420).
    text = _BACKSLASH.sub(lambda pair: pair[1] if pair[1] in "*_~#&" else pair[0], text)
    decoder = json.JSONDecoder(strict=False, parse_constant=_reject_constant)
    values: list[Any] = []
    end = 0
    while opening := _JSON_OPENING.search(text, end):
        try:
            value, end = decoder.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            return []
        values.append(value)
        if len(values) > _MAX_VALUES:
            return []
    return values


def _parse_whole(schema: Schema, text: str) -> Any:
    """Do what `parse_answer` does for a text that is nothing but the JSON."""
    # Models that are asked for nothing but JSON still wrap it in a Markdown fence.
    if fenced := _FENCED.fullmatch(text):
        text = fenced[2]
    if not schema.definition:
        return _parse_json(text)
    if not is_object(schema.definition):
        # Servers require an object, so the value was requested as the only field of one.
        with contextlib.suppress(SchemaMismatchError):
            wrapper = _parse_json(text)
            if isinstance(wrapper, dict) and list(wrapper) == [sent_schema.VALUE_FIELD]:
                text = json.dumps(wrapper[sent_schema.VALUE_FIELD], ensure_ascii=False)
    try:
        return _validate(schema, text)
    except SchemaMismatchError as mismatch:
        # In strict mode a model cannot leave out an optional field, and writes null instead.
        pruned = value = None
        with contextlib.suppress(Exception):  # no JSON, a reference without a target, too deep
            value = pruned = _parse_json(text)
            # Models can encode the object twice, or put it into a list of its own.
            if is_object(schema.definition) and isinstance(value, list) and len(value) == 1:
                value = json.dumps(value[0], ensure_ascii=False)
            if is_object(schema.definition) and isinstance(value, str):
                return _parse_whole(schema, value)
            validator = _validator(schema.definition)
            pruned = _without_nulls(value, schema.definition, validator, itertools.count())
        if pruned == value:
            raise mismatch from None
        return _validate(schema, json.dumps(pruned, ensure_ascii=False))


def parse_final_answer(request: Request, text: str, *, asked_twice: bool = False) -> object:
    """Return the value of an answer that is not asked for again, or raise an AnswerError."""
    if request.schema is None:
        return None
    try:
        return parse_answer(request.schema, text)
    except SchemaMismatchError as mismatch:
        raise mismatch_error(request, mismatch, asked_twice=asked_twice) from None


def _parse_json(text: str) -> Any:
    """Return the value of a JSON text; NaN and infinities are not JSON."""
    try:
        return json.loads(text, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error) or "nested too deeply"
        raise SchemaMismatchError(f"It is not valid JSON ({shorten(reason, 100)}).") from None


def parse_reused(request: Request, reply: Reply | None) -> Reply | None:
    """Return an answer of the journal, parsed; None if it does not fit the schema."""
    if reply is None or request.schema is None:
        return reply
    try:
        return replace(reply, parsed=parse_answer(request.schema, reply.text))
    except SchemaMismatchError:
        return None


def check_repairable(
    request: Request, answer: CompletedAnswer, mismatch: SchemaMismatchError, *, waited: float
) -> None:
    """Raise an AnswerError if asking once more cannot help, or the patience is used up."""
    schema = request.schema
    if answer.declined:
        raise AnswerError(
            f"The model refuses: {shorten(answer.text, 200)}", advice="Rephrase the prompt."
        )
    if answer.cut:
        advice = "Rephrase the prompt."
        if answer.cut == CUT_MAX_OUTPUT:
            advice = "Raise --max-output. If none is set, ask for less."
        raise AnswerError(
            f"The answer was cut ({shorten(answer.cut, 40)}): {mismatch}", advice=advice
        )
    if schema is None or not schema.definition or waited >= request.patience:
        raise mismatch_error(request, mismatch)


def repair_request(
    request: Request, answer: CompletedAnswer, mismatch: SchemaMismatchError
) -> Request:
    """Return a request for another answer, which says what is wrong with the first."""
    schema = request.schema
    wanted = sent_schema.as_object(schema.definition) if schema else {}
    turn = Turn(
        prompt=request.prompt, answer=answer.text, images=request.images, carried=answer.reasoning
    )
    return replace(
        request,
        turns=(*request.turns, turn),
        images=(),  # they are in the turn that is being corrected
        prompt=f"Your answer does not fit. {mismatch}\nAnswer again, with nothing but one JSON "
        f"object that fits this JSON schema:\n{json.dumps(wanted, ensure_ascii=False)}",
    )


def mismatch_error(
    request: Request,
    mismatch: SchemaMismatchError,
    *,
    asked_twice: bool = False,
    repair_error: NbcodexError | None = None,
) -> AnswerError:
    """Return the error of an answer that does not fit; `repair_error` prevented another one."""
    schema = request.schema
    wanted = f"the schema {schema.name}" if schema and schema.definition else "JSON"
    twice = ", asked twice" if asked_twice else ""
    reason = shorten(repair_error.message, 120) if repair_error else ""
    why_once = f" It could not be asked again: {reason}" if reason else ""
    advice = Advice(
        "Its text is kept: it is shown, in the Reply of -o, and in this error's `reply`.",
        script="Its text is kept in this error's `reply`.",
    )
    if request.origin.map_id:
        kept = "Its text is kept in the row's Reply (for a frame: in `nbcodex.map.last`)."
        advice = Advice(kept, script=kept)
    return AnswerError(
        f"The answer does not fit {wanted}{twice}. {mismatch}{why_once}",
        advice=advice,
        note=NOTE_MISMATCH,
    )


# Cached, because each row of a map needs its schema.
@lru_cache(maxsize=64)
def _schema_of_type(given: Any) -> Schema:
    name = getattr(given, "__name__", "") if isinstance(given, type) else ""
    if get_origin(given) is not None:  # list[Person] has the name of list
        name = str(given).replace("__main__.", "").replace("typing.", "")
    try:
        if hasattr(given, "model_json_schema"):
            model, definition = given, given.model_json_schema()
        else:
            from pydantic import TypeAdapter

            model = given if hasattr(given, "validate_json") else TypeAdapter(given)
            definition = model.json_schema()
    except Exception as error:
        advice = "Use fields that JSON can hold."
        if getattr(error, "code", None) == "typed-dict-version":  # before Python 3.12
            advice = "Import TypedDict from typing_extensions."
        raise ConfigurationError(
            f"{name or type(given).__name__} has no JSON schema ({shorten(str(error), 120)}).",
            advice=advice,
        ) from None
    return _build_schema(json.loads(json_text(definition, "The schema")), name, model)


@lru_cache(maxsize=64)
def _schema_of_definition(text: str) -> Schema:
    definition: dict[str, Any] = json.loads(text)
    if not definition:
        raise ConfigurationError(
            "An empty schema accepts everything.",
            advice='Let it begin with {"type": "object", "properties": …}, or use -f json.',
        )
    # A second of CPU where the extras of jsonschema are installed, which jupyter_events brings. It
    # comes before the request is sent, because a mistake in a schema must cost nothing.
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    try:
        validator_for(definition, default=Draft202012Validator).check_schema(definition)
    except Exception as error:
        # Other errors: a pattern that Python cannot compile, or an endless chain of references.
        why = f"cannot be checked ({type(error).__name__}: {shorten(str(error), 100)})"
        if isinstance(error, SchemaError):
            why = f"is not valid: {_describe_violation(error)}"
        raise ConfigurationError(
            f"The schema {why}.", advice="See https://json-schema.org/understanding-json-schema."
        ) from None
    # A `$id` changes what references are relative to: then only the validator can resolve them.
    if not any("$id" in subschema for subschema in subschemas(definition)):
        for subschema in subschemas(definition):
            ref = subschema.get("$ref", "#")
            if ref.startswith(("#/", "http:", "https:")) and resolve(ref, definition) is None:
                raise ConfigurationError(
                    f"The schema has no part {shorten(ref, 80)}, which it refers to.",
                    advice="Put what is referred to into its $defs; nothing is downloaded.",
                )
    return _build_schema(definition, str(definition.get("title") or "answer"))


def _build_schema(definition: dict[str, Any], name: str, model: Any = None) -> Schema:
    # No server accepts a schema that begins with a reference, as those of recursive classes do.
    followed = set()  # references, to recognize a circle of them
    while "$ref" in definition:
        target = resolve(definition["$ref"], definition)
        if target is definition or definition["$ref"] in followed:
            raise ConfigurationError(
                "The schema refers to itself and says nothing else.",
                advice="Describe what the answer must have.",
            )
        if not isinstance(target, dict):
            break
        followed.add(definition["$ref"])
        siblings = {name: value for name, value in definition.items() if name != "$ref"}
        if not _ANNOTATIONS.issuperset(siblings):  # an answer would have to fit both
            break
        definition = {**target, **siblings}
    name = _INVALID_NAME_CHARS.sub("_", name).strip("_")[:64] or "answer"
    schema = Schema(name=name, definition=definition, model=model)
    return replace(schema, strict=sent_form(schema)[1])  # whether strict mode allows it


def json_text(value: Any, name: str) -> str:
    """Return a user's value as JSON, also of numbers and arrays such as NumPy's."""
    try:
        # By default, `json.dumps` writes NaN and infinities, which no server accepts.
        return json.dumps(value, allow_nan=False, default=_plain_value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{name} is not JSON ({shorten(str(error), 100)}).",
            advice="Use text, numbers, true, false, null, lists and dicts.",
        ) from None


def _plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Integral):
        return int(value)
    # The text of a float32, such as 0.2, is that of the number which the user means.
    if isinstance(value, Real):
        return float(str(value) if hasattr(value, "dtype") else value)
    if hasattr(type(value), "tolist"):
        return value.tolist()
    raise TypeError(f"it has a value of type {type(value).__name__}")


def _validate(schema: Schema, text: str) -> Any:
    """Return the instance of the class, else the JSON value, checked against the schema."""
    model = schema.model
    validate = getattr(model, "model_validate_json", None) or getattr(model, "validate_json", None)
    if validate:
        try:
            return validate(text)
        except Exception as error:  # a validator is the user's own code, and may raise anything
            raise SchemaMismatchError(_describe_validation_error(error)) from None
    value = _parse_json(text)
    try:
        found = _validator(schema.definition).iter_errors(value)
        violations = list(itertools.islice(found, MAX_ERRORS_SHOWN + 1))
    except Exception as error:  # such as a reference without a target, or an endless chain of them
        why = f"{type(error).__name__}: {shorten(str(error), 100)}"
        raise SchemaMismatchError(f"It could not be checked ({why}).") from None
    if violations:
        raise SchemaMismatchError(_join_first([_describe_violation(each) for each in violations]))
    return value


def _validator(definition: Mapping[str, Any]) -> Any:
    from jsonschema.validators import Draft202012Validator, validator_for
    from jsonschema_specifications import REGISTRY

    cls = validator_for(definition, default=Draft202012Validator)
    # Without a registry, the validator would download the schemas that this one refers to.
    return cls(definition, registry=REGISTRY)


def _describe_violation(error: Any) -> str:
    """Return an error of jsonschema as text: ``age: a string, not of the type integer``."""
    path = ".".join(map(str, error.absolute_path)) or "The answer"
    if error.validator == "required":
        return f"{path}: {error.message}"
    if error.validator == "type":
        types = error.validator_value
        types = " or ".join(types) if isinstance(types, list) else types
        return f"{path}: {_short_value(error.instance)}, not of the type {types}"
    message = error.message
    if len(message) > MAX_ERROR_CHARS:  # it begins with the value, and ends with the reason
        message = f"{_short_value(error.instance)} does not fit {error.validator}"
        message += f" {shorten(json.dumps(error.validator_value, default=str), 60)}"
    return f"{path}: {message}"


def _without_nulls(value: Any, schema: Any, validator: Any, steps: Iterator[int]) -> Any:
    """Return a value without the optional fields that are null where `schema` allows no null."""
    # `validator` is that of the whole schema, of which `schema` is a part.
    if next(steps) >= MAX_PRUNING_STEPS or not isinstance(schema, Mapping):
        return value
    prune = partial(_without_nulls, validator=validator, steps=steps)
    if "$ref" in schema:
        value = prune(value, resolve(schema["$ref"], validator.schema))
    for part in schema.get("allOf", ()):
        value = prune(value, part)
    for choice in schema.get("anyOf", schema.get("oneOf", ())):
        candidate = prune(value, choice)
        if validator.evolve(schema=choice).is_valid(candidate):
            value = candidate
            break
    if isinstance(value, list):
        first = schema.get("prefixItems", ())
        others = [schema.get("items")] * (len(value) - len(first))
        return [prune(v, s) for v, s in zip(value, [*first, *others], strict=False)]
    if not isinstance(value, dict):
        return value
    fields, required = schema.get("properties", {}), schema.get("required", ())
    nulls = {name for name in fields if name in value and value[name] is None}
    kept = {n for n in nulls if n in required or validator.evolve(schema=fields[n]).is_valid(None)}
    other = schema.get("additionalProperties")
    names = [name for name in value if name not in nulls - kept]
    return {name: prune(value[name], fields.get(name, other)) for name in names}


def _short_value(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value)) or shorten(json.dumps(value, default=str), 30)


def _describe_validation_error(error: Exception) -> str:
    """Return the violations in an error of pydantic, field by field, or the text of another one."""
    try:
        found = error.errors(include_url=False, include_context=False)  # type: ignore[attr-defined]
        violations = [
            f"{'.'.join(map(str, e['loc'])) or 'The answer'}: {shorten(e['msg'], MAX_ERROR_CHARS)}"
            for e in found
        ]
    except Exception:
        return f"It does not fit ({type(error).__name__}: {shorten(str(error), 100)})."
    return _join_first(violations)


def _join_first(violations: list[str]) -> str:
    more = "; and more" if len(violations) > MAX_ERRORS_SHOWN else ""
    return f"{'; '.join(violations[:MAX_ERRORS_SHOWN])}{more}."


def _reject_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not valid JSON")
