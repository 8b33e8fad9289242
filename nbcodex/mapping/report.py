"""A run as its watchers hear of it.

Owns which figures are told. Must not change anything.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from nbcodex.models import MapStats
from nbcodex.runtime import event_loop

if TYPE_CHECKING:
    from nbcodex.mapping.map_run import MapRun

TOLD = 5
"""Failed rows that are told."""


def progress_of(run: MapRun) -> MapStats:
    """Return how far a run has come."""
    tally = run.way.tally
    failed, total = tally.failed + run.refused, run.shape.total
    if run.end_action != "cancel":  # else those are of the rest, with which a resume goes on
        failed += tally.cancelled
    put_away = run.outcome not in {"", "done"} and total is not None
    tokens, requests = limits_of(run, tally.model)
    return MapStats(
        map_id=run.id,
        at=run.client.clock.now(),
        total=total,
        done=tally.done,
        reused=tally.reused,
        failed=failed,
        parked=max(0, (total or 0) - tally.done - failed) if put_away else tally.parked,
        sent=tally.sent,
        waiting=max(0, run.waits - tally.sent),
        totals=tally.totals,
        closed_until=tally.closed_until,
        limit=tally.limit,
        tokens_per_minute=tokens,
        requests_per_minute=requests,
        model=tally.model,
        simulated=tally.simulated,
        stage="" if run.outcome else run.way.stage,
        outcome=run.outcome,
        failures=tuple(itertools.islice(run.failures.values(), TOLD)),
    )


def limits_of(run: MapRun, model: str | None) -> tuple[float | None, float | None]:
    """Return the tokens and the requests a minute that the server allows, as far as it told."""
    if model is None or run.outcome or event_loop.shared().is_current_thread:
        # Nothing is sent yet, or any more; and on the loop nobody waits for anything.
        return None, None
    known = event_loop.shared().submit(run.client.limits(run.settings)).result()
    for label, each in known.items():
        if label.partition(" at ")[0] == model:
            gauges = (each.tokens, each.requests)
            tokens, requests = [gauge.limit if gauge else None for gauge in gauges]
            return tokens, requests
    return None, None
