"""The rows of a map that have no ending yet, and how each gets one: counted, committed, then told.

Owns that order, and that an interrupt cannot come between. Must not know providers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nbcodex.events import Ending, Event
from nbcodex.models import Reply, Request

if TYPE_CHECKING:
    from nbcodex.journal.batch_jobs import BatchJobs
    from nbcodex.journal.codec import Entry
    from nbcodex.requests.services import Services

Group = tuple[str, str, str]
"""Server, API and model: what the rows of a part have in common."""


@dataclass(slots=True, eq=False)
class Row:
    """A row on its way; `entry` if it was in the journal before and is yet to be claimed."""

    request: Request
    entry: Entry | None = None
    group: Group = ("", "", "")
    key: bytes = b""

    @property
    def part(self) -> str | None:
        """The part with which it was handed in before."""
        return self.entry.batch_job if self.entry else None


class PendingRows:
    """The rows of one map, on the event loop.

    Parameters
    ----------
    services : Services
        Whose allowance counts what rows use, and whose clock dates events.
    parts : Parts
        Where endings are committed.
    tell : callable
        Hears the events of rows.

    Attributes
    ----------
    rows : dict
        Those without an ending, by id.
    """

    def __init__(self, services: Services, parts: BatchJobs, tell: Callable[[Event], None]) -> None:
        self.rows: dict[str, Row] = {}
        self._services, self._parts, self._tell = services, parts, tell
        self._sure: set[asyncio.Task[None]] = set()

    async def settle(self, endings: Sequence[Ending]) -> None:
        """Count, commit and tell what rows came to; not even a cancelled task leaves it halfway."""
        if endings:
            await self.surely(self._settle(endings))

    async def _settle(self, endings: Sequence[Ending]) -> None:
        counted = await self.commit(endings)
        for ending in counted:
            self.end(ending)

    async def commit(self, endings: Sequence[Ending]) -> list[Ending]:
        """Count and commit what rows came to; return their endings, which are yet to be told."""
        counted = [self._counted(ending) for ending in endings]
        await self._parts.finish_rows([(ending.reply, _why(ending)) for ending in counted])
        return counted

    def _counted(self, ending: Ending) -> Ending:
        reply = ending.reply
        warnings = self._services.budget.settle(ending.request_id, reply)
        return replace(ending, reply=replace(reply, notes=(*reply.notes, *warnings)))

    def end(self, ending: Ending) -> None:
        """Tell how a row ended."""
        self.rows.pop(ending.request_id, None)
        self._tell(ending)

    def drop(self, ending: Ending) -> None:
        """Tell how a row ended that cost nothing, and of which nothing is to be committed."""
        self._services.budget.settle(ending.request_id, Reply(id=ending.request_id, attempts=0))
        self.end(ending)

    def tell(self, ids: Iterable[str], kind: Callable[..., Event], **details: Any) -> None:
        """Tell what happens to rows now."""
        now = self._services.clock.now()
        for id_ in ids:
            self._tell(kind(request_id=id_, at=now, **details))

    async def surely(self, deed: Coroutine[Any, Any, None]) -> None:
        """Have something done to its end, even if whoever waits for it is cancelled."""
        task = asyncio.create_task(deed)
        self._sure.add(task)
        task.add_done_callback(self._sure.discard)
        await asyncio.shield(task)

    async def settled(self) -> None:
        """Return when nothing is halfway."""
        await asyncio.gather(*self._sure, return_exceptions=True)


def _why(ending: Ending) -> str | None:
    error = getattr(ending, "error", None)
    return str(error) if error else None
