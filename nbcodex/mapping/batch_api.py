"""The provider's Batch API with retries: a network fault delays a map, it never ends one.

Owns how often a batch job is polled. Must not know the journal, nor what is done with answers.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from nbcodex.errors import (
    BatchUnsupportedError,
    ModelError,
    NbcodexError,
    RequestError,
    TransientError,
    shorten,
)
from nbcodex.models import Request
from nbcodex.openai_api.answers import CompletedAnswer
from nbcodex.openai_api.batches import Batch, BatchClient
from nbcodex.ratelimit import backoff
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from nbcodex.requests.runner import Services

ResultT = TypeVar("ResultT")
# What the provider answers to one row.
RowResult = CompletedAnswer | NbcodexError

# Time between two polls of a job. A day-long job is polled some 1,400 times, a job of a minute is
# noticed within a quarter of its duration.
FIRST_POLL_S, POLL_FACTOR, MAX_POLL_S = 3.0, 1.3, 60.0
# The last answers of a job are emitted only after its files are erased, which must not take long;
# what is not erased then is erased by the next map.
ERASE_ATTEMPTS = 3

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class BatchPart:
    """Rows of a map that are uploaded together and become one batch job."""

    # Stands in the job's metadata, by which the job is found again if its id was lost.
    tag: str
    requests: dict[str, Request]  # its rows without an answer, by id
    sample: Request  # any of its rows: server and key are derived from a request
    base_url: str
    model: str | None = None
    batch: Batch | None = None  # the job's latest known state

    @property
    def metadata(self) -> dict[str, str]:
        """What the job carries at the provider."""
        return {"nbcodex": self.tag}


class BatchApi:
    """Creates, polls, reads and erases batch jobs, retrying as long as necessary."""

    def __init__(self, services: Services, settings: Settings) -> None:
        self.client = BatchClient(services.api_client, settings)
        self.fault = ""  # the temporary fault after which it is waiting; empty if it is not
        self._clock, self._random = services.clock, services.rng

    async def create(
        self, part: BatchPart, data: bytes, *, record_file: Callable[..., Awaitable[None]]
    ) -> Batch:
        """Upload a part and create its job; raise a NbcodexError if the server refuses it."""
        sample, metadata, attempted = part.sample, part.metadata, False

        async def create_once() -> Batch:
            nonlocal attempted
            # The response to an earlier attempt may have been lost although the job was created:
            # creating it again would charge all its rows twice.
            if attempted and (found := await self.client.find_batch(sample, metadata=metadata)):
                return found
            attempted = True
            return await self.client.create_batch(file, sample, metadata=metadata)

        file = ""
        try:
            file = await self._retrying(lambda: self.client.upload_file(data, sample))
            # Before anything else, so that the file is erased even if this process dies.
            await record_file(file_id=file)
            return await self._retrying(create_once)
        except NbcodexError as error:
            if file:
                await self.erase(jobless_batch(file), sample)
            # The rows are valid for live requests, so a refusal is about batches as such.
            if isinstance(error, RequestError | ModelError):
                raise BatchUnsupportedError(
                    f"The server does not accept this batch. {error.message}",
                    advice="engine='live' sends row by row.",
                ) from error
            raise

    async def find(self, part: BatchPart) -> Batch | None:
        """Return the job of a part; None if it was never created."""
        return await self._retrying(
            lambda: self.client.find_batch(part.sample, metadata=part.metadata)
        )

    async def retrieve(self, batch_id: str, sample: Request) -> Batch:
        """Return the present state of a job."""
        return await self._retrying(lambda: self.client.retrieve_batch(batch_id, sample))

    async def poll(self, part: BatchPart, *, until_validated: bool = False) -> Batch:
        """Poll a job until it has ended, or has passed validation."""
        assert part.batch is not None  # noqa: S101 - it was created
        delay = FIRST_POLL_S
        while not (part.batch.ended or (until_validated and part.batch.status != "validating")):
            await self._clock.wait(self._clock.now() + delay)
            delay = min(delay * POLL_FACTOR, MAX_POLL_S)
            part.batch = await self.retrieve(part.batch.id, part.sample)
        return part.batch

    async def cancel(self, part: BatchPart) -> None:
        """Cancel a job; one that has ended stays as it is."""
        batch = part.batch
        if batch is None or batch.ended or batch.status == "cancelling":
            return
        try:
            part.batch = await self._retrying(
                lambda: self.client.cancel_batch(batch.id, part.sample)
            )
        except RequestError:  # it ended between our poll and this call
            part.batch = await self.retrieve(batch.id, part.sample)

    async def results(self, part: BatchPart) -> AsyncGenerator[tuple[Request, RowResult]]:
        """Yield the provider's result for each of a part's rows, in any order."""
        delay = backoff.BACKOFF_INITIAL_S
        while True:
            assert part.batch is not None  # noqa: S101 - it has ended
            try:
                # After a fault the file is read again from its start, without the rows that the
                # caller has removed from the part meanwhile.
                async for id_, result in self.client.results(part.batch, part.sample):
                    if request := part.requests.get(id_):
                        yield request, result
            except TransientError as error:
                delay = await self._back_off(error, delay)
            else:
                return

    async def erase(self, batch: Batch, sample: Request) -> bool:
        """Erase the files of a job; return whether they are erased."""
        try:
            await self._retrying(
                lambda: self.client.delete_files(batch, sample), attempts=ERASE_ATTEMPTS
            )
        except NbcodexError as error:
            log.warning("files of %s were not erased: %s", batch.id, error)
            return False
        return True

    async def _retrying(
        self, call: Callable[[], Awaitable[ResultT]], *, attempts: float = float("inf")
    ) -> ResultT:
        delay = backoff.BACKOFF_INITIAL_S
        while True:
            try:
                return await call()
            except TransientError as error:
                attempts -= 1
                if attempts <= 0:
                    raise
                delay = await self._back_off(error, delay)

    async def _back_off(self, error: TransientError, delay: float) -> float:
        """Wait after a temporary fault; return the delay after the next one."""
        stated = 0.0 if error.wait is None else backoff.stated_wait(error.wait, self._random)
        seconds = max(stated, delay + self._random.uniform(0.0, delay))
        self.fault = shorten(error.message, 100)
        await self._clock.wait(self._clock.now() + seconds)
        self.fault = ""
        return min(delay * backoff.BACKOFF_FACTOR, backoff.BACKOFF_MAX_S)


def jobless_batch(file: str | None) -> Batch:
    """Return a stand-in for the job that was never created from an uploaded file."""
    return Batch(id="", status="failed", input_file=file)
