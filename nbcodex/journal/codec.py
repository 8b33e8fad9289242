"""Converts requests and replies to JSON and back, and decides when two requests are equal.

What is read back is data only: no class outside of `nbcodex.models` is ever built from a file.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from nbcodex import models
from nbcodex.models import Request

TextT = TypeVar("TextT", str, str | None)
RecordT = TypeVar("RecordT")

# Integers up to here are exact as floats and in JSON; SQLite can add up a thousand of them.
MAX_STORED_INTEGER = 2**53

# Keys of JSON objects: a record has its class name under the first, bytes are under the second.
_RECORD, _BYTES = "__record__", "__bytes__"
_RECORD_CLASSES = {
    cls.__name__: cls
    for cls in vars(models).values()
    if isinstance(cls, type) and dataclasses.is_dataclass(cls)
}
# Files that release 0.1.0 wrote hold these names.
_RENAMED_RECORDS = {"Place": "TurnPosition", "Carried": "CarriedReasoning"}
_RENAMED_FIELDS = {
    "Origin": {"batch": "map_id", "item": "row_index", "of": "row_count", "place": "position"}
}


def bounded_integer(number: float | None) -> int:
    """Return `number` as an integer between 0, also for None, and MAX_STORED_INTEGER."""
    return int(min(max(finite_or_none(number) or 0, 0), MAX_STORED_INTEGER))


def finite_or_none(number: float | None) -> float | None:
    """Return `number`, or None if it is infinite or not a number."""
    return number if number is not None and abs(number) < float("inf") else None


def encode(record: Any) -> str:
    """Return a record, a dataclass of `models`, as JSON."""
    # In ASCII, because SQLite cannot hold the lone surrogates that a prompt may contain.
    return json.dumps(record, default=_to_json, skipkeys=True)


def decode(cls: type[RecordT], text: str) -> RecordT | None:
    """Return the record that `encode` turned into `text`; None if that is damaged."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        record = json.loads(text, object_hook=_from_json)
        # The types of its fields are not checked: in a damaged file, these may hold anything.
        return record if isinstance(record, cls) else None
    return None


def sqlite_text(text: TextT) -> TextT:
    """Return `text` as SQLite can hold it: lone surrogates are replaced."""
    if text is None or text.isascii():
        return text
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {_RECORD: type(value).__name__, **fields}
    if isinstance(value, bytes | bytearray | memoryview):
        return {_BYTES: base64.b64encode(value).decode("ascii")}
    if isinstance(value, Mapping):
        return dict(value)
    # A class, such as the one that an answer is parsed into, exists in this process only.
    return None if isinstance(value, type) else repr(value)


def _from_json(decoded: dict[str, Any]) -> Any:
    if decoded.keys() == {_BYTES}:
        return base64.b64decode(decoded[_BYTES])
    name = str(decoded.get(_RECORD))
    cls = _RECORD_CLASSES.get(_RENAMED_RECORDS.get(name, name))
    if cls is None:
        return decoded
    renamed = _RENAMED_FIELDS.get(cls.__name__, {})
    field_names = {field.name for field in dataclasses.fields(cls)}
    # JSON has no tuples; a record, which is frozen, has no lists.
    values = {
        renamed.get(name, name): tuple(value) if isinstance(value, list) else value
        for name, value in decoded.items()
    }
    # A later version may have written fields that are unknown here.
    return cls(**{name: value for name, value in values.items() if name in field_names})


# Fields that do not change the answer, and the three that `target` in `equality_key` stands for.
_NOT_IN_KEY = frozenset(
    {"id", "created_at", "origin", "patience", "reuse", "durable", "model", "api", "api_base"}
)
# The other fields of release 0.1.0. A later one counts unless it has its default, so that requests
# without the new option keep the keys that existing files have.
_FIRST_FIELDS = {
    *("prompt", "system", "images", "turns", "thread", "schema", "max_output", "effort"),
    *("params", "row"),
}


def equality_key(request: Request, *, base_url: str) -> bytes:
    """Return 32 bytes that are equal for equal requests to one server only."""
    # All fields count unless they are excluded, so one that a later version adds counts at once.
    fields = [field for field in dataclasses.fields(request) if field.name not in _NOT_IN_KEY]
    values = {field.name: getattr(request, field.name) for field in fields}
    added = {field.name: field.default for field in fields if field.name not in _FIRST_FIELDS}
    content = {n: value for n, value in values.items() if n not in added or value != added[n]}
    target = [base_url.rstrip("/"), request.model, request.api]
    # The equality keys in existing files were computed with the two empty lists.
    canonical = json.dumps(_canonical([target, content, [], []]))
    return hashlib.sha256(canonical.encode("ascii")).digest()


def _canonical(value: Any) -> Any:
    """Return `value` as nested lists, each with a tag, so that different values stay different."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case bytes() | bytearray() | memoryview():
            return ["bytes", hashlib.sha256(value).hexdigest()]
        case Mapping():
            pairs = [[str(name), _canonical(inner)] for name, inner in value.items()]
            return ["map", *sorted(pairs, key=lambda pair: pair[0])]
        case list() | tuple():
            return ["list", *map(_canonical, value)]
        case set() | frozenset():
            return ["set", *sorted(json.dumps(_canonical(inner)) for inner in value)]
        case type():
            return ["class", value.__qualname__]
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {
                f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.compare
            }
            return ["record", type(value).__name__, _canonical(fields)]
        case _:
            return ["other", type(value).__qualname__, repr(value)]
