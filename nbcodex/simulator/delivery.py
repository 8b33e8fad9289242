"""How an answer gets out: generated in its own time, and brought to the reader.

Owns what goes wrong on the way. Must not know routes, nor who else asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from nbcodex.runtime.clock import Clock
from nbcodex.simulator.buckets import Account, Charge
from nbcodex.simulator.faults import DELIVERY, GENERATION, Dropped, Fault
from nbcodex.simulator.generation import Making, Piece, Wire, encode, told
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.record import Seen
from nbcodex.simulator.refusals import Failure

FOREVER = 30 * 86_400.0
SOON = 0.001
"""Seconds that are not worth a timer."""
BLOCK = 65_536


@dataclass(slots=True, kw_only=True)
class Run:
    """One answer on its way, and what has been charged for it.

    Parameters
    ----------
    making, wire
        The answer, and how its API says it.
    account, charge
        Whose limits it uses, and what it has taken of them.
    seen : Seen
        The record of the request.
    fault : Fault or None
        What shall go wrong.
    message : str
        What an error in the stream says.
    first_at : float
        The instant of the first token.
    clock, knobs
        The time, and the server's knobs at the end of the run.
    """

    making: Making
    wire: Wire
    account: Account
    charge: Charge
    seen: Seen
    fault: Fault | None
    message: str
    first_at: float
    clock: Clock
    knobs: Callable[[], Knobs]
    tokens: int = 0

    def end(self) -> None:
        """Settle what the answer costs; once."""
        self.account.settle(self.charge, self.tokens, self.knobs(), self.clock.now())
        self.seen.charged = self.charge.tokens
        self.seen.output_tokens = self.tokens

    def strikes_in(self, kinds: frozenset[str]) -> Fault | None:
        """Return the fault, if it is one of `kinds`."""
        return self.fault if self.fault is not None and self.fault.kind in kinds else None


class Body:
    """The bytes of an answer, to be read once and then closed.

    Parameters
    ----------
    chunks : async generator of bytes
        The bytes.
    on_close : callable
        Called when it is closed, even if nothing was read.
    """

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], on_close: Callable[[], None] = lambda: None
    ) -> None:
        self._chunks = chunks
        self._on_close = on_close

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks

    async def aclose(self) -> None:
        """Let go of the answer: what was not read is not generated, unless in the background."""
        await self._chunks.aclose()
        self._on_close()


async def once(data: bytes) -> AsyncGenerator[bytes, None]:
    """Yield `data`."""
    yield data


async def until(moment: float, clock: Clock) -> None:
    """Wait for `moment`, but for a wait too short for a timer; let others run in any case."""
    if moment - clock.now() > SOON:
        await clock.wait(moment)
    else:
        await asyncio.sleep(0)


async def generate(run: Run) -> AsyncGenerator[Piece, None]:
    """Yield the events of an answer, each in its time, and settle its costs at the end."""
    fault, deltas = run.strikes_in(GENERATION), 0
    try:
        for piece in run.wire.pieces():
            await until(run.first_at + piece.at, run.clock)
            is_delta, is_end = piece.role == "delta", piece.role == "end"
            if fault is not None and fault.strikes(deltas, is_delta=is_delta, is_end=is_end):
                for number, data in enumerate(
                    run.wire.broken(fault, run.message, piece.number), start=piece.number
                ):
                    yield Piece(data, "end", run.tokens, piece.at, number)
                return
            run.tokens = piece.tokens
            deltas += is_delta
            if is_end and not run.seen.finished:
                run.seen.finished = True
                run.end()
            yield piece
    finally:
        run.end()


async def deliver(
    pieces: AsyncGenerator[Piece, None], fault: Fault | None, clock: Clock
) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of `pieces`, until `fault` strikes.

    Raises
    ------
    Dropped
        Where the fault is that the connection ends.
    """
    deltas = 0
    async with aclosing(pieces):
        async for piece in pieces:
            is_delta, is_end = piece.role == "delta", piece.role == "end"
            if fault is not None and fault.strikes(deltas, is_delta=is_delta, is_end=is_end):
                if fault.kind == "truncated":
                    return
                async for data in _misbehave(fault, piece, clock):
                    yield data
                fault = None
            deltas += is_delta
            yield piece.data


async def _misbehave(fault: Fault, piece: Piece, clock: Clock) -> AsyncIterator[bytes]:
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
            for _ in range(fault.size // BLOCK):
                yield b"x" * BLOCK
            yield b"x" * (fault.size % BLOCK) + b'"}\n\n'


async def stall(fault: Fault, clock: Clock) -> None:
    """Keep silent for as long as `fault` says.

    Raises
    ------
    Dropped
        After a silence that was to be for ever.
    """
    await clock.wait(clock.now() + (FOREVER if fault.seconds is None else fault.seconds))
    if fault.seconds is None:
        raise Dropped


async def whole(run: Run) -> bytes:
    """Return an answer that is not streamed, once it is generated.

    Raises
    ------
    Dropped, Failure
        Where the fault is that the connection ends, or that generation fails.
    """
    output = run.making.plan.output_tokens
    try:
        fault = run.strikes_in(DELIVERY | GENERATION)
        if fault is not None:
            await _spoil(fault, run)
        await until(run.first_at + run.making.moment(output), run.clock)
        run.tokens, run.seen.finished = output, True
    finally:
        run.end()
    data = encode(run.wire.whole())
    return data[: len(data) // 2] if fault is not None and fault.kind == "malformed" else data


async def _spoil(fault: Fault, run: Run) -> None:
    """Do to an answer in one piece what `fault` does to a stream."""
    match fault.kind:
        case "stalled":
            await stall(fault, run.clock)
        case "dropped" | "cut" | "truncated":
            raise Dropped(reset=fault.kind == "dropped")
        case kind if kind in GENERATION:
            words = told(fault, run.message)
            raise Failure(
                fault.status, words["message"] or "", type=words["type"], code=words["code"]
            )
