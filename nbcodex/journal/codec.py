"""An entry as its readers see it, and how requests and replies become text and back.

Also says when two requests are equal. What is read back is data only: no class outside of
`nbcodex.models` is ever built from a file. Knows nothing of the database.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nbcodex import models
from nbcodex.models import (
    NOTE_POSSIBLY_PAID,
    NOTE_POSSIBLY_PAID_TWICE,
    Limit,
    Reply,
    Request,
    Status,
    StreamPosition,
    Usage,
    UsageTotals,
)

# Floats and JSON are exact up to here, and a sum of many still fits a column.
MAX_STORED_INTEGER = 2**53
RESUMABLE_STATUSES: frozenset[Status] = frozenset({"parked", "interrupted", "failed"})

_RECORD, _BYTES = "__record__", "__bytes__"
_KINDS = {
    kind.__name__: kind
    for kind in vars(models).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}
# Files that release 0.1.0 wrote hold these names.
_RENAMED_RECORDS = {"Place": "TurnPosition", "Carried": "CarriedReasoning"}
_RENAMED_FIELDS = {
    "Origin": {"batch": "map_id", "item": "row_index", "of": "row_count", "place": "position"}
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A request in the journal, and what has come of it."""

    # request, reply: what was asked, and as much of the answer as is stored; its `status` is the
    # entry's.
    request: Request
    reply: Reply
    abandoned: bool = False  # whether it is unfinished and its owner gone
    # notebook, cell, variable: where it was asked, and the name that the answer is bound to.
    notebook: str | None = None
    cell: str | None = None
    variable: str | None = None
    # added_at, updated_at, resume_at: seconds since the epoch.
    added_at: float = 0.0
    updated_at: float = 0.0
    resume_at: float | None = None
    limit: Limit | None = None  # the limit that it waits for
    error: str | None = None  # why there is no answer
    # response_id, sequence: the durable response at the server, and its last event that is in the
    # text.
    response_id: str | None = None
    sequence: int | None = None
    batch_job: str | None = None  # the tag of the batch job that the row of a map is in

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def status(self) -> Status:
        """The request's status."""
        return self.reply.status

    @property
    def resumable(self) -> bool:
        """Whether `Journal.claim` can succeed."""
        of_map = bool(self.request.origin.map_id)
        return self.abandoned or may_be_claimed(self.status, of_map=of_map)

    @property
    def stream_position(self) -> StreamPosition | None:
        """Where the durable answer continues, behind the text; None if there is none."""
        if not (isinstance(self.response_id, str) and self.response_id):
            return None
        # SQLite's columns hold values of any type, and a damaged file does.
        sequence = self.sequence if isinstance(self.sequence, int) else None
        return StreamPosition(self.response_id, sequence)

    @property
    def possibly_paid(self) -> bool:
        """Whether resuming it may cost what is paid already."""
        return self.resumable and bool(self.price_uncertainty)

    @property
    def price_uncertainty(self) -> str:
        """What is not known of its price, in two or three words; empty if all is known."""
        # A kernel that died between sending and the first event leaves no trace of what it cost.
        died = self.abandoned and self.status == "running" and self.response_id is None
        for note in (NOTE_POSSIBLY_PAID_TWICE, NOTE_POSSIBLY_PAID):
            if note in self.reply.notes:
                return note
        return NOTE_POSSIBLY_PAID if died else ""


def may_be_claimed(status: str, *, of_map: bool) -> bool:
    """Return whether a kernel may claim a request of this status."""
    # A cancelled row has no answer, and a map that is resumed asks for it again.
    return status in RESUMABLE_STATUSES or (of_map and status == "cancelled")


def bounded_totals(reply: Reply) -> UsageTotals:
    """Return what `reply` adds to the totals; implausible figures of a server are bounded."""
    more = UsageTotals.of(reply)
    usage = Usage(
        input_tokens=whole(more.usage.input_tokens),
        cached_tokens=whole(more.usage.cached_tokens),
        output_tokens=whole(more.usage.output_tokens),
        reasoning_tokens=whole(more.usage.reasoning_tokens),
        estimated=more.usage.estimated,
    )
    cost, waited = finite(more.cost) or 0.0, finite(more.waited) or 0.0
    # `insert` has counted the request; attempts are not stored.
    return replace(more, requests=0, attempts=0, usage=usage, cost=cost, waited=waited)


