"""Sends many requests at once through a real client and measures them; knows no server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from nbcodex.client import Client
from nbcodex.events import BackingOff, Ending, Event, Sent
from nbcodex.models import Request
from nbcodex.settings import Settings


@dataclass(frozen=True)
class LoadTestResult:
    """The results of a load test."""

    endings: list[Ending]  # one for each request, in their order
    seconds: float  # from the first start to the last ending
    last: float  # seconds of the attempt that ended last
    backed_off: int  # number of failed attempts


class LoadTest:
    """A running load test: all requests are started at once, without known limits."""

    def __init__(self, client: Client, requests: Sequence[Request], settings: Settings) -> None:
        self._backed_off, self._last = 0, 0.0
        self._sent: dict[str, float] = {}
        self._ended = self._begun = time.monotonic()
        self._handles = [client.handle(r, settings, listener=self._on_event) for r in requests]
        for handle in self._handles:
            handle.start()

    def _on_event(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Sent):
            self._sent[event.request_id] = now
        elif isinstance(event, BackingOff):
            self._backed_off += 1
        elif isinstance(event, Ending):
            self._ended, self._last = now, now - self._sent.get(event.request_id, now)

    def finish(self) -> LoadTestResult:
        """Wait for the last ending."""
        endings = [handle.wait() for handle in self._handles]
        return LoadTestResult(endings, self._ended - self._begun, self._last, self._backed_off)


def warm_up(client: Client, request: Request, settings: Settings) -> None:
    """Send one request, so that no measurement includes the imports of the first one."""
    assert client.handle(request, settings).follow().reply
