"""Goes through a course to its end: waiting in a thread or on a loop, giving all or one by one.

Owns the waits, and that a course is put away whatever ends it. Must not know rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nbcodex.batch.course import TOLD, Course
from nbcodex.errors import Stopped

PULSE = 0.02
"""Seconds after which a caller's loop looks for endings, and for an interrupt."""


@contextmanager
def _to_its_end(course: Course) -> Iterator[None]:
    """Finish a course, or put it away.

    Raises
    ------
    Stopped
        In the place of an interrupt.
    """
    try:
        yield
        course.finish()
    except KeyboardInterrupt:
        _surely(lambda: course.stop("stopped"))
        raise stopped(course) from None
    except (GeneratorExit, asyncio.CancelledError):
        _surely(lambda: course.stop("stopped"))
        raise
    except BaseException:
        _surely(lambda: course.stop("failed"))
        raise


def stopped(course: Course) -> Stopped:
    """Return what is raised after Stop."""
    of = f" of {course.shape.total:,}" if course.kept else ""
    advice = "Run the loop again: what is answered costs nothing."
    if course.kept:
        advice = f"`%codex resume {course.id}` goes on; nbcodex.map.last holds what is finished."
    if course.origin.engine == "batch":
        advice = (
            f"`%codex resume {course.id}` fetches it, `%codex cancel {course.id}` ends it there."
        )
        told = f"Stopped: {course.way.tally.done:,}{of} rows are answered, the provider goes on."
        return Stopped(told, advice=advice)
    told = f"Stopped: {course.way.tally.done:,}{of} rows are answered, the rest is parked."
    return Stopped(told, advice=advice)


def run(course: Course) -> Any:
    """Answer all rows; return them as the kind of data that was given."""
    with _to_its_end(course):
        while course.advance():
            course.note(course.way.ended(within=TOLD))
    return course.result


async def arun(course: Course) -> Any:
    """Do as `run` does, on the caller's event loop."""
    with _to_its_end(course):
        while course.advance():
            await _pulse()
    return course.result


def stream(course: Course) -> Iterator[Any]:
    """Yield the replies in order, reading the data as far as there is something to do."""
    with _to_its_end(course):
        while course.advance():
            yield from course.ready()
            if course.waits:
                course.note(course.way.ended(within=TOLD))


async def astream(course: Course) -> AsyncIterator[Any]:
    """Do as `stream` does, on the caller's event loop."""
    with _to_its_end(course):
        while course.advance():
            for reply in course.ready():
                yield reply
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
