"""What becomes of open databases when the process forks.

SQLite has locks that all databases of a process share; a child that is forked while one is held
could never use SQLite again. So all who use it pause for the fork, and a child leaves to its parent
what is the parent's (SQLite's "How To Corrupt", 2.6).
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class ForkAware(Protocol):
    """Who uses SQLite on a thread of its own."""

    def pause(self) -> bool:
        """Before a fork: wait until nothing is being done, and let nothing begin."""
        ...

    def go_on(self) -> None:
        """After a fork, in the parent: the end of a `pause` that succeeded."""
        ...

    def forsake(self) -> None:
        """In a forked child: leave everything to the parent."""
        ...


def attend(one: ForkAware) -> None:
    """Have `one` pause whenever the process forks, for as long as it lives."""
    _all.add(one)


_all: weakref.WeakSet[ForkAware] = weakref.WeakSet()
_paused: list[ForkAware] = []


def _pause() -> None:
    _paused.extend(one for one in list(_all) if one.pause())


def _go_on() -> None:
    while _paused:
        _paused.pop().go_on()


def _forsake() -> None:
    _paused.clear()
    for one in list(_all):
        one.forsake()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_pause, after_in_parent=_go_on, after_in_child=_forsake)
