"""Keeps one request in the journal while it lives: a gate before the network, and before the end.

Owns when the journal is written. Must not know attempts or waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

from nbcodex.errors import EntryError
from nbcodex.events import Ending
from nbcodex.journal.journal import Journal
from nbcodex.journal.key import equality_key
from nbcodex.journal.spending import Spent
from nbcodex.models import Limit, Reply, Request, StreamPosition
from nbcodex.requests import parking
from nbcodex.requests.partial import Partial
from nbcodex.runtime.clock import Clock

AT_ONCE = 0.02
"""Seconds within which a request is in the journal; sent before that, it gets there as it is sent:
what is new, and that it is under way, in one commit."""

EVERY = 0.8
"""Seconds between two writes of the text so far: of what was shown, at most a second is lost."""


class Keeper:
    """The journal's side of one request.

    Parameters
    ----------
    journal : Journal
        Where the entry is.
    request : Request
        Whose entry it is.
    partial : Partial
        What there is of the answer.
    clock : Clock
        The engine's time; the journal's is the wall's.
    """

    def __init__(self, journal: Journal, request: Request, partial: Partial, clock: Clock) -> None:
        self._journal, self._request, self._clock = journal, request, clock
        self._partial = partial
        self._remembered: str | None = None
        self._add: Callable[..., Coroutine[Any, Any, None]] | None = None
        self._soon: asyncio.TimerHandle | None = None
        self._adding: asyncio.Future[None] | None = None
        self._once_added: list[Callable[[], object]] = []
        self._keeping: asyncio.Task[None] | None = None

    async def admit(self, base_url: str) -> Reply | None:
        """Have the request committed within moments; return the answer of an equal one to reuse.

        Nothing may be sent before `settled` or `begin` has returned.
        """
        request, origin = self._request, self._request.origin
        key = equality_key(request, base_url=base_url)
        self._add = partial(
            self._journal.add,
            request,
            notebook=origin.notebook,
            cell=origin.cell,
            variable=origin.variable,
            key=key,
        )
        if not request.reuse:
            self._soon = asyncio.get_running_loop().call_later(AT_ONCE, self._add_now)
            return None
        await self.settled()
        return await self._answered(key)

    async def _answered(self, key: bytes) -> Reply | None:
        found = await self._journal.answered(key)
        return found and replace(found, id=self._request.id)

    def once_settled(self, deed: Callable[[], object]) -> None:
        """Have a deed done on the loop as soon as the request is in the journal."""
        self._once_added.append(deed)
        if self._add is None and self._adding is None:
            self._added()

    def _added(self, _: object = None) -> None:
        deeds, self._once_added = self._once_added, []
        for deed in deeds:
            deed()

    def _to_add(self) -> Callable[..., Coroutine[Any, Any, None]] | None:
        """Return what puts the request into the journal, once."""
        add, self._add = self._add, None
        if self._soon is not None:
            self._soon.cancel()
        return add

    def _add_now(self) -> None:
        if add := self._to_add():
            self._adding = asyncio.ensure_future(add())
            self._adding.add_done_callback(self._added)

    async def settled(self) -> None:
        """Return when the request is in the journal."""
        self._add_now()
        if self._adding is not None:
            # An order may cancel whoever waits here; the ending waits for the same commit.
            await asyncio.shield(self._adding)
            self._adding = None

    async def take_up(self, base_url: str, *, reuse: bool) -> Reply | None:
        """Claim the entry, which is in the journal; return an answer to `reuse`, if there is one.

        Raises
        ------
        EntryError
            If another kernel was faster, or there is nothing left to do.
        """
        if not await self._journal.claim(self._request.id):
            raise parking.not_to_resume(self._request.id)
        if not (reuse and self._request.reuse):
            return None
        return await self._answered(equality_key(self._request, base_url=base_url))

    async def begin(self, attempt: int) -> None:
        """Note that an attempt is about to be sent: it asks, or picks up what has a mark."""
        if add := self._to_add():
            # Cancelled here, it is done all the same, and before whatever is written next.
            await add(attempt=attempt)
            self._added()
            return
        picks_up = self._partial.mark is not None
        begun = self._journal.begin(self._request.id, attempt, picks_up=picks_up)
        # Both in one go: to wait for one thread twice would take as long as the commits do.
        await asyncio.gather(self.settled(), begun)

    async def remember(self, mark: StreamPosition) -> None:
        """Commit where the durable answer is, before any of its text is shown."""
        if mark.response_id != self._remembered:
            self._remembered = mark.response_id
            await self._journal.remember_remote(self._request.id, mark.response_id)

    async def wait(self, until: float, limit: Limit | None) -> None:
        """Note that the request waits until an instant of the clock."""
        await self.settled()
        await self._keep_the_mark()
        wall = self._clock.wall() + until - self._clock.now()
        await self._journal.wait(self._request.id, wall, limit, notes=self._partial.notes)

    def keep_soon(self) -> None:
        """Have the text so far kept within a second; there is one write at a time."""
        if self._keeping is None:
            self._keeping = asyncio.get_running_loop().create_task(self._keep_later())

    async def _keep_later(self) -> None:
        await asyncio.sleep(EVERY)
        self._keeping = None
        await self._keep()

    async def _keep(self) -> None:
        mark = self._partial.mark
        sequence = mark.sequence if mark else None
        await self._journal.keep(self._request.id, self._partial.text, sequence=sequence)

    async def _keep_the_mark(self) -> None:
        """Keep at once what a durable answer goes on behind: text and mark, in one commit."""
        if self._partial.mark is not None:
            await self._keep()

    async def finish(self, ending: Ending, *, otherwise: Spent) -> None:
        """Commit what the request came to; when this returns, it may be told.

        It counts as `otherwise` where nobody knows what it has used.
        """
        if self._keeping is not None:
            self._keeping.cancel()
        error = getattr(ending, "error", None)
        if isinstance(error, EntryError):
            return  # the entry is another's
        await self.settled()
        await self._keep_the_mark()
        await self._journal.finish(
            self._request.id,
            ending.reply,
            error=str(error) if error else None,
            resume_at=getattr(error, "resume_at", None),
            otherwise=otherwise,
        )
