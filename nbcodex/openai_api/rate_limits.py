"""Reads waits and limits from a response's headers and an error's message. Pure.

Both come from the server: each value is cut, parsed strictly and dropped when it is absurd; every
pattern runs in linear time. Many compatible servers send neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from email.utils import parsedate_to_datetime
from typing import Any, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from nbcodex.errors import shorten
from nbcodex.models import DAY, MINUTE, Limit, LimitReading, LimitSnapshot, Resource
from nbcodex.openai_api.dialects import RESOURCES, UNITS_S, WORDS, has_phrase

Headers = Mapping[str, str]  # lower-case names; those of httpx2, openai's HTTP library, fit too

MAX_LIMIT = 1e15  # larger values are treated as "no limit stated"
MAX_SEARCHED_CHARS = 4000  # of an error message
MAX_WAIT_S = 366 * DAY  # for absurd values: GitHub states waits of weeks
_MAX_VALUE_CHARS = 64  # of a header

# Go's time.Duration.String() ("6m0s", "17ms", "8m51.438s"), and words ("1 minute and 20 seconds").
_DURATION_PART = rf"(\d{{1,12}}(?:\.\d{{0,12}})?|\.\d{{1,12}}) ?({'|'.join(UNITS_S)})(?![a-zµμ])"
_DURATION = rf"{_DURATION_PART}(?:,? ?(?:and )?{_DURATION_PART}){{0,4}}"  # days to milliseconds
# The clocks of .NET ("5.03:23:11") and Python ("5 days, 3:23:11"), and ISO 8601's "P5DT23H".
_CLOCK = r"(?:(\d{1,3})(?:\.| days?,? ))?(\d{1,3}):(\d\d):(\d\d(?:\.\d{1,9})?)"
_ISO_DURATION = r"P(?=T?\d)(?:\d{1,6}[WD]){0,2}(?:T(?:\d{1,9}(?:\.\d{1,9})?[HMS]){0,3})?"
_RANGE_START = r"(?:\d{1,3} ?(?:[-\u2013]|to) ?)?"  # "5-10 minutes": the longer wait counts
# Neither a part of a date, a time of day or a larger number, nor a number before another word.
_PLAIN_NUMBER = r"\d{1,6}(?:\.\d{1,6})?(?![-/:.,\u2013]?\d|[ -]?[a-z])"
_WAIT = re.compile(
    rf"(?:{'|'.join(WORDS['wait_phrases'])}):? (?:about |for |at least )?{_RANGE_START}"
    rf"({_CLOCK}(?! ?[a-z])|{_DURATION}|{_ISO_DURATION}\b|(?:an?|one) (?:minute|hour)\b|"
    rf"{_PLAIN_NUMBER})",
    re.IGNORECASE,
)
# "Sep 9th, 2026 3:07 PM", "9 September 2026 at 15:07 UTC", "2026-09-09 at 00:00 UTC".
_TIME = r"\d{1,2}:\d\d(?::\d\d)?(?: ?[AP]M\b)?(?: (?:UTC|GMT)\b)?"
_DATE = r"(?:(?:[a-z]{3,9} \d{1,2}|\d{1,2} [a-z]{3,9})[\w, ]{0,12}?|\d{4}-\d\d-\d\d at) " + _TIME
_RESETS_AT = re.compile(
    rf"(?:{'|'.join(WORDS['reset_phrases'])})({_DATE}|[\dT:. +Z-]{{10,40}})",
    re.IGNORECASE,
)
_TIME_12_H = re.compile(r"\b(\d{1,2})(:[\d:]{2,5}) ?([ap])m\b", re.IGNORECASE)
_DATE_FILLING = re.compile(r"(?<=\d)(?:st|nd|rd|th)\b|\bat ", re.IGNORECASE)
_CHINA = timezone(timedelta(hours=8))

_COUNTED_WORD = re.compile(r"\b(\d{0,6})-?([a-z]+)\b")  # "5-minute" in a header's name
_NOUN = re.compile(r"[a-z]{2,}[^s]s")  # in the plural: "images"
_POLICY_PART = re.compile(r"([a-z]+)=(\d{1,15})")  # "w=300"
_EPOCH_S, _EPOCH_MS = 1e9, 1e12  # larger numbers are instants in s or ms, not durations


def parse_number(value: object) -> float | None:
    """Return a finite number that is not negative, of a number or a text; else None."""
    text = str(value) if isinstance(value, int | float | str) else ""
    try:
        number = float(text) if len(text) <= _MAX_VALUE_CHARS else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def parse_duration(text: str | None) -> float | None:
    """Return the seconds of a duration: with units, a clock, ISO 8601's, or a plain number."""
    if not text or len(text) > _MAX_VALUE_CHARS:
        return None
    text = text.strip().lower()
    if clock := re.fullmatch(_CLOCK, text):
        hours = int(clock[1] or 0) * 24.0 + int(clock[2])
        return hours * 3600.0 + int(clock[3]) * 60.0 + float(clock[4])
    if re.fullmatch(_ISO_DURATION, text, re.IGNORECASE):
        text = re.sub("[pt]", "", text)
    if re.fullmatch(_DURATION, text):
        return sum(float(n) * UNITS_S[unit] for n, unit in re.findall(_DURATION_PART, text))
    return parse_number(text)


