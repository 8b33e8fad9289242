"""Decides whether a request is admitted, and words each refusal as OpenAI and Azure do.

The texts are copied from error messages that users have published.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any

from nbcodex.models import DAY, MINUTE, Limit, Resource
from nbcodex.simulator.buckets import Account, Refusal
from nbcodex.simulator.generated_answers import AnswerPlan
from nbcodex.simulator.http_messages import ErrorResponse, go_duration, retry_headers
from nbcodex.simulator.knobs import Dropped, Fault, Knobs, RetryAfter
from nbcodex.simulator.parsed_request import ParsedRequest

LIMITS_PAGE_TEXT = "Visit https://platform.openai.com/account/rate-limits to learn more."
SERVER_ERROR_TEXT = "The server had an error while processing your request. Sorry about that!"
QUOTA_TEXT = (
    "You exceeded your current quota, please check your plan and billing details. For more "
    "information on this error, read the docs: "
    "https://platform.openai.com/docs/guides/error-codes/api-errors."
)
OVERLOADED_TEXT = "Our servers are currently overloaded. Please try again later."
UNVERIFIED_TEXT = (
    "Your organization must be verified to stream this model. Please go to: "
    "https://platform.openai.com/settings/organization/general and click on Verify Organization. "
    "If you just verified, it can take up to 15 minutes for access to propagate."
)
NO_DEPLOYMENT_TEXT = (
    "The API deployment for this resource does not exist. If you created the deployment within the "
    "last 5 minutes, please wait a moment and try again."
)
GATEWAY_HTML = (
    "<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n<center><h1>{title}</h1></center>"
    "\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
)


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """The log entry of one request."""

    number: int  # counted from 1
    at: float  # the instant of its arrival, as `Clock.now` returns it
    method: str
    path: str
    host: str  # the Host header
    key: str = ""  # a name for its key (``key-1`` is the first key seen); never the key itself
    api: str = ""
    model: str = ""
    prompt: str = ""  # the last user message
    stream: bool = False
    background: bool = False
    body: Mapping[str, Any] = field(default_factory=dict)  # the JSON body
    status: int = 0  # HTTP status; 0 if the connection ended without a response
    fault: str = ""  # kind of the fault applied
    response_id: str = ""  # the id of the answer
    input_tokens: int = 0  # as counted by the server
    output_tokens: int = 0  # generated so far
    charged: int = 0  # tokens charged to the limit, less those returned
    finished: bool = False  # whether the whole answer was generated


@dataclass(slots=True, kw_only=True)
class PlannedRequest:
    """A parsed request with the answer that it gets if it is admitted."""

    request: ParsedRequest
    plan: AnswerPlan
    fault: Fault | None  # the fault to apply
    account: Account  # the account whose limits apply
    record: RequestRecord  # its entry in the log
    received_at: float  # time of day at its arrival, in seconds since the epoch
    knobs: Knobs  # the settings at its arrival
    charge: int  # tokens charged at admission
    cached_tokens: int = 0  # input tokens found in the prompt cache

    def deltas(self) -> Iterator[tuple[str, int]]:
        """Yield the text of each delta, and the output tokens generated including it."""
        tokens, size = self.plan.tokens, self.knobs.chunk
        for start in range(0, len(tokens), size):
            delta = tokens[start : start + size]
            yield "".join(delta), self.plan.reasoning_tokens + start + len(delta)

    def time_of_token(self, number: int) -> float:
        """Return the time on the clock of an output token; the first one is number 1."""
        fault, tokens_per_second = self.fault, self.knobs.speed
        delay = fault.seconds_or_default if fault and fault.kind == "slow" else 0.0
        return self.record.at + delay + self.plan.latency + max(0, number - 1) / tokens_per_second

    def settle_charge(self, now: float) -> None:
        """Adjust the charge to the output that was generated so far."""
        used = self.plan.input_tokens + self.record.output_tokens
        self.record.charged = self.account.settle(self.record.charged, used, self.knobs, now)


def admit_request(planned: PlannedRequest) -> None:
    """Charge the request, or raise an `ErrorResponse` or `Dropped`."""
    try:
        raise_scripted_failure(planned, stated_tokens=planned.charge)
        _check_length(planned)
    except (ErrorResponse, Dropped):  # these count towards the request limit, too
        planned.account.charge_request(planned.record.at)
        raise
    if refusal := planned.account.charge_or_refuse(planned.charge, planned.record.at):
        raise _limit_response(refusal, planned)
    planned.record.charged = planned.charge


def check_access(request: ParsedRequest, knobs: Knobs) -> None:
    """Raise a 404 if the model does not exist, a 400 if the organization may not stream."""
    if knobs.models and request.model not in knobs.models:
        if request.is_azure:
            raise ErrorResponse(404, NO_DEPLOYMENT_TEXT, type=None, code="DeploymentNotFound")
        message = f"The model `{request.model}` does not exist or you do not have access to it."
        raise ErrorResponse(404, message, code="model_not_found", param="model")
    if request.stream and not knobs.allow_streaming:
        raise ErrorResponse(400, UNVERIFIED_TEXT, code="unsupported_value", param="stream")


def _check_length(planned: PlannedRequest) -> None:
    input_tokens, max_output = planned.plan.input_tokens, planned.request.max_output or 0
    if input_tokens + max_output <= planned.knobs.context:
        return
    param = "input"
    message = (
        "Your input exceeds the context window of this model. Please adjust your input and try "
        "again."
    )
    if planned.request.api == "chat":
        param = "messages"
        message = (
            f"This model's maximum context length is {planned.knobs.context} tokens. However, you "
            f"requested {input_tokens + max_output} tokens ({input_tokens} in the messages, "
            f"{max_output} in the completion). Please reduce the length of the messages or "
            "completion."
        )
    raise ErrorResponse(400, message, code="context_length_exceeded", param=param)


def limit_headers(planned: PlannedRequest) -> dict[str, str]:
    """Return the account's limits at the arrival as headers, unless `Knobs.headers` is off."""
    headers: dict[str, str] = {}
    account, now = planned.account, planned.record.at
    for resource, buckets in (("requests", account.requests), ("tokens", account.tokens)):
        bucket = buckets.get(MINUTE) or buckets.get(DAY)
        if bucket is not None and planned.knobs.headers:
            # A rounding error of the refills must not cost a whole token.
            remaining = max(0, math.floor(bucket.level_at(now) + 1e-6))
            headers[f"x-ratelimit-limit-{resource}"] = str(int(bucket.limit))
            headers[f"x-ratelimit-remaining-{resource}"] = str(remaining)
            headers[f"x-ratelimit-reset-{resource}"] = go_duration(bucket.seconds_until_full(now))
    return headers


