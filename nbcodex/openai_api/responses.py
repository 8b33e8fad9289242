"""The answer as it arrives: events of either API in, text and an ending out. Pure.

Owns what counts as finished: only what the protocol says is. Reads deltas as plain dictionaries,
for building the SDK's objects costs three quarters of its time per event.
"""

from __future__ import annotations

import binascii
import json
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nbcodex.errors import shorten
from nbcodex.models import Image, StreamPosition, Usage
from nbcodex.openai_api.api_errors import FailedError, broken, nonsense
from nbcodex.openai_api.durable import usable

_KEEPALIVE = ("keepalive", "ping", "heartbeat")
_SHORT = 80
"""No keep-alive event is longer; hardly any other is as short."""

_REFUSAL = "response.refusal.delta"
_TEXT = {"response.output_text.delta", _REFUSAL}
_THOUGHT = {"response.reasoning_summary_text.delta", "response.reasoning_text.delta"}
_WHOLE = {"response.output_text.done": "text", "response.refusal.done": "refusal"}
_ENDS = {"response.completed", "response.incomplete"}
_FAILURES = {"response.failed", "response.cancelled"}
_UNDER_WAY = {"queued", "in_progress"}
_ORDINARY = {"stop", "eos", "eos_token", "end_turn", "stop_sequence"}
_CUTS = {"length": "max_output_tokens", "max_tokens": "max_output_tokens"}


@dataclass(slots=True)
class Ending:
    """What is known of a finished answer beside its text."""

    usage: Usage = field(default_factory=Usage)
    model: str | None = None
    cut: str | None = None
    response_id: str | None = None
    text: str = ""
    reasoning: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    refused: bool = False


class Reader(Protocol):
    """What reads the events of one API."""

    ending: Ending
    finished: bool
    """Whether the answer is whole."""
    closed: bool
    """Whether nothing more can come."""
    mark: StreamPosition | None
    """Where the answer goes on behind the last event, if the server keeps it for us."""

    def read(self, name: str, data: str) -> tuple[str, str]:
        """Return the text and the thought that an event adds; `ending` and the flags follow.

        Raises
        ------
        FailedError
            If the event says that the answer failed.
        ValueError, RecursionError
            If the event is no JSON.
        """
        ...

    def whole(self, payload: dict[str, Any]) -> None:
        """Take an answer that came in one piece."""
        ...


def is_alive(name: str, data: str) -> bool:
    """Whether an event is more than a sign that the connection stands."""
    if not data or name in _KEEPALIVE:
        return False
    return len(data) > _SHORT or not any(f'"{word}"' in data for word in _KEEPALIVE)


