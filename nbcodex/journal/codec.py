"""An entry as its readers see it, and how requests and replies become text and come back.

Owns the words of the journal. What comes back is data only: no class outside `nbcodex.models` is
ever built, whatever the file says.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
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
    """A request in the journal, and what has come of it.

    Parameters
    ----------
    request : Request
        What was asked.
    reply : Reply
        The answer, or as much of it as is known: its `status` is the entry's.
    abandoned : bool
        Whether it was under way, and its owner is gone.
    notebook, cell, variable : str or None
        Where it was asked, and the name that the answer is bound to.
    added_at, updated_at, resume_at : float or None
        Seconds since the epoch.
    limit : Limit or None
        The limit that it waits for.
    error : str or None
        Why there is no answer.
    response_id, sequence : str or None, int or None
        The durable response at the server, and the last event of it that is in the text.
    part : str or None
        The part of its map with which it was handed in.
    """

    request: Request
    reply: Reply
    abandoned: bool = False
    notebook: str | None = None
    cell: str | None = None
    variable: str | None = None
    added_at: float = 0.0
    updated_at: float = 0.0
    resume_at: float | None = None
    limit: Limit | None = None
    error: str | None = None
    response_id: str | None = None
    sequence: int | None = None
    batch_job: str | None = None

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def status(self) -> Status:
        """Where the request is in its life."""
        return self.reply.status

    @property
    def resumable(self) -> bool:
        """Whether `claim` may have it."""
        return self.abandoned or may_be_claimed(
            self.status, of_map=bool(self.request.origin.map_id)
        )

    @property
    def stream_position(self) -> StreamPosition | None:
        """Where the durable answer goes on, behind the text; None where there is none."""
        if not (isinstance(self.response_id, str) and self.response_id):
            return None
        return StreamPosition(
            self.response_id, self.sequence if isinstance(self.sequence, int) else None
        )

    @property
    def possibly_paid(self) -> bool:
        """Whether whoever resumes it may pay for what is paid already."""
        return self.resumable and bool(self.price_uncertainty)

    @property
    def price_uncertainty(self) -> str:
        """What nobody knows of its price, in two or three words; empty where all is known."""
        died = self.abandoned and self.status == "running" and self.response_id is None
        noted = [
            note
            for note in (NOTE_POSSIBLY_PAID_TWICE, NOTE_POSSIBLY_PAID)
            if note in self.reply.notes
        ]
        return next(iter(noted), NOTE_POSSIBLY_PAID if died else "")


def may_be_claimed(status: str, *, of_map: bool) -> bool:
    """Whether a request can be taken up; cancelled, it is a row that its map still wants."""
    return status in RESUMABLE_STATUSES or (of_map and status == "cancelled")


def counted(reply: Reply) -> UsageTotals:
    """Return what `reply` adds to the totals; figures that a server made up are bounded."""
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
    """Return `number` as an integer that every column and every sum can hold."""
    return int(min(max(finite(number) or 0, 0), MAX_STORED_INTEGER))


def finite(number: float | None) -> float | None:
    """Return `number`, or None where it is none."""
    return number if number is not None and abs(number) < float("inf") else None


def encode(record: Any) -> str:
    """Return a record as JSON, in ASCII, so that lone surrogates survive."""
    return json.dumps(record, default=_reduce, skipkeys=True)


def decode(text: str) -> Any:
    """Return the record that `encode` made `text` of.

    Fields that this version does not know are left out.

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
    # A class, such as the one that reads an answer, means nothing to another process.
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
