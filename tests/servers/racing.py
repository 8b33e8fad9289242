"""Many requests at once through the real engine, in real time: how long they took, and how well.

Must not know which server they race against.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from nbcodex.client import Client
from nbcodex.events import BackingOff, Ending, Event, Sent
from nbcodex.models import Request
from nbcodex.settings import Settings


@dataclass(frozen=True)
class Race:
    """What came of it.

    Parameters
    ----------
    endings : list of Ending
        One for each request, in their order.
    seconds : float
        From the first start to the last ending.
    last : float
        What the attempt took that ended last.
    backed_off : int
        How often an attempt failed.
    """

    endings: list[Ending]
    seconds: float
    last: float
    backed_off: int


class Racer:
    """A race that is under way: all its requests are started at once, told nothing of limits."""

    def __init__(self, client: Client, requests: Sequence[Request], settings: Settings) -> None:
        self._backed_off, self._last = 0, 0.0
        self._sent: dict[str, float] = {}
        self._ended = self._begun = time.monotonic()
        self._handles = [client.handle(r, settings, listener=self._hear) for r in requests]
        for handle in self._handles:
            handle.start()

    def _hear(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Sent):
            self._sent[event.request_id] = now
        elif isinstance(event, BackingOff):
            self._backed_off += 1
        elif isinstance(event, Ending):
            self._ended, self._last = now, now - self._sent.get(event.request_id, now)

    def finish(self) -> Race:
        """Wait for the last ending."""
        endings = [handle.wait() for handle in self._handles]
        return Race(endings, self._ended - self._begun, self._last, self._backed_off)


def warm_up(client: Client, request: Request, settings: Settings) -> None:
    """Ask once, so that what is imported at the first request is no part of a race."""
    assert client.handle(request, settings).follow().reply
