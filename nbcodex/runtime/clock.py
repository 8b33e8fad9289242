"""Time, and waiting for it: the only door to both, so that hours pass in milliseconds in tests.

Owns what "now" means. Must not know what anybody waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Protocol

CLOCK_RECHECK_S = 1.0
"""Seconds after which a wait looks at the clock again: asyncio's own timer stands still while a
laptop sleeps, boot time does not."""


class Clock(Protocol):
    """What the engine and the ledger ask of time."""

    def now(self) -> float:
        """Return the instant in seconds, comparable across processes of one boot."""
        ...

    def wall(self) -> float:
        """Return seconds since the epoch: for people and for HTTP dates, never for a wait."""
        ...

    async def wait(self, until: float, *, unless: asyncio.Event | None = None) -> bool:
        """Wait for the instant `until`; return True as soon as `unless` is set."""
        ...


class BootClock:
    """The machine's time since boot: it goes on in sleep, and no wall clock can move it."""

    _source = getattr(time, "CLOCK_BOOTTIME", None)

    def now(self) -> float:
        """Return seconds since boot (where the platform has no such clock, monotonic ones)."""
        return time.monotonic() if self._source is None else time.clock_gettime(self._source)

    def wall(self) -> float:
        """Return seconds since the epoch."""
        return time.time()

    async def wait(self, until: float, *, unless: asyncio.Event | None = None) -> bool:
        """Wait for the instant `until`; return True as soon as `unless` is set."""
        while (left := until - self.now()) > 0:
            if await pause(min(left, CLOCK_RECHECK_S), unless):
                return True
        return unless is not None and unless.is_set()


def boot() -> str:
    """Return what names this run of the machine; empty where the platform does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


async def pause(seconds: float, unless: asyncio.Event | None = None) -> bool:
    """Sleep on the running loop; return True as soon as `unless` is set."""
    if unless is None:
        await asyncio.sleep(seconds)
        return False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await unless.wait()
    return unless.is_set()


def format_duration(seconds: float) -> str:
    """Return a duration for people: ``7.4 s``, ``1 min 12 s``, ``2 h 03 min``, ``3 d 4 h``."""
    if seconds < 59.95:
        return f"{max(seconds, 0.0):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def format_time(wall: float, *, now: float) -> str:
    """Return the local time of an instant since the epoch, with the date if it is not today's."""
    then, today = time.localtime(wall), time.localtime(now)
    same_day = then[:3] == today[:3]
    return time.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M", then)
