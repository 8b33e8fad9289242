"""What the monitor shows of all requests: a state derived from events and observations.

Owns the monitor's state; `view` puts it into words. Must not know IPython, widgets, threads or what
time it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from nbcodex import events
from nbcodex.errors import BudgetError, shorten
from nbcodex.journal.reads import OtherKernels
from nbcodex.models import MINUTE, Limit, LimitReading, Reply, Usage, UsageTotals
from nbcodex.notebook.display import panel
from nbcodex.notebook.display.panel import BYTES_PER_TOKEN, PanelState
from nbcodex.ratelimit.limit_model import figures_from_reading
from nbcodex.runtime.clock import format_duration

PLOT_MINUTES = 60
MAX_LOG_ENTRIES = 50

_AT_SERVER = {"sending", "thinking", "streaming"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextGrew(events.Event):
    """An answer grew by `size` bytes. Stands for many deltas: the monitor needs no text."""

    size: int
    reasoning: bool = False
    simulated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """The limits of one model at one server, and the requests that wait for them."""

    model: str
    server: str
    at: float  # the instant of the readings, which are None if the server does not state them
    tokens: LimitReading | None = None
    requests: LimitReading | None = None
    closed_until: float | None = None  # the end of the cooldown, and the limit that caused it
    limit: Limit | None = None
    waiting: int = 0  # requests that queue for capacity, and the tokens that they may use
    waiting_tokens: float = 0.0
    # The server is believed to charge all tokens that a request may use, used or not.
    charges_reserved: bool = True

    @property
    def readings(self) -> list[tuple[str, LimitReading]]:
        """The readings that there are, with what they count."""
        both = (("tokens", self.tokens), ("requests", self.requests))
        return [(kind, reading) for kind, reading in both if reading is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What was looked up at the instant `at` because no event says it; None if it was not."""

    at: float
    limits: tuple[ModelLimits, ...] | None = None
    session: UsageTotals | None = None  # of this process
    all_time: UsageTotals | None = None  # of the journal
    other_kernels: OtherKernels | None = None
    budgets: tuple[str, ...] = ()  # how far the user's own caps are used up, in words


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """A retry or a failure: the request and the instant of the latest of `times` equal ones."""

    at: float
    request_id: str
    message: str
    times: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MinuteStats:
    """One minute of the plot."""

    tokens: int = 0
    limit_hits: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorState:
    """All that a user sees of all requests. Instants are those of the events (`Clock.now`)."""

    # The requests that have not ended, by id, oldest first; without their text.
    open: Mapping[str, PanelState] = field(default_factory=dict)
    # As last observed.
    limits: tuple[ModelLimits, ...] = ()
    session: UsageTotals = field(default_factory=lambda: UsageTotals(usage=Usage()))
    all_time: UsageTotals | None = None
    other_kernels: OtherKernels | None = None
    budgets: tuple[str, ...] = ()
    last: Reply | None = None  # the result of the last request, without its text
    # Tokens and limit hits of the last hour, by minute of the events' clock.
    minutes: Mapping[int, MinuteStats] = field(default_factory=dict)
    log: tuple[LogEntry, ...] = ()  # retries and failures, newest last


def apply_events(state: MonitorState, inputs: Iterable[events.Event | Observation]) -> MonitorState:
    """Return the state after `inputs`."""
    # The mappings are copied once for each call: with thousands of open requests, a copy for each
    # event would be quadratic. The functions below change these copies.
    state = replace(state, open=dict(state.open), minutes=dict(state.minutes))
    for each in inputs:
        if isinstance(each, Observation):
            state = _apply_observation(state, each)
        else:
            state = _apply_event(state, each)
    return state


def _apply_observation(state: MonitorState, seen: Observation) -> MonitorState:
    names = ("limits", "session", "all_time", "other_kernels")
    known = {name: value for name in names if (value := getattr(seen, name)) is not None}
    return replace(state, budgets=seen.budgets, **known)


def _apply_event(state: MonitorState, event: events.Event) -> MonitorState:
    requests: dict[str, PanelState] = state.open  # type: ignore[assignment]  # the copy
    request = requests.get(event.request_id)
    if isinstance(event, events.Ending):
        requests.pop(event.request_id, None)
        at_server = request is not None and request.phase in _AT_SERVER
        return _end(state, event, at_server=at_server)
    if isinstance(event, TextGrew):
        if request is not None:
            requests[event.request_id] = _grow(request, event)
        return state
    if request is None:
        request = PanelState(phase_started_at=event.at, started_at=event.at)
    requests[event.request_id] = panel.apply_event(request, event)
    if isinstance(event, events.BackingOff):
        return _log(state, event, _refusal(event), limit_hits=event.limit is not None)
    return state


