"""The journal: what survives the kernel.

Owns the verbs that the engine awaits and the reads that the notebook asks. Each await costs the
loop some microseconds: the work is done on the database's writer thread. Nothing here raises
because a disk is full or a file is damaged; `trouble` says so instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

from nbcodex.errors import EntryError
from nbcodex.journal import reads, spending, writes
from nbcodex.journal.batch_jobs import BatchJobs
from nbcodex.journal.codec import Entry, counted, storable
from nbcodex.journal.conversations import ConversationStore
from nbcodex.journal.database import Connection, Database
from nbcodex.journal.jobs import Level
from nbcodex.journal.maintenance import Upkeep
from nbcodex.journal.maps import Maps, named
from nbcodex.journal.reads import OtherKernels, look
from nbcodex.journal.spending import SpendAmount, Spending
from nbcodex.journal.writer import Writer
from nbcodex.models import DAY, Limit, Reply, Request, UsageTotals
from nbcodex.runtime.clock import BootClock, Clock
from nbcodex.settings import Settings, data_folder

RETENTION = 90 * DAY
"""Seconds for which an entry is kept after its last change, unless chosen otherwise."""


class Journal:
    """Every request of this user, from before it is sent until it is forgotten.

    Parameters
    ----------
    folder : Path or None
        Where the file lies; None keeps the journal in memory, as long as the process lives.
    clock : Clock
        Heartbeats, ages and retries are told by it.
    retention : float or None
        Seconds for which entries are kept after their last change; None keeps them for ever.
    patience : float
        Seconds to wait, at most, for another process that holds the file locked.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        clock: Clock | None = None,
        retention: float | None = RETENTION,
        patience: float = 10.0,
    ) -> None:
        self._clock = clock or BootClock()
        self._upkeep = Upkeep(clock=self._clock, retention=retention)
        self._database = Database(folder, clock=self._clock, keeper=self._upkeep, patience=patience)
        self._writer = Writer(self._database)
        self._session = UsageTotals()
        self._interrupted = False

    @classmethod
    def from_settings(cls, settings: Settings, *, clock: Clock | None = None) -> Self:
        """Return the journal in the folder that `settings` name."""
        return cls(data_folder(settings), clock=clock)

    def __repr__(self) -> str:
        return f"<Journal {self._database.folder or 'in memory'}: {self.problem or 'in order'}>"

    @property
    def problem(self) -> str | None:
        """What cannot be kept now, and why; None while all is well, or before the first use."""
        return self._database.trouble

    @property
    def maps(self) -> Maps:
        """The maps, whose rows are entries."""
        return Maps(self._writer, self._upkeep, self._clock)

    @property
    def batch_jobs(self) -> BatchJobs:
        """The parts of maps that are with a provider."""
        return BatchJobs(self._writer, self._upkeep, self._clock)

    @property
    def session_totals(self) -> UsageTotals:
        """Counters of this journal since it was made, in this process."""
        return self._session

    @property
    def conversations(self) -> ConversationStore:
        """The conversations in it."""
        return ConversationStore(self._writer, self._clock)

    async def insert(
        self,
        request: Request,
        *,
        notebook: str | None = None,
        cell: str | None = None,
        variable: str | None = None,
        key: bytes | None = None,
        attempt: int | None = None,
    ) -> None:
        """Commit `request` as pending: when this returns, it may be sent.

        Parameters
        ----------
        notebook, cell, variable : str or None
            Where it was asked, and the name that the answer is to be bound to.
        key : bytes or None
            `equality_key` of the request, under which `answered` finds its answer.
        attempt : int or None
            The attempt that is about to be sent, where one is: as if `begin` were called, too.
        """
        insert = partial(
            writes.insert,
            request=request,
            at=self._clock.wall(),
            notebook=notebook,
            cell=cell,
            variable=variable,
            key=key,
            attempt=attempt,
        )

        def work(connection: Connection) -> None:
            own_insert = partial(insert, owner=self._upkeep.owner)
            own_insert(connection)
            self._upkeep.busy(connection, request.id, insert=own_insert)

        self._session = self._session.plus(UsageTotals(requests=1))
        await self._writer.run(work, level=Level.SAFE, default=None)

    async def start_attempt(self, id_: str, attempt: int, *, continues: bool = False) -> None:
        """Note that attempt number `attempt`, counted from 1, is about to be sent.

        Unless it picks up the durable response that is known, it asks for a new one: the entry
        then names none until `remember_remote`.
        """
        work = self._owned(partial(writes.begin, id_=id_, attempt=attempt, picks_up=continues))
        await self._writer.run(work, level=Level.WRITE, default=None)

    async def record_wait(
        self,
        id_: str,
        resume_at: float | None = None,
        limit: Limit | None = None,
        *,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Note that the request waits until `resume_at` (seconds since the epoch) for `limit`.

        `notes` are what its reader should know by now. Like `keep` it returns at once and is
        written in its turn: every call after it sees it.
        """
        self._writer.post(
            self._owned(
                partial(writes.wait, id_=id_, resume_at=resume_at, limit=limit, notes=notes)
            )
        )

    async def update_text(self, id_: str, text: str, *, sequence: int | None = None) -> None:
        """Keep the whole text so far; of a durable response, also the last event in it.

        Both in one commit, so that a stream is taken up exactly where the text ends. Meant to be
        called once a second at most: the text is written anew each time. It does not wait for the
        disk, so that a slow one never holds up a stream.
        """
        self._writer.post(self._owned(partial(writes.keep, id_=id_, text=text, sequence=sequence)))

    async def set_response_id(
        self, id_: str, response_id: str, sequence: int | None = None
    ) -> None:
        """Note which durable response carries the answer, and its last event seen."""
        change = partial(writes.remember, id_=id_, response_id=response_id, sequence=sequence)
        await self._writer.run(self._owned(change), level=Level.SAFE, default=None)

    async def finish(
        self,
        id_: str,
        reply: Reply,
        *,
        error: str | None = None,
        resume_at: float | None = None,
        assumed: SpendAmount | None = None,
    ) -> None:
        """Commit what came of the request: when this returns, the answer may be shown.

        Parameters
        ----------
        reply : Reply
            Its `status` is the entry's from now on. `parsed` is not kept: it is made of the text.
        error : str or None
            Why there is no answer.
        resume_at : float or None
            When a parked request may go, in seconds since the epoch.
        otherwise : Spent or None
            What it counts for where the reply does not tell what it used.
        """

        def work(connection: Connection) -> None:
            writes.finish(
                connection,
                id_,
                owner=self._upkeep.owner,
                at=self._clock.wall(),
                reply=reply,
                error=error,
                resume_at=resume_at,
                otherwise=assumed,
            )
            self._upkeep.idle(id_)

        self._interrupted |= reply.status == "interrupted"
        await self._writer.run(work, level=Level.SAFE, default=None)
        if not reply.reused:
            self._session = self._session.plus(counted(reply))

    async def claim(self, id_: str) -> bool:
        """Take over an entry that is parked, abandoned, interrupted or failed.

        Returns
        -------
        bool
            Whether it is ours now, and `running`. Of all kernels that try at once, one gets it.
        """

        def work(connection: Connection) -> bool:
            owner, at = self._upkeep.owner, self._clock.wall()
            won = writes.claim(connection, id_, owner=owner, at=at, clock=self._clock)
            if won:
                self._upkeep.busy(connection, id_)
            return won

        return await self._writer.run(work, level=Level.SAFE, default=False)

    async def find_answer(self, key: bytes) -> Reply | None:
        """Return the newest answer to an equal request, marked as reused and at no cost."""
        entry = await self._writer.run(
            lambda connection: reads.answered(connection, key), level=Level.READ, default=None
        )
        return reads.reused(entry.reply) if entry else None

    async def read_spending(self, today: str) -> Spending:
        """Return what was used on this day (an ISO date) and its month, and what is set aside."""
        return await self._writer.run(
            lambda connection: spending.seen(connection, today=today),
            level=Level.READ,
            default=Spending(),
        )

    async def reserve_budget(
        self, id_: str, amount: SpendAmount, *, today: str, allowed: Callable[[Spending], bool]
    ) -> Spending:
        """Set aside what a request may come to until `finish`, if that is `allowed`.

        Of all kernels one at a time is asked, by what they all have used and set aside; returns
        that as it was before.
        """

        def work(connection: Connection) -> Spending:
            self._upkeep.bury(connection)
            spending.release(connection, storable(id_))
            before = spending.seen(connection, today=today)
            if allowed(before):
                owner = self._upkeep.owner.id
                spending.set_aside(connection, storable(id_), amount, owner=owner)
                self._upkeep.alive(connection)
            return before

        return await self._writer.run(work, level=Level.WRITE, default=Spending())

    async def set_budget(self, budget: str) -> None:
        """Keep the budget that all kernels hold to; an empty one lifts it."""
        await self._writer.run(
            lambda connection: spending.keep(connection, budget), level=Level.SAFE, default=None
        )

    async def delete(self, prefix: str | None = None, *, before: float | None = None) -> int:
        """Erase the entry or the map that `prefix` names, or those added before an instant, or all.

        The text is overwritten in the file and leaves its write-ahead log too, at the latest when
        the last process that reads it is done. Counters stay.

        Returns
        -------
        int
            How many were erased.

        Raises
        ------
        EntryError
            If `prefix` names no entry or several, or if the file cannot be written now.
        """

        def work(connection: Connection) -> int:
            if self._database.fallen:
                raise EntryError(f"Nothing can be erased now. {self.problem}")
            if prefix is None:
                return writes.erase(connection, before=before)
            if batch := named(connection, prefix):
                return writes.erase(connection, batch=batch)
            return writes.erase(connection, id_=self._find(connection, prefix).id)

        erased = await self._writer.run(work, level=Level.SAFE, default=0)
        await self._writer.run(self._upkeep.checkpoint, level=Level.BARE, default=None)
        return erased

    def recent_entries(self, limit: int = 20, *, notebook: str | None = None) -> list[Entry]:
        """Return entries, newest first: of one notebook, or of all.

        Like all reads that are not awaited, it makes the calling thread wait for the writer thread
        and needs no loop.
        """
        return self._writer.ask(
            lambda connection: reads.newest(
                connection,
                limit=limit,
                notebook=notebook,
                owner=self._upkeep.owner,
                clock=self._clock,
            ),
            default=[],
        )

    def resumable_entries(self, *, notebook: str | None = None) -> list[Entry]:
        """Return what is parked or abandoned, oldest first: in one notebook, or everywhere."""
        return self._writer.ask(
            lambda connection: reads.unfinished(
                connection, notebook=notebook, owner=self._upkeep.owner, clock=self._clock
            ),
            default=[],
        )

    def find_entry(self, prefix: str) -> Entry:
        """Return the one entry whose id begins with `prefix`.

        Raises
        ------
        EntryError
            If there is none, or more than one (the message lists them), or if it is damaged.
        """
        found = self._writer.ask(lambda connection: self._find(connection, prefix), default=None)
        if found is None:
            raise EntryError(f"The journal cannot be read now. {self.problem or ''}")
        return found

    def read_totals(self) -> UsageTotals:
        """Return the counters of all time: kept as such, so that nothing is scanned."""
        return self._writer.ask(reads.totals, default=UsageTotals())

    def other_kernels(self) -> OtherKernels:
        """Return what other kernels of this user have under way."""
        return self._writer.ask(
            lambda connection: look(connection, owner=self._upkeep.owner, clock=self._clock),
            default=OtherKernels(),
        )

    def shut_down(self, *, within: float) -> None:
        """Close because the process ends: what was interrupted just before is parked.

        Parameters
        ----------
        within : float
            Seconds before the end in which an interrupt belongs to it.
        """
        if self._interrupted:
            deed = partial(writes.keep_what_the_end_stopped, within=within)
            self._writer.post(self._owned(deed))
        self.close()

    def close(self) -> None:
        """Let the file go; what is still under way here is abandoned from now on."""
        self._writer.close()

    def _owned(self, change: Callable[..., None]) -> Callable[[Connection], None]:
        """Return `change` as a job that is done as ourselves, and dated."""

        def work(connection: Connection) -> None:
            change(connection, owner=self._upkeep.owner, at=self._clock.wall())

        return work

    def _find(self, connection: Connection, prefix: str) -> Entry:
        return reads.find(connection, prefix, owner=self._upkeep.owner, clock=self._clock)
