"""What goes into a batch job's file, and what comes out of it.

Owns that the budget is asked for each row, and that a job's files are erased only when all its
answers are committed. Must not know when jobs are created.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from nbcodex.errors import ConfigurationError, NbcodexError, RequestError, TooLargeError
from nbcodex.events import Ending
from nbcodex.mapping.batch_api import BatchApi, BatchPart, jobless_batch
from nbcodex.mapping.pending_rows import (
    PendingRow,
    PendingRows,
    ending_from_result,
    failed_ending,
    parked_ending,
)
from nbcodex.models import Request
from nbcodex.openai_api import pricing
from nbcodex.openai_api.batches import BATCH_PRICE_FACTOR, MAX_BATCH_BYTES
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from nbcodex.requests.runner import Services

# Endings that are committed in one transaction.
COMMIT_CHUNK_ROWS = 250
# Rows after which the event loop gets a turn: displays and other requests share it.
YIELD_EVERY_ROWS = 50


class BatchFiles:
    """Writes the input files of a map's parts and reads their output files."""

    def __init__(
        self, services: Services, settings: Settings, batch_api: BatchApi, pending: PendingRows
    ) -> None:
        self._services, self._settings, self._clock = services, settings, services.clock
        self._batch_api, self._pending = batch_api, pending
        self._jobs = services.journal(settings).batch_jobs

    # Writing.

    async def write_part(self, rows: deque[PendingRow], max_rows: int) -> tuple[BatchPart, bytes]:
        """Take up to `max_rows` rows from the left; return them as a part, and its input file.

        Rows that the budget refuses, or that cannot be made into a line, fail here.
        """
        first = rows[0]
        base_url, _, model = first.destination
        tag = f"{first.request.origin.map_id}.{secrets.token_hex(4)}"
        part = BatchPart(tag, {}, first.request, base_url, model)
        data = bytearray()
        while rows and len(part.requests) < max_rows:
            request = rows[0].request
            try:
                line = await self._request_line(request, part)
            except NbcodexError as error:
                rows.popleft()
                await self._pending.finish([failed_ending(request, error, clock=self._clock)])
                continue
            # One row always fits: `_request_line` refuses longer ones.
            if part.requests and len(data) + len(line) > MAX_BATCH_BYTES:
                break
            rows.popleft()
            data += line
            part.requests[request.id] = part.sample = request
            if len(part.requests) % YIELD_EVERY_ROWS == 0:
                await asyncio.sleep(0)
        return part, bytes(data)

    async def _request_line(self, request: Request, part: BatchPart) -> bytes:
        await self._services.budget.reserve(
            request,
            caps=self._settings.budgets,
            journal=self._services.counters(self._settings),
            model=part.model,
            base_url=part.base_url,
            price_factor=BATCH_PRICE_FACTOR,
        )
        client = self._batch_api.client
        line = client.request_line(request, self._settings, model=part.model or "")
        if len(line) > MAX_BATCH_BYTES:
            raise TooLargeError("The row is larger than a whole batch.")
        return line

    # Reading.

    def check_server(self, part: BatchPart) -> None:
        """Raise a ConfigurationError if the settings lead to another server than the part's."""
        here = self._services.api_client.endpoint(part.sample, self._settings).base_url
        if here != part.base_url:
            raise ConfigurationError(
                f"These rows are at {part.base_url}, but the server is now {here}.",
                advice="Restore the base URL and resume.",
            )

    async def read_part(self, part: BatchPart) -> None:
        """Finish all rows of a part whose batch job has ended, and erase its files."""
        # Loading takes longer than a display may wait for the event loop.
        await asyncio.to_thread(pricing.load_prices)
        chunk: dict[str, Ending] = {}
        results = self._batch_api.results(part, part.requests)
        async with contextlib.aclosing(results):
            async for id_, result in results:
                if len(chunk) >= COMMIT_CHUNK_ROWS:
                    await self._pending.finish(list(chunk.values()))
                    for finished in chunk:
                        del part.requests[finished]
                    chunk.clear()
                if request := part.requests.get(id_):
                    chunk[id_] = ending_from_result(
                        request,
                        result,
                        model=part.model,
                        base_url=part.base_url,
                        clock=self._clock,
                    )
        await self._pending.shield(self._close_part(part, list(chunk.values())))

    async def _close_part(self, part: BatchPart, endings: list[Ending]) -> None:
        """Commit the last endings of a part, erase its files, and emit the endings."""
        assert part.batch is not None  # noqa: S101 - its results were read
        endings += self._endings_without_result(part, {ending.request_id for ending in endings})
        charged = await self._pending.commit(endings)
        # Answers first, files second: a kernel that dies in between leaves files, which the next
        # map erases. The other order could lose paid answers.
        erased = self._settings.keep_files or await self._batch_api.erase(part.batch, part.sample)
        await self._jobs.close_job(part.tag, is_gone=erased)
        for ending in charged:
            self._pending.emit_ending(ending)

    def _endings_without_result(self, part: BatchPart, answered: Iterable[str]) -> list[Ending]:
        left = [request for id_, request in part.requests.items() if id_ not in answered]
        status, reason = (part.batch.status, part.batch.error) if part.batch else ("gone", "")
        if status == "failed":
            error = RequestError(f"The provider refused the batch: {reason or 'no reason given'}")
            return [failed_ending(request, error, clock=self._clock) for request in left]
        why = f"The batch is {status}, and this row was not answered."
        return [parked_ending(request, why, clock=self._clock) for request in left]

    async def erase_leftovers(self) -> None:
        """Erase the files of parts whose rows have all ended: a kernel died before it could."""
        sample = Request(prompt="?")
        for held in await self._jobs.unerased_jobs():
            part = BatchPart(held.tag, {}, sample, held.base_url)
            with contextlib.suppress(NbcodexError):
                self.check_server(part)
                part.batch = jobless_batch(held.file)
                if held.remote:
                    part.batch = await self._batch_api.client.retrieve_batch(
                        held.remote, sample, self._settings
                    )
                await self._batch_api.cancel(part)
                if part.batch.ended and await self._batch_api.erase(part.batch, sample):
                    await self._jobs.close_job(held.tag, is_gone=True)