def _grow(request: PanelState, event: TextGrew) -> PanelState:
    phase: panel.Phase = "thinking" if event.reasoning else "streaming"
    more = math.ceil(event.size / BYTES_PER_TOKEN)
    return replace(
        request,
        phase=phase,
        simulated=event.simulated or request.simulated,
        phase_started_at=request.phase_started_at if phase == request.phase else event.at,
        usage=replace(request.usage, output_tokens=(request.usage.output_tokens or 0) + more),
    )


def _end(state: MonitorState, event: events.Ending, *, at_server: bool) -> MonitorState:
    reply = event.reply
    if isinstance(event, events.Parked | events.Failed):
        kind = "parked" if isinstance(event, events.Parked) else "failed"
        # A request that is parked while it backs off has had its limit hit counted already.
        hit = at_server and getattr(event.error, "limit", None) is not None
        # The message of a budget has other figures each time, which would fill the log.
        is_budget = isinstance(event.error, BudgetError)
        why = "it would exceed your budget" if is_budget else shorten(event.error.message)
        state = _log(state, event, f"{kind}: {why}", limit_hits=hit)
    if not reply.attempts:
        return state  # reused from the journal, or never sent
    usage = reply.usage
    _count(state, event.at, tokens=(usage.input_tokens or 0) + (usage.output_tokens or 0))
    return replace(state, last=replace(reply, text="", parsed=None))


def _refusal(event: events.BackingOff) -> str:
    limit, error = event.limit, event.error
    if limit is None:
        why = f"{error.title}: {shorten(error.message)}"
    else:
        why = f"{limit.name}: {limit.figures}" if limit.figures else limit.name
    wait = event.resume_at - event.at
    again = ""
    if math.isfinite(wait):
        again = f", again in {format_duration(min(wait, panel.MAX_SHOWN_WAIT_S))}"
    return f"attempt {event.attempt} refused{again} · {why}"


def _log(
    state: MonitorState, event: events.Event, message: str, *, limit_hits: int = 0
) -> MonitorState:
    _count(state, event.at, limit_hits=limit_hits)
    entry = LogEntry(at=event.at, request_id=event.request_id, message=message)
    if state.log and state.log[-1].message == message:
        *before, last = state.log
        return replace(state, log=(*before, replace(last, at=event.at, times=last.times + 1)))
    return replace(state, log=(*state.log, entry)[-MAX_LOG_ENTRIES:])


def _count(state: MonitorState, at: float, *, tokens: int = 0, limit_hits: int = 0) -> None:
    minutes: dict[int, MinuteStats] = state.minutes  # type: ignore[assignment]  # the copy
    now = int(at // MINUTE)
    old = minutes.get(now, MinuteStats())
    minutes[now] = MinuteStats(tokens=old.tokens + tokens, limit_hits=old.limit_hits + limit_hits)
    for minute in [m for m in minutes if m <= now - PLOT_MINUTES]:
        del minutes[minute]


def last_hour(state: MonitorState, now: float) -> list[MinuteStats]:
    """Return the minutes of the last hour, oldest first, the present one last."""
    present = int(now // MINUTE)
    first = present - PLOT_MINUTES + 1
    return [state.minutes.get(m, MinuteStats()) for m in range(first, present + 1)]


def projected_level(reading: LimitReading, seconds: float) -> tuple[float, float, float]:
    """Return size, refill per second, and level `seconds` after the reading, if nothing is sent."""
    limit, rate, left = figures_from_reading(reading)
    return limit, rate, min(limit, left + rate * max(0.0, seconds))


def earliest_last_send(state: MonitorState, limits: ModelLimits) -> float | None:
    """Return an instant before which the last request in the queue is not sent; None if unknown.

    This is a bound, not a forecast: the limiter decides the order, and other users of the key take
    capacity too. It is the latest instant that is certain: the start that was announced to any
    request in the queue, the end of the cooldown, and the time until the bucket will have held all
    tokens that the queue may use.
    """
    if not limits.waiting:
        return None
    instants = [
        request.resume_at for request in state.open.values() if _is_in_queue(state, limits, request)
    ]
    instants.append(limits.closed_until)
    # A server that refunds unused tokens lets the queue go sooner than this.
    if limits.charges_reserved and limits.tokens is not None:
        _, rate, left = projected_level(limits.tokens, 0.0)
        if rate > 0:
            instants.append(limits.at + (limits.waiting_tokens - left) / rate)
    return max((at for at in instants if at is not None and math.isfinite(at)), default=None)


def _is_in_queue(state: MonitorState, limits: ModelLimits, request: PanelState) -> bool:
    # A cooldown without a limit is a moment that the user chose (`%codex resume --at-reset`).
    in_cooldown = request.phase == "cooldown" and request.limit is not None
    if request.phase != "queued" and not in_cooldown:
        return False
    # A request knows its model but not its server: with two queues for one model it is in either.
    queues = [each for each in state.limits if each.waiting and request.model in (None, each.model)]
    return queues == [limits]