# Resource, and window in seconds, of the limit that a fault of this kind states.
_LIMITS: Mapping[str, tuple[Resource, float]] = {
    "tokens_per_minute": ("tokens", MINUTE),
    "requests_per_minute": ("requests", MINUTE),
    "tokens_per_day": ("tokens", DAY),
    "requests_per_day": ("requests", DAY),
    "too_large": ("tokens", MINUTE),
}


def raise_scripted_failure(planned: PlannedRequest, *, stated_tokens: int) -> None:
    """Raise the failure that the fault prescribes, if any; a 429 states `stated_tokens`."""
    fault, knobs, received_at = planned.fault, planned.knobs, planned.received_at
    if fault is None:
        return
    match fault.kind:
        case "refused":
            raise Dropped  # without a response, as if the connection had been refused
        case "http":
            failure = ErrorResponse(fault.status, SERVER_ERROR_TEXT, type="server_error")
            if fault.seconds:  # without them, it states no wait
                failure.headers = retry_headers(fault.seconds, knobs.retry_after, received_at)
        case "quota":
            code = "insufficient_quota"
            failure = ErrorResponse(429, QUOTA_TEXT, type=code, code=code)
        case "overloaded":
            type_, code = "service_unavailable_error", "server_is_overloaded"
            failure = ErrorResponse(503, OVERLOADED_TEXT, type=type_, code=code)
        case "html_429" | "html_502":
            status = HTTPStatus(int(fault.kind.removeprefix("html_")))
            page = GATEWAY_HTML.format(title=f"{status} {status.phrase}")
            failure = ErrorResponse(status, "", html=page)
        case "redirect":
            redirect = fault.status if 300 <= fault.status < 400 else 307
            # A blank page, in place of a JSON error.
            failure = ErrorResponse(redirect, "", html=" ", headers={"location": fault.location})
        case "azure":
            failure = _azure_limit_response("tokens", fault.seconds_or_default, received_at)
        case kind if kind in _LIMITS:
            refusal = _scripted_refusal(fault, knobs, stated_tokens)
            failure = _limit_response(refusal, planned)
            if refusal.window == MINUTE and refusal.wait is not None and knobs.headers:
                # These replace the bucket's headers, so that they agree with the message.
                left = max(0, refusal.limit - refusal.used)
                until_full = (refusal.limit - left) / refusal.limit * MINUTE
                failure.headers[f"x-ratelimit-remaining-{refusal.resource}"] = str(left)
                failure.headers[f"x-ratelimit-reset-{refusal.resource}"] = go_duration(until_full)
        case _:
            return
    failure.code = failure.code if fault.code is None else fault.code
    failure.message = failure.message if fault.message is None else fault.message
    failure.headers |= fault.headers
    raise failure


