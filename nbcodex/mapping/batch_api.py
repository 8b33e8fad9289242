"""The provider's Batch API, as somebody meets it who has patience.

Owns how often a batch is looked at, and that a fault of the network ends no map. Must not know the
journal, nor what becomes of answers.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
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
    from nbcodex.requests.services import Services

T = TypeVar("T")
Verdict = CompletedAnswer | NbcodexError

SOON, SLOWER, SELDOM = 3.0, 1.3, 60.0
"""Seconds between two looks at a batch: at first, by how much longer each time, at the longest."""
ERASING = 3
"""Tries to have files erased, for which the last answers wait; the next map tries again."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Part:
    """Rows of a map that are handed in together.

    Parameters
    ----------
    tag : str
        What finds it again at the provider.
    requests : dict
        Its rows without an answer, by id.
    asking : Request
        Any of its rows: it leads to the server.
    base_url, model : str, str or None
        Where it goes, and whom it asks.
    batch : Batch or None
        As the provider told it last.
    """

    tag: str
    requests: dict[str, Request]
    asking: Request
    base_url: str
    model: str | None = None
    batch: Batch | None = None


class Provider:
    """Hands in, looks, fetches and erases, however often it takes.

    Parameters
    ----------
    services : Services
        Its api_client, its clock and its chance.
    settings : Settings
        How the server is reached.

    Attributes
    ----------
    hitch : str
        What it waits out now.
    """

    def __init__(self, services: Services, settings: Settings) -> None:
        self.batches = BatchClient(services.api_client)
        self.hitch = ""
        self._settings, self._clock, self._chance = settings, services.clock, services.chance

    async def hand_in(
        self, part: Part, data: bytes, *, noted: Callable[[str], Awaitable[None]]
    ) -> Batch:
        """Hand a part in; what an earlier try has brought about is found, not repeated.

        `noted` writes down the name of its file, so that it can be erased whatever happens.

        Raises
        ------
        BatchUnsupportedError
            If the server takes no batches.
        NbcodexError
            If it does not take this one.
        """
        settings, tried = self._settings, False

        async def start() -> Batch:
            nonlocal tried
            if tried and (found := await self._find(part)):
                return found
            tried = True
            return await self.batches.create_batch(
                file, part.asking, settings, metadata=_tags(part.tag)
            )

        file = ""
        try:
            file = await self._patiently(
                lambda: self.batches.upload_file(data, part.asking, settings)
            )
            await noted(file)
            return await self._patiently(start)
        except NbcodexError as error:
            if file:
                await self.erase(only(file), part.asking)
            if isinstance(error, RequestError | ModelError):
                raise BatchUnsupportedError(
                    f"The server takes no such batch. {error.message}",
                    advice="engine='live' asks row by row.",
                ) from error
            raise

    async def find(self, part: Part) -> Batch | None:
        """Return the batch that a part became, if it was handed in."""
        return await self._patiently(lambda: self._find(part))

    async def _find(self, part: Part) -> Batch | None:
        found = await self.batches.find_batches(
            part.asking, self._settings, metadata=_tags(part.tag)
        )
        return next(iter(found), None)

    async def look(self, id_: str, asking: Request) -> Batch:
        """Return how a batch stands."""
        return await self._patiently(
            lambda: self.batches.retrieve_batch(id_, asking, self._settings)
        )

    async def watch(self, part: Part, *, until_accepted: bool = False) -> Batch:
        """Look at a batch again and again, until it has ended, or was found to be in order."""
        assert part.batch is not None  # noqa: S101 - it was handed in
        delay = SOON
        while not (part.batch.ended or (until_accepted and part.batch.status != "validating")):
            await self.pause(delay)
            delay = min(delay * SLOWER, SELDOM)
            part.batch = await self.look(part.batch.id, part.asking)
        return part.batch

    async def cancel(self, part: Part) -> None:
        """Have the provider end a batch; one that has ended already stays as it is."""
        batch = part.batch
        if batch is None or batch.ended or batch.status == "cancelling":
            return
        try:
            part.batch = await self._patiently(
                lambda: self.batches.cancel_batch(batch.id, part.asking, self._settings)
            )
        except RequestError:  # it has just ended
            part.batch = await self.look(batch.id, part.asking)

    async def results(
        self, part: Part, wanted: Collection[str]
    ) -> AsyncGenerator[tuple[str, Verdict]]:
        """Yield what the provider says of each wanted row, in whatever order.

        `wanted` may shrink meanwhile: after a fault, what is not in it any more is left out.
        """
        delay = backoff.BACKOFF_INITIAL_S
        while True:
            assert part.batch is not None  # noqa: S101 - it has ended
            try:
                async for id_, told in self.batches.results(
                    part.batch, part.asking, self._settings
                ):
                    if id_ in wanted:
                        yield id_, told
            except TransientError as error:
                await self._wait_out(error, delay)
                delay = min(delay * backoff.BACKOFF_FACTOR, backoff.BACKOFF_MAX_S)
            else:
                return

    async def erase(self, batch: Batch, asking: Request) -> bool:
        """Have the files of a batch erased; return whether they are."""
        try:
            await self._patiently(
                lambda: self.batches.delete_files(batch, asking, self._settings), tries=ERASING
            )
        except NbcodexError as error:
            log.warning("files of %s were not erased: %s", batch.id, error)
            return False
        return True

    async def pause(self, seconds: float) -> None:
        """Let some seconds pass."""
        await self._clock.wait(self._clock.now() + seconds)

    async def _patiently(
        self, deed: Callable[[], Awaitable[T]], *, tries: float = float("inf")
    ) -> T:
        """Do it again after each transient failure, as long as it takes."""
        delay = backoff.BACKOFF_INITIAL_S
        while True:
            try:
                return await deed()
            except TransientError as error:
                tries -= 1
                if tries <= 0:
                    raise
                await self._wait_out(error, delay)
                delay = min(delay * backoff.BACKOFF_FACTOR, backoff.BACKOFF_MAX_S)

    async def _wait_out(self, error: TransientError, delay: float) -> None:
        asked = 0.0 if error.wait is None else backoff.stated_wait(error.wait, self._chance)
        self.hitch = shorten(error.message, 100)
        await self.pause(max(asked, delay + self._chance.uniform(0.0, delay)))
        self.hitch = ""


def only(file: str | None) -> Batch:
    """Return the batch that was never made of a file."""
    return Batch(id="", status="failed", input_file=file)


def _tags(tag: str) -> dict[str, str]:
    return {"nbcodex": tag}
