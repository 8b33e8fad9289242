"""Bodies and events of both APIs for the second look-alike.

Pure functions; must not know limits, sockets or nbcodex.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, Self

Api = Literal["responses", "chat"]
Fields = dict[str, Any]

# Output charged for a request without a bound; no public source states the real value.
ASSUMED = 500
LEAST_BOUND = 16  # smallest `max_output_tokens` of the Responses API
CHUNKS = 6  # number of deltas of an answer


class RefusedError(Exception):
    """The request gets an error instead of an answer."""

    def __init__(self, status: int, error: Fields, headers: Mapping[str, str] = {}) -> None:
        super().__init__(error["message"])
        self.status, self.error, self.headers = status, error, headers


def error_of(kind: str, code: str | None, message: str) -> Fields:
    return {"message": message, "type": kind, "param": None, "code": code}


def words_of(prompt: str, bound: int | None) -> list[str]:
    """Return the one answer to a prompt: a third to two thirds of its bound, a token each."""
    digest = zlib.crc32(prompt.encode())
    number = max(2, round((bound or 60) * (0.3 + 0.4 * (digest % 1000) / 1000)))
    return [f"({digest:08x})", *(f"w{n}" for n in range(1, number))]


@dataclass(frozen=True, slots=True)
class Ask:
    """A parsed request."""

    api: Api
    model: str
    prompt: str
    input_tokens: int
    bound: int | None
    stream: bool
    tells_usage: bool

    @classmethod
    def read(cls, api: Api, body: Fields) -> Self:
        bounds = ("max_output_tokens", "max_completion_tokens", "max_tokens")
        bound = next((body[name] for name in bounds if body.get(name) is not None), None)
        if api == "responses" and bound is not None and bound < LEAST_BOUND:
            message = f"Invalid 'max_output_tokens': expected at least {LEAST_BOUND}, got {bound}."
            kind, code = "invalid_request_error", "integer_below_min_value"
            raise RefusedError(400, error_of(kind, code, message))
        said = body.get("input") if api == "responses" else body.get("messages")
        texts = [body.get("instructions") or "", *_texts(said)]
        return cls(
            api=api,
            model=body["model"],
            prompt=texts[-1],
            input_tokens=sum(map(len, texts)) // 4 + 8,
            bound=bound,
            stream=bool(body.get("stream")),
            tells_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        )

    @property
    def whole(self) -> int:
        """Tokens that it may come to."""
        return self.input_tokens + (self.bound or ASSUMED)


def _texts(said: Any) -> list[str]:
    """Return all texts of an input, in their order."""
    if isinstance(said, str):
        return [said]
    if isinstance(said, list):
        return [text for each in said for text in _texts(each)]
    if isinstance(said, dict):
        return _texts(said.get("content", said.get("text")))
    return []


def parsed(body: bytes) -> Fields:
    """Return a body's fields.

    Raises
    ------
    RefusedError
        If it is no JSON object, or names no model.
    """
    try:
        fields = json.loads(body)
        model = fields["model"]
    except (ValueError, TypeError, KeyError):
        model = None
    if not isinstance(model, str):
        message = "We could not parse the JSON body of your request, or it names no model."
        raise RefusedError(400, error_of("invalid_request_error", None, message))
    return dict(fields)


def frame(data: Fields | str, event: str | None = None) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {event}\n" if event else "").encode() + f"data: {text}\n\n".encode()


def pieces(words: list[str]) -> list[str]:
    """Return an answer in pieces that make up its text when they are joined."""
    size = math.ceil(len(words) / CHUNKS)
    parts = [" ".join(words[at : at + size]) for at in range(0, len(words), size)]
    return [part if part is parts[-1] else part + " " for part in parts]


class Responses:
    """An answer in the words of the Responses API."""

    def __init__(self, ask: Ask, number: int) -> None:
        self._ask, self._number, self._sequence = ask, f"{number:08x}", count()

    def whole(self, text: str | None, used: int, status: str = "completed") -> Fields:
        """Return the `response` object; without a text, as long as there is none."""
        done = text is not None
        return {
            "id": f"resp_{self._number}",
            "object": "response",
            "created_at": int(time.time()),
            "status": status if done else "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": self._ask.model,
            "output": [self._item(text)] if text is not None else [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": self._usage(used) if done else None,
        }

    def _usage(self, used: int) -> Fields:
        return {
            "input_tokens": self._ask.input_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": used,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._ask.input_tokens + used,
        }

    def _item(self, text: str | None) -> Fields:
        status = "in_progress" if text is None else "completed"
        content = [] if text is None else [self._part(text)]
        head = {"id": f"msg_{self._number}", "type": "message", "role": "assistant"}
        return {**head, "status": status, "content": content}

    @staticmethod
    def _part(text: str) -> Fields:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _event(self, kind: str, **more: Any) -> bytes:
        return frame({"type": kind, "sequence_number": next(self._sequence), **more}, kind)

    def begin(self) -> Iterator[bytes]:
        response = self.whole(None, 0)
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        yield self._event("response.output_item.added", output_index=0, item=self._item(None))
        yield self._event("response.content_part.added", **self._place(), part=self._part(""))

    def _place(self) -> Fields:
        return {"item_id": f"msg_{self._number}", "output_index": 0, "content_index": 0}

    def delta(self, text: str) -> bytes:
        return self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def end(self, text: str, used: int) -> Iterator[bytes]:
        yield self._event("response.output_text.done", **self._place(), text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place(), part=self._part(text))
        yield self._event("response.output_item.done", output_index=0, item=self._item(text))
        yield self._event("response.completed", response=self.whole(text, used))

    def failure(self, how: str, error: Fields) -> bytes:
        match how:
            case "failed":
                fields = {"code": error["code"], "message": error["message"]}
                response = self.whole(None, 0) | {"status": "failed", "error": fields}
                return self._event("response.failed", response=response)
            case "nested":
                return self._event("error", error=error)
            case _:
                fields = {name: error[name] for name in ("code", "message", "param")}
                return self._event("error", **fields)


class Chat:
    """An answer in the words of Chat Completions."""

    def __init__(self, ask: Ask, number: int) -> None:
        self._ask, self._number = ask, number

    def _frame(self, kind: str, **more: Any) -> Fields:
        head = {"id": f"chatcmpl-{self._number:08x}", "object": kind, "created": int(time.time())}
        return {**head, "model": self._ask.model, **more}

    def whole(self, text: str, used: int) -> Fields:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return self._frame("chat.completion", choices=[choice], usage=self._usage(used))

    def _usage(self, used: int) -> Fields:
        return {
            "prompt_tokens": self._ask.input_tokens,
            "completion_tokens": used,
            "total_tokens": self._ask.input_tokens + used,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    def _chunk(self, delta: Fields, reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return frame(self._frame("chat.completion.chunk", choices=[choice]))

    def begin(self) -> Iterator[bytes]:
        yield self._chunk({"role": "assistant", "content": ""})

    def delta(self, text: str) -> bytes:
        return self._chunk({"content": text})

    def end(self, text: str, used: int) -> Iterator[bytes]:
        yield self._chunk({}, "stop")
        if self._ask.tells_usage:
            usage = self._usage(used)
            yield frame(self._frame("chat.completion.chunk", choices=[], usage=usage))
        yield frame("[DONE]")

    def failure(self, _: str, error: Fields) -> bytes:
        return frame({"error": error})
