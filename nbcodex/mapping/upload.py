"""Carries rows to the provider in parts, and their answers back. Lives on the event loop.

Owns that a row is in the journal before it is handed in, and that none is handed in twice: a part
is written down before it goes, and one that is with the provider already is waited for. Must not
know the data, nor the order of rows.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from nbcodex import events
from nbcodex.errors import EntryError, NbcodexError
from nbcodex.journal.codec import equality_key
from nbcodex.mapping import outcome
from nbcodex.mapping.batch_api import Part, Provider, only
from nbcodex.mapping.batch_files import TOGETHER, Fetcher
from nbcodex.mapping.packing import BREATH, Packer
from nbcodex.mapping.pending_rows import Group, PendingRows, Row
from nbcodex.models import Request
from nbcodex.openai_api.batches import MAX_BATCH_REQUESTS
from nbcodex.requests import repair
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from nbcodex.requests.services import Services

FULL, FULLER = 30.0, 600.0
"""Seconds until a full queue is tried again: at first, and at the longest."""

log = logging.getLogger(__name__)


class BatchUploader:
    """The rows of one map. Its orders are given on the loop's thread.

    Parameters
    ----------
    services : Services
        What all requests of the process share.
    settings : Settings
        How the server is reached.
    tell : callable
        Hears the events of rows.
    ending : bool
        Whether what is with the provider is cancelled there, and nothing more is handed in.

    Attributes
    ----------
    backlog : int
        Rows that are not in the journal yet.
    """

    def __init__(
        self,
        services: Services,
        settings: Settings,
        tell: Callable[[events.Event], None],
        *,
        ending: bool = False,
    ) -> None:
        self._services, self._settings, self._ending = services, settings, ending
        self._clock, self._parts = services.clock, services.journal(settings).batch_jobs
        self._provider = Provider(services, settings)
        self._register = PendingRows(services, self._parts, tell)
        self._fetcher = Fetcher(services, settings, self._provider, self._register)
        self._packer = Packer(services, settings, self._provider.batches, self._register)
        self._ready: dict[Group, deque[Row]] = {}
        self._behind: dict[str, list[Row]] = {}
        self._away: dict[str, Part | None] = {}
        self._seen: set[str] = set()
        self._most, self._stage = MAX_BATCH_REQUESTS, ""
        self._orders: deque[list[Row] | None] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving: asyncio.Task[None] | None = None
        self._handing: asyncio.Task[None] | None = None
        self._freed = asyncio.Event()
        self._batch = ""
        self.backlog = 0

    # Orders.

    def take(self, rows: list[Row]) -> None:
        """Take rows over."""
        self.backlog += len(rows)
        self._batch = rows[0].request.origin.map_id or ""
        self._register.rows.update((row.request.id, row) for row in rows)
        self._order(rows)

    def flush(self) -> None:
        """For now there are no more rows: hand in what there is."""
        self._order(None)

    def _order(self, rows: list[Row] | None) -> None:
        self._orders.append(rows)
        if self._serving is None:
            self._spawn(self._fetcher.tidy())
        if self._serving is None or self._serving.done():
            self._serving = self._spawn(self._serve())

    async def park(self) -> None:
        """Wait for nothing any more; what is with the provider goes on there."""
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._register.settled()
        left = [row.request for row in self._register.rows.values()]
        away = {id_ for part in self._away.values() if part for id_ in part.requests}
        await self._parts.park_rows(self._away, [request.id for request in left], batch=self._batch)
        for request in left:
            attempts, why = (1, "goes on at") if request.id in away else (0, "is not yet with")
            told = f"It {why} the provider."
            self._register.drop(outcome.parked(request, told, clock=self._clock, attempts=attempts))

    @property
    def stage(self) -> str:
        """Where the provider is with what was handed in."""
        if self._provider.hitch:
            return f"waiting out: {self._provider.hitch}"
        known = [part.batch for part in list(self._away.values()) if part and part.batch]
        total = sum(batch.total for batch in known)
        if self._stage or not known:
            return self._stage
        words = known[0].status.replace("_", " ")
        answered = sum(batch.answered + batch.failed for batch in known)
        return f"{words} {answered:,} of {total:,}" if answered else words

    # Into the journal.

    async def _serve(self) -> None:
        while self._orders:
            if (rows := self._orders.popleft()) is None:
                self._set_going()
            else:
                await self._admit(rows)
                self.backlog -= len(rows)

    async def _admit(self, rows: Sequence[Row]) -> None:
        """Put rows into the journal, and find out what each of them waits for."""
        fit: list[Row] = []
        for number, row in enumerate(rows):
            if not await self._prepared(row):
                continue
            if (tag := row.part) and tag not in self._seen:
                self._behind.setdefault(tag, []).append(row)
            else:
                fit.append(row)
            if number % BREATH == 0:
                await asyncio.sleep(0)
        admitted = await self._parts.insert_rows(
            [(r.request, r.key, r.entry is not None) for r in fit]
        )
        ended: list[events.Ending] = []
        for row in fit:
            row.entry = None
            request, id_ = row.request, row.request.id
            if id_ in admitted.lost:
                error = EntryError(f"Row {id_} is done, or another kernel has it.")
                ended.append(outcome.failed(request, error, clock=self._clock))
            elif reply := repair.reused(request, admitted.answers.get(id_)):
                finished = events.Finished(request_id=id_, at=self._clock.now(), reply=reply)
                ended.append(finished)
            elif (tag := admitted.other_jobs.get(id_)) and tag not in self._seen:
                self._behind.setdefault(tag, []).append(row)
            else:
                self._ready.setdefault(row.group, deque()).append(row)
        await self._register.settle(ended)

    async def _prepared(self, row: Row) -> bool:
        """Find out where a row goes; one that goes nowhere ends here."""
        api_client, settings = self._services.api_client, self._settings
        # A batch's answer lies in its file: to have it kept elsewhere, too, is of no use.
        request = row.request = replace(row.request, durable=False)
        try:
            model = await api_client.resolve_model(request, settings)
            base_url = api_client.endpoint(request, settings).base_url
            row.group = base_url, self._provider.batches.api_for(request, settings), model
            row.key = equality_key(request, base_url=base_url)
        except NbcodexError as error:
            await self._register.settle([outcome.failed(request, error, clock=self._clock)])
            return False
        return True

    # To the provider.

    def _set_going(self) -> None:
        for tag in self._behind:
            if tag not in self._away:
                self._away[tag] = None
                self._spawn(self._take_up(tag))
        if self._handing is None or self._handing.done():
            self._handing = self._spawn(self._hand_all_in())

    async def _hand_all_in(self) -> None:
        """Hand in what is ready, part after part, each when the one before it was accepted."""
        delay = FULL
        while rows := next(filter(None, self._ready.values()), None):
            if self._ending:
                left = [rows.popleft() for _ in range(min(len(rows), TOGETHER))]
                await self._register.settle([self._parked(row.request) for row in left])
                continue
            self._stage = "handing in"
            part, data = await self._packer.pack(rows, self._most)
            if not part.requests or await self._hand_in(part, data):
                delay, self._most = FULL, min(MAX_BATCH_REQUESTS, self._most * 2)
                continue
            if not any(self._away.values()):  # perhaps it is too much even for an empty queue
                self._most = max(1, len(part.requests) // 2)
            self._stage = "the provider's queue is full"
            self._freed.clear()
            await self._clock.wait(self._clock.now() + delay, unless=self._freed)
            delay = min(delay * 2, FULLER)
        self._stage = ""
        await self._parts.set_submitted(self._batch)

    def _parked(self, request: Request, why: str = "Not handed in.") -> events.Ending:
        return outcome.parked(request, why, clock=self._clock)

    async def _hand_in(self, part: Part, data: bytes) -> bool:
        """Hand a part in, and see to its return; False where the provider has no room for it."""
        self._away[part.tag] = part
        await self._parts.insert_job(part.tag, part.requests.values(), base_url=part.base_url)
        try:
            noted = partial(self._note_file, part.tag)
            part.batch = await self._provider.hand_in(part, data, noted=noted)
        except NbcodexError as error:
            del self._away[part.tag]
            await self._parts.withdraw_job(part.tag)
            requests = list(part.requests.values())
            await self._register.settle(
                [outcome.failed(request, error, clock=self._clock) for request in requests]
            )
            return True
        await self._parts.set_remote_names(part.tag, remote=part.batch.id)
        self._tell_sent(part)
        self._stage = ""
        try:
            batch = await self._provider.watch(part, until_accepted=True)
        except NbcodexError as error:
            await self._lose(part, error)
            return True
        if batch.is_queue_full:
            await self._give_back(part)
            return False
        self._spawn(self._bring_back(part))
        return True

    async def _note_file(self, tag: str, file: str) -> None:
        await self._parts.set_remote_names(tag, file=file)

    def _tell_sent(self, part: Part) -> None:
        self._services.load_prices(part.base_url)
        self._register.tell(part.requests, events.Sent, attempt=1, model=part.model, input_tokens=0)

    async def _give_back(self, part: Part) -> None:
        """Have the rows of a part that was not taken wait again, in their places."""
        if part.batch is not None:
            await self._provider.erase(part.batch, part.asking)
        await self._parts.withdraw_job(part.tag)
        self._away.pop(part.tag, None)
        self._register.tell(
            part.requests, events.CoolingDown, limit=None, resume_at=None, waited=0.0
        )
        rows = self._register.rows
        strangers = [id_ for id_ in part.requests if id_ not in rows]
        await self._parts.park_rows([], strangers, batch=part.tag)
        for row in reversed([rows[id_] for id_ in part.requests if id_ in rows]):
            row.entry = None
            self._ready.setdefault(row.group, deque()).appendleft(row)

    # From the provider.

    async def _take_up(self, tag: str) -> None:
        """Go on with a part that another kernel, or this one before Stop, has handed in."""
        held = await self._parts.claim_job(tag)
        if held is None or not held.requests:
            await self._free(tag)
            return
        requests = {request.id: request for request in held.requests}
        part = self._away[tag] = Part(tag, requests, held.requests[0], held.base_url)
        waiting = self._behind[tag]
        waiting[:] = [row for row in waiting if row.request.id not in requests]
        try:
            self._fetcher.check_server(part)
            if held.remote is None:
                part.batch = await self._provider.find(part)
            else:
                part.batch = await self._provider.look(held.remote, part.asking)
        except NbcodexError as error:
            await self._lose(part, error)
            return
        if part.batch is None:
            part.batch = only(held.file)
            await self._give_back(part)
            await self._free(tag)
            return
        await self._parts.set_remote_names(tag, remote=part.batch.id)
        self._tell_sent(part)
        await self._bring_back(part)

    async def _bring_back(self, part: Part) -> None:
        """Wait for a batch, commit what it answered, and have its files erased."""
        try:
            if self._ending:
                await self._provider.cancel(part)
            batch = await self._provider.watch(part)
            if batch.is_queue_full:
                await self._give_back(part)
            else:
                await self._fetcher.fetch(part)
        except NbcodexError as error:
            await self._lose(part, error)
        else:
            await self._free(part.tag)

    async def _lose(self, part: Part, error: NbcodexError) -> None:
        """Nobody can say how a part stands: its rows stay with it, unless it is given up."""
        requests = list(part.requests.values())
        if self._ending:
            await self._parts.withdraw_job(part.tag)
            why = f"The batch is given up. {error.message}"
            await self._register.settle([self._parked(request, why) for request in requests])
        else:
            await self._parts.park_rows([part.tag], [], batch=part.tag)
            for request in requests:
                self._register.drop(outcome.failed(request, error, clock=self._clock))
        await self._free(part.tag)

    async def _free(self, tag: str) -> None:
        """A part is done with: those who waited for it find their answers, or are handed in."""
        self._away.pop(tag, None)
        self._seen.add(tag)
        self._freed.set()
        if rows := self._behind.pop(tag, []):
            await self._admit(rows)
        self._set_going()

    # Tasks.

    def _spawn(self, deed: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(deed, name=f"codex-{self._batch}")
        self._tasks.add(task)
        task.add_done_callback(self._see_off)
        return task

    def _see_off(self, task: asyncio.Task[None]) -> None:
        """Make sure that even a defect of ours leaves nobody waiting."""
        self._tasks.discard(task)
        if task.cancelled() or (defect := task.exception()) is None:
            return
        log.error("map %s met a defect", self._batch, exc_info=defect)
        error = NbcodexError(
            f"A defect in nbcodex: {type(defect).__name__}.", advice="Please report it."
        )
        for row in list(self._register.rows.values()):
            self._register.drop(outcome.failed(row.request, error, clock=self._clock))
