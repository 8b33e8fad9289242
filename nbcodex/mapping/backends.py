"""The two ways for rows to be answered: each as a request of its own, or through the Batch API.

A backend decides how many rows are active at once, counts what they use, and hands their endings to
the thread that executes the map. Live rows are written to the journal by `requests.entry_writer`,
like any request; rows of batch jobs by `upload` and `batch_rows`.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

from nbcodex import events
from nbcodex.client import Client
from nbcodex.errors import LimitError, NbcodexError, shorten
from nbcodex.events import EndAction, Ending, Event
from nbcodex.journal.reads import Entry
from nbcodex.mapping.batch_rows import PendingRow
from nbcodex.mapping.upload import BatchUploader
from nbcodex.models import MapStats, Reply, Request, UsageTotals
from nbcodex.openai_api.batches import MAX_BATCH_REQUESTS
from nbcodex.requests.handle import Handle
from nbcodex.runtime import event_loop
from nbcodex.runtime.event_loop import INTERRUPT_CHECK_INTERVAL_S
from nbcodex.settings import Settings

# Rows that are started and have not ended: enough for 200 answers a second of 2.5 seconds each.
MAX_ACTIVE_ROWS = 512
# Active rows that wait for capacity: enough that the limiter always has a next one. More would
# only cost memory, since each is a task and an entry of the limiter's queue.
MAX_QUEUED_ROWS = 64
# If so many attempts of every active row have failed, which takes some 40 seconds, and no row was
# ever answered, the map ends.
MAX_FAULTY_ATTEMPTS = 6
# Rows that are handed to the event loop, and inserted into the journal, in one transaction.
UPLOAD_CHUNK_ROWS = 5_000
# Longest wait for endings while there are rows to read, so that reading is not delayed.
READING_WAIT_S = 0.01


class StatsCounter:
    """Counts the rows of one map and sums what they use; a listener on the loop's thread."""

    def __init__(self, map_id: str) -> None:
        # Replaced, never changed, so that another thread cannot read a mixture of two states.
        self.stats = MapStats(map_id=map_id, at=0.0)
        # Cancelled rows. `MapRun.stats` adds them to `failed`, unless the user cancelled the map.
        self.cancelled = 0
        # By request id, the latest fault of each row that is being retried; limits are not faults.
        self.faults: dict[str, events.BackingOff] = {}
        self._sent_ids: set[str] = set()
        self._has_new_answer = False  # whether the server has answered a row

    def __call__(self, event: Event) -> None:
        """Count an event of one of the map's rows."""
        stats, changes = self.stats, dict[str, Any]()
        if isinstance(event, events.Sent):
            self._sent_ids.add(event.request_id)
            changes["model"] = event.model or stats.model
        elif isinstance(event, events.BackingOff | events.CoolingDown):
            self._sent_ids.discard(event.request_id)
            if isinstance(event, events.BackingOff) and not isinstance(event.error, LimitError):
                self.faults[event.request_id] = event
            if event.limit is not None:
                changes.update(cooldown_until=event.resume_at, limit=event.limit)
        elif isinstance(event, Ending):
            reply = event.reply
            self._sent_ids.discard(event.request_id)
            self.faults.pop(event.request_id, None)
            changes.update(
                totals=stats.totals + UsageTotals.of(reply),
                model=reply.model or stats.model,
                simulated=stats.simulated or reply.simulated,
            )
            match event:
                case events.Finished():
                    self._has_new_answer = self._has_new_answer or not reply.reused
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
        self.stats = replace(stats, sent=len(self._sent_ids), **changes)

    def count_restored(self, reply: Reply) -> None:
        """Count a row whose answer is from the journal, without what it used then."""
        done, reused, cut = self.stats.done, self.stats.reused, self.stats.cut + bool(reply.cut)
        self.stats = replace(self.stats, done=done + 1, reused=reused + 1, cut=cut)

    def reset_unanswered(self) -> None:
        """Count the rows without an answer from zero, since a resumed map starts them again."""
        self.cancelled, self._has_new_answer = 0, False
        self.faults.clear()
        self.stats = replace(self.stats, failed=0, parked=0)

    def common_fault(self, active_rows: int) -> NbcodexError | None:
        """Return the fault of the first row if each row has met MAX_FAULTY_ATTEMPTS, else None."""
        # A server that has answered a row is more likely to recover, so it is given more time.
        faults = list(self.faults.values())
        if self._has_new_answer or not faults or len(faults) < active_rows:
            return None
        met_all = all(fault.attempt >= MAX_FAULTY_ATTEMPTS for fault in faults)
        return faults[0].error if met_all else None


