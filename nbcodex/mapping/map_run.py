"""The state of one map: rows become requests, endings become replies, in order.

Owns the order of rows, which rows are active, why rows failed, and what is parked when the map
ends early. Used by the thread that executes the map, which also calls the user's functions. Must
not know whether that thread waits for replies itself, or an event loop does.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from nbcodex import errors
from nbcodex.errors import NbcodexError
from nbcodex.events import Cancelled, EndAction, Ending, Parked
from nbcodex.journal.codec import equality_key
from nbcodex.mapping.backends import Backend
from nbcodex.mapping.inputs import InputData, Row
from nbcodex.mapping.rows import DEFAULT_PATIENCE_S, RowRequests
from nbcodex.models import MapListener, MapOutcome, MapStats, Origin, Reply, Request
from nbcodex.requests import structured_output
from nbcodex.requests.handle import reply_or_raise
from nbcodex.runtime import event_loop

if TYPE_CHECKING:
    from nbcodex.client import Client
    from nbcodex.journal.reads import Entry
    from nbcodex.settings import Settings

OnError = Literal["keep", "raise"]

# Time between two calls of the listener.
REPORT_INTERVAL_S = 0.25
MAX_REPORTED_FAILURES = 5
# The map ends after this many consecutive failures with one of _ALL_ROWS_ERRORS. A single such
# failure may be due to its row: a function can give a row its own model.
MAX_SHARED_FAILURES = 8
# Failed rows of an iterator that are remembered: it may be endless.
MAX_ITERATOR_FAILURES = 1_000
# Stop must not take as long as writing a hundred thousand rows. It gives active rows the first time
# to end, and stores unsent rows for the second; only this process can resume those not stored.
END_ACTIVE_S, PARK_REMAINING_S = 0.5, 1.0
PARK_CHUNK_ROWS = 250

_ALL_ROWS_ERRORS = (
    errors.MissingKeyError,
    errors.CredentialsError,
    errors.QuotaError,
    errors.ModelError,
)
_EQUAL_ROWS_ERRORS = (errors.PermanentError, errors.AnswerError)


@dataclass(slots=True, eq=False)
class RowState:
    """One row of a map."""

    index: int
    label: Hashable
    row: Row | None = None  # set until there is a request
    request: Request | None = None
    entry: Entry | None = None  # set if it is in the journal and can be resumed
    key: bytes | None = None  # equal for rows that ask the same
    # Whether an equal row has been answered, so that this one finds the answer in the journal.
    answered: bool = False
    reply: Reply | None = None


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Why a row has no answer; a parked row is answered when the map is resumed."""

    label: Hashable
    reason: str
    is_parked: bool = False