def whole(number: float | None) -> int:
    """Return `number` as an integer between 0 and MAX_STORED_INTEGER."""
    return int(min(max(finite(number) or 0, 0), MAX_STORED_INTEGER))


def finite(number: float | None) -> float | None:
    """Return `number`, or None if it is infinite or not a number."""
    return number if number is not None and abs(number) < float("inf") else None


def encode(record: Any) -> str:
    """Return a record as JSON."""
    # In ASCII, because SQLite cannot hold the lone surrogates that a prompt may contain.
    return json.dumps(record, default=_reduce, skipkeys=True)


def decode(text: str) -> Any:
    """Return the record that `encode` turned into `text`, without fields that are unknown here.

    Raises
    ------
    ValueError, TypeError
        If the text is damaged.
    """
    return json.loads(text, object_hook=_restore)


def storable(text: str | None) -> str | None:
    """Return `text` as SQLite can hold it: lone surrogates are replaced."""
    if text is None or text.isascii():
        return text
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _reduce(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {_RECORD: type(value).__name__, **fields}
    if isinstance(value, bytes | bytearray | memoryview):
        return {_BYTES: base64.b64encode(value).decode("ascii")}
    if isinstance(value, Mapping):
        return dict(value)
    # A class, such as the one that an answer is parsed into, means nothing to another process.
    return None if isinstance(value, type) else repr(value)


def _restore(found: dict[str, Any]) -> Any:
    if found.keys() == {_BYTES}:
        return base64.b64decode(found[_BYTES])
    name = str(found.get(_RECORD))
    kind = _KINDS.get(_RENAMED_RECORDS.get(name, name))
    if kind is None:
        return found
    renamed = _RENAMED_FIELDS.get(kind.__name__, {})
    found = {renamed.get(field, field): value for field, value in found.items()}
    known = {field.name for field in dataclasses.fields(kind)}
    # JSON has no tuples; a record, which is frozen, has no lists.
    return kind(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found.items()
            if name in known
        }
    )


# These fields do not change the answer, or are part of the key in another way.
_NOT_IN_KEY = frozenset(
    {"id", "created_at", "origin", "patience", "reuse", "durable", "model", "api", "api_base"}
)


def equality_key(request: Request, *, base_url: str) -> bytes:
    """Return 32 bytes that are equal for equal requests to one server only.

    Hashing large images takes milliseconds.
    """
    # All fields count unless excluded, so one that a later version adds counts by itself.
    asked = {
        field.name: getattr(request, field.name)
        for field in dataclasses.fields(request)
        if field.name not in _NOT_IN_KEY
    }
    where = [base_url.rstrip("/"), request.model, request.api]
    # The empty lists are part of the keys in files that exist.
    return hashlib.sha256(json.dumps(_plain([where, asked, [], []])).encode("ascii")).digest()


def _plain(value: Any) -> Any:
    """Return `value` as nested lists, tagged so that different values stay different."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case bytes() | bytearray() | memoryview():
            return ["bytes", hashlib.sha256(value).hexdigest()]
        case Mapping():
            pairs = [[str(name), _plain(inner)] for name, inner in value.items()]
            return ["map", *sorted(pairs, key=lambda pair: pair[0])]
        case list() | tuple():
            return ["list", *map(_plain, value)]
        case set() | frozenset():
            return ["set", *sorted(json.dumps(_plain(inner)) for inner in value)]
        case type():
            return ["class", value.__qualname__]
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            compared = [f.name for f in dataclasses.fields(value) if f.compare]
            fields = {name: getattr(value, name) for name in compared}
            return ["record", type(value).__name__, _plain(fields)]
        case _:
            return ["other", type(value).__qualname__, repr(value)]
