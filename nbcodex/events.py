"""The one stream of events: what happens to a request, as its listeners receive it.

Each event is frozen and holds the instant `at` (seconds of `clock.Clock.now`) at which it happened.
What a user sees is a pure function of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from nbcodex.errors import NbcodexError, ParkedError, TransientError
    from nbcodex.models import Limit, Rates, Reply


# How a user ends a request: its ending is `Interrupted`, `Cancelled` or `Parked`.
EndAction = Literal["stop", "cancel", "park"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What all events have: the request, and when it happened."""

    request_id: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued(Event):
    """The request exists; nothing has been sent."""

    model: str | None
    patience: float
    prompt: str = ""  # its beginning


@dataclass(frozen=True, slots=True, kw_only=True)
class CoolingDown(Event):
    """The model is closed until `resume_at`, because a limit refused another request.

    With `queued`, the model is open, but its limit is used fully, and this request waits for its
    turn, which uses no patience; `resume_at` is None as long as the turn cannot be predicted.
    """

    limit: Limit | None
    resume_at: float | None
    waited: float
    queued: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent(Event):
    """An attempt begins."""

    attempt: int  # from 1
    model: str | None
    input_tokens: int  # an estimate
    rates: Rates | None = None  # None as long as the price is not looked up, or where it is unknown
    unpriced: bool = False  # whether the price is unknown
    simulated: bool = False  # whether the server is known to be a simulator


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta(Event):
    """More of the answer; with `reasoning`, of the reasoning before it."""

    text: str  # consecutive deltas may arrive joined: nothing may depend on where text was split
    reasoning: bool = False
    simulated: bool = False  # whether the server is known to be a simulator


@dataclass(frozen=True, slots=True, kw_only=True)
class BackingOff(Event):
    """An attempt failed; the next one is due at `resume_at`."""

    error: TransientError
    attempt: int
    resume_at: float
    waited: float  # without this wait

    @property
    def limit(self) -> Limit | None:
        """The limit that refused the attempt, if one did."""
        return getattr(self.error, "limit", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted(Event):
    """The answer begins again: what was shown of it is to be replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """The answer is complete."""

    reply: Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked(Event):
    """The request is kept for later. `error` says why, and until when."""

    error: ParkedError
    reply: Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted(Event):
    """The user pressed Stop; the text so far is in `reply`."""

    reply: Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled(Event):
    """The user cancelled this request; the text so far is in `reply`."""

    reply: Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """No further attempt can help."""

    error: NbcodexError
    reply: Reply


# Exactly one of these is the last event of every request.
Ending = Finished | Parked | Interrupted | Cancelled | Failed

Listener = Callable[[Event], None]
