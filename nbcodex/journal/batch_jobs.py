"""Batch jobs in the journal: which rows of a map each holds, and the provider's names for it.

Owns that a job is stored before it is submitted, and until its files at the provider are erased.
Every method is one transaction. Knows nothing of who submits, or of what a provider is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from nbcodex.journal import writes
from nbcodex.journal.codec import storable
from nbcodex.journal.maintenance import Maintenance
from nbcodex.journal.reads import entries_of, find_answer, is_abandoned, salted
from nbcodex.models import Reply, Request
from nbcodex.runtime.clock import Clock
from nbcodex.runtime.sqlite_worker import Level, SqliteWorker

ResultT = TypeVar("ResultT")
Connection = sqlite3.Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """A batch job that this process has claimed."""

    tag: str  # our name for it, by which it is found at the provider
    base_url: str  # the provider
    # file, remote: the provider's ids of its file and of the job, as far as they are stored.
    file: str | None
    remote: str | None
    requests: tuple[Request, ...] = ()  # its rows without an answer


@dataclass(frozen=True, slots=True)
class InsertedRows:
    """What `insert_rows` found, by the row's id."""

    answers: dict[str, Reply] = field(default_factory=dict)  # answers to equal requests
    # Tags of jobs that hold an equal request, and that no kernel is waiting for.
    other_jobs: dict[str, str] = field(default_factory=dict)
    # Rows that another kernel has claimed, or that are finished.
    lost: set[str] = field(default_factory=set)