def clamp_wait(seconds: float | None) -> float | None:
    """Return a usable wait: above zero and at most `MAX_WAIT_S`; else None."""
    # None lets the backoff decide: to retry at once would flood the server.
    return min(seconds, MAX_WAIT_S) if seconds and 0 < seconds < math.inf else None


def _parse_date(text: str | None, default_zone: tzinfo | None = UTC) -> float | None:
    if not text or len(text) > _MAX_VALUE_CHARS:
        return None
    text = _DATE_FILLING.sub("", text.strip())
    text = _TIME_12_H.sub(lambda t: f"{int(t[1]) % 12 + 12 * (t[3] in 'pP'):02}{t[2]}", text)
    for parse, utc in ((parsedate_to_datetime, " GMT"), (datetime.fromisoformat, "Z")):
        try:
            moment = parse(text.replace(" UTC", utc))
            return moment.replace(tzinfo=moment.tzinfo or default_zone).timestamp()
        except (ValueError, TypeError, OverflowError, OSError, IndexError):
            continue
    return None


def parse_reset(text: str | None, now: float) -> float | None:
    """Return the seconds until a reset: a duration, an epoch in s or ms, an ISO or HTTP date."""
    seconds = parse_duration(text)
    moment = _parse_date(text) if seconds is None else None
    if seconds is not None and seconds >= _EPOCH_S:
        moment = seconds / (1000 if seconds >= _EPOCH_MS else 1)
    return seconds if moment is None else max(0.0, moment - now)


def wait_in_headers(headers: Headers, *, wall_time: float) -> float | None:
    """Return the seconds to wait by ``retry-after-ms`` (Azure) or ``retry-after``."""
    milliseconds = parse_number(headers.get("retry-after-ms"))
    now = _server_time(headers, wall_time)
    stated = headers.get("retry-after", "")[:_MAX_VALUE_CHARS]
    # A gateway may send it twice ("60, 60"), or in words ("30 seconds").
    seconds = parse_reset(stated, now) or parse_reset(stated.partition(",")[0], now)
    return clamp_wait(milliseconds / 1000 if milliseconds else seconds)


def _server_time(headers: Headers, wall_time: float) -> float:
    # The server's own time, where it gives one: our clock may be wrong by hours.
    sent = _parse_date(headers.get("date"))
    return wall_time if sent is None else sent


@dataclass(slots=True)
class HeaderLimit:
    """One limit as headers state it."""

    resource: Resource | None
    window: float | None
    scope: tuple[str, ...] = ()  # further words of the name, such as ``project`` or ``input``
    limit: float | None = None
    remaining: float | None = None
    reset_in: float | None = None

    @property
    def is_exhausted(self) -> bool:
        """Whether it can be what refused the request: nothing, or next to nothing, remains."""
        if self.remaining is None:
            return self.reset_in is not None
        return self.remaining < 1 or (self.limit is not None and self.remaining < self.limit / 20)