class MapRun:
    """One map, from its first row to its last, through any number of stops and resumes."""

    def __init__(
        self,
        inputs: InputData,
        requests: RowRequests | None,
        backend: Backend,
        *,
        origin: Origin,
        client: Client,
        settings: Settings,
        on_error: OnError = "keep",
    ) -> None:
        self.inputs, self.backend, self.origin = inputs, backend, origin
        self.client, self.settings = client, settings
        # Replies of an iterator are not kept: it may be endless.
        self.id, self.keeps_replies = origin.map_id or "", inputs.total is not None
        self.on_stats: MapListener = lambda _: None
        self.replies: dict[int, Reply] = {}
        # Rows without an answer, by position.
        self.failures: dict[int, RowFailure] = {}
        self.outcome: MapOutcome = ""  # empty while the map is executed
        # How the user ends the map; nothing is started then. Any thread may set it.
        self.end_action: EndAction | None = None
        # Without `requests`, all rows come from the journal.
        self.requests, self._on_error = requests, on_error
        self._source: Iterator[Row] = inputs.rows()
        self._source_ended, self._rows_read = requests is None, 0
        self._queue: deque[RowState] = deque()  # rows to be started before more are read
        self._window: deque[RowState] = deque()  # rows of an iterator, in order, not returned yet
        self._active: dict[str, RowState] = {}
        self._unanswered: dict[int, RowState] = {}
        # Equal rows are sent once: the first one leads, the others follow with its answer.
        self._leading: set[bytes] = set()
        self._following: dict[bytes, deque[RowState]] = {}
        self._failed_unsent = self._shared_failures = 0
        self._fatal: NbcodexError | None = None
        self._budget_error: NbcodexError | None = None  # the budget refuses further rows
        self._reported_at = float("-inf")

    def advance(self) -> bool:
        """Start as many rows as the backend accepts; return whether there is more to wait for."""
        self.collect_endings(timeout=0.0)
        if error := self.backend.counter.common_fault(len(self._active)):
            # If the user has set a shorter patience, that decides how long a fault may last.
            requests = [row.request for row in self._active.values() if row.request]
            if all(request.patience >= DEFAULT_PATIENCE_S for request in requests):
                self._fail_map(error)
        free = self.backend.capacity(len(self._active))
        while free > 0 and not (self._fatal or self._budget_error or self.end_action):
            if (row := self._next_row()) is None:
                break
            free -= self._start(row)
        if self._fatal is not None:
            raise self._fatal
        # Rows that the budget has admitted are sent and paid for, so they may end first.
        if self._budget_error is not None and not self._active:
            raise self._budget_error
        self._report()
        return bool(self._active or self._window)

    def pop_ready(self) -> Iterator[Reply]:
        """Yield the replies that are next in order; `advance` may be called between two of them."""
        while self._window and (reply := self._window[0].reply) is not None:
            self._window.popleft()
            yield reply

    def _next_row(self) -> RowState | None:
        if self._queue:
            return self._queue.popleft()
        if not self.keeps_replies and len(self._window) >= self.backend.window:
            self.backend.send_pending()
            return None
        if (row := next(self._source, None)) is None:
            self._source_ended = True
            self.backend.send_pending()
            return None
        state = self._unanswered[row.index] = RowState(row.index, row.label, row=row)
        # Counted only after the row is kept: after an interrupt before this, it is read again.
        self._rows_read = row.index + 1
        if not self.keeps_replies:
            self._window.append(state)
        return state

    def _start(self, row: RowState) -> bool:
        """Start a row; return whether it takes up capacity."""
        try:
            request = self._request_of(row)
        except NbcodexError as error:
            self._fail_unsent(row, error)
            # A function that fails for the very first row is assumed to be wrong for all.
            if row.index == 0 and self.requests is not None and self.requests.template is None:
                self._fatal = error
            return False
        # A row in a batch job cannot lead: the provider is answering it already.
        if request.reuse and (row.entry is None or row.entry.batch_job is None):
            row.key = row.key or equality_key(request, base_url="")
            if row.key in self._leading and not row.answered:
                self._following.setdefault(row.key, deque()).append(row)
                return False
            self._leading.add(row.key)
        self._active[request.id] = row
        self.backend.start_row(request, row.entry)
        return True

    def _request_of(self, row: RowState) -> Request:
        """Return the request of a row, made once."""
        if row.request is None and row.row is not None and self.requests is not None:
            row.label = self.requests.label(row.row)
            row.request = self.requests.request(row.row)
            row.row = None
        assert row.request is not None  # noqa: S101 - a row state has a row or a request
        return row.request

    def collect_endings(self, *, timeout: float) -> None:
        """Wait for an ending, if a row is active, and record what has ended."""
        self.record(self.backend.endings(timeout=timeout if self._active else 0.0))

    def record(self, endings: Sequence[Ending]) -> None:
        """Record endings; one that is delivered twice counts once."""
        for ending in endings:
            if row := self._active.get(ending.request_id):
                self._record(row, ending)
            # Only after it is recorded: after an interrupt in between, it is delivered again.
            self._active.pop(ending.request_id, None)
            self.backend.confirm(ending.request_id)

    def _record(self, row: RowState, ending: Ending) -> None:
        error: NbcodexError | None = None
        try:
            reply = reply_or_raise(ending)
        except NbcodexError as failure:
            reply, error = replace(ending.reply, error=str(failure)), failure
        except errors.Stopped as stopped:
            reply, error = replace(ending.reply, error=str(stopped)), NbcodexError(str(stopped))
        if reply and row.entry is not None and row.request is not None:
            # A resumed request is from the journal, which does not keep the schema's class.
            reply = structured_output.reusable(row.request, reply) or reply
        if error is None:
            self._shared_failures = 0
        else:
            is_ending, is_parked = bool(self.outcome or self.end_action), isinstance(ending, Parked)
            # While the map is being ended, it parks or cancels the rows itself.
            if not (is_ending and isinstance(ending, Parked | Cancelled)):
                self._record_failure(row, error, is_parked=is_parked)
            is_shared = isinstance(error, _ALL_ROWS_ERRORS)
            self._shared_failures = self._shared_failures + 1 if is_shared else 0
            if isinstance(error, errors.BatchUnsupportedError):
                self._fatal = error
            elif isinstance(error, errors.BudgetError) and not is_ending:
                # The rest of the budget is too small for the other rows as well.
                self._budget_error = self._budget_error or self._with_resume_advice(error)
            elif self._shared_failures >= MAX_SHARED_FAILURES:
                self._fail_map(error)
        self._set_reply(row, reply)
        if row.key is not None:
            self._leading.discard(row.key)
            self._release_followers(row.key, reply, error)

    def _release_followers(self, key: bytes, reply: Reply, error: NbcodexError | None) -> None:
        """Continue with the rows that are equal to one that has ended."""
        followers = self._following.pop(key, deque())
        if reply:
            for row in followers:
                row.answered = True
            self._queue.extend(followers)
        elif isinstance(error, _EQUAL_ROWS_ERRORS) and not isinstance(error, _ALL_ROWS_ERRORS):
            for row in followers:  # the server would refuse an equal request again
                self._fail_unsent(row, error)
        elif followers:
            self._queue.append(followers.popleft())
            self._following[key] = followers

    def _record_failure(
        self, row: RowState, error: NbcodexError, *, is_parked: bool = False
    ) -> None:
        if self.keeps_replies or len(self.failures) < MAX_ITERATOR_FAILURES:
            self.failures[row.index] = RowFailure(row.label, str(error), is_parked)
        is_ending = self.outcome or self.end_action
        if not is_parked and self._on_error == "raise" and not is_ending:
            self._fail_map(error)

    def _fail_map(self, error: NbcodexError) -> None:
        """End the map with an error, unless it ends with an earlier one."""
        self._fatal = self._fatal or self._with_resume_advice(error)

    def _with_resume_advice(self, error: NbcodexError) -> NbcodexError:
        error.advice = f"{error.advice} The rest is parked: `%codex resume {self.id}`.".strip()
        return error

    def _fail_unsent(self, row: RowState, error: NbcodexError) -> None:
        """Record that a row failed before it was sent."""
        self._failed_unsent += 1
        self._set_reply(row, self._unsent_reply(row.index, "failed", str(error)))
        self._record_failure(row, error)

    def _unsent_reply(self, index: int, status: Literal["failed", "parked"], reason: str) -> Reply:
        return Reply(id=f"{self.id}-{index}", status=status, attempts=0, error=reason)

    def _set_reply(self, row: RowState, reply: Reply) -> None:
        row.reply = reply
        if self.keeps_replies:
            self.replies[row.index] = reply
        if reply:
            self.failures.pop(row.index, None)
        if reply or not self.keeps_replies:
            self._unanswered.pop(row.index, None)

    def finish(self) -> None:
        """Note that all rows have ended."""
        self.outcome = "done"
        self._report(force=True)

    def end_early(self, outcome: MapOutcome) -> None:
        """End active rows, and park as many others as PARK_REMAINING_S allows."""
        self.outcome = outcome
        if self.keeps_replies:
            # An interrupt inside the generator that reads the rows has ended it for good.
            self._source = itertools.islice(self.inputs.rows(), self._rows_read, None)
        self.backend.end_active(self.end_action or "park")
        self.wait_inactive(timeout=END_ACTIVE_S)
        if self.keeps_replies and self.settings.journal:
            self._park_remaining(until=time.monotonic() + PARK_REMAINING_S)
        self._report(force=True)

    def wait_inactive(self, *, timeout: float) -> bool:
        """Wait until no row is active, at most `timeout` seconds; return whether none is."""
        deadline = time.monotonic() + timeout
        while self._active and time.monotonic() < deadline:
            self.collect_endings(timeout=0.05)
        self.record(self.backend.unconfirmed())
        return not self._active

    def _park_remaining(self, *, until: float) -> None:
        """Write rows that are not in the journal to it, as parked, until a time is reached."""
        maps = self.client.journal(self.settings).maps
        api_client = self.client.services().api_client
        # Rows of the queue are among the unanswered ones; a resume fills it again.
        self._queue.clear()
        unread = iter(self._next_row, None)
        unsent = (
            row
            for row in itertools.chain(list(self._unanswered.values()), unread)
            if row.entry is None
            and (row.reply is None or not (row.reply.attempts or row.reply.status == "failed"))
        )
        while (
            rows := list(itertools.islice(unsent, PARK_CHUNK_ROWS))
        ) and time.monotonic() < until:
            chunk: list[tuple[Request, bytes]] = []
            for row in rows:
                # A row that fails here is refused, and reported, when the map is resumed.
                with contextlib.suppress(NbcodexError):
                    request = self._request_of(row)
                    endpoint = api_client.endpoint(request, self.settings)
                    key = equality_key(request, base_url=endpoint.base_url)
                    chunk.append((request.with_server(endpoint.server), key))
            maps.insert_parked(chunk)

    def prepare_resume(self, entries: dict[str, Entry], settings: Settings) -> bool:
        """Prepare to execute the rows without an answer; return whether anything is left to do."""
        self.settings = self.backend.settings = settings
        self.backend.counter.reset_unanswered()
        for rows in (self._active, self._leading, self._following, self._queue):
            rows.clear()
        self.outcome, self.end_action = "", None
        self._fatal, self._budget_error = None, None
        self._failed_unsent = self._shared_failures = 0
        unanswered = [self._unanswered[index] for index in sorted(self._unanswered)]
        for row in unanswered:
            entry = entries.get(f"{self.id}-{row.index}")
            row.entry = entry if entry and entry.resumable else None
            row.answered, row.reply = False, None
            if entry and entry.reply:
                row.request = row.request or entry.request
                self.restore(row, entry.reply)
            else:
                self._queue.append(row)
        # Rows that another kernel has answered count, too: they change the result.
        return bool(unanswered) or not self._source_ended

    def restore(self, row: RowState, reply: Reply) -> None:
        """Add a row from the journal, with its answer if there is one."""
        if not reply:
            self._unanswered[row.index] = row
            return
        # The journal keeps the text of an answer, not the object that was parsed from it.
        if row.request is not None:
            reply = structured_output.reusable(row.request, reply) or reply
        self._set_reply(row, reply)
        self.backend.counter.count_known(reply)

    @property
    def result(self) -> Any:
        """The replies, in the kind of data that was given; a reply without an answer is false."""
        return self.inputs.with_replies(self.replies_in_order())

    def replies_in_order(self) -> list[Reply]:
        """Return a reply for each row; none for an iterator, whose replies are not kept."""
        return [
            self.replies[index]
            if index in self.replies
            else self._unsent_reply(index, "parked", "Not sent yet.")
            for index in range(self.inputs.total or 0)
        ]

    def stats(self) -> MapStats:
        """Return the figures of the map at this moment."""
        sums, total = self.backend.counter.stats, self.inputs.total
        failed = sums.failed + self._failed_unsent
        if self.end_action != "cancel":  # after a cancel they count as parked: a resume sends them
            failed += self.backend.counter.cancelled
        ended_early = self.outcome not in {"", "done"} and total is not None
        tokens, requests = self._rate_limits(sums.model)
        return replace(
            sums,
            at=self.client.clock.now(),
            total=total,
            failed=failed,
            parked=max(0, (total or 0) - sums.done - failed) if ended_early else sums.parked,
            waiting=max(0, len(self._active) - sums.sent),
            tokens_per_minute=tokens,
            requests_per_minute=requests,
            stage="" if self.outcome else self.backend.stage,
            outcome=self.outcome,
            failures=tuple(
                (str(failure.label), failure.reason)
                for failure in itertools.islice(self.failures.values(), MAX_REPORTED_FAILURES)
            ),
        )

    def _rate_limits(self, model: str | None) -> tuple[float | None, float | None]:
        """Return the server's limits on tokens and requests per minute, where they are known."""
        # The event loop's own thread must not wait for a result of the loop: it would never come.
        if model is None or self.outcome or event_loop.shared().is_current_thread:
            return None, None
        snapshots = event_loop.run(self.client.limits(self.settings))
        for label, snapshot in snapshots.items():
            if label.partition(" at ")[0] == model:
                tokens, requests = snapshot.tokens, snapshot.requests
                return tokens.limit if tokens else None, requests.limit if requests else None
        return None, None

    def _report(self, *, force: bool = False) -> None:
        if force or time.monotonic() - self._reported_at >= REPORT_INTERVAL_S:
            self._reported_at = time.monotonic()
            self.on_stats(self.stats())
