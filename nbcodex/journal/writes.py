"""What is written to a journal, each change as one function on a connection in a transaction.

Only its owner may change an entry, except that any kernel may store the first answer.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import date

from nbcodex.journal import spending
from nbcodex.journal.codec import bounded_integer, decode, encode, finite_or_none, sqlite_text
from nbcodex.journal.conversations import compact_turns
from nbcodex.journal.owner import Connection, is_abandoned
from nbcodex.journal.reads import may_be_claimed
from nbcodex.journal.spending import SpendAmount
from nbcodex.models import Reply, Request, UsageTotals

# Of a map (`batch`), only the row that is inserted first is listed: it represents the others.
_INSERT = """INSERT INTO entries
    (id, status, attempts, owner, notebook, cell, variable, key, added_at, updated_at, request,
    batch, item, listed)
    VALUES (:id, :status, :attempts, :owner, :notebook, :cell, :variable,
    salted(:key, (SELECT value FROM salt)), :at, :at, :request, :batch, :item,
    NOT EXISTS (SELECT 1 FROM entries WHERE batch = :batch))
    ON CONFLICT (id) DO NOTHING"""


def insert(
    connection: Connection, request: Request, *, key: bytes | None, attempt: int | None = None
) -> None:
    """Insert a request as `pending`, or as `running` if an attempt is about to be sent."""
    id_, origin, owner = sqlite_text(request.id), request.origin, connection.owner.id
    values = {
        "id": id_,
        "status": "pending" if attempt is None else "running",
        "attempts": bounded_integer(attempt),
        "owner": owner,
        "notebook": sqlite_text(origin.notebook),
        "cell": sqlite_text(origin.cell),
        "variable": sqlite_text(origin.variable),
        "key": key,
        "at": connection.clock.wall(),
        "request": encode(replace(request, turns=compact_turns(connection, request.turns))),
        "batch": sqlite_text(origin.map_id),
        "item": origin.row_index,
    }
    if not connection.execute(_INSERT, values).rowcount:
        row = connection.execute("SELECT owner FROM entries WHERE id = ?", (id_,)).fetchone()
        if row["owner"] == owner:  # inserted already: nothing changes
            return
        # Ids are random: if two processes have drawn the same one, the older entry is renamed.
        connection.execute("UPDATE entries SET id = id || '-' || seq WHERE id = ?", (id_,))
        connection.execute(_INSERT, values)
    if request.thread is not None:
        # In its conversation it comes after all others, unless the request names a position: `seq`
        # is larger than all others, so it orders turns without a counter.
        position = origin.position
        columns = position.chapter, position.number, position.starts_new
        connection.execute(
            """UPDATE entries SET thread = ?, chapter = ?, place = coalesce(?, seq), begins = ?
            WHERE id = ?""",
            (sqlite_text(request.thread), *columns, id_),
        )
    connection.execute("UPDATE totals SET requests = requests + 1")


def finish(
    connection: Connection,
    reply: Reply,
    error: str | None,
    *,
    resume_at: float | None = None,
    if_unknown: SpendAmount | None = None,
) -> None:
    """Store how a request ended and why (`error`); count its usage as `commit_spending` does."""
    # An answer is paid for, so it is stored even if another kernel has claimed the entry meanwhile,
    # unless that kernel has answered it. Only the new owner may store any other ending.
    # A resumed request that ends without text leaves the text that an earlier kernel has stored.
    connection.execute(
        """UPDATE entries SET status = :status, reply = :reply, error = :error,
        text = CASE WHEN :text = '' AND :status <> 'done' THEN text ELSE :text END,
        attempts = :attempts, resume_at = :resume_at, updated_at = :at
        WHERE id = :id AND (owner = :owner OR (:status = 'done' AND status <> 'done'))""",
        {
            "id": sqlite_text(reply.id),
            "owner": connection.owner.id,
            "at": connection.clock.wall(),
            "status": reply.status,
            "reply": encode(replace(reply, text="", parsed=None)),
            "text": sqlite_text(reply.text),
            "error": sqlite_text(error),
            "attempts": bounded_integer(reply.attempts),
            "resume_at": finite_or_none(resume_at),
        },
    )
    if reply.attempts and not (reply.simulated or reply.reused):
        # Counted once per ending, even if another kernel owns the entry by now: tokens were used.
        # The request itself was counted when it was inserted.
        spending.add_to_totals(connection, replace(UsageTotals.of(reply), requests=0))
    commit_spending(connection, reply, if_unknown)


def commit_spending(connection: Connection, reply: Reply, if_unknown: SpendAmount | None) -> None:
    """Release what a request reserved; count its usage (if unknown, `if_unknown` or that)."""
    reserved = spending.release(connection, sqlite_text(reply.id))
    if reply.attempts and not (reply.simulated or reply.reused):
        assumed = reserved if if_unknown is None else if_unknown
        amount = SpendAmount.of_reply(reply, if_unknown=assumed)
        today = date.fromtimestamp(connection.clock.wall()).isoformat()
        spending.spend(connection, amount, day=today)


def claim(
    connection: Connection, id_: str, *, status: str = "running", server: str | None = None
) -> bool:
    """Take over a resumable entry, and set its `Origin.server`; only one kernel succeeds."""
    row = connection.execute("SELECT * FROM book WHERE id = ?", (sqlite_text(id_),)).fetchone()
    if row is None or not (
        may_be_claimed(row["status"], map_id=row["batch"]) or is_abandoned(connection, row)
    ):
        return False
    request = row["request"]
    if server is not None and (stored := decode(Request, request)):
        request = encode(stored.with_server(server))
    # The transaction holds the write lock since before the row was read, so no other kernel has
    # claimed the entry meanwhile.
    connection.execute(
        """UPDATE entries SET status = ?, owner = ?, resume_at = NULL, error = NULL,
        updated_at = ?, request = ? WHERE id = ?""",
        (status, connection.owner.id, connection.clock.wall(), request, row["id"]),
    )
    return True
