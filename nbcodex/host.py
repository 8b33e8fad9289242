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
    """What the embedding program provides.

    Parameters
    ----------
    settings : callable
        Returns the settings in force.
    follow : callable
        Starts a handle and waits for its ending, displaying what it likes.
    notebook : callable
        Returns the notebook that requests belong to.
    origin : callable
        Returns where a request comes from.
    watch : callable
        Returns a listener for the progress of a map, in the thread that runs it.
    confirm : callable
        Asks the user a question; returns None where it cannot be asked.
    """

    settings: Callable[[], Settings] = Settings.read
    follow: Callable[[Handle], Ending] = Handle.follow
    notebook: Callable[[], str | None] = lambda: None
    origin: Callable[[], Origin] = Origin
    watch: Callable[[], MapListener] = lambda: lambda _: None
    confirm: Callable[[str], bool | None] = _confirm_in_terminal


current = Host()
