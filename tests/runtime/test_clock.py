"""A machine that sleeps, and a wall clock that jumps: neither shortens a wait nor lengthens it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from nbcodex.errors import LimitError, ServerError
from nbcodex.events import BackingOff, CoolingDown, Event, Sent
from nbcodex.models import Limit, Request, Resumption
from nbcodex.notebook.display.panel import PanelState, apply_event
from nbcodex.ratelimit.backoff import STATED_WAIT_PAD_S
from nbcodex.ratelimit.charge_policy import Need, Permit
from nbcodex.ratelimit.limit_model import Refusal
from nbcodex.ratelimit.rate_limiter import RateLimiter
from nbcodex.requests.runner import RequestRunner
from nbcodex.runtime.clock import CLOCK_RECHECK_S, BootClock
from tests.scripted import SETTINGS, ScriptedServices, answer, ending
from tests.virtual import EPOCH, run_virtual

HOUR = 3600.0
WAIT = 30.0  # seconds that the server asks for


@dataclass
class Machine(BootClock):
    """The real clock's way of waiting, on a machine whose sleep and wall clock a test controls.

    The loop's own timers stand still while it sleeps, as asyncio's do.
    """

    slept: float = 0.0
    set_by: float = 0.0

    def now(self) -> float:
        return asyncio.get_running_loop().time() + self.slept

    def wall(self) -> float:
        return EPOCH + self.now() + self.set_by

    def sleep(self, seconds: float) -> None:
        """Let the machine sleep, as a closed laptop does."""
        self.slept += seconds

    def set_wall(self, seconds: float) -> None:
        """Set the wall clock, forwards or back."""
        self.set_by += seconds


ClockChange = Callable[[Machine], None]
JUMPS: dict[str, list[tuple[float, ClockChange]]] = {
    "nothing happens": [],
    "an hour forwards": [(5.0, lambda m: m.set_wall(HOUR))],
    "an hour back": [(5.0, lambda m: m.set_wall(-HOUR))],
    "forwards and back": [
        (5.0, lambda m: m.set_wall(HOUR)),
        (12.0, lambda m: m.set_wall(-HOUR)),
    ],
    "a short sleep": [(5.0, lambda m: m.sleep(10.0))],
    "a sleep and a clock set meanwhile": [
        (5.0, lambda m: m.sleep(10.0)),
        (5.0, lambda m: m.set_wall(-HOUR)),
    ],
    "a sleep that outlasts the wait": [(5.0, lambda m: m.sleep(HOUR))],
}


class Scenario:
    """A runner on such a machine, and the countdown that a panel shows meanwhile."""

    def __init__(self, *attempts: Any) -> None:
        self.machine, self.scripted = Machine(), ScriptedServices(*attempts)
        self.scripted.services.clock = self.machine
        self.readings: list[tuple[float, float]] = []

    async def run(
        self, request: Request, jumps: list[tuple[float, ClockChange]], **options: Any
    ) -> None:
        """Run a request while the clocks jump at the given seconds."""
        state = PanelState()

        def on_event(event: Event) -> None:
            nonlocal state
            self.events.append(event)
            state = apply_event(state, event)

        self.events: list[Event] = []
        run = RequestRunner(self.scripted.services, request, SETTINGS, on_event, **options).start()
        loop = asyncio.get_running_loop()
        for after, operation in jumps:
            loop.call_later(after, operation, self.machine)
        while not run.task.done():
            now = self.machine.now()
            if (left := state.seconds_left(now)) is not None:
                self.readings.append((now, left))
            await asyncio.sleep(0.25)

    def sent(self) -> list[float]:
        return [event.at for event in self.events if isinstance(event, Sent)]

    def slept_through(self, moment: float) -> bool:
        """Whether the machine slept at that moment."""
        awake = [now for now, _ in self.readings]
        return any(a < moment < b and b - a > 1.0 for a, b in itertools.pairwise(awake))

    def check(self, due: float, sent: float) -> None:
        """Check that it was sent when it was due, or a second after waking, as announced."""
        woke = min((now for now, _ in self.readings if now >= due), default=due)
        assert due <= sent <= woke + CLOCK_RECHECK_S
        if not self.slept_through(due):
            assert sent == pytest.approx(due, abs=0.01)
        reported = [now + left for now, left in self.readings if left]
        assert reported == pytest.approx([due] * len(reported))
        assert len(reported) > 10


def run_request(make_scenario: Callable[[], Scenario], *args: Any, **options: Any) -> Scenario:
    async def main() -> Scenario:
        scenario = make_scenario()
        await scenario.run(*args, **options)
        return scenario

    return run_virtual(main())


@pytest.mark.parametrize("jumps", JUMPS.values(), ids=JUMPS)
@pytest.mark.parametrize("kind", ["limit", "fault"])
def test_wait_ends_when_announced_whatever_the_clocks_do(jumps: Any, kind: str) -> None:
    limit = Limit(resource="requests", window=60.0)
    error = LimitError("no", limit=limit) if kind == "limit" else ServerError("no")
    error.wait = WAIT
    scenario = run_request(lambda: Scenario([error], answer("hi")), Request(prompt="x"), jumps)
    (backing_off,) = [event for event in scenario.events if isinstance(event, BackingOff)]
    first, second = scenario.sent()
    assert WAIT <= backing_off.resume_at - first <= WAIT * 1.5 + STATED_WAIT_PAD_S
    scenario.check(backing_off.resume_at, second)


@pytest.mark.parametrize("jumps", JUMPS.values(), ids=JUMPS)
def test_cooldown_of_another_request_ends_when_announced(jumps: Any) -> None:
    def make_scenario() -> Scenario:
        scenario = Scenario(answer("hi"))
        now = scenario.machine.now()

        def refuse(limiter: RateLimiter) -> None:
            permit = limiter.try_acquire(limiter.enqueue("m", Need(10.0, 10.0), lambda: None), now)
            assert isinstance(permit, Permit)
            limit = Limit(resource="tokens")
            limiter.refuse(permit, Refusal(now + WAIT, limit), now)

        scenario.scripted.limiter.post(refuse)
        return scenario

    scenario = run_request(make_scenario, Request(prompt="x"), jumps)
    (cooldown,) = [event for event in scenario.events if isinstance(event, CoolingDown)]
    scenario.check(cooldown.resume_at, scenario.sent()[0])


@pytest.mark.parametrize("jumps", JUMPS.values(), ids=JUMPS)
def test_resume_at_reset_ignores_later_jumps_of_the_wall_clock(jumps: Any) -> None:
    """The reset is an instant of the wall clock; once started, the wait does not follow that."""
    resumption = Resumption(not_before=EPOCH + 5_000.0 + WAIT)
    scenario = run_request(
        lambda: Scenario(answer("hi")), Request(prompt="x"), jumps, resumption=resumption
    )
    scenario.check(5_000.0 + WAIT, scenario.sent()[0])
    assert ending(scenario.events).reply.seconds < 60.0
