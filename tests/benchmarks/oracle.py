"""The reference for efficiency: a client that knows everything except the outputs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.world import Prompt, RemoteServer


@dataclass(slots=True)
class Oracle:
    """A first-come-first-served client that knows the limits, the policy and the level.

    Under *actual* it reserves the mean output for each answer in flight, because the level would
    otherwise go into debt.
    """

    server: RemoteServer
    prompts: list[Prompt]
    in_flight: int = 0
    next_index: int = 0
    mean_output: float = 0.0
    cpu: float = 0.0
    due_at: float = 0.0

    def start(self) -> None:
        self.mean_output = statistics.fmean(p.output for p in self.prompts)
        self._send_all()

    def _send_all(self) -> None:
        heap, knobs = self.server.heap, self.server.knobs
        now = heap.now
        while self.next_index < len(self.prompts):
            prompt = self.prompts[self.next_index]
            tokens = round(prompt.tokens * knobs.token_bias)
            need = tokens + (0 if knobs.policy == "actual" else prompt.max_output)
            spare = (self.in_flight + 1) * self.mean_output if knobs.policy == "actual" else 0.0
            wait = 0.0
            for bucket in self.server.account.tokens.values():
                asked = min(need + spare, bucket.limit)
                rate = bucket.limit / bucket.window * (1 - bucket.used_by_others)
                wait = max(wait, (asked - bucket.level_at(now)) / rate)
            for bucket in self.server.account.requests.values():
                rate = bucket.limit / bucket.window * (1 - bucket.used_by_others)
                wait = max(wait, (1 - bucket.level_at(now)) / rate)
            if wait > 1e-7:
                self.due_at = now + wait + 1e-7
                heap.at(self.due_at, self._recheck, self.due_at)
                return
            self.next_index += 1
            self.in_flight += 1
            self.server.receive(prompt, self)

    def _recheck(self, due_at: float) -> None:
        if due_at == self.due_at:
            self._send_all()

    def on_headers(self, *_: Any) -> None: ...

    def on_refusal(self, *_: Any) -> None:
        raise AssertionError("the oracle knows the level")

    def on_answer(self, *_: Any) -> None:
        self.in_flight -= 1
        self._send_all()
