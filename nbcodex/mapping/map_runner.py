"""Executes a map: waits for its rows, in a thread or on the caller's event loop.

Owns the waits, which maps are active in this process, and that a map that ends early is parked
exactly once, in every ending. Must not know rows.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from nbcodex.client import current
from nbcodex.errors import CancelledError, NbcodexError, ParkedError, Stopped
from nbcodex.mapping.backends import EndAction
from nbcodex.mapping.map_run import REPORT_INTERVAL_S, MapRun
from nbcodex.models import MapOutcome
from nbcodex.requests.handle import run_uninterrupted

# A kernel's event loop handles an interrupt only when it wakes up, so it is woken this often.
ASYNC_POLL_S = 0.02

OUTCOME_BY_ACTION: dict[EndAction, MapOutcome] = {"cancel": "cancelled", "park": "parked"}


class _EndedByUserError(Exception):
    """The execution was cancelled or parked; it never leaves this module."""


class MapRunner:
    """One execution of a map run. It can be ended from any thread: a cell, a monitor's button."""

    def __init__(self, run: MapRun) -> None:
        self.run = run
        # How this execution ended. A run that was resumed belongs to another runner, so a runner
        # that wakes up late reads its own outcome and leaves the run alone.
        self.outcome: MapOutcome = ""
        self._thread, self._is_advancing = threading.get_ident(), False
        self._ended = threading.Event()

    def advance(self) -> bool:
        """Advance the run; return whether there is more to wait for."""
        self._check_end_action()
        # While it is set, the executing thread is awake and sees `end_action` by itself.
        self._is_advancing = True
        try:
            has_more = self.run.advance()
        finally:
            self._is_advancing = False
        self._check_end_action()
        return has_more

    def _check_end_action(self) -> None:
        if self.ended or self.run.end_action is not None:
            raise _EndedByUserError

    def end(self, action: EndAction) -> None:
        """Cancel or park the map: nothing more is started. The first action counts.

        From another thread this returns at once; see `wait_ended`.
        """
        if self.ended:
            return
        action = self.run.end_action = self.run.end_action or action
        # The executing thread may be suspended between two replies of an iterator for a long
        # time, so active rows are ended from here.
        for handle in self.run.client.active_handles():
            if handle.request.origin.map_id == self.run.id:
                handle.end(action)
        if self._thread == threading.get_ident() and not self._is_advancing:
            # The executing code is suspended in this very thread and cannot act before we return.
            self.end_early(OUTCOME_BY_ACTION[action])

    def end_early(self, outcome: MapOutcome) -> None:
        """Park what is not answered, unless that is done; called in the executing thread."""
        if not self.ended:
            self.run.end_early(outcome)
            self.outcome = outcome
            self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether the run is parked, or finished."""
        return self._ended.is_set()

    def wait_ended(self, *, timeout: float) -> bool:
        """Wait until the run has ended, at most `timeout` seconds; return whether it has."""
        return self._ended.wait(timeout)

    @contextmanager
    def executing(self) -> Iterator[None]:
        """Be listed as active; finish the run at the end, or park it if anything is raised."""
        _active[self] = None
        try:
            yield
            self.run.finish()
            self.outcome = "done"
        except _EndedByUserError:
            # Raised as an ordinary error: on an event loop, an interrupt would end the loop.
            action = self.run.end_action or "park"
            run_uninterrupted(lambda: self.end_early(OUTCOME_BY_ACTION[action]))
            raise _ended_error(self.run, self.outcome) from None
        except KeyboardInterrupt:
            run_uninterrupted(lambda: self.end_early("stopped"))
            message = f"Stopped: {_answered(self.run)}, {_rest(self.run, self.outcome)}."
            raise Stopped(message, advice=resume_advice(self.run)) from None
        # A loop that is left early, or a task that is cancelled, is the user's own decision.
        except (GeneratorExit, asyncio.CancelledError):
            run_uninterrupted(lambda: self.end_early("stopped"))
            raise
        except BaseException:
            run_uninterrupted(lambda: self.end_early("failed"))
            raise
        finally:
            self._ended.set()
            _active.pop(self, None)


_active: dict[MapRunner, None] = {}


def active_runners() -> list[MapRunner]:
    """Return the maps that are being executed in this process, oldest first."""
    client = current()
    return [each for each in list(_active) if each.run.client is client and not each.ended]


def run_map(run: MapRun) -> Any:
    """Answer all rows; return them as the kind of data that was given."""
    runner = MapRunner(run)
    with runner.executing():
        while runner.advance():
            run.collect_endings(timeout=REPORT_INTERVAL_S)
    return run.result


async def run_map_async(run: MapRun) -> Any:
    """Do what `run_map` does, on the caller's event loop."""
    runner = MapRunner(run)
    with runner.executing():
        while runner.advance():
            await _poll()
    return run.result


def stream_map(run: MapRun) -> Iterator[Any]:
    """Yield the replies in order, reading the data only as far as rows can be started."""
    runner = MapRunner(run)
    with runner.executing():
        while runner.advance():
            for reply in run.pop_ready():
                yield reply
                runner.advance()
            if run.active_rows:
                run.collect_endings(timeout=REPORT_INTERVAL_S)


async def stream_map_async(run: MapRun) -> AsyncIterator[Any]:
    """Do what `stream_map` does, on the caller's event loop."""
    runner = MapRunner(run)
    with runner.executing():
        while runner.advance():
            for reply in run.pop_ready():
                yield reply
                runner.advance()
            await _poll()


async def _poll() -> None:
    await asyncio.sleep(ASYNC_POLL_S)


# What the user reads about a map that ended early.


def describe_outcome(run: MapRun) -> str:
    """Return how a map ended, in one line."""
    if run.outcome == "done":
        return f"{run.id}: {_answered(run)}."
    # Another thread may still be parking its rows.
    outcome = run.outcome or OUTCOME_BY_ACTION[run.end_action or "park"]
    rest = f"{_answered(run)}, {_rest(run, outcome)}. {resume_advice(run)}"
    return f"{run.id}: {outcome}; {rest}"


def resume_advice(run: MapRun) -> str:
    """Return how to continue with a map that ended early."""
    if _is_at_provider(run):
        return (
            f"`%codex resume {run.id}` fetches the answers, `%codex cancel {run.id}` cancels the "
            "batch there."
        )
    if run.keeps_replies:
        return f"`%codex resume {run.id}` continues it; nbcodex.map.last has the finished rows."
    return "Run the loop again: what is answered costs nothing."


def _ended_error(run: MapRun, outcome: MapOutcome) -> NbcodexError:
    message = f"{_answered(run)}, {_rest(run, outcome)}."
    if outcome == "cancelled":
        return CancelledError(f"Cancelled by you: {message}", advice=resume_advice(run))
    error = ParkedError(message, advice=resume_advice(run))
    error.title = "Parked by you"
    return error


def _answered(run: MapRun) -> str:
    total = f" of {run.inputs.total:,}" if run.keeps_replies else ""
    return f"{run.backend.counter.stats.done:,}{total} rows are answered"


def _rest(run: MapRun, outcome: MapOutcome) -> str:
    if _is_at_provider(run):
        return "the provider continues"
    return "nothing is lost" if outcome == "cancelled" else "the rest is parked"


def _is_at_provider(run: MapRun) -> bool:
    if run.origin.engine != "batch":
        return False
    return run.client.journal(run.settings).maps.has_batch_job(run.id)