class Backend(ABC):
    """A way for rows to be answered. All methods are called by the thread that executes the map."""

    # How many rows of an iterator may be started before the first of their replies is returned.
    max_unreturned_rows: int

    def __init__(self, client: Client, settings: Settings, *, map_id: str) -> None:
        self.client, self.settings, self.counter = client, settings, StatsCounter(map_id)
        # By request id, until the map has applied them: an interrupt may come before that.
        self._unconfirmed: dict[str, Ending] = {}
        # Ids of rows with new endings. Its methods are reentrant, so no interrupt locks it up.
        self._arrivals: queue.SimpleQueue[str] = queue.SimpleQueue()

    @property
    @abstractmethod
    def stage(self) -> str:
        """What the map waits for, in a few words; empty while rows are being answered."""

    @abstractmethod
    def capacity(self, active_rows: int) -> int:
        """Return how many more rows can be started while so many have not ended."""

    @abstractmethod
    def start_row(self, request: Request, entry: Entry | None = None) -> None:
        """Start the request of a row, or resume it if it has an entry in the journal."""

    def send_collected(self) -> None:  # noqa: B027 - live rows are not collected
        """Send the rows that are collected, if any, because no more follow for the moment."""

    @abstractmethod
    def end_active(self, action: EndAction, /) -> None:
        """End the active rows; the provider continues with the batch jobs that it has."""

    def next_endings(self, *, timeout: float) -> list[Ending]:
        """Return the endings that are not confirmed; wait for one at most `timeout` seconds."""
        with contextlib.suppress(queue.Empty):
            if timeout > 0 and not self._unconfirmed:
                # On Windows, where the interval is not None, an interrupt cannot end this wait.
                self._arrivals.get(timeout=min(timeout, INTERRUPT_CHECK_INTERVAL_S or timeout))
            while True:
                self._arrivals.get_nowait()
        return list(self._unconfirmed.values())

    def confirm_ending(self, request_id: str) -> None:
        """Note that the map has applied the ending of this row."""
        self._unconfirmed.pop(request_id, None)

    def _on_event(self, event: Event) -> None:
        self.counter(event)
        if isinstance(event, Ending):
            self._unconfirmed[event.request_id] = event
            self._arrivals.put(event.request_id)


class LiveBackend(Backend):
    """Each row is a request of its own, limited together with all others of this process."""

    max_unreturned_rows = 1024

    def __init__(self, client: Client, settings: Settings, *, map_id: str) -> None:
        super().__init__(client, settings, map_id=map_id)
        # By request id, until they have ended: the client and the loop hold only weak references.
        self._handles: dict[str, Handle] = {}

    @property
    def stage(self) -> str:
        """The fault after which all rows wait, and the seconds until the next attempt."""
        faults = list(self.counter.faults.values())
        if not faults or self.counter.stats.sent:
            return ""
        fault = min(faults, key=lambda each: each.resume_at)
        seconds = max(0.0, fault.resume_at - self.client.clock.now())
        return f"{shorten(fault.error.message, max_chars=90)} Next attempt in {seconds:.0f} s"

    def capacity(self, active_rows: int) -> int:
        """Return how many more rows may wait for the limiter."""
        queued = active_rows - self.counter.stats.sent
        return min(MAX_ACTIVE_ROWS - active_rows, MAX_QUEUED_ROWS - queued)

    def start_row(self, request: Request, entry: Entry | None = None) -> None:
        """Start the request of a row, or resume it if it has an entry in the journal."""
        if entry is None:
            handle = self.client.create_handle(request, self.settings, listener=self._on_event)
        else:
            handle = self.client.resume(entry, self.settings, listener=self._on_event)
        self._handles[request.id] = handle
        handle.start()

    def end_active(self, action: EndAction, /) -> None:
        """End the active rows."""
        with contextlib.suppress(RuntimeError):  # at exit: `Client.close` has parked them
            for handle in list(self._handles.values()):
                handle.end(action)

    def confirm_ending(self, request_id: str) -> None:
        """Note that the map has applied the ending of this row."""
        super().confirm_ending(request_id)
        self._handles.pop(request_id, None)


