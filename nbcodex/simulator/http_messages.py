"""HTTP requests and responses of the simulator: status, headers and body."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

from nbcodex.simulator.knobs import RetryAfter

SIMULATED_HEADER = "x-nbcodex-simulated"
EVENT_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
}
JSON_HEADERS = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """An HTTP request."""

    method: str
    path: str  # the target with its query
    headers: Mapping[str, str] = field(default_factory=dict)  # by lower-case name
    body: bytes = b""


class ResponseBody:
    """The chunks of a response. Iterate over them once, until the end or `Dropped`; then close."""

    def __init__(
        self,
        chunks: bytes | AsyncGenerator[bytes, None],
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._chunks = _single_chunk(chunks) if isinstance(chunks, bytes) else chunks
        self._on_close = on_close

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks

    async def aclose(self) -> None:
        """Stop the generation of what was not read, unless it is a background response."""
        # `on_close` is needed because a generator that was never started runs no cleanup.
        await self._chunks.aclose()
        self._on_close()


async def _single_chunk(data: bytes) -> AsyncGenerator[bytes, None]:
    yield data


@dataclass(slots=True)
class HttpResponse:
    """An HTTP response; an empty header value is left out, so that a fault can remove a header."""

    status: int
    headers: dict[str, str]  # by lower-case name
    body: ResponseBody

    def __post_init__(self) -> None:
        self.headers = {name: value for name, value in self.headers.items() if value}


class ErrorResponse(Exception):  # noqa: N818 - a response of the server, not an error of ours
    """An HTTP error response; `html` is its body if that is not JSON."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = "invalid_request_error",  # noqa: A002 - the API's name
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        html: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.html = html
        self.error = {"message": message, "type": type, "param": param, "code": code}

    @property
    def body(self) -> dict[str, str | None]:
        """The JSON error object; Azure sends code and message only."""
        if self.error["type"] is None:
            return {name: self.error[name] for name in ("code", "message")}
        return self.error

    def as_response(self, common_headers: dict[str, str]) -> HttpResponse:
        """Return the HTTP response with the headers `common`; a gateway's pages lack them."""
        if self.html:
            data = self.html.encode()
            headers = {SIMULATED_HEADER: "true", "content-type": "text/html"}
        else:
            data = encode_json({"error": self.body})
            headers = common_headers | JSON_HEADERS
        headers |= self.headers | {"content-length": str(len(data))}
        return HttpResponse(self.status, headers, ResponseBody(data))


def encode_json(data: Any) -> bytes:
    """Return `data` as compact JSON in UTF-8."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "replace")


def go_duration(seconds: float) -> str:
    """Return `seconds` in Go's duration format, in whole milliseconds: ``86ms``, ``7m12s``."""
    milliseconds = max(0, math.ceil(round(seconds * 1000, 6)))
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h" if hours else ""
    text += f"{minutes}m" if hours or minutes else ""
    return text + f"{milliseconds / 1000:.3f}".rstrip("0").rstrip(".") + "s"


def retry_headers(seconds: float, form: RetryAfter, wall: float) -> dict[str, str]:
    """Return the headers that state a wait; `wall` is the time of day, for an HTTP date."""
    in_seconds = {"retry-after": str(math.ceil(seconds))}
    in_ms = {"retry-after-ms": str(math.ceil(round(seconds * 1000, 6)))}
    as_date = {"retry-after": formatdate(math.ceil(wall + seconds), usegmt=True)}
    both = in_seconds | in_ms
    forms = {"both": both, "seconds": in_seconds, "ms": in_ms, "date": as_date, "none": {}}
    return forms[form]
