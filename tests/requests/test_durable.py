"""Durable answers in virtual time, against the simulator: complete, and paid once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import accumulate
from typing import Any

import pytest

from nbcodex.errors import TransportError
from nbcodex.events import BackingOff, Delta, EndAction, Event, Finished, Restarted, Sent
from nbcodex.models import (
    NOTE_POSSIBLY_PAID,
    NOTE_POSSIBLY_PAID_TWICE,
    Reply,
    Request,
    Resumption,
    StreamPosition,
)
from nbcodex.notebook.display.panel import PanelState, apply_event
from nbcodex.openai_api.answers import ResponseStarted, TextDelta
from nbcodex.openai_api.api_client import NOT_DURABLE_NOTICE, ApiClient
from nbcodex.ratelimit.charge_policy import Need
from nbcodex.ratelimit.limit_model import Refusal
from nbcodex.ratelimit.limiter import Limiter
from nbcodex.ratelimit.rate_limiter import RateLimiter
from nbcodex.requests.process_resources import SessionTotals
from nbcodex.requests.runner import NOTE_SENT_AGAIN, RequestRunner, Services
from nbcodex.settings import Secret, Settings
from nbcodex.simulator import Fault, Knobs, Simulator
from tests.scripted import STARTED, InstantJournal, ScriptedServices, answer, ending
from tests.simulator_transport import SimulatorTransport
from tests.virtual import LoopClock, run_virtual

WORDS = " ".join(f"word{n}" for n in range(40))
SETTINGS = Settings(
    api_key=Secret("sk-test-0123456789abcdef"),
    base_url="https://simulated.test/v1",
    model="gpt-5.6-sol",
)


def request(**options: Any) -> Request:
    return Request(**{"prompt": f"[[echo: {WORDS}]]", "durable": True, **options})


class OneEntryJournal(InstantJournal):
    """A journal of one entry, with what another kernel would read after a crash."""

    def __init__(self) -> None:
        super().__init__()
        self.response_id: str | None = None
        self.sequence: int | None = None
        self.text = ""

    async def start_attempt(self, id_: str, attempt: int, *, continues: bool = False) -> None:
        await super().start_attempt(id_, attempt)
        if not continues:
            self.response_id = self.sequence = None

    async def set_response_id(self, id_: str, response_id: str) -> None:
        await super().set_response_id(id_, response_id)
        self.response_id = response_id

    async def update_text(self, id_: str, text: str, *, sequence: int | None = None) -> None:
        await super().update_text(id_, text)
        self.text = text
        self.sequence = self.sequence if sequence is None else sequence

    async def finish(self, reply: Reply, **why: Any) -> None:
        await super().finish(reply)
        self.text = reply.text

    @property
    def resumption(self) -> Resumption:
        """Return how another kernel would resume the request, as `nbcodex.client` does."""
        position = StreamPosition(self.response_id, self.sequence) if self.response_id else None
        return Resumption(position=position, text="" if self.sequence is None else self.text)


class Kernel:
    """The services of one kernel on a simulator; a second kernel may share its journal."""

    def __init__(self, simulator: Simulator, journal: OneEntryJournal | None = None) -> None:
        self.simulator, self.journal = simulator, journal or OneEntryJournal()
        self.events: list[Event] = []
        self.limiter = Limiter()
        self.services = Services(
            api_client=ApiClient(clock=LoopClock(), transport=SimulatorTransport(simulator)),
            journal=lambda _: self.journal,  # type: ignore[arg-type,return-value]
            spending_journal=lambda _: self.journal,  # type: ignore[arg-type,return-value]
            limiter=lambda _: self.limiter,
            clock=LoopClock(),
        )

    def start(self, asked: Request, **options: Any) -> RequestRunner:
        return RequestRunner(self.services, asked, SETTINGS, self.events.append, **options).start()

    async def run(self, asked: Request, *actions: tuple[float, EndAction], **options: Any) -> Reply:
        run = self.start(asked, **options)
        for after, what in actions:
            asyncio.get_running_loop().call_later(after, run.end, what)
        await asyncio.wait([run.task])
        reply: Reply = ending(self.events).reply
        return reply

    @property
    def shown(self) -> str:
        """The text that a listener has after the last event."""
        text = ""
        for event in self.events:
            if isinstance(event, Restarted):
                text = ""
            elif isinstance(event, Delta) and not event.reasoning:
                text += event.text
        return text

    def count(self, kind: type[Event]) -> int:
        return len([event for event in self.events if isinstance(event, kind)])


def run_request(operation: Callable[[Kernel], Awaitable[None]], *faults: Any, **knobs: Any) -> None:
    """Run `operation` with a kernel whose simulator has these faults in its script."""

    async def main() -> None:
        simulator = Simulator(Knobs(**knobs), clock=LoopClock())
        simulator.script(faults)
        await operation(Kernel(simulator))

    run_virtual(main())


def paid_answers(simulator: Simulator) -> int:
    """Return how many answers were requested, and so paid."""
    return len([seen for seen in simulator.log if seen.charged])


@pytest.mark.parametrize("kind", ["dropped", "cut", "truncated", "malformed", "stalled"])
@pytest.mark.parametrize("after", [0, 1, 20])
def test_broken_durable_stream_continues_where_it_stopped(kind: Any, after: int) -> None:
    """No text is replaced or doubled, and one answer is paid."""

    async def operation(kernel: Kernel) -> None:
        reply = await kernel.run(request())
        assert reply.status == "done"
        assert reply.text == kernel.shown
        assert WORDS in reply.text
        assert kernel.count(Restarted) == 0
        assert reply.attempts == kernel.count(Sent) == 2
        assert paid_answers(kernel.simulator) == 1
        assert reply.usage.output_tokens == kernel.simulator.log[0].output_tokens
        assert not reply.usage.estimated
        assert reply.notes == ()

    run_request(operation, Fault(kind, after=after))


def test_continued_answer_is_not_shown_as_stale() -> None:
    """During the wait the panel's text may still be replaced; when more of it arrives, it stays."""

    async def operation(kernel: Kernel) -> None:
        await kernel.run(request())
        states = list(accumulate(kernel.events, apply_event, initial=PanelState()))
        waited = [state.phase for state in states].index("waiting")
        assert states[waited].stale
        assert not states[-2].stale

    run_request(operation, Fault("dropped", after=5))


