"""Generates answers in real time and delivers them, with the faults of generation and transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from nbcodex.runtime.clock import Clock
from nbcodex.simulator.admission import PlannedRequest, error_object
from nbcodex.simulator.api_formats import ResponsesFormat, StreamEvent, format_answer
from nbcodex.simulator.http_messages import ErrorResponse, encode_json
from nbcodex.simulator.knobs import GENERATION_FAULTS, Dropped, Fault

ENDLESS_STALL_S = 30 * 86_400.0  # longer than any client waits
MIN_TIMER_S = 0.001  # shorter waits only yield to the event loop, because a timer is less precise
HUGE_LINE_BYTES = 10_000_000


async def wait_until(moment: float, clock: Clock) -> None:
    """Wait until `moment` on the clock; yield to other tasks in any case."""
    if moment - clock.now() > MIN_TIMER_S:
        await clock.wait(moment)
    else:
        await asyncio.sleep(0)


async def generate(planned: PlannedRequest, clock: Clock) -> AsyncGenerator[StreamEvent, None]:
    """Yield the events of an answer at their times, and settle the charge at the end."""
    # `record` is the request's entry in the log of the simulator.
    api_format, record = format_answer(planned), planned.record
    fault = planned.fault if planned.fault and planned.fault.kind in GENERATION_FAULTS else None
    deltas = 0
    try:
        for event in api_format.stream_events():
            await wait_until(planned.time_of_token(event.tokens_so_far), clock)
            if fault is not None and fault.applies_before(event.role, deltas):
                for error in api_format.error_events(fault):
                    yield error
                return
            record.output_tokens = event.tokens_so_far
            deltas += event.role == "delta"
            if event.role == "end" and not record.finished:
                # Before the final event: a client that has read it can use what is given back.
                record.finished = True
                planned.settle_charge(clock.now())
            yield event
    finally:
        planned.settle_charge(clock.now())


async def deliver(
    events: AsyncGenerator[StreamEvent, None], fault: Fault | None, clock: Clock
) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of `events`; a fault of delivery ends them, or raises `Dropped`."""
    deltas = 0
    async with aclosing(events):
        async for event in events:
            if fault is not None and fault.applies_before(event.role, deltas):
                match fault.kind:
                    case "truncated":
                        return
                    case "dropped":
                        raise Dropped(reset=True)
                    case "cut":
                        raise Dropped(partial=event.data[: len(event.data) // 2])
                    case "malformed":
                        yield b'data: {"type": "response.output_text.delta", "delta": "unfin\n\n'
                    case "stalled":
                        await _stall(fault, clock)
                    case "huge_line":
                        yield b'data: {"type": "response.output_text.delta", "choices": [], '
                        yield b'"delta": "%s"}\n\n' % (b"x" * HUGE_LINE_BYTES)
                fault = None
            deltas += event.role == "delta"
            yield event.data


async def _stall(fault: Fault, clock: Clock) -> None:
    """Send nothing for `fault.seconds`; after a stall without an end, drop the connection."""
    stall_s = ENDLESS_STALL_S if fault.seconds is None else fault.seconds
    await clock.wait(clock.now() + stall_s)
    if fault.seconds is None:
        raise Dropped


async def generate_unstreamed(planned: PlannedRequest, clock: Clock) -> bytes:
    """Return an answer that is not streamed, or raise the exception that the fault prescribes."""
    fault, output = planned.fault, planned.plan.output_tokens
    try:
        match fault:
            case Fault(kind="stalled"):
                await _stall(fault, clock)
            case Fault(kind="dropped" | "cut" | "truncated" as kind):
                raise Dropped(reset=kind == "dropped")
            case Fault(kind=kind) if kind in GENERATION_FAULTS:
                error = error_object(fault, planned)
                raise ErrorResponse(
                    fault.status, error["message"] or "", type=error["type"], code=error["code"]
                )
        await wait_until(planned.time_of_token(output), clock)
        planned.record.output_tokens, planned.record.finished = output, True
    finally:
        planned.settle_charge(clock.now())
    data = encode_json(format_answer(planned).as_object())
    return data[: len(data) // 2] if fault and fault.kind == "malformed" else data


_UNFINISHED = ("queued", "in_progress")


@dataclass(slots=True)
class BackgroundResponse:
    """A background response, which is generated to its end even if no client reads it."""

    planned: PlannedRequest
    clock: Clock
    events: list[StreamEvent] = field(default_factory=list)
    status: str = "queued"
    _task: asyncio.Task[None] = field(init=False)
    # Set at each change, which wakes all readers, and replaced by one that is not set.
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._generate())

    def cancel(self) -> None:
        """End the generation if it is still running."""
        if self.status in _UNFINISHED:
            self._task.cancel()
            self._change_status("cancelled")

    def response_object(self) -> dict[str, Any]:
        """Return the current response object."""
        response = ResponsesFormat(self.planned)
        if self.status in ("completed", "incomplete"):
            return response.as_object()
        fault = self.planned.fault if self.status == "failed" else None
        return response.without_output(self.status, fault)

    async def follow(self, after: int = -1) -> AsyncGenerator[StreamEvent, None]:
        """Yield the events with a sequence number above `after`, as they are generated."""
        index = max(0, after + 1)  # the sequence numbers are the indexes
        while True:
            while index < len(self.events):
                yield self.events[index]
                index += 1
            if self.status not in _UNFINISHED:
                return
            await self._changed.wait()

    async def _generate(self) -> None:
        async with aclosing(generate(self.planned, self.clock)) as events:
            async for event in events:
                self.events.append(event)
                self._change_status("in_progress")
        final = "incomplete" if self.planned.plan.is_truncated else "completed"
        self._change_status(final if self.planned.record.finished else "failed")

    def _change_status(self, status: str) -> None:
        self.status = status
        self._changed.set()
        self._changed = asyncio.Event()
