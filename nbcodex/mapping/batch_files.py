"""Fetches what a batch has answered, and has its files erased when all of it is committed.

Owns that order. Must not know how rows came to be in a batch.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from nbcodex.errors import ConfigurationError, NbcodexError, RequestError
from nbcodex.events import Ending
from nbcodex.mapping import outcome
from nbcodex.mapping.batch_api import Part, Provider, only
from nbcodex.mapping.pending_rows import PendingRows
from nbcodex.models import Request
from nbcodex.openai_api import pricing
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from nbcodex.requests.services import Services

TOGETHER = 250
"""Answers that are committed in one go."""


class Fetcher:
    """Brings answers back.

    Parameters
    ----------
    services, settings
        Of the map.
    provider : Provider
        Whom it asks.
    register : PendingRows
        Where rows end.
    """

    def __init__(
        self, services: Services, settings: Settings, provider: Provider, register: PendingRows
    ) -> None:
        self._services, self._settings, self._clock = services, settings, services.clock
        self._provider, self._register = provider, register
        self._parts = services.journal(settings).batch_jobs

    def check_server(self, part: Part) -> None:
        """Raise a ConfigurationError if the settings lead to another server than a part's."""
        here = self._services.api_client.endpoint(part.asking, self._settings).base_url
        if here != part.base_url:
            raise ConfigurationError(
                f"These rows are with {part.base_url}, but the server is {here} now.",
                advice="Set the base URL as it was, and resume.",
            )

    async def fetch(self, part: Part) -> None:
        """Settle all rows of a part whose batch has ended.

        Raises
        ------
        NbcodexError
            If the provider does not give the answers out.
        """
        await asyncio.to_thread(pricing.load_prices)
        few: dict[str, Ending] = {}
        async with contextlib.aclosing(self._provider.results(part, part.requests)) as results:
            async for id_, told in results:
                if len(few) >= TOGETHER:
                    await self._register.settle(list(few.values()))
                    for settled in few:
                        del part.requests[settled]
                    few.clear()
                if request := part.requests.get(id_):
                    few[id_] = outcome.ending_of(
                        request,
                        told,
                        model=part.model,
                        base_url=part.base_url,
                        clock=self._clock,
                    )
        await self._register.surely(self._close(part, list(few.values())))

    async def _close(self, part: Part, few: list[Ending]) -> None:
        """Settle the last of a part; they are told when its files are erased."""
        assert part.batch is not None  # noqa: S101 - it was fetched
        few += self._unanswered(part, {ending.request_id for ending in few})
        counted = await self._register.commit(few)
        kept = self._settings.keep_files
        is_gone = kept or await self._provider.erase(part.batch, part.asking)
        await self._parts.close_job(part.tag, is_gone=is_gone)
        for ending in counted:
            self._register.end(ending)

    def _unanswered(self, part: Part, answered: Iterable[str]) -> list[Ending]:
        """Return the ends of the rows about which the provider says nothing."""
        left = [request for id_, request in part.requests.items() if id_ not in answered]
        status, trouble = (part.batch.status, part.batch.error) if part.batch else ("gone", "")
        if status == "failed":
            error = RequestError(f"The provider refused the batch: {trouble or 'no reason given'}")
            return [outcome.failed(request, error, clock=self._clock) for request in left]
        why = f"The batch is {status}, and this row was not answered."
        return [outcome.parked(request, why, clock=self._clock) for request in left]

    async def tidy(self) -> None:
        """Have files erased that were left when a kernel died between the last commit and that."""
        asking, batches = Request(prompt="?"), self._provider.batches
        for held in await self._parts.unerased_jobs():
            part = Part(held.tag, {}, asking, held.base_url)
            with contextlib.suppress(NbcodexError):
                self.check_server(part)
                part.batch = only(held.file)
                if held.remote:
                    part.batch = await batches.retrieve_batch(held.remote, asking, self._settings)
                await self._provider.cancel(part)
                if part.batch.ended and await self._provider.erase(part.batch, asking):
                    await self._parts.close_job(held.tag, is_gone=True)
