"""The two ways for rows to be answered: each as a request of its own, or through the Batch API.

Owns how many rows are active at once, and how endings reach the thread that executes the map. Must
not know the order of rows, nor what is done with answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nbcodex import events
from nbcodex.errors import LimitError, NbcodexError, shorten
from nbcodex.events import EndAction, Ending, Event
from nbcodex.mapping.batch_rows import PendingRow
from nbcodex.mapping.upload import BatchUploader
from nbcodex.models import MapStats, Reply, Request, UsageTotals
from nbcodex.openai_api.batches import MAX_BATCH_REQUESTS
from nbcodex.runtime import event_loop
from nbcodex.runtime.event_loop import WAIT_SLICE_S
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from nbcodex.client import Client
    from nbcodex.journal.reads import Entry
    from nbcodex.requests.handle import Handle

# Enough for 200 answers a second that take two and a half seconds each.
MAX_ACTIVE_ROWS = 512
# Rows that wait for capacity: enough that the limiter always has a next one. More would only
# cost memory, since each is a task and an entry of the limiter's queue.
MAX_QUEUED_ROWS = 64
# Attempts of each row, some 40 seconds, after which a server that answers none is given up.
MAX_FAULTY_ATTEMPTS = 6
# Rows of an iterator between the reply to be returned next and the last row started.
LIVE_WINDOW_ROWS = 1024
# Rows that move to the event loop, and into the journal, in one transaction.
UPLOAD_CHUNK_ROWS = 5_000
# Longest wait for endings while there are rows to read, so that reading is not delayed.
READING_WAIT_S = 0.01


class StatsCounter:
    """Sums over the rows of one map; an event listener, called on the event loop's thread."""

    def __init__(self, map_id: str) -> None:
        # Replaced as a whole, so that another thread never reads a mixture of two states.
        self.stats = MapStats(map_id=map_id, at=0.0)
        # Counted apart: these are failures, unless the user cancelled the whole map.
        self.cancelled = 0
        # The latest fault of each row that is retried; limits are not faults.
        self.faults: dict[str, events.BackingOff] = {}
        self._sent: set[str] = set()
        self._has_answer = False

    def __call__(self, event: Event) -> None:
        """Count an event of one of the map's rows."""
        stats, changes = self.stats, dict[str, Any]()
        if isinstance(event, events.Sent):
            self._sent.add(event.request_id)
            changes["model"] = event.model or stats.model
        elif isinstance(event, events.BackingOff | events.CoolingDown):
            self._sent.discard(event.request_id)
            if isinstance(event, events.BackingOff) and not isinstance(event.error, LimitError):
                self.faults[event.request_id] = event
            if event.limit is not None:
                changes.update(closed_until=event.resume_at, limit=event.limit)
        elif isinstance(event, Ending):
            reply = event.reply
            self._sent.discard(event.request_id)
            self.faults.pop(event.request_id, None)
            changes.update(
                totals=stats.totals + UsageTotals.of(reply),
                model=reply.model or stats.model,
                simulated=stats.simulated or reply.simulated,
            )
            match event:
                case events.Finished():
                    self._has_answer = self._has_answer or not reply.reused
                    changes.update(
                        done=stats.done + 1,
                        reused=stats.reused + reply.reused,
                        cut=stats.cut + bool(reply.cut),
                    )
                case events.Parked():
                    changes["parked"] = stats.parked + 1
                case events.Cancelled():
                    self.cancelled += 1
                case _:
                    changes["failed"] = stats.failed + 1
        else:
            return
        self.stats = replace(stats, sent=len(self._sent), **changes)

    def count_known(self, reply: Reply) -> None:
        """Count a row whose answer is known from an earlier execution."""
        stats, cut = self.stats, bool(reply.cut)
        self.stats = replace(
            stats, done=stats.done + 1, reused=stats.reused + 1, cut=stats.cut + cut
        )

    def reset_unanswered(self) -> None:
        """Forget the endings without an answer: the map is resumed."""
        self.cancelled, self._has_answer = 0, False
        self.faults.clear()
        self.stats = replace(self.stats, failed=0, parked=0)

    def common_fault(self, active: int) -> NbcodexError | None:
        """Return the fault that has met every row, several times each; None if any is answered."""
        # A server that has answered a row is more likely to recover, so it is given more time.
        faults = list(self.faults.values())
        if self._has_answer or not faults or len(faults) < active:
            return None
        met_all = all(fault.attempt >= MAX_FAULTY_ATTEMPTS for fault in faults)
        return faults[0].error if met_all else None


