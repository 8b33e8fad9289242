"""The journal: every request of a user, from before it is sent until it is deleted.

Runs the functions of `writes` and `reads` on the database's worker thread; an await costs the event
loop some microseconds. Nothing here raises because a disk is full or a file is damaged: the journal
then continues in memory, and `problem` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from nbcodex.errors import EntryError
from nbcodex.journal import reads, spending, writes
from nbcodex.journal.codec import bounded_integer, encode, finite_or_none, storable
from nbcodex.journal.conversations import ConversationStore
from nbcodex.journal.database import JournalDatabase
from nbcodex.journal.maps import BatchJobs, Maps
from nbcodex.journal.owner import Connection
from nbcodex.journal.reads import Entry, OtherKernels
from nbcodex.journal.spending import SpendAmount, Spending
from nbcodex.journal.sqlite_worker import Level, SqliteWorker
from nbcodex.models import DAY, Reply, Request, UsageTotals
from nbcodex.runtime.clock import BootClock, Clock
from nbcodex.settings import JOURNAL_FILENAME

RETENTION_S = 90.0 * DAY


class Journal:
    """Every request of this user: in a file in `folder`, or only in memory if that is None.

    Entries are kept for `retention` seconds after their last change, or forever if that is None.
    Another process that keeps the file locked is waited for at most `patience` seconds.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        clock: Clock | None = None,
        retention: float | None = RETENTION_S,
        patience: float = 10.0,
    ) -> None:
        self._database = JournalDatabase(
            folder, clock=clock or BootClock(), retention=retention, patience=patience
        )
        self._worker = SqliteWorker(self._database)
        self._was_interrupted = False
        self.maps = Maps(self._worker)
        self.batch_jobs = BatchJobs(self._worker, self._database)
        self.conversations = ConversationStore(self._worker)

    @property
    def problem(self) -> str | None:
        """What cannot be kept now, and why; None if all is well, or before the first use."""
        return self._database.problem

    @property
    def location(self) -> str:
        """Where entries are, as the end of a sentence."""
        folder = self._database.folder
        return f"in {folder / JOURNAL_FILENAME}" if folder else "in this kernel's memory"

    async def insert(
        self, request: Request, *, key: bytes | None = None, attempt: int | None = None
    ) -> None:
        """Commit `request` as pending: once this returns, it may be sent.

        `key` is its `equality_key`, under which `find_answer` finds its answer. `attempt` is the
        attempt that is about to be sent, if one is, as for `start_attempt`.
        """
        insert = partial(writes.insert, request=request, key=key, attempt=attempt)

        def work(connection: Connection) -> None:
            insert(connection)
            self._database.activate(connection, request.id, insert)

        await self._worker.run(work, level=Level.SAFE, default=None)

    async def start_attempt(self, id_: str, attempt: int, *, continues: bool = False) -> None:
        """Commit that attempt number `attempt`, counted from 1, is about to be sent."""
        # With `continues`, it continues the durable response that the entry names.
        # Any other attempt asks for a new response, whose id is not known yet: the old id would
        # make a resumed request fetch an answer that was given up.
        change = self._update(
            id_,
            """status = 'running', attempts = :attempt, resume_at = NULL,
            response_id = CASE WHEN :continues THEN response_id END,
            sequence = CASE WHEN :continues THEN sequence END""",
            attempt=bounded_integer(attempt),
            continues=continues,
        )
        # WRITE, not SAFE: a power failure may lose this, and with it only the warning that the
        # request may be charged twice.
        await self._worker.run(change, level=Level.WRITE, default=None)

    async def record_wait(
        self, id_: str, resume_at: float | None = None, *, notes: tuple[str, ...] = ()
    ) -> None:
        """Note that the request waits until `resume_at` (seconds since the epoch)."""
        # The reply holds notes only until the request ends: they outlive a crash during the wait.
        change = self._update(
            id_,
            "status = 'waiting', resume_at = :resume_at, reply = coalesce(:reply, reply)",
            resume_at=finite_or_none(resume_at),
            reply=encode(Reply(id=id_, notes=notes)) if notes else None,
        )
        # Not awaited: later calls see the change all the same, as the worker keeps the order.
        self._worker.post(change)

    async def update_text(self, id_: str, text: str, *, sequence: int | None = None) -> None:
        """Store the whole text so far, and the last event of a durable response that is in it."""
        # Both in one commit, so that a stream is continued exactly where the text ends. Not
        # awaited, because a slow disk must not hold up a stream. All of the text is written each
        # time, so this is called once a second at most.
        change = self._update(
            id_,
            "text = :text, sequence = coalesce(:sequence, sequence)",
            text=storable(text),
            sequence=None if sequence is None else bounded_integer(sequence),
        )
        self._worker.post(change)

    async def set_response_id(self, id_: str, response_id: str) -> None:
        """Commit which durable response carries the answer."""
        change = self._update(id_, "response_id = :response", response=storable(response_id))
        await self._worker.run(change, level=Level.SAFE, default=None)

    def _update(self, id_: str, changes: str, **values: object) -> Callable[[Connection], None]:
        """Return a job that changes columns of an entry, unless another kernel has claimed it."""

        def work(connection: Connection) -> None:
            ours = {"id": storable(id_), "owner": connection.owner.id}
            connection.execute(
                f"UPDATE entries SET {changes}, updated_at = :at WHERE id = :id AND owner = :owner",  # noqa: S608 - ours
                {**values, **ours, "at": connection.clock.wall()},
            )

        return work

    async def finish(
        self,
        reply: Reply,
        *,
        error: str | None = None,
        resume_at: float | None = None,
        assumed: SpendAmount | None = None,
    ) -> None:
        """Commit the ending of a request: once this returns, the answer may be shown.

        `error` says why there is no answer; `resume_at` is when a parked request may be sent, in
        seconds since the epoch; the request counts for `assumed` if the reply states no usage.
        """

        def work(connection: Connection) -> None:
            writes.finish(connection, reply, error=error, resume_at=resume_at, assumed=assumed)
            self._database.deactivate(reply.id)

        self._was_interrupted |= reply.status == "interrupted"
        await self._worker.run(work, level=Level.SAFE, default=None)

    async def claim(self, id_: str) -> bool:
        """Take over a resumable entry; return whether it is ours now, and `running`."""

        def work(connection: Connection) -> bool:
            if won := writes.claim(connection, id_):
                self._database.activate(connection, id_)
            return won

        return await self._worker.run(work, level=Level.SAFE, default=False)

    async def reserve_budget(
        self, id_: str, amount: SpendAmount, *, today: str, allowed: Callable[[Spending], bool]
    ) -> Spending:
        """Reserve the most that a request may use until `finish`, if `allowed` returns true.

        `allowed` receives what all kernels have spent and reserved before, which is also returned.
        """
        # `allowed` is called in a write transaction, so one kernel decides at a time.

        def work(connection: Connection) -> Spending:
            spending.release_for_dead_kernels(connection)
            spending.release(connection, storable(id_))
            before = spending.read_spending(connection, today=today)
            if allowed(before):
                spending.reserve(connection, storable(id_), amount)
                self._database.ensure_heartbeat(connection)
            return before

        return await self._worker.run(work, level=Level.WRITE, default=Spending())

    async def count_spending(
        self, replies: Sequence[Reply], *, assumed: SpendAmount | None = None
    ) -> None:
        """Commit what requests have used whose entries are in another journal; see `finish`."""

        def work(connection: Connection) -> None:
            for reply in replies:
                writes.settle_spending(connection, reply, assumed)

        await self._worker.run(work, level=Level.SAFE, default=None)

    async def reset_spending(self) -> None:
        """Set the counters of all days to zero; what running requests have reserved stays."""
        await self._worker.run(spending.reset, level=Level.SAFE, default=None)

    async def set_budget(self, budget: str) -> None:
        """Commit the budget that all kernels keep to; an empty one lifts it."""
        await self._worker.run(
            lambda c: spending.set_budget(c, budget), level=Level.SAFE, default=None
        )

    async def delete(self, prefix: str | None = None) -> int:
        """Delete the entry or map that `prefix` names, or all; return how many entries.

        Their text is in no file any more, at the latest when the last process that reads the log
        has finished. The totals stay. Raises EntryError if `prefix` names no entry or several, or
        if the file cannot be written now.
        """

        def work(connection: Connection) -> int:
            if self._database.is_fallback:
                raise EntryError(f"Nothing can be erased now. {self.problem}")
            if prefix is None:
                # Chapters hold the names of notebooks and threads.
                connection.execute("DELETE FROM chapters")
                return connection.execute("DELETE FROM entries").rowcount
            column, value = "batch", reads.find_id(connection, "batch", prefix)
            if value is None:
                column, value = "id", reads.find_entry(connection, prefix).id
            query = f"DELETE FROM entries WHERE {column} = ?"  # noqa: S608 - ours
            return connection.execute(query, (value,)).rowcount

        # `secure_delete` overwrites the text in the file; the log still holds it until truncated.
        deleted = await self._worker.run(work, level=Level.SAFE, default=0)
        await self._worker.run(self._database.checkpoint, level=Level.NO_TRANSACTION, default=None)
        return deleted

    def shut_down(self, *, within: float) -> None:
        """Close as the process ends; park what was interrupted in the last `within` seconds."""

        # A front end interrupts a kernel before it restarts it, though the user did not press Stop.
        def park_interrupted(connection: Connection) -> None:
            at = connection.clock.wall()
            connection.execute(
                """UPDATE entries SET status = 'parked', updated_at = ?
                WHERE owner = ? AND status = 'interrupted' AND updated_at >= ?""",
                (at, connection.owner.id, at - within),
            )

        if self._was_interrupted:
            self._worker.post(park_interrupted)
        self.close()

    def close(self) -> None:
        """Close the file; what is unfinished here is abandoned from now on."""
        self._worker.close()

    # Reads. Those that are not async block the calling thread and need no event loop.

    async def find_answer(self, key: bytes) -> Reply | None:
        """Return the newest answer to an equal request, marked as reused and at no cost."""
        return await self._worker.run(
            lambda c: reads.find_answer(c, key), level=Level.READ, default=None
        )

    async def read_spending(self, today: str) -> Spending:
        """Return what is spent on this day (an ISO date) and in its month, and reserved."""
        return await self._worker.run(
            lambda c: spending.read_spending(c, today=today), level=Level.READ, default=Spending()
        )

    def recent_entries(self, limit: int = 20, *, notebook: str | None = None) -> list[Entry]:
        """Return entries, newest first: of one notebook, or of all."""
        return self._worker.call(
            lambda c: reads.newest_entries(c, limit, notebook=notebook), default=[]
        )

    def count_entries(self) -> int:
        """Return how many entries there are."""
        query = "SELECT count(*) FROM entries"
        return self._worker.call(lambda c: int(c.execute(query).fetchone()[0]), default=0)

    def resumable_entries(self, *, notebook: str | None = None) -> list[Entry]:
        """Return what is parked or abandoned, oldest first: in one notebook, or in all."""
        return self._worker.call(
            lambda c: reads.resumable_entries(c, notebook=notebook), default=[]
        )

    def find_entry(self, prefix: str) -> Entry:
        """Return the one entry whose id begins with `prefix`; EntryError if there is not one."""
        found = self._worker.call(lambda c: reads.find_entry(c, prefix), default=None)
        if found is None:
            raise EntryError(f"The journal cannot be read now. {self.problem or ''}")
        return found

    def read_totals(self) -> UsageTotals:
        """Return the totals of all time, which are stored as such: no entry is read."""
        return self._worker.call(reads.read_totals, default=UsageTotals())

    def other_kernels(self) -> OtherKernels:
        """Return what other kernels of this user are doing."""
        return self._worker.call(reads.other_kernels, default=OtherKernels())
