"""Generates answers in real time and delivers them, with the faults of generation and transport.

Also holds background responses, which continue without a reader. Does not know routes or limits
of other requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from nbcodex.runtime.clock import Clock
from nbcodex.simulator.buckets import Account, Charge
from nbcodex.simulator.error_responses import ErrorResponse
from nbcodex.simulator.faults import DELIVERY, GENERATION, Dropped, Fault
from nbcodex.simulator.generation import Answer, ApiFormat, StreamEvent, encode_json, error_fields
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.responses_format import ResponsesFormat
from nbcodex.simulator.routes import RequestRecord

# "Silent for ever": longer than any client waits.
STALL_S = 30 * 86_400.0
# Shorter waits only yield to the event loop: a timer would take longer.
MIN_TIMER_S = 0.001
CHUNK_BYTES = 65_536


@dataclass(slots=True, kw_only=True)
class Generation:
    """One answer that is being generated, and its charge.

    Parameters
    ----------
    making, wire
        The answer, and its representation in the requested API.
    account, charge
        The account, and what was charged to it.
    record : RequestRecord
        The request's entry in the log.
    fault : Fault or None
        The fault to apply.
    message : str
        Message of an error event in the stream.
    first_at : float
        Clock time of the first token.
    clock, knobs
        The clock, and a function that returns the current settings.
    """

    answer: Answer
    format: ApiFormat
    account: Account
    charge: Charge
    record: RequestRecord
    fault: Fault | None
    message: str
    first_at: float
    clock: Clock
    knobs: Callable[[], Knobs]
    tokens: int = 0

    def settle_charge(self) -> None:
        """Charge the output that was generated; later calls do nothing."""
        self.account.settle_output(self.charge, self.tokens, self.knobs(), self.clock.now())
        self.record.charged = self.charge.tokens
        self.record.output_tokens = self.tokens

    def fault_among(self, kinds: frozenset[str]) -> Fault | None:
        """Return the fault if it is one of `kinds`, else None."""
        return self.fault if self.fault is not None and self.fault.kind in kinds else None


class ResponseBody:
    """The bytes of a response: iterate over them once, then close.

    Parameters
    ----------
    chunks : async generator of bytes
        The bytes in order.
    on_close : callable
        Called on closing, even if nothing was read.
    """

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], on_close: Callable[[], None] = lambda: None
    ) -> None:
        self._chunks = chunks
        self._on_close = on_close

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks

    async def aclose(self) -> None:
        """Stop: unread text is not generated, except for background responses."""
        await self._chunks.aclose()
        self._on_close()


async def single_chunk(data: bytes) -> AsyncGenerator[bytes, None]:
    """Yield `data`."""
    yield data


async def wait_until(moment: float, clock: Clock) -> None:
    """Wait until `moment` on the clock; yield to other tasks in any case."""
    if moment - clock.now() > MIN_TIMER_S:
        await clock.wait(moment)
    else:
        await asyncio.sleep(0)


async def generate(generation: Generation) -> AsyncGenerator[StreamEvent, None]:
    """Yield the events of an answer at their times, and settle the charge at the end."""
    fault, deltas = generation.fault_among(GENERATION), 0
    try:
        for piece in generation.format.stream_events():
            await wait_until(generation.first_at + piece.at, generation.clock)
            is_delta, is_end = piece.role == "delta", piece.role == "end"
            if fault is not None and fault.strikes(deltas, is_delta=is_delta, is_end=is_end):
                for number, data in enumerate(
                    generation.format.error_events(fault, generation.message, piece.number),
                    start=piece.number,
                ):
                    yield StreamEvent(data, "end", generation.tokens, piece.at, number)
                return
            generation.tokens = piece.tokens
            deltas += is_delta
            if is_end and not generation.record.finished:
                generation.record.finished = True
                generation.settle_charge()
            yield piece
    finally:
        generation.settle_charge()


async def deliver(
    pieces: AsyncGenerator[StreamEvent, None], fault: Fault | None, clock: Clock
) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of `pieces` until `fault` applies.

    Raises
    ------
    Dropped
        If the fault ends the connection.
    """
    deltas = 0
    async with aclosing(pieces):
        async for piece in pieces:
            is_delta, is_end = piece.role == "delta", piece.role == "end"
            if fault is not None and fault.strikes(deltas, is_delta=is_delta, is_end=is_end):
                if fault.kind == "truncated":
                    return
                async for data in _apply_stream_fault(fault, piece, clock):
                    yield data
                fault = None
            deltas += is_delta
            yield piece.data


