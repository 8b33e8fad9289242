"""The yardstick: first come, first served by one who knows all but the outputs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.world import Prompt, World


@dataclass(slots=True)
class Oracle:
    """First come, first served by one who knows the limits, the policy and the level, not outputs.

    Under *actual* it reserves the mean output for each answer under way, as the level would go into
    debt otherwise.
    """

    world: World
    prompts: list[Prompt]
    under_way: int = 0
    next: int = 0
    mean: float = 0.0
    cpu: float = 0.0
    due: float = 0.0

    def start(self) -> None:
        self.mean = statistics.fmean(p.output for p in self.prompts)
        self.go()

    def go(self) -> None:
        heap, knobs = self.world.heap, self.world.knobs
        now = heap.now
        while self.next < len(self.prompts):
            prompt = self.prompts[self.next]
            tokens = round(prompt.tokens * knobs.token_bias)
            need = tokens + (0 if knobs.policy == "actual" else prompt.max_output)
            spare = (self.under_way + 1) * self.mean if knobs.policy == "actual" else 0.0
            wait = 0.0
            for bucket in self.world.account.tokens.values():
                asked = min(need + spare, bucket.limit)
                rate = bucket.limit / bucket.window * (1 - bucket.used_by_others)
                wait = max(wait, (asked - bucket.level_at(now)) / rate)
            for bucket in self.world.account.requests.values():
                rate = bucket.limit / bucket.window * (1 - bucket.used_by_others)
                wait = max(wait, (1 - bucket.level_at(now)) / rate)
            if wait > 1e-7:
                self.due = now + wait + 1e-7
                heap.at(self.due, self.look, self.due)
                return
            self.next += 1
            self.under_way += 1
            self.world._arrive(prompt, self)

    def look(self, due: float) -> None:
        if due == self.due:
            self.go()

    def first(self, *_: Any) -> None: ...

    def refused(self, *_: Any) -> None:
        raise AssertionError("the oracle knows the level")

    def done(self, *_: Any) -> None:
        self.under_way -= 1
        self.go()
