"""The state of one map: rows become requests, endings become replies, in order.

It knows which rows are active, why rows failed, and what to park when the map ends early. Used by
the thread that executes the map, which also calls the user's functions. `map_runner` waits.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from nbcodex import errors, host
from nbcodex.errors import Advice, NbcodexError, join_advice
from nbcodex.events import Cancelled, EndAction, Ending, Parked
from nbcodex.journal.codec import equality_key
from nbcodex.journal.reads import Entry
from nbcodex.mapping.backends import Backend
from nbcodex.mapping.inputs import InputData, Row
from nbcodex.mapping.rows import DEFAULT_PATIENCE_S, RowRequests
from nbcodex.models import MapListener, MapOutcome, MapStats, Origin, Reply, Request
from nbcodex.requests import structured_output
from nbcodex.requests.handle import reply_or_raise
from nbcodex.runtime import event_loop
from nbcodex.settings import Settings

OnError = Literal["keep", "raise"]

REPORT_INTERVAL_S = 0.25  # between two calls of the listener `on_stats`
MAX_REPORTED_FAILURES = 5  # in `MapStats.failures`
# The map ends after this many consecutive failures with one of _ALL_ROWS_ERRORS. A single such
# failure may be due to its row: a function can give a row its own model.
MAX_SHARED_FAILURES = 8
MAX_ITERATOR_FAILURES = 1_000  # failed rows that are remembered: an iterator may be endless
# Stop must not take as long as storing a hundred thousand rows. Active rows have END_ACTIVE_S to
# end, then rows are parked for PARK_REMAINING_S; only this process can resume the others.
END_ACTIVE_S, PARK_REMAINING_S = 0.5, 1.0
PARK_CHUNK_ROWS = 250  # parked before the time is checked again

# Errors that meet every row, and errors that meet every row with an equal request.
_ALL_ROWS_ERRORS = (
    errors.MissingKeyError,
    errors.ConnectionSettingsError,
    errors.CredentialsError,
    errors.QuotaError,
    errors.ModelError,
    errors.NetworkRefusedError,
)
_EQUAL_ROWS_ERRORS = (errors.PermanentError, errors.AnswerError)


@dataclass(slots=True, eq=False)
class RowState:
    """One row of a map."""

    index: int
    label: Hashable  # its name in listings and errors
    data: Row | None = None  # until its request is made
    request: Request | None = None
    entry: Entry | None = None  # set if it is in the journal and can be resumed
    equality_key: bytes | None = None  # the same in rows with equal requests
    # Whether an equal row has been answered, so that this one finds the answer in the journal.
    has_stored_answer: bool = False
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
        row_requests: RowRequests | None,
        backend: Backend,
        *,
        origin: Origin,
        on_error: OnError = "keep",
    ) -> None:
        self.inputs, self.backend, self.origin = inputs, backend, origin
        # Replies of an iterator are not kept, because it may be endless.
        self.id, self.keeps_replies = origin.map_id or "", inputs.total is not None
        self.on_stats: MapListener = lambda _stats: None  # shows the progress, if it is replaced
        # By the row's index, like the failures of rows without an answer.
        self.replies: dict[int, Reply] = {}
        self.failures: dict[int, RowFailure] = {}
        # Without `row_requests`, all rows come from the journal, and none is read from the data.
        self.row_requests, self._on_error = row_requests, on_error
        self._all_rows_read, self._read_count = row_requests is None, 0
        self._unread_rows = self._read_rows()
        # Rows of an iterator whose replies are not returned yet, in order.
        self._unreturned: deque[RowState] = deque()
        self._unanswered: dict[int, RowState] = {}  # rows that were read, by index
        self._reported_at = float("-inf")
        self._prepare_execution()

    def _read_rows(self) -> Iterator[Row]:
        rows = self.inputs.rows() if self.row_requests else ()
        return itertools.islice(rows, self._read_count, None)

    def _prepare_execution(self) -> None:
        self.outcome: MapOutcome = ""  # empty while the map is executed
        # How the user ends the map: nothing is started any more. Any thread may set it.
        self.end_action: EndAction | None = None
        self._to_start: deque[RowState] = deque()  # rows that are started before more are read
        self._active: dict[str, RowState] = {}  # rows that are started and have not ended, by id
        # By equality key: of equal rows only the first, the leader, is started; when it is
        # answered, its followers are started, and find the answer in the journal.
        self._leader_keys: set[bytes] = set()
        self._followers: dict[bytes, deque[RowState]] = {}
        # Rows that failed before they were sent; consecutive failures with _ALL_ROWS_ERRORS.
        self._failed_unsent = self._shared_failures = 0
        self._map_error: NbcodexError | None = None  # ends the map
        self._budget_error: NbcodexError | None = None  # ends the map when no row is active

    def advance(self) -> bool:
        """Apply endings and start rows, without waiting; return whether the map has to go on."""
        self.apply_endings(timeout=0.0)
        if error := self.backend.counter.common_fault(len(self._active)):
            # If the user has set a shorter patience, that decides how long a fault may last.
            requests = [row.request for row in self._active.values() if row.request]
            if all(request.patience >= DEFAULT_PATIENCE_S for request in requests):
                self._fail_map(error)
        capacity = self.backend.capacity(len(self._active))
        while capacity > 0 and not (self._map_error or self._budget_error or self.end_action):
            if (row := self._next_row()) is None:
                break
            capacity -= self._start(row)  # True counts as 1
        if self._map_error is not None:
            raise self._map_error
        # The budget holds a reservation for each active row, so these may end first.
        if self._budget_error is not None and not self._active:
            raise self._budget_error
        self._report()
        return bool(self._active or self._unreturned)

    def pop_ready(self) -> Iterator[Reply]:
        """Yield the replies that are next in order; `advance` may be called between two of them."""
        while self._unreturned and (reply := self._unreturned[0].reply) is not None:
            self._unreturned.popleft()
            yield reply

    def _next_row(self) -> RowState | None:
        if self._to_start:
            return self._to_start.popleft()
        if not self.keeps_replies and len(self._unreturned) >= self.backend.max_unreturned_rows:
            self.backend.send_collected()
            return None
        if (read := next(self._unread_rows, None)) is None:
            self._all_rows_read = True
            self.backend.send_collected()
            return None
        row = self._unanswered[read.index] = RowState(read.index, read.label, data=read)
        # Counted only after the row is kept: after an interrupt before this, it is read again.
        self._read_count = read.index + 1
        if not self.keeps_replies:
            self._unreturned.append(row)
        return row

    def _start(self, row: RowState) -> bool:
        """Start a row; return whether it takes up capacity."""
        try:
            request = self._request_of(row)
        except NbcodexError as error:
            self._fail_unsent(row, error)
            # A function that fails for the very first row is assumed to be wrong for all.
            if row.index == 0 and self.row_requests and not self.row_requests.template:
                self._map_error = error
            return False
        # Rows in a batch job do not follow each other: the provider is answering them already.
        if request.reuse and (row.entry is None or row.entry.batch_job is None):
            # Without the settings' base URL, which all rows share: rows differ in `api_base` only.
            key = row.equality_key or equality_key(request, base_url=request.api_base or "")
            row.equality_key = key
            if key in self._leader_keys and not row.has_stored_answer:
                self._followers.setdefault(key, deque()).append(row)
                return False
            self._leader_keys.add(key)
        self._active[request.id] = row
        self.backend.start_row(request, row.entry)
        return True

    def _request_of(self, row: RowState) -> Request:
        """Return the request of a row, made at the first call."""
        if row.request is None and row.data is not None and self.row_requests is not None:
            row.label = self.row_requests.label(row.data)
            row.request = self.row_requests.request(row.data)
            row.data = None
        assert row.request is not None  # noqa: S101 - a row has its data or its request
        return row.request

    def apply_endings(self, *, timeout: float) -> None:
        """Apply the endings that have arrived, each once; wait up to `timeout` for the first."""
        for ending in self.backend.next_endings(timeout=timeout if self._active else 0.0):
            if row := self._active.get(ending.request_id):
                self._apply_ending(row, ending)
            # Only after it is applied: after an interrupt in between, it is delivered again.
            self._active.pop(ending.request_id, None)
            self.backend.confirm_ending(ending.request_id)

    def _apply_ending(self, row: RowState, ending: Ending) -> None:
        """Keep a row's reply or failure; continue with equal rows, or end the map if it must."""
        error: NbcodexError | None = None
        try:
            reply = reply_or_raise(ending)
        except (NbcodexError, errors.Stopped) as failure:
            host.current.adapt_advice(failure)
            reply = replace(ending.reply, error=str(failure))
            error = failure if isinstance(failure, NbcodexError) else NbcodexError(str(failure))
        if reply and row.entry is not None and row.request is not None:
            # A resumed request is from the journal, which does not keep the schema's class.
            reply = structured_output.parse_reused(row.request, reply) or reply
        is_shared = isinstance(error, _ALL_ROWS_ERRORS)
        self._shared_failures = self._shared_failures + 1 if is_shared else 0
        if error is not None:
            is_ending = bool(self.outcome or self.end_action)
            # While the map is being ended, it parks or cancels the rows itself.
            if not (is_ending and isinstance(ending, Parked | Cancelled)):
                self._add_failure(row, error, is_parked=isinstance(ending, Parked))
            if isinstance(error, errors.BatchUnsupportedError):
                self._map_error = error
            elif isinstance(error, errors.BudgetError) and not is_ending:
                # The rest of the budget is too small for the other rows as well.
                self._budget_error = self._budget_error or self._with_resume_advice(error)
            elif self._shared_failures >= MAX_SHARED_FAILURES:
                self._fail_map(error)
        self._set_reply(row, reply)
        if row.equality_key is not None:
            self._leader_keys.discard(row.equality_key)
            self._continue_followers(row.equality_key, reply, error)

    def _continue_followers(self, key: bytes, reply: Reply, error: NbcodexError | None) -> None:
        """Continue with the rows that are equal to one that has ended."""
        followers = self._followers.pop(key, deque())
        if reply:
            for row in followers:
                row.has_stored_answer = True
            self._to_start.extend(followers)
        elif isinstance(error, _EQUAL_ROWS_ERRORS) and not isinstance(error, _ALL_ROWS_ERRORS):
            for row in followers:  # the server would refuse an equal request again
                self._fail_unsent(row, error)
        elif followers:  # the next of them becomes the leader of the rest
            self._to_start.append(followers.popleft())
            self._followers[key] = followers

    def _add_failure(self, row: RowState, error: NbcodexError, *, is_parked: bool = False) -> None:
        if self.keeps_replies or len(self.failures) < MAX_ITERATOR_FAILURES:
            self.failures[row.index] = RowFailure(row.label, str(error), is_parked)
        is_ending = self.outcome or self.end_action
        if not is_parked and self._on_error == "raise" and not is_ending:
            self._fail_map(error)

    def _fail_map(self, error: NbcodexError) -> None:
        """End the map with an error, unless it ends with an earlier one."""
        self._map_error = self._map_error or self._with_resume_advice(error)

    def _with_resume_advice(self, error: NbcodexError) -> NbcodexError:
        error = copy.copy(error)  # rows may share it
        cell = f"The rest is parked: `%codex resume {self.id}`."
        advice = Advice(cell, script="The rest is parked: make the same call again.")
        error.advice = join_advice(error.advice, advice)
        return error

    def _fail_unsent(self, row: RowState, error: NbcodexError) -> None:
        self._failed_unsent += 1
        host.current.adapt_advice(error)
        self._set_reply(row, self._unsent_reply(row.index, "failed", str(error)))
        self._add_failure(row, error)

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
            # Read anew, because an interrupt within the generator of rows has ended it for good.
            self._unread_rows = self._read_rows()
        self.backend.end_active(self.end_action or "park")
        self.wait_inactive(timeout=END_ACTIVE_S)
        if self.keeps_replies and self.backend.settings.journal:
            self._park_remaining(until=time.monotonic() + PARK_REMAINING_S)
        self._report(force=True)

    def wait_inactive(self, *, timeout: float) -> bool:
        """Wait until no row is active, at most `timeout` seconds; return whether none is."""
        deadline = time.monotonic() + timeout
        while self._active and time.monotonic() < deadline:
            self.apply_endings(timeout=0.05)
        return not self._active

    def _park_remaining(self, *, until: float) -> None:
        """Insert rows that are not in the journal into it, as parked, until an instant."""
        maps = self.backend.client.journal(self.backend.settings).maps
        api_client = self.backend.client.services().api_client
        # Its rows are in `_unanswered`, too; a resume fills it again.
        self._to_start.clear()
        unsent = (
            row
            for row in itertools.chain(list(self._unanswered.values()), iter(self._next_row, None))
            if row.entry is None
            and (row.reply is None or not (row.reply.attempts or row.reply.status == "failed"))
        )
        while (
            rows := list(itertools.islice(unsent, PARK_CHUNK_ROWS))
        ) and time.monotonic() < until:
            chunk: list[tuple[Request, bytes]] = []
            for row in rows:
                # A row of which no request can be made is reported when the map is resumed.
                with contextlib.suppress(NbcodexError):
                    request = self._request_of(row)
                    endpoint = api_client.endpoint(request, self.backend.settings)
                    key = equality_key(request, base_url=endpoint.base_url)
                    chunk.append((request.with_server(endpoint.server), key))
            maps.insert_parked(chunk)

    def prepare_resume(self, entries: dict[str, Entry], settings: Settings) -> bool:
        """Prepare to execute the rows without an answer; return whether anything is left to do."""
        self.backend.settings = settings
        self.backend.counter.reset_unanswered()
        self._prepare_execution()
        unanswered = [self._unanswered[index] for index in sorted(self._unanswered)]
        for row in unanswered:
            entry = entries.get(f"{self.id}-{row.index}")
            if entry and row.request and entry.request.prompt != row.request.prompt:
                entry = None  # a row of another map, which had the same id by chance
            row.entry = entry if entry and entry.resumable else None
            row.has_stored_answer, row.reply = False, None
            if entry and entry.reply:
                row.request = row.request or entry.request
                self.restore(row, entry.reply)
            else:
                self._to_start.append(row)
        # Rows that another kernel has answered count, too: they change the result.
        return bool(unanswered) or not self._all_rows_read

    def restore(self, row: RowState, reply: Reply) -> None:
        """Add a row from the journal, with its answer if there is one."""
        if not reply:
            self._unanswered[row.index] = row
            return
        # The journal has the text of an answer, not the object that was parsed from it.
        if row.request is not None:
            reply = structured_output.parse_reused(row.request, reply) or reply
        self._set_reply(row, reply)
        self.backend.counter.count_restored(reply)

    @property
    def result(self) -> Any:
        """The replies, as the kind of data that was given; a reply without an answer is false."""
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
        counted, total = self.backend.counter.stats, self.inputs.total
        failed, parked, sent = counted.failed + self._failed_unsent, counted.parked, counted.sent
        if self.end_action != "cancel":  # after a cancel they count as parked: a resume sends them
            failed += self.backend.counter.cancelled
        # The counts add up to the number of rows, so that none seems to be missing.
        waiting = len(self._active) - sent
        if total is not None:
            waiting = total - self.inputs.unstored_rows - counted.done - failed - parked - sent
            if self.outcome not in {"", "done"}:  # it ended early
                parked, sent, waiting = max(0, parked + sent + waiting), 0, 0
        tokens, requests = self._rate_limits(counted.model)
        return replace(
            counted,
            at=self.backend.client.clock.now(),
            total=total,
            failed=failed,
            parked=parked,
            sent=sent,
            waiting=max(0, waiting),
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
        states = event_loop.run(self.backend.client.limits(self.backend.settings))
        for label, state in states.items():
            if label.partition(" at ")[0] == model:  # ``MODEL at SERVER``
                tokens, requests = state.tokens, state.requests
                return tokens.limit if tokens else None, requests.limit if requests else None
        return None, None

    def _report(self, *, force: bool = False) -> None:
        if force or time.monotonic() - self._reported_at >= REPORT_INTERVAL_S:
            self._reported_at = time.monotonic()
            self.on_stats(self.stats())
