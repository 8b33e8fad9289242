"""The monitor as lines of text, and as the data that its widget draws. All functions are pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from nbcodex.errors import shorten
from nbcodex.journal.reads import OtherKernels
from nbcodex.models import UsageTotals
from nbcodex.notebook.display import panel
from nbcodex.notebook.display.panel import ACTIONS, MAX_SHOWN_WAIT_S, PanelState
from nbcodex.notebook.monitor.state import LogEntry, MonitorState, earliest_last_send, last_hour
from nbcodex.ratelimit.limit_model import stated_bucket
from nbcodex.rendering import figures
from nbcodex.runtime.clock import format_duration, format_time

MAX_LISTED_REQUESTS = 50  # one by one; other open requests are only counted


def monitor_text(state: MonitorState, now: float, wall: float) -> str:
    """Return the monitor as lines of text, at this instant of both clocks."""
    all_time, others = "", _other_kernels_text(state.other_kernels, wall)
    if state.all_time is not None:
        totals = figures.totals_line(state.all_time, count_requests=False)
        all_time = f"{_all_time_label(state).lower()}: {totals}"
    lines = [
        "Codex monitor",
        "simulated: nothing is charged" if _is_simulated(state) else "",
        *(_limits_line(state, label, now) for label in state.limits),
        *_open_requests(state, now, wall),
        f"last request: {figures.figures_line(state.last_reply)}" if state.last_reply else "",
        f"this session: {figures.totals_line(state.session)}",
        all_time,
        _hour_line(state, now),
        *(f"budget: {budget}" for budget in state.budgets),
        f"other kernels: {others}" if others else "",
        *("  ".join(_log_row(entry, now, wall)) for entry in state.log),
    ]
    return "\n".join(filter(None, lines))


def _limits_line(state: MonitorState, label: str, now: float) -> str:
    limits, parts = state.limits[label], []
    for resource, reading in (("tokens", limits.tokens), ("requests", limits.requests)):
        if reading is not None:
            # As it is now, if nothing has been sent since. Its instant 0.0 is `limits_at`.
            bucket = stated_bucket(reading)
            left = max(0.0, bucket.level_at(max(0.0, now - state.limits_at)))
            parts.append(f"~{left:,.0f} of {bucket.limit:,.0f} {resource} left")
    if limits.cooldown_until is not None and limits.cooldown_until > now:
        why = f": {limits.cooldown_limit.name}" if limits.cooldown_limit else ""
        parts.append(f"closed for another {_wait_text(limits.cooldown_until - now)}{why}")
    if limits.waiting:
        last = earliest_last_send(state, label)
        queue = f"{limits.waiting:,} queued for up to {limits.waiting_tokens:,.0f} tokens"
        wait = _wait_text(last - now) if last is not None and last > now else ""
        parts.append(queue + (f", the last for at least {wait}" if wait else ""))
    model, server = _model_and_server(label)
    return f"{model} at {server}: {' · '.join(parts) or 'no limits stated'}"


def _open_requests(state: MonitorState, now: float, wall: float) -> list[str]:
    if not state.open_requests:
        return ["no open requests"]
    count = len(state.open_requests)
    phases = Counter(request.phase for request in state.open_requests.values())
    parts = [f"{count} open request{'s' * (count > 1)}"]
    if phases["waiting"]:
        parts.append(f"{phases['waiting']} waiting to retry")
    if phases["cooldown"]:
        parts.append(f"{phases['cooldown']} in cooldown, sent in turn")
    lines = [" · ".join(parts) + ":"]
    for id_, request in list(state.open_requests.items())[:MAX_LISTED_REQUESTS]:
        prompt = f"“{request.prompt}” · " if request.prompt else ""
        lines.append(f"  {id_}  {prompt}{panel.status_line(request, now, wall)}")
    if count > MAX_LISTED_REQUESTS:
        lines.append(f"  and {count - MAX_LISTED_REQUESTS} more")
    return lines


def _hour_line(state: MonitorState, now: float) -> str:
    minutes = last_hour(state, now)
    total, hits = sum(m.tokens for m in minutes), sum(m.limit_hits for m in minutes)
    peak = max(m.tokens for m in minutes)
    reached = f"limits reached {hits} times" if hits != 1 else "a limit reached once"
    return f"last hour: {total:,} tokens, at most {peak:,} a minute, {reached}"


def _other_kernels_text(others: OtherKernels | None, wall: float) -> str:
    if others is None:
        return ""  # the journal has not been read
    if not others.kernels:
        return "no open requests"
    until = ""
    if others.resume_at is not None and wall < others.resume_at < wall + MAX_SHOWN_WAIT_S:
        until = f", the next at {format_time(others.resume_at, now=wall)}"
    waiting = f", {others.waiting:,} waiting{until}" if others.waiting else ""
    kernels = "1 has" if others.kernels == 1 else f"{others.kernels:,} have"
    return f"{kernels} {others.requests:,} open{waiting}"


def _log_row(entry: LogEntry, now: float, wall: float) -> list[str]:
    times = f" ({entry.times:,} times)" if entry.times > 1 else ""
    at = format_time(wall - (now - entry.at), now=wall)
    return [at, entry.request_id, entry.message + times]


def _wait_text(seconds: float) -> str:
    return format_duration(min(seconds, MAX_SHOWN_WAIT_S))


def _model_and_server(label: str) -> tuple[str, str]:
    # Of a key such as "gpt-5 at https://api.openai.com/v1 ORGANIZATION": "gpt-5" and
    # "api.openai.com/v1".
    model, _, server = label.rpartition(" at ")
    address = server.split(" ")[0]
    address = address.partition("://")[2] or address
    return shorten(model, max_chars=80), shorten(address, max_chars=80)


def _is_simulated(state: MonitorState) -> bool:
    last = state.last_reply is not None and state.last_reply.simulated
    return last or any(request.simulated for request in state.open_requests.values())


def _all_time_label(state: MonitorState) -> str:
    # The journal counts requests to the simulator, too, but not their answers: so the line of all
    # time has no number of requests.
    return "All time, real" if _is_simulated(state) else "All time"


TABLE_COLUMNS = ["answers", "input", "cached", "output", "reasoning", "cost", "waited"]


def monitor_data(state: MonitorState, now: float, wall: float) -> dict[str, Any]:
    """Return what the page draws; instants in ms of the kernel's clock, rates per second."""
    requests, last, label = list(state.open_requests.items()), None, "Last request"
    if state.last_reply is not None:
        # With its own usage, where a count that the server did not send is None, so blank, not 0.
        last = replace(UsageTotals.of(state.last_reply), usage=state.last_reply.usage, unknown=0)
        label += f", attempt {last.attempts}" if last.attempts > 1 else ""
    return {
        "limits": [_limits_data(state, label) for label in state.limits],
        "requests": [_request_data(id_, each) for id_, each in requests[:MAX_LISTED_REQUESTS]],
        "open": len(requests),
        "phases": Counter(each.phase for _, each in requests),
        "simulated": _is_simulated(state),
        "columns": TABLE_COLUMNS,
        "totals": [
            [label, *_totals_row(last)],
            ["This session", *_totals_row(state.session)],
            [_all_time_label(state), *_totals_row(state.all_time)],
        ],
        "minutes": [[m.tokens, m.limit_hits] for m in last_hour(state, now)],
        "hour": _hour_line(state, now),
        "budget": "; ".join(state.budgets),
        "other_kernels": _other_kernels_text(state.other_kernels, wall),
        "log": [_log_row(entry, now, wall) for entry in state.log],
    }


