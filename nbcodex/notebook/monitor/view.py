"""The monitor in words: as lines of text, and as what its widget draws.

Owns how figures are put. Pure, like `monitor`; times that only the clock moves are left to whoever
draws, as instants of the kernel's clock.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from nbcodex.journal.reads import OtherKernels
from nbcodex.models import Reply, Usage, UsageTotals
from nbcodex.notebook.display import panel
from nbcodex.notebook.display.panel import ACTIONS, PanelState
from nbcodex.notebook.monitor.state import (
    Logged,
    MonitorState,
    gauges,
    last_hour,
    last_turn,
    level,
    place,
)
from nbcodex.rendering.figures import figures_line, format_dollars, token_figures
from nbcodex.runtime.clock import format_duration, format_time

ROWS = 50
"""Open requests that are listed one by one."""


def status(state: MonitorState, now: float, wall: float) -> str:
    """Return the monitor as lines of text, at this instant of both clocks."""
    told = [
        "Codex monitor",
        "simulated: nothing of it is paid" if _simulated(state) else "",
        *(_limit(state, name, now) for name in state.limits),
        *_open(state, now, wall),
        f"last request: {figures_line(state.last)}" if state.last else "",
        f"this session: {sums(state.session)}",
        f"{_ever(state).lower()}: {_answered(state.ever)}" if state.ever else "",
        hour(state, now),
        *(f"budget: {told}" for told in state.budgets),
        f"other kernels: {others(state.elsewhere, wall)}" if state.elsewhere else "",
        *(f"{when(line, now, wall)}  {line.request_id}  {befell(line)}" for line in state.log),
    ]
    return "\n".join(filter(None, told))


def _limit(state: MonitorState, name: str, now: float) -> str:
    snapshot, hold = state.limits[name]
    told = []
    for kind, gauge in gauges(snapshot):
        size, _, left = level(gauge, now - snapshot.at if snapshot else 0.0)
        told.append(f"~{max(0.0, left):,.0f} of {size:,.0f} {kind} left")
    if hold and hold.until > now:
        why = f": {hold.limit.name}" if hold.limit else ""
        told.append(f"closed for another {format_duration(min(hold.until - now, panel.FAR))}{why}")
    told.append(_line(state, name, now))
    return f"{' at '.join(place(name))}: {' · '.join(filter(None, told)) or 'no limits told'}"


def _line(state: MonitorState, name: str, now: float) -> str:
    """Return who waits for a bucket, and how long the last of them waits at least."""
    line, last = state.lines.get(name), last_turn(state, name)
    if line is None or not line.waiting:
        return ""
    told = f"{line.waiting:,} in line for up to {line.asked:,.0f} tokens"
    if last is None or last <= now:
        return told
    return f"{told}, the last in {format_duration(min(last - now, panel.FAR))} or more"


def _open(state: MonitorState, now: float, wall: float) -> list[str]:
    if not state.open:
        return ["no open requests"]
    head = f"{len(state.open)} open request{'s' * (len(state.open) > 1)}"
    phases = Counter(row.phase for row in state.open.values())
    waiting = f"{phases['waiting']} waiting to retry" if phases["waiting"] else ""
    held = f"{phases['held']} held back, sent in turn" if phases["held"] else ""
    head = " · ".join(filter(None, (head, waiting, held))) + ":"
    lines = [
        f"  {id_}  {prompt}{panel.status(row, now, wall)}"
        for id_, row in state.open.items()
        for prompt in [f"“{row.prompt}” · " if row.prompt else ""]
    ]
    return [head, *lines[:ROWS], *([f"  and {len(lines) - ROWS} more"] * (len(lines) > ROWS))]


def sums(total: UsageTotals) -> str:
    """Return what many requests came to, on one line."""
    asked = f"{total.requests:,} request{'s' * (total.requests != 1)}"
    return f"{asked}, {_answered(total)}"


def _answered(total: UsageTotals) -> str:
    told = [
        f"{total.answers:,} answered",
        *token_figures(total.usage),
        f"tokens of {total.unknown} unknown" if total.unknown else "",
        cost(total),
        f"waited {format_duration(total.waited)}" if total.waited else "",
    ]
    return " · ".join(filter(None, told))


def cost(total: UsageTotals) -> str:
    """Return what it cost, as far as that is known."""
    unknown = f"cost of {total.unpriced} unknown" if total.unpriced else ""
    about = "~" if total.usage.estimated else ""
    return ", ".join(
        filter(None, (about + format_dollars(total.cost) if total.cost else "", unknown))
    )


def hour(state: MonitorState, now: float) -> str:
    """Return the plot in words."""
    minutes = last_hour(state, now)
    total, hits = sum(m.tokens for m in minutes), sum(m.hits for m in minutes)
    most = max(m.tokens for m in minutes)
    met = f"limits met {hits} times" if hits != 1 else "a limit met once"
    return f"last hour: {total:,} tokens, at most {most:,} a minute, {met}"


def others(seen: OtherKernels, wall: float) -> str:
    """Return what other kernels do, in words; an empty one has nothing under way."""
    if not seen.kernels:
        return "nothing under way"
    until = ""
    if seen.resume_at is not None and wall < seen.resume_at < wall + panel.FAR:
        until = f", the next at {format_time(seen.resume_at, now=wall)}"
    waiting = f", {seen.waiting:,} waiting{until}" if seen.waiting else ""
    kernels = "1 has" if seen.kernels == 1 else f"{seen.kernels:,} have"
    return f"{kernels} {seen.requests:,} under way{waiting}"


def when(line: Logged, now: float, wall: float) -> str:
    """Return the time of day of a line in the log."""
    return format_time(wall - (now - line.at), now=wall)


def befell(line: Logged) -> str:
    """Return what a line of the log tells, and how often it was so in a row."""
    return f"{line.what} ({line.times:,} times)" if line.times > 1 else line.what


# What the widget draws.


def picture(state: MonitorState, now: float, wall: float) -> dict[str, Any]:
    """Return what the browser draws. Instants are in ms of the kernel's clock, rates per second."""
    rows = list(state.open.items())
    return {
        "limits": [_bucket(state, name) for name in state.limits],
        "rows": [_row(id_, row) for id_, row in rows[:ROWS]],
        "open": len(rows),
        "phases": Counter(row.phase for _, row in rows),
        "simulated": _simulated(state),
        "sums": [
            [_last_name(state), *_last(state)],
            ["This session", *_columns(state.session)],
            [_ever(state), *(_columns(state.ever) if state.ever else [""] * len(COLUMNS))],
        ],
        "columns": COLUMNS,
        "minutes": [[m.tokens, m.hits] for m in last_hour(state, now)],
        "hour": hour(state, now),
        "budget": "; ".join(state.budgets),
        "others": others(state.elsewhere, wall) if state.elsewhere else "",
        "log": [[when(line, now, wall), line.request_id, befell(line)] for line in state.log],
    }


