"""One request's writes to the journal: when each is made, and whether the runner waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from nbcodex.errors import EntryError
from nbcodex.events import Ending, Failed
from nbcodex.journal.codec import equality_key
from nbcodex.journal.journal import Journal
from nbcodex.journal.spending import SpendAmount
from nbcodex.models import Reply, Request, StreamPosition
from nbcodex.requests.request_state import PartialAnswer
from nbcodex.runtime.clock import Clock

# If the first attempt starts within this time, one commit stores both the request and the attempt.
INSERT_DELAY_S = 0.02
# With the time that a commit takes, a crash loses less than one second of text.
UPDATE_INTERVAL_S = 0.8
# Each update writes the whole text, so one that is longer than 64,000 characters is updated less
# often: otherwise an answer without an end would write gigabytes.
MAX_UPDATE_CHARS_PER_S = 80_000


class EntryWriter:
    """The entry of one request, as the runner of that request writes it."""

    def __init__(
        self, journal: Journal, request: Request, answer: PartialAnswer, clock: Clock
    ) -> None:
        self._journal, self._request, self._clock = journal, request, clock
        self._answer = answer
        self._stored_response_id: str | None = None
        # Inserts the entry; None before `schedule_insert`, and once the insertion has begun.
        self._insert: Callable[..., Coroutine[Any, Any, None]] | None = None
        self._insert_timer: asyncio.TimerHandle | None = None
        self._inserting: asyncio.Future[None] | None = None
        self._on_committed: Callable[[], object] = lambda: None
        self._update_task: asyncio.Task[None] | None = None

    async def schedule_insert(
        self, base_url: str, server: str | None, *, on_committed: Callable[[], object]
    ) -> Reply | None:
        """Schedule the insertion; return the answer to an equal request if it is to be reused.

        `server` is stored as `Origin.server`. Nothing may be sent before `wait_inserted` or
        `start_attempt` has returned. `on_committed` is called on the event loop once the request is
        committed.
        """
        key = equality_key(self._request, base_url=base_url)
        self._insert = partial(self._journal.insert, self._request.with_server(server), key=key)
        self._on_committed = on_committed
        if not self._request.reuse:
            loop = asyncio.get_running_loop()
            self._insert_timer = loop.call_later(INSERT_DELAY_S, self._insert_now)
            return None
        await self.wait_inserted()
        return await self._journal.find_answer(key, reply_id=self._request.id)

    async def claim(self, base_url: str, server: str | None, *, reuse: bool) -> Reply | None:
        """Become the entry's owner; return an equal request's answer, if both `reuse` permit it."""
        if not await self._journal.claim(self._request.id, server=server):
            raise not_resumable(self._request.id)
        if not (reuse and self._request.reuse):
            return None
        key = equality_key(self._request, base_url=base_url)
        return await self._journal.find_answer(key, reply_id=self._request.id)

    async def wait_inserted(self) -> None:
        """Return once the request is committed."""
        self._insert_now()
        if self._inserting is not None:
            # Stop, cancel or park may cancel the task that waits here. The commit continues, and
            # `finish` waits for it again.
            await asyncio.shield(self._inserting)
            self._inserting = None

    def _insert_now(self, attempt: int | None = None) -> bool:
        """Begin the insertion, with the `attempt` that follows it; return False if it has begun."""
        insert, self._insert = self._insert, None
        if self._insert_timer is not None:
            self._insert_timer.cancel()
        if insert is None:
            return False
        self._inserting = asyncio.ensure_future(insert(attempt=attempt))
        self._inserting.add_done_callback(lambda _: self._on_committed())
        return True

    async def start_attempt(self, attempt: int) -> None:
        """Commit that an attempt is about to be sent."""
        if self._insert_now(attempt):
            await self.wait_inserted()
            return
        # With a position, the attempt does not ask anew, but continues a durable answer.
        continues = self._answer.position is not None
        started = self._journal.start_attempt(self._request.id, attempt, continues=continues)
        # Both are submitted before either is awaited, so that they share one commit.
        await asyncio.gather(self.wait_inserted(), started)

    async def set_response_id(self, position: StreamPosition) -> None:
        """Commit which durable response carries the answer, before any of its text is shown."""
        if position.response_id != self._stored_response_id:
            self._stored_response_id = position.response_id
            await self._journal.set_response_id(self._request.id, position.response_id)

    async def record_wait(self, until: float) -> None:
        """Record that the request waits until `until`, an instant of the clock."""
        await self.wait_inserted()
        await self._update_if_durable()
        wall = self._clock.wall() + until - self._clock.now()
        await self._journal.record_wait(self._request.id, wall, notes=self._answer.notes)

    def update_soon(self) -> None:
        """Schedule a write of the text so far; at most one is scheduled at a time."""

        async def update() -> None:
            chars = len(self._answer.text)
            await asyncio.sleep(max(UPDATE_INTERVAL_S, chars / MAX_UPDATE_CHARS_PER_S))
            self._update_task = None
            await self._update()

        if self._update_task is None:
            self._update_task = asyncio.get_running_loop().create_task(update())

    async def _update(self) -> None:
        position = self._answer.position
        sequence = position.sequence if position else None
        await self._journal.update_text(self._request.id, self._answer.text, sequence=sequence)

    async def _update_if_durable(self) -> None:
        # A durable answer continues after its position: text and position have to be in one
        # commit, or words would be lost or doubled.
        if self._answer.position is not None:
            await self._update()

    async def finish(self, ending: Ending, *, spent_if_unknown: SpendAmount) -> None:
        """Commit the ending as `Journal.finish` does; nothing of it may be shown before that."""
        if self._update_task is not None:
            self._update_task.cancel()
        if isinstance(ending, Failed) and ending.entry_unchanged:
            return
        await self.wait_inserted()
        await self._update_if_durable()
        await self._journal.finish(
            ending.reply,
            error=str(ending.error) if ending.error else None,
            resume_at=getattr(ending.error, "resume_at", None),
            spent_if_unknown=spent_if_unknown,
        )


def not_resumable(id_: str) -> EntryError:
    """Return the error for a request that cannot be resumed."""
    return EntryError(
        f"Request {id_} cannot be resumed: it is still running, or it has finished.",
        advice=f"`%codex journal {id_}` shows its state.",
    )
