"""The ledger: one hold per bucket, shared by all requests of a model.

Decides and never waits: `reserve` gives leave to send, or the hold that stands against it. After a
hold one request goes ahead and the others follow once it is let in: nobody wakes as a herd.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from nbcodex.records import Limit, Snapshot

SCOUT = 10.0
"""Seconds after which those behind a scout that was not heard of go too."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Leave to send one request; a `probe` goes through a hold."""

    bucket: str
    probe: bool = False


@dataclass(frozen=True, slots=True)
class Hold:
    """A bucket closed until an instant, because of a limit; `scouted` while one request tries."""

    until: float
    limit: Limit | None
    scouted: bool = False


@dataclass(slots=True)
class _Bucket:
    hold: Hold | None = None
    scout: Reservation | None = None
    scouting_until: float = 0.0
    snapshot: Snapshot | None = None
    waiting: set[asyncio.Event] = field(default_factory=set)

    def wake(self) -> None:
        for event in self.waiting:
            event.set()


class Ledger:
    """What is known of every bucket, and who may send."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def _bucket(self, name: str) -> _Bucket:
        return self._buckets.setdefault(name, _Bucket())

    def reserve(self, name: str, now: float) -> Reservation | Hold:
        """Return leave to send now, or the hold that stands against it."""
        bucket = self._bucket(name)
        hold = bucket.hold
        if hold is None:
            return Reservation(name)
        if now < hold.until:
            return hold
        if bucket.scout and now < bucket.scouting_until:
            return Hold(bucket.scouting_until, hold.limit, scouted=True)
        bucket.scout, bucket.scouting_until = Reservation(name), now + SCOUT
        return bucket.scout

    def probe(self, name: str) -> Reservation:
        """Return leave to send through whatever hold there is; a refusal will not change it."""
        return Reservation(name, probe=True)

    def refuse(self, reservation: Reservation, *, until: float, limit: Limit | None) -> Hold:
        """A limit refused the request: close the bucket until an instant, and return the hold.

        A hold is never shortened, and a probe that is refused leaves it as it was.
        """
        bucket = self._bucket(reservation.bucket)
        hold = bucket.hold
        if hold is None or (until > hold.until and not reservation.probe):
            hold = bucket.hold = Hold(until, limit)
            bucket.scout = None
            bucket.wake()
        return hold

    def admit(self, reservation: Reservation, snapshot: Snapshot | None) -> None:
        """The server let the request in: keep what its headers say, let the others follow."""
        bucket = self._bucket(reservation.bucket)
        bucket.snapshot = snapshot or bucket.snapshot
        if reservation is bucket.scout or reservation.probe:
            bucket.hold = bucket.scout = None
            bucket.wake()

    def cancel(self, reservation: Reservation) -> None:
        """The request ended without a verdict; another may go ahead in its place."""
        bucket = self._bucket(reservation.bucket)
        if reservation is bucket.scout:
            bucket.scout = None
            bucket.wake()

    def listen(self, name: str, event: asyncio.Event) -> None:
        """Set `event` whenever the bucket opens or closes."""
        self._bucket(name).waiting.add(event)

    def leave(self, name: str, event: asyncio.Event) -> None:
        """Set `event` no longer."""
        self._bucket(name).waiting.discard(event)

    def known(self) -> dict[str, tuple[Snapshot | None, Hold | None]]:
        """Return the last snapshot and the hold of each bucket."""
        return {name: (b.snapshot, b.hold) for name, b in self._buckets.items()}
