"""What happens to open databases when the process forks.

SQLite has mutexes that all databases of a process share: a child that is forked while a thread
holds one could never use SQLite again. So every user of SQLite pauses for the fork, and the child
leaves open connections to its parent (sqlite.org/howtocorrupt.html, section 2.6).
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class ForkAware(Protocol):
    """A user of SQLite on a thread of its own."""

    def before_fork(self) -> bool:
        """Wait until nothing is running, and let nothing start; return whether that succeeded."""
        ...

    def after_fork_in_parent(self) -> None:
        """Continue after a `before_fork` that succeeded."""
        ...

    def after_fork_in_child(self) -> None:
        """Leave everything to the parent."""
        ...


# Weak references: being registered keeps nothing alive.
_registered: weakref.WeakSet[ForkAware] = weakref.WeakSet()
_paused: list[ForkAware] = []


def register(user: ForkAware) -> None:
    """Call `user` at each fork of the process, for as long as it lives."""
    _registered.add(user)


def _before_fork() -> None:
    _paused.extend(user for user in list(_registered) if user.before_fork())


def _after_fork_in_parent() -> None:
    while _paused:
        _paused.pop().after_fork_in_parent()


def _after_fork_in_child() -> None:
    _paused.clear()
    for user in list(_registered):
        user.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
