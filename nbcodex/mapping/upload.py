"""Uploads the rows of a map as batch jobs, and waits for their answers. Runs on the event loop.

A row is in the journal before it is uploaded, and no row is uploaded twice: a job is recorded
before its rows are sent, and a job that the provider already has is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from nbcodex import errors, events
from nbcodex.errors import NbcodexError
from nbcodex.events import Listener
from nbcodex.journal.codec import equality_key
from nbcodex.journal.maps import BatchJobs
from nbcodex.mapping import batch_rows
from nbcodex.mapping.batch_api import BatchApi, PendingJob
from nbcodex.mapping.batch_rows import Destination, PendingRow, PendingRows, parked_error
from nbcodex.models import Request
from nbcodex.openai_api import pricing
from nbcodex.openai_api.batches import MAX_BATCH_BYTES, MAX_BATCH_REQUESTS
from nbcodex.openai_api.pricing import BATCH_TIER
from nbcodex.requests import structured_output
from nbcodex.requests.runner import Services, defect_error
from nbcodex.runtime.clock import format_duration
from nbcodex.settings import Settings

# Waits before an upload is tried again that the provider's full queue refused: first, and longest.
FIRST_QUEUE_WAIT_S, MAX_QUEUE_WAIT_S = 30.0, 600.0
# Rows after which the event loop gets a turn: displays and other requests share it.
YIELD_EVERY_ROWS = 50


class BatchUploader:
    """Uploads the rows of one map. Its methods are called on the loop's thread."""

    def __init__(
        self, services: Services, settings: Settings, *, on_event: Listener, cancels_jobs: bool
    ) -> None:
        self._services, self._settings = services, settings
        # Whether the provider's jobs are cancelled, and nothing more is uploaded.
        self._cancels_jobs = cancels_jobs
        self._clock, self._batch_jobs = services.clock, services.journal(settings).batch_jobs
        self._batch_api = BatchApi(services, settings)
        self._pending = PendingRows(services, settings, self._batch_jobs, self._batch_api, on_event)
        self.uninserted_rows = 0  # number of rows that are not in the journal yet
        self._map_id = ""
        # Held by the task that inserts rows; other such tasks wait in order, `flush` behind them.
        self._inserting = asyncio.Lock()
        # Rows to be uploaded; by a job's tag, our name for it, rows in it or equal to a row in it.
        self._ready: dict[Destination, deque[PendingRow]] = {}
        self._waiting: dict[str, list[PendingRow]] = {}
        # Jobs at the provider by tag, None while one is being claimed; tags of jobs that are done.
        self._uploaded_jobs: dict[str, PendingJob | None] = {}
        self._closed_tags: set[str] = set()
        self._job_closed = asyncio.Event()
        self._max_rows, self._stage = MAX_BATCH_REQUESTS, ""  # rows of one job; see `stage`
        self._tasks: set[asyncio.Task[None]] = set()
        self._upload_task: asyncio.Task[None] | None = None

    def add(self, rows: list[PendingRow]) -> None:
        """Add rows; they are uploaded after `flush`."""
        if not self._map_id:
            self._map_id = rows[0].request.origin.map_id or ""
            # Once per map is often enough for files that a dead kernel left at the provider.
            self._spawn(erase_leftovers(self._batch_jobs, self._services, self._settings))
        self.uninserted_rows += len(rows)
        self._pending.rows.update((row.request.id, row) for row in rows)
        self._spawn(self._insert_added(rows))

    def flush(self) -> None:
        """Upload what was added: no more rows follow for the moment."""
        self._spawn(self._upload_added())

    async def park(self) -> None:
        """Stop waiting and park all rows; the provider continues with its jobs."""
        # Commits are completed. Everything else may be cancelled at any point, because each step is
        # in the journal before it is taken.
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._pending.shielded, return_exceptions=True)
        uploaded = {id_ for job in self._uploaded_jobs.values() if job for id_ in job.requests}
        remaining = dict(self._pending.rows)
        await self._batch_jobs.park_rows(in_jobs=[*self._uploaded_jobs], ids=remaining)
        await self._batch_jobs.end_map_heartbeats(self._map_id)
        for id_, row in remaining.items():
            attempts, state = (1, "still") if id_ in uploaded else (0, "not yet")
            error = parked_error(row.request, f"The row is {state} with the provider.")
            self._pending.fail_without_commit(row.request, error, attempts=attempts)

    @property
    def stage(self) -> str:
        """What the map waits for, in a few words, such as ``in progress 3 of 20``."""
        if self._batch_api.fault:
            return f"retrying after: {self._batch_api.fault}"
        batches = [job.batch for job in list(self._uploaded_jobs.values()) if job and job.batch.id]
        if self._stage or not batches:
            return self._stage
        status = batches[0].status.replace("_", " ")
        answered = sum(batch.answered + batch.failed for batch in batches)
        total = sum(batch.total for batch in batches)
        return f"{status} {answered:,} of {total:,}" if answered else status

    async def _insert_added(self, rows: list[PendingRow]) -> None:
        async with self._inserting:
            await self._insert(rows)
            self.uninserted_rows -= len(rows)

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
            if row.entry:  # it was stored with the patience of the settings at that time
                patience = max(request.patience, settings.patience)
                request = row.request = replace(request, patience=patience)
            try:
                # Also makes the SDK's client, which `endpoint` and `api_for` need.
                model = await api_client.resolve_model(request, settings)
                endpoint = api_client.endpoint(request, settings)
                if not self._cancels_jobs:  # what is only cancelled stays with its own server
                    row.request = request.with_server(endpoint.server)
                api = self._batch_api.client.api_for(request)
                row.destination = endpoint.base_url, api, model, request.patience
                row.equality_key = equality_key(request, base_url=endpoint.base_url)
            except NbcodexError as error:
                await self._pending.fail([row.request], error)
                continue
            tag = row.entry.batch_job if row.entry else None
            if tag and tag not in self._closed_tags:
                self._waiting.setdefault(tag, []).append(row)
            else:
                unclaimed.append(row)
            if number % YIELD_EVERY_ROWS == 0:
                await asyncio.sleep(0)
        inserted = await self._batch_jobs.insert_rows(
            [(row.request, row.equality_key) for row in unclaimed],
            existing_ids={row.request.id for row in unclaimed if row.entry},
        )
        ended: list[events.Ending] = []
        for row in unclaimed:
            row.entry = None  # claimed, so it is this process's now
            request, id_ = row.request, row.request.id
            if id_ in inserted.unavailable_ids:
                lost = errors.EntryError(f"Row {id_} is done, or another kernel is working on it.")
                ended.append(self._pending.failed_ending(request, lost))
            elif reply := structured_output.parse_reused(request, inserted.answers.get(id_)):
                ended.append(events.Finished(request_id=id_, at=self._clock.now(), reply=reply))
            elif (tag := inserted.tags_of_equal_rows.get(id_)) and tag not in self._closed_tags:
                self._waiting.setdefault(tag, []).append(row)
            else:
                row.upload_until = self._clock.now() + request.patience
                self._ready.setdefault(row.destination, deque()).append(row)
        await self._pending.finish(ended)

    def _start_tasks(self) -> None:
        """Resume the jobs that rows wait for, and upload the rows that are ready."""
        for tag in self._waiting:
            if tag not in self._uploaded_jobs:
                self._uploaded_jobs[tag] = None
                self._spawn(self._resume_job(tag))
        if self._upload_task is None or self._upload_task.done():
            self._upload_task = self._spawn(self._upload_ready())

    async def _upload_ready(self) -> None:
        """Upload the rows that are ready, job after job, each when the one before is accepted."""
        delay = FIRST_QUEUE_WAIT_S
        while ready := list(filter(None, self._ready.values())):
            rows = min(ready, key=lambda each: each[0].upload_until)
            if self._cancels_jobs:
                taken = [
                    rows.popleft() for _ in range(min(len(rows), batch_rows.COMMIT_CHUNK_ROWS))
                ]
                await self._pending.park([row.request for row in taken], "Not uploaded.")
                continue
            self._stage = "uploading"
            job, data = await self._write_job(rows)
            if not job.requests or await self._upload(job, data):
                delay = FIRST_QUEUE_WAIT_S
                self._max_rows = min(MAX_BATCH_REQUESTS, self._max_rows * 2)
                continue
            # The provider limits the tokens in its queue. If no other job of this map is in it,
            # this job alone may exceed the limit, and waiting would never help.
            if not any(self._uploaded_jobs.values()):
                self._max_rows = max(1, len(job.requests) // 2)
            self._stage = "the provider's queue is full"
            self._job_closed.clear()
            await self._clock.wait(self._clock.now() + delay, unless=self._job_closed)
            delay = min(delay * 2, MAX_QUEUE_WAIT_S)
        self._stage = ""
        # Heartbeats, by which other kernels know that this one is alive, continue for its jobs.
        await self._batch_jobs.end_map_heartbeats(self._map_id)

    async def _write_job(self, rows: deque[PendingRow]) -> tuple[PendingJob, bytes]:
        """Take the first rows, as many as fit; return them as a job, and its input file."""
        first = rows[0]
        base_url, _, model, _ = first.destination
        tag = f"{first.request.origin.map_id}.{secrets.token_hex(4)}"
        job = PendingJob(tag, requests={}, sample=first.request, base_url=base_url, model=model)
        data = bytearray()
        while rows and len(job.requests) < self._max_rows:
            request = rows[0].request
            try:
                await self._services.budget.reserve(
                    request,
                    caps=self._settings.budgets,
                    journal=self._services.spending_journal(self._settings),
                    model=model,
                    base_url=base_url,
                    service_tier=BATCH_TIER,
                )
                line = self._batch_api.client.request_line(request, model=model)
                if len(line) > MAX_BATCH_BYTES:
                    raise errors.TooLargeError("The row is larger than a whole batch.")
            except NbcodexError as error:
                rows.popleft()
                await self._pending.fail([request], error)
                continue
            # The first row always fits: longer ones have failed above.
            if job.requests and len(data) + len(line) > MAX_BATCH_BYTES:
                break
            rows.popleft()
            data += line
            job.requests[request.id] = job.sample = request
            if len(job.requests) % YIELD_EVERY_ROWS == 0:
                await asyncio.sleep(0)
        return job, bytes(data)

    async def _upload(self, job: PendingJob, data: bytes) -> bool:
        """Upload a job and wait for its validation; return False if the queue is full."""
        self._uploaded_jobs[job.tag] = job
        # Recorded before the upload: a kernel that dies in between leaves a tag to look for, and
        # the next one does not pay for the rows again.
        await self._batch_jobs.insert_job(job.tag, job.requests.values(), base_url=job.base_url)
        until = min(self._pending.rows[id_].upload_until for id_ in job.requests)
        try:
            await self._batch_api.upload(job, data, until=until)
            # Before anything else, so that the file is erased even if this process dies.
            await self._batch_jobs.set_remote_ids(job.tag, file_id=job.batch.input_file_id)
            await self._batch_api.create(job, until=until)
        except NbcodexError as error:
            if isinstance(error, errors.TransientError):
                patience = f"your patience of {format_duration(job.sample.patience)}"
                why = f"The next attempt would be later than {patience} allows."
                error = parked_error(job.sample, f"{error.message} {why}")
                # The job may have been created in spite of the faults: then its rows stay in it,
                # and a resume looks for it.
                if job.batch.input_file_id:
                    await self._give_up(job, error)
                    return True
            if job.batch.input_file_id:
                await self._batch_api.erase(job)
            del self._uploaded_jobs[job.tag]
            await self._batch_jobs.withdraw_job(job.tag)
            # The rows are valid for live requests, so a refusal is about batches as such.
            if isinstance(error, errors.RequestError | errors.ModelError):
                error = errors.BatchUnsupportedError(
                    f"The server does not accept this batch. {error.message}",
                    advice="engine='live' sends row by row.",
                )
            await self._pending.fail(job.requests.values(), error)
            return True
        await self._record_accepted(job)
        self._stage = ""
        try:
            batch = await self._batch_api.poll(job, until_validated=True)
        except NbcodexError as error:
            await self._give_up(job, error)
            return True
        if batch.is_queue_full:
            await self._return_rows(job)
            return False
        self._spawn(self._wait_for_job(job))
        return True

    async def _record_accepted(self, job: PendingJob) -> None:
        """Record the provider's id of a job, and emit that its rows are sent."""
        await self._batch_jobs.set_remote_ids(job.tag, remote_id=job.batch.id)
        pricing.start_loading(job.base_url)
        # `input_tokens` is not estimated: displays of a map do not show it.
        self._pending.emit(job.requests, events.Sent, attempt=1, model=job.model, input_tokens=0)

    async def _return_rows(self, job: PendingJob) -> None:
        """Make the rows of a job that was not accepted ready to be uploaded again."""
        await self._batch_api.erase(job)
        await self._batch_jobs.withdraw_job(job.tag)
        self._uploaded_jobs.pop(job.tag, None)
        # Listeners learn by this that the rows are no longer at the server.
        self._pending.emit(job.requests, events.CoolingDown, limit=None, resume_at=None, waited=0.0)
        rows = self._pending.rows
        # A resumed job may hold rows of another map, for which nothing waits here.
        await self._batch_jobs.park_rows(ids=[id_ for id_ in job.requests if id_ not in rows])
        for row in reversed([rows[id_] for id_ in job.requests if id_ in rows]):
            # Patience does not include the time in the provider's queue.
            row.entry, row.upload_until = None, self._clock.now() + row.request.patience
            self._ready.setdefault(row.destination, deque()).appendleft(row)

    async def _resume_job(self, tag: str) -> None:
        """Continue with a job that was uploaded by another kernel, or before Stop."""
        claimed = await self._batch_jobs.claim_job(tag)
        if claimed is None or not claimed.requests:
            await self._close_job(tag)
            return
        requests = {request.id: request for request in claimed.requests}
        job = PendingJob(tag, requests, sample=claimed.requests[0], base_url=claimed.base_url)
        job.batch = replace(job.batch, id=claimed.remote_id or "", input_file_id=claimed.file_id)
        self._uploaded_jobs[tag] = job
        # Rows of the job itself get its answers; only equal rows of this map continue to wait.
        waiting = self._waiting[tag]
        waiting[:] = [row for row in waiting if row.request.id not in requests]
        try:
            await _check_server(job, self._services, self._settings)
            was_created = await self._batch_api.find(job)
        except NbcodexError as error:
            await self._give_up(job, error)
            return
        if not was_created:  # a kernel died between recording the job and creating it
            await self._return_rows(job)
            await self._close_job(tag)
            return
        await self._record_accepted(job)
        await self._wait_for_job(job)

    async def _wait_for_job(self, job: PendingJob) -> None:
        try:
            if self._cancels_jobs:
                await self._batch_api.cancel(job)
            if (await self._batch_api.poll(job)).is_queue_full:
                await self._return_rows(job)
            else:
                await self._pending.read_results(job)
        except NbcodexError as error:
            await self._give_up(job, error)
        else:
            await self._close_job(job.tag)

    async def _give_up(self, job: PendingJob, error: NbcodexError) -> None:
        """End the rows of a job whose state is unknown; unless it is cancelled, they stay in it."""
        if self._cancels_jobs:
            await self._batch_jobs.withdraw_job(job.tag)
            why = f"The batch is withdrawn. {error.message}"
            await self._pending.park(job.requests.values(), why)
        else:
            await self._batch_jobs.park_rows(in_jobs=[job.tag])
            for request in list(job.requests.values()):
                self._pending.fail_without_commit(request, error)
        await self._close_job(job.tag)

    async def _close_job(self, tag: str) -> None:
        """Mark a job as done; the rows that waited for it are answered now, or to be uploaded."""
        self._uploaded_jobs.pop(tag, None)
        self._closed_tags.add(tag)
        self._job_closed.set()
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
        if error := defect_error(task):
            for row in list(self._pending.rows.values()):
                self._pending.fail_without_commit(row.request, error)


async def erase_leftovers(batch_jobs: BatchJobs, services: Services, settings: Settings) -> None:
    """Erase the files of jobs whose rows have all ended, or were deleted from the journal."""
    sample, batch_api = Request(prompt="?"), BatchApi(services, settings)
    for stored in await batch_jobs.unerased_jobs():
        if stored.is_awaited:  # the kernel that waits for it erases its files
            continue
        job = PendingJob(stored.tag, requests={}, sample=sample, base_url=stored.base_url)
        with contextlib.suppress(NbcodexError):
            await _check_server(job, services, settings)
            job.batch = replace(job.batch, input_file_id=stored.file_id)
            if id_ := stored.remote_id:
                job.batch = await batch_api.client.retrieve_batch(id_, sample)
                await batch_api.cancel(job)
            if (not id_ or job.batch.ended) and await batch_api.erase(job):
                await batch_jobs.close_job(stored.tag, erased=True)


async def _check_server(job: PendingJob, services: Services, settings: Settings) -> None:
    """Raise a ConfigurationError if the settings lead to another server than the job's."""
    # Awaited, because an async `Settings.client` may have to make the SDK's client first.
    base_url = (await services.api_client.await_endpoint(job.sample, settings)).base_url
    if base_url != job.base_url:
        raise errors.ConfigurationError(
            f"These rows are at {job.base_url}, but the server is now {base_url}.",
            advice="Restore the base URL and resume.",
        )