def test_broken_stream_without_durable_pays_twice() -> None:
    async def operation(kernel: Kernel) -> None:
        reply = await kernel.run(request(durable=False))
        assert reply.status == "done"
        assert (paid_answers(kernel.simulator), kernel.count(Restarted)) == (2, 1)
        assert reply.notes == ()

    run_request(operation, Fault("dropped", after=5))


def test_response_id_is_committed_before_any_text_is_shown() -> None:
    async def operation(kernel: Kernel) -> None:
        names: list[str] = []
        written = kernel.journal.written

        def listen(event: Event) -> None:
            if isinstance(event, Delta):
                names.extend(name for verb, name in written if verb == "set_response_id")

        await asyncio.wait(
            [RequestRunner(kernel.services, request(), SETTINGS, listen).start().task]
        )
        assert names
        assert set(names) == {kernel.simulator.log[0].response_id}

    run_request(operation)


@pytest.mark.parametrize("at", [0.05, 0.6, 1.0, 1.5, 2.4, 3.0, 3.3, 30.0])
@pytest.mark.parametrize("chunk", [1, 7])
def test_other_kernel_continues_from_the_journal(at: float, chunk: int) -> None:
    async def operation(first: Kernel) -> None:
        run = first.start(question := request())
        await asyncio.sleep(at)
        run.task.cancel()  # as when its process dies: no ending, no last write to the journal
        await asyncio.wait([run.task])
        has_response_id = first.journal.response_id is not None
        if any(verb == "finish" for verb, _ in first.journal.written):
            return
        second = Kernel(first.simulator, first.journal)
        reply = await second.run(question, resumption=first.journal.resumption)
        assert reply.status == "done"
        assert reply.text == second.shown
        assert reply.text.count(WORDS) == 1
        assert second.count(Restarted) == 0
        assert paid_answers(first.simulator) == (1 if has_response_id else 2)

    run_request(operation, latency=0.5, speed=60.0, chunk=chunk)


def test_answer_finished_meanwhile_is_fetched_at_once() -> None:
    async def operation(first: Kernel) -> None:
        run = first.start(question := request())
        await asyncio.sleep(1.5)
        run.task.cancel()
        await asyncio.sleep(3600)
        second = Kernel(first.simulator, first.journal)
        known = first.journal.text
        began = asyncio.get_running_loop().time()
        reply = await second.run(question, resumption=first.journal.resumption)
        assert reply.text.count(WORDS) == 1
        assert asyncio.get_running_loop().time() - began < 0.1
        assert next(event.text for event in second.events if isinstance(event, Delta)) == known
        assert 0 < len(known) < len(WORDS)
        assert "starting_after=" in first.simulator.log[-1].path
        assert paid_answers(first.simulator) == 1

    run_request(operation)


