"""Assembles HTTP responses: status, headers and body. Does not decide what is answered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nbcodex.models import DAY, MINUTE
from nbcodex.simulator.buckets import Account, Bucket
from nbcodex.simulator.delivery import ResponseBody, single_chunk
from nbcodex.simulator.error_responses import ErrorResponse, go_duration, retry_headers
from nbcodex.simulator.faults import Fault
from nbcodex.simulator.generation import encode_json
from nbcodex.simulator.knobs import Knobs


@dataclass(slots=True)
class HttpResponse:
    """An HTTP response."""

    status: int  # the status
    headers: dict[str, str]  # headers by lower-case name
    # The bytes, to be iterated over once and closed. Iterating raises `Dropped` where the
    # connection is to end.
    body: ResponseBody


def json_response(data: Any, common: dict[str, str]) -> HttpResponse:
    """Return a 200 response with `data` as JSON."""
    encoded = encode_json(data)
    size = {"content-length": str(len(encoded))}
    return HttpResponse(200, common | JSON_HEADERS | size, ResponseBody(single_chunk(encoded)))


def error_response(failure: ErrorResponse, common: dict[str, str]) -> HttpResponse:
    """Return the response for `failure`; gateway pages carry no API headers."""
    if failure.html:
        data = failure.html.encode()
        given = {SIMULATED_HEADER: "true"} | HTML_HEADERS
    else:
        data = encode_json({"error": failure.body})
        given = common | JSON_HEADERS
    given |= failure.headers | {"content-length": str(len(data))}
    return HttpResponse(failure.status, without_empty(given), ResponseBody(single_chunk(data)))


def success_response(
    given: dict[str, str], body: ResponseBody, *, fault: Fault | None, wall: float
) -> HttpResponse:
    """Return a 200 response with the headers `given`, changed as the fault requires."""
    match fault:
        case Fault(kind="absurd_headers"):
            given = given | ABSURD_HEADERS
        case Fault(kind="azure_failed"):
            given = given | retry_headers(fault.wait, "seconds", wall)
    extra = dict(fault.headers) if fault else {}
    return HttpResponse(200, without_empty(given | extra), body)


SIMULATED_HEADER = "x-nbcodex-simulated"
EVENT_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
}
JSON_HEADERS = {"content-type": "application/json"}
BINARY_HEADERS = {"content-type": "application/octet-stream"}
HTML_HEADERS = {"content-type": "text/html"}
ABSURD_HEADERS = {
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


def common_headers(request_id: str, knobs: Knobs) -> dict[str, str]:
    """Return the headers of every response."""
    return {
        SIMULATED_HEADER: "true",
        "x-request-id": request_id,
        "openai-version": "2020-10-01",
        "openai-organization": knobs.organization,
    }


def limit_headers(account: Account, now: float) -> dict[str, str]:
    """Return the account's current limits; hidden windows appear in no header."""
    headers: dict[str, str] = {}
    for name, buckets in (("requests", account.requests), ("tokens", account.tokens)):
        bucket = buckets.get(MINUTE) or buckets.get(DAY)
        if bucket is not None:
            headers |= _bucket_headers(name, bucket, now)
    return headers


def processing_header(seconds: float) -> dict[str, str]:
    """Return the header with the server's processing time."""
    return {"openai-processing-ms": str(max(1, round(seconds * 1000)))}


def without_empty(headers: dict[str, str]) -> dict[str, str]:
    """Return `headers` without the ones that a fault set to the empty string."""
    return {name: value for name, value in headers.items() if value}


def _bucket_headers(name: str, bucket: Bucket, now: float) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{name}": str(int(bucket.limit)),
        f"x-ratelimit-remaining-{name}": str(max(0, math.floor(bucket.level_at(now) + 1e-6))),
        f"x-ratelimit-reset-{name}": go_duration(bucket.full_in(now)),
    }
