"""Map runs in the journal: their rows, how far each run is, and the batch jobs that hold rows.

A batch job is stored before it is submitted, and deleted only when its files at the provider are
erased. `nbcodex.mapping` submits the jobs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

from nbcodex.journal import writes
from nbcodex.journal.codec import sqlite_text
from nbcodex.journal.database import JournalDatabase
from nbcodex.journal.owner import Connection, is_abandoned, is_gone
from nbcodex.journal.reads import KEY_IS_ANSWERED, Entry, entries_of, find_answer, find_id
from nbcodex.journal.sqlite_worker import Commit, SqliteWorker, blocking_transaction, transaction
from nbcodex.models import Reply, Request

KeyedRequest = tuple[Request, bytes]  # a request and its `equality_key`

# In the file, `batch` is the map run of an entry, `part` is its batch job, `parts` are the batch
# jobs, `asides` what is reserved of the budget, and `book` the entries with their owners' columns.
# `salted` hashes an equality key with the file's `salt`: the file holds keys only as such hashes.


@dataclass(frozen=True, slots=True)
class BatchJob:
    """A batch job. Its first fields are the first columns of `parts`."""

    tag: str  # our name for the job, which the provider stores with it
    base_url: str  # the provider's
    file_id: str | None  # the provider's id of the input file; None if it is not stored yet
    remote_id: str | None  # the provider's id of the job; None likewise
    _: KW_ONLY
    requests: tuple[Request, ...] = ()  # its rows that this process has claimed
    is_awaited: bool = False  # whether a kernel waits for it


@dataclass(frozen=True, slots=True)
class InsertResult:
    """What `insert_rows` found in the journal, by the rows' ids."""

    answers: dict[str, Reply] = field(default_factory=dict)  # answers to equal requests
    # Tags of jobs that hold an equal request, and that no kernel is waiting for.
    tags_of_equal_rows: dict[str, str] = field(default_factory=dict)
    # Rows that another kernel has claimed, or that are finished.
    unavailable_ids: set[str] = field(default_factory=set)


class Maps:
    """A journal's map runs. Reads block; where the database fails, they return `on_failure()`."""

    def __init__(self, worker: SqliteWorker) -> None:
        self._worker = worker

    def insert_parked(self, rows: Sequence[KeyedRequest]) -> None:
        """Insert rows that were never started, as parked."""

        def work(connection: Connection) -> None:
            for request, key in rows:
                writes.insert(connection, request, key=key)  # an existing entry stays as it is
                connection.execute(
                    "UPDATE entries SET status = 'parked' WHERE id = ? AND status = 'pending'",
                    (sqlite_text(request.id),),
                )

        self._worker.post(work)

    @blocking_transaction(on_failure=set)
    def answered_keys(self, connection: Connection, keys: Collection[bytes]) -> set[bytes]:
        """Return those of `keys` that have an answer."""
        query = f"SELECT 1 FROM entries WHERE {KEY_IS_ANSWERED}"  # noqa: S608 - a constant
        return {key for key in keys if connection.execute(query, (key,)).fetchone()}

    def find_id(self, prefix: str) -> str | None:
        """Return the id of the map that begins with `prefix`; EntryError if several do."""
        return self._worker.call(partial(find_id, column="batch", prefix=prefix), default=None)

    @blocking_transaction(on_failure=list)
    def entries(self, connection: Connection, map_id: str) -> list[Entry]:
        """Return the rows of a map that are in the journal, in order."""
        rows = connection.execute("SELECT * FROM book WHERE batch = ?", (map_id,))
        # Sorted here, because an index on the order would slow down every insertion.
        return sorted(
            entries_of(connection, rows), key=lambda entry: entry.request.origin.row_index or 0
        )

    def count_rows(self, map_id: str) -> Counter[str]:
        """Return the number of a map's rows in each status, ``abandoned`` included."""
        return self._count_rows("batch = ?", map_id).get(map_id, Counter())

    @blocking_transaction(on_failure=bool)
    def has_batch_job(self, connection: Connection, map_id: str) -> bool:
        """Return whether rows of a map are in a batch job, or may be."""
        query = """SELECT EXISTS (SELECT 1 FROM entries WHERE batch = ? AND part IS NOT NULL
            AND status IN ('running', 'waiting', 'parked'))"""
        return bool(connection.execute(query, (map_id,)).fetchone()[0])

    def unfinished(self, *, notebook: str | None = None) -> list[str]:
        """Return the ids of maps with parked or abandoned rows: of one notebook, or of all."""
        counts_by_map = self._count_rows(
            """status IN ('pending', 'running', 'waiting', 'parked') AND batch IS NOT NULL
            AND (?1 IS NULL OR notebook = ?1)""",
            sqlite_text(notebook),
        )
        return [id_ for id_, n in counts_by_map.items() if n["parked"] or n["abandoned"]]

    @blocking_transaction(on_failure=dict)
    def _count_rows(
        self, connection: Connection, condition: str, value: str | None
    ) -> dict[str, Counter[str]]:
        """Return by map the number of rows in each status, of those that meet a condition."""
        counts_by_map: dict[str, Counter[str]] = {}
        rows = connection.execute(
            f"SELECT *, count(*) AS rows FROM book WHERE {condition} "  # noqa: S608 - constant
            "GROUP BY batch, status, owner ORDER BY min(seq)",
            (value,),
        )
        for row in rows:
            # The rows of a group share status and owner, so one of them represents the others.
            status = "abandoned" if is_abandoned(connection, row) else row["status"]
            counts_by_map.setdefault(row["batch"], Counter())[status] += row["rows"]
        return counts_by_map