@pytest.mark.parametrize("order", ["stop", "park"])
def test_stopped_or_parked_answer_continues_at_the_server(order: Any) -> None:
    """It can be resumed, is paid once, and is counted once."""

    async def operation(first: Kernel) -> None:
        question = request()
        totals = SessionTotals()
        stopped = await first.run(question, (1.5, order))
        assert 0 < len(stopped.text) < len(WORDS)
        assert stopped.usage.total_tokens is None
        second = Kernel(first.simulator, first.journal)
        reply = await second.run(question, resumption=first.journal.resumption)
        assert reply.text.count(WORDS) == 1
        assert second.shown == reply.text
        assert paid_answers(first.simulator) == 1
        for event in [*first.events, *second.events]:
            totals(event)
        counted = sum(total.usage.output_tokens for total in totals.by_model.values())
        assert counted == first.simulator.log[0].output_tokens

    run_request(operation)


def test_cancel_ends_the_answer_at_the_server() -> None:
    """Its usage is then an estimate."""

    async def operation(kernel: Kernel) -> None:
        reply = await kernel.run(request(), (1.5, "cancel"))
        assert reply.status == "cancelled"
        assert reply.usage.estimated
        await asyncio.sleep(60)
        assert kernel.simulator.log[-1].path.endswith("/cancel")
        assert not kernel.simulator.log[0].finished

    run_request(operation)


def test_cancel_ends_without_waiting_for_the_server() -> None:
    async def operation(kernel: Kernel) -> None:
        async def answer_late(*_: Any, **__: Any) -> None:
            await asyncio.sleep(5)

        kernel.services.api_client.cancel_response = answer_late  # type: ignore[method-assign]
        began = asyncio.get_running_loop().time()
        await kernel.run(request(), (1.5, "cancel"))
        assert kernel.events[-1].at - began == pytest.approx(1.5, abs=0.01)

    run_request(operation)


def test_lost_answer_is_sent_again_and_noted() -> None:
    """The new text replaces the old."""

    async def operation(kernel: Kernel) -> None:
        run = kernel.start(request())
        await asyncio.sleep(1.5)
        kernel.simulator._stored.clear()
        await asyncio.wait([run.task])
        reply = ending(kernel.events).reply
        assert reply.status == "done"
        assert kernel.shown == reply.text
        assert reply.text.count(WORDS) == 1
        assert kernel.count(Restarted) == 1
        assert reply.notes == (NOTE_SENT_AGAIN,)
        assert paid_answers(kernel.simulator) == 2

    run_request(operation, Fault("dropped", after=30))


@pytest.mark.parametrize("kind", ["error_event", "flat_error_event", "failed", "azure_failed"])
def test_failed_generation_is_sent_again_after_its_wait(kind: Any) -> None:
    async def operation(kernel: Kernel) -> None:
        reply = await kernel.run(request())
        assert reply.status == "done"
        assert kernel.shown == reply.text
        assert reply.text.count(WORDS) == 1
        assert kernel.count(BackingOff) == 1
        assert reply.notes == (NOTE_SENT_AGAIN,)

    run_request(operation, Fault(kind, after=5, seconds=1.0))


def test_limit_on_durable_request_closes_and_reopens_the_model() -> None:
    async def operation(kernel: Kernel) -> None:
        reply = await kernel.run(request())
        assert reply.status == "done"
        assert reply.waited >= 7.0
        assert reply.notes == ()

    run_request(operation, Fault("tokens_per_minute", seconds=7.0))


def test_limit_on_continuing_leaves_the_model_open_to_others() -> None:
    async def operation(kernel: Kernel) -> None:
        run = kernel.start(request())
        other = Kernel(kernel.simulator)
        other.services = kernel.services
        await asyncio.sleep(10.0)
        began = asyncio.get_running_loop().time()
        await other.run(request(prompt="hello", durable=False))
        assert asyncio.get_running_loop().time() - began < 10.0
        await asyncio.wait([run.task])
        reply = ending(kernel.events).reply
        assert reply.status == "done"
        assert reply.waited >= 30.0
        assert kernel.count(Restarted) == 0
        assert paid_answers(kernel.simulator) == 2

    run_request(
        operation, Fault("dropped", after=5), Fault("requests_per_minute", seconds=30.0), None
    )


def test_continuing_does_not_wait_for_a_cooldown() -> None:
    async def operation(kernel: Kernel) -> None:
        run = kernel.start(request())
        await asyncio.sleep(0.7)
        closed = asyncio.get_running_loop().time() + 300.0

        def close(limiter: RateLimiter) -> None:
            now = closed - 300.0
            (name,) = limiter.limit_states(now)
            sent = limiter.probe(limiter.enqueue(name, Need(1, 1), lambda: None), now)
            sent.is_probe = False
            limiter.refuse(sent, Refusal(closed), now)

        kernel.limiter.post(close)
        await asyncio.wait([run.task])
        assert isinstance(kernel.events[-1], Finished)
        assert kernel.events[-1].at < closed

    run_request(operation, Fault("dropped", after=20))


