"""Background responses: they go on when nobody reads them, and can be picked up again.

Must not know limits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from nbcodex.simulator.delivery import Run, generate
from nbcodex.simulator.generation import Piece
from nbcodex.simulator.responses import ResponsesWire

_GOES_ON = ("queued", "in_progress")


@dataclass(slots=True)
class Stored:
    """A background response: it goes on whether or not anybody reads it.

    Parameters
    ----------
    run : Run
        Its run.
    owner : str
        The name of the key that may read it.
    """

    run: Run
    owner: str
    pieces: list[Piece] = field(default_factory=list)
    status: str = "queued"
    _task: asyncio.Task[None] | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self) -> None:
        """Begin to generate, on the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._generate())

    def cancel(self) -> None:
        """End the generation, if it goes on."""
        if self.status in _GOES_ON and self._task is not None:
            self.status = "cancelled"
            self._task.cancel()
            self._tell()

    def response(self) -> dict[str, Any]:
        """Return the response as it stands."""
        wire = ResponsesWire(self.run.making)
        if self.status in ("completed", "incomplete"):
            return wire.whole()
        if self.status == "failed" and self.run.fault is not None:
            return wire.failed(self.run.fault, self.run.message)
        return wire.unfinished(self.status)

    async def follow(self, after: int = -1) -> AsyncGenerator[Piece, None]:
        """Yield the events with a sequence number above `after`, as they come."""
        index = 0
        while True:
            for piece in self.pieces[index:]:
                index += 1
                if piece.number > after:
                    yield piece
            if index == len(self.pieces):
                if self.status not in _GOES_ON:
                    return
                await self._news.wait()

    async def _generate(self) -> None:
        async with aclosing(generate(self.run)) as pieces:
            async for piece in pieces:
                self.status = "in_progress"
                self.pieces.append(piece)
                self._tell()
        plan = self.run.making.plan
        finished = "incomplete" if plan.cut else "completed"
        self.status = finished if self.run.seen.finished else "failed"
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
