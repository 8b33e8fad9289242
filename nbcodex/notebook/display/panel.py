"""What a user sees of one request: a pure function of its events, and its one-line text twin.

Owns the panel's state, and which buttons make sense in it. Must not know IPython, widgets, the
network or what time it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from nbcodex import events
from nbcodex.errors import shorten
from nbcodex.models import DAY, MINUTE, Limit, Rates, Reply, Usage
from nbcodex.notebook.display.growing_text import Text
from nbcodex.rendering.figures import figures_line, format_dollars, token_figures
from nbcodex.runtime.clock import format_duration, format_time

__all__ = ["ACTIONS", "ActionName", "PanelState", "reduce", "refusal", "status"]

Going = Literal["queued", "held", "sending", "thinking", "streaming", "waiting"]
Ended = Literal["done", "parked", "interrupted", "cancelled", "failed"]
Phase = Going | Ended
ActionName = Literal["cancel", "retry", "park"]
ACTIONS: tuple[ActionName, ...] = get_args(ActionName)

FAR = 999 * DAY
"""Seconds beyond which no moment is worth naming: a server may say anything."""

CAPACITY = "Queued for capacity: the limit is in full use"
"""What a request waits for that waits for its turn."""

BYTES_PER_TOKEN = 4
"""What a token takes in UTF-8, roughly, until the server counts for us."""

_ENDS: dict[type[events.Event], Ended] = {
    events.Finished: "done",
    events.Parked: "parked",
    events.Interrupted: "interrupted",
    events.Cancelled: "cancelled",
    events.Failed: "failed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelState:
    """All that a user sees of one request. Instants are the events' own (`Clock.now`).

    Parameters
    ----------
    id : str
        The request's, by which it is resumed.
    prompt : str
        How the prompt begins.
    simulated : bool
        Whether it is known that a simulator answers.
    phase : str
        What is going on.
    since, began : float
        When this phase, and when the request, began.
    model : str or None
        The model, as far as it is known.
    limit : Limit or None
        The limit that makes us wait; None where there is none, or nobody knows which.
    reason : str
        Why we wait or how it ended, in one line; empty where `limit` says it all.
    resume_at : float or None
        When the wait ends; None outside of waits.
    resume_wall : float or None
        When a parked request can go, in seconds since the epoch.
    attempt : int
        The attempt under way, or the last that failed; 0 before the first.
    waited, patience : float
        Seconds of waiting until `waits_from`, and how many the user has patience for.
    waits_from : float or None
        Since when the present wait is not yet in `waited`; None outside of waits.
    usage : Usage
        Tokens; estimates until the server counts.
    rates : Rates or None
        What a token costs; None while unknown.
    unpriced : bool
        Whether it is sure that nobody knows what a token costs.
    cost : float or None
        US dollars, the attempts that broke off included; estimated until it has ended, and None
        while unknown.
    spent : float
        US dollars that earlier attempts have cost, by the same estimate.
    text, thought : Text
        The answer so far, and what the model thinks aloud before it.
    stale : bool
        Whether `text` is of an attempt that failed, shown until something replaces it.
    first_at, last_at : float or None
        When the first and the last piece arrived in this attempt.
    reply : Reply or None
        What came of it, once it has ended.
    """

    id: str = ""
    prompt: str = ""
    simulated: bool = False
    phase: Phase = "queued"
    since: float = 0.0
    began: float = 0.0
    model: str | None = None
    limit: Limit | None = None
    reason: str = ""
    resume_at: float | None = None
    resume_wall: float | None = None
    attempt: int = 0
    waited: float = 0.0
    waits_from: float | None = None
    patience: float = 0.0
    usage: Usage = field(default_factory=lambda: Usage(estimated=True))
    rates: Rates | None = None
    unpriced: bool = False
    cost: float | None = None
    spent: float = 0.0
    text: Text = field(default_factory=Text)
    thought: Text = field(default_factory=Text)
    stale: bool = False
    first_at: float | None = None
    last_at: float | None = None
    reply: Reply | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.reply is not None

    @property
    def waits(self) -> bool:
        """Whether nothing goes on until a moment has come."""
        return self.phase in {"held", "waiting"}

    @property
    def speed(self) -> float | None:
        """Output tokens per second since this attempt's first; None until a second has told."""
        if self.first_at is None or self.last_at is None or self.ended:
            return None
        seconds = self.last_at - self.first_at
        return (self.usage.output_tokens or 0) / seconds if seconds >= 1.0 else None

    def waited_by(self, now: float) -> float:
        """Return the seconds of waiting until `now`, the present wait included."""
        return self.waited + (0.0 if self.waits_from is None else max(0.0, now - self.waits_from))

    @property
    def price(self) -> str:
        """What it has cost so far, or in the end; empty where nobody knows."""
        if self.ended:
            return "" if self.cost is None else format_dollars(self.cost)
        if self.cost:
            return f"~{format_dollars(self.cost)} so far"
        if self.first_at is not None and self.unpriced and not self.simulated:
            return "cost unknown"
        # Whom a limit refuses at the door is charged nothing, whatever the price; of an attempt
        # before that, which failed otherwise, nobody knows.
        refused = self.phase == "waiting" and self.limit is not None and self.attempt == 1
        unsent = self.phase == "held" and not self.attempt
        return "no cost so far" if (refused or unsent) and self.first_at is None else ""

    def left(self, now: float) -> float | None:
        """Return the seconds still to wait at `now`, never negative; None outside of waits."""
        if self.resume_at is None or not math.isfinite(self.resume_at):
            return None
        return min(max(0.0, self.resume_at - now), FAR)


