"""HTTP requests and responses of the simulator: status, headers and body."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
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


@dataclass(slots=True)
class HttpResponse:
    """An HTTP response. Iterate over `body` once, until its end or `Dropped`; then close it."""

    status: int
    headers: dict[str, str]  # by lower-case name; an empty value is left out
    body: AsyncGenerator[bytes, None]
    # Needed because a generator that was never started runs no cleanup.
    on_close: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.headers = {name: value for name, value in self.headers.items() if value}

    async def aclose(self) -> None:
        """Stop the generation of what was not read, unless it is a background response."""
        await self.body.aclose()
        if self.on_close is not None:
            self.on_close()


async def single_chunk(data: bytes) -> AsyncGenerator[bytes, None]:
    """Yield `data`, as the whole body of a response."""
    yield data


@dataclass(eq=False)
class ErrorResponse(Exception):  # noqa: N818 - a response of the server, not an error of ours
    """An HTTP error response."""

    status: int
    message: str
    _: KW_ONLY
    type: str | None = "invalid_request_error"  # None: Azure's, with code and message only
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    html: str = ""  # its body, if that is not JSON

    @property
    def body(self) -> dict[str, str | None]:
        """The JSON error object."""
        fields = {"code": self.code, "message": self.message}
        return fields if self.type is None else fields | {"type": self.type, "param": self.param}

    def as_response(self, common_headers: dict[str, str]) -> HttpResponse:
        """Return the HTTP response; only a gateway's pages lack the `common_headers`."""
        page_headers = {SIMULATED_HEADER: "true", "content-type": "text/html"}
        data = self.html.encode() or encode_json({"error": self.body})
        headers = page_headers if self.html else common_headers | JSON_HEADERS
        headers |= self.headers | {"content-length": str(len(data))}
        return HttpResponse(self.status, headers, single_chunk(data))


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


def retry_headers(seconds: float, retry_after: RetryAfter, time_of_day: float) -> dict[str, str]:
    """Return the headers that state a wait; `time_of_day` is for an HTTP date."""
    in_seconds = {"retry-after": str(math.ceil(seconds))}
    in_ms = {"retry-after-ms": str(math.ceil(round(seconds * 1000, 6)))}
    as_date = {"retry-after": formatdate(math.ceil(time_of_day + seconds), usegmt=True)}
    both = in_seconds | in_ms
    forms = {"both": both, "seconds": in_seconds, "ms": in_ms, "date": as_date, "none": {}}
    return forms[retry_after]