class Backend(ABC):
    """A way for rows to be answered. All methods are called by the thread that executes the map."""

    # Rows of an iterator between the reply to be returned next and the last row started.
    window: int

    def __init__(self, client: Client, settings: Settings, *, map_id: str) -> None:
        self._client, self.settings, self.counter = client, settings, StatsCounter(map_id)
        self._queue: queue.SimpleQueue[Ending] = queue.SimpleQueue()
        # An interrupt may strike after `endings` has taken an ending and before the map has
        # recorded it. Until it is confirmed, it can be fetched again from here.
        self._unconfirmed: dict[str, Ending] = {}

    @property
    @abstractmethod
    def stage(self) -> str:
        """What the map waits for, in a few words; empty while rows are being answered."""

    @abstractmethod
    def capacity(self, active: int) -> int:
        """Return how many more rows can be started while `active` rows have not ended."""

    @abstractmethod
    def start_row(self, request: Request, entry: Entry | None = None) -> None:
        """Start a request, or resume one that is in the journal."""

    @abstractmethod
    def send_pending(self) -> None:
        """Send the rows that are collected: no more follow for the moment."""

    @abstractmethod
    def end_active(self, action: EndAction, /) -> None:
        """End what has not ended; the provider continues with the batch jobs that it has."""

    def endings(self, *, timeout: float) -> list[Ending]:
        """Return the endings that have arrived; wait for one at most `timeout` seconds."""
        found: list[Ending] = []
        with contextlib.suppress(queue.Empty):
            if timeout > 0:
                # On Windows an interrupt cannot end this wait, so it is taken in slices.
                found.append(self._queue.get(timeout=min(timeout, WAIT_SLICE_S or timeout)))
            while True:
                found.append(self._queue.get_nowait())
        return found

    def unconfirmed(self) -> list[Ending]:
        """Return the endings that are not confirmed, those returned by `endings` included."""
        return list(self._unconfirmed.values())

    def confirm(self, request_id: str) -> None:
        """Note that the ending of this row is recorded."""
        self._unconfirmed.pop(request_id, None)

    def _on_event(self, event: Event) -> None:
        self.counter(event)
        if isinstance(event, Ending):
            self._unconfirmed[event.request_id] = event
            self._queue.put(event)


class LiveBackend(Backend):
    """Each row is a request of its own, limited together with all others of this process."""

    window = LIVE_WINDOW_ROWS

    def __init__(self, client: Client, settings: Settings, *, map_id: str) -> None:
        super().__init__(client, settings, map_id=map_id)
        # Held here until they have ended: the client and the event loop hold only weak references.
        self._handles: dict[str, Handle] = {}

    @property
    def stage(self) -> str:
        """The fault that keeps all rows from being sent, and the time until the next attempt."""
        faults = list(self.counter.faults.values())
        if not faults or self.counter.stats.sent:
            return ""
        first = min(faults, key=lambda fault: fault.resume_at)
        seconds = max(0.0, first.resume_at - self._client.clock.now())
        return f"{shorten(first.error.message, 90)} Next attempt in {seconds:.0f} s"

    def capacity(self, active: int) -> int:
        """Return how many rows the limiter's queue has room for."""
        queued = active - self.counter.stats.sent
        return min(MAX_ACTIVE_ROWS - active, MAX_QUEUED_ROWS - queued)

    def start_row(self, request: Request, entry: Entry | None = None) -> None:
        """Start a request, or resume one that is in the journal."""
        if entry is None:
            handle = self._client.handle(request, self.settings, listener=self._on_event)
        else:
            handle = self._client.resume(entry, self.settings, listener=self._on_event)
        self._handles[request.id] = handle
        handle.start()

    def send_pending(self) -> None:
        """Do nothing: each row is sent as soon as the limits allow."""

    def end_active(self, action: EndAction, /) -> None:
        """End what has not ended."""
        with contextlib.suppress(RuntimeError):  # the interpreter exits, and has parked them
            for handle in list(self._handles.values()):
                handle.end(action)

    def confirm(self, request_id: str) -> None:
        """Note that the ending of this row is recorded."""
        super().confirm(request_id)
        self._handles.pop(request_id, None)


