"""What was used on which day, what is set aside, and the budget that all kernels hold to.

Owns the counters by day, what requests under way may come to, and the kept budget, each as one
function on a connection.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Literal, Self

from nbcodex.journal.entry import finite, whole
from nbcodex.records import Reply

Connection = sqlite3.Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Tokens, input and output together, and US dollars as far as prices are known."""

    tokens: int = 0
    dollars: float = 0.0

    @classmethod
    def by(cls, reply: Reply, *, otherwise: Self) -> Self:
        """Return what `reply` used; where it does not say, what is in `otherwise`."""
        usage = reply.usage
        if usage.input_tokens is None and usage.output_tokens is None:
            return otherwise
        tokens = whole(whole(usage.input_tokens) + whole(usage.output_tokens))
        return cls(tokens=tokens, dollars=max(0.0, finite(reply.cost) or 0.0))

    def plus(self, other: Spent) -> Spent:
        """Return both together."""
        return Spent(tokens=self.tokens + other.tokens, dollars=self.dollars + other.dollars)

    def minus(self, other: Spent) -> Spent:
        """Return what is left without the other, which is a part of it."""
        return Spent(tokens=self.tokens - other.tokens, dollars=self.dollars - other.dollars)

    def of(self, unit: Literal["tokens", "dollars"]) -> float:
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
    day: Spent = Spent()
    month: Spent = Spent()
    aside: Spent = Spent()


def seen(connection: Connection, *, today: str) -> Spending:
    """Return what was used and is set aside; `today` is an ISO date."""
    row = connection.execute("SELECT total(tokens), total(dollars) FROM asides").fetchone()
    return Spending(
        budget=kept(connection),
        day=spent(connection, since=today),
        month=spent(connection, since=today[:8] + "01"),
        aside=Spent(tokens=int(row[0]), dollars=row[1]),
    )


def set_aside(connection: Connection, id_: str | None, amount: Spent, *, owner: int) -> None:
    """Set aside what a request may come to."""
    connection.execute(
        "INSERT OR REPLACE INTO asides VALUES (?, ?, ?, ?)",
        (id_, owner, amount.tokens, amount.dollars),
    )


def release(connection: Connection, id_: str | None) -> Spent | None:
    """Set nothing aside for a request any more; return what was."""
    row = connection.execute("SELECT tokens, dollars FROM asides WHERE id = ?", (id_,)).fetchone()
    if row is None:
        return None
    connection.execute("DELETE FROM asides WHERE id = ?", (id_,))
    return Spent(tokens=row[0], dollars=row[1])


def spend(connection: Connection, spent: Spent, *, day: str) -> None:
    """Add to a day's counters; `day` is an ISO date."""
    connection.execute(
        """INSERT INTO spending VALUES (:day, :tokens, :dollars) ON CONFLICT (day) DO UPDATE
        SET tokens = tokens + :tokens, dollars = dollars + :dollars""",
        {"day": day, "tokens": spent.tokens, "dollars": spent.dollars},
    )


def spent(connection: Connection, *, since: str) -> Spent:
    """Return what was used since the ISO date `since`."""
    row = connection.execute(
        "SELECT total(tokens), total(dollars) FROM spending WHERE day >= ?", (since,)
    ).fetchone()
    return Spent(tokens=int(row[0]), dollars=row[1])


def keep(connection: Connection, budget: str) -> None:
    """Replace the kept budget."""
    connection.execute("DELETE FROM budget")
    if budget:
        connection.execute("INSERT INTO budget VALUES (?)", (budget,))


def kept(connection: Connection) -> str:
    """Return the kept budget as its user wrote it; empty where there is none."""
    row = connection.execute("SELECT text FROM budget").fetchone()
    return str(row[0]) if row else ""
