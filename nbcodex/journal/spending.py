"""What was used on which day, and the budget that all kernels of a user hold to.

Owns the counters by day and the kept budget, each as one function on a connection.
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
