"""The host: the program that runs nbcodex, which is a plain script or a notebook's shell.

The functions in `current` are those of a plain script; the notebook extension replaces them.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from nbcodex.errors import NbcodexError, Stopped, advice_for_script
from nbcodex.events import BackingOff, CoolingDown, Ending, Event
from nbcodex.models import MapListener, Origin
from nbcodex.requests.handle import Handle
from nbcodex.requests.request_state import cooldown_error
from nbcodex.runtime.clock import format_duration, format_time
from nbcodex.settings import Settings

# A script logs a wait if it is at least this long, and waits for one reason only this often.
MIN_LOGGED_WAIT_S, WAIT_LOG_INTERVAL_S = 3.0, 60.0
# How late a log line may be: without events, the wait is checked again after this time.
WAIT_CHECK_INTERVAL_S = 1.0

log = logging.getLogger("nbcodex")


class _WaitLog:
    """Logs what a request waits for, and how long, as soon as it is known to take some seconds."""

    _logged_at: ClassVar[dict[str, float]] = {}  # when each reason was last logged

    def __init__(self) -> None:
        self._wait: CoolingDown | BackingOff | None = None  # the present wait, until it is logged
        # By `time.monotonic`: since when it waits (inf: it does not), until when (-inf: unknown).
        self._waits_since, self._resumes_at = math.inf, -math.inf

    def on_events(self, events: tuple[Event, ...]) -> None:
        """Log the present wait if it is long; `events` may be empty."""
        now, wall = time.monotonic(), time.time()  # `wall`: seconds since the epoch
        for event in events:
            self._wait = event if isinstance(event, CoolingDown | BackingOff) else None
            self._waits_since = min(self._waits_since, now) if self._wait else math.inf
            resume_at = getattr(event, "resume_at", None)
            self._resumes_at = -math.inf if resume_at is None else now + resume_at - event.at
        left = max(0.0, self._resumes_at - now)  # seconds
        if self._wait is None or max(left, now - self._waits_since) < MIN_LOGGED_WAIT_S:
            return
        text = _describe(self._wait)
        reason = re.sub(r"[\d.,]+", "", text)  # without its figures
        if now - self._logged_at.get(reason, -math.inf) >= WAIT_LOG_INTERVAL_S:
            self._wait, self._logged_at[reason] = None, now
            due = f" Due at {format_time(wall + left, now=wall)} (in {format_duration(left)})."
            log.warning("nbcodex: %s%s", text, due if left else "")


def _describe(wait: CoolingDown | BackingOff) -> str:
    if isinstance(wait, BackingOff):
        return f"{wait.error.title}: {wait.error.message}"
    if not wait.queued:
        return cooldown_error(wait.limit).message
    figures = f"{wait.limit.name} ({wait.limit.figures})" if wait.limit else "the model's limit"
    return f"Queued for capacity of {figures}."


def confirm(question: str) -> bool | None:
    """Return the user's answer to a question; None if the front end cannot ask."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}
    except EOFError:  # Ctrl-D
        return False
    except Exception:  # each front end without an input line raises an error of its own
        return None


def _confirm_in_terminal(question: str) -> bool | None:
    return confirm(question) if sys.stdin and sys.stdin.isatty() else None


@dataclass(slots=True)
class Host:
    """What nbcodex calls in the program that runs it."""

    settings: Callable[[], Settings] = Settings.read  # Returns the settings in force
    # Starts a request, shows its progress where it can, and returns its ending
    follow: Callable[[Handle], Ending] = lambda handle: handle.follow(
        _WaitLog().on_events, max_idle=lambda: WAIT_CHECK_INTERVAL_S
    )
    origin: Callable[[], Origin] = Origin  # Returns the notebook and cell that call nbcodex
    # Returns what shows the progress of a map, in the thread that runs it; a script shows nothing
    map_listener: Callable[[], MapListener] = lambda: lambda _stats: None
    # Asks the user a yes-or-no question; returns None where it cannot be asked
    confirm: Callable[[str], bool | None] = _confirm_in_terminal
    is_script: bool = True  # Whether errors have the advice for scripts, not that for cells

    def adapt_advice(self, error: NbcodexError | Stopped) -> None:
        """In a script, replace an error's advice for cells by that for scripts."""
        if self.is_script:
            error.advice = advice_for_script(error.advice)


current = Host()
