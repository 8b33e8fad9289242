"""What the journal does unasked: heartbeats, retention, and copying when its file fails.

Owns who this journal is to others, and what goes along between a file and the memory that stands
in for it. All of it runs on the worker thread. Knows nothing of queues and transactions.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from nbcodex.journal import spending, writes
from nbcodex.journal.codec import decode, encode
from nbcodex.journal.conversations import name_turns, resolve_turns
from nbcodex.journal.owner import HEARTBEAT_INTERVAL_S, Owner
from nbcodex.journal.reads import is_gone, totals
from nbcodex.journal.spending import SpendAmount
from nbcodex.models import Request
from nbcodex.runtime.clock import Clock

Connection = sqlite3.Connection

# Erasing this many takes milliseconds, so that no caller waits long behind a step of retention.
EXPIRED_PER_STEP = 100

CHECKPOINT_RETRY_S = 1.0

# An owner without open entries is forgotten after a day.
OWNER_RETENTION_S = 86_400.0

# A row that returns to the file replaces what the file has of it, unless another owner has claimed
# it meanwhile; an answer counts all the same while there is none.
_UPDATE = """UPDATE entries SET status = :status, updated_at = :updated_at, attempts = :attempts,
    resume_at = :resume_at, limits = :limits, error = :error, response_id = :response_id,
    sequence = :sequence, reply = :reply, text = :text, part = :part
    WHERE id = :id AND (owner = :owner OR (:status = 'done' AND status <> 'done'))"""


@dataclass(frozen=True, slots=True)
class Baseline:
    """The budget and the spending by day that memory started with."""

    budget: str = ""
    days: dict[str, SpendAmount] = field(default_factory=dict)


class Maintenance:
    """The upkeep of a journal by one process; a `retention` of None keeps all entries."""

    def __init__(self, *, clock: Clock, retention: float | None) -> None:
        self._clock, self._retention = clock, retention
        self.reset()

    def reset(self) -> None:
        """Start as a new owner: after `disconnected`, and in a forked child."""
        self._owner: Owner | None = None
        self._active: dict[str, Callable[[Connection], None] | None] = {}
        self._heartbeat_at = 0.0
        self._is_expiring = False
        self._checkpoint_at: float | None = None
        self._baseline = Baseline()

    @property
    def owner(self) -> Owner:
        """Who this journal is, from the first use on."""
        if self._owner is None:
            self._owner = Owner.here()
        return self._owner

    def connected(self, connection: Connection) -> None:
        """Forget old owners, and start looking for expired entries."""
        connection.execute(
            """DELETE FROM owners WHERE beat_at < ? AND id NOT IN (SELECT owner FROM entries
            WHERE status IN ('pending', 'running', 'waiting', 'parked') AND owner IS NOT NULL)""",
            (self._clock.wall() - OWNER_RETENTION_S,),
        )
        self._is_expiring = self._retention is not None
        self.rolled_back()

    def disconnecting(self, connection: Connection) -> None:
        """Declare this owner gone, so that its open entries are abandoned at once."""
        connection.execute("DELETE FROM owners WHERE id = ?", (self.owner.id,))

    def rolled_back(self) -> None:
        """Write the heartbeat again: the last transaction may have contained it."""
        self._heartbeat_at = 0.0

    def activate(
        self,
        connection: Connection,
        id_: str,
        *,
        insert: Callable[[Connection], None] | None = None,
    ) -> None:
        """Send heartbeats for an entry or a batch job until `deactivate`.

        With `insert` the entry can be written again where the file cannot even be read.
        """
        self._active[id_] = insert
        self.ensure_heartbeat(connection)

    def deactivate(self, id_: str) -> None:
        """Send no heartbeats for it any more."""
        self._active.pop(id_, None)

    def ensure_heartbeat(self, connection: Connection) -> None:
        """Write a heartbeat if one is due."""
        if self._clock.now() >= self._heartbeat_at:
            writes.heartbeat(connection, self.owner, clock=self._clock)
            self._heartbeat_at = self._clock.now() + HEARTBEAT_INTERVAL_S

    def release_reservations_of_the_dead(self, connection: Connection) -> None:
        """Release the budget that kernels had reserved which are gone."""
        rows = connection.execute(
            """SELECT DISTINCT a.owner, o.host, o.boot, o.space, o.pid, o.start, o.beat_at,
            o.beat_now FROM asides AS a LEFT JOIN owners AS o ON o.id = a.owner
            WHERE a.owner <> ?""",
            (self.owner.id,),
        ).fetchall()
        gone = [(r["owner"],) for r in rows if is_gone(r, here=self.owner, clock=self._clock)]
        connection.executemany("DELETE FROM asides WHERE owner = ?", gone)

    def due_in(self) -> float | None:
        """Return seconds until the next `step`; None if nothing is scheduled."""
        if self._is_expiring:
            return 0.0
        instants = [self._heartbeat_at] if self._active else []
        instants += [self._checkpoint_at] if self._checkpoint_at is not None else []
        return max(0.0, min(instants) - self._clock.now()) if instants else None

    def step(self, connection: Connection) -> None:
        """Do what is due, a little of it, outside of a transaction."""
        if self._active:
            self.ensure_heartbeat(connection)
        if self._checkpoint_at is not None and self._clock.now() >= self._checkpoint_at:
            self.checkpoint(connection)
        if self._is_expiring and self._retention is not None:
            before = self._clock.wall() - self._retention
            erased = writes.expire(connection, before=before, limit=EXPIRED_PER_STEP)
            self._is_expiring = erased == EXPIRED_PER_STEP
            if erased and not self._is_expiring:
                self.checkpoint(connection)

    def checkpoint(self, connection: Connection) -> None:
        """Truncate the write-ahead log, which still holds erased text."""
        patience = connection.execute("PRAGMA busy_timeout").fetchone()[0]
        connection.execute("PRAGMA busy_timeout = 100")
        try:
            blocked = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        finally:
            connection.execute(f"PRAGMA busy_timeout = {patience:d}")
        # A reader in another process blocks it: tried again until it succeeds.
        self._checkpoint_at = self._clock.now() + CHECKPOINT_RETRY_S if blocked else None

    # Without the following, an outage of the file in a long run would cost its user answers that
    # are paid for (their entries would be resumed, and paid again), parked prompts, and the
    # budget of the day.

    def copy_to_memory(self, file: Connection, memory: Connection) -> None:
        """Copy what is ours and unanswered, and the budget, as far as the file can be read."""
        self._baseline = Baseline()
        with contextlib.suppress(sqlite3.Error):
            self._baseline = Baseline(spending.budget(file), spending.by_day(file))
            spending.set_budget(memory, self._baseline.budget)
            for table in ("spending", "asides", "owners"):
                _copy_rows(file, memory, table)
        with contextlib.suppress(sqlite3.Error):
            memory.execute(
                "UPDATE salt SET value = ?", file.execute("SELECT * FROM salt").fetchone()
            )
            _copy_rows(file, memory, "chapters")
            _copy_rows(file, memory, "parts")
            _copy_entries(file, memory, "owner = ? AND status <> 'done'", self.owner.id)
        for insert in filter(None, self._active.values()):
            insert(memory)
        if self._active:
            self.rolled_back()
            self.ensure_heartbeat(memory)

    def copy_to_file(self, memory: Connection, file: Connection) -> None:
        """Copy back what was written in memory; what another owner claimed meanwhile stays."""
        _copy_rows(memory, file, "chapters")
        _copy_rows(memory, file, "parts")
        _copy_entries(memory, file, "1")
        if (budget := spending.budget(memory)) != self._baseline.budget:
            spending.set_budget(file, budget)
        for day, amount in spending.by_day(memory).items():
            spent = amount.minus(self._baseline.days.get(day, SpendAmount()))
            spending.spend(file, spent, day=day)
        file.execute("DELETE FROM asides WHERE owner = ?", (self.owner.id,))
        _copy_rows(memory, file, "asides", f"owner = {self.owner.id:d}")
        missed = totals(memory)
        writes.count(file, missed, requests=missed.requests)
        self.rolled_back()
        if self._active:
            self.ensure_heartbeat(file)


def _copy_rows(source: Connection, target: Connection, table: str, where: str = "1") -> None:
    """Copy the rows that the target lacks; of those that it has, only names that it lacks."""
    rows = [dict(r) for r in source.execute(f"SELECT * FROM {table} WHERE {where}")]  # noqa: S608
    for row in rows:
        names, places = ", ".join(row), ", ".join(f":{name}" for name in row)
        target.execute(f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({places})", row)  # noqa: S608
    if table == "parts":
        target.executemany(
            """UPDATE parts SET file = coalesce(:file, file), remote = coalesce(:remote, remote)
            WHERE tag = :tag""",
            rows,
        )


def _copy_entries(source: Connection, target: Connection, where: str, *parameters: Any) -> None:
    query = f"SELECT * FROM entries WHERE {where} ORDER BY seq"  # noqa: S608 - from this module
    for row in source.execute(query, parameters):
        values = dict(row)
        if target.execute(_UPDATE, values).rowcount:
            continue
        values["request"] = _request_for(row, source, target)
        columns = [name for name in values if name != "seq"]
        # A row keeps its number, by which turns refer to it. In a new file, where the old one was
        # deleted, another entry may have it.
        target.execute(
            f"""INSERT INTO entries (seq, {", ".join(columns)})
            SELECT CASE WHEN NOT EXISTS (SELECT 1 FROM entries WHERE seq = :seq) THEN :seq END,
            {", ".join(f":{name}" for name in columns)}
            WHERE NOT EXISTS (SELECT 1 FROM entries WHERE id = :id)""",  # noqa: S608 - our columns
            values,
        )


def _request_for(row: sqlite3.Row, source: Connection, target: Connection) -> str:
    """Return an entry's request as the target can hold it: with the turns that it lacks in full."""
    text: str = row["request"]
    if row["batch"] is not None:  # rows of a map have no turns
        return text
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        request = decode(text)
        if isinstance(request, Request) and request.turns:
            turns = resolve_turns(source, request.turns)
            return encode(replace(request, turns=name_turns(target, turns)))
    return text