def reduce(state: PanelState, event: events.Event) -> PanelState:
    """Return the state after `event`; what that costs does not depend on the answer's length."""
    match event:
        case events.Queued(request_id=id_, at=at):
            queued = PanelState(id=id_, since=at, began=at, prompt=event.prompt)
            return replace(queued, model=event.model, patience=event.patience)
        case events.CoolingDown(queued=True):
            queued = _wait(state, event, "queued", limit=None, reason=CAPACITY)
            return replace(queued, waits_from=None)
        case events.CoolingDown(limit=limit):
            return _wait(state, event, "held", limit=limit, reason="")
        case events.BackingOff(limit=limit, error=error, attempt=attempt):
            reason = "" if limit else f"{error.title}: {shorten(error.message)}"
            waiting = _wait(state, event, "waiting", limit=limit, reason=reason)
            spent = state.spent if state.cost is None else state.cost
            stale, simulated = len(state.text) > 0, state.simulated or error.simulated
            return replace(waiting, attempt=attempt, stale=stale, spent=spent, simulated=simulated)
        case events.Sent():
            return _send(state, event)
        case events.Delta():
            return _grow(state, event)
        case events.Restarted():
            return replace(state, text=Text(), stale=False)
        case (
            events.Finished()
            | events.Parked()
            | events.Interrupted()
            | events.Cancelled()
            | events.Failed()
        ):
            return _end(state, event)
    return state


def _wait(
    state: PanelState,
    event: events.CoolingDown | events.BackingOff,
    phase: Phase,
    *,
    limit: Limit | None,
    reason: str,
) -> PanelState:
    # Announced again with a later moment, it is still the same wait, of which a part has passed.
    since = state.since if state.phase == phase else event.at
    return replace(
        state,
        phase=phase,
        since=since,
        limit=limit,
        reason=reason,
        resume_at=event.resume_at,
        waited=event.waited,
        waits_from=event.at,
    )


def _send(state: PanelState, event: events.Sent) -> PanelState:
    return replace(
        state,
        phase="sending",
        since=event.at,
        model=event.model or state.model,
        simulated=event.simulated,
        limit=None,
        reason="",
        resume_at=None,
        attempt=event.attempt,
        waited=state.waited_by(event.at),
        waits_from=None,
        usage=Usage(input_tokens=event.input_tokens, estimated=True),
        rates=event.rates,
        unpriced=event.unpriced,
        thought=Text(),
        first_at=None,
        last_at=None,
    )


