"""When two requests are equal, so that the answer of one serves for the other.

Owns the equality behind ``--reuse``. Must not know the database, which adds its salt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from nbcodex.models import Request

_NOT_ASKED = frozenset(
    {"id", "created_at", "origin", "patience", "reuse", "durable", "model", "api", "api_base"}
)


def equality_key(
    request: Request,
    *,
    base_url: str,
    model: str | None = None,
    api: str | None = None,
    thread: Iterable[Any] = (),
    images: Iterable[Any] = (),
) -> bytes:
    """Return 32 bytes that are the same for equal requests only.

    Every field of the request counts but its id, its time and its patience; a field that a later
    version adds counts by itself. Large images take milliseconds: call it away from the loop.

    Parameters
    ----------
    base_url : str
        Where the request goes in the end.
    model, api : str or None
        What was decided where the request leaves it open.
    thread : iterable
        The turns before this one.
    images : iterable
        Bytes, or whatever stands for them.
    """
    asked = {
        field.name: getattr(request, field.name)
        for field in dataclasses.fields(request)
        if field.name not in _NOT_ASKED
    }
    where = [base_url.rstrip("/"), model or request.model, api or request.api]
    whole = plain([where, asked, list(thread), list(images)])
    return hashlib.sha256(json.dumps(whole).encode("ascii")).digest()


def plain(value: Any) -> Any:
    """Return `value` as nested lists, tagged so that different values stay different."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case bytes() | bytearray() | memoryview():
            return ["bytes", hashlib.sha256(value).hexdigest()]
        case Mapping():
            pairs = [[str(name), plain(inner)] for name, inner in value.items()]
            return ["map", *sorted(pairs, key=lambda pair: pair[0])]
        case list() | tuple():
            return ["list", *map(plain, value)]
        case set() | frozenset():
            return ["set", *sorted(json.dumps(plain(inner)) for inner in value)]
        case type():
            return ["class", value.__qualname__]
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            compared = [f.name for f in dataclasses.fields(value) if f.compare]
            fields = {name: getattr(value, name) for name in compared}
            return ["record", type(value).__name__, plain(fields)]
        case _:
            return ["other", type(value).__qualname__, repr(value)]
