"""What the journal does unasked: it beats, forgets what is old, and moves when its file fails.

Owns the owner, the heartbeat, retention and the way between file and memory. Called on the writer
thread only. Must not know threads or queues.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable

from nbcodex.journal import spending, transfer, writes
from nbcodex.journal.owner import BEAT, Owner
from nbcodex.journal.reads import is_gone, totals
from nbcodex.journal.spending import Lent
from nbcodex.runtime.clock import Clock

FEW = 100
"""Entries that one step of retention erases: milliseconds, so that nobody waits for it."""

AGAIN = 1.0
"""Seconds until the write-ahead log is tried again, if somebody else is reading it."""

STALE = 86_400.0
"""Seconds after which an owner that has nothing under way is forgotten."""


class Upkeep:
    """The journal's own part in one process.

    Parameters
    ----------
    clock : Clock
        Heartbeats and ages are told by it.
    retention : float or None
        Seconds for which an entry is kept after its last change; None keeps all.
    """

    def __init__(self, *, clock: Clock, retention: float | None) -> None:
        self._clock = clock
        self._retention = retention
        self._owner: Owner | None = None
        self._busy: dict[str, Callable[[sqlite3.Connection], None] | None] = {}
        self._beat_at = 0.0
        self._expiring = False
        self._checkpoint_at: float | None = None
        self._lent: Lent | None = None
        self._chapter = 0

    @property
    def owner(self) -> Owner:
        """Who we are, from the first use until `leave`."""
        if self._owner is None:
            self._owner = Owner.here()
        return self._owner

    def opened(self, connection: sqlite3.Connection) -> None:
        """Begin with a connection: forget owners of long ago, and look for old entries."""
        connection.execute(
            """DELETE FROM owners WHERE beat_at < ? AND id NOT IN (SELECT owner FROM entries
            WHERE status IN ('pending', 'running', 'waiting', 'parked') AND owner IS NOT NULL)""",
            (self._clock.wall() - STALE,),
        )
        self._expiring = self._retention is not None
        self.undone()

    def undone(self) -> None:
        """What was written last is not there: nobody can rely on the heartbeat."""
        self._beat_at = 0.0

    def busy(
        self,
        connection: sqlite3.Connection,
        id_: str,
        *,
        insert: Callable[[sqlite3.Connection], None] | None = None,
    ) -> None:
        """Count an entry as under way here, which wants a heartbeat from now on.

        With `insert` it can be written anew where the file cannot even be read any more.
        """
        self._busy[id_] = insert
        self.alive(connection)

    def alive(self, connection: sqlite3.Connection) -> None:
        """Give a sign of life, if one is due."""
        if self._clock.now() >= self._beat_at:
            self._beat(connection)

    def bury(self, connection: sqlite3.Connection) -> None:
        """Release what owners had set aside that are gone."""
        rows = connection.execute(
            """SELECT DISTINCT a.owner, o.host, o.boot, o.space, o.pid, o.start, o.beat_at,
            o.beat_now FROM asides AS a LEFT JOIN owners AS o ON o.id = a.owner
            WHERE a.owner <> ?""",
            (self.owner.id,),
        ).fetchall()
        gone = [(r["owner"],) for r in rows if is_gone(r, here=self.owner, clock=self._clock)]
        connection.executemany("DELETE FROM asides WHERE owner = ?", gone)

    def idle(self, id_: str) -> None:
        """Count an entry as no longer under way here."""
        self._busy.pop(id_, None)

    def due(self) -> float | None:
        """Return seconds until `step` is wanted; None if nothing is to be done."""
        if self._expiring:
            return 0.0
        instants = [self._beat_at] if self._busy else []
        instants += [self._checkpoint_at] if self._checkpoint_at is not None else []
        return max(0.0, min(instants) - self._clock.now()) if instants else None

    def step(self, connection: sqlite3.Connection) -> None:
        """Do what is due, a little of it, outside of a transaction."""
        now = self._clock.now()
        if self._busy and now >= self._beat_at:
            self._beat(connection)
        if self._checkpoint_at is not None and now >= self._checkpoint_at:
            self.checkpoint(connection)
        if self._expiring and self._retention is not None:
            before = self._clock.wall() - self._retention
            erased = writes.expire(connection, before=before, limit=FEW)
            self._expiring = erased == FEW
            if erased and not self._expiring:
                self.checkpoint(connection)

    def checkpoint(self, connection: sqlite3.Connection) -> None:
        """Empty the write-ahead log, in which erased text still stands; if need be later."""
        patience = connection.execute("PRAGMA busy_timeout").fetchone()[0]
        connection.execute("PRAGMA busy_timeout = 100")
        try:
            blocked = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        finally:
            connection.execute(f"PRAGMA busy_timeout = {patience:d}")
        self._checkpoint_at = self._clock.now() + AGAIN if blocked else None

    def to_memory(self, file: sqlite3.Connection, memory: sqlite3.Connection) -> None:
        """Take along what is ours and unanswered, and the caps, as far as the file can be read."""
        self._lent, self._chapter = None, 0
        with contextlib.suppress(sqlite3.Error):
            self._lent = spending.lend(file, memory)
        with contextlib.suppress(sqlite3.Error):
            self._chapter = transfer.to_memory(file, memory, owner=self.owner.id)
        for insert in filter(None, self._busy.values()):
            insert(memory)
        if self._busy:
            self._beat(memory)

    def to_file(self, memory: sqlite3.Connection, file: sqlite3.Connection) -> None:
        """Bring everything back that was kept in memory meanwhile."""
        transfer.to_file(memory, file, chapter=self._chapter)
        spending.give_back(memory, file, self._lent, owner=self.owner.id)
        missed = totals(memory)
        writes.count(file, missed, requests=missed.requests)
        self.undone()
        if self._busy:
            self._beat(file)

    def leave(self, connection: sqlite3.Connection) -> None:
        """Say that this owner is gone: what it has under way is abandoned at once."""
        connection.execute("DELETE FROM owners WHERE id = ?", (self.owner.id,))

    def reset(self) -> None:
        """Be nobody: after `leave`, and in a forked child."""
        self._owner = None
        self._busy.clear()
        self._expiring, self._checkpoint_at = False, None
        self._lent, self._chapter = None, 0
        self.undone()

    def _beat(self, connection: sqlite3.Connection) -> None:
        writes.beat(connection, self.owner, clock=self._clock)
        self._beat_at = self._clock.now() + BEAT
