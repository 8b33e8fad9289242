"""Takes as many rows as one part may hold, and makes the file of it.

Owns that a budget is asked for each row. Must not know what becomes of a part.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from typing import TYPE_CHECKING

from nbcodex.errors import BudgetError, NbcodexError, TooLargeError
from nbcodex.events import Ending, Parked
from nbcodex.mapping import outcome
from nbcodex.mapping.batch_api import Part
from nbcodex.mapping.pending_rows import PendingRows, Row
from nbcodex.models import Reply, Request
from nbcodex.openai_api.batches import BATCH_PRICE_FACTOR, MAX_BATCH_BYTES, BatchClient
from nbcodex.requests import spending_cap
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from nbcodex.requests.services import Services

BREATH = 50
"""Rows after which whatever else runs on the loop gets its turn."""


class Packer:
    """Makes parts of rows.

    Parameters
    ----------
    services, settings
        Of the map.
    batches : Batches
        Writes the lines.
    register : PendingRows
        Where rows end that may not, or cannot, be handed in.
    """

    def __init__(
        self, services: Services, settings: Settings, batches: BatchClient, register: PendingRows
    ) -> None:
        self._services, self._settings = services, settings
        self._batches, self._register = batches, register

    async def pack(self, rows: deque[Row], most: int) -> tuple[Part, bytes]:
        """Take at most so many rows from the left; return them, and their file."""
        first = rows[0]
        base_url, _, model = first.group
        tag = f"{first.request.origin.map_id}.{secrets.token_hex(4)}"
        part = Part(tag, {}, first.request, base_url, model)
        data = bytearray()
        while rows and len(part.requests) < most:
            request = rows[0].request
            try:
                line = await self._line(request, part)
            except NbcodexError as error:
                rows.popleft()
                await self._register.settle([self._refused(request, error)])
                continue
            if part.requests and len(data) + len(line) > MAX_BATCH_BYTES:
                break
            rows.popleft()
            data += line
            part.requests[request.id] = part.asking = request
            if len(part.requests) % BREATH == 0:
                await asyncio.sleep(0)
        return part, bytes(data)

    async def _line(self, request: Request, part: Part) -> bytes:
        """Return a row's line, if its user's budget allows it."""
        await self._services.budget.admit(
            request,
            caps=map(spending_cap.read, self._settings.budgets),
            journal=self._services.journal(self._settings),
            model=part.model,
            base_url=part.base_url,
            share=BATCH_PRICE_FACTOR,
        )
        line = self._batches.request_line(request, self._settings, model=part.model or "")
        if len(line) > MAX_BATCH_BYTES:
            raise TooLargeError("The row is larger than a whole batch.")
        return line

    def _refused(self, request: Request, error: NbcodexError) -> Ending:
        clock = self._services.clock
        if isinstance(error, BudgetError):
            reply = Reply(id=request.id, status="parked", attempts=0)
            return Parked(request_id=request.id, at=clock.now(), error=error, reply=reply)
        return outcome.failed(request, error, clock=clock)
