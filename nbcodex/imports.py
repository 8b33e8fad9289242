"""Heavy imports in a thread of ours, in small steps, so that the user's own cells hardly notice.

An import holds the interpreter's lock nearly all the time: beside it a cell takes twice as long. A
pause before every few modules lets others have their turn. More pauses would be gentler still, but
each costs the import a turn of others, five milliseconds, where they compute.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder

EVERY, PAUSE = 0.003, 0.0002
"""Seconds of work after which a pause is made, and its length: others wait for the lock already."""


class _Pauses(MetaPathFinder):
    """Finds nothing, and takes its time over it in the thread that asked for that."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._at = time.perf_counter()

    def find_spec(self, *_: object) -> None:
        """Make a pause, if one is due."""
        if threading.get_ident() == self._thread and time.perf_counter() - self._at > EVERY:
            time.sleep(PAUSE)
            self._at = time.perf_counter()


@contextmanager
def gently() -> Iterator[None]:
    """Make pauses while this thread imports; of no effect on other threads."""
    pauses = _Pauses()
    sys.meta_path.insert(0, pauses)
    try:
        yield
    finally:
        sys.meta_path.remove(pauses)
