"""Conversations in the journal: the entries of one notebook and thread, and their positions.

The earlier turns of a request are stored as references to their entries. So deleting an entry
removes its words from every later one, and a long conversation is not written again with each turn.
`requests.conversation` decides which turns a request gets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from nbcodex.journal.codec import decode, sqlite_text
from nbcodex.journal.owner import Connection
from nbcodex.journal.sqlite_worker import Commit, SqliteWorker, blocking_transaction
from nbcodex.models import CarriedReasoning, Reply, Request, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnCandidate:
    """One entry's `TurnPosition`; of several entries at one, the newest done is the turn."""

    entry: int  # the entry's number in the journal; later entries have larger ones
    chapter: int
    number: int
    cell: str | None  # the id of the cell that sent the prompt
    is_done: bool  # whether it was answered
    starts_new: bool  # whether a new conversation starts with it


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A conversation: its latest chapter, and the entries of all chapters, oldest first."""

    chapter: int = 0
    candidates: tuple[TurnCandidate, ...] = ()


class ConversationStore:
    """A journal's conversations. Methods block; if the database fails, they give `on_failure()`."""

    def __init__(self, worker: SqliteWorker) -> None:
        self._worker = worker

    @blocking_transaction(on_failure=StoredConversation)
    def find_conversation(
        self, connection: Connection, notebook: str | None, thread: str
    ) -> StoredConversation:
        """Return a conversation, which may be empty."""
        where = {"notebook": sqlite_text(notebook), "thread": sqlite_text(thread)}
        # The index `entries_thread` holds all of these columns, so no entry is read.
        rows = connection.execute(
            """SELECT seq AS entry, chapter, place AS number, cell, status = 'done' AS is_done,
            begins AS starts_new FROM entries
            WHERE thread = :thread AND notebook IS :notebook AND place IS NOT NULL
            ORDER BY seq""",
            where,
        )
        candidates = tuple(TurnCandidate(**dict(row)) for row in rows)
        (latest,) = connection.execute(
            "SELECT max(id) FROM chapters WHERE thread = :thread AND notebook IS :notebook", where
        ).fetchone()
        # A chapter may have no entries yet, and one whose row has expired may still have some.
        chapters = [candidate.chapter for candidate in candidates]
        return StoredConversation(max([latest or 0, *chapters]), candidates)

    @blocking_transaction(on_failure=list)
    def read_turns(self, connection: Connection, entries: Collection[int]) -> list[Turn]:
        """Return the turns of the entries with these numbers, in order, without deleted ones."""
        return [turn for number in entries if (turn := _read_turn(connection, number))]

    @blocking_transaction()
    def read_prompt(self, connection: Connection, entry: int) -> str | None:
        """Return the prompt of an entry, answered or not; None if it is gone or damaged."""
        row = connection.execute("SELECT request FROM entries WHERE seq = ?", (entry,)).fetchone()
        request = row and decode(Request, row["request"])
        return request.prompt if request else None

    @blocking_transaction(Commit.POWER_SAFE, on_failure=int)
    def start_chapter(self, connection: Connection, notebook: str | None, thread: str) -> int:
        """Start the next chapter; return its number."""
        inserted = connection.execute(
            "INSERT INTO chapters (notebook, thread, begun_at) VALUES (?, ?, ?)",
            (sqlite_text(notebook), sqlite_text(thread), connection.clock.wall()),
        )
        return inserted.lastrowid or 0


def compact_turns(connection: Connection, turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """Return turns as they are stored: those of entries as references, without their words."""
    compact = []
    for turn in turns:
        # The answer is compared, too: since the turn was read, the journal may have changed from
        # its file to memory, or to a new file, where another entry may have the same number.
        found = turn.entry and connection.execute(
            "SELECT 1 FROM entries WHERE seq = ? AND status = 'done' AND text = ?",
            (turn.entry, turn.answer),
        )
        if found and found.fetchone():
            turn = Turn(prompt="", answer="", entry=turn.entry)
        compact.append(turn)
    return tuple(compact)


def resolve_turns(connection: Connection, turns: Iterable[object]) -> tuple[Turn, ...]:
    """Return what `compact_turns` received, without the turns whose entries were deleted."""
    # A turn that is stored with words came from the user's code, or from another file.
    found = [
        _read_turn(connection, turn.entry) if turn.entry and not turn.answer else turn
        for turn in turns
        if isinstance(turn, Turn)  # a damaged row may hold anything
    ]
    return tuple(turn for turn in found if turn is not None)


def _read_turn(connection: Connection, entry: int) -> Turn | None:
    """Return the turn of an entry; None if that was deleted, is damaged, or has no text."""
    row = connection.execute(
        "SELECT request, reply, text FROM entries WHERE seq = ? AND status = 'done'", (entry,)
    ).fetchone()
    # An empty answer is not a turn: servers refuse an assistant's message without text.
    if row is None or not row["text"].strip():
        return None
    request, reply = decode(Request, row["request"]), decode(Reply, row["reply"])
    if request is None or reply is None:
        return None
    turn = Turn(prompt=request.prompt, answer=row["text"], images=request.images, entry=entry)
    if not isinstance(carried := reply.carried, CarriedReasoning):
        return turn
    return replace(turn, carried=carried.items, model=carried.model, base_url=carried.base_url)
