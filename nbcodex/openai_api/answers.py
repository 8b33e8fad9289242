"""What a try yields: the words between the wire and the engine. Data, no deeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbcodex.models import Image, LimitSnapshot, StreamPosition, Usage


@dataclass(frozen=True, slots=True)
class ResponseStarted:
    """The server let the request in: its headers are there, its answer begins.

    Parameters
    ----------
    api : str
        ``responses`` or ``chat``.
    model : str or None
        The model that was asked.
    snapshot : Snapshot
        The limits, as the headers tell them.
    simulated : bool
        Whether the simulator answers.
    request_id : str or None
        The server's name for the request.
    """

    api: str
    model: str | None
    snapshot: LimitSnapshot
    simulated: bool
    request_id: str | None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reset:
    """The text that follows is the answer from its beginning, and replaces what came before."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that the reader of the answer should know."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the model's thinking aloud."""

    text: str


@dataclass(frozen=True, slots=True)
class CompletedAnswer:
    """The finished answer; `text` is all the pieces joined.

    Parameters
    ----------
    text : str
        The answer.
    usage : Usage
        The server's figures; unknown where the connection was lost after the last word.
    model : str or None
        The model that answered, in the server's words.
    cut : str or None
        Why it ends early.
    response_id : str or None
        The server's name for the answer.
    reasoning : tuple of dict
        Encrypted reasoning items, to be sent before the next turn's input.
    images : tuple of Image
        The pictures that the model made.
    refused : bool
        Whether the model says that it will not answer.
    simulated : bool
        Whether it is known here that the simulator answered; of a stream, `Opened` says so.
    """

    text: str
    usage: Usage
    model: str | None
    cut: str | None
    response_id: str | None
    reasoning: tuple[dict[str, Any], ...] = ()
    images: tuple[Image, ...] = ()
    refused: bool = False
    simulated: bool = False


StreamEvent = (
    ResponseStarted | StreamPosition | Reset | TextDelta | ReasoningDelta | Notice | CompletedAnswer
)
"""A `StreamPosition` says where a durable answer goes on, behind all text that was yielded before
it: between that text and its mark the stream does not wait. The first one names the answer before
its text."""
