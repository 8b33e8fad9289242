"""The headers of the server's responses. Must not know bodies."""

from __future__ import annotations

import math

from nbcodex.models import DAY, MINUTE
from nbcodex.simulator.buckets import Account, Bucket
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.refusals import go_duration

SIMULATED = "x-nbcodex-simulated"
EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
JSON = {"content-type": "application/json"}
BINARY = {"content-type": "application/octet-stream"}
HTML = {"content-type": "text/html"}
ABSURD = {
    "x-ratelimit-limit-tokens": "1e999",
    "x-ratelimit-remaining-tokens": "-1",
    "x-ratelimit-reset-tokens": "NaN",
    "x-ratelimit-limit-requests": "0",
    "x-ratelimit-remaining-requests": "many",
    "x-ratelimit-reset-requests": "-5d",
    "openai-processing-ms": "soon",
    "retry-after": "99999999999999999999",
    "x-request-id": "req_" + "x" * 8_192,
}


def common(request_id: str, knobs: Knobs) -> dict[str, str]:
    """Return what every response carries."""
    return {
        SIMULATED: "true",
        "x-request-id": request_id,
        "openai-version": "2020-10-01",
        "openai-organization": knobs.organization,
    }


def limits(account: Account, now: float) -> dict[str, str]:
    """Return the account's limits as they are now; hidden windows are in no header."""
    headers: dict[str, str] = {}
    for name, buckets in (("requests", account.requests), ("tokens", account.tokens)):
        bucket = buckets.get(MINUTE) or buckets.get(DAY)
        if bucket is not None:
            headers |= _gauge(name, bucket, now)
    return headers


def processing(seconds: float) -> dict[str, str]:
    """Return how long the server worked before it answered."""
    return {"openai-processing-ms": str(max(1, round(seconds * 1000)))}


def without_empty(headers: dict[str, str]) -> dict[str, str]:
    """Return `headers` without those that a fault has taken away."""
    return {name: value for name, value in headers.items() if value}


def _gauge(name: str, bucket: Bucket, now: float) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{name}": str(int(bucket.limit)),
        f"x-ratelimit-remaining-{name}": str(max(0, math.floor(bucket.level_at(now) + 1e-6))),
        f"x-ratelimit-reset-{name}": go_duration(bucket.full_in(now)),
    }
