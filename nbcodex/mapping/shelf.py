"""What becomes of a map's rows that are not answered when it stops: they are parked.

Owns how long that may take: Stop must not wait for a hundred thousand rows.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

from nbcodex.errors import NbcodexError
from nbcodex.journal.key import equality_key

if TYPE_CHECKING:
    from nbcodex.mapping.course import Course
    from nbcodex.models import Request

ENDING, SHELVING = 0.5, 1.0
"""Seconds for what is under way to be parked, and for what was never begun."""
TOGETHER = 250
"""Rows that are written in one go."""


def put_away(course: Course) -> None:
    """Park what a course has under way, and what it has not begun, as far as time allows.

    What is left is known to this process alone, which can go on with it.
    """
    course.way.order(course.ordered or "park")
    settled(course, within=ENDING)
    if course.kept and course.settings.journal:
        _shelve(course, until=time.monotonic() + SHELVING)


def settled(course: Course, *, within: float) -> bool:
    """Return whether everything that was under way has ended, after some seconds at most."""
    give_up = time.monotonic() + within
    while course.waits and time.monotonic() < give_up:
        course.note(course.way.ended(within=0.05))
    course.note(course.way.missed())
    return not course.waits


def _shelve(course: Course, *, until: float) -> None:
    batches = course.client.journal(course.settings).batches
    rest = (item for item in course.rest() if item.entry is None)
    while time.monotonic() < until:
        few: list[tuple[Request, bytes]] = []
        for item in itertools.islice(rest, TOGETHER):
            try:
                request = course.request_of(item)
                few.append((request, key_of(course, request)))
            except NbcodexError:
                continue  # it is refused again, and told, when the course goes on
        if not few:
            return
        batches.shelve(few)


def key_of(course: Course, request: Request) -> bytes:
    """Return the key under which the answer to a row is found.

    Raises
    ------
    NbcodexError
        If nobody knows where it would go.
    """
    api_client = course.client.engine().api_client
    return equality_key(request, base_url=api_client.endpoint(request, course.settings).base_url)