class ResponsesReader:
    """Reads the events of the Responses API.

    Parameters
    ----------
    durable : bool
        Whether the answer was to be kept by the server.
    mark : Mark or None
        Where an earlier reading of it ended.
    """

    def __init__(self, *, durable: bool = False, mark: StreamPosition | None = None) -> None:
        self.ending = Ending()
        self.finished = self.closed = False
        self.mark = mark
        self._durable = durable
        self._thinking = False

    def read(self, name: str, data: str) -> tuple[str, str]:
        """Return the text and the thought that an event adds."""
        if data == "[DONE]":
            self.closed = True
            return "", ""
        event = _decoded(data)
        if not self._durable:
            return self._read(event, name)
        number = _count(event, "sequence_number")
        before = -1 if self.mark is None or self.mark.sequence is None else self.mark.sequence
        if number is not None and number <= before:
            return "", ""  # of a server that begins again at the beginning
        added = self._read(event, name)
        if self.mark and number is not None:
            self.mark = StreamPosition(self.mark.response_id, number)
        return added

    def _read(self, event: dict[str, Any], name: str) -> tuple[str, str]:
        kind = event.get("type") or name
        if kind in _TEXT:
            self.ending.refused |= kind == _REFUSAL
            return _string(event.get("delta")), ""
        if kind in _THOUGHT:
            self._thinking = True
            return "", _string(event.get("delta"))
        if not isinstance(kind, str):
            return "", ""
        if kind == "response.reasoning_summary_part.added" and self._thinking:
            return "", "\n\n"
        self._note(kind, event)
        return "", ""

    def whole(self, payload: dict[str, Any]) -> None:
        """Take a response that came in one piece."""
        self._identify(payload)
        if payload.get("status") in _UNDER_WAY:
            raise broken("The answer is still being made.")
        failed = payload.get("error") or payload.get("status") in {"failed", "cancelled"}
        if failed or not isinstance(payload.get("output"), list):
            raise FailedError(payload)
        self._end(payload)

    def _note(self, kind: str, event: dict[str, Any]) -> None:
        """Take whatever is no delta."""
        response = event.get("response")
        if kind in _ENDS:
            self._end(response if isinstance(response, dict) else {}, kind)
        elif kind in _FAILURES:
            told = isinstance(response, dict) and bool(response.get("error"))
            raise FailedError(event, final=told)
        elif kind == "error" or (event.get("error") and "response" not in event):
            raise FailedError(event)
        elif kind in _WHOLE:
            self.ending.text += _string(event.get(_WHOLE[kind]))
        elif kind == "response.output_item.done":
            self.ending.images += images_of_items([event.get("item")])
        elif isinstance(response, dict):
            self._identify(response)

    def _identify(self, response: dict[str, Any]) -> None:
        self.ending.model = _name(response.get("model")) or self.ending.model
        self.ending.response_id = _name(response.get("id")) or self.ending.response_id
        name = usable(response.get("id"))
        if self._durable and self.mark is None and name and response.get("background") is True:
            self.mark = StreamPosition(name)

    def _end(self, response: dict[str, Any], kind: str = "") -> None:
        self._identify(response)
        ending = self.ending
        ending.usage = usage(response.get("usage"))
        ending.text = "".join(_output_text(response)) or ending.text
        output = _items(response, "output")
        ending.reasoning = [item for item in output if item.get("type") == "reasoning"]
        ending.images = images_of_items(output) or ending.images
        ending.refused |= any(p.get("refusal") for i in output for p in _items(i, "content"))
        if kind == "response.incomplete" or response.get("status") == "incomplete":
            details = response.get("incomplete_details")
            reason = details.get("reason") if isinstance(details, dict) else None
            ending.cut = _name(reason) or "incomplete"
        self.finished = self.closed = True


class ChatReader:
    """Reads the chunks of Chat Completions."""

    def __init__(self) -> None:
        self.ending = Ending()
        self.mark: StreamPosition | None = None
        self.finished = self.closed = False

    def read(self, name: str, data: str) -> tuple[str, str]:
        """Return the text and the thought that a chunk adds."""
        if data == "[DONE]":
            self.finished = self.closed = True
            return "", ""
        chunk = _decoded(data)
        if chunk.get("error") or name == "error" or chunk.get("type") == "error":
            raise FailedError(chunk)
        ending = self.ending
        if ending.model is None:
            ending.model, ending.response_id = _name(chunk.get("model")), _name(chunk.get("id"))
        if isinstance(chunk.get("usage"), dict):
            ending.usage = usage(chunk["usage"])
        text = thought = ""
        for choice in _items(chunk, "choices"):
            if choice.get("index") in (0, None):
                said, thinking = self._choice(choice, "delta")
                text, thought = text + said, thought + thinking
        return text, thought

    def whole(self, payload: dict[str, Any]) -> None:
        """Take a completion that came in one piece."""
        if payload.get("error"):
            raise FailedError(payload)
        choices = _items(payload, "choices")
        if not choices:
            raise FailedError(payload)
        self.ending.model = _name(payload.get("model"))
        self.ending.response_id = _name(payload.get("id"))
        self.ending.usage = usage(payload.get("usage"))
        self.ending.text, _ = self._choice(choices[0], "message")
        self.finished = self.closed = True

    def _choice(self, choice: dict[str, Any], part: str) -> tuple[str, str]:
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.finished = True
            if reason not in _ORDINARY:
                self.ending.cut = _CUTS.get(reason) or _name(reason)
        delta = choice.get(part)
        if not isinstance(delta, dict):
            return "", ""
        self.ending.refused |= bool(_string(delta.get("refusal")))
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        return _content(delta.get("content")) + _string(delta.get("refusal")), _string(thought)


