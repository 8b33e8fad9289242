"""What whoever hosts this process adds to asking: a notebook, say. Knows none.

Owns the one place where a host puts it, before anything is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from nbcodex.events import Ending
from nbcodex.models import MapListener, Origin
from nbcodex.requests.handle import Handle
from nbcodex.settings import Settings


def _in_the_terminal(question: str) -> bool | None:
    """Ask whoever sits at the terminal, if this is one."""
    if not (sys.stdin and sys.stdin.isatty()):
        return None
    return input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}


@dataclass(slots=True)
class Host:
    """What whoever hosts this process adds to the client: a notebook, say.

    Parameters
    ----------
    settings : callable
        Returns the settings in force now.
    follow : callable
        Starts a handle and waits for its ending, showing what it likes.
    notebook : callable
        Returns the notebook that what is asked belongs to.
    origin : callable
        Returns where something is asked now.
    watch : callable
        Returns who hears how far a map has come, in the thread that asked.
    confirm : callable
        Puts a question to the user; None where nobody can be asked.
    """

    settings: Callable[[], Settings] = Settings.read
    follow: Callable[[Handle], Ending] = Handle.follow
    notebook: Callable[[], str | None] = lambda: None
    origin: Callable[[], Origin] = Origin
    watch: Callable[[], MapListener] = lambda: lambda _: None
    confirm: Callable[[str], bool | None] = _in_the_terminal


current = Host()
