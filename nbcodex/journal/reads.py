"""What is read from a journal, each query as one function on a connection.

Also decides whether an entry is abandoned. A damaged row is left out, never guessed at. Knows
nothing of threads, files or loops.
"""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass, replace
from typing import TypeVar, get_args

from nbcodex.errors import EntryError
from nbcodex.journal.codec import Entry, decode, storable
from nbcodex.journal.conversations import position_of, resolve_turns
from nbcodex.journal.owner import Heartbeat, Owner, is_provably_dead, is_silent
from nbcodex.models import NO_USAGE, Limit, Origin, Reply, Request, Status, Usage, UsageTotals
from nbcodex.runtime.clock import Clock

RecordT = TypeVar("RecordT")
Connection = sqlite3.Connection
ACTIVE_STATUSES = frozenset({"pending", "running", "waiting"})


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherKernels:
    """How many other kernels have how many unfinished requests, and how many of those wait.

    `resume_at` is when the first of the waiting ones continues, in seconds since the epoch.
    """

    kernels: int = 0
    requests: int = 0
    waiting: int = 0
    resume_at: float | None = None


def find_answer(connection: Connection, key: bytes) -> Reply | None:
    """Return the newest answer to an equal request, marked as reused and at no cost."""
    rows = connection.execute(
        """SELECT * FROM book WHERE key = ? AND status = 'done' AND key IS NOT NULL
        ORDER BY seq DESC LIMIT 1""",
        (salted(connection, key),),
    )
    # A damaged answer is not used: the request is sent again.
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        for row in rows:
            reply = _entry(row, is_abandoned=False).reply
            free = replace(reply, usage=NO_USAGE, cost=0.0, attempts=0, waited=0.0, seconds=0.0)
            return replace(free, reused=True, notes=())
    return None


def newest(
    connection: Connection, *, limit: int, notebook: str | None, owner: Owner, clock: Clock
) -> list[Entry]:
    """Return entries, newest first; of a map, one row stands for all."""
    # Two statements, because the planner uses no index for an optional condition.
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


def resumable(
    connection: Connection, *, notebook: str | None, owner: Owner, clock: Clock
) -> list[Entry]:
    """Return what is parked or abandoned, oldest first; not the rows of maps."""
    # What is interrupted, failed or cancelled was ended by its user, and is resumed only by its id.
    rows = connection.execute(
        """SELECT * FROM book WHERE status IN ('pending', 'running', 'waiting', 'parked')
        AND batch IS NULL AND (:notebook IS NULL OR notebook = :notebook) ORDER BY seq""",
        {"notebook": storable(notebook)},
    )
    entries = entries_of(rows.fetchall(), owner=owner, clock=clock)
    return [_with_turns(connection, entry) for entry in entries if entry.resumable]


def find_entry(connection: Connection, prefix: str, *, owner: Owner, clock: Clock) -> Entry:
    """Return the one entry whose id is `prefix`, or begins with it; see `Journal.find_entry`."""
    start = storable(prefix.strip()) or ""
    rows = connection.execute(
        """SELECT * FROM book WHERE id >= ? AND id < ? ORDER BY id LIMIT 8""",
        (start, start + "\U0010ffff"),
    ).fetchall()
    # A whole id is meant as such, even if longer ids begin with it.
    rows = [row for row in rows if row["id"] == start] or rows
    if not rows or not start:
        raise EntryError(f"No entry of the journal begins with {prefix[:40]!r}.")
    if len(rows) > 1:
        raise ambiguous(prefix, [row["id"] for row in rows])
    if not (entries := entries_of(rows, owner=owner, clock=clock)):
        raise EntryError(f"The entry {rows[0]['id']} is damaged and cannot be read.")
    return _with_turns(connection, entries[0])


def ambiguous(prefix: str, ids: list[str]) -> EntryError:
    """Return the error for a prefix that fits several ids."""
    more = ", …" if len(ids) > 7 else ""
    return EntryError(
        f"{prefix[:40]!r} may be {', '.join(ids[:7])}{more}.", advice="Type more of the id."
    )


