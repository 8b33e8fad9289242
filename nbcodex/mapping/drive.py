"""Goes through a course to its end: waiting in a thread or on a loop, giving all or one by one.

Owns the waits, that a course is put away whatever ends it, and what is said then. Must not know
rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nbcodex.errors import CancelledError, NbcodexError, ParkedError, Stopped
from nbcodex.mapping.course import TOLD, Course, Order
from nbcodex.mapping.passage import OUTCOMES, OrderedError, Passage, through

PULSE = 0.02
"""Seconds after which a caller's loop looks for endings, and for an interrupt."""


@contextmanager
def _to_its_end(course: Course) -> Iterator[Passage]:
    """Finish a course, or put it away.

    Raises
    ------
    Stopped
        In the place of an interrupt.
    CancelledError, ParkedError
        If its user has ended it by an order. No interrupt: on an event loop that would not end
        the task alone, but the loop.
    """
    with through(course) as passage:
        try:
            yield passage
            course.finish()
        except OrderedError:
            order = passage.ordered or "park"
            _surely(lambda: passage.put_away(OUTCOMES[order]))
            raise ended(course, order) from None
        except KeyboardInterrupt:
            _surely(lambda: passage.put_away("stopped"))
            raise stopped(course) from None
        except (GeneratorExit, asyncio.CancelledError):
            _surely(lambda: passage.put_away("stopped"))
            raise
        except BaseException:
            _surely(lambda: passage.put_away("failed"))
            raise


def stopped(course: Course) -> Stopped:
    """Return what is raised after Stop."""
    return Stopped(f"Stopped: {_answered(course)}, {_rest(course)}.", advice=way_on(course))


def ended(course: Course, order: Order) -> NbcodexError:
    """Return what is raised where an order has ended a map, as it is for a single request."""
    told = f"{_answered(course)}, {_rest(course, order)}."
    if order == "cancel":
        return CancelledError(f"Cancelled by you: {told}", advice=way_on(course))
    error = ParkedError(told, advice=way_on(course))
    error.title = "Parked by you"
    return error


def line(course: Course, order: Order) -> str:
    """Return what an order has come to, in one line."""
    if course.outcome == "done":
        return f"{course.id}: {_answered(course)}."
    told = f"{_answered(course)}, {_rest(course, order)}. {way_on(course)}"
    return f"{course.id}: {OUTCOMES[order]}; {told}"


def way_on(course: Course) -> str:
    """Return how a map goes on that was put away."""
    if _is_away(course):
        return f"`%codex resume {course.id}` fetches it, `%codex cancel {course.id}` ends it there."
    if course.kept:
        return f"`%codex resume {course.id}` goes on; nbcodex.map.last holds what is finished."
    return "Run the loop again: what is answered costs nothing."


def _answered(course: Course) -> str:
    of = f" of {course.shape.total:,}" if course.kept else ""
    return f"{course.way.tally.done:,}{of} rows are answered"


def _rest(course: Course, order: Order = "park") -> str:
    if _is_away(course):
        return "the provider goes on"
    return "nothing is lost" if order == "cancel" else "the rest is parked"


def _is_away(course: Course) -> bool:
    """Return whether a provider has rows of a map, and goes on with them."""
    if course.origin.engine != "batch":
        return False
    return course.client.journal(course.settings).batches.is_away(course.id)


def run(course: Course) -> Any:
    """Answer all rows; return them as the kind of data that was given."""
    with _to_its_end(course) as passage:
        while passage.advance():
            course.note(course.way.ended(within=TOLD))
    return course.result


async def arun(course: Course) -> Any:
    """Do as `run` does, on the caller's event loop."""
    with _to_its_end(course) as passage:
        while passage.advance():
            await _pulse()
    return course.result


def stream(course: Course) -> Iterator[Any]:
    """Yield the replies in order, reading the data as far as there is something to do."""
    with _to_its_end(course) as passage:
        while passage.advance():
            for reply in course.ready():
                yield reply
                passage.advance()
            if course.waits:
                course.note(course.way.ended(within=TOLD))


async def astream(course: Course) -> AsyncIterator[Any]:
    """Do as `stream` does, on the caller's event loop."""
    with _to_its_end(course) as passage:
        while passage.advance():
            for reply in course.ready():
                yield reply
                passage.advance()
            await _pulse()


async def _pulse() -> None:
    """Let the caller's loop work: a kernel's takes an interrupt only when it wakes."""
    await asyncio.sleep(PULSE)


def _surely(deed: Callable[[], None]) -> None:
    """Do it, again and again if interrupts strike."""
    while True:
        try:
            return deed()
        except KeyboardInterrupt:
            continue
