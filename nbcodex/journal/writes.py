"""What is written to a journal, each change as one function on a connection in a transaction.

Owns who may change an entry: its owner, and any kernel that brings an answer while there is none.
Knows nothing of threads, files or loops.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import replace
from datetime import date

from nbcodex.journal import spending
from nbcodex.journal.codec import bounded_totals, encode, finite, may_be_claimed, storable, whole
from nbcodex.journal.conversations import name_turns, set_position
from nbcodex.journal.owner import Owner
from nbcodex.journal.reads import is_abandoned
from nbcodex.journal.spending import SpendAmount
from nbcodex.models import Limit, Reply, Request, UsageTotals
from nbcodex.runtime.clock import Clock

Connection = sqlite3.Connection

# Of a map, the row that is inserted first is listed, and stands for all of them.
_INSERT = """INSERT INTO entries
    (id, status, attempts, owner, notebook, cell, variable, key, added_at, updated_at, request,
    batch, item, listed)
    VALUES (:id, :status, :attempts, :owner, :notebook, :cell, :variable,
    salted(:key, (SELECT value FROM salt)), :at, :at, :request, :batch, :item,
    NOT EXISTS (SELECT 1 FROM entries WHERE batch = :batch))
    ON CONFLICT (id) DO NOTHING"""


def heartbeat(connection: Connection, owner: Owner, *, clock: Clock) -> None:
    """Write a sign of life of `owner`."""
    connection.execute(
        """INSERT INTO owners (id, host, boot, space, pid, start, beat_at, beat_now)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (id) DO UPDATE SET beat_at = excluded.beat_at, beat_now = excluded.beat_now""",
        (
            owner.id,
            storable(owner.host),
            owner.boot,
            owner.space,
            owner.pid,
            owner.start,
            clock.wall(),
            clock.now(),
        ),
    )


def insert(
    connection: Connection,
    request: Request,
    *,
    owner: Owner,
    at: float,
    key: bytes | None,
    attempt: int | None = None,
) -> None:
    """Insert a request as `pending`, or as `running` if an attempt is about to be sent.

    Inserting it again changes nothing.
    """
    id_, origin = storable(request.id), request.origin
    stored = request
    if request.turns:
        stored = replace(request, turns=name_turns(connection, request.turns))
    values = {
        "id": id_,
        "status": "pending" if attempt is None else "running",
        "attempts": whole(attempt or 0),
        "owner": owner.id,
        "notebook": storable(origin.notebook),
        "cell": storable(origin.cell),
        "variable": storable(origin.variable),
        "key": key,
        "at": at,
        "request": encode(stored),
        "batch": storable(origin.map_id),
        "item": origin.row_index,
    }
    if not connection.execute(_INSERT, values).rowcount:
        row = connection.execute("SELECT owner FROM entries WHERE id = ?", (id_,)).fetchone()
        if row["owner"] == owner.id:
            return
        # Ids are random: if two processes draw the same one, the older entry is renamed.
        connection.execute("UPDATE entries SET id = id || '-' || seq WHERE id = ?", (id_,))
        connection.execute(_INSERT, values)
    if request.thread is not None:
        set_position(connection, request)
    connection.execute("UPDATE totals SET requests = requests + 1")


def insert_parked(
    connection: Connection, requests: Iterable[tuple[Request, bytes]], *, owner: Owner, at: float
) -> None:
    """Insert rows of a map as `parked` that were never started, each with its key."""
    for request, key in requests:
        insert(connection, request, owner=owner, at=at, key=key)
        connection.execute(
            "UPDATE entries SET status = 'parked' WHERE id = ? AND status = 'pending'",
            (storable(request.id),),
        )


def start_attempt(
    connection: Connection,
    id_: str,
    *,
    owner: Owner,
    at: float,
    attempt: int,
    continues: bool = False,
) -> None:
    """Note that an attempt is about to be sent."""
    # Unless it continues a durable response, it asks for a new one, whose id is not known yet: the
    # old id would make a resumed request fetch an answer that was given up.
    connection.execute(
        """UPDATE entries SET status = 'running', attempts = :attempt, resume_at = NULL,
        limits = NULL, updated_at = :at,
        response_id = CASE WHEN :continues THEN response_id END,
        sequence = CASE WHEN :continues THEN sequence END
        WHERE id = :id AND owner = :owner""",
        {
            "attempt": whole(attempt),
            "at": at,
            "continues": continues,
            "id": storable(id_),
            "owner": owner.id,
        },
    )


def record_wait(
    connection: Connection,
    id_: str,
    *,
    owner: Owner,
    at: float,
    resume_at: float | None,
    limit: Limit | None,
    notes: tuple[str, ...] = (),
) -> None:
    """Note that the request waits until `resume_at`, and for which limit."""
    # The reply holds notes only until the request ends: they outlive a crash during the wait.
    connection.execute(
        """UPDATE entries SET status = 'waiting', resume_at = ?, limits = ?, updated_at = ?,
        reply = coalesce(?, reply) WHERE id = ? AND owner = ?""",
        (
            finite(resume_at),
            encode(limit) if limit else None,
            at,
            encode(Reply(id=id_, notes=notes)) if notes else None,
            storable(id_),
            owner.id,
        ),
    )


def update_text(
    connection: Connection, id_: str, *, owner: Owner, at: float, text: str, sequence: int | None
) -> None:
    """Replace the text so far, and the last event of a durable response that is in it."""
    position = None if sequence is None else whole(sequence)
    connection.execute(
        """UPDATE entries SET text = ?, sequence = coalesce(?, sequence), updated_at = ?
        WHERE id = ? AND owner = ?""",
        (storable(text), position, at, storable(id_), owner.id),
    )


def set_response_id(
    connection: Connection, id_: str, *, owner: Owner, at: float, response_id: str
) -> None:
    """Store the id of the durable response that contains the answer."""
    connection.execute(
        """UPDATE entries SET response_id = ?, updated_at = ? WHERE id = ? AND owner = ?""",
        (storable(response_id), at, storable(id_), owner.id),
    )


def finish(
    connection: Connection,
    id_: str,
    *,
    owner: Owner,
    at: float,
    reply: Reply,
    error: str | None,
    resume_at: float | None,
    assumed: SpendAmount | None = None,
) -> None:
    """Write the ending of a request, and count what it used: `assumed`, if the reply lacks that."""
    # An answer is paid for, so it is stored even if another kernel has claimed the entry meanwhile,
    # unless that kernel has answered it. Any other ending is then for the new owner to write.
    # A resumed request that ends without text leaves the text that an earlier kernel has stored.
    connection.execute(
        """UPDATE entries SET status = :status, reply = :reply, error = :error,
        text = CASE WHEN :text = '' AND :status <> 'done' THEN text ELSE :text END,
        attempts = :attempts, resume_at = :resume_at, limits = NULL, updated_at = :at
        WHERE id = :id AND (owner = :owner OR (:status = 'done' AND status <> 'done'))""",
        {
            "id": storable(id_),
            "owner": owner.id,
            "at": at,
            "status": reply.status,
            "reply": encode(replace(reply, text="", parsed=None)),
            "text": storable(reply.text),
            "error": storable(error),
            "attempts": whole(reply.attempts),
            "resume_at": finite(resume_at),
        },
    )
    if reply.attempts and not (reply.simulated or reply.reused):
        # Counted once per ending, even if the entry belongs to another kernel by now: it was used.
        count(connection, bounded_totals(reply))
    settle_spending(connection, id_, at=at, reply=reply, assumed=assumed)


def settle_spending(
    connection: Connection, id_: str, *, at: float, reply: Reply, assumed: SpendAmount | None = None
) -> None:
    """Release what is reserved for a request, and count what it used: perhaps only `assumed`."""
    reserved = spending.release(connection, storable(id_)) or SpendAmount()
    if reply.attempts and not (reply.simulated or reply.reused):
        amount = SpendAmount.of_reply(reply, assumed=reserved if assumed is None else assumed)
        spending.spend(connection, amount, day=date.fromtimestamp(at).isoformat())


def park_interrupted(connection: Connection, *, owner: Owner, at: float, within: float) -> None:
    """Park what was interrupted in the last `within` seconds of its process."""
    # A front end interrupts a kernel before it restarts it, without the user having pressed Stop.
    connection.execute(
        """UPDATE entries SET status = 'parked', updated_at = ?
        WHERE owner = ? AND status = 'interrupted' AND updated_at >= ?""",
        (at, owner.id, at - within),
    )


def claim(connection: Connection, id_: str, *, owner: Owner, at: float, clock: Clock) -> bool:
    """Take over an entry that is resumable; of several kernels that try, one succeeds."""
    row = connection.execute("SELECT * FROM book WHERE id = ?", (storable(id_),)).fetchone()
    if row is None or not (
        may_be_claimed(row["status"], of_map=row["batch"] is not None)
        or is_abandoned(row, here=owner, clock=clock, known={})
    ):
        return False
    # This statement decides the race: it changes the entry only as it was read above.
    taken = connection.execute(
        """UPDATE entries SET status = 'running', owner = ?, resume_at = NULL, error = NULL,
        updated_at = ? WHERE id = ? AND status = ? AND owner IS ?""",
        (owner.id, at, row["id"], row["status"], row["owner"]),
    )
    return taken.rowcount == 1


def delete(
    connection: Connection,
    *,
    id_: str | None = None,
    batch: str | None = None,
    before: float | None = None,
) -> int:
    """Delete one entry, the rows of a map, what was added before an instant, or all; count them."""
    if batch is not None:
        return connection.execute("DELETE FROM entries WHERE batch = ?", (batch,)).rowcount
    if id_ is not None:
        return connection.execute("DELETE FROM entries WHERE id = ?", (storable(id_),)).rowcount
    if before is not None:
        return connection.execute("DELETE FROM entries WHERE added_at < ?", (before,)).rowcount
    # Chapters hold the names of notebooks and threads.
    connection.execute("DELETE FROM chapters")
    return connection.execute("DELETE FROM entries").rowcount


def expire(connection: Connection, *, before: float, limit: int) -> int:
    """Delete some of the entries that were last changed before `before`; return how many."""
    # `added_at` is indexed, and no entry is changed before it is added.
    connection.execute("DELETE FROM chapters WHERE begun_at < ?", (before,))
    return connection.execute(
        """DELETE FROM entries WHERE seq IN (SELECT seq FROM entries
        WHERE added_at < :before AND updated_at < :before ORDER BY added_at LIMIT :limit)""",
        {"before": before, "limit": limit},
    ).rowcount


def count(connection: Connection, more: UsageTotals, *, requests: int = 0) -> None:
    """Add to the totals of all time."""
    usage = more.usage
    added = {
        "requests": requests,
        "answers": more.answers,
        "input_tokens": usage.input_tokens,
        "cached_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "cost": more.cost,
        "waited": more.waited,
        "unknown": more.unknown,
        "unpriced": more.unpriced,
        "estimated": more.estimated,
    }
    sums = ", ".join(f"{name} = {name} + :{name}" for name in added)
    connection.execute(f"UPDATE totals SET {sums}", added)  # noqa: S608 - our columns
