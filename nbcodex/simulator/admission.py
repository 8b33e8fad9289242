"""Whether a request gets in: the model, the context, the script of faults, the limits.

Must not know how an answer is generated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nbcodex.simulator.answers import Plan
from nbcodex.simulator.asked import Asked
from nbcodex.simulator.buckets import Account, Charge, opening_charge
from nbcodex.simulator.faults import Dropped, Fault
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.record import Seen
from nbcodex.simulator.refusals import (
    SERVER_ERROR,
    UNVERIFIED,
    Failure,
    Style,
    figures,
    limit_text,
    limited,
    scripted,
)


@dataclass(slots=True, kw_only=True)
class Applicant:
    """A request that has come as far as its account.

    Parameters
    ----------
    asked, plan
        What it asks for, and what it would get.
    fault : Fault or None
        What shall go wrong.
    account : Account
        Whose limits it uses.
    seen : Seen
        Its record.
    at, wall : float
        The instant at which it came, by the clock and since the epoch.
    """

    asked: Asked
    plan: Plan
    fault: Fault | None
    account: Account
    seen: Seen
    at: float
    wall: float

    def style(self, knobs: Knobs) -> Style:
        """Return whose words a refusal has."""
        return style(self.asked, knobs, self.wall)


def style(asked: Asked, knobs: Knobs, wall: float) -> Style:
    """Return whose words a refusal of `asked` has."""
    return Style(
        model=asked.model,
        organization=knobs.organization,
        azure=asked.azure,
        retry_after=knobs.retry_after,
        wall=wall,
    )


def admit(applicant: Applicant, knobs: Knobs) -> Charge:
    """Charge the request, and return what it was charged.

    Raises
    ------
    Failure
        If it is refused, which counts as a request.
    Dropped
        If the connection shall end instead.
    """
    charge = opening_charge(applicant.plan.input_tokens, applicant.plan.max_output, knobs)
    try:
        if applicant.fault is not None:
            refuse(applicant.fault, applicant.style(knobs), knobs, cost=charge.tokens)
        _check_length(applicant, knobs)
    except (Failure, Dropped):
        applicant.account.count(applicant.at)
        raise
    refusal = applicant.account.admit(charge.tokens, applicant.at)
    if refusal is not None:
        raise limited(refusal, applicant.style(knobs))
    applicant.seen.charged = charge.tokens
    return charge


def check_model(asked: Asked, knobs: Knobs) -> None:
    """Let a model pass that exists.

    Raises
    ------
    Failure
        404, if it does not.
    """
    if not knobs.models or asked.model in knobs.models:
        return
    if asked.azure:
        message = (
            "The API deployment for this resource does not exist. If you created the deployment "
            "within the last 5 minutes, please wait a moment and try again."
        )
        raise Failure(404, message, type=None, code="DeploymentNotFound")
    message = f"The model `{asked.model}` does not exist or you do not have access to it."
    raise Failure(404, message, code="model_not_found", param="model")


def check_stream(asked: Asked, knobs: Knobs) -> None:
    """Let a request pass whose answer may be streamed, or need not be.

    Raises
    ------
    Failure
        400, in the words of those who have not shown who they are.
    """
    if asked.stream and not knobs.streams:
        raise Failure(400, UNVERIFIED, code="unsupported_value", param="stream")


def broken_text(applicant: Applicant, knobs: Knobs, cost: int) -> str:
    """Return what an error in the midst of a stream says: that the limit is reached."""
    if applicant.fault is None:
        return SERVER_ERROR
    fault = replace(applicant.fault, kind="tokens_per_minute")
    return limit_text(figures(fault, knobs, cost), applicant.style(knobs))


def refuse(fault: Fault, words: Style, knobs: Knobs, *, cost: int) -> None:
    """Refuse a request of `cost` tokens, if that is what `fault` asks for.

    Raises
    ------
    Failure
        The HTTP error that it stands for.
    Dropped
        If the connection shall end instead.
    """
    if fault.kind == "refused":
        raise Dropped
    failure = scripted(fault, words, knobs, cost)
    if failure is not None:
        raise failure


def _check_length(applicant: Applicant, knobs: Knobs) -> None:
    asked, size = applicant.asked, applicant.plan.input_tokens
    if size + (asked.max_output or 0) <= knobs.context:
        return
    code = "context_length_exceeded"
    if asked.api == "responses":
        message = (
            "Your input exceeds the context window of this model. Please adjust your input and try "
            "again."
        )
        raise Failure(400, message, code=code, param="input")
    message = (
        f"This model's maximum context length is {knobs.context} tokens. However, you requested "
        f"{size + (asked.max_output or 0)} tokens ({size} in the messages, {asked.max_output or 0} "
        "in the completion). Please reduce the length of the messages or completion."
    )
    raise Failure(400, message, code=code, param="messages")
