"""What a server said of a failure, found in whatever shape it said it. Pure.

Everything in it is hostile: cut before anything expensive is done, cleaned of our secrets, and put
on one line without control characters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nbcodex.errors import shorten
from nbcodex.openai_api import messages

Clean = Callable[[str], str]
"""Removes secrets from a text."""

_READ = 1_000_000


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """A failure in the server's words, safe to show.

    Parameters
    ----------
    status : int or None
        The HTTP status, or what a gateway writes in its place.
    code, kind, message : str
        The error's ``code``, ``type`` and ``message``; empty where there is none.
    page : bool
        Whether it is a web page.
    """

    status: int | None = None
    code: str = ""
    kind: str = ""
    message: str = ""
    page: bool = False

    @property
    def names(self) -> set[str]:
        """Code and type, as they are compared."""
        return {self.code.lower(), self.kind.lower()}


def parsed(body: bytes | str) -> object:
    """Return a body as JSON, or as the text it is."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else body
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def heard(payload: object, clean: Clean, *, status: int | None = None) -> ErrorInfo:
    """Find code, type and message in any of the shapes that servers use."""
    if isinstance(payload, list) and payload:
        payload = payload[0]
    if isinstance(payload, str):
        page = payload.lstrip("\ufeff \t\r\n")[:1] == "<"
        return ErrorInfo(status=status, message="" if page else _line(payload, clean), page=page)
    details = _details(payload)
    if isinstance(details, str):
        return ErrorInfo(status=status, message=_line(details, clean))
    code = _line(details.get("code"), clean)[:100]
    message = details.get("message") or details.get("detail") or details.get("msg")
    return ErrorInfo(
        status=status if status is not None else _as_status(code),
        code=code,
        kind=_line(details.get("type"), clean)[:100],
        message=_line(message, clean),
    )


def _details(payload: object) -> Mapping[str, Any] | str:
    """Return the part that tells: the payload itself, its error, or its response's error."""
    for _ in range(3):
        if not isinstance(payload, dict):
            break
        inner = payload.get("error") or payload.get("response")
        if not isinstance(inner, dict | str) or not inner:
            return payload
        payload = inner
    return payload if isinstance(payload, dict | str) else {}


def _line(value: object, clean: Clean) -> str:
    """Return a value of whatever type on one line, cut before anything expensive is done."""
    if value is None or isinstance(value, dict | bool):
        return ""
    if isinstance(value, list):
        # As FastAPI reports what it cannot validate.
        value = next((f"{v.get('msg')}: {v.get('loc')}" for v in value if isinstance(v, dict)), "")
    if isinstance(value, int) and abs(value) > 2**63:
        return ""
    # A cut through a secret would leave half of it: clean far beyond what can be shown.
    return shorten(clean(str(value)[:_READ])[: messages.LONGEST], messages.LONGEST)


def _as_status(code: str) -> int | None:
    """Return the HTTP status that some gateways write into ``code``."""
    return int(code) if len(code) == 3 and code.isascii() and code.isdigit() else None