def _totals_row(totals: UsageTotals | None) -> list[str]:
    if totals is None:
        return [""] * len(TABLE_COLUMNS)
    cost = "unknown" if totals.unpriced and totals.usage.total_tokens is not None else ""
    if totals.cost:
        cost = figures.total_cost(totals, at_least="≥ ")  # the column is narrow
    usage, prefix = totals.usage, "≥ " if totals.unknown else "~" if totals.usage.estimated else ""
    counts = (usage.input_tokens, usage.cached_tokens, usage.output_tokens, usage.reasoning_tokens)
    tokens = ["" if count is None else f"{prefix}{count:,}" for count in counts]
    waited = format_duration(totals.waited) if totals.waited else ""
    return [f"{totals.answers:,}", *tokens, cost, waited]


def _limits_data(state: MonitorState, label: str) -> dict[str, Any]:
    limits, (model, server) = state.limits[label], _model_and_server(label)
    readings = []
    for resource, reading in (("tokens", limits.tokens), ("requests", limits.requests)):
        if reading is not None:
            bucket, at = stated_bucket(reading), _milliseconds(state.limits_at)
            level = {"size": bucket.limit, "rate": bucket.rate, "left": bucket.level_at(0.0)}
            readings.append({"kind": resource, "at": at, **level})
    why = limits.cooldown_limit.name if limits.cooldown_until and limits.cooldown_limit else ""
    queue = None
    if limits.waiting:
        queue = {
            "waiting": limits.waiting,
            "tokens": round(limits.waiting_tokens),
            "last": _milliseconds(earliest_last_send(state, label)),
        }
    return {
        "model": model,
        "server": server,
        "readings": readings,
        "closed_until": _milliseconds(limits.cooldown_until),
        "why": why,
        "queue": queue,
    }


def _request_data(id_: str, request: PanelState) -> dict[str, Any]:
    return {
        "id": id_,
        "prompt": request.prompt,
        "phase": request.phase,
        "why": request.limit.name if request.limit else request.reason,
        "details": panel.wait_reason(request),  # the same with the limit's figures
        "due": _milliseconds(request.resume_at),
        "since": _milliseconds(request.phase_started_at),
        "attempt": request.attempt,
        "tokens": ", ".join(figures.token_figures(request.usage)),
        "disabled": {name: panel.disabled_reason(request, name) for name in ACTIONS},
    }


def _milliseconds(at: float | None) -> int | None:
    # JSON has no infinity, and JavaScript no integers beyond 2**53.
    return round(at * 1000) if at is not None and abs(at) < 2**42 else None
