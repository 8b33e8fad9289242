"""The host: the program that runs nbcodex, which is a plain script or a notebook's shell.

The functions in `current` are those of a plain script; the notebook extension replaces them.
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
    """What nbcodex calls in the program that runs it."""

    settings: Callable[[], Settings] = Settings.read  # Returns the settings in force
    # Starts a request, shows its progress where it can, and returns its ending
    follow: Callable[[Handle], Ending] = Handle.follow
    # Returns the notebook that requests belong to
    notebook: Callable[[], str | None] = lambda: None
    origin: Callable[[], Origin] = Origin  # Returns the notebook and cell that call nbcodex
    # Returns what shows the progress of a map; called in the thread that runs the map
    map_listener: Callable[[], MapListener] = lambda: lambda _: None
    # Asks the user a yes-or-no question; returns None where it cannot be asked
    confirm: Callable[[str], bool | None] = _confirm_in_terminal


current = Host()
