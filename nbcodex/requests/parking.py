"""What is said of a request that is kept for later, and of what closed its model. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbcodex.errors import LimitError, ParkedError, TransientError
from nbcodex.models import Limit, Request
from nbcodex.runtime.clock import Clock, format_duration, format_time


@dataclass(frozen=True, slots=True)
class Wait:
    """What a request waits for.

    Parameters
    ----------
    cause : TransientError
        Why.
    until : float
        An instant of the engine's clock.
    unpaid : bool
        Whether it has surely cost nothing yet.
    """

    cause: TransientError
    until: float
    unpaid: bool


def by_user(request: Request, wait: Wait | None, *, clock: Clock) -> ParkedError:
    """Return the error of a request that its user parked, in the wait if it was in one."""
    now, wall = clock.now(), clock.wall()
    if wait is None or wait.until <= now:
        return _by_user(request, "It is in the journal.")
    left = wait.until - now
    moment = format_time(wall + left, now=wall)
    unpaid = " It has cost nothing so far." if wait.unpaid else ""
    told = f"{wait.cause.message} It can go at {moment} (in {format_duration(left)}).{unpaid}"
    return _by_user(request, told, cause=wait.cause, resume_at=wall + left)


def _by_user(request: Request, message: str, **details: Any) -> ParkedError:
    error = ParkedError(message, advice=f"`%codex resume {request.id}` goes on with it.", **details)
    error.title = "Parked by you"
    return error


def for_want_of_patience(
    request: Request, cause: TransientError, *, resume_at: float, waited: float, clock: Clock
) -> ParkedError:
    """Return the error of a request that can go at `resume_at`, later than its user waits.

    Parameters
    ----------
    cause : TransientError
        What it waits for.
    resume_at : float
        An instant of `clock`.
    waited : float
        Seconds of patience that are used up.
    """
    wait, wall = resume_at - clock.now(), clock.wall()
    moment = format_time(wall + wait, now=wall)
    patience = f"your patience of {format_duration(request.patience)}"
    if waited:
        patience = f"is left of {patience} after {format_duration(waited)}"
    return ParkedError(
        f"{cause.message} It can go at {moment} (in {format_duration(wait)}), "
        f"longer than {patience}.",
        advice=_how_to_go_on(request, f" after {moment}"),
        cause=cause,
        resume_at=wall + wait,
    )


def closed(limit: Limit | None) -> LimitError:
    """Return a hold as the error that set it."""
    limit = limit or Limit()
    figures = f" ({limit.figures})" if limit.figures else ""
    return LimitError(f"{limit.name[0].upper()}{limit.name[1:]} reached{figures}.", limit=limit)


def _how_to_go_on(request: Request, after: str = "") -> str:
    return f"`%codex resume {request.id}`{after}, or run it with a longer --patience."
