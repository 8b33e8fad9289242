"""What is written to a journal, each as one function on a connection within a transaction.

Owns every change of an entry, and who may make it: its owner, and whoever brings an answer where
there is none yet. Must not know threads, files or loops.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import replace
from datetime import date

from nbcodex.journal import spending
from nbcodex.journal.codec import counted, encode, finite, may_be_claimed, storable, whole
from nbcodex.journal.conversations import join, without_words
from nbcodex.journal.owner import Owner
from nbcodex.journal.reads import abandoned
from nbcodex.journal.spending import SpendAmount
from nbcodex.models import Limit, Reply, Request, UsageTotals
from nbcodex.runtime.clock import Clock

Connection = sqlite3.Connection


_INSERT = """INSERT INTO entries
    (id, status, attempts, owner, notebook, cell, variable, key, added_at, updated_at, request,
    batch, item, listed)
    VALUES (:id, :status, :attempts, :owner, :notebook, :cell, :variable,
    salted(:key, (SELECT value FROM salt)), :at, :at, :request, :batch, :item,
    NOT EXISTS (SELECT 1 FROM entries WHERE batch = :batch))
    ON CONFLICT (id) DO NOTHING"""


def beat(connection: Connection, owner: Owner, *, clock: Clock) -> None:
    """Write that `owner` lives."""
    connection.execute(
        """INSERT INTO owners VALUES (?, ?, ?, ?, ?, ?, ?, ?)
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
    notebook: str | None,
    cell: str | None,
    variable: str | None,
    key: bytes | None,
    attempt: int | None = None,
) -> None:
    """Add a request as `pending`, or as `running` where an attempt is about to be sent.

    The same one again changes nothing.
    """
    id_, origin = storable(request.id), request.origin
    values = {
        "id": id_,
        "status": "pending" if attempt is None else "running",
        "attempts": whole(attempt or 0),
        "owner": owner.id,
        "notebook": storable(notebook),
        "cell": storable(cell),
        "variable": storable(variable),
        "key": key,
        "at": at,
        "request": encode(without_words(connection, request)),
        "batch": storable(origin.map_id),
        "item": origin.row_index,
    }
    if not connection.execute(_INSERT, values).rowcount:
        row = connection.execute("SELECT owner FROM entries WHERE id = ?", (id_,)).fetchone()
        if row["owner"] == owner.id:
            return
        # Ids are random: should two processes draw the same, the older entry steps aside.
        connection.execute("UPDATE entries SET id = id || '-' || seq WHERE id = ?", (id_,))
        connection.execute(_INSERT, values)
    if request.thread is not None:
        join(connection, request)
    connection.execute("UPDATE totals SET requests = requests + 1")


def enter(connection: Connection, request: Request, *, owner: Owner, at: float, key: bytes) -> None:
    """Add a row of a map as `pending`; the same one again changes nothing."""
    where = request.origin
    insert(
        connection,
        request,
        owner=owner,
        at=at,
        notebook=where.notebook,
        cell=where.cell,
        variable=where.variable,
        key=key,
    )


def shelve(
    connection: Connection,
    requests: Iterable[tuple[Request, bytes]],
    *,
    owner: Owner,
    at: float,
) -> None:
    """Add requests as `parked` that were never begun, each with its key."""
    for request, key in requests:
        enter(connection, request, owner=owner, at=at, key=key)
        connection.execute(
            "UPDATE entries SET status = 'parked' WHERE id = ? AND status = 'pending'",
            (storable(request.id),),
        )


def begin(
    connection: Connection,
    id_: str,
    *,
    owner: Owner,
    at: float,
    attempt: int,
    picks_up: bool = False,
) -> None:
    """Note that an attempt is about to be sent; unless it picks an answer up, it asks for one."""
    connection.execute(
        """UPDATE entries SET status = 'running', attempts = :attempt, resume_at = NULL,
        limits = NULL, updated_at = :at,
        response_id = CASE WHEN :picks_up THEN response_id END,
        sequence = CASE WHEN :picks_up THEN sequence END
        WHERE id = :id AND owner = :owner""",
        {
            "attempt": whole(attempt),
            "at": at,
            "picks_up": picks_up,
            "id": storable(id_),
            "owner": owner.id,
        },
    )


def wait(
    connection: Connection,
    id_: str,
    *,
    owner: Owner,
    at: float,
    resume_at: float | None,
    limit: Limit | None,
    notes: tuple[str, ...] = (),
) -> None:
    """Note that the request waits for `resume_at`, and what for."""
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


def keep(
    connection: Connection,
    id_: str,
    *,
    owner: Owner,
    at: float,
    text: str,
    sequence: int | None,
) -> None:
    """Replace the text so far, and the event that it reaches to."""
    connection.execute(
        """UPDATE entries SET text = ?, sequence = coalesce(?, sequence), updated_at = ?
        WHERE id = ? AND owner = ?""",
        (storable(text), _position(sequence), at, storable(id_), owner.id),
    )


