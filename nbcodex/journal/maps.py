"""Map runs in the journal: their rows, how far each run is, and which rows have an answer already.

Owns reads and writes of many rows at once. Knows nothing of templates or of how rows are answered.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nbcodex.journal import writes
from nbcodex.journal.codec import Entry, storable
from nbcodex.journal.maintenance import Maintenance
from nbcodex.journal.reads import ambiguous, entries_of, is_abandoned, salted
from nbcodex.models import Request
from nbcodex.runtime.clock import Clock
from nbcodex.runtime.sqlite_worker import SqliteWorker

# SQLite allows 999 variables in a statement in its older builds.
KEYS_PER_STATEMENT = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class MapSummary:
    """How far a map run is: its rows by status, those of a kernel that is gone as ``abandoned``."""

    id: str
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """Rows in the journal."""
        return self.counts.total()

    @property
    def unfinished(self) -> int:
        """Rows that are parked or abandoned."""
        return self.counts["parked"] + self.counts["abandoned"]


class Maps:
    """The map runs of a journal. Its reads block the calling thread."""

    def __init__(self, worker: SqliteWorker, maintenance: Maintenance, clock: Clock) -> None:
        self._worker, self._maintenance, self._clock = worker, maintenance, clock

    def insert_parked(self, requests: Sequence[tuple[Request, bytes]]) -> None:
        """Insert rows as parked that were never started, each with its `equality_key`.

        Does not wait for the commit.
        """

        def work(connection: sqlite3.Connection) -> None:
            owner, at = self._maintenance.owner, self._clock.wall()
            writes.insert_parked(connection, requests, owner=owner, at=at)

        self._worker.post(work)

    def answered_keys(self, keys: Iterable[bytes]) -> set[bytes]:
        """Return those of `keys` that have an answer."""
        unique = list(dict.fromkeys(keys))
        found: set[bytes] = set()
        for start in range(0, len(unique), KEYS_PER_STATEMENT):
            some = unique[start : start + KEYS_PER_STATEMENT]
            found |= self._worker.call(lambda c, some=some: _answered(c, some), default=set())  # type: ignore[misc]
        return found

    def find_id(self, prefix: str) -> str | None:
        """Return the id of the map that begins with `prefix`; None if there is none.

        Raises
        ------
        EntryError
            If there are several.
        """
        nothing: str | None = None
        return self._worker.call(lambda c: find_map_id(c, prefix), default=nothing)

    def entries(self, map_id: str) -> list[Entry]:
        """Return the rows of a map that are in the journal, in order."""

        def work(connection: sqlite3.Connection) -> list[Entry]:
            rows = connection.execute("SELECT * FROM book WHERE batch = ?", (map_id,)).fetchall()
            return entries_of(rows, owner=self._maintenance.owner, clock=self._clock)

        nothing: list[Entry] = []
        found = self._worker.call(work, default=nothing)
        # Sorted here, because an index on the order would cost every insertion.
        return sorted(found, key=lambda entry: entry.request.origin.row_index or 0)

    def summary(self, map_id: str) -> MapSummary:
        """Return how far a map is."""
        found = self._summaries("batch = ?", map_id)
        return found[0] if found else MapSummary(id=map_id)

    def has_batch_job(self, map_id: str) -> bool:
        """Return whether rows of a map are in a batch job, or may be."""

        def work(connection: sqlite3.Connection) -> bool:
            found = connection.execute(
                """SELECT 1 FROM entries WHERE batch = ? AND part IS NOT NULL
                AND status IN ('running', 'waiting', 'parked') LIMIT 1""",
                (map_id,),
            )
            return found.fetchone() is not None

        return self._worker.call(work, default=False)

    def unfinished(self, *, notebook: str | None = None) -> list[MapSummary]:
        """Return the maps with parked or abandoned rows: of one notebook, or of all."""
        found = self._summaries(
            """status IN ('pending', 'running', 'waiting', 'parked') AND batch IS NOT NULL
            AND (?1 IS NULL OR notebook = ?1)""",
            storable(notebook),
        )
        return [summary for summary in found if summary.unfinished]

    def _summaries(self, condition: str, value: str | None) -> list[MapSummary]:
        """Return the maps whose rows meet a condition, with those rows counted."""

        def work(connection: sqlite3.Connection) -> list[MapSummary]:
            found: dict[str, MapSummary] = {}
            known: dict[int, bool] = {}
            rows = connection.execute(
                f"SELECT *, count(*) AS rows FROM book WHERE {condition} "  # noqa: S608 - ours
                "GROUP BY batch, status, owner ORDER BY min(seq)",
                (value,),
            )
            for row in rows:
                # The rows of a group share status and owner, so one of them stands for all.
                owner = self._maintenance.owner
                gone = is_abandoned(row, here=owner, clock=self._clock, known=known)
                summary = found.setdefault(row["batch"], MapSummary(id=row["batch"]))
                summary.counts["abandoned" if gone else row["status"]] += row["rows"]
            return list(found.values())

        return self._worker.call(work, default=[])


def find_map_id(connection: sqlite3.Connection, prefix: str) -> str | None:
    """Return the id of the map that begins with `prefix`; see `Maps.find_id`."""
    # A range instead of LIKE: it uses the index, and the prefix may hold % and _.
    if not (start := storable(prefix.strip())):
        return None
    rows = connection.execute(
        """SELECT DISTINCT batch FROM entries WHERE batch IS NOT NULL AND batch >= ?
        AND batch < ? LIMIT 8""",
        (start, start + "\U0010ffff"),
    )
    found = [str(row["batch"]) for row in rows]
    if len(found) > 1:
        raise ambiguous(prefix, found)
    return found[0] if found else None


def _answered(connection: sqlite3.Connection, keys: list[bytes]) -> set[bytes]:
    stored = {salted(connection, key): key for key in keys}
    places = ", ".join("?" * len(stored))
    # The condition has to repeat that of the index `entries_answered` to use it.
    rows = connection.execute(
        f"SELECT key FROM entries WHERE key IN ({places}) "  # noqa: S608 - question marks
        "AND status = 'done' AND key IS NOT NULL",
        list(stored),
    )
    return {stored[row["key"]] for row in rows}
