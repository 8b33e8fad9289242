"""What was used on which day, what is set aside, and the budget that all kernels hold to.

Owns the counters by day, what requests under way may come to, and the kept budget, each as one
function on a connection; and that all of them hold while memory stands in for the file.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from typing import Literal, Self

from nbcodex.journal.codec import finite, whole
from nbcodex.models import Reply

Connection = sqlite3.Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendAmount:
    """Tokens, input and output together, and US dollars as far as prices are known."""

    tokens: int = 0
    dollars: float = 0.0

    @classmethod
    def of_reply(cls, reply: Reply, *, assumed: Self) -> Self:
        """Return what `reply` used; where it does not say, what is in `otherwise`."""
        usage = reply.usage
        if usage.input_tokens is None and usage.output_tokens is None:
            return assumed
        tokens = whole(whole(usage.input_tokens) + whole(usage.output_tokens))
        return cls(tokens=tokens, dollars=max(0.0, finite(reply.cost) or 0.0))

    def plus(self, other: SpendAmount) -> SpendAmount:
        """Return both together."""
        return SpendAmount(tokens=self.tokens + other.tokens, dollars=self.dollars + other.dollars)

    def minus(self, other: SpendAmount) -> SpendAmount:
        """Return what is left without the other, which is a part of it."""
        return SpendAmount(tokens=self.tokens - other.tokens, dollars=self.dollars - other.dollars)

    def in_unit(self, unit: Literal["tokens", "dollars"]) -> float:
        """Return the amount in one unit."""
        return self.tokens if unit == "tokens" else self.dollars


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """What all kernels of a user have used, and may come to use.

    Parameters
    ----------
    budget : str
        The kept budget as its user wrote it; empty where there is none.
    day, month : Spent
        What was used today, and this month.
    aside : Spent
        What requests under way may come to; but for those of kernels that are gone.
    """

    budget: str = ""
    day: SpendAmount = SpendAmount()
    month: SpendAmount = SpendAmount()
    reserved: SpendAmount = SpendAmount()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lent:
    """What memory was told when it began to stand in for the file.

    Parameters
    ----------
    budget : str
        The kept budget.
    days : dict
        What was used by then on each day, an ISO date.
    """

    budget: str = ""
    days: dict[str, SpendAmount] = field(default_factory=dict)


def seen(connection: Connection, *, today: str) -> Spending:
    """Return what was used and is set aside; `today` is an ISO date."""
    row = connection.execute("SELECT total(tokens), total(dollars) FROM asides").fetchone()
    return Spending(
        budget=kept(connection),
        day=spent(connection, since=today),
        month=spent(connection, since=today[:8] + "01"),
        reserved=SpendAmount(tokens=int(row[0]), dollars=row[1]),
    )


def set_aside(connection: Connection, id_: str | None, amount: SpendAmount, *, owner: int) -> None:
    """Set aside what a request may come to."""
    connection.execute(
        "INSERT OR REPLACE INTO asides VALUES (?, ?, ?, ?)",
        (id_, owner, amount.tokens, amount.dollars),
    )


def release(connection: Connection, id_: str | None) -> SpendAmount | None:
    """Set nothing aside for a request any more; return what was."""
    row = connection.execute("SELECT tokens, dollars FROM asides WHERE id = ?", (id_,)).fetchone()
    if row is None:
        return None
    connection.execute("DELETE FROM asides WHERE id = ?", (id_,))
    return SpendAmount(tokens=row[0], dollars=row[1])


def spend(connection: Connection, spent: SpendAmount, *, day: str) -> None:
    """Add to a day's counters; `day` is an ISO date."""
    connection.execute(
        """INSERT INTO spending VALUES (:day, :tokens, :dollars) ON CONFLICT (day) DO UPDATE
        SET tokens = tokens + :tokens, dollars = dollars + :dollars""",
        {"day": day, "tokens": spent.tokens, "dollars": spent.dollars},
    )


def spent(connection: Connection, *, since: str) -> SpendAmount:
    """Return what was used since the ISO date `since`."""
    row = connection.execute(
        "SELECT total(tokens), total(dollars) FROM spending WHERE day >= ?", (since,)
    ).fetchone()
    return SpendAmount(tokens=int(row[0]), dollars=row[1])


def keep(connection: Connection, budget: str) -> None:
    """Replace the kept budget."""
    connection.execute("DELETE FROM budget")
    if budget:
        connection.execute("INSERT INTO budget VALUES (?)", (budget,))


def kept(connection: Connection) -> str:
    """Return the kept budget as its user wrote it; empty where there is none."""
    row = connection.execute("SELECT text FROM budget").fetchone()
    return str(row[0]) if row else ""


def lend(file: Connection, memory: Connection) -> Lent:
    """Tell memory what the file knows; return that part of it which may change there."""
    lent = Lent(budget=kept(file), days=_days(file))
    asides = file.execute("SELECT id, owner, tokens, dollars FROM asides").fetchall()
    owners = file.execute(
        """SELECT id, host, boot, space, pid, start, beat_at, beat_now FROM owners
        WHERE id IN (SELECT owner FROM asides)"""
    ).fetchall()
    memory.executemany("INSERT INTO asides VALUES (?, ?, ?, ?)", asides)
    memory.executemany("INSERT INTO owners VALUES (?, ?, ?, ?, ?, ?, ?, ?)", owners)
    keep(memory, lent.budget)
    for day, amount in lent.days.items():
        spend(memory, amount, day=day)
    return lent


def give_back(memory: Connection, file: Connection, lent: Lent | None, *, owner: int) -> None:
    """Tell the file what has changed in memory since that was `lent`; None: it never was."""
    before = lent or Lent()
    if (budget := kept(memory)) != before.budget:
        keep(file, budget)
    for day, amount in _days(memory).items():
        spend(file, amount.minus(before.days.get(day, SpendAmount())), day=day)
    if lent is not None:
        file.execute("DELETE FROM asides WHERE owner = ?", (owner,))
    file.executemany(
        "INSERT OR REPLACE INTO asides VALUES (?, ?, ?, ?)",
        memory.execute("SELECT id, owner, tokens, dollars FROM asides WHERE owner = ?", (owner,)),
    )


def _days(connection: Connection) -> dict[str, SpendAmount]:
    rows = connection.execute(
        "SELECT day, CAST(tokens AS INTEGER), CAST(dollars AS REAL) FROM spending"
    )
    return {str(day): SpendAmount(tokens=tokens, dollars=dollars) for day, tokens, dollars in rows}