def header_limits(headers: Headers, *, wall_time: float) -> list[HeaderLimit]:
    """Return the limits that headers state, in any of the forms that servers use."""
    now = _server_time(headers, wall_time)
    limits: dict[tuple[object, ...], HeaderLimit] = {}
    for name, value in headers.items():
        # Mistral's ``ratelimitbysize-limit`` counts tokens.
        lower = name.lower().replace("rate-limit", "ratelimit").replace("bysize", "-tokens")
        if "ratelimit" not in lower or len(lower) > 100:
            continue
        if lower in ("ratelimit", "ratelimit-policy"):
            _read_structured_field(value[:1000], limits)
            continue
        words = lower.split("-")
        words = words[words.index("ratelimit") + 1 :] if "ratelimit" in words else []
        figure = next((word for word in words if word in WORDS["header_figures"]), None)
        if figure is None:
            continue
        words.remove(figure)
        nouns = {word for word in words if _NOUN.fullmatch(word) and word not in UNITS_S}
        counted = [word for word in words if word in {*nouns, *WORDS["header_resources"]}]
        resource = _resource(counted[0]) if counted else None
        # The window is named like ``minute``, ``1h`` or ``5-minute``.
        units = _COUNTED_WORD.findall("-".join(words))
        # Shorter words of the table, such as "us", have another meaning here.
        windows = [float(n or 1) * UNITS_S[w] for n, w in units if UNITS_S.get(w, 0.0) >= 1.0]
        window = windows[0] if windows else None
        scope = tuple(word for word in words if word not in counted)
        limit = limits.setdefault((resource, window, *scope), HeaderLimit(resource, window, scope))
        if figure == "reset":
            limit.reset_in = parse_reset(value, now)
        elif figure == "status":  # Anthropic: "rejected", or "allowed"
            limit.remaining = math.inf if value.startswith("allowed") else 0.0
        elif figure in ("limit", "remaining"):
            # Kong and older IETF drafts append the policy: "10, 10;w=60".
            setattr(limit, figure, parse_number(value.split(",")[0].split(";")[0].strip()))
    return list(limits.values())


def _read_structured_field(value: str, limits: dict[tuple[object, ...], HeaderLimit]) -> None:
    # draft-ietf-httpapi-ratelimit-headers: `"api";r=0;t=55` with the policy `"api";q=500;w=300`; an
    # older draft: `limit=100, remaining=0, reset=9`.
    names = {"r": "remaining", "t": "reset_in", "q": "limit", "w": "window", "reset": "reset_in"}
    for item in value.split(",") if ";" in value else [value]:
        policy = item.partition(";")[0].strip() if ";" in item else ""
        limit = limits.setdefault(("policy", policy), HeaderLimit(resource=None, window=None))
        for name, figure in _POLICY_PART.findall(item):
            if (member := names.get(name, name)) in HeaderLimit.__slots__:
                setattr(limit, member, float(figure))


def read_snapshot(headers: Headers, *, at: float) -> LimitSnapshot:
    """Return the limits that the headers state, which arrived at the instant `at`."""
    # Source: ``x-ratelimit-*`` in OpenAI's guide "Rate limits", and the headers of other providers.
    # Without a `date` header, a reset that is stated as a date is so far away that it is dropped.
    stated = header_limits(headers, wall_time=0.0)
    # The server read the limits at admission: these milliseconds before the headers arrived.
    milliseconds = parse_number(headers.get("openai-processing-ms"))
    processing = None if milliseconds is None or milliseconds > DAY * 1e3 else milliseconds / 1e3
    return LimitSnapshot(
        at=at,
        processing=processing,
        tokens=_tightest_reading(stated, "tokens"),
        requests=_tightest_reading(stated, "requests"),
    )


def _tightest_reading(stated: list[HeaderLimit], resource: Resource) -> LimitReading | None:
    readings = []
    for each in stated:
        limit, remaining = each.limit, each.remaining
        # A window in the name is a fixed one (Cerebras, Mistral). Longer ones than a minute, and
        # limits on input or output alone (Anthropic), are learned from their refusals.
        is_read = each.resource == resource and each.window in (None, MINUTE)
        is_read = is_read and not {"input", "output"}.intersection(each.scope)
        # Azure sends -1 or 0 where it states no limit.
        if not is_read or not limit or remaining is None or limit > MAX_LIMIT:
            continue
        # The reset is when the bucket is FULL, not a wait; a fixed window's says nothing of rates.
        is_plausible = each.window is None and (each.reset_in or 0.0) <= 31 * DAY
        full_in = each.reset_in if is_plausible else None
        readings.append(LimitReading(limit=limit, remaining=min(remaining, limit), full_in=full_in))
    return min(readings, key=lambda reading: (reading.remaining, reading.limit), default=None)


def _resource(noun: str) -> Resource:
    """Return what a noun counts ("input_tokens" are tokens), or the noun itself, to be shown."""
    return RESOURCES.get(re.split("[-_]", noun)[-1], cast("Resource", noun))


