"""How the server says no: bodies and headers of its errors, word for word.

The texts are those of public threads. Must not know why a request is refused.
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


class Failure(Exception):  # noqa: N818 - the server's, which is nobody's error here
    """An HTTP error that the server answers with.

    Parameters
    ----------
    status : int
        HTTP status.
    message, type, code, param
        The words of the body.
    headers : mapping
        Headers besides the usual ones.
    html : str
        The body, where it is not JSON.
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
        """The error as JSON has it; Azure, which gives no type, names code and message only."""
        if self.error["type"] is None:
            return {word: self.error[word] for word in ("code", "message")}
        return self.error


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """Whose words and headers a refusal has.

    Parameters
    ----------
    model, organization : str
        The names that it speaks of.
    azure : bool
        Whether it is Azure that speaks.
    retry_after : str
        Which header states the wait.
    wall : float
        Seconds since the epoch, for a wait stated as a date.
    """

    model: str
    organization: str
    azure: bool
    retry_after: RetryAfter
    wall: float


def go_duration(seconds: float) -> str:
    """Return `seconds` as Go prints a duration, in whole milliseconds: ``86ms``, ``7m12s``."""
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


def limited(refusal: Refusal, style: Style) -> Failure:
    """Return the 429 for a limit that is reached, or that a request is too large for."""
    if refusal.wait is None:
        return Failure(
            429, too_large(refusal, style), type=refusal.resource, code="rate_limit_exceeded"
        )
    headers = retry_headers(refusal.wait, style.retry_after, style.wall)
    if style.azure:
        return Failure(
            429, azure_text(refusal.wait, refusal.resource), type=None, code="429", headers=headers
        )
    return Failure(
        429,
        limit_text(refusal, style),
        type=refusal.resource,
        code="rate_limit_exceeded",
        headers=headers,
    )


def limit_text(refusal: Refusal, style: Style) -> str:
    """Return OpenAI's words for a limit that is reached."""
    return (
        f"Rate limit reached for {style.model} in organization {style.organization} on "
        f"{_name(refusal)}: Limit {refusal.limit}, Used {refusal.used}, "
        f"Requested {refusal.requested}. Please try again in {go_duration(refusal.wait or 0)}. "
        f"{LIMITS_PAGE}"
    )


def too_large(refusal: Refusal, style: Style) -> str:
    """Return OpenAI's words for a request that is larger than the whole limit."""
    return (
        f"Request too large for {style.model} in organization {style.organization} on "
        f"{_name(refusal)}: Limit {refusal.limit}, Requested {refusal.requested}. The input or "
        f"output tokens must be reduced in order to run successfully. {LIMITS_PAGE}"
    )


def azure_text(wait: float, resource: str = "tokens") -> str:
    """Return Azure's words for a limit that is reached."""
    rate = "token rate" if resource == "tokens" else "call rate"
    return (
        "Requests to the ChatCompletions_Create Operation under Azure OpenAI API version "
        f"2024-10-21 have exceeded {rate} limit of your current OpenAI S0 pricing tier. Please "
        f"retry after {math.ceil(wait)} seconds. Please go here: https://aka.ms/oai/quotaincrease "
        "if you would like to further increase the default rate limit."
    )


def scripted(fault: Fault, style: Style, knobs: Knobs, cost: int) -> Failure | None:
    """Return the HTTP error that `fault` stands for; None if it lets an answer begin."""
    failure = _plain(fault, style) or _limit(fault, style, knobs, cost)
    if failure is not None:
        given = {"code": fault.code, "type": fault.type, "message": fault.message}
        failure.error |= {word: said for word, said in given.items() if said is not None}
        failure.headers |= fault.headers
    return failure


def _plain(fault: Fault, style: Style) -> Failure | None:
    """Return the failures that are no reached limit."""
    match fault.kind:
        case "http":
            stated = fault.seconds
            headers = retry_headers(stated, style.retry_after, style.wall) if stated else {}
            return Failure(fault.status, SERVER_ERROR, type="server_error", headers=headers)
        case "quota":
            return Failure(429, QUOTA, type="insufficient_quota", code="insufficient_quota")
        case "overloaded":
            kind, code = "service_unavailable_error", "server_is_overloaded"
            return Failure(503, OVERLOADED, type=kind, code=code)
        case "html_429":
            return Failure(429, "", html=HTML.format(title="429 Too Many Requests"))
        case "html_502":
            return Failure(502, "", html=HTML.format(title="502 Bad Gateway"))
        case "redirect":
            return Failure(307, "", html=" ", headers={"location": fault.location})
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


def _limit(fault: Fault, style: Style, knobs: Knobs, cost: int) -> Failure | None:
    """Return the 429 of a limit, with figures that fit its wait."""
    if fault.kind not in _LIMITS:
        return None
    refusal = figures(fault, knobs, cost)
    if fault.kind == "azure":
        headers = retry_headers(fault.wait, "seconds", style.wall)
        return Failure(429, azure_text(fault.wait), type=None, code="429", headers=headers)
    failure = limited(refusal, style)
    if refusal.window == MINUTE and refusal.wait is not None and knobs.headers:
        left = max(0, refusal.limit - refusal.used)
        full = go_duration((refusal.limit - left) / refusal.limit * MINUTE)
        failure.headers[f"x-ratelimit-remaining-{refusal.resource}"] = str(left)
        failure.headers[f"x-ratelimit-reset-{refusal.resource}"] = full
    return failure


def figures(fault: Fault, knobs: Knobs, cost: int) -> Refusal:
    """Return the figures of a limit that makes a request of `cost` tokens wait as `fault` says."""
    resource, window = _LIMITS[fault.kind]
    limit = _size(resource, window, knobs)
    requested = cost if resource == "tokens" else 1
    if fault.kind == "too_large":
        requested, wait = max(cost, limit + limit // 5), None
    else:
        wait = fault.wait
    used = round(limit - requested + fault.wait / window * limit)
    return Refusal(
        resource=resource, window=window, limit=limit, used=used, requested=requested, wait=wait
    )


def _size(resource: str, window: float, knobs: Knobs) -> int:
    minute = (knobs.tpm or 30_000) if resource == "tokens" else (knobs.rpm or 500)
    if window == MINUTE:
        return minute
    return (knobs.tpd if resource == "tokens" else knobs.rpd) or minute * 100


def _name(refusal: Refusal) -> str:
    name = Limit(resource=refusal.resource, window=refusal.window).name
    return name.replace("per minute", "per min")
