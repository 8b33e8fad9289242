"""Reads waits and limits from a response's headers and an error's message. Pure.

Both come from the server: each value is cut, parsed strictly and dropped when it is absurd; every
pattern runs in linear time. Many compatible servers send neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import Any, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from nbcodex.errors import shorten
from nbcodex.models import DAY, MINUTE, Limit, LimitReading, LimitSnapshot, Resource
from nbcodex.openai_api.dialects import WINDOWS_S, WORDS

Headers = Mapping[str, str]  # lower-case names; httpx2's own, which ignore case, will do

MAX_LIMIT = 1e15  # larger values are treated as "no limit stated"
MAX_SEARCHED_CHARS = 4000  # of an error message
_MAX_VALUE_CHARS = 64  # of a header

# Go's time.Duration.String(): "6m0s", "17ms", "8m51.438s".
_GO_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "ns": 1e-9}
_GO_UNITS |= dict.fromkeys(("us", "µs", "μs"), 1e-6)  # two code points look like a mu
_GO_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(h|ms|m|us|µs|μs|ns|s)")

# The phrases are those of OpenAI ("Please try again in 7m12s"), Azure ("Please retry after 37
# seconds"; API Management: "Quota will be replenished in 01:12:34"), Groq, GitHub ("Please wait 12
# seconds before retrying", "upgrade your plan or wait 6 seconds"), gateways ("Retry after: 42",
# "Please wait for 42 seconds", "resets in 42s", "Next request allowed in 42 seconds").
_WAIT_PART = (
    r"(\d{1,12}(?:\.\d{1,12})?)\s{0,3}"
    r"(milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)"
    r"(?![a-z])(?:,?\s{0,3}(?:and\s)?)"
)
_CLOCK_WAIT = re.compile(r"(\d{1,3}):(\d\d):(\d\d)")
_WAIT = re.compile(
    r"(?:(?:again|retry|resets?|allowed|replenished)\s{1,3}(?:in|after)|retry[ _-]after(?=:)|"
    r"\b(?:please|or) wait):?\s{1,3}(?:about\s|for\s|at least\s)?"
    rf"((?:{_WAIT_PART}){{1,5}}|an? (?:minute|hour)\b|one (?:minute|hour)\b"  # days to milliseconds
    rf"|{_CLOCK_WAIT.pattern}|\d{{1,6}}(?!\s{{0,3}}[a-z\d]))",
    re.IGNORECASE,
)
_MODEL = re.compile(
    r"(?:rate limit reached|request too large) for (?!(?:tokens|requests|[rt]p[smhd])\b)"
    r"(?:model )?[`'\"]?([\w./:-]{1,100})",
    re.IGNORECASE,
)
# "tokens per min", "API calls / minute", "tokens. Limit: 150000.000000 / min".
_PER_WINDOW = re.compile(
    r"(tokens?|requests?|calls?|queries|models?)"
    r"(?:[ -]per[ -]| / |\. limit: [\d.]{1,20} / )"
    r"(?:1 )?(second|sec|minute|min|hour|day|week|month)\b",
    re.IGNORECASE,
)
# "daily request limit", "hourly usage limit", "daily free allocation" (Cloudflare).
_PERIOD = re.compile(
    r"\b(hourly|daily|weekly|monthly) (?:\w{1,20} ){0,2}(?:limit|allocation)", re.IGNORECASE
)
# Anthropic: "rate limit for your organization of 20,000 input tokens per minute", Together: "rate
# limit for this model is 9.0 queries per minute". A dot in between belongs to a name.
_RATE = re.compile(
    r"\blimit (?:for (?:[^.]|\.\S){1,99}? )?(?:of|is) (\d[\d,]{0,18}(?:\.\d{1,9})?) (?:\w{1,20} )?"
    + _PER_WINDOW.pattern,
    re.IGNORECASE,
)
_ACRONYM = re.compile(r"\b([TR])P([SMHD])\b")  # "TPM"
_RESOURCE = re.compile(r"\b(token|request|call)s? (?:rate )?limit", re.IGNORECASE)
# "Limit 30000", "Used: 22,999", "limited to 10", "Requested ~12903".
_FIGURE = re.compile(
    r"\b(limit|used|current|requested)(?:ed to|):?\s{1,3}~?(\d[\d,]{0,18}(?:\.\d{1,9})?)",
    re.IGNORECASE,
)
# By the first letter of the word; OpenRouter's "free-models-per-day" counts requests.
_RESOURCES = {"t": "tokens", **dict.fromkeys("rcqm", "requests")}

# LiteLLM: "current rpm: 1, rpm limit: 15, current tpm: 12260, tpm limit: 5000" (litellm #13898) and
# "Limit type: requests. Current limit: 3, Remaining: 0. Limit resets at: 2026-11-30 08:00:00 UTC".
_CURRENT = re.compile(r"\bcurrent ([rt])p([smhd]): (\d{1,15})", re.IGNORECASE)
_CURRENT_LIMIT = re.compile(r"\b([rt])p([smhd]) limit: (\d{1,15})", re.IGNORECASE)
_LIMIT_TYPE = re.compile(r"\blimit type: (tokens|requests)\b", re.IGNORECASE)
# LiteLLM: "Limit type: max_parallel_requests. Current limit: 1, Remaining: 0", Moonshot: "request
# reached organization max concurrency: 1", others: "Too many concurrent requests (limit 2)".
_PARALLEL = re.compile(
    r"\b(?:limit type: max_parallel_requests|max parallel request|max concurrency|"
    r"too many (?:parallel|concurrent)|(?:parallel|concurrent) requests? limit|concurrency limit|"
    r"(?:limit of|maximum(?: number)? of) (?:\d{1,6} )?(?:parallel|concurrent))\b",
    re.IGNORECASE,
)
# LiteLLM's message for all limits: "... rpm limit: 15, ... max_parallel_requests: 40".
_MAX_PARALLEL = re.compile(r"\bmax_parallel_requests: (\d{1,6})\b", re.IGNORECASE)
_PARALLEL_COUNT = re.compile(
    r"\b(?:limit|concurrency|maximum)(?: of|:)? (\d{1,6})\b", re.IGNORECASE
)
_RESETS_AT = re.compile(
    r"\b(?:(resets|again)|your limit will reset) at:? ([\dT:. +Z-]{10,40})", re.IGNORECASE
)
_GLM_UTC_OFFSET_S = 8 * 3600.0  # of the dates in GLM's messages: "Your limit will reset at ..."
# Google: "Quota exceeded for metric: x/free_tier_requests, limit: 0, model: m", and the id
# "GenerateRequestsPerDayPerProjectPerModel-FreeTier".
_METRIC = re.compile(r"\bmetric: [\w./-]{0,200}?(request|token)", re.IGNORECASE)
_QUOTA_ID = re.compile(r"(request|token)[a-z]{0,20}?per(second|minute|hour|day)", re.IGNORECASE)

# GitHub Models: "Rate limit of 15 per 60s exceeded for UserByModelByMinute", also "…InputTokens".
_LIMIT_OF = re.compile(
    r"\brate limit of (\d{1,12}) per (\d{1,9})s\b(?:[ \w]{1,99}(tokens)\b)?", re.IGNORECASE
)
# Moonshot: "request reached organization max RPM: 3".
_MAX_LIMIT = re.compile(r"\bmax ([RT])P([SMHD]): (\d{1,12})")

_COUNTED_WORD = re.compile(r"\b(\d{0,6})-?([a-z]+)\b")  # "5-minute" in a header's name
_POLICY_PART = re.compile(r"([a-z]+)=(\d{1,15})")  # "w=300"
_EPOCH_S, _EPOCH_MS = 1e9, 1e12  # larger numbers are instants, not durations


def parse_number(text: str | None) -> float | None:
    """Return a finite number that is not negative; None for anything else."""
    if not text or len(text) > _MAX_VALUE_CHARS:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def parse_go_duration(text: str | None) -> float | None:
    """Return the seconds of a Go duration, or of a plain number as some servers send it."""
    if not text or len(text) > _MAX_VALUE_CHARS:
        return None
    text = text.strip()
    parts = _GO_PART.findall(text)
    if not parts or "".join(amount + unit for amount, unit in parts) != text:
        return parse_number(text)
    return sum(float(amount) * _GO_UNITS[unit] for amount, unit in parts)


def clamp_wait(seconds: float | None) -> float | None:
    """Return a usable wait: above zero and at most a day; else None."""
    # To retry at once would flood the server, so that backoff decides where no time is left. More
    # than a day means "long", which a day is.
    if seconds is None or not math.isfinite(seconds) or seconds <= 0:
        return None
    return min(seconds, DAY)


def _parse_date(text: str | None) -> float | None:
    if not text or len(text) > _MAX_VALUE_CHARS:
        return None
    for parse in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            moment = parse(text.strip().replace(" UTC", "Z"))
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, TypeError, OverflowError, OSError, IndexError):
            continue
    return None


def parse_reset(text: str | None, now: float) -> float | None:
    """Return the seconds until a reset: a duration, an epoch in s or ms, an ISO or HTTP date."""
    seconds = parse_go_duration(text)
    if seconds is None:
        moment = _parse_date(text)
        return None if moment is None else max(0.0, moment - now)
    if seconds >= _EPOCH_S:
        seconds = max(0.0, seconds / (1000 if seconds >= _EPOCH_MS else 1) - now)
    return seconds


def wait_in_headers(headers: Headers, *, wall: float) -> float | None:
    """Return the seconds to wait by ``retry-after-ms`` (Azure) or ``retry-after``."""
    milliseconds = parse_number(headers.get("retry-after-ms"))
    if wait := clamp_wait(milliseconds / 1000 if milliseconds else None):
        return wait
    stated, now = headers.get("retry-after", "")[:_MAX_VALUE_CHARS], _server_time(headers, wall)
    # A gateway may send it twice ("60, 60"), or in words ("30 seconds").
    seconds = parse_reset(stated, now) or parse_reset(stated.partition(",")[0], now)
    return clamp_wait(seconds) or wait_in_message(f"retry after {stated}")


def _server_time(headers: Headers, wall: float) -> float:
    # The server's own time, where it gives one: our clock may be wrong by hours.
    sent = _parse_date(headers.get("date"))
    return wall if sent is None else sent


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


def header_limits(headers: Headers, *, wall: float) -> list[HeaderLimit]:
    """Return the limits that headers state, in any of the forms that servers use."""
    now = _server_time(headers, wall)
    limits: dict[tuple[object, ...], HeaderLimit] = {}
    for name, value in headers.items():
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
        kinds = [word for word in words if word in WORDS["header_resources"]]
        resource = _resource(kinds[0]) if kinds else None
        # The window is named like ``minute``, ``1h`` or ``5-minute``.
        counted = _COUNTED_WORD.findall("-".join(words))
        windows = [float(n or 1) * WINDOWS_S[word] for n, word in counted if word in WINDOWS_S]
        window = windows[0] if windows else None
        scope = tuple(word for word in words if word not in kinds)
        key = (resource, window, *scope)
        limit = limits.setdefault(key, HeaderLimit(resource, window, scope))
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
        limit = limits.setdefault(("policy", policy), HeaderLimit(None, None))
        for name, figure in _POLICY_PART.findall(item):
            if (member := names.get(name, name)) in HeaderLimit.__slots__:
                setattr(limit, member, float(figure))


def read_snapshot(
    headers: Headers, *, at: float, clean: Callable[[str], str] = str
) -> LimitSnapshot:
    """Return the limits that the headers state, which arrived at the instant `at`."""
    # Source: ``x-ratelimit-*`` in OpenAI's guide "Rate limits", and the headers of other providers.
    stated = header_limits(headers, wall=0.0)
    # The snapshot was taken at admission: this much before the answer arrived.
    milliseconds = parse_number(headers.get("openai-processing-ms"))
    processing = milliseconds / 1000 if milliseconds is not None else None
    return LimitSnapshot(
        at=at,
        processing=processing if processing is not None and processing <= DAY else None,
        tokens=_tightest_reading(stated, "tokens"),
        requests=_tightest_reading(stated, "requests"),
        organization=shorten(clean(headers.get("openai-organization", "")), 100) or None,
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
        # The reset is the time until the bucket is FULL, not the time to wait. That of a fixed
        # window says nothing about a rate.
        is_plausible = each.window is None and (each.reset_in or 0.0) <= 31 * DAY
        full_in = each.reset_in if is_plausible else None
        readings.append(LimitReading(limit=limit, remaining=min(remaining, limit), full_in=full_in))
    return min(readings, key=lambda reading: (reading.remaining, reading.limit), default=None)


def limit_in_message(message: str, *, kind: str | None = None) -> Limit:
    """Return the limit that a message names, with its figures; `kind` is the error's ``type``."""
    # "Rate limit reached for M in organization O on tokens per min (TPM): Limit 30000, Used 22999,
    # Requested 12528."
    text = message[:MAX_SEARCHED_CHARS]
    resource: Resource | None = None
    window = None
    if found := _PER_WINDOW.search(text) or _ACRONYM.search(text):
        resource, window = _resource(found[1]), WINDOWS_S[found[2].lower()]
    elif found := _RESOURCE.search(text) or _METRIC.search(text):
        resource = _resource(found[1])
    elif kind in {"tokens", "requests"}:
        resource = cast(Resource, kind)
    if window is None and (found := _PERIOD.search(text)):
        window = WINDOWS_S[found[1].lower()]
    # Reversed, so that the first mention of a figure counts.
    figures = {name.lower(): _figure(value) for name, value in reversed(_FIGURE.findall(text))}
    if found := _RATE.search(text):
        figures.setdefault("limit", _figure(found[1]))
    found = _MODEL.search(text)
    model = shorten(found[1].rstrip("."), 100) if found else None
    if limit := _limit_in_other_words(text):
        return replace(limit, model=model)
    return Limit(
        resource=resource,
        window=window,
        limit=figures.get("limit"),
        used=figures.get("used", figures.get("current")),
        requested=figures.get("requested"),
        model=model,
    )


