"""What is read from a journal, each as one function on a connection.

Owns every query, and the verdict whether an entry is abandoned. Reads nothing but data: a row that
is damaged is left out, never guessed at. Must not know threads, files or loops.
"""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass, replace
from typing import TypeVar, get_args

from nbcodex.errors import EntryError
from nbcodex.journal.codec import Entry, decode, storable
from nbcodex.journal.conversations import place_of, with_words
from nbcodex.journal.owner import Beat, Owner, provably_dead, silent
from nbcodex.models import NO_USAGE, Limit, Origin, Reply, Request, Status, Usage, UsageTotals
from nbcodex.runtime.clock import Clock

R = TypeVar("R")
Connection = sqlite3.Connection
ACTIVE_STATUSES = frozenset({"pending", "running", "waiting"})


def answered(connection: Connection, key: bytes) -> Entry | None:
    """Return the newest answered entry whose request is equal."""
    rows = connection.execute(
        """SELECT * FROM book WHERE key = ? AND status = 'done' AND key IS NOT NULL
        ORDER BY seq DESC LIMIT 1""",
        (salted(connection, key),),
    )
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return next((_entry(row, is_abandoned=False) for row in rows), None)
    return None


def reused(reply: Reply, *, id_: str | None = None) -> Reply:
    """Return an answer as one that is given again, at no cost."""
    cheap = replace(reply, usage=NO_USAGE, cost=0.0, attempts=0, waited=0.0, seconds=0.0)
    return replace(cheap, reused=True, notes=(), id=id_ or reply.id)


def newest(
    connection: Connection, *, limit: int, notebook: str | None, owner: Owner, clock: Clock
) -> list[Entry]:
    """Return entries, newest first; of a map, one row stands for all."""
    if notebook is None:
        rows = connection.execute(
            "SELECT * FROM book WHERE listed = 1 ORDER BY seq DESC LIMIT ?", (limit,)
        )
    else:
        rows = connection.execute(
            "SELECT * FROM book WHERE listed = 1 AND notebook = ? ORDER BY seq DESC LIMIT ?",
            (storable(notebook), limit),
        )
    return entries_of(rows.fetchall(), owner=owner, clock=clock)


def unfinished(
    connection: Connection, *, notebook: str | None, owner: Owner, clock: Clock
) -> list[Entry]:
    """Return what is parked or abandoned, oldest first; not the rows of maps."""
    rows = connection.execute(
        """SELECT * FROM book WHERE status IN ('pending', 'running', 'waiting', 'parked')
        AND batch IS NULL AND (:notebook IS NULL OR notebook = :notebook) ORDER BY seq""",
        {"notebook": storable(notebook)},
    )
    entries = entries_of(rows.fetchall(), owner=owner, clock=clock)
    return [_worded(connection, entry) for entry in entries if entry.resumable]


def find(connection: Connection, prefix: str, *, owner: Owner, clock: Clock) -> Entry:
    """Return the one entry whose id is `prefix`, or begins with it.

    Raises
    ------
    EntryError
        If there is none, or more than one, or if it is damaged.
    """
    start = storable(prefix.strip()) or ""
    rows = connection.execute(
        """SELECT * FROM book WHERE id >= ? AND id < ? ORDER BY id LIMIT 8""",
        (start, start + "\U0010ffff"),
    ).fetchall()
    rows = [row for row in rows if row["id"] == start] or rows
    if not rows or not start:
        raise EntryError(f"No entry of the journal begins with {prefix[:40]!r}.")
    if len(rows) > 1:
        ids = ", ".join(row["id"] for row in rows[:7]) + (", …" if len(rows) > 7 else "")
        raise EntryError(f"{prefix[:40]!r} may be {ids}.", advice="Give more of the id.")
    if not (entries := entries_of(rows, owner=owner, clock=clock)):
        raise EntryError(f"The entry {rows[0]['id']} is damaged and cannot be read.")
    return _worded(connection, entries[0])


def totals(connection: Connection) -> UsageTotals:
    """Return the counters, which are never computed from the entries."""
    row = connection.execute("SELECT * FROM totals").fetchone()
    names = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
    return UsageTotals(
        requests=row["requests"],
        answers=row["answers"],
        usage=Usage(**{name: row[name] for name in names}, estimated=row["estimated"] > 0),
        cost=row["cost"],
        waited=row["waited"],
        unknown=row["unknown"],
        unpriced=row["unpriced"],
        estimated=row["estimated"],
    )


def abandoned(row: sqlite3.Row, *, here: Owner, clock: Clock, known: dict[int, bool]) -> bool:
    """Return whether the entry was under way and its owner is gone.

    `known` remembers the verdict on each owner, for a list of many entries.
    """
    if row["status"] not in ACTIVE_STATUSES or row["owner"] == here.id:
        return False
    if row["host"] is None:
        return True
    if row["owner"] not in known:
        known[row["owner"]] = is_gone(row, here=here, clock=clock)
    return known[row["owner"]]


