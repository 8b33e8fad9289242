"""What is known of the limits, in plain words. Pure."""

from __future__ import annotations

import math

from nbcodex.models import MINUTE, LimitReading
from nbcodex.ratelimit.charge_policy import ChargePolicy
from nbcodex.ratelimit.sharing import LimitState
from nbcodex.runtime.clock import format_duration

_CHARGES: dict[ChargePolicy, str] = {
    "kept": "input and the whole of max_output, whatever the answer uses of it",
    "refunded": "input and max_output; what an answer does not use is given back at its end",
    "actual": "input at once, the output at the answer's end",
}


def lines(label: str, known: LimitState, now: float) -> list[str]:
    """Return what is known of one model's limits at an instant, a few lines; none if nothing is."""
    gauges = (("tokens", known.tokens), ("requests", known.requests))
    told = [_gauge(kind, gauge) for kind, gauge in gauges if gauge]
    told += [f"{each.name}: {each.figures}, by a refusal" for each in known.undeclared]
    if known.burst_tokens is not None and math.isfinite(known.burst_tokens):
        told.append(
            f"at once no more than about {known.burst_tokens:,.0f} tokens: a shorter window"
        )
    if known.closed_until is not None:
        name = f" ({known.limit.name})" if known.limit else ""
        told.append(f"closed for another {format_duration(known.closed_until - now)}{name}")
    if known.limit_before_reboot:
        told.append(
            f"{known.limit_before_reboot:,.0f} tokens a minute, last time; the next answer tells"
        )
    if not told and not known.was_used:
        return []
    if not told:
        told.append("no limits told yet")
    if known.tokens and not known.declared:
        told.append("found out by trial: its answers tell no limits")
    if known.history:
        used = f"answers use {known.history.output_share:.0%} of it"
        told.append(f"charged: {_CHARGES[known.policy]} (learnt from answers; {used})")
    elif known.tokens:
        told.append(f"charged, as long as nothing else is learnt: {_CHARGES[known.policy]}")
    if known.tokens:
        told.append(f"kept back: {known.margin:.1%} of the limit")
    if known.foreign_rate >= 1:
        told.append(f"somebody else takes about {known.foreign_rate * MINUTE:,.0f} tokens a minute")
    if others := known.other_processes:
        told.append(f"shared with {others} other active kernel{'s' * (others > 1)}")
    return [label, *(f"  {line}" for line in told)]


def _gauge(kind: str, gauge: LimitReading) -> str:
    rate = gauge.limit / MINUTE
    full = ""
    if gauge.full_in and gauge.limit > gauge.remaining:
        rate = (gauge.limit - gauge.remaining) / gauge.full_in
        full = f", full in {format_duration(gauge.full_in)}"
    left, refill = max(0.0, gauge.remaining), float(f"{rate * MINUTE:.3g}")
    return f"{left:,.0f} of {gauge.limit:,.0f} {kind} left, {refill:,.0f} a minute{full}"