def _limit_in_other_words(text: str) -> Limit | None:
    """Return the limit that LiteLLM, GitHub Models, Moonshot or others state in other words."""
    if found := _LIMIT_OF.search(text):
        resource = _resource(found[3] or "requests")
        return Limit(resource=resource, window=float(found[2]), limit=float(found[1]))
    if found := _MAX_LIMIT.search(text):
        window = WINDOWS_S[found[2].lower()]
        return Limit(resource=_resource(found[1]), window=window, limit=float(found[3]))
    if found := _LIMIT_TYPE.search(text):
        bound = _FIGURE.search(text, found.end())
        return Limit(resource=_resource(found[1]), limit=_figure(bound[2]) if bound else None)
    limits = {(r.lower(), w.lower()): float(n) for r, w, n in _CURRENT_LIMIT.findall(text)}
    for kind, unit, used in _CURRENT.findall(text):
        limit, window = limits.get((kind.lower(), unit.lower())), WINDOWS_S[unit.lower()]
        if limit is not None and float(used) >= limit:
            return Limit(resource=_resource(kind), window=window, limit=limit, used=float(used))
    if _PARALLEL.search(text):
        count = _MAX_PARALLEL.search(text) or _PARALLEL_COUNT.search(text)
        return Limit(resource="parallel requests", limit=float(count[1]) if count else None)
    return None


