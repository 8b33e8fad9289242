"""A run while somebody goes through it, and the orders that end it early.

Owns which maps are under way in this process, and that a run is put away once, whatever ends
its runner. Orders come from any thread: another cell, a button of the monitor.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from nbcodex.client import current
from nbcodex.errors import CancelledError, NbcodexError, ParkedError, Stopped
from nbcodex.mapping.map_run import TOLD, EndAction, MapRun
from nbcodex.models import MapOutcome
from nbcodex.requests.handle import run_uninterrupted

OUTCOME_BY_ACTION: dict[EndAction, MapOutcome] = {"cancel": "cancelled", "park": "parked"}
"""What a map has come to that was ended by an order."""


class OrderedError(Exception):
    """The runner was ended by an order. Only whoever goes through the run hears it."""


class MapRunner:
    """One way through a run, as the thread that goes holds it, and whoever ends it.

    Parameters
    ----------
    run : MapRun
        What is gone through.

    Attributes
    ----------
    ordered : {"cancel", "park"} or None
        The order that ended it. A run that is taken up again is another runner's, so the
        one before, which may wake only then, leaves it alone.
    """

    def __init__(self, run: MapRun) -> None:
        self.run = run
        self.end_action: EndAction | None = None
        self._thread, self._goes = threading.get_ident(), False
        self._over = threading.Event()

    def advance(self) -> bool:
        """Do as `MapRun.advance` does.

        Raises
        ------
        OrderedError
            If an order has ended the runner.
        NbcodexError
            If a failure ends the map.
        """
        self._heed()
        self._goes = True
        try:
            goes_on = self.run.advance()
        finally:
            self._goes = False
        self._heed()
        return goes_on

    def _heed(self) -> None:
        if self.end_action is not None:
            raise OrderedError

    def end(self, what: EndAction) -> None:
        """End it: nothing more is begun, and rows under way get the order. The first one counts.

        In another thread than the one that goes, this returns at once; see `wait`.
        """
        if self.end_action is None:
            self.run.end_action = self.end_action = what
        # Whoever goes through it may not wake for long, between two replies of an iterator.
        for handle in self.run.client.active_handles():
            if handle.request.origin.map_id == self.run.id:
                handle.end(self.end_action)
        if self._thread == threading.get_ident() and not self._goes:
            # Whoever goes through it is suspended, and cannot wake before this returns.
            self.put_away(OUTCOME_BY_ACTION[self.end_action])

    def put_away(self, outcome: MapOutcome) -> None:
        """Park what is not answered, unless that was done; in the thread that goes."""
        if not self._over.is_set():
            self.run.stop(outcome)
            self._over.set()

    def close(self) -> None:
        """Nobody goes on with it."""
        self._over.set()
        _under_way.pop(self, None)

    @property
    def ended(self) -> bool:
        """Whether the run was put away, or is done."""
        return self._over.is_set()

    def wait_ended(self, *, timeout: float) -> bool:
        """Wait until it is over, some seconds at most; return whether it is."""
        return self._over.wait(timeout)


_under_way: dict[MapRunner, None] = {}


@contextmanager
def through(run: MapRun) -> Iterator[MapRunner]:
    """Have a run known as under way."""
    runner = MapRunner(run)
    _under_way[runner] = None
    try:
        yield runner
    finally:
        runner.close()


def active_runners() -> list[MapRunner]:
    """Return the maps that are under way in this process, oldest first."""
    here = current()
    return [each for each in list(_under_way) if each.run.client is here and not each.ended]


PULSE = 0.02
"""Seconds after which a caller's loop looks for endings, and for an interrupt."""


