"""What a user sees of one request: a state derived from its events, and its summary in one line.

All functions are pure: they take the time as an argument. They know no front end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from nbcodex import events
from nbcodex.errors import shorten
from nbcodex.models import DAY, MINUTE, Limit, Rates, Reply, Status, Usage
from nbcodex.rendering.figures import format_dollars, join_figures, token_figures
from nbcodex.runtime.clock import format_duration, format_time

# What a running request does; once it has ended, its phase is the status of its reply.
Phase = Literal["queued", "cooldown", "sending", "thinking", "streaming", "waiting"] | Status
ActionName = Literal["cancel", "retry", "park"]
ACTIONS: tuple[ActionName, ...] = get_args(ActionName)

# A server may state any wait. A longer one is shown as this, and no date is computed from it.
MAX_SHOWN_WAIT_S = 999 * DAY

# Of UTF-8. An estimate, used until the server has counted the tokens.
BYTES_PER_TOKEN = 4


@dataclass(slots=True, eq=False)
class GrowingText:
    """An immutable text that grows by chunks: each `+` returns a new one.

    Texts that grew out of one another share one list of chunks, and each consists of the first
    `chunk_count` of them. A delta therefore costs the same however long the answer is.
    """

    _chunks: list[str] = field(default_factory=list, repr=False)
    chunk_count: int = 0
    utf8_bytes: int = 0

    def __add__(self, more: str) -> GrowingText:
        # If another text has already grown from this one, the end of the shared list belongs to it.
        is_shared = len(self._chunks) != self.chunk_count
        chunks = self._chunks[: self.chunk_count] if is_shared else self._chunks
        chunks.append(more)
        size = self.utf8_bytes + len(more.encode(errors="replace"))
        return GrowingText(chunks, self.chunk_count + 1, size)

    def __str__(self) -> str:
        return self.text_after(0)

    def extends(self, other: GrowingText) -> bool:
        """Return whether `other` is certainly the beginning of this text."""
        return self._chunks is other._chunks and self.chunk_count >= other.chunk_count

    def text_after(self, count: int) -> str:
        """Return the text after the first `count` chunks."""
        return "".join(self._chunks[count : self.chunk_count])


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelState:
    """All that a user sees of one request. Instants are those of the events (`Clock.now`)."""

    id: str = ""
    prompt: str = ""  # the beginning of the prompt
    model: str | None = None
    simulated: bool = False  # whether the simulator answers, as far as is known
    started_at: float = 0.0
    phase: Phase = "queued"
    phase_started_at: float = 0.0
    attempt: int = 0  # number of the present or the latest attempt; 0 before the first
    # The limit that the request waits for, if it is known; otherwise `reason` says in one line why
    # the request waits.
    limit: Limit | None = None
    reason: str = ""
    resume_at: float | None = None  # when the wait ends
    wait_started_at: float | None = None  # of a wait that counts against the patience
    waited: float = 0.0  # seconds of such waits, without the one since `wait_started_at`
    patience: float = 0.0  # seconds
    # The answer: `text` is stale while it comes from a failed attempt and has not been replaced.
    text: GrowingText = field(default_factory=GrowingText)
    reasoning: GrowingText = field(default_factory=GrowingText)
    stale: bool = False
    first_delta_at: float | None = None  # in this attempt
    last_delta_at: float | None = None
    # Estimates until the request has ended. Costs are in US dollars, None while unknown.
    usage: Usage = field(default_factory=lambda: Usage(estimated=True))
    rates: Rates | None = None  # prices per token
    unpriced: bool = False  # the model's price was looked up and is not known
    cost: float | None = None
    earlier_cost: float = 0.0  # of the attempts before this one
    reply: Reply | None = None  # the result, once the request has ended: no event follows

    @property
    def is_waiting(self) -> bool:
        """Whether the request waits for an instant, and *Retry now* can send it before."""
        return self.phase in {"cooldown", "waiting"}

    @property
    def tokens_per_second(self) -> float | None:
        """Output speed of this attempt; None in its first second, which is too short."""
        if self.first_delta_at is None or self.last_delta_at is None:
            return None
        # From the first delta on: the time before it is latency and reasoning, not speed.
        seconds = self.last_delta_at - self.first_delta_at
        return (self.usage.output_tokens or 0) / seconds if seconds >= 1.0 else None

    @property
    def cost_text(self) -> str:
        """The cost so far; empty if there is nothing certain to say about it."""
        if self.cost:
            return f"~{format_dollars(self.cost)} so far"
        if self.first_delta_at is not None and self.unpriced and not self.simulated:
            return "cost unknown"
        # A request that a limit refused at once is not charged. If an attempt
        # before that failed for another reason, only the provider knows what it cost.
        refused = self.phase == "waiting" and self.limit is not None and self.attempt == 1
        unsent = self.phase == "cooldown" and not self.attempt
        return "no cost so far" if (refused or unsent) and self.first_delta_at is None else ""

    def total_waited(self, now: float) -> float:
        """Return the seconds waited until `now`, the present wait included."""
        since = now if self.wait_started_at is None else self.wait_started_at
        return self.waited + max(0.0, now - since)

    def seconds_left(self, now: float) -> float | None:
        """Return the seconds still to wait at `now`, never negative; None outside of waits."""
        if self.resume_at is None or not math.isfinite(self.resume_at):
            return None
        return min(max(0.0, self.resume_at - now), MAX_SHOWN_WAIT_S)


def apply_event(state: PanelState, event: events.Event) -> PanelState:
    """Return the state after `event`, in a time that does not depend on the answer's length."""
    match event:
        case events.Queued():
            return PanelState(
                id=event.request_id,
                prompt=event.prompt,
                model=event.model,
                started_at=event.at,
                phase_started_at=event.at,
                patience=event.patience,
            )
        case events.CoolingDown(queued=True):
            reason = event.limit.name if event.limit else "the limit is fully used"
            queued = _start_wait(state, event, "queued")
            # Queueing for capacity is not counted as waiting.
            return replace(queued, limit=None, reason=reason, wait_started_at=None)
        case events.CoolingDown():
            return _start_wait(state, event, "cooldown")
        case events.BackingOff(error=error):
            return replace(
                _start_wait(state, event, "waiting"),
                reason="" if event.limit else f"{error.title}: {shorten(error.message)}",
                attempt=event.attempt,
                stale=state.text.utf8_bytes > 0,
                earlier_cost=state.earlier_cost if state.cost is None else state.cost,
                simulated=state.simulated or error.simulated,
            )
        case events.Sent():
            return replace(
                state,
                phase="sending",
                phase_started_at=event.at,
                model=event.model or state.model,
                simulated=event.simulated,
                limit=None,
                reason="",
                resume_at=None,
                attempt=event.attempt,
                waited=state.total_waited(event.at),
                wait_started_at=None,
                usage=Usage(input_tokens=event.input_tokens, estimated=True),
                rates=event.rates,
                unpriced=event.unpriced,
                reasoning=GrowingText(),
                first_delta_at=None,
                last_delta_at=None,
            )
        case events.Delta():
            return _append_delta(state, event)
        case events.Restarted():
            return replace(state, text=GrowingText(), stale=False)
    if not isinstance(event, events.Ending):
        return state
    # The other fields stay as they are: the reply holds the final figures.
    return replace(
        state,
        phase=event.reply.status,
        phase_started_at=event.at,
        model=event.reply.model or state.model,
        simulated=event.reply.simulated,
        resume_at=None,
        reply=event.reply,
    )