class BatchJobs:
    """The batch jobs of a journal; each method commits before it returns."""

    def __init__(self, worker: SqliteWorker, maintenance: Maintenance, clock: Clock) -> None:
        self._worker, self._maintenance, self._clock = worker, maintenance, clock

    async def insert_rows(self, rows: Sequence[tuple[Request, bytes, bool]]) -> InsertedRows:
        """Commit rows as pending: requests, their `equality_key`, and whether they exist already.

        Those that exist are claimed.
        """

        def work(connection: Connection) -> InsertedRows:
            inserted, known = InsertedRows(), dict[int, bool]()
            for request, key, exists in rows:
                if not self._insert_or_claim(connection, request, key, exists=exists):
                    inserted.lost.add(request.id)
                elif request.reuse and (reply := find_answer(connection, key)):
                    inserted.answers[request.id] = replace(reply, id=request.id)
                elif request.reuse and (tag := self._other_job(connection, key, known)):
                    inserted.other_jobs[request.id] = tag
            if rows:
                # Heartbeats for the whole map: its rows are in no job before they are uploaded.
                first = rows[0][0]
                self._maintenance.activate(connection, first.origin.map_id or first.id)
            return inserted

        return await self._commit(work, InsertedRows())

    async def insert_job(self, tag: str, requests: Collection[Request], *, base_url: str) -> None:
        """Commit that rows of ours are about to be submitted as the job `tag`."""

        # In the journal before the provider has it: after a crash the tag finds the job there.
        def work(connection: Connection) -> None:
            connection.execute("INSERT INTO parts (tag, base_url) VALUES (?, ?)", (tag, base_url))
            connection.executemany(
                """UPDATE entries SET part = ?, status = 'waiting', attempts = attempts + 1,
                updated_at = ? WHERE id = ? AND owner = ?""",
                [
                    (tag, self._clock.wall(), storable(request.id), self._maintenance.owner.id)
                    for request in requests
                ],
            )
            self._maintenance.activate(connection, tag)

        await self._commit(work, None)

    async def set_remote_names(
        self, tag: str, *, file: str | None = None, remote: str | None = None
    ) -> None:
        """Commit the provider's id of a job's file, or of the job."""
        names = storable(file), storable(remote), tag

        def work(connection: Connection) -> None:
            connection.execute(
                """UPDATE parts SET file = coalesce(?, file), remote = coalesce(?, remote)
                WHERE tag = ?""",
                names,
            )

        await self._commit(work, None)

    async def claim_job(self, tag: str) -> BatchJob | None:
        """Claim the unfinished rows of a job; None if there is no such job."""

        def work(connection: Connection) -> BatchJob | None:
            job = connection.execute("SELECT * FROM parts WHERE tag = ?", (tag,)).fetchone()
            if job is None:
                return None
            owner, at = self._maintenance.owner, self._clock.wall()
            rows = connection.execute("SELECT * FROM book WHERE part = ?", (tag,)).fetchall()
            entries = entries_of(rows, owner=owner, clock=self._clock)
            claimed = tuple(
                entry.request
                for entry in entries
                if writes.claim(connection, entry.id, owner=owner, at=at, clock=self._clock)
            )
            # `claim` leaves rows as running, but these wait for the provider.
            connection.execute(
                """UPDATE entries SET status = 'waiting' WHERE part = ? AND owner = ?
                AND status = 'running'""",
                (tag, owner.id),
            )
            self._maintenance.activate(connection, tag)
            return _job(job, claimed)

        return await self._commit(work, None)

    async def finish_rows(self, endings: Sequence[tuple[Reply, str | None]]) -> None:
        """Commit the endings of rows: their replies, each with the reason why it has no answer."""

        def work(connection: Connection) -> None:
            for reply, error in endings:
                writes.finish(
                    connection,
                    reply.id,
                    owner=self._maintenance.owner,
                    at=self._clock.wall(),
                    reply=reply,
                    error=error,
                    resume_at=None,
                )
            # An answered row keeps its job, so that its file is found until it is erased.
            connection.executemany(
                "UPDATE entries SET part = NULL WHERE id = ? AND owner = ? AND status <> 'done'",
                [(storable(reply.id), self._maintenance.owner.id) for reply, _ in endings],
            )

        await self._commit(work, None)

    async def withdraw_job(self, tag: str) -> None:
        """Commit that the provider did not accept a job: its rows are pending, and in no job."""

        # Pending, not parked: this kernel decides next what becomes of the rows.
        def work(connection: Connection) -> None:
            connection.execute(
                """UPDATE entries SET part = NULL, status = 'pending'
                WHERE part = ? AND owner = ? AND status = 'waiting'""",
                (tag, self._maintenance.owner.id),
            )
            self._delete_job(connection, tag)

        await self._commit(work, None)

    async def close_job(self, tag: str, *, is_gone: bool) -> None:
        """Commit that this kernel does not wait for a job any more, and whether its files exist."""

        def work(connection: Connection) -> None:
            if is_gone:
                self._delete_job(connection, tag)
            self._maintenance.deactivate(tag)

        await self._commit(work, None)

    async def park_rows(self, tags: Iterable[str], ids: Iterable[str], *, batch: str) -> None:
        """Commit that this kernel does not wait any more for these jobs and rows of a map."""
        jobs, waiting = list(tags), list(ids)

        def work(connection: Connection) -> None:
            owner = self._maintenance.owner.id
            set_parked = "UPDATE entries SET status = 'parked' WHERE owner = ? AND status IN "
            connection.executemany(
                f"{set_parked} ('waiting', 'running') AND part = ?", [(owner, tag) for tag in jobs]
            )
            connection.executemany(
                f"{set_parked} ('pending', 'running') AND id = ?",
                [(owner, storable(id_)) for id_ in waiting],
            )
            # What is with a provider may be charged all the same, and stays reserved.
            connection.executemany(
                """DELETE FROM asides WHERE id = ? AND NOT EXISTS (SELECT 1 FROM entries
                WHERE entries.id = asides.id AND part IS NOT NULL)""",
                [(storable(id_),) for id_ in waiting],
            )
            for name in (batch, *jobs):
                self._maintenance.deactivate(name)

        await self._commit(work, None)

    async def set_submitted(self, map_id: str) -> None:
        """Note that each row of a map is in a job now, or has ended."""
        await self._commit(lambda _: self._maintenance.deactivate(map_id), None)

    async def unerased_jobs(self) -> list[BatchJob]:
        """Return the jobs whose rows have all ended, but whose files were not erased yet."""

        def work(connection: Connection) -> list[BatchJob]:
            # Their files hold prompts: a kernel that died before erasing them left that to others.
            rows = connection.execute(
                """SELECT * FROM parts WHERE file IS NOT NULL AND NOT EXISTS (SELECT 1 FROM
                entries WHERE part = tag AND status NOT IN ('done', 'failed', 'cancelled'))"""
            )
            return [_job(row) for row in rows]

        nothing: list[BatchJob] = []
        return await self._worker.run(work, level=Level.READ, default=nothing)

    def _insert_or_claim(
        self, connection: Connection, request: Request, key: bytes, *, exists: bool
    ) -> bool:
        """Make a row pending and ours; return whether it is."""
        owner, at = self._maintenance.owner, self._clock.wall()
        if not exists:
            writes.insert(connection, request, owner=owner, at=at, key=key)
            return True
        # A row of a resumed map may have been claimed by another kernel since it was listed.
        if not writes.claim(connection, request.id, owner=owner, at=at, clock=self._clock):
            return False
        connection.execute(
            "UPDATE entries SET status = 'pending' WHERE id = ?", (storable(request.id),)
        )
        return True

    def _other_job(self, connection: Connection, key: bytes, known: dict[int, bool]) -> str | None:
        """Return the job that holds an equal request, if no kernel is waiting for it."""
        rows = connection.execute(
            """SELECT book.* FROM book JOIN parts ON parts.tag = book.part
            WHERE book.key = ? AND book.status IN ('waiting', 'parked')""",
            (salted(connection, key),),
        )
        here = self._maintenance.owner
        # While another kernel waits for that job, the row is simply asked: it might never end.
        for row in rows:
            gone = is_abandoned(row, here=here, clock=self._clock, known=known)
            if row["status"] == "parked" or gone:
                return str(row["part"])
        return None

    def _delete_job(self, connection: Connection, tag: str) -> None:
        connection.execute("DELETE FROM parts WHERE tag = ?", (tag,))
        connection.execute("UPDATE entries SET part = NULL WHERE part = ?", (tag,))
        self._maintenance.deactivate(tag)

    async def _commit(self, work: Callable[[Connection], ResultT], default: ResultT) -> ResultT:
        return await self._worker.run(work, level=Level.SAFE, default=default)


def _job(row: sqlite3.Row, requests: tuple[Request, ...] = ()) -> BatchJob:
    names = {name: row[name] for name in ("tag", "base_url", "file", "remote")}
    return BatchJob(requests=requests, **names)