def remember(
    connection: Connection,
    id_: str,
    *,
    owner: Owner,
    at: float,
    response_id: str,
    sequence: int | None,
) -> None:
    """Note the durable response that carries the answer."""
    connection.execute(
        """UPDATE entries SET response_id = ?, sequence = coalesce(?, sequence), updated_at = ?
        WHERE id = ? AND owner = ?""",
        (storable(response_id), _position(sequence), at, storable(id_), owner.id),
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
    otherwise: SpendAmount | None = None,
) -> None:
    """Write what came of the request, and count what it used: `otherwise`, where nobody knows.

    An answer is kept even if another kernel has claimed the entry meanwhile, unless that one was
    faster; anything less is then the new owner's to say. Whoever resumes a request and ends without
    a word, leaves the text that an earlier kernel kept.
    """
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
    aside = spending.release(connection, storable(id_)) or SpendAmount()
    if reply.attempts and not (reply.simulated or reply.reused):
        count(connection, counted(reply))
        spent = SpendAmount.of_reply(reply, assumed=aside if otherwise is None else otherwise)
        spending.spend(connection, spent, day=date.fromtimestamp(at).isoformat())


def keep_what_the_end_stopped(
    connection: Connection, *, owner: Owner, at: float, within: float
) -> None:
    """Park what was interrupted in the last `within` seconds of its process.

    A restart interrupts the kernel before it ends it: nobody pressed Stop.
    """
    connection.execute(
        """UPDATE entries SET status = 'parked', updated_at = ?
        WHERE owner = ? AND status = 'interrupted' AND updated_at >= ?""",
        (at, owner.id, at - within),
    )


def claim(connection: Connection, id_: str, *, owner: Owner, at: float, clock: Clock) -> bool:
    """Take over an entry that is resumable; of several who would, one succeeds."""
    row = connection.execute("SELECT * FROM book WHERE id = ?", (storable(id_),)).fetchone()
    if row is None or not (
        may_be_claimed(row["status"], of_map=row["batch"] is not None)
        or abandoned(row, here=owner, clock=clock, known={})
    ):
        return False
    # The one statement that decides: it finds the entry as it was judged, or nothing.
    taken = connection.execute(
        """UPDATE entries SET status = 'running', owner = ?, resume_at = NULL, error = NULL,
        updated_at = ? WHERE id = ? AND status = ? AND owner IS ?""",
        (owner.id, at, row["id"], row["status"], row["owner"]),
    )
    return taken.rowcount == 1


def erase(
    connection: Connection,
    *,
    id_: str | None = None,
    batch: str | None = None,
    before: float | None = None,
) -> int:
    """Erase one entry, the rows of a map, what was added before an instant, or all.

    Returns how many were erased.
    """
    if batch is not None:
        return connection.execute("DELETE FROM entries WHERE batch = ?", (batch,)).rowcount
    if id_ is not None:
        return connection.execute("DELETE FROM entries WHERE id = ?", (storable(id_),)).rowcount
    if before is not None:
        return connection.execute("DELETE FROM entries WHERE added_at < ?", (before,)).rowcount
    connection.execute("DELETE FROM chapters")
    return connection.execute("DELETE FROM entries").rowcount


def expire(connection: Connection, *, before: float, limit: int) -> int:
    """Erase a few of the entries that nothing has touched since `before`; return how many."""
    connection.execute("DELETE FROM chapters WHERE begun_at < ?", (before,))
    return connection.execute(
        """DELETE FROM entries WHERE seq IN (SELECT seq FROM entries
        WHERE added_at < :before AND updated_at < :before ORDER BY added_at LIMIT :limit)""",
        {"before": before, "limit": limit},
    ).rowcount


def count(connection: Connection, more: UsageTotals, *, requests: int = 0) -> None:
    """Add to the counters."""
    usage = more.usage
    connection.execute(
        """UPDATE totals SET requests = requests + ?, answers = answers + ?,
        input_tokens = input_tokens + ?, cached_tokens = cached_tokens + ?,
        output_tokens = output_tokens + ?, reasoning_tokens = reasoning_tokens + ?,
        cost = cost + ?, waited = waited + ?, unknown = unknown + ?, unpriced = unpriced + ?,
        estimated = estimated + ?""",
        (
            requests,
            more.answers,
            usage.input_tokens,
            usage.cached_tokens,
            usage.output_tokens,
            usage.reasoning_tokens,
            more.cost,
            more.waited,
            more.unknown,
            more.unpriced,
            more.estimated,
        ),
    )


def _position(sequence: int | None) -> int | None:
    return None if sequence is None else whole(sequence)