def is_gone(row: sqlite3.Row, *, here: Owner, clock: Clock) -> bool:
    """Return whether the owner that a row tells of is no more."""
    if row["host"] is None:
        return True
    names = ("host", "boot", "space", "pid", "start")
    owner = Owner(id=row["owner"], **{name: row[name] for name in names})
    last = Beat(at=row["beat_at"], now=row["beat_now"])
    return provably_dead(owner, here=here) or silent(owner, last, here=here, clock=clock)


def salted(connection: Connection, key: bytes) -> bytes:
    """Return `key` as it is stored: of no use outside this journal."""
    found: bytes = connection.execute("SELECT salted(?, value) FROM salt", (key,)).fetchone()[0]
    return found


def entries_of(rows: list[sqlite3.Row], *, owner: Owner, clock: Clock) -> list[Entry]:
    """Return the entries in `rows` that can be read."""
    known: dict[int, bool] = {}
    found = []
    for row in rows:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            gone = abandoned(row, here=owner, clock=clock, known=known)
            found.append(_entry(row, is_abandoned=gone))
    return found


def _worded(connection: Connection, entry: Entry) -> Entry:
    """Return an entry whose request says its earlier turns."""
    request = entry.request
    return replace(entry, request=with_words(connection, request))


def _entry(row: sqlite3.Row, *, is_abandoned: bool) -> Entry:
    """Return what `row` says.

    Raises
    ------
    ValueError, TypeError, RecursionError
        If it is damaged beyond reading.
    """
    request = _record(row["request"], Request)
    reply = _record(row["reply"], Reply)
    if reply is None:  # not `or`: a reply without an answer is false
        reply = Reply(id=row["id"])
    if not (request and isinstance(request.prompt, str) and isinstance(row["text"], str)):
        raise ValueError("a row without a prompt or a text")
    if not (isinstance(request.origin, Origin) and isinstance(request.turns, tuple)):
        raise ValueError("a row without an origin or turns")  # noqa: TRY004 - a damaged row
    if not (row["status"] in get_args(Status) and isinstance(reply.usage, Usage)):
        raise ValueError("a row without a status or usage")
    origin = replace(request.origin, position=place_of(row))
    return Entry(
        request=replace(request, id=row["id"], origin=origin),
        reply=replace(
            reply, id=row["id"], text=row["text"], status=row["status"], attempts=row["attempts"]
        ),
        abandoned=is_abandoned,
        notebook=row["notebook"],
        cell=row["cell"],
        variable=row["variable"],
        added_at=row["added_at"],
        updated_at=row["updated_at"],
        resume_at=row["resume_at"],
        limit=_record(row["limits"], Limit),
        error=row["error"],
        response_id=row["response_id"],
        sequence=row["sequence"],
        batch_job=row["part"],
    )


def _record(text: str | None, kind: type[R]) -> R | None:
    if text is None:
        return None
    found = decode(text)
    if not isinstance(found, kind):
        raise TypeError(f"no {kind.__name__}")
    return found


_OPEN = """SELECT e.owner, min(e.status) AS status, count(*) AS requests,
    sum(e.status = 'waiting') AS waiting,
    min(CASE e.status WHEN 'waiting' THEN e.resume_at END) AS resume_at,
    o.host, o.boot, o.space, o.pid, o.start, o.beat_at, o.beat_now
FROM entries AS e JOIN owners AS o ON o.id = e.owner
WHERE e.status IN ('pending', 'running', 'waiting', 'parked')
    AND e.status <> 'parked' AND e.owner <> ?
GROUP BY e.owner"""
"""The first condition is that of the partial index `entries_open`, to the letter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherKernels:
    """What other kernels have under way.

    Parameters
    ----------
    kernels, requests, waiting : int
        How many kernels, with how many requests, of which so many wait for a limit or a fault.
    resume_at : float or None
        When the first of those goes on, in seconds since the epoch.
    """

    kernels: int = 0
    requests: int = 0
    waiting: int = 0
    resume_at: float | None = None


def look(connection: sqlite3.Connection, *, owner: Owner, clock: Clock) -> OtherKernels:
    """Return what kernels other than `owner` have under way; those that are gone do not count."""
    known: dict[int, bool] = {}
    rows = [
        row
        for row in connection.execute(_OPEN, (owner.id,))
        if not abandoned(row, here=owner, clock=clock, known=known)
    ]
    moments = [row["resume_at"] for row in rows if row["resume_at"] is not None]
    return OtherKernels(
        kernels=len(rows),
        requests=sum(row["requests"] for row in rows),
        waiting=sum(row["waiting"] for row in rows),
        resume_at=min(moments, default=None),
    )
