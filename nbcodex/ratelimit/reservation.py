"""What a request asks of the limits, and the leave to send it. Data, no deeds."""

from __future__ import annotations

from dataclasses import dataclass

from nbcodex.ratelimit.tank import Mark


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request asks of the limits.

    Parameters
    ----------
    tokens : float
        Our estimate of its input.
    output : float
        The most output that it may use, as the server reckons it.
    """

    tokens: float
    output: float


@dataclass(slots=True)
class Reservation:
    """Leave to send one request, at an instant.

    Parameters
    ----------
    bucket : str
        Name of the bucket.
    cost : Cost
        What it asks for.
    at : float
        When it may go.
    number : int
        Its place in the order of sending.
    probe : bool
        Whether it goes through a hold.
    marks, turn : Mark
        The token ledgers and the tank of requests, just after it was taken from them.
    tokens : float
        The input as it was charged here, the fit included.
    heard, closed : bool
        Whether the server has answered; whether it is over.
    sent_at : float
        When it really went: infinite as long as whoever has it is not ready.
    home, born : int
        The bucket that it was taken from, and the share of its holder in which it is counted.
    astray : bool
        Whether that bucket is lost, so that its marks mean nothing.
    """

    bucket: str
    cost: Cost
    at: float
    number: int
    probe: bool
    marks: tuple[Mark, ...]
    turn: Mark
    tokens: float
    heard: bool = False
    closed: bool = False
    sent_at: float = 0.0
    home: int = 0
    born: int = 0
    astray: bool = False

    def become(self, other: Reservation) -> None:
        """Take back what happened to it since it was like `other`."""
        self.marks, self.heard, self.closed = other.marks, other.heard, other.closed
        self.born, self.astray = other.born, other.astray

    def shift(self, amounts: tuple[float, ...]) -> None:
        """Let the token ledgers have held more at the mark."""
        pairs = zip(self.marks, amounts, strict=True)
        self.marks = tuple(Mark(mark.level + amount, mark.shift) for mark, amount in pairs)
