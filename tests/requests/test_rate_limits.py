"""Many requests at a limit, in virtual time: it is used fully, and hardly ever refuses one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest

from nbcodex.errors import LimitError, TooLargeError, TransportError
from nbcodex.events import BackingOff, CoolingDown, Event, Failed, Finished, Parked, Sent
from nbcodex.models import Limit, LimitReading, LimitSnapshot, Reply, Request, Resumption
from nbcodex.notebook.display.panel import PanelState, apply_event, status_line
from nbcodex.openai_api.answers import ResponseStarted, TextDelta
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.ratelimit.charge_policy import Need, Permit
from nbcodex.ratelimit.limit_model import Refusal
from nbcodex.ratelimit.limiter import Limiter
from nbcodex.ratelimit.rate_limiter import RateLimiter
from nbcodex.requests.runner import RequestRunner, Services
from nbcodex.settings import Secret, Settings
from nbcodex.simulator import Knobs, Simulator
from tests.scripted import STARTED, USAGE, InstantJournal, ScriptedServices, answer, ending
from tests.simulator_transport import SimulatorTransport
from tests.virtual import LoopClock, run_virtual

pytestmark = pytest.mark.slow

SETTINGS = Settings(
    api_key=Secret("sk-test-0123456789abcdef"),
    base_url="https://simulated.test/v1",
    model="gpt-5.6-sol",
)
TPM = Limit(resource="tokens", window=60.0, limit=30_000, used=22_999, requested=12_528)


@dataclass
class Crowd:
    """Requests that were sent at once, and their events."""

    simulator: Simulator
    events: dict[int, list[Event]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def refused(self) -> int:
        return sum(seen.status == 429 for seen in self.simulator.log)

    def replies(self) -> list[Reply]:
        return [ending(received).reply for received in self.events.values()]

    def count(self, kind: type[Event]) -> int:
        return sum(isinstance(e, kind) for received in self.events.values() for e in received)


def services_on(simulator: Simulator) -> Services:
    limiter, journal = Limiter(), InstantJournal()
    return Services(
        api_client=ApiClient(clock=LoopClock(), transport=SimulatorTransport(simulator)),
        journal=lambda _: journal,  # type: ignore[arg-type,return-value]
        spending_journal=lambda _: journal,  # type: ignore[arg-type,return-value]
        limiter=lambda _: limiter,
        clock=LoopClock(),
    )


@cache
def crowd(count: int, *, patience: float = 600.0, **knobs: Any) -> Crowd:
    """Run `count` requests at once, through services and API client."""

    async def main() -> Crowd:
        clock = LoopClock()
        simulator = Simulator(Knobs(**knobs), clock=clock)
        services = services_on(simulator)
        # The SDK's first request runs a thread, in which virtual time would jump.
        await (
            RequestRunner(services, Request(prompt="hi", max_output=16), SETTINGS, lambda _: None)
            .start()
            .task
        )
        simulator.log.clear()
        result, began, runs = Crowd(simulator), clock.now(), []
        for number in range(count):
            received = result.events.setdefault(number, [])
            asked = Request(
                prompt=f"{number} [[tokens=100]] " + "x" * 800, max_output=200, patience=patience
            )
            runs.append(RequestRunner(services, asked, SETTINGS, received.append).start())
        await asyncio.wait([run.task for run in runs])
        result.seconds = clock.now() - began
        return result

    return run_virtual(main())


@pytest.mark.parametrize("policy", ["kept", "refunded", "actual"])
def test_200_requests_use_the_limit_with_hardly_a_429(policy: Any) -> None:
    result = crowd(200, policy=policy, tpm=20_000, rpm=10_000, latency=0.5, speed=60.0)
    assert all(reply.status == "done" for reply in result.replies())
    assert result.refused <= 2
    charged = sum(seen.charged for seen in result.simulator.log)
    assert result.seconds <= 1.1 * (charged - 20_000) / (20_000 / 60) + 10


def test_queueing_for_capacity_uses_no_patience() -> None:
    result = crowd(100, patience=5.0, tpm=20_000, rpm=10_000, latency=0.5, speed=60.0)
    assert result.seconds > 60.0
    assert {reply.status for reply in result.replies()} == {"done"}
    assert {reply.attempts for reply in result.replies()} == {1}
    assert {reply.waited for reply in result.replies()} == {0.0}


@pytest.mark.parametrize(
    ("count", "knobs"),
    [(100, {"tpm": 20_000, "rpm": 10_000}), (40, {"tpm": 10_000, "rpm": 20, "policy": "kept"})],
)
def test_queue_waits_and_answer_add_up_to_the_time_of_a_request(
    count: int, knobs: dict[str, Any]
) -> None:
    asked = crowd(count, latency=0.5, speed=60.0, **knobs)
    assert max(reply.queued for reply in asked.replies()) > 30.0
    assert max(reply.seconds for reply in asked.replies()) < 30.0
    for received in asked.events.values():
        reply = ending(received).reply
        took = received[-1].at - received[0].at
        assert reply.waited + reply.queued + reply.seconds == pytest.approx(took, abs=0.1)


def test_queueing_for_more_than_a_second_is_reported_rarely() -> None:
    result = crowd(100, patience=5.0, tpm=20_000, rpm=10_000, latency=0.5, speed=60.0)
    for received in result.events.values():
        queued = [e for e in received if isinstance(e, CoolingDown)]
        sent = next(e for e in received if isinstance(e, Sent))
        assert all(e.queued and e.limit and e.limit.resource == "tokens" for e in queued)
        assert queued or sent.at - received[0].at <= 1.0
        assert len(queued) <= 4


def test_spacing_of_milliseconds_is_not_reported() -> None:
    result = crowd(100, tpm=10_000_000, rpm=100_000, latency=0.1, speed=600.0)
    assert result.count(CoolingDown) == result.refused == 0


def run_request(*attempts: Any, requests: list[Request], every: float = 1.0) -> list[list[Event]]:
    """Run requests through these attempts, one after the other; return the events of each."""

    async def main() -> list[list[Event]]:
        scripted = ScriptedServices(*attempts)
        runs = []
        for request in requests:
            runs.append(scripted.start(request))
            await asyncio.sleep(every)
        await asyncio.wait([run.task for run in runs])
        return list(scripted.events.values())

    return run_virtual(main())


def test_parked_large_request_leaves_the_model_open_to_smaller_ones() -> None:
    refusal = LimitError("Rate limit reached.", limit=TPM, wait=300.0)
    large, small = run_request(
        [refusal],
        answer("small"),
        requests=[Request(prompt="x", max_output=12_500, patience=60.0), Request(prompt="y")],
    )
    assert isinstance(ending(large), Parked)
    assert isinstance(ending(small), Finished)
    assert ending(small).at - small[0].at < 1.0


def test_request_larger_than_known_limit_fails_without_sending() -> None:
    reported = LimitSnapshot(at=0.0, tokens=LimitReading(limit=1_000, remaining=900, full_in=6.0))
    opened = ResponseStarted(
        api="responses", model="m-1", snapshot=reported, simulated=False, request_id=None
    )
    first, large = run_request(
        [opened, *list(answer("hi"))[1:]],
        requests=[Request(prompt="x", max_output=16), Request(prompt="word " * 4_000)],
    )
    assert isinstance(ending(first), Finished)
    assert isinstance(ending(large), Failed)
    assert isinstance(ending(large).error, TooLargeError)
    assert not [e for e in large if isinstance(e, Sent)]


def large_after_small(**knobs: Any) -> tuple[list[Event], Simulator]:
    """Return the events of a request whose `max_output` exceeds the known limit."""

    async def main() -> tuple[list[Event], Simulator]:
        simulator = Simulator(Knobs(tpm=20_000, latency=0.5, **knobs), clock=LoopClock())
        services = services_on(simulator)
        small = Request(prompt="hi [[tokens=1000]]", max_output=10_000)
        large = Request(prompt="hi [[tokens=100]]", max_output=21_000, patience=60.0)
        received: list[Event] = []
        for request in (small, large):
            received.clear()
            runner = RequestRunner(services, request, SETTINGS, received.append).start()
            await asyncio.wait([runner.task])
        return received, simulator

    return run_virtual(main())


@pytest.mark.parametrize("policy", ["kept", "refunded"])
def test_max_output_above_the_limit_is_refused_at_once_with_the_limit(policy: Any) -> None:
    received, _ = large_after_small(policy=policy)
    end = ending(received)
    assert isinstance(end.error, TooLargeError)
    assert "20,000 tokens per minute" in str(end.error)
    assert "max-output" in end.error.advice
    assert end.at - received[0].at < 2.0


def test_max_output_above_the_limit_is_answered_where_only_the_use_is_charged() -> None:
    received, _ = large_after_small(policy="actual")
    assert isinstance(ending(received), Finished)


def test_refused_request_precedes_later_ones() -> None:
    refusal = LimitError("Rate limit reached.", limit=TPM, wait=30.0)
    first, second, third = run_request(
        [refusal],
        *[answer(word) for word in "abc"],
        requests=[Request(prompt=word) for word in "123"],
    )
    sent = [
        [e.at for e in received if isinstance(e, Sent)][-1] for received in (first, second, third)
    ]
    assert sent == sorted(sent)


@pytest.mark.parametrize(("resumption", "kind"), [(Resumption(), Finished), (None, Parked)])
def test_resumed_request_probes_cooldown_of_another_kernel_once(resumption: Any, kind: Any) -> None:
    async def main() -> list[Event]:
        scripted = ScriptedServices(answer("hi"))
        store = (await scripted.limiter.run_operation(lambda core: core)).store
        name, now = "m", asyncio.get_running_loop().time()
        other = RateLimiter(store, process_id="another kernel")
        sent = other.try_acquire(other.enqueue(name, Need(1, 1), lambda: None), now)
        assert isinstance(sent, Permit)
        day = Limit(resource="requests", window=86_400.0, limit=200, used=200, requested=1)
        other.refuse(sent, Refusal(now + 7200.0, day), now)
        received: list[Event] = []
        request = Request(prompt="x", model=name)
        run = RequestRunner(
            scripted.services, request, SETTINGS, received.append, resumption=resumption
        ).start()
        await asyncio.wait([run.task])
        return received

    assert isinstance(ending(run_virtual(main())), kind)


def test_accepted_probe_reopens_the_model() -> None:
    async def main() -> list[list[Event]]:
        refusal = LimitError("Rate limit reached.", limit=TPM, wait=300.0)
        scripted = ScriptedServices([refusal], answer("a"), answer("b"))
        runs = [scripted.start(Request(prompt="1"))]
        await asyncio.sleep(1)
        runs.append(scripted.start(Request(prompt="2")))
        await asyncio.sleep(1)
        runs[0].retry_now()
        await asyncio.wait([run.task for run in runs])
        return list(scripted.events.values())

    first, second = run_virtual(main())
    assert ending(second).at - ending(first).at < 1.0


@pytest.mark.parametrize(
    ("attempt", "order", "ended"),
    [
        (answer("hi"), None, 1),
        ([STARTED, TextDelta("partial"), 9.0], "stop", 1),
        ([STARTED, 9.0], "stop", 0),
        ([9.0], "cancel", 0),
        ([STARTED, TextDelta("par"), TransportError("cut")], "park", 0),
        ([LimitError("Rate limit reached.", limit=TPM, wait=30.0)], "park", 0),
    ],
    ids=["answered", "stopped", "stopped before text", "cancelled", "broken", "refused"],
)
def test_every_ending_closes_its_reservation_once(attempt: Any, order: Any, ended: int) -> None:
    async def main() -> tuple[int, int, int]:
        scripted = ScriptedServices(attempt)
        await scripted.run(Request(prompt="x", model="m"), *([(1.0, order)] if order else []))
        (shared,) = (await scripted.limiter.run_operation(lambda core: core.store))._models.values()
        output = shared.model.output
        return output.in_flight, shared.model.awaiting_response, output.ended_answers

    assert run_virtual(main()) == (0, 0, ended)


def test_permit_granted_to_a_stopped_request_is_released() -> None:
    class Slow(Limiter):
        async def run_operation(self, operation: Any) -> Any:
            result = operation(self._core)
            await asyncio.sleep(1.0)
            return result

    async def main() -> tuple[int, int]:
        scripted = ScriptedServices(answer("hi"))
        scripted.limiter = Slow()
        await scripted.run(Request(prompt="x", model="m"), (0.5, "stop"))
        (shared,) = scripted.limiter._core.store._models.values()  # type: ignore[attr-defined]
        assert scripted.api_client.seen == []
        return shared.model.output.in_flight, shared.model.permit_count

    assert run_virtual(main()) == (0, 1)


def test_panel_says_queued_for_capacity() -> None:
    result = crowd(40, tpm=10_000, rpm=10_000, latency=0.5, speed=60.0)
    received = result.events[39]
    number = next(i for i, e in enumerate(received) if isinstance(e, CoolingDown))
    state = PanelState()
    for event in received[: number + 1]:
        state = apply_event(state, event)
    line = status_line(state, state.phase_started_at + 3.0, 1e9)
    assert line.startswith("queued for capacity 3.0 s")
    assert line.endswith(" · tokens per minute (TPM)")
    assert not state.is_waiting
    assert state.total_waited(state.phase_started_at + 3.0) == 0.0
    assert BackingOff not in {type(e) for e in received}


def test_reservation_settles_with_the_servers_usage() -> None:
    received = run_request(answer("hi"), requests=[Request(prompt="x")])[0]
    assert ending(received).reply.usage == USAGE
