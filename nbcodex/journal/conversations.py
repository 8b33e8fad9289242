"""Conversations in a journal: entries of one notebook and thread, in the order of their places.

Owns how a request's earlier turns are kept: as references, so that forgetting an entry takes its
words out of every later one, and a long conversation is not written anew with each turn.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from nbcodex.journal.codec import decode, storable
from nbcodex.journal.jobs import Level
from nbcodex.journal.opening import FAR
from nbcodex.models import CarriedReasoning, Reply, Request, Turn, TurnPosition
from nbcodex.runtime.clock import Clock

if TYPE_CHECKING:
    from nbcodex.journal.writer import Writer

Connection = sqlite3.Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnCandidate:
    """One entry's place in a conversation.

    Parameters
    ----------
    entry : int
        The entry; later ones have larger numbers.
    chapter, number : int
        Where it stands. Of several entries at one place, the newest that is done is the turn.
    cell : str or None
        The cell that asked.
    is_done : bool
        Whether it was answered.
    begins : bool
        Whether the conversation starts afresh with it.
    """

    entry: int
    chapter: int
    number: int
    cell: str | None
    is_done: bool
    begins: bool


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A conversation as the journal has it: its latest chapter, and all places, oldest first."""

    chapter: int = 0
    candidates: tuple[TurnCandidate, ...] = ()


class ConversationStore:
    """The conversations of one journal. Each read waits for the writer thread, and needs no loop.

    Parameters
    ----------
    writer : Writer
        The journal's thread.
    clock : Clock
        Dates the chapters.
    """

    def __init__(self, writer: Writer, clock: Clock) -> None:
        self._writer, self._clock = writer, clock

    def find_conversation(self, notebook: str | None, thread: str) -> StoredConversation:
        """Return a conversation, which is empty where nothing was said."""
        work = partial(find, notebook=notebook, thread=thread)
        return self._writer.ask(work, default=StoredConversation())

    def read_turns(self, entries: Iterable[int]) -> list[Turn]:
        """Return what was said in these entries, in their order, but for those that are gone."""
        work = partial(turns, entries=list(entries))
        return self._writer.ask(work, default=[])

    def read_prompt(self, entry: int) -> str | None:
        """Return what was asked in an entry, whatever came of it."""
        return self._writer.ask(partial(prompt, entry=entry), default=None)

    def start_chapter(self, notebook: str | None, thread: str) -> int:
        """Open the next chapter; return its number."""
        at = self._clock.wall()
        work = partial(begin_anew, notebook=notebook, thread=thread, at=at)
        return self._writer.ask(work, default=0, level=Level.SAFE)


def find(connection: Connection, *, notebook: str | None, thread: str) -> StoredConversation:
    """Return a conversation; the index holds all that this reads."""
    where = {"notebook": storable(notebook), "thread": storable(thread)}
    rows = connection.execute(
        """SELECT seq, chapter, place, cell, status, begins FROM entries
        WHERE thread = :thread AND notebook IS :notebook AND place IS NOT NULL ORDER BY seq""",
        where,
    )
    slots = tuple(
        TurnCandidate(
            entry=row["seq"],
            chapter=row["chapter"],
            number=row["place"],
            cell=row["cell"],
            is_done=row["status"] == "done",
            begins=bool(row["begins"]),
        )
        for row in rows
    )
    opened = connection.execute(
        "SELECT max(id) FROM chapters WHERE thread = :thread AND notebook IS :notebook", where
    ).fetchone()[0]
    return StoredConversation(max([opened or 0, *(slot.chapter for slot in slots)]), slots)


def turns(connection: Connection, *, entries: list[int]) -> list[Turn]:
    """Return what was said; an answer without a word is no turn."""
    found = (_turn(connection, entry) for entry in entries)
    return [turn for turn in found if turn is not None]


def prompt(connection: Connection, *, entry: int) -> str | None:
    """Return what was asked in an entry; None if it is gone or damaged."""
    row = connection.execute("SELECT request FROM entries WHERE seq = ?", (entry,)).fetchone()
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        request = decode(row["request"])
        return request.prompt if isinstance(request, Request) else None
    return None


def begin_anew(connection: Connection, *, notebook: str | None, thread: str, at: float) -> int:
    """Open the next chapter; return its number."""
    opened = connection.execute(
        "INSERT INTO chapters (notebook, thread, begun_at) VALUES (?, ?, ?)",
        (storable(notebook), storable(thread), at),
    )
    return opened.lastrowid or 0


def join(connection: Connection, request: Request) -> None:
    """Note an entry's place: behind all others, unless it has one."""
    place = request.origin.position
    connection.execute(
        """UPDATE entries SET thread = ?, chapter = ?, place = coalesce(?, seq), begins = ?
        WHERE id = ?""",
        (
            storable(request.thread),
            place.chapter,
            place.number,
            place.begins,
            storable(request.id),
        ),
    )


def without_words(connection: Connection, request: Request) -> Request:
    """Return a request whose turns name their entries, instead of saying them again.

    Those that another journal has numbered, which failed since they were read, are said.
    """
    if not any(turn.entry for turn in request.turns):
        return request
    here = _is_far(connection)
    named = (
        Turn(prompt="", answer="", entry=turn.entry)
        if turn.entry and (turn.entry >= FAR) == here
        else turn
        for turn in request.turns
    )
    return replace(request, turns=tuple(named))


def with_words(connection: Connection, request: Request) -> Request:
    """Return a request as it was asked; turns that were forgotten are gone."""
    said = [
        _turn(connection, turn.entry) if turn.entry and not turn.answer else turn
        for turn in request.turns
        if isinstance(turn, Turn)
    ]
    return replace(request, turns=tuple(turn for turn in said if turn is not None))


def place_of(row: sqlite3.Row) -> TurnPosition:
    """Return the place of an entry."""
    return TurnPosition(chapter=row["chapter"], number=row["place"], begins=bool(row["begins"]))


def _is_far(connection: Connection) -> bool:
    """Return whether this journal is in memory, and numbers entries as no file does."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchone()
    return row is not None and row["seq"] >= FAR


def _turn(connection: Connection, entry: int) -> Turn | None:
    """Return what was said in an entry; None if it is gone, damaged or without an answer."""
    row = connection.execute(
        "SELECT request, reply, text FROM entries WHERE seq = ? AND status = 'done'", (entry,)
    ).fetchone()
    if row is None or not row["text"].strip():
        return None
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        request, reply = decode(row["request"]), decode(row["reply"])
        if not (isinstance(request, Request) and isinstance(reply, Reply)):
            return None
        turn = Turn(prompt=request.prompt, answer=row["text"], images=request.images, entry=entry)
        carried = reply.carried
        if not isinstance(carried, CarriedReasoning):
            return turn
        return replace(turn, carried=carried.items, model=carried.model, base_url=carried.base_url)
    return None
