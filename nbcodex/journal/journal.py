"""The journal: every request of a user, from before it is sent until it is deleted.

Runs the functions of `writes` and `reads` on the database's worker thread. Nothing here raises
because a disk is full or a file is damaged: the journal then continues in memory, and `problem`
says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from nbcodex.errors import EntryError
from nbcodex.journal import reads, spending, writes
from nbcodex.journal.codec import bounded_integer, encode, finite_or_none, sqlite_text
from nbcodex.journal.conversations import ConversationStore
from nbcodex.journal.database import JournalDatabase
from nbcodex.journal.maps import BatchJobs, Maps
from nbcodex.journal.owner import Connection
from nbcodex.journal.reads import Entry, JournalReads
from nbcodex.journal.spending import SpendAmount, Spending
from nbcodex.journal.sqlite_worker import Commit, SqliteWorker, transaction
from nbcodex.models import Reply, Request, UsageTotals
from nbcodex.runtime.clock import BootClock, Clock
from nbcodex.settings import JOURNAL_FILENAME


class Journal(JournalReads):
    """Every request of this user: in a file in `folder`, or only in memory if that is None."""

    def __init__(self, folder: Path | None = None, *, clock: Clock | None = None) -> None:
        self._database = JournalDatabase(folder, clock or BootClock())
        self._worker = SqliteWorker(self._database)
        self._has_interrupted = False  # whether Stop, or a front end, has ended a request
        self.maps = Maps(self._worker)
        self.batch_jobs = BatchJobs(self._worker, self._database)
        self.conversations = ConversationStore(self._worker)

    @property
    def problem(self) -> str | None:
        """Why the file is not used, and what follows; None if it is, or before the first use."""
        return self._database.problem

    @property
    def location(self) -> str:
        """Where entries are, as the end of a sentence."""
        folder = self._database.folder
        return f"in {folder / JOURNAL_FILENAME}" if folder else "in this kernel's memory"

    @transaction(Commit.POWER_SAFE)
    def insert(
        self,
        connection: Connection,
        request: Request,
        *,
        key: bytes | None = None,
        attempt: int | None = None,
    ) -> None:
        """Commit `request` as pending: once this returns, it may be sent.

        `key` is its `equality_key`, by which `find_answer` finds its answer. `attempt` is the
        number of the attempt that is about to be sent, if one is, as for `start_attempt`.
        """
        insert = partial(writes.insert, request=request, key=key, attempt=attempt)
        insert(connection)
        self._database.begin_heartbeats(connection, request.id, insert=insert)

    # PROCESS_SAFE: a power failure may lose this, and with it only the warning that the request may
    # be charged twice.
    @transaction(Commit.PROCESS_SAFE)
    def start_attempt(
        self, connection: Connection, id_: str, attempt: int, *, continues: bool = False
    ) -> None:
        """Commit that attempt number `attempt`, counted from 1, is about to be sent."""
        # With `continues`, it continues the durable response of the entry. Any other attempt asks
        # for a new response, whose id is not known yet: with the old id, a resumed request would
        # fetch an answer that was given up.
        _update(
            connection,
            id_,
            """status = 'running', attempts = :attempt, resume_at = NULL,
            response_id = CASE WHEN :continues THEN response_id END,
            sequence = CASE WHEN :continues THEN sequence END""",
            attempt=bounded_integer(attempt),
            continues=continues,
        )

    async def record_wait(
        self, id_: str, resume_at: float | None = None, *, notes: tuple[str, ...] = ()
    ) -> None:
        """Note that the request waits until `resume_at` (seconds since the epoch)."""
        # `finish` will store the whole reply; until then, its notes have to outlive a crash.
        change = partial(
            _update,
            id_=id_,
            changes="status = 'waiting', resume_at = :resume_at, reply = coalesce(:reply, reply)",
            resume_at=finite_or_none(resume_at),
            reply=encode(Reply(id=id_, notes=notes)) if notes else None,
        )
        # Not awaited: later calls see the change all the same, as the worker keeps the order.
        self._worker.post(change)

    async def update_text(self, id_: str, text: str, *, sequence: int | None = None) -> None:
        """Store the whole text so far, and the last event of a durable response that is in it."""
        # Both in one commit, so that a stream is continued exactly where the text ends. Not
        # awaited, because a slow disk must not hold up a stream.
        change = partial(
            _update,
            id_=id_,
            changes="text = :text, sequence = coalesce(:sequence, sequence)",
            text=sqlite_text(text),
            sequence=None if sequence is None else bounded_integer(sequence),
        )
        self._worker.post(change)

    @transaction(Commit.POWER_SAFE)
    def set_response_id(self, connection: Connection, id_: str, response_id: str) -> None:
        """Commit which durable response carries the answer."""
        _update(connection, id_, "response_id = :response", response=sqlite_text(response_id))

    @transaction(Commit.POWER_SAFE)
    def finish(
        self,
        connection: Connection,
        reply: Reply,
        *,
        error: str | None = None,
        resume_at: float | None = None,
        spent_if_unknown: SpendAmount | None = None,
    ) -> None:
        """Commit the ending of a request: once this returns, the answer may be shown.

        `error` says why there is no answer; `resume_at` is when a parked request may be sent, in
        seconds since the epoch; `spent_if_unknown` counts if the reply states no usage.
        """
        self._has_interrupted |= reply.status == "interrupted"
        writes.finish(connection, reply, error, resume_at=resume_at, if_unknown=spent_if_unknown)
        self._database.end_heartbeats(reply.id)

    @transaction(Commit.POWER_SAFE, on_failure=bool)  # not claimed
    def claim(self, connection: Connection, id_: str, *, server: str | None = None) -> bool:
        """Do what `writes.claim` does; return whether this kernel owns the entry now."""
        if claimed := writes.claim(connection, id_, server=server):
            self._database.begin_heartbeats(connection, id_)
        return claimed

    @transaction(Commit.PROCESS_SAFE, on_failure=Spending)  # nothing is spent
    def reserve_budget(
        self,
        connection: Connection,
        id_: str,
        amount: SpendAmount,
        *,
        today: str,
        allowed: Callable[[Spending], bool],
    ) -> Spending:
        """Reserve `amount` if `allowed` accepts what all kernels had used before; return that."""
        # `allowed` is called in a write transaction, so one kernel decides at a time.
        spending.release_for_dead_kernels(connection)
        spending.release(connection, sqlite_text(id_))  # of an earlier run of the request
        before = spending.read_spending(connection, today=today)
        if allowed(before):
            spending.reserve(connection, sqlite_text(id_), amount)
            self._database.ensure_heartbeat(connection)
        return before

    @transaction(Commit.POWER_SAFE)
    def count_spending(
        self, connection: Connection, replies: Sequence[Reply], *, if_unknown: SpendAmount | None
    ) -> None:
        """Commit what requests have used whose entries another journal holds; see `finish`."""
        for reply in replies:
            writes.commit_spending(connection, reply, if_unknown=if_unknown)

    @transaction(Commit.POWER_SAFE)
    def reset_spending(self, connection: Connection) -> None:
        """Set the counters of all days to zero; what running requests have reserved stays."""
        connection.execute("DELETE FROM spending")

    @transaction(Commit.POWER_SAFE)
    def set_budget(self, connection: Connection, budget: str) -> None:
        """Commit the budget that all kernels keep to; an empty one lifts it."""
        spending.set_budget(connection, budget)

    async def delete(self, prefix: str | None = None) -> int:
        """Delete the entry or map whose id begins with `prefix`, or all; return how many entries.

        Their text is in no file any more as soon as no other process reads SQLite's write-ahead
        log. The totals stay. Raises EntryError if no id or several begin with `prefix`, or if the
        file cannot be written now.
        """

        def work(connection: Connection) -> int:
            if self._database.is_fallback:
                raise EntryError(f"Nothing can be erased now. {self.problem}")
            where, values = reads.where_clause(connection, prefix)
            if prefix is None:  # chapters hold the names of notebooks and threads
                connection.execute("DELETE FROM chapters")
            # `secure_delete` overwrites the text in the file; the log still holds it until the
            # checkpoint, which is due at once.
            self._database.checkpoint_at = 0.0
            return connection.execute(f"DELETE FROM entries {where}", values).rowcount  # noqa: S608 - constants

        deleted = await self._worker.run(work, level=Commit.POWER_SAFE, default=0)
        # The checkpoint follows that transaction; an empty job after it waits until it is over.
        await self._worker.run(lambda _: None, default=None)
        return deleted

    def shut_down(self, *, max_interruption_age: float) -> None:
        """Close as the process ends; park what was interrupted in its last seconds."""

        # A front end interrupts a kernel before it restarts it: the user did not press Stop then.
        def park_interrupted(connection: Connection) -> None:
            at = connection.clock.wall()
            connection.execute(
                """UPDATE entries SET status = 'parked', updated_at = ?
                WHERE owner = ? AND status = 'interrupted' AND updated_at >= ?""",
                (at, connection.owner.id, at - max_interruption_age),
            )

        if self._has_interrupted:
            self._worker.post(park_interrupted)
        self.close()

    def close(self) -> None:
        """Close the file; what is unfinished here is abandoned from now on."""
        self._worker.close()

    @transaction(Commit.READ_ONLY)
    def find_answer(self, connection: Connection, key: bytes, *, reply_id: str) -> Reply | None:
        """Return the newest answer to an equal request, as a free reply with the id `reply_id`."""
        return reads.find_answer(connection, key, reply_id=reply_id)

    @transaction(Commit.READ_ONLY, on_failure=Spending)
    def read_spending(self, connection: Connection, today: str) -> Spending:
        """Return what is spent on this day (an ISO date) and in its month, and reserved."""
        return spending.read_spending(connection, today=today)

    def find_entry(self, prefix: str) -> Entry:
        """Return the one entry whose id begins with `prefix`; EntryError if there is not one."""
        found = self._worker.call(partial(reads.find_entry, prefix=prefix), default=None)
        if found is None:
            raise EntryError(f"The journal cannot be read now. {self.problem or ''}")
        return found

    def read_totals(self) -> UsageTotals:
        """Return the totals of all time, deleted entries included."""
        return self._worker.call(spending.read_totals, default=UsageTotals())


def _update(connection: Connection, id_: str, changes: str, **values: object) -> None:
    """Change columns of an entry, with named `values`, unless another kernel has claimed it."""
    ours = {"id": sqlite_text(id_), "owner": connection.owner.id}
    connection.execute(
        f"UPDATE entries SET {changes}, updated_at = :at WHERE id = :id AND owner = :owner",  # noqa: S608 - constants
        {**values, **ours, "at": connection.clock.wall()},
    )
