"""What response headers say about time and limits. Pure: headers in, our words out.

Headers come from the server, so each value is cut, parsed strictly, and dropped when it is absurd.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

from nbcodex.errors import shorten
from nbcodex.models import DAY, LimitReading, LimitSnapshot, Resource

Headers = Mapping[str, str]
"""Lower-case names to values; httpx2's own, which ignore case, will do."""

LARGEST = 1e15
"""More tokens or requests than this is no limit of anybody's."""

_LONGEST = 64
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6}
_UNITS["ns"] = 1e-9
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(h|ms|m|us|µs|μs|ns|s)")


def is_simulated(headers: Headers) -> bool:
    """Return whether the simulator answers: it says so in every response."""
    return headers.get("x-nbcodex-simulated") == "true"


def number(text: str | None) -> float | None:
    """Return a finite number that is not negative; None for anything else."""
    if not text or len(text) > _LONGEST:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def go_duration(text: str | None) -> float | None:
    """Return the seconds of a duration as Go writes it (``6m0s``, ``17ms``), or of plain seconds.

    Some compatible servers write plain seconds; anything else is None.
    """
    if not text or len(text) > _LONGEST:
        return None
    text = text.strip()
    parts = _PART.findall(text)
    if not parts or "".join(amount + unit for amount, unit in parts) != text:
        return number(text)
    return sum(float(amount) * _UNITS[unit] for amount, unit in parts)


def sane(seconds: float | None) -> float | None:
    """Return a wait that can be kept: more than none, a day at most; else None.

    A server that says zero, something negative or no number has said nothing: the exponential
    backoff decides then, for a wait of zero would hammer it. One that names more than a day means
    "long", which a day is.
    """
    if seconds is None or not math.isfinite(seconds) or seconds <= 0:
        return None
    return min(seconds, DAY)


def stated_wait(headers: Headers, *, wall: float) -> float | None:
    """Return the seconds that ``retry-after-ms`` or ``retry-after`` ask for.

    Parameters
    ----------
    headers : mapping
        Of the response.
    wall : float
        Seconds since the epoch, for a server that gives a date and not its own time.
    """
    milliseconds = number(headers.get("retry-after-ms"))
    if (wait := sane(milliseconds / 1000 if milliseconds else None)) is not None:
        return wait
    stated = headers.get("retry-after")
    if (wait := sane(go_duration(stated))) is not None:
        return wait
    moment = _date(stated)
    if moment is None:
        return None
    # The server's own time, where it gives one: our clock may be wrong by hours.
    sent = _date(headers.get("date"))
    return sane(moment - (wall if sent is None else sent))


def _date(text: str | None) -> float | None:
    """Return seconds since the epoch for an HTTP date."""
    if not text or len(text) > _LONGEST:
        return None
    try:
        moment = parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError, OSError, IndexError):
        return None


def snapshot(headers: Headers, *, at: float, clean: Callable[[str], str] = str) -> LimitSnapshot:
    """Return the limits that the headers tell; a bucket they do not tell is None.

    Source: the ``x-ratelimit-*`` headers of OpenAI's rate limit guide; project-scoped variants are
    named ``x-ratelimit-limit-project-tokens``. Of two, the one with less left is the tightest.

    Parameters
    ----------
    headers : mapping
        Of the response.
    at : float
        The instant at which they arrived.
    clean : callable
        Removes secrets from a text.
    """
    milliseconds = number(headers.get("openai-processing-ms"))
    processing = milliseconds / 1000 if milliseconds is not None else None
    return LimitSnapshot(
        at=at,
        processing=processing if processing is not None and processing <= DAY else None,
        tokens=_tightest(headers, "tokens"),
        requests=_tightest(headers, "requests"),
        organization=shorten(clean(headers.get("openai-organization", "")), 100) or None,
    )


def _tightest(headers: Headers, resource: Resource) -> LimitReading | None:
    scopes = (resource, f"project-{resource}")
    gauges = [g for scope in scopes if (g := _gauge(headers, scope))]
    return min(gauges, key=lambda g: (g.remaining, g.limit), default=None)


def _gauge(headers: Headers, scope: str) -> LimitReading | None:
    limit = number(headers.get(f"x-ratelimit-limit-{scope}"))
    remaining = number(headers.get(f"x-ratelimit-remaining-{scope}"))
    if not limit or remaining is None or limit > LARGEST:
        return None
    full_in = go_duration(headers.get(f"x-ratelimit-reset-{scope}"))
    if full_in is not None and full_in > 31 * DAY:
        full_in = None
    return LimitReading(limit=limit, remaining=min(remaining, limit), full_in=full_in)