class BatchJobs:
    """The batch jobs of a journal; each method is one transaction, committed before it returns."""

    def __init__(self, worker: SqliteWorker, database: JournalDatabase) -> None:
        self._worker, self._database = worker, database

    @transaction(Commit.POWER_SAFE, on_failure=InsertResult)
    def insert_rows(
        self, connection: Connection, rows: Sequence[KeyedRequest], *, existing_ids: Collection[str]
    ) -> InsertResult:
        """Commit rows as pending; those with ids in `existing_ids` have entries, to be claimed."""
        inserted = InsertResult()
        for request, key in rows:
            id_, server = request.id, request.origin.server
            if id_ not in existing_ids:
                writes.insert(connection, request, key=key)
            # Another kernel may have claimed a row of a resumed map since it was listed.
            elif not writes.claim(connection, id_, status="pending", server=server):
                inserted.unavailable_ids.add(id_)
                continue
            if not request.reuse:
                continue
            if reply := find_answer(connection, key, reply_id=id_):
                inserted.answers[id_] = reply
            elif tag := _find_other_job(connection, key):
                inserted.tags_of_equal_rows[id_] = tag
        if rows:
            # For the map itself, because its rows have no job before the upload.
            first, _ = rows[0]
            self._database.begin_heartbeats(connection, first.origin.map_id or first.id)
        return inserted

    @transaction(Commit.POWER_SAFE)
    def insert_job(
        self, connection: Connection, tag: str, requests: Collection[Request], *, base_url: str
    ) -> None:
        """Commit that rows of this kernel are about to be submitted as the job `tag`."""
        # Stored before it is submitted: after a crash, the job is found by its tag.
        at, owner = connection.clock.wall(), connection.owner.id
        connection.execute(
            "INSERT INTO parts (tag, base_url, owner) VALUES (?, ?, ?)", (tag, base_url, owner)
        )
        connection.executemany(
            """UPDATE entries SET part = ?, status = 'waiting', attempts = attempts + 1,
            updated_at = ? WHERE id = ? AND owner = ?""",
            [(tag, at, sqlite_text(request.id), owner) for request in requests],
        )
        self._database.begin_heartbeats(connection, tag)

    @transaction(Commit.POWER_SAFE)
    def set_remote_ids(
        self,
        connection: Connection,
        tag: str,
        *,
        file_id: str | None = None,
        remote_id: str | None = None,
    ) -> None:
        """Commit the provider's ids of a job's file and of the job, as far as given."""
        connection.execute(
            """UPDATE parts SET file = coalesce(?, file), remote = coalesce(?, remote)
            WHERE tag = ?""",
            (sqlite_text(file_id), sqlite_text(remote_id), tag),
        )

    @transaction(Commit.POWER_SAFE)
    def claim_job(self, connection: Connection, tag: str) -> BatchJob | None:
        """Claim the unfinished rows of a job; None if there is no such job."""
        job = connection.execute("SELECT * FROM parts WHERE tag = ?", (tag,)).fetchone()
        if job is None:
            return None
        rows = connection.execute("SELECT * FROM book WHERE part = ?", (tag,))
        # Their status is not ``running``, because they wait for the provider.
        claimed = tuple(
            entry.request
            for entry in entries_of(connection, rows)
            if writes.claim(connection, entry.id, status="waiting")
        )
        if claimed:
            owner = connection.owner.id
            connection.execute("UPDATE parts SET owner = ? WHERE tag = ?", (owner, tag))
            self._database.begin_heartbeats(connection, tag)
        return BatchJob(*job[:4], requests=claimed)

    @transaction(Commit.POWER_SAFE)
    def finish_rows(
        self, connection: Connection, endings: Sequence[tuple[Reply, str | None]]
    ) -> None:
        """Commit the endings of rows, each a reply and, if there is no answer, the reason."""
        for reply, error in endings:
            writes.finish(connection, reply, error)
        connection.executemany(
            "UPDATE entries SET part = NULL WHERE id = ? AND owner = ?",
            [(sqlite_text(reply.id), connection.owner.id) for reply, _ in endings],
        )

    @transaction(Commit.POWER_SAFE)
    def withdraw_job(self, connection: Connection, tag: str) -> None:
        """Commit that the provider did not accept a job: its rows are pending, and in no job."""
        # The rows are not parked: this kernel uploads them again, or ends them.
        connection.execute(
            """UPDATE entries SET part = NULL, status = 'pending'
            WHERE part = ? AND owner = ? AND status = 'waiting'""",
            (tag, connection.owner.id),
        )
        _delete_job(connection, tag)
        self._database.end_heartbeats(tag)

    @transaction(Commit.POWER_SAFE)
    def close_job(self, connection: Connection, tag: str, *, erased: bool) -> None:
        """End the heartbeats of a job; delete it if its files at the provider are `erased`."""
        if erased:  # otherwise the job stays, so that its files are erased later
            _delete_job(connection, tag)
        self._end_wait(connection, tag)

    @transaction(Commit.POWER_SAFE)
    def park_rows(
        self, connection: Connection, *, in_jobs: Collection[str] = (), ids: Collection[str] = ()
    ) -> None:
        """Park the rows in the jobs of these tags, and other rows; end the jobs' heartbeats."""
        owner = connection.owner.id
        set_parked = "UPDATE entries SET status = 'parked' WHERE owner = ? AND status IN "
        connection.executemany(
            f"{set_parked} ('waiting', 'running') AND part = ?", [(owner, tag) for tag in in_jobs]
        )
        connection.executemany(
            f"{set_parked} ('pending', 'running') AND id = ?",
            [(owner, sqlite_text(id_)) for id_ in ids],
        )
        # Rows at a provider may still be charged, so their budget stays reserved.
        connection.executemany(
            """DELETE FROM asides WHERE id = ? AND NOT EXISTS (SELECT 1 FROM entries
            WHERE entries.id = asides.id AND part IS NOT NULL)""",
            [(sqlite_text(id_),) for id_ in ids],
        )
        for tag in in_jobs:
            self._end_wait(connection, tag)

    def _end_wait(self, connection: Connection, tag: str) -> None:
        connection.execute(
            "UPDATE parts SET owner = NULL WHERE tag = ? AND owner = ?", (tag, connection.owner.id)
        )
        self._database.end_heartbeats(tag)

    @transaction(Commit.READ_ONLY)  # writes nothing, but must run on the worker's thread
    def end_map_heartbeats(self, _: Connection, map_id: str) -> None:
        """End the heartbeats of a map whose rows are all in a job, or have ended."""
        self._database.end_heartbeats(map_id)

    @transaction(Commit.READ_ONLY, on_failure=list)
    def unerased_jobs(self, connection: Connection) -> list[BatchJob]:
        """Return the jobs whose rows have all ended, but whose files were not erased yet."""
        # Their files hold prompts, and the kernel that should have erased them may have died.
        rows = connection.execute(
            """SELECT * FROM parts LEFT JOIN owners ON owners.id = owner WHERE file IS NOT NULL
            AND NOT EXISTS (SELECT 1 FROM entries WHERE part = tag
            AND status NOT IN ('done', 'failed', 'cancelled'))"""
        )
        # A kernel may wait for a job although its rows were deleted.
        return [BatchJob(*row[:4], is_awaited=not is_gone(connection, row)) for row in rows]


def _find_other_job(connection: Connection, key: bytes) -> str | None:
    """Return the job that holds an equal request, if no kernel is waiting for it."""
    rows = connection.execute(
        """SELECT book.* FROM book JOIN parts ON parts.tag = book.part WHERE book.key =
        salted(?, (SELECT value FROM salt)) AND book.status IN ('waiting', 'parked')""",
        (key,),
    )
    # While another kernel waits for that job, only that kernel fetches its answers, and it may
    # never do so: the row is then sent by itself.
    for row in rows:
        if row["status"] == "parked" or is_abandoned(connection, row):
            return str(row["part"])
    return None


def _delete_job(connection: Connection, tag: str) -> None:
    connection.execute("DELETE FROM parts WHERE tag = ?", (tag,))
    connection.execute("UPDATE entries SET part = NULL WHERE part = ?", (tag,))
