"""Parts of maps that are with a provider: which rows each holds, and the provider's name for it.

Owns that a part is written down before it is handed in, and until its files are erased. Every
call is one transaction. Must not know who hands in, nor what a provider is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from nbcodex.journal import writes
from nbcodex.journal.codec import storable
from nbcodex.journal.jobs import Level
from nbcodex.journal.maintenance import Upkeep
from nbcodex.journal.reads import abandoned, answered, entries_of, reused, salted
from nbcodex.journal.writer import Writer
from nbcodex.models import Reply, Request
from nbcodex.runtime.clock import Clock

T = TypeVar("T")
Connection = sqlite3.Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """A part that this process has taken up.

    Parameters
    ----------
    tag : str
        Its name, by which the provider finds it again.
    base_url : str
        The provider.
    file, remote : str or None
        The provider's names for its file and its batch, as far as they were noted.
    requests : tuple of Request
        Its rows that have no answer yet.
    """

    tag: str
    base_url: str
    file: str | None
    remote: str | None
    requests: tuple[Request, ...] = ()


@dataclass(frozen=True, slots=True)
class InsertedRows:
    """What became of rows that were to be put into the journal.

    Parameters
    ----------
    answers : dict
        Answers to equal requests, by row.
    elsewhere : dict
        Parts with an equal request that nobody waits for, by row.
    lost : set
        Rows that another kernel has, or that are done.
    """

    answers: dict[str, Reply] = field(default_factory=dict)
    other_jobs: dict[str, str] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)


class BatchJobs:
    """The parts in a journal."""

    def __init__(self, writer: Writer, upkeep: Upkeep, clock: Clock) -> None:
        self._writer, self._upkeep, self._clock = writer, upkeep, clock

    async def insert_rows(self, rows: Sequence[tuple[Request, bytes, bool]]) -> InsertedRows:
        """Commit rows as pending: requests, their `equality_key`, and whether they are known.

        Those that are known are claimed.
        """

        def work(connection: Connection) -> InsertedRows:
            admitted, known = InsertedRows(), dict[int, bool]()
            for request, key, is_known in rows:
                if not self._put(connection, request, key, is_known=is_known):
                    admitted.lost.add(request.id)
                elif request.reuse and (found := answered(connection, key)):
                    admitted.answers[request.id] = reused(found.reply, id_=request.id)
                elif request.reuse and (tag := self._elsewhere(connection, key, known)):
                    admitted.other_jobs[request.id] = tag
            if rows:
                self._upkeep.busy(connection, _map_of(rows[0][0]))
            return admitted

        return await self._safely(work, InsertedRows())

    def _put(self, connection: Connection, request: Request, key: bytes, *, is_known: bool) -> bool:
        owner, at = self._upkeep.owner, self._clock.wall()
        if not is_known:
            writes.enter(connection, request, owner=owner, at=at, key=key)
            return True
        if not writes.claim(connection, request.id, owner=owner, at=at, clock=self._clock):
            return False
        connection.execute(
            "UPDATE entries SET status = 'pending' WHERE id = ?", (storable(request.id),)
        )
        return True

    def _elsewhere(self, connection: Connection, key: bytes, known: dict[int, bool]) -> str | None:
        """Return the part that holds an equal request and is nobody's now."""
        rows = connection.execute(
            """SELECT book.* FROM book JOIN parts ON parts.tag = book.part
            WHERE book.key = ? AND book.status IN ('waiting', 'parked')""",
            (salted(connection, key),),
        )
        here = self._upkeep.owner
        for row in rows:
            gone = abandoned(row, here=here, clock=self._clock, known=known)
            if row["status"] == "parked" or gone:
                return str(row["part"])
        return None

    async def insert_job(self, tag: str, requests: Collection[Request], *, base_url: str) -> None:
        """Commit that rows of ours are about to be handed in as the part `tag`."""

        def work(connection: Connection) -> None:
            connection.execute("INSERT INTO parts (tag, base_url) VALUES (?, ?)", (tag, base_url))
            connection.executemany(
                """UPDATE entries SET part = ?, status = 'waiting', attempts = attempts + 1,
                updated_at = ? WHERE id = ? AND owner = ?""",
                [
                    (tag, self._clock.wall(), storable(request.id), self._upkeep.owner.id)
                    for request in requests
                ],
            )
            self._upkeep.busy(connection, tag)

        await self._safely(work, None)

    async def set_remote_names(
        self, tag: str, *, file: str | None = None, remote: str | None = None
    ) -> None:
        """Commit the provider's name for a part's file, or for its batch."""
        names = storable(file), storable(remote), tag

        def work(connection: Connection) -> None:
            connection.execute(
                "UPDATE parts SET file = coalesce(?, file), remote = coalesce(?, remote) "
                "WHERE tag = ?",
                names,
            )

        await self._safely(work, None)

    async def claim_job(self, tag: str) -> BatchJob | None:
        """Claim what is open of a part; None where there is no such part."""

        def work(connection: Connection) -> BatchJob | None:
            part = connection.execute("SELECT * FROM parts WHERE tag = ?", (tag,)).fetchone()
            if part is None:
                return None
            owner, at = self._upkeep.owner, self._clock.wall()
            rows = connection.execute("SELECT * FROM book WHERE part = ?", (tag,)).fetchall()
            entries = entries_of(rows, owner=owner, clock=self._clock)
            won = tuple(
                entry.request
                for entry in entries
                if writes.claim(connection, entry.id, owner=owner, at=at, clock=self._clock)
            )
            connection.execute(
                """UPDATE entries SET status = 'waiting' WHERE part = ? AND owner = ?
                AND status = 'running'""",
                (tag, owner.id),
            )
            self._upkeep.busy(connection, tag)
            return _held(part, won)

        return await self._safely(work, None)

    async def finish_rows(self, endings: Sequence[tuple[Reply, str | None]]) -> None:
        """Commit what rows came to: their replies, each with the reason why it is no answer."""

        def work(connection: Connection) -> None:
            for reply, error in endings:
                writes.finish(
                    connection,
                    reply.id,
                    owner=self._upkeep.owner,
                    at=self._clock.wall(),
                    reply=reply,
                    error=error,
                    resume_at=None,
                )
            connection.executemany(
                "UPDATE entries SET part = NULL WHERE id = ? AND owner = ? AND status <> 'done'",
                [(storable(reply.id), self._upkeep.owner.id) for reply, _ in endings],
            )

        await self._safely(work, None)

    async def withdraw_job(self, tag: str) -> None:
        """Commit that a part was not taken: its rows are pending, and in no part any more."""

        def work(connection: Connection) -> None:
            connection.execute(
                """UPDATE entries SET part = NULL, status = 'pending'
                WHERE part = ? AND owner = ? AND status = 'waiting'""",
                (tag, self._upkeep.owner.id),
            )
            self._end(connection, tag)

        await self._safely(work, None)

    async def close_job(self, tag: str, *, is_gone: bool) -> None:
        """Commit that nobody waits for a part any more, and whether its files are gone."""

        def work(connection: Connection) -> None:
            if is_gone:
                self._end(connection, tag)
            self._upkeep.idle(tag)

        await self._safely(work, None)

    def _end(self, connection: Connection, tag: str) -> None:
        connection.execute("DELETE FROM parts WHERE tag = ?", (tag,))
        connection.execute("UPDATE entries SET part = NULL WHERE part = ?", (tag,))
        self._upkeep.idle(tag)

    async def park_rows(self, tags: Iterable[str], ids: Iterable[str], *, batch: str) -> None:
        """Commit that nobody waits any more for these parts, and for these rows of a map.

        What is with a provider may be used all the same: that stays set aside.
        """
        held, waiting = list(tags), list(ids)

        def work(connection: Connection) -> None:
            owner = self._upkeep.owner.id
            set_parked = "UPDATE entries SET status = 'parked' WHERE owner = ? AND status IN "
            connection.executemany(
                f"{set_parked} ('waiting', 'running') AND part = ?",
                [(owner, tag) for tag in held],
            )
            connection.executemany(
                f"{set_parked} ('pending', 'running') AND id = ?",
                [(owner, storable(id_)) for id_ in waiting],
            )
            connection.executemany(
                """DELETE FROM asides WHERE id = ? AND NOT EXISTS (SELECT 1 FROM entries
                WHERE entries.id = asides.id AND part IS NOT NULL)""",
                [(storable(id_),) for id_ in waiting],
            )
            for name in (batch, *held):
                self._upkeep.idle(name)

        await self._safely(work, None)

    async def set_submitted(self, batch: str) -> None:
        """Note that each row of a map is in a part now, or has ended."""
        await self._safely(lambda _: self._upkeep.idle(batch), None)

    async def unerased_jobs(self) -> list[BatchJob]:
        """Return the parts whose rows have all ended, but whose files were not erased yet."""

        def work(connection: Connection) -> list[BatchJob]:
            rows = connection.execute(
                """SELECT * FROM parts WHERE file IS NOT NULL AND NOT EXISTS (SELECT 1 FROM
                entries WHERE part = tag AND status NOT IN ('done', 'failed', 'cancelled'))"""
            )
            return [_held(row) for row in rows]

        nothing: list[BatchJob] = []
        return await self._writer.run(work, level=Level.READ, default=nothing)

    async def _safely(self, work: Callable[[Connection], T], default: T) -> T:
        return await self._writer.run(work, level=Level.SAFE, default=default)


def _held(row: sqlite3.Row, requests: tuple[Request, ...] = ()) -> BatchJob:
    names = {name: row[name] for name in ("tag", "base_url", "file", "remote")}
    return BatchJob(requests=requests, **names)


def _map_of(request: Request) -> str:
    return request.origin.map_id or request.id