def error_object(fault: Fault, planned: PlannedRequest) -> dict[str, str | None]:
    """Return the error of an answer that fails midway: a limit, unless the fault states another."""
    limit_fault = replace(fault, kind="tokens_per_minute")
    refusal = _scripted_refusal(limit_fault, planned.knobs, planned.charge)
    return {
        "code": fault.code or "rate_limit_exceeded",
        "type": "tokens",
        "message": fault.message or _limit_text(refusal, planned),
        "param": None,
    }


def _scripted_refusal(fault: Fault, knobs: Knobs, tokens: int) -> Refusal:
    """Return the figures of a limit that `fault` states, for a request of `tokens`."""
    resource, window = _LIMITS[fault.kind]
    # Where the server has no such limit, the figures are invented.
    if resource == "tokens":
        per_minute, per_day, requested = knobs.tpm or 30_000, knobs.tpd, tokens
    else:
        per_minute, per_day, requested = knobs.rpm or 500, knobs.rpd, 1
    limit = per_minute if window == MINUTE else per_day or per_minute * 100
    wait: float | None = fault.seconds_or_default
    if fault.kind == "too_large":
        requested, wait = max(tokens, limit + limit // 5), None
    # Solves wait = (used + requested - limit) / limit * window, as in `buckets`, for `used`.
    used = round(limit - requested + fault.seconds_or_default / window * limit)
    return Refusal(
        resource=resource, window=window, limit=limit, used=used, requested=requested, wait=wait
    )


def _limit_response(refusal: Refusal, planned: PlannedRequest) -> ErrorResponse:
    """Return the 429 for an exhausted limit, or for a request larger than the whole limit."""
    headers, retry_after, received_at = {}, planned.knobs.retry_after, planned.received_at
    if refusal.wait is not None:
        if planned.request.is_azure:
            return _azure_limit_response(refusal.resource, refusal.wait, received_at, retry_after)
        headers = retry_headers(refusal.wait, retry_after, received_at)
    text, code = _limit_text(refusal, planned), "rate_limit_exceeded"
    return ErrorResponse(429, text, type=refusal.resource, code=code, headers=headers)


def _limit_text(refusal: Refusal, planned: PlannedRequest) -> str:
    """Return OpenAI's message for a limit that is exhausted, or smaller than the request."""
    name = Limit(resource=refusal.resource, window=refusal.window).name
    name = name.replace("per minute", "per min")  # such as ``tokens per min (TPM)``
    model, organization = planned.request.model, planned.knobs.organization
    scope = f"for {model} in organization {organization} on {name}"
    if refusal.wait is None:
        return (
            f"Request too large {scope}: Limit {refusal.limit}, Requested {refusal.requested}. "
            "The input or output tokens must be reduced in order to run successfully. "
            f"{LIMITS_PAGE_TEXT}"
        )
    return (
        f"Rate limit reached {scope}: Limit {refusal.limit}, Used {refusal.used}, "
        f"Requested {refusal.requested}. Please try again in {go_duration(refusal.wait)}. "
        f"{LIMITS_PAGE_TEXT}"
    )


def _azure_limit_response(
    resource: Resource, wait: float, received_at: float, retry_after: RetryAfter = "seconds"
) -> ErrorResponse:
    rate = "token rate" if resource == "tokens" else "call rate"
    text = (
        "Requests to the ChatCompletions_Create Operation under Azure OpenAI API version "
        f"2024-10-21 have exceeded {rate} limit of your current OpenAI S0 pricing tier. Please "
        f"retry after {math.ceil(wait)} seconds. Please go here: https://aka.ms/oai/quotaincrease "
        "if you would like to further increase the default rate limit."
    )
    headers = retry_headers(wait, retry_after, received_at)
    return ErrorResponse(429, text, type=None, code="429", headers=headers)
