"""The share of a limit's refill that is used, by the level of the simulator's own bucket.

The charge of a request is known only at its end, and few requests end within some seconds. The
level shows what was taken in them without such delays and chances.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from types import TracebackType

from nbcodex.models import MINUTE
from nbcodex.simulator import Simulator

SAMPLE_INTERVAL_S = 0.05


class LevelRecorder:
    """A thread that records the level of a simulator's only account during a `with` block."""

    def __init__(self, core: Simulator) -> None:
        self._core = core
        self._samples: list[tuple[float, float]] = []  # instant and level
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)

    def __enter__(self) -> LevelRecorder:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _record(self) -> None:
        while not self._is_over.wait(SAMPLE_INTERVAL_S):
            seen = next((seen for seen in reversed(self._core.log) if seen.key), None)
            if seen is None:
                continue
            bucket = self._core.account(seen.key, seen.model).tokens[MINUTE]
            now = self._core.clock.now()
            level = bucket.level + max(0.0, now - bucket.at) * bucket.limit / bucket.window
            self._samples.append((now, min(bucket.limit, level)))

    def used_share(self, since: float, until: float) -> float:
        """Return the tokens taken between two instants, as a share of the refill."""
        first, last = (bisect_left(self._samples, (at,)) for at in (since, until))
        (start_at, start_level), (end_at, end_level) = self._samples[first], self._samples[last]
        knobs = self._core.knobs
        assert knobs.tpm is not None
        return 1 - (end_level - start_level) / ((end_at - start_at) * knobs.tpm / MINUTE)
