"""Commands about usage, the budget and the server's limits."""

from __future__ import annotations

import math

from IPython.display import display

from nbcodex.client import get_client
from nbcodex.models import MINUTE, LimitReading
from nbcodex.notebook.monitor import collector_of, monitor
from nbcodex.notebook.session import Session
from nbcodex.ratelimit.charge_policy import ChargePolicy
from nbcodex.ratelimit.sharing import LimitState
from nbcodex.rendering.figures import totals_line
from nbcodex.requests.budget import parse_cap
from nbcodex.runtime import event_loop
from nbcodex.runtime.clock import format_duration

# What is charged under each charge policy, in users' words.
_CHARGED: dict[ChargePolicy, str] = {
    "kept": "input and all of max_output, however much of it the answer uses",
    "refunded": "input and max_output; what the answer does not use is refunded at its end",
    "actual": "input at once, output at the end of the answer",
}


def show_usage(_: Session) -> None:
    """Show what this session has used: tokens, cost, waits."""
    totals = get_client().totals
    if not totals.by_model:
        print("No request has been sent in this session.")
    for model, total in totals.by_model.items():
        print(f"{model}: {totals_line(total)}")


def budget(session: Session, *amount: str) -> None:
    """Show, set or reset your own cap: budget [200k|$5|$5/day|$20/month|off|reset]."""
    client, text = get_client(), "".join(amount).lower()
    spending, settings = client.services().budget, session.settings
    # The `spending_journal`, if possible on disk, counts the usage even if `Codex.journal` is off.
    if text == "reset":
        event_loop.run(spending.reset(client.spending_journal(settings)))
        print("Usage counts from zero: this session's, and this day's and month's.")
    elif text == "off":
        session.config.own_budget = ""
        event_loop.run(spending.set_shared_cap(client.spending_journal(settings), cap=None))
    elif text:
        cap = parse_cap(text, check_minimum=True)
        # A cap of a day or month holds for all kernels, so it is in the journal.
        if cap.period == "session":
            session.config.own_budget = text
        else:
            journal = client.spending_journal(settings, create=True)
            event_loop.run(spending.set_shared_cap(journal, cap))
    if text:
        collector_of(client).changed.set()  # the monitor shows the caps, too
    # Of the settings as they are after the change.
    usage_lines = event_loop.run(client.budget_usage(session.config.settings()))
    for line in usage_lines:
        print(line)
    if not usage_lines:
        print("No budget is set: %codex budget 200k, $5, $5/day or $20/month sets one.")
    elif text == "off":
        print("This budget is set by Codex.budget (%config, or ipython_config.py).")


def show_monitor(_: Session) -> None:
    """Show all requests live: limits, totals, countdowns with buttons, retries."""
    display(monitor())  # type: ignore[no-untyped-call]


def show_limits(session: Session) -> None:
    """Show the known limits: what is left, refill, charge policy, cooldowns."""
    client = get_client()
    states = event_loop.run(client.limits(session.settings))
    blocks = [limit_lines(label, state, client.clock.now()) for label, state in states.items()]
    for lines in filter(None, blocks):
        print("\n".join(lines))
    if not any(blocks):
        print("No limits are known before the first answer.")
    if problem := client.limiter(session.settings).sharing_problem:
        print(problem)


def limit_lines(label: str, state: LimitState, now: float) -> list[str]:
    """Return what is known of one model's limits at an instant; empty if nothing is known."""
    readings = (("tokens", state.tokens), ("requests", state.requests))
    lines = [_reading_line(resource, reading) for resource, reading in readings if reading]
    lines += [f"{limit.name}: {limit.figures}, from a refusal" for limit in state.undeclared]
    if state.burst_tokens is not None and math.isfinite(state.burst_tokens):
        lines.append(f"at most about {state.burst_tokens:,.0f} tokens at once: a shorter window")
    if math.isfinite(at_once := state.max_parallel):
        plural = "s" * (at_once > 1)
        lines.append(f"at most {at_once:,.0f} request{plural} at once: more were not accepted")
    if math.isfinite(state.slow_down_rate):
        rate = f"{state.slow_down_rate * MINUTE:,.0f} tokens a minute"
        lines.append(f"about {rate} are sent: the server asked for slower growth")
    if state.cooldown_until is not None:
        name = f" ({state.cooldown_limit.name})" if state.cooldown_limit else ""
        lines.append(f"closed for another {format_duration(state.cooldown_until - now)}{name}")
    if state.limit_before_reboot:  # of this machine
        old_limit = f"{state.limit_before_reboot:,.0f} tokens a minute"
        lines.append(f"{old_limit} before the restart; the next answer shows the limit")
    if not lines and not state.was_used:
        return []
    if not lines:
        lines.append("no limits stated yet")
    if state.tokens and not state.has_limit_headers:
        lines.append("inferred: the server sends no rate-limit headers")
    charged = _CHARGED[state.policy]
    if state.output_share is not None:
        used = f"answers use {state.output_share:.0%} of it"
        lines.append(f"charged: {charged} (learned from answers; {used})")
    elif state.tokens:
        lines.append(f"assumed charging: {charged} (not yet confirmed)")
    if state.tokens:
        lines.append(f"safety margin: {state.margin:.1%} of the limit")
    if state.foreign_rate >= 1:
        lines.append(f"other users take about {state.foreign_rate * MINUTE:,.0f} tokens a minute")
    if others := state.other_processes:
        lines.append(f"shared with {others} other active kernel{'s' * (others > 1)}")
    return [label, *(f"  {line}" for line in lines)]


def _reading_line(resource: str, reading: LimitReading) -> str:
    """Return a text such as ``500 of 1,000 tokens left, 1,000 a minute, full in 30 s``."""
    rate, full = reading.limit / MINUTE, ""
    if reading.full_in and reading.limit > reading.remaining:
        # From the reading, because a server may refill faster or slower than its limit says.
        rate = (reading.limit - reading.remaining) / reading.full_in
        full = f", full in {format_duration(reading.full_in)}"
    left, refill = max(0.0, reading.remaining), float(f"{rate * MINUTE:.3g}")
    return f"{left:,.0f} of {reading.limit:,.0f} {resource} left, {refill:,.0f} a minute{full}"