async def _apply_stream_fault(
    fault: Fault, piece: StreamEvent, clock: Clock
) -> AsyncIterator[bytes]:
    match fault.kind:
        case "dropped":
            raise Dropped(reset=True)
        case "cut":
            raise Dropped(piece.data[: len(piece.data) // 2])
        case "malformed":
            yield b'data: {"type": "response.output_text.delta", "delta": "unfin\n\n'
        case "stalled":
            await stall(fault, clock)
        case "huge_line":
            yield b'data: {"type": "response.output_text.delta", "choices": [], "delta": "'
            for _ in range(fault.size // CHUNK_BYTES):
                yield b"x" * CHUNK_BYTES
            yield b"x" * (fault.size % CHUNK_BYTES) + b'"}\n\n'


async def stall(fault: Fault, clock: Clock) -> None:
    """Send nothing for `fault.seconds`.

    Raises
    ------
    Dropped
        After a stall without an end.
    """
    await clock.wait(clock.now() + (STALL_S if fault.seconds is None else fault.seconds))
    if fault.seconds is None:
        raise Dropped


async def generate_whole(generation: Generation) -> bytes:
    """Generate an answer that is not streamed, and return it.

    Raises
    ------
    Dropped, ErrorResponse
        If the fault ends the connection or makes generation fail.
    """
    output = generation.answer.plan.output_tokens
    try:
        fault = generation.fault_among(DELIVERY | GENERATION)
        if fault is not None:
            await _apply_fault(fault, generation)
        await wait_until(
            generation.first_at + generation.answer.seconds_until(output), generation.clock
        )
        generation.tokens, generation.record.finished = output, True
    finally:
        generation.settle_charge()
    data = encode_json(generation.format.as_object())
    return data[: len(data) // 2] if fault is not None and fault.kind == "malformed" else data


async def _apply_fault(fault: Fault, generation: Generation) -> None:
    """Apply to an unstreamed answer what `fault` does to a stream."""
    match fault.kind:
        case "stalled":
            await stall(fault, generation.clock)
        case "dropped" | "cut" | "truncated":
            raise Dropped(reset=fault.kind == "dropped")
        case kind if kind in GENERATION:
            words = error_fields(fault, generation.message)
            raise ErrorResponse(
                fault.status, words["message"] or "", type=words["type"], code=words["code"]
            )


_UNFINISHED = ("queued", "in_progress")


@dataclass(slots=True)
class BackgroundResponse:
    """A background response, which continues without a reader."""

    generation: Generation  # its generation
    owner: str  # name of the key that may read it
    pieces: list[StreamEvent] = field(default_factory=list)
    status: str = "queued"
    _task: asyncio.Task[None] | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self) -> None:
        """Start generating on the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._generate())

    def cancel(self) -> None:
        """End the generation if it is still running."""
        if self.status in _UNFINISHED and self._task is not None:
            self.status = "cancelled"
            self._task.cancel()
            self._notify()

    def response_object(self) -> dict[str, Any]:
        """Return the current response object."""
        wire = ResponsesFormat(self.generation.answer)
        if self.status in ("completed", "incomplete"):
            return wire.as_object()
        if self.status == "failed" and self.generation.fault is not None:
            return wire.failed_object(self.generation.fault, self.generation.message)
        return wire.unfinished_object(self.status)

    async def follow(self, after: int = -1) -> AsyncGenerator[StreamEvent, None]:
        """Yield the events with a sequence number above `after`, as they come."""
        index = 0
        while True:
            for piece in self.pieces[index:]:
                index += 1
                if piece.number > after:
                    yield piece
            if index == len(self.pieces):
                if self.status not in _UNFINISHED:
                    return
                await self._changed.wait()

    async def _generate(self) -> None:
        async with aclosing(generate(self.generation)) as pieces:
            async for piece in pieces:
                self.status = "in_progress"
                self.pieces.append(piece)
                self._notify()
        plan = self.generation.answer.plan
        finished = "incomplete" if plan.truncated else "completed"
        self.status = finished if self.generation.record.finished else "failed"
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
