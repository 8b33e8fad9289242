"""Maps in the journal: their rows, how far each has come, and which rows were answered before.

Owns what is asked and written for many rows at once. Must not know templates, nor who asks.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nbcodex.errors import EntryError
from nbcodex.journal import writes
from nbcodex.journal.codec import Entry, storable
from nbcodex.journal.maintenance import Upkeep
from nbcodex.journal.reads import abandoned, entries_of, salted
from nbcodex.journal.writer import Writer
from nbcodex.models import Request
from nbcodex.runtime.clock import Clock

MANY = 400
"""Keys that one statement asks for: SQLite allows 999 variables in its older builds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapSummary:
    """A map as its readers see it.

    Parameters
    ----------
    id : str
        Its id.
    counts : Counter
        Rows by status; those that were under way in a kernel that is gone are ``abandoned``.
    """

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
    """The maps of a journal. Reads make the calling thread wait for the writer thread."""

    def __init__(self, writer: Writer, upkeep: Upkeep, clock: Clock) -> None:
        self._writer, self._upkeep, self._clock = writer, upkeep, clock

    def insert_parked(self, requests: Sequence[tuple[Request, bytes]]) -> None:
        """Keep requests as parked that were never begun, each with its `equality_key`.

        Returns at once; it is written in its turn.
        """

        def work(connection: sqlite3.Connection) -> None:
            owner, at = self._upkeep.owner, self._clock.wall()
            writes.shelve(connection, requests, owner=owner, at=at)

        self._writer.post(work)

    def answered_keys(self, keys: Iterable[bytes]) -> set[bytes]:
        """Return those of `keys` to which an answer is known."""
        asked = list(dict.fromkeys(keys))
        known: set[bytes] = set()
        for at in range(0, len(asked), MANY):
            few = asked[at : at + MANY]
            known |= self._writer.ask(lambda c, few=few: _answered(c, few), default=set())  # type: ignore[misc]
        return known

    def find_id(self, prefix: str) -> str | None:
        """Return the id of the map that begins with `prefix`; None where there is none.

        Raises
        ------
        EntryError
            If there are several.
        """
        nothing: str | None = None
        return self._writer.ask(lambda connection: named(connection, prefix), default=nothing)

    def entries(self, batch: str) -> list[Entry]:
        """Return the rows of a map that are in the journal, in order."""

        def work(connection: sqlite3.Connection) -> list[Entry]:
            rows = connection.execute("SELECT * FROM book WHERE batch = ?", (batch,)).fetchall()
            return entries_of(rows, owner=self._upkeep.owner, clock=self._clock)

        nothing: list[Entry] = []
        found = self._writer.ask(work, default=nothing)
        return sorted(found, key=lambda entry: entry.request.origin.row_index or 0)

    def summary(self, batch: str) -> MapSummary:
        """Return how far a map has come."""
        found = self._counted("batch = ?", batch)
        return found[0] if found else MapSummary(id=batch)

    def has_batch_job(self, batch: str) -> bool:
        """Return whether rows of a map are with a provider, or may be."""

        def work(connection: sqlite3.Connection) -> bool:
            found = connection.execute(
                """SELECT 1 FROM entries WHERE batch = ? AND part IS NOT NULL
                AND status IN ('running', 'waiting', 'parked') LIMIT 1""",
                (batch,),
            )
            return found.fetchone() is not None

        return self._writer.ask(work, default=False)

    def unfinished(self, *, notebook: str | None = None) -> list[MapSummary]:
        """Return the maps with parked or abandoned rows: of one notebook, or of all."""
        found = self._counted(
            """status IN ('pending', 'running', 'waiting', 'parked') AND batch IS NOT NULL
            AND (?1 IS NULL OR notebook = ?1)""",
            storable(notebook),
        )
        return [batch for batch in found if batch.unfinished]

    def _counted(self, condition: str, value: str | None) -> list[MapSummary]:
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
                gone = abandoned(row, here=self._upkeep.owner, clock=self._clock, known=known)
                batch = found.setdefault(row["batch"], MapSummary(id=row["batch"]))
                batch.counts["abandoned" if gone else row["status"]] += row["rows"]
            return list(found.values())

        return self._writer.ask(work, default=[])


def named(connection: sqlite3.Connection, prefix: str) -> str | None:
    """Return the id of the map that begins with `prefix`; None where there is none.

    Raises
    ------
    EntryError
        If there are several.
    """
    if not (start := storable(prefix.strip())):
        return None
    rows = connection.execute(
        """SELECT DISTINCT batch FROM entries WHERE batch IS NOT NULL AND batch >= ?
        AND batch < ? LIMIT 8""",
        (start, start + "\U0010ffff"),
    )
    found = [str(row["batch"]) for row in rows]
    if len(found) > 1:
        raise EntryError(
            f"{prefix[:40]!r} may be {', '.join(found)}.", advice="Give more of the id."
        )
    return found[0] if found else None


def _answered(connection: sqlite3.Connection, keys: list[bytes]) -> set[bytes]:
    """Return those of a few keys to which an answer is known."""
    stored = {salted(connection, key): key for key in keys}
    places = ", ".join("?" * len(stored))
    rows = connection.execute(
        f"SELECT key FROM entries WHERE key IN ({places}) "  # noqa: S608 - question marks
        "AND status = 'done' AND key IS NOT NULL",
        list(stored),
    )
    return {stored[row["key"]] for row in rows}
