"""The journal: every request of a user, from before it is sent until it is deleted.

Runs the functions of `writes` and `reads` on the database's worker thread; an await costs the event
loop some microseconds. Nothing here raises because a disk is full or a file is damaged: the journal
then continues in memory, and `problem` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from nbcodex.errors import EntryError
from nbcodex.journal import reads, spending, writes
from nbcodex.journal.batch_jobs import BatchJobs
from nbcodex.journal.codec import Entry, bounded_totals, storable
from nbcodex.journal.conversations import ConversationStore
from nbcodex.journal.database import Connection, JournalDatabase
from nbcodex.journal.maintenance import Maintenance
from nbcodex.journal.maps import Maps, find_map_id
from nbcodex.journal.reads import OtherKernels
from nbcodex.journal.spending import SpendAmount, Spending
from nbcodex.models import DAY, Limit, Reply, Request, UsageTotals
from nbcodex.runtime.clock import BootClock, Clock
from nbcodex.runtime.sqlite_worker import Level, SqliteWorker
from nbcodex.settings import JOURNAL_FILENAME, Settings, data_folder

RETENTION_S = 90.0 * DAY

ResultT = TypeVar("ResultT")


class Journal:
    """Every request of this user, from before it is sent until it is deleted.

    Parameters
    ----------
    folder : Path or None
        Where the file is; None keeps the journal in memory, until the process ends.
    clock : Clock
        Dates entries, heartbeats and retries.
    retention : float or None
        Seconds for which entries are kept after their last change; None keeps them forever.
    patience : float
        Seconds to wait, at most, for another process that keeps the file locked.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        clock: Clock | None = None,
        retention: float | None = RETENTION_S,
        patience: float = 10.0,
    ) -> None:
        self._clock = clock or BootClock()
        self._maintenance = Maintenance(clock=self._clock, retention=retention)
        self._database = JournalDatabase(
            folder, clock=self._clock, maintenance=self._maintenance, patience=patience
        )
        self._worker = SqliteWorker(self._database, name="nbcodex-journal")
        self._session_totals = UsageTotals()
        self._was_interrupted = False
        self.maps = Maps(self._worker, self._maintenance, self._clock)
        self.batch_jobs = BatchJobs(self._worker, self._maintenance, self._clock)
        self.conversations = ConversationStore(self._worker, self._clock)

    @classmethod
    def from_settings(cls, settings: Settings, *, clock: Clock | None = None) -> Self:
        """Return the journal on disk, whether or not new requests are to be kept there."""
        return cls(data_folder(settings), clock=clock)

    def __repr__(self) -> str:
        return f"<Journal {self._database.folder or 'in memory'}: {self.problem or 'in order'}>"

    @property
    def problem(self) -> str | None:
        """What cannot be kept now, and why; None if all is well, or before the first use."""
        return self._database.problem

    @property
    def place(self) -> str:
        """Where entries are, as the end of a sentence."""
        folder = self._database.folder
        return f"in {folder / JOURNAL_FILENAME}" if folder else "in this kernel's memory"

    @property
    def session_totals(self) -> UsageTotals:
        """The totals of this journal since it was made, in this process."""
        return self._session_totals

    # Writes.

    async def insert(
        self, request: Request, *, key: bytes | None = None, attempt: int | None = None
    ) -> None:
        """Commit `request` as pending: once this returns, it may be sent.

        Parameters
        ----------
        key : bytes or None
            `equality_key` of the request, under which `find_answer` finds its answer.
        attempt : int or None
            The attempt that is about to be sent, as for `start_attempt`.
        """
        insert = partial(
            writes.insert, request=request, at=self._clock.wall(), key=key, attempt=attempt
        )

        def work(connection: Connection) -> None:
            insert_owned = partial(insert, owner=self._maintenance.owner)
            insert_owned(connection)
            self._maintenance.activate(connection, request.id, insert=insert_owned)

        # Counted before the commit, because a cancelled task does not get beyond it.
        self._session_totals = self._session_totals.plus(UsageTotals(requests=1))
        await self._worker.run(work, level=Level.SAFE, default=None)

    async def start_attempt(self, id_: str, attempt: int, *, continues: bool = False) -> None:
        """Commit that attempt number `attempt`, counted from 1, is about to be sent.

        `continues` says that it continues the durable response that the entry names.
        """
        # WRITE, not SAFE: a power failure may lose this, and with it only the warning that the
        # request may be charged twice.
        change = partial(writes.start_attempt, id_=id_, attempt=attempt, continues=continues)
        await self._worker.run(self._owned(change), level=Level.WRITE, default=None)

    async def record_wait(
        self,
        id_: str,
        resume_at: float | None = None,
        limit: Limit | None = None,
        *,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Note that the request waits until `resume_at` (seconds since the epoch) for `limit`.

        `notes` are for the reader of the answer. Does not wait for the commit.
        """
        # Later calls see the change all the same, because the worker keeps the order.
        change = partial(writes.record_wait, id_=id_, resume_at=resume_at, limit=limit, notes=notes)
        self._worker.post(self._owned(change))

    async def update_text(self, id_: str, text: str, *, sequence: int | None = None) -> None:
        """Store the whole text so far, and the last event of a durable response that is in it.

        Call this once a second at most: the text is written anew each time. Does not wait for the
        commit.
        """
        # Both in one commit, so that a stream is continued exactly where the text ends. Not
        # awaited, because a slow disk must not hold up a stream.
        change = partial(writes.update_text, id_=id_, text=text, sequence=sequence)
        self._worker.post(self._owned(change))

    async def set_response_id(self, id_: str, response_id: str) -> None:
        """Commit which durable response carries the answer."""
        change = partial(writes.set_response_id, id_=id_, response_id=response_id)
        await self._worker.run(self._owned(change), level=Level.SAFE, default=None)

    async def finish(
        self,
        id_: str,
        reply: Reply,
        *,
        error: str | None = None,
        resume_at: float | None = None,
        assumed: SpendAmount | None = None,
    ) -> None:
        """Commit the ending of a request: once this returns, the answer may be shown.

        Parameters
        ----------
        reply : Reply
            Its `status` becomes the entry's. `parsed` is not stored: it follows from the text.
        error : str or None
            Why there is no answer.
        resume_at : float or None
            When a parked request may be sent, in seconds since the epoch.
        assumed : SpendAmount or None
            What it counts for if the reply does not state its usage.
        """
        change = partial(
            writes.finish, id_=id_, reply=reply, error=error, resume_at=resume_at, assumed=assumed
        )

        def work(connection: Connection) -> None:
            change(connection, owner=self._maintenance.owner, at=self._clock.wall())
            self._maintenance.deactivate(id_)

        self._was_interrupted |= reply.status == "interrupted"
        await self._worker.run(work, level=Level.SAFE, default=None)
        if not reply.reused:
            self._session_totals = self._session_totals.plus(bounded_totals(reply))

    async def claim(self, id_: str) -> bool:
        """Take over an entry that is parked, abandoned, interrupted or failed.

        Returns whether it is ours now, and `running`. Of all kernels that try at once, one gets it.
        """

        def work(connection: Connection) -> bool:
            owner, at = self._maintenance.owner, self._clock.wall()
            won = writes.claim(connection, id_, owner=owner, at=at, clock=self._clock)
            if won:
                self._maintenance.activate(connection, id_)
            return won

        return await self._worker.run(work, level=Level.SAFE, default=False)

    async def reserve_budget(
        self, id_: str, amount: SpendAmount, *, today: str, allowed: Callable[[Spending], bool]
    ) -> Spending:
        """Reserve what a request may come to until `finish`, if `allowed` returns true.

        `allowed` receives what all kernels have spent and reserved before, which is also returned.
        """
        # `allowed` is called in a write transaction, so one kernel decides at a time.

        def work(connection: Connection) -> Spending:
            self._maintenance.release_reservations_of_the_dead(connection)
            spending.release(connection, storable(id_))
            before = spending.read_spending(connection, today=today)
            if allowed(before):
                owner = self._maintenance.owner.id
                spending.reserve(connection, storable(id_), amount, owner=owner)
                self._maintenance.ensure_heartbeat(connection)
            return before

        return await self._worker.run(work, level=Level.WRITE, default=Spending())

    async def count_spending(
        self, replies: Sequence[Reply], *, assumed: SpendAmount | None = None
    ) -> None:
        """Commit what requests have used whose entries another journal has; `assumed` as above."""

        def work(connection: Connection) -> None:
            for reply in replies:
                at = self._clock.wall()
                writes.settle_spending(connection, reply.id, at=at, reply=reply, assumed=assumed)

        await self._worker.run(work, level=Level.SAFE, default=None)

    async def reset_spending(self) -> None:
        """Set the counters of all days to zero; what running requests have reserved stays."""
        await self._worker.run(spending.reset, level=Level.SAFE, default=None)

    async def set_budget(self, budget: str) -> None:
        """Commit the budget that all kernels keep to; an empty one lifts it."""
        await self._worker.run(
            lambda connection: spending.set_budget(connection, budget),
            level=Level.SAFE,
            default=None,
        )

    async def delete(self, prefix: str | None = None, *, before: float | None = None) -> int:
        """Delete the entry or map that `prefix` names, or those added before an instant, or all.

        Returns how many entries were deleted. Their text is in no file any more, at the latest when
        the last process that reads the log has finished. The totals stay.

        Raises
        ------
        EntryError
            If `prefix` names no entry or several, or if the file cannot be written now.
        """

        def work(connection: Connection) -> int:
            if self._database.is_fallback:
                raise EntryError(f"Nothing can be erased now. {self.problem}")
            if prefix is None:
                return writes.delete(connection, before=before)
            if map_id := find_map_id(connection, prefix):
                return writes.delete(connection, batch=map_id)
            owner = self._maintenance.owner
            entry = reads.find_entry(connection, prefix, owner=owner, clock=self._clock)
            return writes.delete(connection, id_=entry.id)

        # `secure_delete` overwrites the text in the file; the log still holds it until truncated.
        deleted = await self._worker.run(work, level=Level.SAFE, default=0)
        await self._worker.run(self._maintenance.checkpoint, level=Level.ALONE, default=None)
        return deleted

    def shut_down(self, *, within: float) -> None:
        """Close because the process ends, and park what was interrupted just before.

        `within` is how many seconds before the end an interrupt belongs to it.
        """
        if self._was_interrupted:
            self._worker.post(self._owned(partial(writes.park_interrupted, within=within)))
        self.close()

    def close(self) -> None:
        """Close the file; what is unfinished here is abandoned from now on."""
        self._worker.close()

    # Reads. Those that are not async block the calling thread and need no event loop.

    async def find_answer(self, key: bytes) -> Reply | None:
        """Return the newest answer to an equal request, marked as reused and at no cost."""
        return await self._worker.run(
            lambda connection: reads.find_answer(connection, key), level=Level.READ, default=None
        )

    async def read_spending(self, today: str) -> Spending:
        """Return what is spent on this day (an ISO date) and in its month, and reserved."""
        return await self._worker.run(
            lambda connection: spending.read_spending(connection, today=today),
            level=Level.READ,
            default=Spending(),
        )

    def recent_entries(self, limit: int = 20, *, notebook: str | None = None) -> list[Entry]:
        """Return entries, newest first: of one notebook, or of all."""
        read = partial(reads.newest, limit=limit, notebook=notebook)
        return self._read(read, default=[])

    def count_entries(self) -> int:
        """Return how many entries there are."""
        return self._worker.call(reads.count_entries, default=0)

    def resumable_entries(self, *, notebook: str | None = None) -> list[Entry]:
        """Return what is parked or abandoned, oldest first: in one notebook, or in all."""
        return self._read(partial(reads.resumable, notebook=notebook), default=[])

    def find_entry(self, prefix: str) -> Entry:
        """Return the one entry whose id begins with `prefix`.

        Raises
        ------
        EntryError
            If there is none, or more than one (the message lists them), or if it is damaged.
        """
        nothing: Entry | None = None
        found = self._read(partial(reads.find_entry, prefix=prefix), default=nothing)
        if found is None:
            raise EntryError(f"The journal cannot be read now. {self.problem or ''}")
        return found

    def read_totals(self) -> UsageTotals:
        """Return the totals of all time, which are stored as such: no entry is read."""
        return self._worker.call(reads.totals, default=UsageTotals())

    def other_kernels(self) -> OtherKernels:
        """Return what other kernels of this user are doing."""
        return self._read(reads.other_kernels, default=OtherKernels())

    def _owned(self, change: Callable[..., None]) -> Callable[[Connection], None]:
        """Return `change` with our owner and the time; the owner is known on the worker only."""

        def work(connection: Connection) -> None:
            change(connection, owner=self._maintenance.owner, at=self._clock.wall())

        return work

    def _read(self, read: Callable[..., ResultT], *, default: ResultT) -> ResultT:
        """Return what `read` returns for us and our clock, while the calling thread waits."""
        return self._worker.call(
            lambda connection: read(connection, owner=self._maintenance.owner, clock=self._clock),
            default=default,
        )
