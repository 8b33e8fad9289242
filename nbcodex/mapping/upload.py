"""Uploads the rows of a map in parts, and waits for their answers. Lives on the event loop.

Owns that a row is in the journal before it is uploaded, and that no row is uploaded twice: a part
is recorded before it is sent, and a part that the provider already has is waited for. Must not
know the data, nor the order of rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from nbcodex import events
from nbcodex.errors import ConfigurationError, EntryError, NbcodexError, TooLargeError
from nbcodex.journal.codec import equality_key
from nbcodex.mapping.batch_api import BatchApi, BatchPart, jobless_batch
from nbcodex.mapping.batch_rows import COMMIT_CHUNK_ROWS, Destination, PendingRow, PendingRows
from nbcodex.models import Request
from nbcodex.openai_api import pricing
from nbcodex.openai_api.batches import MAX_BATCH_BYTES, MAX_BATCH_REQUESTS
from nbcodex.openai_api.pricing import BATCH_TIER
from nbcodex.requests import structured_output
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from nbcodex.journal.maps import BatchJobs
    from nbcodex.requests.runner import Services

# Waits before a full provider queue is tried again: the first, and the longest.
FIRST_QUEUE_WAIT_S, MAX_QUEUE_WAIT_S = 30.0, 600.0
# Rows after which the event loop gets a turn: displays and other requests share it.
YIELD_EVERY_ROWS = 50

log = logging.getLogger(__name__)


class BatchUploader:
    """Brings the rows of one map to the provider. Its methods are called on the loop's thread."""

    def __init__(
        self,
        services: Services,
        settings: Settings,
        emit: Callable[[events.Event], None],
        *,
        cancels_jobs: bool = False,
    ) -> None:
        self._services, self._settings = services, settings
        # Whether the provider's jobs are cancelled, and nothing more is uploaded.
        self._cancels_jobs = cancels_jobs
        self._clock, self._jobs = services.clock, services.journal(settings).batch_jobs
        self._batch_api = BatchApi(services, settings)
        self._pending = PendingRows(services, settings, self._jobs, self._batch_api, emit)
        self.backlog = 0  # number of rows that are not in the journal yet
        self._map_id = ""
        # Held by the task that inserts rows; the others wait in order, and `flush` behind them.
        self._inserting = asyncio.Lock()
        # Rows to be uploaded; rows that wait for a part which holds an equal row, by its tag.
        self._ready: dict[Destination, deque[PendingRow]] = {}
        self._waiting: dict[str, list[PendingRow]] = {}
        # Parts at the provider by tag, None while one is being claimed; tags that are done.
        self._uploaded: dict[str, BatchPart | None] = {}
        self._closed_tags: set[str] = set()
        self._part_closed = asyncio.Event()
        self._max_rows, self._stage = MAX_BATCH_REQUESTS, ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._upload_task: asyncio.Task[None] | None = None

    def add(self, rows: list[PendingRow]) -> None:
        """Add rows; they are uploaded after `flush`."""
        if not self._map_id:
            self._map_id = rows[0].request.origin.map_id or ""
            # Once per map is often enough for files that a dead kernel left at the provider.
            self._spawn(erase_leftovers(self._jobs, self._services, self._settings))
        self.backlog += len(rows)
        self._pending.rows.update((row.request.id, row) for row in rows)
        self._spawn(self._insert_added(rows))

    def flush(self) -> None:
        """Upload what was added: no more rows follow for the moment."""
        self._spawn(self._upload_added())

    async def park(self) -> None:
        """Stop waiting and park all rows; the provider continues with its jobs."""
        # A commit under way is completed; everything else may be cancelled at any point, because
        # the journal has each step before it is taken.
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._pending.wait_shielded()
        uploaded = {id_ for part in self._uploaded.values() if part for id_ in part.requests}
        left = dict(self._pending.rows)
        await self._jobs.park_rows(self._uploaded, left, map_id=self._map_id)
        for id_, row in left.items():
            attempts, state = (1, "still") if id_ in uploaded else (0, "not yet")
            why = f"The row is {state} with the provider."
            self._pending.drop(self._pending.parked(row.request, why, attempts=attempts))

    @property
    def stage(self) -> str:
        """State of the provider's jobs in a few words."""
        if self._batch_api.fault:
            return f"retrying after: {self._batch_api.fault}"
        known = [part.batch for part in list(self._uploaded.values()) if part and part.batch]
        if self._stage or not known:
            return self._stage
        status = known[0].status.replace("_", " ")
        answered = sum(batch.answered + batch.failed for batch in known)
        total = sum(batch.total for batch in known)
        return f"{status} {answered:,} of {total:,}" if answered else status

    async def _insert_added(self, rows: list[PendingRow]) -> None:
        async with self._inserting:
            await self._insert(rows)
            self.backlog -= len(rows)

    async def _upload_added(self) -> None:
        async with self._inserting:
            self._start_tasks()

    async def _insert(self, rows: Sequence[PendingRow]) -> None:
        """Insert rows into the journal, and find out what each of them waits for."""
        unclaimed: list[PendingRow] = []
        api_client, settings = self._services.api_client, self._settings
        for number, row in enumerate(rows):
            # A batch job's answer is kept in its file; `durable` would keep it a second time.
            request = row.request = replace(row.request, durable=False)
            try:
                model = await api_client.resolve_model(request, settings)
                endpoint = api_client.endpoint(request, settings)
                base_url, row.request = endpoint.base_url, request.with_server(endpoint.server)
                row.destination = base_url, self._batch_api.client.api_for(request), model
                row.key = equality_key(request, base_url=base_url)
            except NbcodexError as error:
                await self._pending.finish([self._pending.failed(row.request, error)])
                continue
            tag = row.entry.batch_job if row.entry else None
            if tag and tag not in self._closed_tags:
                self._waiting.setdefault(tag, []).append(row)
            else:
                unclaimed.append(row)
            if number % YIELD_EVERY_ROWS == 0:
                await asyncio.sleep(0)
        inserted = await self._jobs.insert_rows(
            [(row.request, row.key) for row in unclaimed],
            existing={row.request.id for row in unclaimed if row.entry},
        )
        ended: list[events.Ending] = []
        for row in unclaimed:
            row.entry = None
            request, id_ = row.request, row.request.id
            if id_ in inserted.unavailable:
                lost = EntryError(f"Row {id_} is done, or another kernel is working on it.")
                ended.append(self._pending.failed(request, lost))
            elif reply := structured_output.reusable(request, inserted.answers.get(id_)):
                ended.append(events.Finished(request_id=id_, at=self._clock.now(), reply=reply))
            elif (tag := inserted.other_jobs.get(id_)) and tag not in self._closed_tags:
                self._waiting.setdefault(tag, []).append(row)
            else:
                self._ready.setdefault(row.destination, deque()).append(row)
        await self._pending.finish(ended)

    def _start_tasks(self) -> None:
        for tag in self._waiting:
            if tag not in self._uploaded:
                self._uploaded[tag] = None
                self._spawn(self._resume_part(tag))
        if self._upload_task is None or self._upload_task.done():
            self._upload_task = self._spawn(self._upload_ready())

    async def _upload_ready(self) -> None:
        """Upload what is ready, part after part, each when the one before it is accepted."""
        delay = FIRST_QUEUE_WAIT_S
        while rows := next(filter(None, self._ready.values()), None):
            if self._cancels_jobs:
                left = [rows.popleft() for _ in range(min(len(rows), COMMIT_CHUNK_ROWS))]
                endings = [self._pending.parked(row.request, "Not uploaded.") for row in left]
                await self._pending.finish(endings)
                continue
            self._stage = "uploading"
            part, data = await self._write_part(rows)
            if not part.requests or await self._upload(part, data):
                delay = FIRST_QUEUE_WAIT_S
                self._max_rows = min(MAX_BATCH_REQUESTS, self._max_rows * 2)
                continue
            # The provider limits the tokens in its queue. If nothing of ours is in it, the part
            # alone may exceed the limit, and waiting would never help.
            if not any(self._uploaded.values()):
                self._max_rows = max(1, len(part.requests) // 2)
            self._stage = "the provider's queue is full"
            self._part_closed.clear()
            await self._clock.wait(self._clock.now() + delay, unless=self._part_closed)
            delay = min(delay * 2, MAX_QUEUE_WAIT_S)
        self._stage = ""
        await self._jobs.end_map_heartbeats(self._map_id)

    async def _write_part(self, rows: deque[PendingRow]) -> tuple[BatchPart, bytes]:
        """Take rows from the left, as many as fit; return them as a part, and its input file."""
        first = rows[0]
        base_url, _, model = first.destination
        tag = f"{first.request.origin.map_id}.{secrets.token_hex(4)}"
        part = BatchPart(tag, {}, first.request, base_url, model)
        data = bytearray()
        while rows and len(part.requests) < self._max_rows:
            request = rows[0].request
            try:
                await self._services.budget.reserve(
                    request,
                    caps=self._settings.budgets,
                    journal=self._services.budget_journal(self._settings),
                    model=model,
                    base_url=base_url,
                    tier=BATCH_TIER,
                )
                line = self._batch_api.client.request_line(request, model=model)
                if len(line) > MAX_BATCH_BYTES:
                    raise TooLargeError("The row is larger than a whole batch.")
            except NbcodexError as error:
                rows.popleft()
                await self._pending.finish([self._pending.failed(request, error)])
                continue
            # The first row always fits: longer ones are refused above.
            if part.requests and len(data) + len(line) > MAX_BATCH_BYTES:
                break
            rows.popleft()
            data += line
            part.requests[request.id] = part.sample = request
            if len(part.requests) % YIELD_EVERY_ROWS == 0:
                await asyncio.sleep(0)
        return part, bytes(data)

    async def _upload(self, part: BatchPart, data: bytes) -> bool:
        """Upload a part and wait for its validation; return False if the queue is full."""
        self._uploaded[part.tag] = part
        # Recorded before the upload: a kernel that dies in between leaves a tag to look for, and
        # the next one does not pay for the rows again.
        await self._jobs.insert_job(part.tag, part.requests.values(), base_url=part.base_url)
        try:
            record_file = partial(self._jobs.set_remote_ids, part.tag)
            part.batch = await self._batch_api.create(part, data, record_file=record_file)
        except NbcodexError as error:
            del self._uploaded[part.tag]
            await self._jobs.withdraw_job(part.tag)
            requests = part.requests.values()
            await self._pending.finish([self._pending.failed(each, error) for each in requests])
            return True
        await self._on_job(part)
        self._stage = ""
        try:
            batch = await self._batch_api.poll(part, until_validated=True)
        except NbcodexError as error:
            await self._give_up(part, error)
            return True
        if batch.is_queue_full:
            await self._return_rows(part)
            return False
        self._spawn(self._wait_for_job(part))
        return True

    async def _on_job(self, part: BatchPart) -> None:
        """Record the provider's id of a job, and report that its rows are sent."""
        assert part.batch is not None  # noqa: S101 - it was created, or found
        await self._jobs.set_remote_ids(part.tag, remote_id=part.batch.id)
        pricing.start_loading(part.base_url)
        self._pending.emit(part.requests, events.Sent, attempt=1, model=part.model, input_tokens=0)

    async def _return_rows(self, part: BatchPart) -> None:
        """Put the rows of a part that was not accepted back where they were."""
        if part.batch is not None:
            await self._batch_api.erase(part.batch, part.sample)
        await self._jobs.withdraw_job(part.tag)
        self._uploaded.pop(part.tag, None)
        self._pending.emit(
            part.requests, events.CoolingDown, limit=None, resume_at=None, waited=0.0
        )
        rows = self._pending.rows
        # A resumed part may hold rows of another map, which wait for nothing here.
        foreign = [id_ for id_ in part.requests if id_ not in rows]
        await self._jobs.park_rows([], foreign)
        for row in reversed([rows[id_] for id_ in part.requests if id_ in rows]):
            row.entry = None
            self._ready.setdefault(row.destination, deque()).appendleft(row)

    async def _resume_part(self, tag: str) -> None:
        """Continue with a part that was uploaded by another kernel, or before Stop."""
        job = await self._jobs.claim_job(tag)
        if job is None or not job.requests:
            await self._close_part(tag)
            return
        requests = {request.id: request for request in job.requests}
        part = self._uploaded[tag] = BatchPart(tag, requests, job.requests[0], job.base_url)
        # Rows of the part itself get its answers; only equal rows of this map continue to wait.
        waiting = self._waiting[tag]
        waiting[:] = [row for row in waiting if row.request.id not in requests]
        try:
            _check_part_server(part, self._services, self._settings)
            if job.remote_id is None:
                part.batch = await self._batch_api.find(part)
            else:
                part.batch = await self._batch_api.retrieve(job.remote_id, part.sample)
        except NbcodexError as error:
            await self._give_up(part, error)
            return
        if part.batch is None:  # a kernel died between recording the part and creating its job
            part.batch = jobless_batch(job.file_id)
            await self._return_rows(part)
            await self._close_part(tag)
            return
        await self._on_job(part)
        await self._wait_for_job(part)

    async def _wait_for_job(self, part: BatchPart) -> None:
        try:
            if self._cancels_jobs:
                await self._batch_api.cancel(part)
            batch = await self._batch_api.poll(part)
            if batch.is_queue_full:
                await self._return_rows(part)
            else:
                await self._pending.read_results(part)
        except NbcodexError as error:
            await self._give_up(part, error)
        else:
            await self._close_part(part.tag)

    async def _give_up(self, part: BatchPart, error: NbcodexError) -> None:
        """End the rows of a part whose state is unknown; unless cancelled, they stay with it."""
        requests = list(part.requests.values())
        if self._cancels_jobs:
            await self._jobs.withdraw_job(part.tag)
            why = f"The batch is abandoned. {error.message}"
            await self._pending.finish([self._pending.parked(each, why) for each in requests])
        else:
            await self._jobs.park_rows([part.tag], [])
            for request in requests:
                self._pending.drop(self._pending.failed(request, error))
        await self._close_part(part.tag)

    async def _close_part(self, tag: str) -> None:
        """Mark a part as done, and insert the rows that waited for it: answered, or to upload."""
        self._uploaded.pop(tag, None)
        self._closed_tags.add(tag)
        self._part_closed.set()
        if rows := self._waiting.pop(tag, []):
            await self._insert(rows)
        self._start_tasks()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"codex-{self._map_id}")
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        """End all rows if a task raised: even our own defect must not leave the map waiting."""
        self._tasks.discard(task)
        if task.cancelled() or (defect := task.exception()) is None:
            return
        log.error("unexpected error in map %s", self._map_id, exc_info=defect)
        error = NbcodexError(
            f"A defect in nbcodex: {type(defect).__name__}.", advice="Please report it."
        )
        for row in list(self._pending.rows.values()):
            self._pending.drop(self._pending.failed(row.request, error))


async def erase_leftovers(jobs: BatchJobs, services: Services, settings: Settings) -> None:
    """Erase the files of parts whose rows have all ended, or were deleted from the journal."""
    sample, batch_api = Request(prompt="?"), BatchApi(services, settings)
    for job in await jobs.unerased_jobs():
        part = BatchPart(job.tag, {}, sample, job.base_url, batch=jobless_batch(job.file_id))
        with contextlib.suppress(NbcodexError):
            _check_part_server(part, services, settings)
            if job.remote_id:
                part.batch = await batch_api.client.retrieve_batch(job.remote_id, sample)
            await batch_api.cancel(part)
            if part.batch and part.batch.ended and await batch_api.erase(part.batch, sample):
                await jobs.close_job(job.tag, erased=True)


def _check_part_server(part: BatchPart, services: Services, settings: Settings) -> None:
    """Raise a ConfigurationError if the settings lead to another server than the part's."""
    here = services.api_client.endpoint(part.sample, settings).base_url
    if here != part.base_url:
        raise ConfigurationError(
            f"These rows are at {part.base_url}, but the server is now {here}.",
            advice="Restore the base URL and resume.",
        )
