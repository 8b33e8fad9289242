"""How much of a limit's refill is used, by the level of the simulator's own bucket.

What a request is charged is known at its end, and a few seconds hold few requests: what was taken
in them is only the level's business, which no delay and no chance disturbs.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from types import TracebackType

from nbcodex.models import MINUTE
from nbcodex.simulator import Simulator

EVERY = 0.05
"""Seconds between two looks."""


class Level:
    """A thread that looks at the one account of a simulator while the block lasts."""

    def __init__(self, core: Simulator) -> None:
        self._core = core
        self._looks: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Level:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            seen = next((seen for seen in reversed(self._core.log) if seen.key), None)
            if seen is None:
                continue
            bucket = self._core.account(seen.key, seen.model).tokens[MINUTE]
            now = self._core.clock.now()
            level = bucket.level + max(0.0, now - bucket.at) * bucket.limit / bucket.window
            self._looks.append((now, min(bucket.limit, level)))

    def used(self, since: float, until: float) -> float:
        """Return the tokens taken between two instants, as a share of what flowed in."""
        first, last = (bisect_left(self._looks, (at,)) for at in (since, until))
        (began, before), (ended, after) = self._looks[first], self._looks[last]
        knobs = self._core.knobs
        assert knobs.tpm is not None
        return 1 - (after - before) / ((ended - began) * knobs.tpm / MINUTE)