COLUMNS = ["answers", "input", "cached", "output", "reasoning", "cost", "waited"]


def _columns(total: UsageTotals) -> list[str]:
    least = "≥ " if total.unknown else "~" if total.usage.estimated else ""
    return [
        f"{total.answers:,}",
        *_counted(total.usage, least),
        _least_cost(total),
        format_duration(total.waited) if total.waited else "",
    ]


def _least_cost(total: UsageTotals) -> str:
    """Return what it cost in the width of a column: at least so much, where some is unknown."""
    if total.unpriced and not total.cost:
        return "unknown"
    about = "≥ " if total.unpriced else "~" if total.usage.estimated else ""
    return about + format_dollars(total.cost) if total.cost else ""


def _ever(state: MonitorState) -> str:
    """Return what the counters of all time are called: they leave out what the simulator made.

    Their number of requests does not, and is therefore never told.
    """
    return "All time, real" if _simulated(state) else "All time"


def _simulated(state: MonitorState) -> bool:
    """Return whether it is a simulator that is asked, as far as that is known."""
    last = state.last is not None and state.last.simulated
    return last or any(row.simulated for row in state.open.values())


def _last_name(state: MonitorState) -> str:
    attempts = 0 if state.last is None else state.last.attempts
    return f"Last request, attempt {attempts}" if attempts > 1 else "Last request"


def _last(state: MonitorState) -> list[str]:
    if (reply := state.last) is None:
        return [""] * len(COLUMNS)
    about = "~" if reply.usage.estimated else ""
    return [
        "1" if reply.status == "done" else "0",
        *_counted(reply.usage, about),
        about + format_dollars(reply.cost) if reply.cost is not None else _no_price(reply),
        format_duration(reply.waited) if reply.waited else "",
    ]


def _no_price(reply: Reply) -> str:
    """Return what is told of a cost that is not known: nothing, where there can be none."""
    return "unknown" if reply.usage.total_tokens and not reply.simulated else ""


def _counted(usage: Usage, about: str) -> list[str]:
    figures_ = (
        usage.input_tokens,
        usage.cached_tokens,
        usage.output_tokens,
        usage.reasoning_tokens,
    )
    return ["" if n is None else f"{about}{n:,}" for n in figures_]


def _bucket(state: MonitorState, name: str) -> dict[str, Any]:
    snapshot, hold = state.limits[name]
    model, server = place(name)
    drawn = []
    for kind, gauge in gauges(snapshot):
        size, rate, left = level(gauge, 0.0)
        at = _ms(snapshot.at if snapshot else 0.0)
        drawn.append({"kind": kind, "size": size, "rate": rate, "left": left, "at": at})
    return {
        "model": model,
        "server": server,
        "gauges": drawn,
        "closed_until": _ms(hold.until) if hold else None,
        "why": hold.limit.name if hold and hold.limit else "",
        "line": _drawn_line(state, name),
    }


def _drawn_line(state: MonitorState, name: str) -> dict[str, Any] | None:
    line = state.lines.get(name)
    if line is None or not line.waiting:
        return None
    last = _ms(last_turn(state, name))
    return {"waiting": line.waiting, "asked": round(line.asked), "last": last}


def _row(id_: str, row: PanelState) -> dict[str, Any]:
    limited = row.limit.name if row.limit else row.reason
    if row.phase == "queued":
        limited = limited.partition(": ")[2]  # the phase says the rest
    return {
        "id": id_,
        "prompt": row.prompt,
        "phase": row.phase,
        "why": limited,
        "about": panel.cause(row),
        "due": _ms(row.resume_at),
        "since": _ms(row.since),
        "attempt": row.attempt,
        "tokens": ", ".join(token_figures(row.usage)),
        "refusals": {name: panel.refusal(row, name) for name in ACTIONS},
    }


def _ms(at: float | None) -> int | None:
    return round(at * 1000) if at is not None and abs(at) < 2**42 else None