class BatchBackend(Backend):
    """Rows are collected, uploaded together at half the price, and answered within a day."""

    window = MAX_BATCH_REQUESTS

    def __init__(self, client: Client, settings: Settings, *, map_id: str) -> None:
        super().__init__(client, settings, map_id=map_id)
        self._cancels_jobs = False
        self._uploader: BatchUploader | None = None
        self._rows: list[PendingRow] = []  # collected, and not with the uploader yet
        self._row_ids: set[str] = set()  # of this map, without an ending
        self._is_reading = False  # whether more rows may follow

    @property
    def stage(self) -> str:
        """State of the provider's batch jobs."""
        return self._uploader.stage if self._uploader else ""

    def prepare_resume(self, *, cancel_jobs: bool) -> None:
        """Get ready to resume; with `cancel_jobs`, the provider's batch jobs are cancelled."""
        self._uploader, self._cancels_jobs = None, cancel_jobs

    def capacity(self, active: int) -> int:  # noqa: ARG002 - the provider takes any number
        """Return how many more rows can be collected; none while too many await the journal."""
        backlog = self._uploader.backlog if self._uploader else 0
        return UPLOAD_CHUNK_ROWS - len(self._rows) if backlog <= UPLOAD_CHUNK_ROWS else 0

    def start_row(self, request: Request, entry: Entry | None = None) -> None:
        """Collect a request, or one that is in the journal."""
        self._row_ids.add(request.id)
        self._rows.append(PendingRow(request, entry))
        self._is_reading = True
        if len(self._rows) >= UPLOAD_CHUNK_ROWS:
            self._add_to_uploader()

    def send_pending(self) -> None:
        """Upload the rows that are collected: no more follow for the moment."""
        if self._is_reading:
            self._add_to_uploader()
            self._is_reading = False
            if self._uploader:
                event_loop.shared().call_soon(self._uploader.flush)

    def _add_to_uploader(self) -> None:
        if not self._rows:
            return
        if self._uploader is None:
            self._uploader = BatchUploader(
                self._client.services(),
                self.settings,
                self._on_event,
                cancels_jobs=self._cancels_jobs,
            )
        rows, self._rows = self._rows, []
        event_loop.shared().call_soon(self._uploader.add, rows)

    def end_active(self, _action: EndAction, /) -> None:
        """Park what has not ended; the provider continues with the jobs that it has."""
        self._add_to_uploader()
        uploader, self._uploader, self._is_reading = self._uploader, None, False
        if uploader is not None:
            with contextlib.suppress(RuntimeError):  # the interpreter exits
                event_loop.shared().call_soon(lambda: asyncio.ensure_future(uploader.park()))

    def endings(self, *, timeout: float) -> list[Ending]:
        """Return the endings that have arrived; wait for one at most `timeout` seconds."""
        return super().endings(
            timeout=min(timeout, READING_WAIT_S) if self._is_reading else timeout
        )

    def _on_event(self, event: Event) -> None:
        self._client.totals(event)
        if event.request_id not in self._row_ids:
            return  # a row of another map whose batch job this map waits for
        super()._on_event(event)
        if isinstance(event, Ending):
            self._row_ids.discard(event.request_id)


BACKENDS: dict[str, type[Backend]] = {"live": LiveBackend, "batch": BatchBackend}
