"""What is read from a journal, each query as one function on a connection.

`book` is the view of entries with their owners, see schema.sql; `batch` is an entry's map run, and
`part` its batch job. A damaged row is left out.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from nbcodex import models
from nbcodex.errors import EntryError, EntryNotFoundError
from nbcodex.journal.codec import decode, sqlite_text
from nbcodex.journal.conversations import resolve_turns
from nbcodex.journal.owner import Connection, is_abandoned
from nbcodex.journal.sqlite_worker import SqliteWorker, blocking_transaction
from nbcodex.models import ZERO_USAGE, Reply, Request, Status, StreamPosition, TurnPosition, Usage

# For an `equality_key`; the file holds keys only as hashes, with a random salt that is its own.
# SQLite uses the index `entries_answered` only if its condition is repeated.
KEY_IS_ANSWERED = (
    "key = salted(?, (SELECT value FROM salt)) AND status = 'done' AND key IS NOT NULL"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A request in the journal, and what has become of it."""

    request: Request
    reply: Reply  # as much of it as is stored; its `status` is the entry's
    abandoned: bool = False  # whether it is unfinished and its owner gone
    added_at: float = 0.0  # seconds since the epoch, like the next one
    resume_at: float | None = None  # when a waiting or parked request may be sent
    error: str | None = None  # why there is no answer
    # The durable response at the server, and its last event that is in the text.
    stream_position: StreamPosition | None = None
    batch_job: str | None = None  # our tag of the batch job that the row of a map is in

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
        return self.abandoned or may_be_claimed(self.status, map_id=self.request.origin.map_id)

    @property
    def possibly_paid(self) -> bool:
        """Whether the answer may be paid for already, so that resuming pays a second time."""
        return self.resumable and bool(self.cost_uncertainty)

    @property
    def cost_uncertainty(self) -> str:
        """What is not known of its cost, in two or three words; empty if all is known."""
        for note in (models.NOTE_POSSIBLY_PAID_TWICE, models.NOTE_POSSIBLY_PAID):
            if note in self.reply.notes:
                return note
        # A kernel that died between sending and the first event has not stored any cost.
        died = self.abandoned and self.status == "running" and self.stream_position is None
        return models.NOTE_POSSIBLY_PAID if died else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherKernels:
    """How many other kernels have unfinished requests, and how many requests these are."""

    kernels: int = 0
    requests: int = 0
    waiting: int = 0  # how many of the requests wait
    resume_at: float | None = None  # when the first of these continues, in seconds since the epoch


def may_be_claimed(status: str, *, map_id: str | None) -> bool:
    """Return whether a kernel may claim an entry of this status; only rows have a `map_id`."""
    # A map that is resumed sends its cancelled rows again.
    return status in ("parked", "interrupted", "failed") or (status == "cancelled" and bool(map_id))


def find_answer(connection: Connection, key: bytes, *, reply_id: str) -> Reply | None:
    """Return the newest answer to an equal request, as a free reply with the id `reply_id`."""
    rows = connection.execute(
        f"SELECT * FROM book WHERE {KEY_IS_ANSWERED} ORDER BY seq DESC LIMIT 1",  # noqa: S608 - constant
        (key,),
    )
    # If the answer is damaged, there is no entry, and the request is sent.
    for entry in entries_of(connection, rows):
        free = replace(entry.reply, usage=ZERO_USAGE, cost=0.0, attempts=0, notes=())
        return replace(free, id=reply_id, reused=True, waited=0.0, queued=0.0, seconds=0.0)
    return None


def find_entry(connection: Connection, prefix: str) -> Entry:
    """Return the one entry whose id is `prefix`, or begins with it; EntryError if none does."""
    if (id_ := find_id(connection, column="id", prefix=prefix)) is None:
        raise EntryNotFoundError(f"No entry of the journal begins with {prefix[:40]!r}.")
    rows = connection.execute("SELECT * FROM book WHERE id = ?", (id_,))
    if not (entries := entries_of(connection, rows)):
        raise EntryError(f"The entry {id_} is damaged and cannot be read.")
    return _with_turns(connection, entries[0])


def find_id(connection: Connection, *, column: Literal["id", "batch"], prefix: str) -> str | None:
    """Return the one id in `column` that is or begins with `prefix`; EntryError if several do."""
    if not (start := sqlite_text(prefix.strip())):
        return None
    # A range instead of LIKE: it uses the index, and the prefix may hold % and _.
    rows = connection.execute(
        f"SELECT DISTINCT {column} FROM entries "  # noqa: S608 - constants
        f"WHERE {column} >= ? AND {column} < ? ORDER BY {column} LIMIT 8",
        (start, start + "\U0010ffff"),
    )
    found = [str(row[0]) for row in rows]
    # A complete id is never ambiguous, even if longer ids begin with it.
    if len(found) > 1 and start not in found:
        more = ", …" if len(found) > 7 else ""  # of the eight at most, seven are named
        raise EntryError(
            f"{prefix[:40]!r} may be {', '.join(found[:7])}{more}.", advice="Type more of the id."
        )
    return found[0] if found else None


def where_clause(connection: Connection, prefix: str | None) -> tuple[str, tuple[str, ...]]:
    """Return a WHERE clause, for the map or entry of `prefix` or for all, and its parameters."""
    if prefix is None:
        return "", ()
    if map_id := find_id(connection, column="batch", prefix=prefix):
        return "WHERE batch = ?", (map_id,)
    return "WHERE id = ?", (find_entry(connection, prefix).id,)


