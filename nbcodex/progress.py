"""How far a map has come, as its watchers hear it a few times a second. Data, no deeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nbcodex.models import Limit

Outcome = Literal["", "done", "stopped", "cancelled", "parked", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MapStats:
    """The figures of a map at one instant.

    Parameters
    ----------
    batch : str
        The map's id.
    at : float
        The instant, as `clock.Clock.now` tells it.
    total : int or None
        Rows; None where nobody knows yet.
    done, reused, failed, parked : int
        Rows that have ended: answered (those from the journal included), answered from the
        journal, without an answer, kept for later.
    sent, waiting : int
        Rows at the server, and rows that wait for leave to be sent.
    input_tokens, output_tokens : int
        What was used so far.
    cost : float
        US dollars so far, as far as prices are known.
    unpriced : int
        Answers whose price nobody knows.
    held_until : float or None
        The instant until which the model is closed.
    limit : Limit or None
        What closes it.
    tokens_per_minute, requests_per_minute : float or None
        The server's limits.
    model : str or None
        The model that answers.
    simulated : bool
        Whether the simulator answers.
    stage : str
        Where the provider is with what was handed in, in a few words.
    outcome : str
        How the map ended; empty while it goes on.
    failures : tuple of (str, str)
        The first few rows without an answer, and why.
    """

    batch: str
    at: float
    total: int | None = None
    done: int = 0
    reused: int = 0
    failed: int = 0
    parked: int = 0
    sent: int = 0
    waiting: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    unpriced: int = 0
    held_until: float | None = None
    limit: Limit | None = None
    tokens_per_minute: float | None = None
    requests_per_minute: float | None = None
    model: str | None = None
    simulated: bool = False
    stage: str = ""
    outcome: Outcome = ""
    failures: tuple[tuple[str, str], ...] = ()

    @property
    def ended(self) -> int:
        """Rows about which nothing more will happen."""
        return self.done + self.failed + self.parked

    @property
    def paid(self) -> int:
        """Rows that were answered anew."""
        return self.done - self.reused


MapListener = Callable[[MapStats], None]
