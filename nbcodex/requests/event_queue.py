"""The events of one request on their way from the loop to a thread that paints.

Owns the hand-over: deltas are gathered on the loop's side, so that 2,000 events a second wake the
painter ten times; no other event waits. No locks: an interrupt may strike the painter anywhere.
"""

from __future__ import annotations

import asyncio
import os
import queue
import time
from collections.abc import Iterable
from dataclasses import replace

from nbcodex.events import Delta, Event

EVERY = 0.1
"""Seconds between two deliveries of deltas; the first one is delivered at once."""

WAIT_SLICE_S = 0.1 if os.name == "nt" else None
"""Seconds: Windows wakes no waiting thread for an interrupt, so there waits are cut into slices."""


class EventQueue:
    """A listener on the loop's side, and an iterable of batches on the painter's."""

    def __init__(self) -> None:
        self._batches: queue.SimpleQueue[tuple[Event, ...]] = queue.SimpleQueue()
        self._pending: list[Event] = []
        self._timer: asyncio.TimerHandle | None = None
        self._delivered_at = float("-inf")

    def __call__(self, event: Event) -> None:
        """Hear an event, on the loop's thread."""
        self._pending.append(event)
        if not isinstance(event, Delta):
            self._deliver()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            due = self._delivered_at + EVERY
            if loop.time() >= due:
                self._deliver()
            else:
                self._timer = loop.call_at(due, self._deliver)

    def _deliver(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if isinstance(self._pending[0], Delta):
            self._delivered_at = asyncio.get_running_loop().time()
        batch, self._pending = tuple(_joined(self._pending)), []
        self._batches.put(batch)

    def take(self, timeout: float | None = None) -> tuple[Event, ...]:
        """Wait for the next batch of events; an empty one after `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else end - time.monotonic()
            piece = WAIT_SLICE_S if left is None else min(left, WAIT_SLICE_S or left)
            try:
                return self._batches.get(timeout=None if piece is None else max(piece, 0.0))
            except queue.Empty:
                if end is not None and time.monotonic() >= end:
                    return ()


def _joined(events: Iterable[Event]) -> list[Event]:
    """Return the events with runs of deltas of one kind made into one."""
    joined: list[Event] = []
    run: list[Delta] = []

    def close() -> None:
        if run:
            joined.append(replace(run[-1], text="".join(delta.text for delta in run)))
            run.clear()

    for event in events:
        if isinstance(event, Delta):
            if run and run[-1].reasoning != event.reasoning:
                close()
            run.append(event)
        else:
            close()
            joined.append(event)
    close()
    return joined
