"""What was spent on each day and in total, what is reserved (`asides`), and the stored budget.

Each access to these tables is one function on a connection. `requests.budget` enforces budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from nbcodex.journal.codec import bounded_integer, finite_or_none
from nbcodex.journal.owner import Connection, is_gone
from nbcodex.models import SUMMED_TOKENS, Reply, Usage, UsageTotals

# Columns of `totals` that are fields of `UsageTotals`; the others are SUMMED_TOKENS.
_TOTALS_COLUMNS = ("requests", "answers", "cost", "waited", "unknown", "unpriced", "estimated")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendAmount:
    """Tokens (input and output together), and US dollars as far as prices are known."""

    tokens: int = 0
    dollars: float = 0.0

    @classmethod
    def of_reply(cls, reply: Reply, *, if_unknown: Self) -> Self:
        """Return what `reply` used, or `if_unknown` if it does not state that."""
        usage = reply.usage
        if usage.input_tokens is None and usage.output_tokens is None:
            return if_unknown
        # A server may state anything, so both terms and the sum are bounded.
        tokens = bounded_integer(usage.input_tokens) + bounded_integer(usage.output_tokens)
        dollars = max(0.0, finite_or_none(reply.cost) or 0.0)
        return cls(tokens=bounded_integer(tokens), dollars=dollars)

    def __add__(self, other: SpendAmount) -> SpendAmount:
        return SpendAmount(tokens=self.tokens + other.tokens, dollars=self.dollars + other.dollars)

    def __sub__(self, other: SpendAmount) -> SpendAmount:
        return SpendAmount(tokens=self.tokens - other.tokens, dollars=self.dollars - other.dollars)

    def in_unit(self, unit: Literal["tokens", "dollars"]) -> float:
        """Return the amount in one unit."""
        return self.tokens if unit == "tokens" else self.dollars


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """What all kernels of a user have spent today and in this month, and have reserved."""

    budget: str = ""  # the stored budget as its user wrote it; empty if there is none
    day: SpendAmount = SpendAmount()
    month: SpendAmount = SpendAmount()
    reserved: SpendAmount = SpendAmount()  # the most that running requests may use


def read_spending(connection: Connection, *, today: str) -> Spending:
    """Return what is spent and reserved; `today` is an ISO date."""
    spent_since = "FROM spending WHERE day >= ?"
    return Spending(
        budget=read_budget(connection),
        day=_total(connection, spent_since, today),
        month=_total(connection, spent_since, today[:8] + "01"),  # since the first of the month
        reserved=_total(connection, "FROM asides"),
    )


def _total(connection: Connection, from_clause: str, *parameters: str) -> SpendAmount:
    # SQLite's `total`, unlike `sum`, returns 0.0 for no rows and does not overflow.
    query = f"SELECT total(tokens), total(dollars) {from_clause}"
    tokens, dollars = connection.execute(query, parameters).fetchone()
    return SpendAmount(tokens=int(tokens), dollars=dollars)


def reserve(connection: Connection, id_: str, amount: SpendAmount) -> None:
    """Reserve the most that a request may use."""
    connection.execute(
        "INSERT OR REPLACE INTO asides VALUES (?, ?, ?, ?)",
        (id_, connection.owner.id, amount.tokens, amount.dollars),
    )


def release(connection: Connection, id_: str) -> SpendAmount:
    """Release what is reserved for a request; return it."""
    reserved = _total(connection, "FROM asides WHERE id = ?", id_)
    connection.execute("DELETE FROM asides WHERE id = ?", (id_,))
    return reserved


def release_for_dead_kernels(connection: Connection) -> None:
    """Release what was reserved by kernels that are gone."""
    rows = connection.execute(
        """SELECT DISTINCT a.owner, o.* FROM asides AS a LEFT JOIN owners AS o ON o.id = a.owner
        WHERE a.owner <> ?""",
        (connection.owner.id,),
    ).fetchall()
    gone = [(row["owner"],) for row in rows if is_gone(connection, row)]
    connection.executemany("DELETE FROM asides WHERE owner = ?", gone)


def spend(connection: Connection, amount: SpendAmount, *, day: str) -> None:
    """Add to the counters of a day; `day` is an ISO date."""
    # One row a day, so that reading a month does not depend on how many requests there were.
    connection.execute(
        """INSERT INTO spending VALUES (:day, :tokens, :dollars) ON CONFLICT (day) DO UPDATE
        SET tokens = tokens + :tokens, dollars = dollars + :dollars""",
        {"day": day, "tokens": amount.tokens, "dollars": amount.dollars},
    )


def spending_by_day(connection: Connection) -> dict[str, SpendAmount]:
    """Return what was spent on each day, by ISO date."""
    # Without the casts, the columns of a damaged file may hold text.
    query = "SELECT day, CAST(tokens AS INTEGER), CAST(dollars AS REAL) FROM spending"
    rows = connection.execute(query)
    return {str(day): SpendAmount(tokens=tokens, dollars=dollars) for day, tokens, dollars in rows}


def set_budget(connection: Connection, text: str) -> None:
    """Replace the stored budget."""
    connection.execute("DELETE FROM budget")
    if text:
        connection.execute("INSERT INTO budget VALUES (?)", (text,))


def read_budget(connection: Connection) -> str:
    """Return the stored budget as its user wrote it; empty if there is none."""
    row = connection.execute("SELECT text FROM budget").fetchone()
    return str(row[0]) if row else ""


def add_to_totals(connection: Connection, more: UsageTotals) -> None:
    """Add to the totals of all time, with figures bounded: a server may state anything."""
    added = {name: finite_or_none(getattr(more, name)) or 0 for name in _TOTALS_COLUMNS}
    added |= {name: bounded_integer(getattr(more.usage, name)) for name in SUMMED_TOKENS}
    sums = ", ".join(f"{name} = {name} + :{name}" for name in added)
    connection.execute(f"UPDATE totals SET {sums}", added)  # noqa: S608 - our columns


def read_totals(connection: Connection) -> UsageTotals:
    """Return the totals of all time, which include deleted entries."""
    row = connection.execute("SELECT * FROM totals").fetchone()
    usage = Usage(estimated=row["estimated"] > 0, **{name: row[name] for name in SUMMED_TOKENS})
    return UsageTotals(usage=usage, **{name: row[name] for name in _TOTALS_COLUMNS})
