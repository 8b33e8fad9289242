"""Executes a map: waits for its rows, in the calling thread or on the caller's event loop.

Lists the active maps of this process. A map that ends early is parked once, however it ends.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from nbcodex.client import get_client
from nbcodex.errors import Advice, CancelledError, ParkedError, Stopped
from nbcodex.events import EndAction
from nbcodex.mapping.map_run import REPORT_INTERVAL_S, MapRun
from nbcodex.models import MapOutcome
from nbcodex.requests.handle import run_uninterrupted

# A kernel's event loop handles an interrupt only when it wakes up, so it is woken this often.
ASYNC_POLL_S = 0.02

# The outcome of a map that its user ends. Stop is no such action here, but a KeyboardInterrupt.
OUTCOME_BY_ACTION: dict[EndAction, MapOutcome] = {"cancel": "cancelled", "park": "parked"}


class _EndedByUserError(Exception):
    """The map was cancelled or parked. Never raised to callers."""


class MapRunner:
    """One execution of a map run. It can be ended from any thread: a cell, a monitor's button."""

    def __init__(self, run: MapRun) -> None:
        self.run = run
        # How this execution ended. A resumed run has another runner: one that wakes up late must
        # read its own outcome, not that of the run.
        self.outcome: MapOutcome = ""
        self.ended = threading.Event()  # set when the run is parked, or finished
        self._executing_thread, self._is_advancing = threading.get_ident(), False

    def advance(self) -> bool:
        """Advance the run, unless its user has ended it; return whether it has to go on."""
        self._check_end_action()
        # While this is true, the executing thread is not suspended, and sees `end_action` itself.
        self._is_advancing = True
        try:
            has_more = self.run.advance()
        finally:
            self._is_advancing = False
        self._check_end_action()
        return has_more

    def _check_end_action(self) -> None:
        # Not a KeyboardInterrupt, which would end the event loop of an asynchronous map.
        if self.ended.is_set() or self.run.end_action is not None:
            raise _EndedByUserError

    def end(self, action: EndAction) -> None:
        """Cancel or park the map: nothing more is started. The first action counts."""
        if self.ended.is_set():
            return
        action = self.run.end_action = self.run.end_action or action
        # The executing thread may be suspended between two replies of an iterator for a long
        # time, so active rows are ended from here.
        for handle in self.run.backend.client.active_handles():
            if handle.request.origin.map_id == self.run.id:
                handle.end(action)
        # From another thread this returns at once, and `ended` is set later.
        if self._executing_thread == threading.get_ident() and not self._is_advancing:
            # The executing code is suspended in this very thread and cannot act before we return.
            self._end_early(OUTCOME_BY_ACTION[action])

    def _end_early(self, outcome: MapOutcome) -> None:
        """Park the rows without an answer, unless that is done; called in the executing thread."""
        if not self.ended.is_set():
            self.run.end_early(outcome)
            self.outcome = outcome
            self.ended.set()

    @contextmanager
    def executing(self) -> Iterator[None]:
        """List the map as active; finish the run at the end, or park it if anything is raised."""
        _active[self] = None
        try:
            yield
            self.run.finish()
            self.outcome = "done"
        except BaseException as error:
            outcome: MapOutcome = "failed"
            if isinstance(error, _EndedByUserError):
                outcome = OUTCOME_BY_ACTION[self.run.end_action or "park"]
            # Leaving a loop over replies early, or cancelling a task, is the user's decision.
            elif isinstance(error, KeyboardInterrupt | GeneratorExit | asyncio.CancelledError):
                outcome = "stopped"
            run_uninterrupted(
                lambda _stop_pressed: self._end_early(outcome),
                stop_pressed=isinstance(error, KeyboardInterrupt),
            )
            if not isinstance(error, _EndedByUserError | KeyboardInterrupt):
                raise
            message, advice = _describe_rows(self.run, self.outcome), _resume_advice(self.run)
            if isinstance(error, KeyboardInterrupt):
                raise Stopped(f"Stopped: {message}", advice=advice) from None
            if self.outcome == "cancelled":
                raise CancelledError(f"Cancelled by you: {message}", advice=advice) from None
            parked = ParkedError(message, advice=advice)
            parked.title = "Parked by you"
            raise parked from None
        finally:
            self.ended.set()
            _active.pop(self, None)


_active: dict[MapRunner, None] = {}  # a set that keeps the order


def active_runners() -> list[MapRunner]:
    """Return the maps that are being executed in this process, oldest first."""
    client = get_client()  # a fork has another one than the maps of its parent
    return [r for r in list(_active) if r.run.backend.client is client and not r.ended.is_set()]


def run_map(run: MapRun) -> Any:
    """Answer all rows; return them as the kind of data that was given."""
    for _ in stream_map(run):
        pass
    return run.result


async def run_map_async(run: MapRun) -> Any:
    """Do what `run_map` does, on the caller's event loop."""
    async for _ in stream_map_async(run):
        pass
    return run.result


def stream_map(run: MapRun) -> Iterator[Any]:
    """Answer all rows; of an iterator, yield the replies, and read no more than can be started."""
    runner = MapRunner(run)
    with runner.executing():
        while runner.advance():
            for reply in run.pop_ready():
                yield reply
                runner.advance()
            # Waits for the next ending, which `advance` never does.
            run.apply_endings(timeout=REPORT_INTERVAL_S)


async def stream_map_async(run: MapRun) -> AsyncIterator[Any]:
    """Do what `stream_map` does, on the caller's event loop."""
    runner = MapRunner(run)
    with runner.executing():
        while runner.advance():
            for reply in run.pop_ready():
                yield reply
                runner.advance()
            await asyncio.sleep(ASYNC_POLL_S)


def describe_outcome(run: MapRun) -> str:
    """Return how a map ended, in one line."""
    if run.outcome == "done":
        return f"{run.id}: {_describe_rows(run, 'done')}"
    # Another thread may still be parking its rows.
    outcome = run.outcome or OUTCOME_BY_ACTION[run.end_action or "park"]
    return f"{run.id}: {outcome}; {_describe_rows(run, outcome)} {_resume_advice(run)}"


def _resume_advice(run: MapRun) -> str:
    if _is_at_provider(run):
        return Advice(
            f"`%codex resume {run.id}` fetches the answers, `%codex cancel {run.id}` cancels the "
            "batch there.",
            script="The same call of nbcodex.map fetches the answers, "
            f"`%codex cancel {run.id}` in a notebook cancels the batch there.",
        )
    if run.keeps_replies:
        finished = "nbcodex.map.last has the finished rows."
        return Advice(
            f"`%codex resume {run.id}` continues it; {finished}",
            script=f"The same call of nbcodex.map continues it; {finished}",
        )
    return "Run the loop again: what is answered costs nothing."


def _describe_rows(run: MapRun, outcome: MapOutcome) -> str:
    total = f" of {run.inputs.total:,}" if run.keeps_replies else ""
    answered = f"{run.backend.counter.stats.done:,}{total} rows are answered"
    if outcome == "done":
        return f"{answered}."
    if _is_at_provider(run):
        return f"{answered}, the provider continues."
    return f"{answered}, {'nothing is lost' if outcome == 'cancelled' else 'the rest is parked'}."


def _is_at_provider(run: MapRun) -> bool:
    is_batch = run.origin.engine == "batch"
    return is_batch and run.backend.client.journal(run.backend.settings).maps.has_batch_job(run.id)
