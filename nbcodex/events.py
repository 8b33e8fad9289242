"""The events of a request, in the order in which its listeners receive them.

What a user sees is a pure function of these. Instants are seconds since boot (`Clock.now`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from nbcodex.errors import NbcodexError, ParkedError, TransientError
    from nbcodex.models import Limit, Rates, Reply

# How a user ends a request; the ending is then `Interrupted`, `Cancelled` or `Parked`.
EndAction = Literal["stop", "cancel", "park"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What all events have."""

    request_id: str
    at: float  # when it happened


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued(Event):
    """The request exists; nothing has been sent. It need not wait in the limits' queue."""

    model: str | None  # None until it is known
    patience: float  # of the request, in seconds
    prompt: str = ""  # its beginning


@dataclass(frozen=True, slots=True, kw_only=True)
class CoolingDown(Event):
    """The request has to wait before it is sent: for the end of a cooldown, or in the queue."""

    limit: Limit | None  # it was reached earlier, or is fully used; None if unknown
    resume_at: float | None  # when it will be sent; None in the queue if that cannot be predicted
    waited: float  # seconds of patience that are used, without this wait
    queued: bool = False  # whether it waits in the queue, which uses no patience


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent(Event):
    """An attempt begins."""

    attempt: int  # from 1
    model: str | None
    input_tokens: int  # an estimate
    rates: Rates | None = None  # None before the price is looked up, and where there is none
    unpriced: bool = False  # whether it is certain that no price is known
    simulated: bool = False  # whether the server is known to be a simulator


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta(Event):
    """More text of the answer, or of the reasoning before it."""

    text: str  # consecutive deltas may arrive joined: nothing may depend on where text was split
    reasoning: bool = False  # whether it is text of the reasoning
    simulated: bool = False  # whether the server is known to be a simulator


@dataclass(frozen=True, slots=True, kw_only=True)
class BackingOff(Event):
    """An attempt failed; the next one is due at `resume_at`."""

    error: TransientError
    attempt: int  # the number of the failed one
    resume_at: float
    waited: float  # seconds of patience that are used, without this wait

    @property
    def limit(self) -> Limit | None:
        """The limit that refused the attempt, if one did."""
        return getattr(self.error, "limit", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted(Event):
    """The answer begins again: what was shown of it is to be replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending(Event):
    """The last event of a request: exactly one of these."""

    reply: Reply  # with the text so far, if it is not finished
    error: NbcodexError | None = None  # why there is no answer, unless the user ended it


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Ending):
    """The answer is complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked(Ending):
    """The request is kept for later."""

    error: ParkedError  # says why, and when it can be sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted(Ending):
    """The user pressed Stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled(Ending):
    """The user cancelled this request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Ending):
    """No further attempt can help."""

    error: NbcodexError
    # Whether a request failed before it had claimed the journal entry that it was to resume.
    entry_unchanged: bool = False


Listener = Callable[[Event], None]