def _start_wait(
    state: PanelState, event: events.CoolingDown | events.BackingOff, phase: Phase
) -> PanelState:
    return replace(
        state,
        phase=phase,
        # A cooldown that is announced again with a later end is still the same wait.
        phase_started_at=state.phase_started_at if state.phase == phase else event.at,
        limit=event.limit,
        reason="",
        resume_at=event.resume_at,
        waited=event.waited,
        wait_started_at=event.at,
    )


def _append_delta(state: PanelState, event: events.Delta) -> PanelState:
    phase: Phase = "thinking" if event.reasoning else "streaming"
    text = state.text if event.reasoning else state.text + event.text
    reasoning = state.reasoning + event.text if event.reasoning else state.reasoning
    # A stale text was counted by the attempt that it came from.
    size = reasoning.utf8_bytes + (0 if state.stale else text.utf8_bytes)
    usage = replace(state.usage, output_tokens=math.ceil(size / BYTES_PER_TOKEN))
    return replace(
        state,
        phase=phase,
        simulated=event.simulated or state.simulated,
        phase_started_at=state.phase_started_at if phase == state.phase else event.at,
        stale=state.stale and event.reasoning,
        text=text,
        reasoning=reasoning,
        first_delta_at=event.at if state.first_delta_at is None else state.first_delta_at,
        last_delta_at=event.at,
        usage=usage,
        cost=state.cost if state.rates is None else state.earlier_cost + state.rates.cost(usage),
    )


def disabled_reason(state: PanelState, action: ActionName) -> str:
    """Return why the button of `action` would do nothing; empty if it would do something."""
    if action == "retry" and not state.is_waiting:
        return "Nothing to retry: the request is not waiting."
    return ""


def status_line(state: PanelState, now: float, wall: float) -> str:
    """Return a running request in one line: `now` by the events' clock, `wall` since the epoch."""
    speed = state.tokens_per_second
    return join_figures(
        _progress(state, now, wall),
        wait_reason(state),
        f"attempt {state.attempt}" if state.attempt > 1 else "",
        *token_figures(state.usage),
        f"~{speed:.0f} tokens/s" if speed else "",
        state.cost_text,
        "simulated" if state.simulated else "",
    )


def _progress(state: PanelState, now: float, wall: float) -> str:
    elapsed, left = format_duration(now - state.phase_started_at), state.seconds_left(now)
    if state.phase == "queued" and state.reason:
        estimate = f", {format_duration(left)} to go" if left else ""
        return f"queued for capacity {elapsed}{estimate}"
    if left is not None:
        if not left:
            return f"{state.phase}, due now"
        until = f" (until {format_time(wall + left, now=wall)})" if left > MINUTE else ""
        return f"{state.phase} {format_duration(left)}{until}"
    if state.phase == "sending":
        return f"sent, no answer yet after {elapsed}"
    return "answering" if state.phase == "streaming" else f"{state.phase} {elapsed}"


def stale_output_hint(id_: str) -> str:
    """Return the hint below an output that stays as it is if its kernel or page goes away."""
    return f"if it stays open: `%codex journal {id_}` shows it, `%codex resume {id_}` continues it"


def wait_reason(state: PanelState) -> str:
    """Return why a request waits: the limit with its figures, or the failure."""
    reason = state.reason
    if state.limit is not None:
        reason = ": ".join(filter(None, (state.limit.name, state.limit.figures)))
    return f"{reason} (reached earlier)" if reason and state.phase == "cooldown" else reason