def limit_in_google_details(details: object) -> tuple[Limit | None, float | None]:
    """Return the limit with the longest window, and the wait, in ``details`` of Google's errors."""
    # Source: google.rpc.QuotaFailure and google.rpc.RetryInfo, as Gemini's compatible endpoint
    # sends them (aider #3694).
    limits: list[Limit] = []
    wait = None
    for detail in _objects(details):
        if isinstance(delay := detail.get("retryDelay"), str):
            wait = clamp_wait(parse_go_duration(delay))
        for violation in _objects(detail.get("violations")):
            quota = f"{violation.get('quotaId')} {violation.get('quotaMetric')}"[:400]
            named = _QUOTA_ID.search(quota)
            limits.append(
                Limit(
                    resource=_resource(named[1]) if named else None,
                    window=WINDOWS_S[named[2].lower()] if named else None,
                    limit=parse_number(str(violation.get("quotaValue"))),
                )
            )
    return max(limits, key=lambda limit: limit.window or 0.0, default=None), wait


def seconds_to_pacific_midnight(wall: float) -> float:
    """Return the wait for Google's daily limits, which reset at midnight Pacific time."""
    # Source: Gemini's guide "Rate limits". Its refusals state a wait of seconds at any hour.
    try:
        zone: Any = ZoneInfo("America/Los_Angeles")
    except ZoneInfoNotFoundError:  # Windows without tzdata; an hour late in summer
        zone = timezone(timedelta(hours=-8))
    now = datetime.fromtimestamp(wall, zone)
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight.timestamp() - wall


