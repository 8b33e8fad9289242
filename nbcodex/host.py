"""What the embedding program adds: by default a plain script or a terminal, else a notebook.

Owns the one place where a front end registers itself. Must not know any of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from nbcodex.events import Ending
from nbcodex.models import MapListener, Origin
from nbcodex.requests.handle import Handle
from nbcodex.settings import Settings


def _confirm_in_terminal(question: str) -> bool | None:
    """Ask at the terminal, if there is one."""
    if not (sys.stdin and sys.stdin.isatty()):
        return None
    return input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}


@dataclass(slots=True)
class Host:
    """What the embedding program provides."""

    settings: Callable[[], Settings] = Settings.read  # Returns the settings in force
    # Starts a handle and waits for its ending, displaying what it likes
    follow: Callable[[Handle], Ending] = Handle.follow
    # Returns the notebook that requests belong to
    notebook: Callable[[], str | None] = lambda: None
    origin: Callable[[], Origin] = Origin  # Returns where a request comes from
    # Returns a listener for the progress of a map, in the thread that runs it
    watch: Callable[[], MapListener] = lambda: lambda _: None
    # Asks the user a question; returns None where it cannot be asked
    confirm: Callable[[str], bool | None] = _confirm_in_terminal


current = Host()
