"""What becomes of a map's rows that are not answered when it stops: they are parked.

Owns how long that may take: Stop must not wait for a hundred thousand rows.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

from nbcodex.errors import NbcodexError
from nbcodex.journal.codec import equality_key

if TYPE_CHECKING:
    from nbcodex.mapping.map_run import MapRun
    from nbcodex.models import Request

ENDING, SHELVING = 0.5, 1.0
"""Seconds for what is under way to be parked, and for what was never begun."""
TOGETHER = 250
"""Rows that are written in one go."""


def put_away(run: MapRun) -> None:
    """Park what a run has under way, and what it has not begun, as far as time allows.

    What is left is known to this process alone, which can go on with it.
    """
    run.way.order(run.end_action or "park")
    settled(run, within=ENDING)
    if run.keeps_replies and run.settings.journal:
        _shelve(run, until=time.monotonic() + SHELVING)


def settled(run: MapRun, *, within: float) -> bool:
    """Return whether everything that was under way has ended, after some seconds at most."""
    give_up = time.monotonic() + within
    while run.waits and time.monotonic() < give_up:
        run.note(run.way.ended(within=0.05))
    run.note(run.way.missed())
    return not run.waits


def _shelve(run: MapRun, *, until: float) -> None:
    batches = run.client.journal(run.settings).maps
    rest = (item for item in run.rest() if item.entry is None)
    while time.monotonic() < until:
        few: list[tuple[Request, bytes]] = []
        for item in itertools.islice(rest, TOGETHER):
            try:
                request = run.request_of(item)
                few.append((request, key_of(run, request)))
            except NbcodexError:
                continue  # it is refused again, and told, when the run goes on
        if not few:
            return
        batches.insert_parked(few)


def key_of(run: MapRun, request: Request) -> bytes:
    """Return the key under which the answer to a row is found.

    Raises
    ------
    NbcodexError
        If nobody knows where it would go.
    """
    api_client = run.client.services().api_client
    return equality_key(request, base_url=api_client.endpoint(request, run.settings).base_url)
