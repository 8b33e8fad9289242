"""A course as its watchers hear of it.

Owns which figures are told. Must not change anything.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from nbcodex.progress import Progress
from nbcodex.runtime import event_loop

if TYPE_CHECKING:
    from nbcodex.mapping.course import Course

TOLD = 5
"""Failed rows that are told."""


def progress_of(course: Course) -> Progress:
    """Return how far a course has come."""
    tally = course.way.tally
    failed, total = tally.failed + course.refused, course.shape.total
    if course.ordered != "cancel":  # else those are of the rest, with which a resume goes on
        failed += tally.cancelled
    put_away = course.outcome not in {"", "done"} and total is not None
    tokens, requests = limits_of(course, tally.model)
    return Progress(
        batch=course.id,
        at=course.client.clock.now(),
        total=total,
        done=tally.done,
        reused=tally.reused,
        failed=failed,
        parked=max(0, (total or 0) - tally.done - failed) if put_away else tally.parked,
        sent=tally.sent,
        waiting=max(0, course.waits - tally.sent),
        input_tokens=tally.input_tokens,
        output_tokens=tally.output_tokens,
        cost=tally.cost,
        unpriced=tally.unpriced,
        held_until=tally.held_until,
        limit=tally.limit,
        tokens_per_minute=tokens,
        requests_per_minute=requests,
        model=tally.model,
        simulated=tally.simulated,
        stage="" if course.outcome else course.way.stage,
        outcome=course.outcome,
        failures=tuple(itertools.islice(course.failures.values(), TOLD)),
    )


def limits_of(course: Course, model: str | None) -> tuple[float | None, float | None]:
    """Return the tokens and the requests a minute that the server allows, as far as it told."""
    if model is None or course.outcome or event_loop.running().is_mine:
        # Nothing is sent yet, or any more; and on the loop nobody waits for anything.
        return None, None
    known = event_loop.running().submit(course.client.limits(course.settings)).result()
    for label, each in known.items():
        if label.partition(" at ")[0] == model:
            gauges = (each.tokens, each.requests)
            tokens, requests = [gauge.limit if gauge else None for gauge in gauges]
            return tokens, requests
    return None, None
