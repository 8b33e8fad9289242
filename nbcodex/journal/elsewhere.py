"""What other kernels of this user have under way, as one look at the journal tells.

Owns that look: it reads the index of what is open and the heads of those rows, never their texts.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from nbcodex.journal.owner import Owner
from nbcodex.journal.queries import abandoned
from nbcodex.runtime.clock import Clock

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
class Elsewhere:
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


def look(connection: sqlite3.Connection, *, owner: Owner, clock: Clock) -> Elsewhere:
    """Return what kernels other than `owner` have under way; those that are gone do not count."""
    known: dict[int, bool] = {}
    rows = [
        row
        for row in connection.execute(_OPEN, (owner.id,))
        if not abandoned(row, here=owner, clock=clock, known=known)
    ]
    moments = [row["resume_at"] for row in rows if row["resume_at"] is not None]
    return Elsewhere(
        kernels=len(rows),
        requests=sum(row["requests"] for row in rows),
        waiting=sum(row["waiting"] for row in rows),
        resume_at=min(moments, default=None),
    )