# SQLite uses the index `entries_open` only for a query that repeats its condition word for word
# (so `parked` is excluded separately). With it, only open rows are read, and none of their texts.
# `min(e.status)` stands for all of an owner's statuses: `is_abandoned` needs an active one.
OTHER_KERNELS_QUERY = """SELECT e.owner, min(e.status) AS status, count(*) AS requests,
    sum(e.status = 'waiting') AS waiting,
    min(CASE e.status WHEN 'waiting' THEN e.resume_at END) AS resume_at, o.*
FROM entries AS e JOIN owners AS o ON o.id = e.owner
WHERE e.status IN ('pending', 'running', 'waiting', 'parked')
    AND e.status <> 'parked' AND e.owner <> ?
GROUP BY e.owner"""


class JournalReads:
    """The reads of a `Journal`: they block; if the database fails, they return `on_failure()`."""

    _worker: SqliteWorker

    @blocking_transaction(on_failure=list)
    def recent_entries(self, connection: Connection, limit: int = 20) -> list[Entry]:
        """Return entries, newest first; one row represents a map."""
        query = "SELECT * FROM book WHERE listed = 1 ORDER BY seq DESC LIMIT ?"
        return entries_of(connection, connection.execute(query, (limit,)))

    @blocking_transaction(on_failure=int)
    def count_entries(self, connection: Connection) -> int:
        """Return how many entries there are."""
        return int(connection.execute("SELECT count(*) FROM entries").fetchone()[0])

    @blocking_transaction(on_failure=list)
    def resumable_entries(self, connection: Connection, *, notebook: str | None) -> list[Entry]:
        """Return what is parked or abandoned, oldest first, except the rows of maps."""
        # What was interrupted or has failed is resumed by its id only: its user knows it ended.
        rows = connection.execute(
            """SELECT * FROM book WHERE status IN ('pending', 'running', 'waiting', 'parked')
            AND batch IS NULL AND (:notebook IS NULL OR notebook = :notebook) ORDER BY seq""",
            {"notebook": sqlite_text(notebook)},
        )
        entries = [entry for entry in entries_of(connection, rows) if entry.resumable]
        return [_with_turns(connection, entry) for entry in entries]

    @blocking_transaction(on_failure=list)
    def durable_entries(self, connection: Connection, prefix: str | None = None) -> list[Entry]:
        """Return what `Journal.delete` would delete and whose answers the provider may have."""
        where, values = where_clause(connection, prefix)
        rows = connection.execute(f"SELECT * FROM book {where}", values)  # noqa: S608 - constants
        with_id = (row for row in rows if row["response_id"])
        return [entry for entry in entries_of(connection, with_id) if entry.stream_position]

    @blocking_transaction(on_failure=OtherKernels)
    def other_kernels(self, connection: Connection) -> OtherKernels:
        """Return what other kernels of this user are doing, without those that are gone."""
        rows = connection.execute(OTHER_KERNELS_QUERY, (connection.owner.id,)).fetchall()
        alive = [row for row in rows if not is_abandoned(connection, row)]
        instants = [row["resume_at"] for row in alive if row["resume_at"] is not None]
        return OtherKernels(
            kernels=len(alive),
            requests=sum(row["requests"] for row in alive),
            waiting=sum(row["waiting"] for row in alive),
            resume_at=min(instants, default=None),
        )


def entries_of(connection: Connection, rows: Iterable[sqlite3.Row]) -> list[Entry]:
    """Return the entries in `rows` of the view `book`, as far as they can be read."""
    found = []
    for row in rows:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            found.append(_entry(row, abandoned=is_abandoned(connection, row)))
    return found


def _with_turns(connection: Connection, entry: Entry) -> Entry:
    turns = resolve_turns(connection, entry.request.turns)
    return replace(entry, request=replace(entry.request, turns=turns))


def _entry(row: sqlite3.Row, *, abandoned: bool) -> Entry:
    """Return the entry in a row; raise an error that `entries_of` catches if it is damaged."""
    request = decode(Request, row["request"])
    reply = Reply(id=row["id"]) if row["reply"] is None else decode(Reply, row["reply"])
    # SQLite does not check the types of values, so a damaged file may hold any.
    if not (
        request
        and isinstance(request.prompt, str)
        and isinstance(request.origin, models.Origin)
        and isinstance(request.turns, tuple)
        and reply is not None  # one without an answer is false
        and isinstance(reply.usage, Usage)
        and isinstance(row["text"], str)
        and row["status"] in get_args(Status)
    ):
        raise ValueError("a damaged row")
    stream_position = None
    if isinstance(response_id := row["response_id"], str) and response_id:
        sequence = row["sequence"] if isinstance(row["sequence"], int) else None
        stream_position = StreamPosition(response_id, sequence)
    # The columns take precedence: an entry is renamed if another process has drawn its id, and a
    # turn gets its number when it is inserted.
    position = TurnPosition(
        chapter=row["chapter"], number=row["place"], starts_new=bool(row["begins"])
    )
    origin = replace(request.origin, position=position)
    return Entry(
        request=replace(request, id=row["id"], origin=origin),
        reply=replace(
            reply, id=row["id"], text=row["text"], status=row["status"], attempts=row["attempts"]
        ),
        abandoned=abandoned,
        added_at=row["added_at"],
        resume_at=row["resume_at"],
        error=row["error"],
        stream_position=stream_position,
        batch_job=row["part"],
    )
