"""Error bodies and headers in the exact wording of OpenAI and Azure, taken from public threads.

Does not decide whether a request is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

from nbcodex.models import DAY, MINUTE, Limit
from nbcodex.simulator.buckets import Refusal
from nbcodex.simulator.faults import Fault
from nbcodex.simulator.knobs import Knobs, RetryAfter

LIMITS_PAGE = "Visit https://platform.openai.com/account/rate-limits to learn more."
SERVER_ERROR = "The server had an error while processing your request. Sorry about that!"
QUOTA = (
    "You exceeded your current quota, please check your plan and billing details. For more "
    "information on this error, read the docs: "
    "https://platform.openai.com/docs/guides/error-codes/api-errors."
)
OVERLOADED = "Our servers are currently overloaded. Please try again later."
UNVERIFIED = (
    "Your organization must be verified to stream this model. Please go to: "
    "https://platform.openai.com/settings/organization/general and click on Verify Organization. "
    "If you just verified, it can take up to 15 minutes for access to propagate."
)
NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header "
    "using Bearer auth (i.e. Authorization: Bearer YOUR_KEY), or as the password field (with blank "
    "username) if you're accessing the API from your browser and are prompted for a username and "
    "password. You can obtain an API key from https://platform.openai.com/account/api-keys."
)
HTML = (
    "<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n<center><h1>{title}</h1></center>"
    "\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
)


class ErrorResponse(Exception):  # noqa: N818 - a response of the server, not an error of ours
    """An HTTP error response.

    Parameters
    ----------
    status : int
        HTTP status.
    message, type, code, param
        The fields of the body.
    headers : mapping
        Additional headers.
    html : str
        The body if it is not JSON.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = "invalid_request_error",  # noqa: A002 - the wire's word
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        html: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.html = html
        self.error = {"message": message, "type": type, "param": param, "code": code}

    @property
    def body(self) -> dict[str, str | None]:
        """The JSON error object; Azure sends code and message only."""
        if self.error["type"] is None:
            return {word: self.error[word] for word in ("code", "message")}
        return self.error


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """The provider's style that an error response follows."""

    # model, organization: the names that appear in the message.
    model: str
    organization: str
    azure: bool  # whether the server imitates Azure
    retry_after: RetryAfter  # the header that states the wait
    wall: float  # current time in seconds since the epoch, for a wait stated as a date


def go_duration(seconds: float) -> str:
    """Return `seconds` in Go's duration format, in whole milliseconds: ``86ms``, ``7m12s``."""
    left = max(0, math.ceil(round(seconds * 1000, 6)))
    if left < 1000:
        return f"{left}ms" if left else "0s"
    minutes, left = divmod(left, 60_000)
    hours, minutes = divmod(minutes, 60)
    parts = f"{hours}h" if hours else ""
    parts += f"{minutes}m" if hours or minutes else ""
    return parts + f"{left / 1000:.3f}".rstrip("0").rstrip(".") + "s"


def retry_headers(seconds: float, which: RetryAfter, wall: float) -> dict[str, str]:
    """Return the headers that state a wait."""
    whole = {"retry-after": str(math.ceil(seconds))}
    exact = {"retry-after-ms": str(math.ceil(round(seconds * 1000, 6)))}
    match which:
        case "both":
            return whole | exact
        case "seconds":
            return whole
        case "ms":
            return exact
        case "date":
            return {"retry-after": formatdate(math.ceil(wall + seconds), usegmt=True)}
        case "none":
            return {}


def limit_response(refusal: Refusal, style: Style) -> ErrorResponse:
    """Return the 429 for an exhausted limit, or for a request larger than the whole limit."""
    if refusal.wait is None:
        return ErrorResponse(
            429, too_large_text(refusal, style), type=refusal.resource, code="rate_limit_exceeded"
        )
    headers = retry_headers(refusal.wait, style.retry_after, style.wall)
    if style.azure:
        return ErrorResponse(
            429, azure_text(refusal.wait, refusal.resource), type=None, code="429", headers=headers
        )
    return ErrorResponse(
        429,
        limit_text(refusal, style),
        type=refusal.resource,
        code="rate_limit_exceeded",
        headers=headers,
    )


def limit_text(refusal: Refusal, style: Style) -> str:
    """Return OpenAI's message for an exhausted limit."""
    return (
        f"Rate limit reached for {style.model} in organization {style.organization} on "
        f"{_limit_name(refusal)}: Limit {refusal.limit}, Used {refusal.used}, "
        f"Requested {refusal.requested}. Please try again in {go_duration(refusal.wait or 0)}. "
        f"{LIMITS_PAGE}"
    )


