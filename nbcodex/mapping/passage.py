"""A course while somebody goes through it, and the orders that end it early.

Owns which maps are under way in this process, and that a course is put away once, whatever ends
its passage. Orders come from any thread: another cell, a button of the monitor.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nbcodex.client import current

if TYPE_CHECKING:
    from nbcodex.mapping.course import Course, Order
    from nbcodex.progress import Outcome

OUTCOMES: dict[Order, Outcome] = {"cancel": "cancelled", "park": "parked"}
"""What a map has come to that was ended by an order."""


class OrderedError(Exception):
    """The passage was ended by an order. Only whoever goes through the course hears it."""


class Passage:
    """One way through a course, as the thread that goes holds it, and whoever ends it.

    Parameters
    ----------
    course : Course
        What is gone through.

    Attributes
    ----------
    ordered : {"cancel", "park"} or None
        The order that ended it. A course that is taken up again is another passage's, so the
        one before, which may wake only then, leaves it alone.
    """

    def __init__(self, course: Course) -> None:
        self.course = course
        self.ordered: Order | None = None
        self._thread, self._goes = threading.get_ident(), False
        self._over = threading.Event()

    def advance(self) -> bool:
        """Do as `Course.advance` does.

        Raises
        ------
        OrderedError
            If an order has ended the passage.
        NbcodexError
            If a failure ends the map.
        """
        self._heed()
        self._goes = True
        try:
            goes_on = self.course.advance()
        finally:
            self._goes = False
        self._heed()
        return goes_on

    def _heed(self) -> None:
        if self.ordered is not None:
            raise OrderedError

    def order(self, what: Order) -> None:
        """End it: nothing more is begun, and rows under way get the order. The first one counts.

        In another thread than the one that goes, this returns at once; see `wait`.
        """
        if self.ordered is None:
            self.course.ordered = self.ordered = what
        # Whoever goes through it may not wake for long, between two replies of an iterator.
        for handle in self.course.client.live():
            if handle.request.origin.batch == self.course.id:
                handle.order(self.ordered)
        if self._thread == threading.get_ident() and not self._goes:
            # Whoever goes through it is suspended, and cannot wake before this returns.
            self.put_away(OUTCOMES[self.ordered])

    def put_away(self, outcome: Outcome) -> None:
        """Park what is not answered, unless that was done; in the thread that goes."""
        if not self._over.is_set():
            self.course.stop(outcome)
            self._over.set()

    def close(self) -> None:
        """Nobody goes on with it."""
        self._over.set()
        _under_way.pop(self, None)

    @property
    def over(self) -> bool:
        """Whether the course was put away, or is done."""
        return self._over.is_set()

    def wait(self, *, within: float) -> bool:
        """Wait until it is over, some seconds at most; return whether it is."""
        return self._over.wait(within)


_under_way: dict[Passage, None] = {}


@contextmanager
def through(course: Course) -> Iterator[Passage]:
    """Have a course known as under way."""
    passage = Passage(course)
    _under_way[passage] = None
    try:
        yield passage
    finally:
        passage.close()


def under_way() -> list[Passage]:
    """Return the maps that are under way in this process, oldest first."""
    here = current()
    return [each for each in list(_under_way) if each.course.client is here and not each.over]
