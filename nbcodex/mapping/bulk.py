"""Rows answered later, through the provider's Batch API, at half the price.

Owns the thread's side of it: what rows are told to, and what is heard of them. Must not know the
order of rows, nor what becomes of answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
from typing import TYPE_CHECKING

from nbcodex.events import Ending, Event
from nbcodex.mapping.pending_rows import Row
from nbcodex.mapping.stats import StatsCounter
from nbcodex.mapping.upload import BatchUploader
from nbcodex.models import Request
from nbcodex.openai_api.batches import MAX_BATCH_REQUESTS
from nbcodex.requests.event_queue import WAIT_SLICE_S
from nbcodex.runtime import event_loop
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from nbcodex.client import Client
    from nbcodex.journal.codec import Entry
    from nbcodex.mapping.map_run import EndAction

CHUNK = 5_000
"""Rows that go to the loop, and into the journal, in one go."""
READING = 0.01
"""Seconds for which endings are waited for while there are rows to read."""


class BatchBackend:
    """Rows are collected, handed in together, and heard of when the provider is done."""

    window = MAX_BATCH_REQUESTS

    def __init__(self, client: Client, settings: Settings) -> None:
        self.tally, self._ending = StatsCounter(), False
        self._client, self.settings = client, settings
        self._carrier: BatchUploader | None = None
        self._rows: list[Row] = []
        self._known: set[str] = set()
        self._told: dict[str, Ending] = {}
        self._endings: queue.SimpleQueue[Ending] = queue.SimpleQueue()
        self._reading = False

    @property
    def stage(self) -> str:
        """Where the provider is with what was handed in."""
        return self._carrier.stage if self._carrier else ""

    def begin_anew(self, *, ending: bool) -> None:
        """Be ready to go on; with `ending` what is with the provider is ended there."""
        self._carrier, self._ending = None, ending

    def room(self) -> int:
        """Return how many more rows it takes now."""
        behind = self._carrier.backlog if self._carrier else 0
        return CHUNK - len(self._rows) if behind <= CHUNK else 0

    def start(self, request: Request, entry: Entry | None = None) -> None:
        """Begin with a request, or take up one that is in the journal."""
        self._known.add(request.id)
        self._rows.append(Row(request, entry))
        self._reading = True
        if len(self._rows) >= CHUNK:
            self._pass_on()

    def complete(self) -> None:
        """For now no more rows will come: what there is may go."""
        if self._reading:
            self._pass_on()
            self._reading = False
            if self._carrier:
                event_loop.shared().call_soon(self._carrier.flush)

    def _pass_on(self) -> None:
        if not self._rows:
            return
        if self._carrier is None:
            self._carrier = BatchUploader(
                self._client.services(), self.settings, self._hear, ending=self._ending
            )
        rows, self._rows = self._rows, []
        event_loop.shared().call_soon(self._carrier.take, rows)

    def order(self, _what: EndAction, /) -> None:
        """Keep for later what is under way; the provider goes on with what it has."""
        self._pass_on()
        carrier, self._carrier, self._reading = self._carrier, None, False
        if carrier is not None:
            with contextlib.suppress(RuntimeError):  # the interpreter ends
                event_loop.shared().call_soon(lambda: asyncio.ensure_future(carrier.park()))

    def ended(self, *, within: float) -> list[Ending]:
        """Return the last events that have come, waiting for one at most `within` seconds."""
        found: list[Ending] = []
        with contextlib.suppress(queue.Empty):
            if within > 0:
                patience = READING if self._reading else within
                found.append(self._endings.get(timeout=min(patience, WAIT_SLICE_S or patience)))
            while True:
                found.append(self._endings.get_nowait())
        return found

    def missed(self) -> list[Ending]:
        """Return the last events that `ended` may have told while an interrupt struck."""
        return list(self._told.values())

    def forget(self, id_: str) -> None:
        """The end of this row has been noted."""
        self._told.pop(id_, None)

    def _hear(self, event: Event) -> None:
        self._client.totals(event)
        if event.request_id not in self._known:
            return  # a row of another map, which was handed in with one that is asked here again
        self.tally(event)
        if isinstance(event, Ending):
            self._known.discard(event.request_id)
            self._told[event.request_id] = event
            self._endings.put(event)
