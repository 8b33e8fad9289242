"""The provider's Batch API with retries: a network fault delays a map, but never ends it.

Also decides how often a batch job is polled. It stores nothing and emits no events.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from nbcodex import errors
from nbcodex.errors import NbcodexError, RequestError, TransientError, shorten
from nbcodex.models import Request
from nbcodex.openai_api import dialects
from nbcodex.openai_api.answers import CompletedAnswer
from nbcodex.openai_api.batches import Batch, BatchClient
from nbcodex.ratelimit import backoff
from nbcodex.requests.runner import Services
from nbcodex.settings import Settings

ResultT = TypeVar("ResultT")
RowResult = CompletedAnswer | NbcodexError  # the provider's result for one row

# Time between two polls of a job, which grows by the factor. A day-long job is polled some 1,400
# times; the end of a job of a minute is noticed within a quarter of a minute.
FIRST_POLL_S, POLL_FACTOR, MAX_POLL_S = 3.0, 1.3, 60.0
# A server may not find a file right after its upload (bespokelabsai/curator#116): so many refusals
# take about a minute.
MAX_MISSING_FILE_REFUSALS = 6
# The last answers of a job are emitted only after its files are erased, which must not take long;
# what is not erased then is erased by the next map.
ERASE_PATIENCE_S = 5.0

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class PendingJob:
    """Rows of a map that are uploaded in one file, and are answered by one batch job."""

    # Our name for the job. It is sent as metadata, by which a job whose id was lost is found again.
    tag: str
    requests: dict[str, Request]  # its rows without an ending, by id
    sample: Request  # any of its rows: server, API key and patience are those of all
    base_url: str
    model: str | None = None  # of all its rows; None if the job was read from the journal
    batch: Batch = field(default_factory=Batch)  # the latest state that the provider stated


class BatchApi:
    """Creates, polls, reads and erases batch jobs, retrying as long as necessary."""

    def __init__(self, services: Services, settings: Settings) -> None:
        self.client = BatchClient(services.api_client, settings)
        self.fault = ""  # the temporary fault after which a call is waiting; empty if none is
        self._clock, self._random = services.clock, services.rng

    # `upload` and `create` raise an error if the server refuses the job: a TransientError if
    # faults last until the instant `until`.

    async def upload(self, job: PendingJob, data: bytes, *, until: float) -> None:
        """Upload the input file of a job."""
        upload = partial(self.client.upload_file, data, job.sample)
        job.batch = replace(job.batch, input_file_id=await self._retrying(upload, until=until))

    async def create(self, job: PendingJob, *, until: float) -> None:
        """Create a job from its input file."""
        was_attempted, refusals = False, 0
        file_id, metadata = job.batch.input_file_id or "", {"nbcodex": job.tag}

        async def create_once() -> Batch:
            nonlocal was_attempted, refusals
            # The response to an earlier attempt may have been lost although the job was created:
            # creating it again would charge all its rows twice.
            if was_attempted and (found := await self._find_once(job)):
                return found
            was_attempted = True
            try:
                return await self.client.create_batch(file_id, job.sample, metadata=metadata)
            except (RequestError, errors.ModelError) as error:
                refusals += 1
                is_missing = dialects.has_match(error.message.lower(), "file_missing_patterns")
                if not is_missing or refusals == MAX_MISSING_FILE_REFUSALS:
                    raise
                raise errors.ServerError(error.message) from error

        job.batch = await self._retrying(create_once, until=until)

    async def find(self, job: PendingJob) -> bool:
        """Fetch the state of a job by its id, else by its tag; return whether it was created."""
        batch = await self._retrying(lambda: self._find_once(job))
        job.batch = batch or job.batch
        return batch is not None

    async def _find_once(self, job: PendingJob) -> Batch | None:
        if job.batch.id:
            return await self.client.retrieve_batch(job.batch.id, job.sample)
        return await self.client.find_batch(job.sample, metadata={"nbcodex": job.tag})

    async def poll(self, job: PendingJob, *, until_validated: bool = False) -> Batch:
        """Poll a job until it has ended, or has passed validation."""
        delay = FIRST_POLL_S
        while not (job.batch.ended or (until_validated and job.batch.status != "validating")):
            await self._clock.wait(self._clock.now() + delay)
            delay = min(delay * POLL_FACTOR, MAX_POLL_S)
            await self.find(job)
        return job.batch

    async def cancel(self, job: PendingJob) -> None:
        """Cancel a job; one that has ended stays as it is."""
        if job.batch.ended or job.batch.status == "cancelling":
            return
        try:
            cancel = partial(self.client.cancel_batch, job.batch.id, job.sample)
            job.batch = await self._retrying(cancel)
        except RequestError:  # it ended between our poll and this call
            await self.find(job)

    async def results(self, job: PendingJob) -> AsyncGenerator[tuple[Request, RowResult]]:
        """Yield results of a job's rows, in any order; a row may be listed twice, or not at all."""
        delay = backoff.BACKOFF_INITIAL_S
        while True:
            try:
                # After a fault the file is read again from its start, without the rows that the
                # caller has removed from the job meanwhile.
                async for id_, result in self.client.results(job.batch, job.sample):
                    if request := job.requests.get(id_):
                        yield request, result
            except TransientError as error:
                delay = await self._back_off(error, delay)
            else:
                return

    async def erase(self, job: PendingJob) -> bool:
        """Erase the files of a job; return whether they are erased."""
        try:
            until = self._clock.now() + ERASE_PATIENCE_S
            delete = partial(self.client.delete_files, job.batch, job.sample)
            await self._retrying(delete, until=until)
        except NbcodexError as error:
            log.warning("files of %s were not erased: %s", job.batch.id, error)
            return False
        return True

    async def _retrying(
        self, call: Callable[[], Awaitable[ResultT]], *, until: float = math.inf
    ) -> ResultT:
        """Call until it succeeds; raise its last fault if the next call would be after `until`."""
        delay = backoff.BACKOFF_INITIAL_S
        while True:
            try:
                return await call()
            except TransientError as error:
                delay = await self._back_off(error, delay, until=until)

    async def _back_off(
        self, error: TransientError, delay: float, *, until: float = math.inf
    ) -> float:
        """Wait, or raise the fault if the wait would end after `until`; return the next delay."""
        server_wait = 0.0 if error.wait is None else backoff.with_jitter(error.wait, self._random)
        next_at = self._clock.now() + max(server_wait, delay + self._random.uniform(0.0, delay))
        if next_at > until:
            raise error
        self.fault = shorten(error.message, max_chars=100)
        await self._clock.wait(next_at)
        self.fault = ""
        return min(delay * backoff.BACKOFF_FACTOR, backoff.BACKOFF_MAX_S)
