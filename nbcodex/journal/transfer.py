"""What goes along when memory stands in for a file that fails, and what is brought back to it.

Owns that entries keep their words and their places on the way, whatever numbers they have on the
other side. Must not know why and when it goes that way.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Mapping
from dataclasses import replace

from nbcodex.journal.codec import decode, encode
from nbcodex.journal.conversations import with_words, without_words
from nbcodex.models import Request

Connection = sqlite3.Connection

_SELECT = """SELECT seq, id, status, owner, notebook, cell, variable, key, added_at, updated_at,
    attempts, resume_at, limits, error, response_id, sequence, request, reply, text, batch, item,
    listed, part, thread, chapter, place, begins FROM entries"""
_INSERT = """INSERT INTO entries (seq, id, status, owner, notebook, cell, variable, key, added_at,
    updated_at, attempts, resume_at, limits, error, response_id, sequence, request, reply, text,
    batch, item, listed, part, thread, chapter, place, begins)
    VALUES (:seq, :id, :status, :owner, :notebook, :cell, :variable, :key, :added_at,
    :updated_at, :attempts, :resume_at, :limits, :error, :response_id, :sequence, :request, :reply,
    :text, :batch, :item, :listed, :part, :thread, :chapter, :place, :begins)
    ON CONFLICT (id) DO UPDATE SET status = excluded.status, updated_at = excluded.updated_at,
    attempts = excluded.attempts, resume_at = excluded.resume_at, limits = excluded.limits,
    error = excluded.error, response_id = excluded.response_id, sequence = excluded.sequence,
    reply = excluded.reply, text = excluded.text, part = excluded.part
    WHERE owner = excluded.owner OR (excluded.status = 'done' AND status <> 'done')"""


def to_memory(file: Connection, memory: Connection, *, owner: int) -> int:
    """Take along what is one owner's and unanswered; return the file's latest chapter."""
    salt = file.execute("SELECT value FROM salt").fetchone()
    chapters = _chapters(file, after=0)
    memory.execute("UPDATE salt SET value = ?", tuple(salt))
    _open(memory, chapters)
    rows = file.execute(f"{_SELECT} WHERE owner = ? AND status <> 'done' ORDER BY seq", (owner,))
    for row in rows:
        values = dict(row)
        values["request"] = _addressed(row, file, memory, {})
        memory.execute(_INSERT, values)
    _copy_parts(file, memory)
    return max((chapter["id"] for chapter in chapters), default=0)


def to_file(memory: Connection, file: Connection, *, chapter: int) -> None:
    """Bring all entries back, and the chapters that were opened after `chapter`.

    Those that are new to the file are numbered anew; what another owner claimed meanwhile stays
    his.
    """
    numbers: dict[int, int] = {}
    for row in memory.execute(f"{_SELECT} ORDER BY seq"):
        values = dict(row)
        own, values["seq"] = row["seq"], None
        values["request"] = _addressed(row, memory, file, numbers)
        values["place"] = None if row["place"] == own else numbers.get(row["place"], row["place"])
        file.execute(_INSERT, values)
        if row["thread"] is not None:
            found = file.execute("SELECT seq FROM entries WHERE id = ?", (row["id"],)).fetchone()
            numbers[own] = found["seq"]
    file.execute("UPDATE entries SET place = seq WHERE thread IS NOT NULL AND place IS NULL")
    # A process goes on with a chapter by its number: that stays, even if the file has it by now.
    _open(file, _chapters(memory, after=chapter))
    _copy_parts(memory, file)


def _addressed(
    row: sqlite3.Row, source: Connection, target: Connection, numbers: Mapping[int, int]
) -> str:
    """Return an entry's request as `target` is to have it.

    Earlier turns that are there, under their new `numbers`, are named; the others are said.
    """
    text: str = row["request"]
    if row["batch"] is not None:  # of many rows, none has turns
        return text
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        request = decode(text)
        if isinstance(request, Request) and request.turns:
            request = with_words(source, request)
            turns = (replace(t, entry=numbers.get(t.entry or 0, t.entry)) for t in request.turns)
            return encode(without_words(target, replace(request, turns=tuple(turns))))
    return text


def _chapters(connection: Connection, *, after: int) -> list[sqlite3.Row]:
    return connection.execute(
        "SELECT id, notebook, thread, begun_at FROM chapters WHERE id > ?", (after,)
    ).fetchall()


def _open(connection: Connection, chapters: list[sqlite3.Row]) -> None:
    connection.executemany("INSERT OR IGNORE INTO chapters VALUES (?, ?, ?, ?)", chapters)


def _copy_parts(source: Connection, target: Connection) -> None:
    target.executemany(
        """INSERT INTO parts VALUES (?, ?, ?, ?) ON CONFLICT (tag) DO UPDATE
        SET file = coalesce(excluded.file, file), remote = coalesce(excluded.remote, remote)""",
        source.execute("SELECT tag, base_url, file, remote FROM parts"),
    )
