"""Decides whether a request is admitted: model, context window, scripted faults and limits.

Does not know how an answer is generated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nbcodex.simulator.buckets import Account, Charge, admission_charge
from nbcodex.simulator.error_responses import (
    SERVER_ERROR,
    UNVERIFIED,
    ErrorResponse,
    Style,
    limit_response,
    limit_text,
    refusal_figures,
    scripted_response,
)
from nbcodex.simulator.faults import Dropped, Fault
from nbcodex.simulator.generated_answers import AnswerPlan
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.parsed_request import ParsedRequest
from nbcodex.simulator.routes import RequestRecord


@dataclass(slots=True, kw_only=True)
class Candidate:
    """A parsed request that is about to be admitted."""

    # request, plan: the request, and the answer that it would get.
    request: ParsedRequest
    plan: AnswerPlan
    fault: Fault | None  # the fault to apply
    account: Account  # the account whose limits apply
    record: RequestRecord  # its entry in the log
    # at, wall: time of arrival on the clock, and in seconds since the epoch.
    at: float
    wall: float

    def refusal_style(self, knobs: Knobs) -> Style:
        """Return the style of a refusal of this request."""
        return style_of(self.request, knobs, self.wall)


def style_of(request: ParsedRequest, knobs: Knobs, wall: float) -> Style:
    """Return the style of a refusal of `request`."""
    return Style(
        model=request.model,
        organization=knobs.organization,
        azure=request.azure,
        retry_after=knobs.retry_after,
        wall=wall,
    )


def admit_request(candidate: Candidate, knobs: Knobs) -> Charge:
    """Charge the request and return the charge.

    Raises
    ------
    ErrorResponse
        If it is refused; a refusal counts towards the request limit.
    Dropped
        If the connection is to be closed instead.
    """
    charge = admission_charge(candidate.plan.input_tokens, candidate.plan.max_output, knobs)
    try:
        if candidate.fault is not None:
            raise_scripted_failure(
                candidate.fault, candidate.refusal_style(knobs), knobs, cost=charge.tokens
            )
        _check_length(candidate, knobs)
    except (ErrorResponse, Dropped):
        candidate.account.count(candidate.at)
        raise
    refusal = candidate.account.charge_or_refuse(charge.tokens, candidate.at)
    if refusal is not None:
        raise limit_response(refusal, candidate.refusal_style(knobs))
    candidate.record.charged = charge.tokens
    return charge


def check_model(request: ParsedRequest, knobs: Knobs) -> None:
    """Check that the model exists.

    Raises
    ------
    ErrorResponse
        404 if it does not exist.
    """
    if not knobs.models or request.model in knobs.models:
        return
    if request.azure:
        message = (
            "The API deployment for this resource does not exist. If you created the deployment "
            "within the last 5 minutes, please wait a moment and try again."
        )
        raise ErrorResponse(404, message, type=None, code="DeploymentNotFound")
    message = f"The model `{request.model}` does not exist or you do not have access to it."
    raise ErrorResponse(404, message, code="model_not_found", param="model")


def check_stream(request: ParsedRequest, knobs: Knobs) -> None:
    """Check that the organization may stream the answer.

    Raises
    ------
    ErrorResponse
        400 with OpenAI's text for unverified organizations.
    """
    if request.stream and not knobs.allow_streaming:
        raise ErrorResponse(400, UNVERIFIED, code="unsupported_value", param="stream")


def stream_error_text(candidate: Candidate, knobs: Knobs, cost: int) -> str:
    """Return the message of an error event in mid-stream: a limit is reached."""
    if candidate.fault is None:
        return SERVER_ERROR
    fault = replace(candidate.fault, kind="tokens_per_minute")
    return limit_text(refusal_figures(fault, knobs, cost), candidate.refusal_style(knobs))


def raise_scripted_failure(fault: Fault, style: Style, knobs: Knobs, *, cost: int) -> None:
    """Raise the failure that `fault` prescribes for a request of `cost` tokens, if any.

    Raises
    ------
    ErrorResponse
        The HTTP error that the fault prescribes.
    Dropped
        If the connection is to be closed instead.
    """
    if fault.kind == "refused":
        raise Dropped
    failure = scripted_response(fault, style, knobs, cost)
    if failure is not None:
        raise failure


def _check_length(candidate: Candidate, knobs: Knobs) -> None:
    request, size = candidate.request, candidate.plan.input_tokens
    if size + (request.max_output or 0) <= knobs.context:
        return
    code = "context_length_exceeded"
    if request.api == "responses":
        message = (
            "Your input exceeds the context window of this model. Please adjust your input and try "
            "again."
        )
        raise ErrorResponse(400, message, code=code, param="input")
    message = (
        f"This model's maximum context length is {knobs.context} tokens. However, you requested "
        f"{size + (request.max_output or 0)} tokens ({size} in the messages, "
        f"{request.max_output or 0} in the completion). Please reduce the length of the messages "
        "or completion."
    )
    raise ErrorResponse(400, message, code=code, param="messages")
