"""What the monitor shows of all requests: a state derived from their events and from look-ups.

All functions are pure and take the time as an argument. `view` puts the state into words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from nbcodex import events
from nbcodex.errors import BudgetError, shorten
from nbcodex.journal.reads import OtherKernels
from nbcodex.models import MINUTE, Reply, Usage, UsageTotals
from nbcodex.notebook.display import panel
from nbcodex.notebook.display.panel import GrowingText, PanelState
from nbcodex.ratelimit.limit_model import stated_bucket
from nbcodex.ratelimit.sharing import LimitState
from nbcodex.runtime.clock import format_duration

PLOT_MINUTES = 60
MAX_LOG_ENTRIES = 50

_SENT_PHASES = {"sending", "thinking", "streaming"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """A retry or a failure, or several successive ones with the same message."""

    at: float  # when the last of them happened
    request_id: str  # of the first of them
    message: str
    times: int = 1


class MinuteStats(NamedTuple):
    """One minute of the plot."""

    tokens: int = 0
    limit_hits: int = 0  # attempts that a limit refused


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorState:
    """All that a user sees of all requests. Instants are those of the events (`Clock.now`)."""

    # Derived from events: the requests that have not ended, by id, oldest first, without their
    # text; tokens and limit hits of the last hour, by minute; retries and failures, newest last.
    open_requests: Mapping[str, PanelState] = field(default_factory=dict)
    minutes: Mapping[int, MinuteStats] = field(default_factory=dict)
    log: tuple[LogEntry, ...] = ()
    last_reply: Reply | None = None  # of the last request that was sent, without its text
    # Looked up, because no event states it: the limits as of the instant `limits_at`, by "MODEL at
    # SERVER"; the totals of this process, at first unknown, and of the journal; how many requests
    # are open in other kernels; how much of each budget is used. None: not read yet.
    limits: Mapping[str, LimitState] = field(default_factory=dict)
    limits_at: float = 0.0
    session: UsageTotals = field(default_factory=lambda: UsageTotals(usage=Usage()))
    all_time: UsageTotals | None = None
    other_kernels: OtherKernels | None = None
    budgets: tuple[str, ...] = ()


def apply_events(state: MonitorState, new: Iterable[events.Event]) -> MonitorState:
    """Return the state after the events `new`."""
    # The mappings are copied once in each call, and the functions below change these copies: with
    # thousands of open requests, a copy for each event would be quadratic.
    state = replace(state, open_requests=dict(state.open_requests), minutes=dict(state.minutes))
    for event in new:
        state = _apply_event(state, event)
    return state


def _apply_event(state: MonitorState, event: events.Event) -> MonitorState:
    requests: dict[str, PanelState] = state.open_requests  # type: ignore[assignment]  # the copy
    request = requests.get(event.request_id)
    if isinstance(event, events.Ending):
        requests.pop(event.request_id, None)
        was_sent = request is not None and request.phase in _SENT_PHASES
        return _apply_ending(state, event, was_sent=was_sent)
    if request is None:
        if isinstance(event, events.Delta):
            return state  # it came after the ending
        request = PanelState(phase_started_at=event.at, started_at=event.at)
    request = panel.apply_event(request, event)
    # The monitor needs only the sizes of the texts.
    text, reasoning = (
        GrowingText(utf8_bytes=each.utf8_bytes) for each in (request.text, request.reasoning)
    )
    requests[event.request_id] = replace(request, text=text, reasoning=reasoning)
    if not isinstance(event, events.BackingOff):
        return state
    left = request.seconds_left(event.at)
    again = "" if left is None else f", again in {format_duration(left)}"
    what = "refused" if event.limit else "failed"
    message = f"attempt {event.attempt} {what}{again} · {panel.wait_reason(request)}"
    return _add_to_log(state, event, message, limit_hits=event.limit is not None)


def _apply_ending(state: MonitorState, event: events.Ending, *, was_sent: bool) -> MonitorState:
    reply = event.reply
    if isinstance(event, events.Parked | events.Failed):
        outcome = "parked" if isinstance(event, events.Parked) else "failed"
        # The limit hit of a request that is parked while it backs off was counted by `BackingOff`.
        hit = was_sent and getattr(event.error, "limit", None) is not None
        # The message of a budget has other figures each time, which would fill the log.
        is_budget = isinstance(event.error, BudgetError)
        why = "it would exceed your budget" if is_budget else shorten(event.error.message)
        state = _add_to_log(state, event, f"{outcome}: {why}", limit_hits=hit)
    if not reply.attempts:
        return state  # reused from the journal, or never sent
    usage = reply.usage
    _count_in_minute(state, event.at, tokens=(usage.input_tokens or 0) + (usage.output_tokens or 0))
    return replace(state, last_reply=replace(reply, text="", parsed=None))


def _add_to_log(
    state: MonitorState, event: events.Event, message: str, *, limit_hits: int = 0
) -> MonitorState:
    _count_in_minute(state, event.at, limit_hits=limit_hits)
    if state.log and state.log[-1].message == message:
        *before, last = state.log
        return replace(state, log=(*before, replace(last, at=event.at, times=last.times + 1)))
    entry = LogEntry(at=event.at, request_id=event.request_id, message=message)
    return replace(state, log=(*state.log, entry)[-MAX_LOG_ENTRIES:])


def _count_in_minute(
    state: MonitorState, at: float, *, tokens: int = 0, limit_hits: int = 0
) -> None:
    minutes: dict[int, MinuteStats] = state.minutes  # type: ignore[assignment]  # the copy
    minute = int(at // MINUTE)
    old = minutes.get(minute, MinuteStats())
    minutes[minute] = MinuteStats(old.tokens + tokens, old.limit_hits + limit_hits)
    for expired in [m for m in minutes if m <= minute - PLOT_MINUTES]:
        del minutes[expired]


def last_hour(state: MonitorState, now: float) -> list[MinuteStats]:
    """Return the minutes of the last hour, oldest first, the present one last."""
    end = int(now // MINUTE) + 1
    return [state.minutes.get(m, MinuteStats()) for m in range(end - PLOT_MINUTES, end)]


def earliest_last_send(state: MonitorState, label: str) -> float | None:
    """Return an instant before which the last request in a queue is not sent; None if unknown.

    It is the latest of these: the starts that were announced to requests in the queue, the end of
    the cooldown, and the instant at which the bucket has held all tokens that the queue may use.
    Others who use the same key may delay it further. `label` is the key in `MonitorState.limits`.
    """
    limits = state.limits[label]
    if not limits.waiting:
        return None
    instants = [limits.cooldown_until]
    for request in state.open_requests.values():
        # A cooldown without a limit is the delay of `%codex resume --at-reset`, not a wait in this
        # queue. Batch jobs have such cooldowns, too, but their rows are not among these requests.
        in_cooldown = request.phase == "cooldown" and request.limit is not None
        if request.phase != "queued" and not in_cooldown:
            continue
        # A request knows its model but not its server. If two servers have a queue for one model,
        # it may be in either, and its start is no bound for this one.
        possible_queues = [
            each
            for each, queue in state.limits.items()
            if queue.waiting and request.model in (None, each.rpartition(" at ")[0])
        ]
        if possible_queues == [label]:
            instants.append(request.resume_at)
    # A server that refunds unused tokens lets the queue go sooner than this. Only where headers
    # state the limits is it known that it keeps them.
    if limits.policy == "kept" and limits.has_limit_headers and limits.tokens is not None:
        bucket = stated_bucket(limits.tokens)  # at its instant 0.0, as it is at `limits_at`
        if bucket.rate > 0:
            seconds = (limits.waiting_tokens - bucket.level_at(0.0)) / bucket.rate
            instants.append(state.limits_at + seconds)
    return max((at for at in instants if at is not None and math.isfinite(at)), default=None)