class BatchBackend(Backend):
    """Rows are collected, uploaded together at half the price, and answered within a day."""

    max_unreturned_rows = MAX_BATCH_REQUESTS

    def __init__(self, client: Client, settings: Settings, *, map_id: str) -> None:
        super().__init__(client, settings, map_id=map_id)
        self._cancels_jobs = False  # whether the provider's jobs are cancelled, not waited for
        self._uploader: BatchUploader | None = None
        self._collected: list[PendingRow] = []  # rows that the uploader does not have yet
        self._active_ids: set[str] = set()  # of this map's rows without an ending
        self._is_collecting = False  # whether more rows may follow

    @property
    def stage(self) -> str:
        """How far the provider has come with the batch jobs."""
        return self._uploader.stage if self._uploader else ""

    def prepare_resume(self, *, cancel_jobs: bool) -> None:
        """Get ready to resume; with `cancel_jobs`, the provider's batch jobs are cancelled."""
        self._uploader, self._cancels_jobs = None, cancel_jobs

    def capacity(self, active_rows: int) -> int:  # noqa: ARG002 - the provider takes any number
        """Return how many more rows can be collected; none while too many await the journal."""
        if self._uploader and self._uploader.uninserted_rows > UPLOAD_CHUNK_ROWS:
            return 0
        return UPLOAD_CHUNK_ROWS - len(self._collected)

    def start_row(self, request: Request, entry: Entry | None = None) -> None:
        """Collect the request of a row, with its entry if it is in the journal."""
        self._active_ids.add(request.id)
        self._collected.append(PendingRow(request, entry))
        self._is_collecting = True
        if len(self._collected) >= UPLOAD_CHUNK_ROWS:
            self._add_to_uploader()

    def send_collected(self) -> None:
        """Upload the rows that are collected, because no more follow for the moment."""
        if self._is_collecting:
            self._add_to_uploader()
            self._is_collecting = False
            if self._uploader:
                event_loop.shared().call_soon(self._uploader.flush)

    def _add_to_uploader(self) -> None:
        if not self._collected:
            return
        if self._uploader is None:
            services, cancels_jobs = self.client.services(), self._cancels_jobs
            self._uploader = BatchUploader(
                services, self.settings, on_event=self._on_event, cancels_jobs=cancels_jobs
            )
        rows, self._collected = self._collected, []
        event_loop.shared().call_soon(self._uploader.add, rows)

    def end_active(self, _action: EndAction, /) -> None:
        """Park the active rows; the provider continues with the jobs that it has."""
        self._add_to_uploader()
        uploader, self._uploader, self._is_collecting = self._uploader, None, False
        if uploader is not None:
            with contextlib.suppress(RuntimeError):  # the interpreter exits: the loop is closed
                event_loop.shared().call_soon(lambda: asyncio.ensure_future(uploader.park()))

    def next_endings(self, *, timeout: float) -> list[Ending]:
        """Do what `Backend.next_endings` does, but wait shortly while there are rows to collect."""
        timeout = min(timeout, READING_WAIT_S) if self._is_collecting else timeout
        return super().next_endings(timeout=timeout)

    def _on_event(self, event: Event) -> None:
        self.client.totals(event)  # the handles of live rows send it their events themselves
        if event.request_id not in self._active_ids:
            return  # of a row of another map, in a batch job that this map waits for
        super()._on_event(event)
        if isinstance(event, Ending):
            self._active_ids.discard(event.request_id)


BACKENDS: dict[str, type[Backend]] = {"live": LiveBackend, "batch": BatchBackend}
