"""The line of figures below an answer: model, tokens, cost, time and attempts.

Unknown figures are left out or named, never shown as zero. Each estimate begins with ``~``.
"""

from __future__ import annotations

import math

from nbcodex.errors import shorten
from nbcodex.models import CONTENT_FILTER, Reply, Usage, UsageTotals
from nbcodex.runtime.clock import format_duration

MIN_LISTED_S = 0.05  # shorter times are left out of the line
# Shorter waits in the queue are left out: they are not shown while a request runs, either.
MIN_LISTED_QUEUE_S = 1.0


def join_figures(*figures: str) -> str:
    """Return the figures that are not empty as one line."""
    return " · ".join(filter(None, figures))


def figures_line(reply: Reply) -> str:
    """Return the line below an answer, as plain text.

    The model's name in it comes from the server: escape the line for the format it is put into.
    """
    usage = reply.usage
    price = ""  # nothing was sent, the answer is simulated, or the tokens are not known
    if reply.reused:
        price = "reused, 0 tokens"
    elif reply.cost is not None and usage.total_tokens != 0:
        price = ("~" if usage.estimated else "") + format_dollars(reply.cost)
        if reply.unpriced_tools:
            price = f"at least {price} without {', '.join(reply.unpriced_tools)}"
    elif usage.total_tokens and not reply.simulated:
        price = "cost unknown"
    cut = reply.cut or ""
    if cut == CONTENT_FILTER:
        cut = f"cut by {CONTENT_FILTER}: this is not the whole answer"
    elif cut == "max_output_tokens":  # also where the user has set none
        cut = f"cut at {cut} or the model's own limit"
    elif cut:  # such as the setting ``max_answer``
        cut = f"cut {'at' if cut.startswith('max') else 'by'} {shorten(cut, max_chars=40)}"
    attempts = f"{reply.attempts} attempts" if reply.attempts > 1 else ""
    waited = f"waited {format_duration(reply.waited)}" if reply.waited > 0 else ""
    return join_figures(
        shorten(reply.model or "", max_chars=80),
        *token_figures(usage),
        price,
        format_duration(reply.seconds) if reply.seconds >= MIN_LISTED_S else "",
        ", ".join(filter(None, (attempts, waited))),
        f"queued {format_duration(reply.queued)}" if reply.queued >= MIN_LISTED_QUEUE_S else "",
        cut,
        "" if reply.status == "done" else reply.status,
        "simulated" if reply.simulated else "",
        *reply.notes,
    )


def token_figures(usage: Usage) -> list[str]:
    """Return the token counts in words, such as ``812 in (512 cached)`` and ``~431 out``."""
    if usage.total_tokens == 0:
        return ["0 tokens"]
    tilde = "~" if usage.estimated else ""
    figures = []
    if usage.input_tokens is not None:
        cached = f" ({usage.cached_tokens:,} cached)" if usage.cached_tokens else ""
        figures.append(f"{tilde}{usage.input_tokens:,} in{cached}")
    if usage.output_tokens is not None:
        reasoning = f" ({usage.reasoning_tokens:,} reasoning)" if usage.reasoning_tokens else ""
        figures.append(f"{tilde}{usage.output_tokens:,} out{reasoning}")
    return figures


def totals_line(totals: UsageTotals, *, count_requests: bool = True) -> str:
    """Return the summed figures of many requests, on one line."""
    requests = f"{totals.requests:,} request{'s' * (totals.requests != 1)}, "
    times = f"time{'s' * (totals.refusals != 1)}"
    return join_figures(
        f"{requests if count_requests else ''}{totals.answers:,} answered",
        *token_figures(totals.usage),
        f"tokens of {totals.unknown} unknown" if totals.unknown else "",
        total_cost(totals),
        f"limits reached {totals.refusals} {times}" if totals.refusals else "",
        # Requests wait at the same time: the sum may be longer than the kernel has run.
        f"waited {format_duration(totals.waited)} (sum over requests)" if totals.waited else "",
    )


def total_cost(totals: UsageTotals, *, at_least: str = "at least ") -> str:
    """Return the summed cost, empty if there is none; `at_least` marks a sum that is too low."""
    if not totals.cost:
        return f"cost of {totals.unpriced:,} unknown" if totals.unpriced else ""
    # The cost of some is unknown, or is known without that of their tools: the sum is lower.
    bound = at_least if totals.unpriced else "~" if totals.usage.estimated else ""
    return bound + format_dollars(totals.cost)


def format_dollars(dollars: float) -> str:
    """Return US dollars with two significant digits at least: ``$0.0052``, ``$1.37``."""
    # Most answers cost less than a cent: with two decimals they would all be $0.00.
    if dollars >= 1 or dollars <= 0:
        return f"${dollars:,.2f}"
    return f"${dollars:.{min(9, 1 - math.floor(math.log10(dollars)))}f}"
