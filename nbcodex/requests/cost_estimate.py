"""What a request may come to, before it is sent."""

from __future__ import annotations

from dataclasses import dataclass

from nbcodex.journal.spending import SpendAmount
from nbcodex.models import Request
from nbcodex.openai_api import pricing
from nbcodex.ratelimit.charge_policy import Cost

DEFAULT_OUTPUT_TOKENS = 500
"""Output tokens that an answer is taken for, until this session's own answers tell."""

# The output that rate limits are asked for where a request states no bound; what answers really use
# of it is learned.
UNBOUNDED_OUTPUT_TOKENS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a request may come to.

    Parameters
    ----------
    input_tokens, output_tokens : int
        Estimates; the output is `max_output` where there is one, else that of a usual answer.
    bounded : bool
        Whether the output cannot be longer.
    cost : float or None
        US dollars; None where no price is known.
    """

    input_tokens: int
    output_tokens: int
    bounded: bool = False
    cost: float | None = None

    def __str__(self) -> str:
        longest = "at most " if self.bounded else "perhaps "
        told = f"~{self.input_tokens:,} in, {longest}{self.output_tokens:,} out"
        return f"{told}, about ${self.cost:.4f}" if self.cost else told

    @property
    def spent(self) -> SpendAmount:
        """The estimate as if it were used."""
        return SpendAmount(tokens=self.input_tokens + self.output_tokens, dollars=self.cost or 0.0)


def estimate(
    request: Request, *, model: str | None, base_url: str, usual: int = DEFAULT_OUTPUT_TOKENS
) -> Estimate:
    """Return what `request` may come to; reads the price tables, which takes 0.2 s at first."""
    given, output = pricing.estimate_request_tokens(request), request.max_output or usual
    return Estimate(
        input_tokens=given,
        output_tokens=output,
        bounded=request.max_output is not None,
        cost=pricing.estimate_cost(given, output, model=model, base_url=base_url),
    )


def rate_limit_cost(request: Request) -> Cost:
    """Return what a request asks of the rate limits."""
    output = UNBOUNDED_OUTPUT_TOKENS if request.max_output is None else request.max_output
    return Cost(float(pricing.estimate_request_tokens(request)), float(output))
