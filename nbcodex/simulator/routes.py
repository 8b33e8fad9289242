"""HTTP requests, their records, and the endpoint and key that each one addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from nbcodex.simulator.error_responses import NO_KEY, ErrorResponse
from nbcodex.simulator.knobs import Knobs

Endpoint = Literal["responses", "chat", "models", "retrieve", "cancel", "library", "control"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """An HTTP request."""

    # method, path: the method, and the target with its query.
    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)  # headers by lower-case name
    body: bytes = b""  # the whole body


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The endpoint of a request."""

    endpoint: Endpoint  # the endpoint
    azure: bool = False  # whether the path is one of Azure's
    id: str = ""  # id in the path (of a response, file or batch), or the control command
    deployment: str = ""  # azure's deployment, which stands in the path in place of a model
    collection: str = ""  # ``files`` or ``batches``
    query: Mapping[str, str] = field(default_factory=dict)  # the query parameters


_BASE = r"(?P<base>/openai/v1|/openai|/v1)"
_ROUTES: tuple[tuple[str, Endpoint, re.Pattern[str]], ...] = (
    ("POST", "responses", re.compile(rf"{_BASE}/responses")),
    ("POST", "chat", re.compile(rf"{_BASE}/chat/completions")),
    (
        "POST",
        "chat",
        re.compile(r"(?P<base>/openai)/deployments/(?P<deployment>[^/]+)/chat/completions"),
    ),
    ("GET", "models", re.compile(rf"{_BASE}/models")),
    ("GET", "retrieve", re.compile(rf"{_BASE}/responses/(?P<id>[^/]+)")),
    ("POST", "cancel", re.compile(rf"{_BASE}/responses/(?P<id>[^/]+)/cancel")),
    ("POST", "library", re.compile(rf"{_BASE}/(?P<collection>files)")),
    ("GET", "library", re.compile(rf"{_BASE}/(?P<collection>files)/(?P<id>[^/]+)/content")),
    ("DELETE", "library", re.compile(rf"{_BASE}/(?P<collection>files)/(?P<id>[^/]+)")),
    ("GET", "library", re.compile(rf"{_BASE}/(?P<collection>batches)")),
    ("POST", "library", re.compile(rf"{_BASE}/(?P<collection>batches)")),
    ("GET", "library", re.compile(rf"{_BASE}/(?P<collection>batches)/(?P<id>[^/]+)")),
    ("POST", "library", re.compile(rf"{_BASE}/(?P<collection>batches)/(?P<id>[^/]+)/cancel")),
    ("GET", "control", re.compile(r"/_simulator/(?P<id>log)")),
    ("POST", "control", re.compile(r"/_simulator/(?P<id>script|knobs)")),
)


def find_route(call: HttpRequest) -> Route:
    """Return the route of `call`.

    Raises
    ------
    ErrorResponse
        404 for an unknown path, 405 for a method that the path does not have.
    """
    parts = urlsplit(call.path)
    allowed = [
        (method, endpoint, match)
        for method, endpoint, pattern in _ROUTES
        if (match := pattern.fullmatch(parts.path))
    ]
    for method, endpoint, match in allowed:
        if method == call.method:
            return _read(endpoint, match, dict(parse_qsl(parts.query)), call)
    if allowed:
        message = f"Not allowed to {call.method} on {parts.path} (HINT: Perhaps you meant to use "
        raise ErrorResponse(405, f"{message}a different HTTP method?)", code="method_not_supported")
    raise unknown_path(call)


def unknown_path(call: HttpRequest) -> ErrorResponse:
    """Return the 404 for an unknown path."""
    if call.path.startswith("/openai"):
        return ErrorResponse(404, "Resource not found", type=None, code="404")
    return ErrorResponse(404, f"Invalid URL ({call.method} {urlsplit(call.path).path})")


def _read(
    endpoint: Endpoint, match: re.Match[str], query: dict[str, str], call: HttpRequest
) -> Route:
    named = match.groupdict()
    base = named.get("base") or ""
    if base == "/openai" and not query.get("api-version"):
        raise unknown_path(call)
    return Route(
        endpoint=endpoint,
        azure=base.startswith("/openai"),
        id=unquote(named.get("id") or ""),
        deployment=unquote(named.get("deployment") or ""),
        collection=named.get("collection") or "",
        query=query,
    )


def key_of(call: HttpRequest, azure: bool, knobs: Knobs) -> str:
    """Return the key that `call` contains; empty if it has none and needs none.

    Raises
    ------
    ErrorResponse
        401, if the key is missing or wrong.
    """
    scheme, _, bearer = call.headers.get("authorization", "").partition(" ")
    key = bearer.strip() if scheme.lower() == "bearer" else ""
    if azure:
        key = call.headers.get("api-key", "") or key
    is_good = key in knobs.keys if knobs.keys else bool(key)
    if knobs.require_key and not is_good:
        raise _unauthorized(key, azure)
    return key


def _unauthorized(key: str, azure: bool) -> ErrorResponse:
    if azure:
        message = (
            "Access denied due to invalid subscription key or wrong API endpoint. Make sure to "
            "provide a valid key for an active subscription and use a correct regional API "
            "endpoint for your resource."
        )
        return ErrorResponse(401, message, type=None, code="401")
    if not key:
        return ErrorResponse(401, NO_KEY)
    # The real server shows this much of the key, and clients must expect it to.
    shown = f"{key[:3]}{'*' * 8}{key[-4:]}" if len(key) > 11 else "*" * 8
    message = (
        f"Incorrect API key provided: {shown}. You can find your API key at "
        "https://platform.openai.com/account/api-keys."
    )
    return ErrorResponse(401, message, code="invalid_api_key")


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """The log entry of one request."""

    number: int  # counted from 1
    at: float  # clock time of its arrival
    # method, path, host: the request line and the Host header.
    method: str
    path: str
    host: str
    key: str = ""  # A name for its key (``key-1`` is the first key seen); never the key itself
    # api, model, prompt, stream, background: the request's parameters; `prompt` is the last user
    # message.
    api: str = ""
    model: str = ""
    prompt: str = ""
    stream: bool = False
    background: bool = False
    body: Mapping[str, Any] = field(default_factory=dict)  # the JSON body
    status: int = 0  # HTTP status; 0 if the connection ended without a response
    fault: str = ""  # name of the fault applied
    response_id: str = ""  # the id of the answer
    # input_tokens, output_tokens: tokens as counted by the server.
    input_tokens: int = 0
    output_tokens: int = 0
    charged: int = 0  # tokens charged to the limit, less those returned
    finished: bool = False  # whether the whole answer was generated
