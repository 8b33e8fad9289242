"""What a response says about time and limits, in its headers and in its message. Pure.

Both come from the server: each value is cut, parsed strictly and dropped when it is absurd; every
pattern runs in linear time. Never required: many compatible servers send neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import cast

from nbcodex.errors import shorten
from nbcodex.models import DAY, MINUTE, Limit, LimitReading, LimitSnapshot, Resource

Headers = Mapping[str, str]  # lower-case names; httpx2's own, which ignore case, will do

MAX_LIMIT = 1e15  # larger values are treated as "no limit stated"
MAX_MESSAGE_CHARS = 4000  # of an error message that are searched
_MAX_VALUE_CHARS = 64  # of a header

# Go's time.Duration.String(): "6m0s", "17ms", "8m51.438s".
_GO_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "ns": 1e-9}
_GO_UNITS |= dict.fromkeys(("us", "µs", "μs"), 1e-6)  # two code points look like a mu
_GO_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(h|ms|m|us|µs|μs|ns|s)")

# The phrases are those of OpenAI ("Please try again in 7m12s"), Azure ("Please retry after 37
# seconds"), Groq and servers that imitate them.
_WAIT_START = re.compile(r"(?:again|retry)\s{1,3}(?:in|after)\s{1,3}(?:about\s)?", re.IGNORECASE)
_WAIT_PART = re.compile(
    r"(\d{1,12}(?:\.\d{1,12})?)\s{0,3}"
    r"(milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)"
    r"(?![a-z])(?:,?\s{0,3}(?:and\s)?)",
    re.IGNORECASE,
)
_MODEL = re.compile(
    r"(?:rate limit reached|request too large) for (?:model )?[`'\"]?([\w./:-]{1,100})",
    re.IGNORECASE,
)
_PER_WINDOW = re.compile(
    r"(tokens?|requests?|calls?) per (?:1 )?(second|sec|minute|min|hour|day)\b", re.IGNORECASE
)
_ACRONYM = re.compile(r"\b([TR])P([SMHD])\b")
_RESOURCE = re.compile(r"\b(token|request|call)s? (?:rate )?limit", re.IGNORECASE)
_FIGURE = re.compile(
    r"\b(limit|used|current|requested):?\s{1,3}(\d[\d,]{0,18}(?:\.\d{1,9})?)", re.IGNORECASE
)
_RESOURCES = {"t": "tokens", "r": "requests", "c": "requests"}
_WINDOWS_S = {"s": 1.0, "m": MINUTE, "h": 3600.0, "d": DAY}


# Numbers and durations.


def parse_number(text: str | None) -> float | None:
    """Return a finite number that is not negative; None for anything else."""
    if not text or len(text) > _MAX_VALUE_CHARS:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def parse_duration(text: str | None) -> float | None:
    """Return the seconds of a Go duration, or of a plain number as some servers send it."""
    if not text or len(text) > _MAX_VALUE_CHARS:
        return None
    text = text.strip()
    parts = _GO_PART.findall(text)
    if not parts or "".join(amount + unit for amount, unit in parts) != text:
        return parse_number(text)
    return sum(float(amount) * _GO_UNITS[unit] for amount, unit in parts)


def clamp_wait(seconds: float | None) -> float | None:
    """Return a usable wait: above zero and at most a day; else None.

    A wait of zero or less states nothing: retrying at once would flood the server, so backoff
    decides. More than a day means "long", which a day is.
    """
    if seconds is None or not math.isfinite(seconds) or seconds <= 0:
        return None
    return min(seconds, DAY)


def _parse_date(text: str | None) -> float | None:
    if not text or len(text) > _MAX_VALUE_CHARS:
        return None
    try:
        moment = parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError, OSError, IndexError):
        return None


# Headers.


def is_simulated(headers: Headers) -> bool:
    """Return whether the simulator answers: every response of it has this header."""
    return headers.get("x-nbcodex-simulated") == "true"


def wait_in_headers(headers: Headers, *, wall: float) -> float | None:
    """Return the seconds that ``retry-after-ms`` (Azure) or ``retry-after`` ask for."""
    milliseconds = parse_number(headers.get("retry-after-ms"))
    if (wait := clamp_wait(milliseconds / 1000 if milliseconds else None)) is not None:
        return wait
    stated = headers.get("retry-after")
    if (wait := clamp_wait(parse_duration(stated))) is not None:
        return wait
    moment = _parse_date(stated)
    if moment is None:
        return None
    # The server's own time, where it gives one: our clock may be wrong by hours.
    sent = _parse_date(headers.get("date"))
    return clamp_wait(moment - (wall if sent is None else sent))


def read_snapshot(
    headers: Headers, *, at: float, clean: Callable[[str], str] = str
) -> LimitSnapshot:
    """Return the limits that the headers state; a resource without a limit is None.

    Source: ``x-ratelimit-*`` in OpenAI's guide "Rate limits". Project-scoped variants are named
    ``x-ratelimit-limit-project-tokens``; of two, the one with less remaining is the tightest. `at`
    is the instant at which the headers arrived.
    """
    # The snapshot was taken at admission: this much before the answer arrived.
    milliseconds = parse_number(headers.get("openai-processing-ms"))
    processing = milliseconds / 1000 if milliseconds is not None else None
    return LimitSnapshot(
        at=at,
        processing=processing if processing is not None and processing <= DAY else None,
        tokens=_tightest_reading(headers, "tokens"),
        requests=_tightest_reading(headers, "requests"),
        organization=shorten(clean(headers.get("openai-organization", "")), 100) or None,
    )


def _tightest_reading(headers: Headers, resource: Resource) -> LimitReading | None:
    scopes = (resource, f"project-{resource}")
    readings = [g for scope in scopes if (g := _read_limit(headers, scope))]
    return min(readings, key=lambda g: (g.remaining, g.limit), default=None)


def _read_limit(headers: Headers, scope: str) -> LimitReading | None:
    limit = parse_number(headers.get(f"x-ratelimit-limit-{scope}"))
    remaining = parse_number(headers.get(f"x-ratelimit-remaining-{scope}"))
    # Azure sends -1 or 0 where it states no limit.
    if not limit or remaining is None or limit > MAX_LIMIT:
        return None
    # The reset is the time until the bucket is FULL, not the time to wait.
    full_in = parse_duration(headers.get(f"x-ratelimit-reset-{scope}"))
    if full_in is not None and full_in > 31 * DAY:
        full_in = None
    return LimitReading(limit=limit, remaining=min(remaining, limit), full_in=full_in)


# Messages.


def limit_in_message(message: str, *, kind: str | None = None) -> Limit:
    """Return the limit that an error message names, with the figures that it states.

    For example "Rate limit reached for M in organization O on tokens per min (TPM): Limit 30000,
    Used 22999, Requested 12528." `kind` is the error's ``type``: ``tokens`` or ``requests``.
    """
    text = message[:MAX_MESSAGE_CHARS]
    resource, window = _resource_and_window(text)
    if resource is None and kind in {"tokens", "requests"}:
        resource = cast(Resource, kind)
    # Reversed, so that the first mention of a figure counts.
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


def wait_in_message(message: str) -> float | None:
    """Return the seconds after which a message asks to try again.

    Any mix of hours, minutes, seconds and milliseconds, as letters or as words ("80ms", "7m12s",
    "35 seconds": openai/codex #506).
    """
    text = message[:MAX_MESSAGE_CHARS]
    for start in _WAIT_START.finditer(text):
        if (wait := clamp_wait(_duration_at(text, start.end()))) is not None:
            return wait
    return None


def computed_wait(limit: Limit) -> float | None:
    """Return the seconds after which a request fits again, from the figures of the refusal.

    ``(used + requested - limit) / limit * window``: reproduced nine of nine real messages of
    OpenAI's to within a millisecond.
    """
    if not (limit.limit and limit.window) or limit.used is None or limit.requested is None:
        return None
    return clamp_wait((limit.used + limit.requested - limit.limit) / limit.limit * limit.window)


def _resource_and_window(text: str) -> tuple[Resource | None, float | None]:
    if found := _PER_WINDOW.search(text):
        return _resource(found[1]), _WINDOWS_S[found[2][0].lower()]
    if found := _ACRONYM.search(text):
        return _resource(found[1]), _WINDOWS_S[found[2].lower()]
    found = _RESOURCE.search(text)
    return (_resource(found[1]) if found else None), None


def _resource(word: str) -> Resource:
    return cast(Resource, _RESOURCES[word[0].lower()])


def _figure(text: str) -> float | None:
    value = float(text.replace(",", ""))
    return value if value <= MAX_LIMIT else None


def _duration_at(text: str, position: int) -> float | None:
    total: float | None = None
    for _ in range(5):  # days, hours, minutes, seconds, milliseconds
        part = _WAIT_PART.match(text, position)
        if part is None:
            break
        unit = part[2].lower()
        seconds = 0.001 if unit.startswith(("ms", "milli")) else _WINDOWS_S[unit[0]]
        total = (total or 0.0) + float(part[1]) * seconds
        position = part.end()
    return total if total is None or math.isfinite(total) else None
