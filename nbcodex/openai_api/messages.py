"""What the message of a refusal says: which limit, its figures, and how long to wait. Pure.

The words are those of OpenAI, Azure, Groq and their imitators, taken from real messages. Every
pattern runs in linear time, on a text that was cut first: messages come from the server.
"""

from __future__ import annotations

import math
import re
from typing import cast

from nbcodex.errors import shorten
from nbcodex.models import DAY, MINUTE, Limit, Resource
from nbcodex.openai_api.rate_limits import LARGEST, sane

LONGEST = 4000
"""Characters of a message that are read."""

_AFTER = re.compile(r"(?:again|retry)\s{1,3}(?:in|after)\s{1,3}(?:about\s)?", re.IGNORECASE)
_PART = re.compile(
    r"(\d{1,12}(?:\.\d{1,12})?)\s{0,3}"
    r"(milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)"
    r"(?![a-z])(?:,?\s{0,3}(?:and\s)?)",
    re.IGNORECASE,
)
_MODEL = re.compile(
    r"(?:rate limit reached|request too large) for (?:model )?[`'\"]?([\w./:-]{1,100})",
    re.IGNORECASE,
)
_PER = re.compile(
    r"(tokens?|requests?|calls?) per (?:1 )?(second|sec|minute|min|hour|day)\b", re.IGNORECASE
)
_SHORT = re.compile(r"\b([TR])P([SMHD])\b")
_RESOURCE = re.compile(r"\b(token|request|call)s? (?:rate )?limit", re.IGNORECASE)
_FIGURE = re.compile(
    r"\b(limit|used|current|requested):?\s{1,3}(\d[\d,]{0,18}(?:\.\d{1,9})?)", re.IGNORECASE
)
_RESOURCES = {"t": "tokens", "r": "requests", "c": "requests"}
_WINDOWS = {"s": 1.0, "m": MINUTE, "h": 3600.0, "d": DAY}


def limit(message: str, *, kind: str | None = None) -> Limit:
    """Return the limit that a message names, with as many of its figures as it tells.

    Parameters
    ----------
    message : str
        The server's words.
    kind : str or None
        The error's ``type``, which is ``tokens`` or ``requests`` at OpenAI.
    """
    text = message[:LONGEST]
    resource, window = _which(text)
    if resource is None and kind in {"tokens", "requests"}:
        resource = cast(Resource, kind)
    figures = {name.lower(): _figure(value) for name, value in reversed(_FIGURE.findall(text))}
    model = _MODEL.search(text)
    return Limit(
        resource=resource,
        window=window,
        limit=figures.get("limit"),
        used=figures.get("used", figures.get("current")),
        requested=figures.get("requested"),
        model=shorten(model[1].rstrip("."), 100) if model else None,
    )


def stated_wait(message: str) -> float | None:
    """Return the seconds after which a message says to try again.

    Any mix of hours, minutes, seconds and milliseconds, as letters or as words.
    """
    text = message[:LONGEST]
    for start in _AFTER.finditer(text):
        if (wait := sane(_duration(text, start.end()))) is not None:
            return wait
    return None


def reckoned_wait(limit: Limit) -> float | None:
    """Return the seconds after which a request fits again, by the figures of the refusal.

    ``(used + requested - limit) / limit * window``: reproduced nine of nine real messages to
    within a millisecond.
    """
    if not (limit.limit and limit.window) or limit.used is None or limit.requested is None:
        return None
    return sane((limit.used + limit.requested - limit.limit) / limit.limit * limit.window)


def _which(text: str) -> tuple[Resource | None, float | None]:
    if found := _PER.search(text):
        return _resource(found[1]), _WINDOWS[found[2][0].lower()]
    if found := _SHORT.search(text):
        return _resource(found[1]), _WINDOWS[found[2].lower()]
    found = _RESOURCE.search(text)
    return (_resource(found[1]) if found else None), None


def _resource(word: str) -> Resource:
    return cast(Resource, _RESOURCES[word[0].lower()])


def _figure(text: str) -> float | None:
    value = float(text.replace(",", ""))
    return value if value <= LARGEST else None


def _duration(text: str, at: int) -> float | None:
    """Return the seconds of the duration that begins at `at`."""
    total: float | None = None
    for _ in range(5):
        part = _PART.match(text, at)
        if part is None:
            break
        total = (total or 0.0) + float(part[1]) * _seconds(part[2].lower())
        at = part.end()
    return total if total is None or math.isfinite(total) else None


def _seconds(unit: str) -> float:
    if unit.startswith(("ms", "milli")):
        return 0.001
    return _WINDOWS[unit[0]]