def _grow(state: PanelState, event: events.Delta) -> PanelState:
    phase: Phase = "thinking" if event.reasoning else "streaming"
    text = state.text if event.reasoning else state.text + event.text
    thought = state.thought + event.text if event.reasoning else state.thought
    size = thought.size + (0 if state.stale else text.size)
    usage = replace(state.usage, output_tokens=math.ceil(size / BYTES_PER_TOKEN))
    return replace(
        state,
        phase=phase,
        simulated=event.simulated or state.simulated,
        since=state.since if phase == state.phase else event.at,
        stale=state.stale and event.reasoning,
        text=text,
        thought=thought,
        first_at=event.at if state.first_at is None else state.first_at,
        last_at=event.at,
        usage=usage,
        cost=state.cost if state.rates is None else state.spent + state.rates.cost(usage),
    )


def _end(state: PanelState, event: events.Ending) -> PanelState:
    reply, error = event.reply, getattr(event, "error", None)
    counted = reply.usage.input_tokens is not None or reply.usage.output_tokens is not None
    return replace(
        state,
        phase=_ENDS[type(event)],
        since=event.at,
        model=reply.model or state.model,
        simulated=reply.simulated,
        limit=getattr(error, "limit", None),
        reason=f"{error.title}: {shorten(error.message)}" if error else "",
        resume_at=None,
        resume_wall=getattr(error, "resume_at", None),
        attempt=reply.attempts,
        waited=reply.waited,
        waits_from=None,
        usage=reply.usage if counted else state.usage,
        cost=reply.cost,
        reply=reply,
    )


def refusal(state: PanelState, action: ActionName) -> str:
    """Return why `action` makes no sense now; empty where it does."""
    if state.ended:
        return "The request has ended."
    if action == "retry" and not state.waits:
        return "Nothing to retry: the request is not waiting."
    return ""


def status(state: PanelState, now: float, wall: float) -> str:
    """Return the panel in one line of text.

    Parameters
    ----------
    state : PanelState
        What to tell.
    now, wall : float
        This instant, in the events' clock and in seconds since the epoch.
    """
    if state.reply is not None:
        used = figures_line(replace(state.reply, status="done"))
        told = [state.phase, _parked_until(state, wall), state.reason, used]
    else:
        speed = f"~{state.speed:.0f} tokens/s" if state.speed else ""
        told = [
            _going_on(state, now, wall),
            cause(state),
            _tries(state),
            *token_figures(state.usage),
            speed,
            state.price,
            "simulated" if state.simulated else "",
        ]
    return " · ".join(filter(None, told))


def _parked_until(state: PanelState, wall: float) -> str:
    if state.resume_wall is None or not wall <= state.resume_wall <= wall + FAR:
        return ""
    return f"can go at {format_time(state.resume_wall, now=wall)}"


def _going_on(state: PanelState, now: float, wall: float) -> str:
    lasted, left = format_duration(now - state.since), state.left(now)
    if state.phase == "queued" and state.reason:
        due = f", {format_duration(left)} to go" if left else ""
        return f"queued for capacity {lasted}{due}"
    if left is not None:
        until = f" (until {format_time(wall + left, now=wall)})" if left > MINUTE else ""
        phase = "held for another" if state.phase == "held" else state.phase
        return f"{phase} {format_duration(left)}{until}" if left else f"{state.phase}, due now"
    if state.phase == "sending":
        return f"sent, no word yet for {lasted}"
    return "answering" if state.phase == "streaming" else f"{state.phase} {lasted}"


def cause(state: PanelState) -> str:
    """Return why a request waits: the limit with its figures, or the failure."""
    if state.phase == "queued":
        return ""  # the phase says it all
    if state.limit is None:
        told = state.reason
    else:
        told = ": ".join(filter(None, (state.limit.name, state.limit.figures)))
    return f"{told} (met by another request)" if told and state.phase == "held" else told


def _tries(state: PanelState) -> str:
    return f"attempt {state.attempt}" if state.attempt > 1 else ""
