"""What is known of all requests of a process: a pure function of events and observations.

Owns the monitor's state; `overview` puts it into words. Must not know IPython, widgets, threads or
what time it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from nbcodex import events
from nbcodex.errors import BudgetError, shorten
from nbcodex.journal.reads import OtherKernels
from nbcodex.models import MINUTE, LimitReading, LimitSnapshot, Reply, Usage, UsageTotals
from nbcodex.notebook.display import panel
from nbcodex.notebook.display.panel import BYTES_PER_TOKEN, PanelState
from nbcodex.ratelimit.rate_limiter import Cooldown
from nbcodex.ratelimit.refusals import figures_from_reading
from nbcodex.runtime.clock import format_duration

HOUR = 60
"""Minutes that the plot goes back."""

_SENT = {"sending", "thinking", "streaming"}

LOGGED = 50
"""Retries that are remembered."""

Limits = Mapping[str, tuple[LimitSnapshot | None, Cooldown | None]]
"""By bucket what the last headers told, and whether it is closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Who waits for their turn at a bucket.

    Parameters
    ----------
    waiting : int
        How many requests.
    asked : float
        The tokens that they may use.
    kept : bool
        Whether the server is believed to charge all of these, used or not.
    """

    waiting: int
    asked: float
    kept: bool = True


Lines = Mapping[str, Line]
"""By bucket who waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grown(events.Event):
    """More of an answer: so many bytes, of which the monitor needs no text."""

    size: int
    reasoning: bool = False
    simulated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What no event tells, as it was at the instant `at`; None where it was not looked up.

    Parameters
    ----------
    limits, lines : mapping or None
        The buckets of this process, and who waits for them.
    session, ever : UsageTotals or None
        The totals of this process, and of all time.
    elsewhere : Elsewhere or None
        What other kernels have under way.
    budgets : tuple of str
        How far the user's own caps are used up, in words.
    """

    at: float
    limits: Limits | None = None
    lines: Lines | None = None
    session: UsageTotals | None = None
    ever: UsageTotals | None = None
    elsewhere: OtherKernels | None = None
    budgets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """A line of the log: what befell a request, and last at which instant of the events' clock.

    Others that met the same right after it are counted in `times`.
    """

    at: float
    request_id: str
    what: str
    times: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Minute:
    """What one minute of the plot holds."""

    tokens: int = 0
    hits: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorState:
    """All that a user sees of all requests. Instants are the events' own (`Clock.now`).

    Parameters
    ----------
    open : mapping
        The requests that have not ended, by id, oldest first; without their text.
    limits, lines, session, ever, elsewhere, budgets
        As last observed.
    last : Reply or None
        What the last request came to, without its text.
    minutes : mapping
        Tokens and limit hits of the last hour, by minute of the events' clock.
    log : tuple of Logged
        Retries and failures, newest last.
    """

    open: Mapping[str, PanelState] = field(default_factory=dict)
    limits: Limits = field(default_factory=dict)
    lines: Lines = field(default_factory=dict)
    session: UsageTotals = field(default_factory=lambda: UsageTotals(usage=Usage()))
    ever: UsageTotals | None = None
    elsewhere: OtherKernels | None = None
    budgets: tuple[str, ...] = ()
    last: Reply | None = None
    minutes: Mapping[int, Minute] = field(default_factory=dict)
    log: tuple[Logged, ...] = ()


def reduce(state: MonitorState, heard: Iterable[events.Event | Observed]) -> MonitorState:
    """Return the state after what was heard; a batch costs one copy, however many are open."""
    state = replace(state, open=dict(state.open), minutes=dict(state.minutes))
    for each in heard:
        state = _observe(state, each) if isinstance(each, Observed) else _hear(state, each)
    return state


def _observe(state: MonitorState, seen: Observed) -> MonitorState:
    names = ("limits", "lines", "session", "ever", "elsewhere")
    news = {name: value for name in names if (value := getattr(seen, name)) is not None}
    return replace(state, budgets=seen.budgets, **news)


def _hear(state: MonitorState, event: events.Event) -> MonitorState:
    rows: dict[str, PanelState] = state.open  # type: ignore[assignment]  # a copy of our own
    row = rows.get(event.request_id)
    if isinstance(event, events.Ending):
        rows.pop(event.request_id, None)
        return _end(state, event, refused=row is not None and row.phase in _SENT)
    if isinstance(event, Grown):
        if row is not None:
            rows[event.request_id] = _grow(row, event)
        return state
    rows[event.request_id] = panel.reduce(row or PanelState(since=event.at, began=event.at), event)
    if isinstance(event, events.BackingOff):
        return _log(state, event, _refusal(event), hits=event.limit is not None)
    return state


def _grow(row: PanelState, event: Grown) -> PanelState:
    phase: panel.Phase = "thinking" if event.reasoning else "streaming"
    more = math.ceil(event.size / BYTES_PER_TOKEN)
    return replace(
        row,
        phase=phase,
        simulated=event.simulated or row.simulated,
        since=row.since if phase == row.phase else event.at,
        usage=replace(row.usage, output_tokens=(row.usage.output_tokens or 0) + more),
    )


def _end(state: MonitorState, event: events.Ending, *, refused: bool) -> MonitorState:
    """Return the state after an ending; `refused`: a limit in it has met an attempt just now."""
    reply = event.reply
    if isinstance(event, events.Parked | events.Failed):
        kind = "parked" if isinstance(event, events.Parked) else "failed"
        hits = refused and getattr(event.error, "limit", None) is not None
        over = isinstance(event.error, BudgetError)  # its figures are another in each
        why = "it would pass your budget" if over else shorten(event.error.message)
        state = _log(state, event, f"{kind}: {why}", hits=hits)
    if not reply.attempts:
        return state
    used = reply.usage
    _count(state, event.at, tokens=(used.input_tokens or 0) + (used.output_tokens or 0))
    return replace(state, last=replace(reply, text="", parsed=None))


def _refusal(event: events.BackingOff) -> str:
    limit, error = event.limit, event.error
    told = f"{limit.name}: {limit.figures}" if limit and limit.figures else ""
    why = told or (limit.name if limit else f"{error.title}: {shorten(error.message)}")
    wait = event.resume_at - event.at
    again = f", again in {format_duration(min(wait, panel.FAR))}" if math.isfinite(wait) else ""
    return f"attempt {event.attempt} refused{again} · {why}"


def _log(state: MonitorState, event: events.Event, what: str, *, hits: int = 0) -> MonitorState:
    _count(state, event.at, hits=hits)
    line = Logged(at=event.at, request_id=event.request_id, what=what)
    if state.log and state.log[-1].what == what:
        *before, last = state.log
        return replace(state, log=(*before, replace(last, at=event.at, times=last.times + 1)))
    return replace(state, log=(*state.log, line)[-LOGGED:])


def _count(state: MonitorState, at: float, *, tokens: int = 0, hits: int = 0) -> None:
    """Put figures into their minute, and forget those of more than an hour ago."""
    minutes: dict[int, Minute] = state.minutes  # type: ignore[assignment]  # a copy of our own
    now = int(at // MINUTE)
    old = minutes.get(now, Minute())
    minutes[now] = Minute(tokens=old.tokens + tokens, hits=old.hits + hits)
    for minute in [m for m in minutes if m <= now - HOUR]:
        del minutes[minute]


def last_hour(state: MonitorState, now: float) -> list[Minute]:
    """Return the minutes of the last hour, oldest first, the present one last."""
    present = int(now // MINUTE)
    return [state.minutes.get(m, Minute()) for m in range(present - HOUR + 1, present + 1)]


def level(gauge: LimitReading, seconds: float) -> tuple[float, float, float]:
    """Return size and rate of a bucket, and its level `seconds` after its headers: refilled."""
    limit, rate, left = figures_from_reading(gauge)
    return limit, rate, min(limit, left + rate * max(0.0, seconds))


def gauges(snapshot: LimitSnapshot | None) -> list[tuple[str, LimitReading]]:
    """Return the buckets that headers named."""
    if snapshot is None:
        return []
    named = (("tokens", snapshot.tokens), ("requests", snapshot.requests))
    return [(kind, gauge) for kind, gauge in named if gauge is not None]


def last_turn(state: MonitorState, bucket: str) -> float | None:
    """Return the instant before which the last in line surely has no turn; None if unknown.

    That is no forecast: who goes when is the ledger's affair, and others on the same key come
    between. It is the latest of what is certain as things stand: what those in line have been told,
    the end of the hold, and when the limit will have held all that is asked for.
    """
    line = state.lines.get(bucket)
    if line is None or not line.waiting:
        return None
    snapshot, hold = state.limits.get(bucket, (None, None))
    instants = [row.resume_at for row in state.open.values() if _is_in_line(state, bucket, row)]
    if hold is not None:
        instants.append(hold.until)
    if line.kept and snapshot is not None and snapshot.tokens is not None:
        _, rate, left = level(snapshot.tokens, 0.0)
        if rate > 0:
            instants.append(snapshot.at + (line.asked - left) / rate)
    return max((at for at in instants if at is not None and math.isfinite(at)), default=None)


def _is_in_line(state: MonitorState, bucket: str, row: PanelState) -> bool:
    """Return whether a request surely waits for that bucket; a row knows its model, no server."""
    if row.phase != "queued" and not (row.phase == "held" and row.limit is not None):
        return False  # what is held by no limit waits for the moment that its user chose
    names = [
        name
        for name, line in state.lines.items()
        if line.waiting and row.model in (None, _model(name))
    ]
    return names == [bucket]


def _model(bucket: str) -> str:
    return bucket.rpartition(" ")[2]


def place(bucket: str) -> tuple[str, str]:
    """Return the model of a bucket, and the server that it is limited at."""
    server, *_, model = bucket.split(" ")
    return shorten(model, 80), shorten(server.partition("://")[2] or server, 80)