@contextmanager
def _to_its_end(run: MapRun) -> Iterator[MapRunner]:
    """Finish a run, or put it away.

    Raises
    ------
    Stopped
        In the place of an interrupt.
    CancelledError, ParkedError
        If its user has ended it by an order. No interrupt: on an event loop that would not end
        the task alone, but the loop.
    """
    with through(run) as runner:
        try:
            yield runner
            run.finish()
        except OrderedError:
            order = runner.end_action or "park"
            run_uninterrupted(lambda: runner.put_away(OUTCOME_BY_ACTION[order]))
            raise _ended_error(run, order) from None
        except KeyboardInterrupt:
            run_uninterrupted(lambda: runner.put_away("stopped"))
            raise _stopped_error(run) from None
        except (GeneratorExit, asyncio.CancelledError):
            run_uninterrupted(lambda: runner.put_away("stopped"))
            raise
        except BaseException:
            run_uninterrupted(lambda: runner.put_away("failed"))
            raise


def _stopped_error(run: MapRun) -> Stopped:
    """Return what is raised after Stop."""
    return Stopped(f"Stopped: {_answered(run)}, {_rest(run)}.", advice=way_on(run))


def _ended_error(run: MapRun, order: EndAction) -> NbcodexError:
    """Return what is raised where an order has ended a map, as it is for a single request."""
    told = f"{_answered(run)}, {_rest(run, order)}."
    if order == "cancel":
        return CancelledError(f"Cancelled by you: {told}", advice=way_on(run))
    error = ParkedError(told, advice=way_on(run))
    error.title = "Parked by you"
    return error


def describe_outcome(run: MapRun, order: EndAction) -> str:
    """Return what an order has come to, in one line."""
    if run.outcome == "done":
        return f"{run.id}: {_answered(run)}."
    told = f"{_answered(run)}, {_rest(run, order)}. {way_on(run)}"
    return f"{run.id}: {OUTCOME_BY_ACTION[order]}; {told}"


def way_on(run: MapRun) -> str:
    """Return how a map goes on that was put away."""
    if _is_away(run):
        return f"`%codex resume {run.id}` fetches it, `%codex cancel {run.id}` ends it there."
    if run.keeps_replies:
        return f"`%codex resume {run.id}` goes on; nbcodex.map.last holds what is finished."
    return "Run the loop again: what is answered costs nothing."


def _answered(run: MapRun) -> str:
    of = f" of {run.shape.total:,}" if run.keeps_replies else ""
    return f"{run.way.tally.done:,}{of} rows are answered"


def _rest(run: MapRun, order: EndAction = "park") -> str:
    if _is_away(run):
        return "the provider goes on"
    return "nothing is lost" if order == "cancel" else "the rest is parked"


def _is_away(run: MapRun) -> bool:
    """Return whether a provider has rows of a map, and goes on with them."""
    if run.origin.engine != "batch":
        return False
    return run.client.journal(run.settings).maps.has_batch_job(run.id)


def run_map(run: MapRun) -> Any:
    """Answer all rows; return them as the kind of data that was given."""
    with _to_its_end(run) as runner:
        while runner.advance():
            run.note(run.way.ended(within=TOLD))
    return run.result


async def run_map_async(run: MapRun) -> Any:
    """Do as `run_map` does, on the caller's event loop."""
    with _to_its_end(run) as runner:
        while runner.advance():
            await _pulse()
    return run.result


def stream_map(run: MapRun) -> Iterator[Any]:
    """Yield the replies in order, reading the data as far as there is something to do."""
    with _to_its_end(run) as runner:
        while runner.advance():
            for reply in run.ready():
                yield reply
                runner.advance()
            if run.waits:
                run.note(run.way.ended(within=TOLD))


async def stream_map_async(run: MapRun) -> AsyncIterator[Any]:
    """Do as `stream` does, on the caller's event loop."""
    with _to_its_end(run) as runner:
        while runner.advance():
            for reply in run.ready():
                yield reply
                runner.advance()
            await _pulse()


async def _pulse() -> None:
    """Let the caller's loop work: a kernel's takes an interrupt only when it wakes."""
    await asyncio.sleep(PULSE)
