"""Sends many requests at once through a real client and measures them; knows no server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    withheld: float  # seconds in which a program had to wait for a processor

    def is_within(self, seconds: float) -> bool:
        """Whether it would have taken at most `seconds` on a machine of its own."""
        return self.seconds - self.withheld <= seconds


class LoadTest:
    """A running load test: all requests are started at once, without known limits."""

    def __init__(self, client: Client, requests: Sequence[Request], settings: Settings) -> None:
        self._backed_off, self._last = 0, 0.0
        self._sent: dict[str, float] = {}
        self._withheld_before = _seconds_withheld()
        self._ended = self._begun = time.monotonic()
        self._handles = [
            client.create_handle(r, settings, listener=self._on_event) for r in requests
        ]
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
        seconds, withheld = self._ended - self._begun, _seconds_withheld() - self._withheld_before
        return LoadTestResult(endings, seconds, self._last, self._backed_off, withheld)


def _seconds_withheld() -> float:
    """Return for how long some program of this machine has been waiting for a processor."""
    pressure = Path(
        "/proc/pressure/cpu"
    )  # microseconds (the kernel's "Pressure Stall Information")
    if not pressure.exists():
        return 0.0
    return int(pressure.read_text().split("total=")[1].split()[0]) / 1e6


def warm_up(client: Client, request: Request, settings: Settings) -> None:
    """Send one request, so that no measurement includes the imports of the first one."""
    assert client.create_handle(request, settings).follow().reply