def test_server_outage_does_not_lose_the_answer() -> None:
    async def operation(kernel: Kernel) -> None:
        reply = await kernel.run(request())
        assert reply.text.count(WORDS) == 1
        assert (paid_answers(kernel.simulator), kernel.count(Restarted)) == (1, 0)

    down = [Fault("http", status=503), Fault("http", status=500), Fault("html_502"), "refused"]
    run_request(operation, Fault("dropped", after=5), *down)


def test_break_before_the_response_id_is_noted_as_possibly_paid_twice() -> None:
    async def operation(kernel: Kernel) -> None:
        reply = await kernel.run(request())
        assert reply.status == "done"
        assert reply.notes == (NOTE_POSSIBLY_PAID_TWICE,)

    run_request(operation, Fault("dropped", after=-1))


@pytest.mark.parametrize(("after", "notes"), [(0.2, (NOTE_POSSIBLY_PAID,)), (1.5, ())])
def test_stop_before_the_response_id_is_noted_as_possibly_paid(
    after: float, notes: tuple[str, ...]
) -> None:
    async def operation(kernel: Kernel) -> None:
        stopped = await kernel.run(request(), (after, "stop"))
        assert stopped.notes == notes

    run_request(operation)


def test_resumed_reply_keeps_the_note_of_possible_double_payment() -> None:
    async def operation(kernel: Kernel) -> None:
        resumption = Resumption(notes=(NOTE_POSSIBLY_PAID_TWICE,))
        assert (await kernel.run(request(), resumption=resumption)).notes == (
            NOTE_POSSIBLY_PAID_TWICE,
        )

    run_request(operation)


def test_no_note_when_nothing_was_sent() -> None:
    """A refusal costs nothing, nor does a server that cannot be reached."""
    unsent = TransportError("refused")
    unsent.is_unbilled = True

    async def main() -> tuple[str, ...]:
        scripted = ScriptedServices([unsent], answer("hi"))
        received = await scripted.run(Request(prompt="x", durable=True))
        notes: tuple[str, ...] = ending(received).reply.notes
        return notes

    assert run_virtual(main()) == ()


def test_server_without_durable_answers_is_noted_once() -> None:
    async def operation(kernel: Kernel) -> None:
        first = await kernel.run(request())
        kernel.events.clear()
        second = await kernel.run(request())
        assert (first.status, second.status) == ("done", "done")
        assert (first.notes, second.notes) == ((NOT_DURABLE_NOTICE,), ())

    run_request(operation, apis=("chat",))


def test_position_of_new_attempt_does_not_apply_to_old_text() -> None:
    """While old text is shown, the position of the new answer is its beginning."""

    async def main() -> None:
        opened: list[Any] = [
            STARTED,
            StreamPosition("resp_1"),
            TextDelta("old"),
            StreamPosition("resp_1", 3),
        ]
        scripted = ScriptedServices([*opened, 100.0])
        journal = OneEntryJournal()
        scripted.services.journal = lambda _: journal  # type: ignore[assignment,return-value]
        asked = Request(prompt="x", durable=True)
        scripted.services.api_client = LosingApiClient(scripted)  # type: ignore[assignment]
        scripted.api_client.attempts = [
            [*opened, TransportError("cut")],
            [STARTED, StreamPosition("resp_2", 0), 100.0],
        ]
        run = scripted.start(asked)
        await asyncio.sleep(10)
        run.end("stop")
        await asyncio.wait([run.task])
        assert journal.resumption == Resumption(position=StreamPosition("resp_2"), text="")

    run_virtual(main())


class LosingApiClient:
    """An API client that has lost every durable answer."""

    def __init__(self, scripted: ScriptedServices) -> None:
        self._api_client = scripted.api_client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api_client, name)

    async def resume_stream(self, *_: Any, **__: Any) -> Any:
        from nbcodex.errors import AnswerLostError

        raise AnswerLostError("lost")
        yield ResponseStarted  # an async generator, as the real one


def test_durable_answer_that_cannot_be_streamed_is_fetched() -> None:
    async def operation(kernel: Kernel) -> None:
        reply = await kernel.run(request(patience=600.0))
        assert (reply.status, WORDS in reply.text) == ("done", True)
        assert paid_answers(kernel.simulator) == 1

    run_request(operation, allow_streaming=False)
