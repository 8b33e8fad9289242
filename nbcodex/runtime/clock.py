"""Time, and waiting for an instant. Tests replace the clock, so that hours pass in milliseconds."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Protocol

CLOCK_RECHECK_S = 1.0  # because asyncio's timers stop while a laptop sleeps, unlike boot time


class Clock(Protocol):
    """What requests, the rate limiter and the journal need of a clock."""

    def now(self) -> float:
        """Return the instant in seconds, comparable across processes of one boot."""

    def wall(self) -> float:
        """Return seconds since the epoch, for display and HTTP dates; no wait depends on them."""

    async def wait(self, until: float, *, unless: asyncio.Event | None = None) -> bool:
        """Wait for the instant `until`; return True as soon as `unless` is set."""


class BootClock:
    """The machine's time since boot: it continues during sleep, and cannot be set."""

    _clock_id = getattr(time, "CLOCK_BOOTTIME", None)  # Linux has it; elsewhere `monotonic` serves

    def now(self) -> float:
        """Return seconds since boot."""
        return time.monotonic() if self._clock_id is None else time.clock_gettime(self._clock_id)

    def wall(self) -> float:
        """Return seconds since the epoch."""
        return time.time()

    async def wait(self, until: float, *, unless: asyncio.Event | None = None) -> bool:
        """Wait for the instant `until`; return True as soon as `unless` is set."""
        unless = unless or asyncio.Event()
        while (remaining := until - self.now()) > 0 and not unless.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(remaining, CLOCK_RECHECK_S)):
                    await unless.wait()
        return unless.is_set()


def boot_id() -> str:
    """Return the id of this boot of the machine; empty where the platform has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def format_duration(seconds: float) -> str:
    """Return a duration in words: ``7.4 s``, ``1 min 12 s``, ``2 h 03 min``, ``3 d 4 h``."""
    if seconds < 59.95:
        return f"{max(seconds, 0.0):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def format_time(wall: float, *, now: float) -> str:
    """Return an instant as local time, with the date if `now` is another day; both as `wall`."""
    then, today = time.localtime(wall), time.localtime(now)
    is_today = then[:3] == today[:3]  # year, month and day
    return time.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M", then)