def count_entries(connection: Connection) -> int:
    """Return how many entries there are."""
    (count,) = connection.execute("SELECT count(*) FROM entries").fetchone()
    return int(count)


def totals(connection: Connection) -> UsageTotals:
    """Return the counters of all time, which include deleted entries."""
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


# The first condition has to repeat that of the index `entries_open` to the letter to use it: only
# the heads of open rows are read, never their texts.
OTHER_KERNELS_QUERY = """SELECT e.owner, min(e.status) AS status, count(*) AS requests,
    sum(e.status = 'waiting') AS waiting,
    min(CASE e.status WHEN 'waiting' THEN e.resume_at END) AS resume_at,
    o.host, o.boot, o.space, o.pid, o.start, o.beat_at, o.beat_now
FROM entries AS e JOIN owners AS o ON o.id = e.owner
WHERE e.status IN ('pending', 'running', 'waiting', 'parked')
    AND e.status <> 'parked' AND e.owner <> ?
GROUP BY e.owner"""


def other_kernels(connection: Connection, *, owner: Owner, clock: Clock) -> OtherKernels:
    """Return what kernels other than `owner` are doing, without those that are gone."""
    known: dict[int, bool] = {}
    rows = [
        row
        for row in connection.execute(OTHER_KERNELS_QUERY, (owner.id,))
        if not is_abandoned(row, here=owner, clock=clock, known=known)
    ]
    instants = [row["resume_at"] for row in rows if row["resume_at"] is not None]
    return OtherKernels(
        kernels=len(rows),
        requests=sum(row["requests"] for row in rows),
        waiting=sum(row["waiting"] for row in rows),
        resume_at=min(instants, default=None),
    )


def is_abandoned(row: sqlite3.Row, *, here: Owner, clock: Clock, known: dict[int, bool]) -> bool:
    """Return whether an entry is unfinished and its owner gone.

    `known` remembers the verdict on each owner: it costs a read of /proc, and a list has many rows.
    """
    if row["status"] not in ACTIVE_STATUSES or row["owner"] == here.id:
        return False
    if row["host"] is None:  # it has declared itself gone
        return True
    if row["owner"] not in known:
        known[row["owner"]] = is_gone(row, here=here, clock=clock)
    return known[row["owner"]]


def is_gone(row: sqlite3.Row, *, here: Owner, clock: Clock) -> bool:
    """Return whether the owner in a row is gone."""
    if row["host"] is None:
        return True
    # Proof first: a kernel that was killed is recognised at once, not after a minute of silence.
    names = ("host", "boot", "space", "pid", "start")
    owner = Owner(id=row["owner"], **{name: row[name] for name in names})
    last = Heartbeat(at=row["beat_at"], boot_time=row["beat_now"])
    return is_provably_dead(owner, here=here) or is_silent(owner, last, here=here, clock=clock)


def salted(connection: Connection, key: bytes) -> bytes:
    """Return `key` as it is stored: of no use outside of this journal."""
    found: bytes = connection.execute("SELECT salted(?, value) FROM salt", (key,)).fetchone()[0]
    return found


def entries_of(rows: list[sqlite3.Row], *, owner: Owner, clock: Clock) -> list[Entry]:
    """Return the entries in `rows` that can be read."""
    known: dict[int, bool] = {}
    found = []
    for row in rows:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            gone = is_abandoned(row, here=owner, clock=clock, known=known)
            found.append(_entry(row, is_abandoned=gone))
    return found


def _with_turns(connection: Connection, entry: Entry) -> Entry:
    request = entry.request
    turns = resolve_turns(connection, request.turns)
    return replace(entry, request=replace(request, turns=turns))


def _entry(row: sqlite3.Row, *, is_abandoned: bool) -> Entry:
    """Return the entry in a row; raise an error that `entries_of` catches if it is damaged."""
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
    # The columns take precedence: a renamed entry has another id, and a turn gets its number when
    # it is inserted.
    origin = replace(request.origin, position=position_of(row))
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


def _record(text: str | None, kind: type[RecordT]) -> RecordT | None:
    if text is None:
        return None
    found = decode(text)
    if not isinstance(found, kind):
        raise TypeError(f"not a {kind.__name__}")
    return found