def wait_in_message(message: str, *, wall: float = 0.0) -> float | None:
    """Return the seconds after which a message asks to try again, in any mix of units."""
    # Letters and words: "80ms", "7m12s", "35 seconds" (openai/codex #506).
    text = message[:MAX_SEARCHED_CHARS]
    for phrase in _WAIT.finditer(text):
        stated = re.sub("^(an?|one) ", "1 ", phrase[1].lower())
        seconds = 0.0
        for amount, unit in re.findall(_WAIT_PART, stated):
            per_unit = 0.001 if unit.startswith(("ms", "milli")) else WINDOWS_S[unit[0]]
            seconds += float(amount) * per_unit
        if clock := _CLOCK_WAIT.match(stated):
            seconds = int(clock[1]) * 3600.0 + int(clock[2]) * 60.0 + int(clock[3])
        if (wait := clamp_wait(seconds or parse_number(stated))) is not None:
            return wait
    found = _RESETS_AT.search(text) if wall else None
    moment = _parse_date(found[2].strip(" .")) if found else None
    if found is None or moment is None:
        return None
    return clamp_wait(moment - wall - (0.0 if found[1] else _GLM_UTC_OFFSET_S))


def computed_wait(limit: Limit) -> float | None:
    """Return the seconds after which a request fits again, from the figures of the refusal."""
    if not (limit.limit and limit.window) or limit.used is None or limit.requested is None:
        return None
    # This reproduced nine of nine real messages of OpenAI's to within a millisecond.
    return clamp_wait((limit.used + limit.requested - limit.limit) / limit.limit * limit.window)


def _resource(word: str) -> Resource:
    return cast(Resource, _RESOURCES[word[0].lower()])


def _figure(text: str) -> float | None:
    value = float(text.replace(",", ""))
    return value if value <= MAX_LIMIT else None


def _objects(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