def reader(api: Literal["responses", "chat"], *, durable: bool = False) -> Reader:
    """Return what reads an answer of the given API."""
    return ResponsesReader(durable=durable) if api == "responses" else ChatReader()


def usage(told: object) -> Usage:
    """Return the figures of either API; what makes no sense is unknown."""
    if not isinstance(told, dict):
        return Usage()
    return Usage(
        input_tokens=_count(told, "input_tokens", "prompt_tokens"),
        cached_tokens=_detail(told, "input", "prompt", "cached_tokens"),
        output_tokens=_count(told, "output_tokens", "completion_tokens"),
        reasoning_tokens=_detail(told, "output", "completion", "reasoning_tokens"),
    )


def _detail(told: dict[str, Any], one: str, other: str, name: str) -> int | None:
    for prefix in (one, other):
        details = told.get(f"{prefix}_tokens_details")
        if isinstance(details, dict):
            return _count(details, name)
    return None


def _count(told: dict[str, Any], *names: str) -> int | None:
    value = next((told[name] for name in names if name in told), None)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        return None
    return value


def decoded(text: str) -> dict[str, Any]:
    """Return a body that is a JSON object.

    Raises
    ------
    ServerError
        If it is anything else.
    """
    try:
        return _decoded(text)
    except (ValueError, RecursionError) as error:
        raise nonsense("The server sent something that is no valid JSON.") from error


def model_names(body: bytes) -> list[str]:
    """Return the names in an answer of ``GET /models``, sorted."""
    listed = _items(decoded(body.decode("utf-8", "replace")), "data")
    return sorted({name for item in listed if (name := _name(item.get("id")))})


def _decoded(data: str) -> dict[str, Any]:
    payload = json.loads(data)
    if not isinstance(payload, dict):
        raise ValueError("not an object")  # noqa: TRY004 - as for any other nonsense in the data
    return payload


def _output_text(response: dict[str, Any]) -> Iterator[str]:
    for item in _items(response, "output"):
        if item.get("type") in ("message", None):
            for part in _items(item, "content"):
                yield _string(part.get("text")) + _string(part.get("refusal"))


def _items(payload: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = payload.get(name)
    return [i for i in found if isinstance(i, dict)] if isinstance(found, list) else []


def _content(value: object) -> str:
    """Return the text of a message: a string, or some servers' list of parts."""
    if isinstance(value, list):
        return "".join(_string(part.get("text")) for part in value if isinstance(part, dict))
    return _string(value)


def _string(value: object) -> str:
    """Return a string as it is, without the halves of characters that cannot be written down."""
    if not isinstance(value, str):
        return ""
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


def _name(value: object) -> str | None:
    return (shorten(value, 100) or None) if isinstance(value, str) else None


IMAGE_CALL = "image_generation_call"
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", 0, "image/png"),
    (b"\xff\xd8\xff", 0, "image/jpeg"),
    (b"GIF8", 0, "image/gif"),
    (b"WEBP", 8, "image/webp"),
)


def images_of_items(items: Iterable[object]) -> list[Image]:
    """Return the pictures among the items of an answer; what is no picture is left out.

    What a file holds is told by its own first bytes, for the server may say anything.
    """
    found = []
    for item in items:
        if isinstance(item, Mapping) and item.get("type") == IMAGE_CALL:
            data = _image_data(item.get("result"))
            if kind := _media_type(data):
                found.append(Image(data, kind))
    return found


def _image_data(value: object) -> bytes:
    try:
        return b64decode(value, validate=True) if isinstance(value, str) else b""
    except (ValueError, binascii.Error):
        return b""


def _media_type(data: bytes) -> str | None:
    for signature, at, kind in _SIGNATURES:
        if data[at : at + len(signature)] == signature:
            return kind
    return None
