"""Which door of the API a request knocks at, and with which key. Must not know what is behind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.refusals import NO_KEY, Failure

Door = Literal["responses", "chat", "models", "retrieve", "cancel", "library", "control"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """An HTTP request.

    Parameters
    ----------
    method, path : str
        The method, and the target with its query.
    headers : mapping
        Headers by lower-case name.
    body : bytes
        The whole body.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a request leads.

    Parameters
    ----------
    door
        What is asked for.
    azure : bool
        Whether it is Azure that is asked.
    id : str
        The response (or the control) that is meant.
    deployment : str
        Azure's name in the path, in the model's place.
    deed : str
        ``files`` or ``batches``, of the library.
    query : mapping
        The query.
    """

    door: Door
    azure: bool = False
    id: str = ""
    deployment: str = ""
    deed: str = ""
    query: Mapping[str, str] = field(default_factory=dict)


_BASE = r"(?P<base>/openai/v1|/openai|/v1)"
_ROUTES: tuple[tuple[str, Door, re.Pattern[str]], ...] = (
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
    ("POST", "library", re.compile(rf"{_BASE}/(?P<deed>files)")),
    ("GET", "library", re.compile(rf"{_BASE}/(?P<deed>files)/(?P<id>[^/]+)/content")),
    ("DELETE", "library", re.compile(rf"{_BASE}/(?P<deed>files)/(?P<id>[^/]+)")),
    ("GET", "library", re.compile(rf"{_BASE}/(?P<deed>batches)")),
    ("POST", "library", re.compile(rf"{_BASE}/(?P<deed>batches)")),
    ("GET", "library", re.compile(rf"{_BASE}/(?P<deed>batches)/(?P<id>[^/]+)")),
    ("POST", "library", re.compile(rf"{_BASE}/(?P<deed>batches)/(?P<id>[^/]+)/cancel")),
    ("GET", "control", re.compile(r"/_simulator/(?P<id>log)")),
    ("POST", "control", re.compile(r"/_simulator/(?P<id>script|knobs)")),
)


def route(call: Call) -> Route:
    """Return where `call` leads.

    Raises
    ------
    Failure
        404 for a path that does not exist, 405 for a method that it does not have.
    """
    parts = urlsplit(call.path)
    allowed = [
        (method, door, found)
        for method, door, pattern in _ROUTES
        if (found := pattern.fullmatch(parts.path))
    ]
    for method, door, found in allowed:
        if method == call.method:
            return _read(door, found, dict(parse_qsl(parts.query)), call)
    if allowed:
        message = f"Not allowed to {call.method} on {parts.path} (HINT: Perhaps you meant to use "
        raise Failure(405, f"{message}a different HTTP method?)", code="method_not_supported")
    raise unknown(call)


def unknown(call: Call) -> Failure:
    """Return the 404 for a path that does not exist."""
    if call.path.startswith("/openai"):
        return Failure(404, "Resource not found", type=None, code="404")
    return Failure(404, f"Invalid URL ({call.method} {urlsplit(call.path).path})")


def _read(door: Door, found: re.Match[str], query: dict[str, str], call: Call) -> Route:
    named = found.groupdict()
    base = named.get("base") or ""
    if base == "/openai" and not query.get("api-version"):
        raise unknown(call)
    return Route(
        door=door,
        azure=base.startswith("/openai"),
        id=unquote(named.get("id") or ""),
        deployment=unquote(named.get("deployment") or ""),
        deed=named.get("deed") or "",
        query=query,
    )


def key_of(call: Call, azure: bool, knobs: Knobs) -> str:
    """Return the key that `call` shows; empty if it shows none and need not.

    Raises
    ------
    Failure
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


def _unauthorized(key: str, azure: bool) -> Failure:
    if azure:
        message = (
            "Access denied due to invalid subscription key or wrong API endpoint. Make sure to "
            "provide a valid key for an active subscription and use a correct regional API "
            "endpoint for your resource."
        )
        return Failure(401, message, type=None, code="401")
    if not key:
        return Failure(401, NO_KEY)
    # The real server shows this much of the key, and clients must expect it to.
    shown = f"{key[:3]}{'*' * 8}{key[-4:]}" if len(key) > 11 else "*" * 8
    message = (
        f"Incorrect API key provided: {shown}. You can find your API key at "
        "https://platform.openai.com/account/api-keys."
    )
    return Failure(401, message, code="invalid_api_key")
