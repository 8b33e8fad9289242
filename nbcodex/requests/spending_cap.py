"""How a user's own cap is written, and how far it is used up."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from nbcodex.errors import ConfigurationError

Unit = Literal["tokens", "dollars"]
Period = Literal["session", "day", "month"]

LEAST = 100
"""Tokens below which a cap is a mistake: a dollar sign was forgotten, or eaten by `%config`."""

_CAP = re.compile(
    r"(?P<sign>\$)?(?P<number>\d[\d,_]*\.?\d*|\.\d+)(?P<scale>[km])?"
    r"(?P<unit>\$|usd|dollars?|tokens?)?(?:(?:/|per)(?P<period>day|month|session))?",
    re.IGNORECASE,
)
_SCALES = {"": 1.0, "k": 1e3, "m": 1e6}
_OF = {"session": "for this session", "day": "for today", "month": "for this month"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendingCap:
    """How much may be used, and over what time.

    Parameters
    ----------
    amount : float
        Tokens, input and output together, or US dollars.
    unit : {"tokens", "dollars"}
        What is counted.
    period : {"session", "day", "month"}
        Until the kernel ends, or by the calendar.
    """

    amount: float
    unit: Unit
    period: Period = "session"

    def __str__(self) -> str:
        return f"{self.words(self.amount)} {_OF[self.period]}"

    @property
    def text(self) -> str:
        """The cap as `read` takes it."""
        return f"{self.amount}{'usd' if self.unit == 'dollars' else ''}/{self.period}"

    def words(self, amount: float) -> str:
        """Return an amount in the cap's unit, as people write it."""
        if self.unit == "tokens":
            return f"{amount:,.0f} tokens"
        return f"${amount:,.2f}" if amount >= 0.01 or not amount else f"${amount:.4f}"


@dataclass(frozen=True, slots=True)
class CapUsage:
    """How far a cap is used up."""

    cap: SpendingCap
    used: float

    @property
    def share(self) -> float:
        """Between 0 and 1, or more."""
        return self.used / self.cap.amount

    def __str__(self) -> str:
        return f"{self.cap.words(self.used)} of {self.cap} used ({self.share:.0%})"


def read(text: str) -> SpendingCap:
    """Return the cap that is written as ``200k``, ``1.5M/day``, ``$5`` or ``$20/month``.

    Raises
    ------
    ConfigurationError
        If it is none.
    """
    found = _CAP.fullmatch("".join(text.split()))
    amount = 0.0
    if found:
        number = found["number"].replace(",", "").replace("_", "")
        amount = float(number) * _SCALES[(found["scale"] or "").lower()]
    if not found or not amount or (found["sign"] and (found["unit"] or "").startswith("tok")):
        raise ConfigurationError(
            f"{text[:40]!r} is no budget.",
            advice="Write tokens as 200k or 2M/day, dollars as $5 or $20/month, or off.",
        )
    in_dollars = found["sign"] or (found["unit"] or "").lower().startswith(("$", "usd", "dol"))
    period = (found["period"] or "session").lower()
    return SpendingCap(amount=amount, unit="dollars" if in_dollars else "tokens", period=period)  # type: ignore[arg-type]
