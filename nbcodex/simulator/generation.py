"""One answer in the making: what it is made of, and what each API's wire needs to know of it.

Must not know the clock: a piece says how long after the first token it comes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from nbcodex.simulator.answers import Plan
from nbcodex.simulator.asked import Asked
from nbcodex.simulator.faults import Fault

LIMIT_CODE, LIMIT_TYPE = "rate_limit_exceeded", "tokens"

Role = Literal["preamble", "delta", "aside", "end"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One event of a stream.

    Parameters
    ----------
    data : bytes
        The event as it goes over the wire.
    role : {"preamble", "delta", "aside", "end"}
        ``delta``: text of the answer. ``end``: the event that ends it, and all after that.
    tokens : int
        Output tokens generated when it is sent.
    at : float
        Seconds after the first token.
    number : int
        Its sequence number, where the API has such.
    """

    data: bytes
    role: Role
    tokens: int
    at: float
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """What a stream is made from.

    Parameters
    ----------
    id : str
        The answer's id.
    created_at : float
        Seconds since the epoch.
    asked, plan
        The request and its answer.
    cached : int
        Input tokens that were in the server's cache.
    speed : float
        Tokens per second.
    chunk : int
        Tokens per delta.
    """

    id: str
    created_at: float
    asked: Asked
    plan: Plan
    cached: int
    speed: float
    chunk: int

    def chunks(self) -> Iterator[tuple[str, int]]:
        """Yield each delta's text, and the tokens generated once it is out."""
        tokens, size = self.plan.tokens, max(1, self.chunk)
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            yield "".join(part), self.plan.reasoning + start + len(part)

    def moment(self, tokens: int) -> float:
        """Return the seconds after the first token at which `tokens` are generated."""
        return max(0, tokens - 1) / self.speed

    def item_id(self, prefix: str) -> str:
        """Return the id of a part of the answer."""
        return f"{prefix}_{self.id.partition('_')[2]}"


class Wire(Protocol):
    """How one API says an answer."""

    def pieces(self) -> Iterator[Piece]:
        """Yield the stream's events."""
        ...

    def broken(self, fault: Fault, message: str, number: int) -> list[bytes]:
        """Return the events, counted from `number`, with which generation breaks off."""
        ...

    def whole(self) -> dict[str, Any]:
        """Return the answer as one object."""
        ...


def encode(data: Any) -> bytes:
    """Return `data` as JSON in UTF-8."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "replace")


def told(fault: Fault, message: str) -> dict[str, str | None]:
    """Return code, type and message of an error in a stream."""
    return {
        "code": fault.code or LIMIT_CODE,
        "type": fault.type or LIMIT_TYPE,
        "message": fault.message or message,
    }
