"""The state of one request while it runs: plain data, and pure functions of it.

Here the figures of every reply are computed, and the text of a durable answer is kept in step with
the position from which the server continues it.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace

from nbcodex import models
from nbcodex.errors import Advice, LimitError, NbcodexError, ParkedError, TransientError
from nbcodex.events import BackingOff, CoolingDown, Event
from nbcodex.journal.spending import SpendAmount
from nbcodex.models import ZERO_USAGE, Limit, Reply, Request, Status, StreamPosition, Usage
from nbcodex.openai_api import pricing
from nbcodex.openai_api.answers import CompletedAnswer
from nbcodex.ratelimit.backoff import BACKOFF_FACTOR
from nbcodex.ratelimit.limiter import Patience, Reservation
from nbcodex.runtime.clock import Clock, format_duration, format_time


class PartialAnswer:
    """The part of an answer that has arrived."""

    def __init__(self) -> None:
        # Where the durable answer continues after `text`; None without such an answer.
        self.position: StreamPosition | None = None
        self.notes: tuple[str, ...] = ()  # for the reader of the answer
        self._shown: list[str] = []
        # Whether the text is that of an earlier attempt, which the next text replaces.
        self._is_stale = False

    @property
    def text(self) -> str:
        """The text that is shown."""
        return "".join(self._shown)

    @property
    def new_text(self) -> str:
        """The text that arrived in the current attempt."""
        return "" if self._is_stale else self.text

    def add_note(self, note: str) -> None:
        """Add a note, unless it is empty or there already."""
        if note and note not in self.notes:
            self.notes = (*self.notes, note)

    def restore(self, position: StreamPosition, text: str) -> None:
        """Begin with what an earlier process received."""
        self.position, self._shown = position, [text] if text else []

    def append(self, text: str) -> bool:
        """Add text; return whether it replaces the text before it."""
        replaces, self._is_stale = self._is_stale, False
        if replaces:
            self._shown.clear()
        self._shown.append(text)
        return replaces

    def set_position(self, position: StreamPosition) -> None:
        """Record that the text so far is the answer up to `position`."""
        # While the text of another attempt is shown, the position does not fit it: a resumed
        # request then has to read this answer from its beginning.
        self.position = StreamPosition(position.response_id) if self._is_stale else position

    def expect_replacement(self) -> None:
        """Let the next text replace the text so far."""
        self._is_stale = bool(self._shown)

    def start_over(self) -> None:
        """Expect a new answer instead of this one."""
        self.position = None
        self.expect_replacement()

    def continue_from(self, position: StreamPosition) -> str:
        """Expect the answer from `position` on; return the text before it."""
        if position.sequence is None:
            self.expect_replacement()
            return ""
        return self.text

    def continues_at_server(self, status: Status) -> bool:
        """Return whether the answer of a request with this status continues at the server."""
        return self.position is not None and status in {"parked", "interrupted", "failed"}


@dataclass(slots=True)
class RequestState:
    """Everything that is known of a running request. Instants are those of `clock`."""

    request: Request
    clock: Clock
    patience: Patience = field(init=False)
    simulators: Set[str] = frozenset()  # base URLs of servers that are simulators
    base_url: str = ""  # empty until it is known
    model: str | None = None  # None until it is known
    # What is sent: another prompt than that of `request` while an answer is asked for once more.
    sent_request: Request = field(init=False)
    partial: PartialAnswer = field(default_factory=PartialAnswer)
    answer: CompletedAnswer | None = None  # the last complete one
    attempts: int = 0
    queued: float = 0.0  # seconds in the queue for capacity, which use no patience
    unbilled_attempts: int = 0  # those that the server refused before any answer
    # Of attempts without a part in the reply's text: as the server states it, else estimated.
    broken_usage: Usage = ZERO_USAGE
    last_event: Event | None = None
    # How the last attempt failed, and the waits that follow from it, in seconds.
    error: TransientError = field(init=False, repr=False)
    stated_wait: float | None = None  # what the server asked for, with jitter; None: nothing
    refusals: int = 0  # by limits, in succession
    retry_budget_wait: float = 0.0  # until `Services.retry_budgets` allow another attempt
    # Of the current attempt; None if it counts towards no limit.
    reservation: Reservation | None = None
    is_accepted: bool = False  # whether the server has accepted the current attempt
    is_sent: bool = False  # whether an attempt is running that the server may have received
    started_at: float = field(init=False)
    last_activity_at: float = field(init=False)  # when the current attempt last received something
    _is_broken: bool = False  # whether the last attempt broke off after it was accepted
    # Of the last attempt if it failed, as the server states it.
    _failed_usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self.sent_request = self.request
        self.patience = Patience(max_wait=self.request.patience)
        self.model = self.model or self.request.model
        self.started_at = self.last_activity_at = self.clock.now()

    @property
    def is_simulated(self) -> bool:
        """Whether the server is a simulator, so that the request costs nothing."""
        return self.base_url in self.simulators

    @property
    def waited(self) -> float:
        """Seconds of patience that are used."""
        return self.patience.waited

    @property
    def broken_spend(self) -> SpendAmount:
        """What broken attempts have cost."""
        if self.broken_usage == ZERO_USAGE:
            return SpendAmount()
        cost = pricing.cost(self.broken_usage, self.model, self.base_url)
        return SpendAmount(tokens=self.broken_usage.total_tokens or 0, dollars=cost or 0.0)

    def start_over(self) -> None:
        """Expect a new answer instead of the last attempt's."""
        # A broken attempt is charged, though few servers state its usage. It is counted only now:
        # until another attempt begins, its text is still the answer of this request.
        usage = self.attempt_usage("done")
        if self._is_broken and usage != Usage():
            self.broken_usage = self._total_usage(usage)
        self._is_broken, self._failed_usage = False, Usage()
        self.partial.start_over()

    def fail_attempt(self, error: NbcodexError) -> None:
        """Record that the attempt brought no answer."""
        self._is_broken, self._failed_usage = self.is_accepted, error.usage or Usage()
        self.unbilled_attempts += error.is_unbilled and not self.is_accepted

    def note_unknown_response(self, note: str) -> None:
        """Add a note if the server may be working on a durable answer whose id is unknown."""
        if self.request.durable and self.partial.position is None:
            self.partial.add_note(note)

    def backoff_s(self, exponential: float) -> float:
        """Return the seconds to wait; `exponential` are those that grow with each failure."""
        patience_left = max(0.0, self.patience.max_wait - self.waited)
        if isinstance(self.error, LimitError):
            if self.stated_wait is None:
                return exponential
            # One that proves too short grows, up to our own backoff and the patience that is left.
            grown = self.stated_wait * BACKOFF_FACTOR ** min(self.refusals - 1, 30)
            return max(self.stated_wait, min(grown, exponential, patience_left))
        # The wait grows even if an overloaded server asks for the same short one each time.
        # Another request's success may end the wait for the retry budget: it is worth all patience.
        budget_wait = min(self.retry_budget_wait, patience_left)
        return max(self.stated_wait or 0.0, exponential, budget_wait)

    def reply(self, status: Status) -> Reply:
        """Return the reply as it is now."""
        # If the user ends a request while a second answer arrives, its text is that one's so far:
        # the first answer did not fit the schema.
        completed = self.answer if status in {"done", "failed"} else None
        usage = self._total_usage(self.attempt_usage(status, completed))
        model = (completed and completed.model) or self.model
        carried = None
        # Only turns of a conversation are sent again.
        if completed and completed.reasoning and self.model and self.request.thread:
            carried = models.CarriedReasoning(
                items=completed.reasoning, model=self.model, base_url=self.base_url
            )
        unpriced = pricing.unpriced_parts(usage, model, self.base_url)
        all_calls_known = completed and self.broken_usage == ZERO_USAGE
        if not all_calls_known and pricing.known_provider(self.base_url):
            # No server states the tool calls of an attempt that broke off.
            unpriced = tuple(sorted({*unpriced, *pricing.paid_tools(self.request, model)}))
        return Reply(
            id=self.request.id,
            text=completed.text if completed else self.partial.text,
            status=status,
            model=model,
            usage=usage,
            cost=pricing.cost(usage, model, self.base_url),
            unpriced_tools=unpriced,
            attempts=self.attempts,
            waited=self.waited,
            queued=self.queued,
            seconds=max(0.0, self.clock.now() - self.started_at - self.waited - self.queued),
            cut=completed.cut if completed else None,
            images=completed.images if completed else (),
            sources=completed.sources if completed else (),
            simulated=self.is_simulated,
            notes=self.partial.notes,
            carried=carried,
        )

    def attempt_usage(self, status: Status, completed: CompletedAnswer | None = None) -> Usage:
        """Return what the last attempt used: the server's figures, else estimates."""
        text = completed.text if completed else self.partial.new_text
        estimate = Usage()
        if text:
            estimate = Usage(
                input_tokens=pricing.estimate_request_tokens(self.sent_request),
                output_tokens=pricing.estimate_text_tokens(text),
                estimated=True,
            )
        stated = completed.usage if completed else self._failed_usage
        if stated == Usage():
            # A durable answer that continues at the server is counted when it is resumed.
            return Usage() if self.partial.continues_at_server(status) else estimate
        # Neither a prompt nor a text has 0 tokens; some gateways send 0 where they know nothing.
        input_tokens = stated.input_tokens or estimate.input_tokens
        output_tokens = stated.output_tokens or estimate.output_tokens
        completed_usage = replace(stated, input_tokens=input_tokens, output_tokens=output_tokens)
        # Nothing needs an estimate, or nothing has one.
        if completed_usage == stated or input_tokens is output_tokens is None:
            return stated
        return replace(completed_usage, estimated=True)

    def _total_usage(self, last: Usage) -> Usage:
        """Return what all attempts have used; `last` is the usage of the last one."""
        if last == Usage() and 0 < self.attempts == self.unbilled_attempts:
            return ZERO_USAGE
        broken = self.broken_usage
        if broken == ZERO_USAGE:
            return last
        # What one of them does not state adds nothing to what the other states.
        names = (*models.SUMMED_TOKENS, "stated_cost")
        pairs = {name: (getattr(broken, name), getattr(last, name)) for name in names}
        sums = {n: sum(filter(None, pair)) for n, pair in pairs.items() if pair != (None, None)}
        is_estimated = broken.estimated or last.estimated or last == Usage()
        return replace(last, **sums, estimated=is_estimated)

    def patience_error(self, cause: TransientError, resume_at: float) -> ParkedError:
        """Return the error of a request that would wait longer than its patience for `cause`."""
        resume_at_wall, time_of_day, when = self._describe_instant(resume_at)
        patience = f"your patience of {format_duration(self.request.patience)}"
        if self.waited:
            patience = f"is left of {patience} after {format_duration(self.waited)}"
        return ParkedError(
            f"{cause.message} The request can be sent {when}, longer than {patience}.",
            advice=Advice(
                f"`%codex resume {self.request.id}` after {time_of_day}, or run it with a longer "
                "--patience.",
                script=f"Ask again after {time_of_day}, or with a longer patience.",
            ),
            cause=cause,
            resume_at=resume_at_wall,
        )

    def parked_by_user_error(self) -> ParkedError:
        """Return the error of a request that the user parked; it names the wait, if any."""
        message, cause, resume_at = "It is in the journal.", None, None
        wait, now = self.last_event, self.clock.now()
        if isinstance(wait, CoolingDown) and wait.queued:
            wait = None  # only cooldowns and backoffs hold back a request that is resumed
        if isinstance(wait, BackingOff | CoolingDown) and (wait.resume_at or now) > now:
            cause = wait.error if isinstance(wait, BackingOff) else cooldown_error(wait.limit)
            resume_at, _, when = self._describe_instant(wait.resume_at or now)
            message = f"{cause.message} The request can be sent {when}."
            if self.attempts == self.unbilled_attempts:
                message += " The request has cost nothing so far."
        advice = Advice(f"`%codex resume {self.request.id}` continues it.", script="Ask again.")
        error = ParkedError(message, advice=advice, cause=cause, resume_at=resume_at)
        error.title = "Parked by you"
        return error

    def _describe_instant(self, instant: float) -> tuple[float, str, str]:
        """Return seconds since the epoch, ``14:03:12``, and a phrase with the time and the wait."""
        # "At the earliest", because other requests may be queued before this one.
        wall, left = self.clock.wall(), instant - self.clock.now()
        time_of_day = format_time(wall + left, now=wall)
        when = f"at {time_of_day} at the earliest (in {format_duration(left)})"
        return wall + left, time_of_day, when


def cooldown_error(limit: Limit | None) -> LimitError:
    """Return the error of a cooldown; `limit` is the limit that caused it."""
    limit = limit or Limit()
    figures = f" ({limit.figures})" if limit.figures else ""
    return LimitError(f"{limit.name[0].upper()}{limit.name[1:]} reached{figures}.", limit=limit)