def limit_in_message(message: str, *, error_type: str = "") -> Limit:
    """Return the limit that a message names, with its figures; OpenAI's type names a resource."""
    # "Rate limit reached for M on tokens per min (TPM): Limit 30000, Used 22999, Requested 12528."
    stated: dict[str, str] = {}
    # The patterns are compiled at the first refusal, not at import: that takes 20 ms.
    for pattern in WORDS["limit_patterns"]:
        for match in re.finditer(pattern, message[:MAX_SEARCHED_CHARS], re.IGNORECASE):
            groups = {name: text for name, text in match.groupdict().items() if text}
            # LiteLLM and DIAL list all limits: one not used up or absurdly large did not refuse it.
            used, bound = _figure(groups.get("used")) or 0.0, _figure(groups.get("limit"))
            if not {"used", "limit"} <= groups.keys() or (bound is not None and used >= bound):
                stated = groups | stated
    window, noun = stated.get("window", "").lower(), stated.get("resource", "").lower()
    limit = Limit(
        resource=_resource(noun) if noun else RESOURCES.get(error_type.lower()),
        window=UNITS_S.get(window) or parse_duration(window.replace("-", " ")),
        limit=_figure(stated.get("limit")),
        used=_figure(stated.get("used")),
        requested=_figure(stated.get("requested")),
        model=shorten(stated.get("model", "").rstrip("."), 100) or None,
    )
    if limit.resource == "parallel requests":  # the other figures are about a rate
        return Limit(resource=limit.resource, limit=_figure(stated.get("slots")), model=limit.model)
    return limit


def limit_in_google_details(details: list[dict[str, Any]]) -> Limit | None:
    """Return the limit with the longest window in ``details`` of Google's errors."""
    # Source: google.rpc.QuotaFailure; Gemini's compatible endpoint sends it (Aider-AI/aider#3694).
    limits: list[Limit] = []
    for detail in details:
        for violation in dicts_in(detail.get("violations")):
            quota = f"{violation.get('quotaId')} {violation.get('quotaMetric')}"[:400]
            value = parse_number(violation.get("quotaValue"))
            limits.append(replace(limit_in_message(quota), limit=value))
    return max(limits, key=lambda limit: limit.window or 0.0, default=None)


def seconds_to_pacific_midnight(wall_time: float) -> float:
    """Return the wait for Google's daily limits, which reset at midnight Pacific time."""
    # Source: Gemini's guide "Rate limits". Its refusals state a wait of seconds at any hour.
    try:
        zone: Any = ZoneInfo("America/Los_Angeles")
    except ZoneInfoNotFoundError:  # Windows without tzdata; an hour late in summer
        zone = timezone(timedelta(hours=-8))
    now = datetime.fromtimestamp(wall_time, zone)
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight.timestamp() - wall_time


def wait_in_message(message: str, *, wall_time: float | None = None) -> float | None:
    """Return the wait that a message asks for; dates are read only if `wall_time` is given."""
    text = message[:MAX_SEARCHED_CHARS]
    for phrase in _WAIT.finditer(text):
        stated = re.sub("^(an?|one) ", "1 ", phrase[1].lower())
        if (wait := clamp_wait(parse_duration(stated))) is not None:
            return wait
    found = _RESETS_AT.search(text)
    if found is None or wall_time is None:
        return None
    # Without a zone, the first reading (None: local) counts that is ahead, in the named window.
    is_china_time = has_phrase(text.lower(), "china_time_phrases")
    zones = (_CHINA, UTC, None) if is_china_time else (UTC, None, _CHINA)
    waits = [(_parse_date(found[1].strip(" ."), zone) or 0.0) - wall_time for zone in zones]
    longest = (limit_in_message(text).window or math.inf) + MINUTE  # clocks differ
    return clamp_wait(([w for w in waits if -MINUTE < w <= longest] or waits)[0])


def computed_wait(limit: Limit) -> float | None:
    """Return the seconds after which a request fits again, from the figures of the refusal."""
    if not (limit.limit and limit.window) or limit.used is None or limit.requested is None:
        return None
    # This reproduced nine of nine real messages of OpenAI's to within a millisecond.
    return clamp_wait((limit.used + limit.requested - limit.limit) / limit.limit * limit.window)


def _figure(text: str | None) -> float | None:
    value = parse_number(text and text.replace(",", "").rstrip("."))
    return value if value is not None and value <= MAX_LIMIT else None


def dicts_in(value: object) -> list[dict[str, Any]]:
    """Return the objects in a value that should be a list of them."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