def too_large_text(refusal: Refusal, style: Style) -> str:
    """Return OpenAI's message for a request larger than the whole limit."""
    return (
        f"Request too large for {style.model} in organization {style.organization} on "
        f"{_limit_name(refusal)}: Limit {refusal.limit}, Requested {refusal.requested}. The "
        f"input or output tokens must be reduced in order to run successfully. {LIMITS_PAGE}"
    )


def azure_text(wait: float, resource: str = "tokens") -> str:
    """Return Azure's message for an exhausted limit."""
    rate = "token rate" if resource == "tokens" else "call rate"
    return (
        "Requests to the ChatCompletions_Create Operation under Azure OpenAI API version "
        f"2024-10-21 have exceeded {rate} limit of your current OpenAI S0 pricing tier. Please "
        f"retry after {math.ceil(wait)} seconds. Please go here: https://aka.ms/oai/quotaincrease "
        "if you would like to further increase the default rate limit."
    )


def scripted_response(fault: Fault, style: Style, knobs: Knobs, cost: int) -> ErrorResponse | None:
    """Return the HTTP error for `fault`; None if the fault lets an answer begin."""
    failure = _plain_response(fault, style) or _scripted_limit_response(fault, style, knobs, cost)
    if failure is not None:
        overrides = {"code": fault.code, "type": fault.type, "message": fault.message}
        failure.error |= {key: value for key, value in overrides.items() if value is not None}
        failure.headers |= fault.headers
    return failure


def _plain_response(fault: Fault, style: Style) -> ErrorResponse | None:
    """Return the response for faults other than rate limits."""
    match fault.kind:
        case "http":
            stated = fault.seconds
            headers = retry_headers(stated, style.retry_after, style.wall) if stated else {}
            return ErrorResponse(fault.status, SERVER_ERROR, type="server_error", headers=headers)
        case "quota":
            return ErrorResponse(429, QUOTA, type="insufficient_quota", code="insufficient_quota")
        case "overloaded":
            kind, code = "service_unavailable_error", "server_is_overloaded"
            return ErrorResponse(503, OVERLOADED, type=kind, code=code)
        case "html_429":
            return ErrorResponse(429, "", html=HTML.format(title="429 Too Many Requests"))
        case "html_502":
            return ErrorResponse(502, "", html=HTML.format(title="502 Bad Gateway"))
        case "redirect":
            return ErrorResponse(307, "", html=" ", headers={"location": fault.location})
        case _:
            return None


_LIMITS: Mapping[str, tuple[Any, float]] = {
    "tokens_per_minute": ("tokens", MINUTE),
    "requests_per_minute": ("requests", MINUTE),
    "tokens_per_day": ("tokens", DAY),
    "requests_per_day": ("requests", DAY),
    "too_large": ("tokens", MINUTE),
    "azure": ("tokens", MINUTE),
}


def _scripted_limit_response(
    fault: Fault, style: Style, knobs: Knobs, cost: int
) -> ErrorResponse | None:
    """Return the 429 for a scripted limit, with figures consistent with its wait."""
    if fault.kind not in _LIMITS:
        return None
    refusal = refusal_figures(fault, knobs, cost)
    if fault.kind == "azure":
        headers = retry_headers(fault.wait, "seconds", style.wall)
        return ErrorResponse(429, azure_text(fault.wait), type=None, code="429", headers=headers)
    failure = limit_response(refusal, style)
    if refusal.window == MINUTE and refusal.wait is not None and knobs.headers:
        left = max(0, refusal.limit - refusal.used)
        full = go_duration((refusal.limit - left) / refusal.limit * MINUTE)
        failure.headers[f"x-ratelimit-remaining-{refusal.resource}"] = str(left)
        failure.headers[f"x-ratelimit-reset-{refusal.resource}"] = full
    return failure


def refusal_figures(fault: Fault, knobs: Knobs, cost: int) -> Refusal:
    """Return the figures of a limit that makes a request of `cost` tokens wait for `fault.wait`."""
    resource, window = _LIMITS[fault.kind]
    limit = _limit_size(resource, window, knobs)
    requested = cost if resource == "tokens" else 1
    if fault.kind == "too_large":
        requested, wait = max(cost, limit + limit // 5), None
    else:
        wait = fault.wait
    used = round(limit - requested + fault.wait / window * limit)
    return Refusal(
        resource=resource, window=window, limit=limit, used=used, requested=requested, wait=wait
    )


def _limit_size(resource: str, window: float, knobs: Knobs) -> int:
    minute = (knobs.tpm or 30_000) if resource == "tokens" else (knobs.rpm or 500)
    if window == MINUTE:
        return minute
    return (knobs.tpd if resource == "tokens" else knobs.rpd) or minute * 100


def _limit_name(refusal: Refusal) -> str:
    name = Limit(resource=refusal.resource, window=refusal.window).name
    return name.replace("per minute", "per min")
