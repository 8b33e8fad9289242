"""Rows on their way through the engine, as many at once as the limits take.

Owns how many that is. Must not know the order of rows, nor what becomes of answers.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from nbcodex.errors import ConfigurationError
from nbcodex.events import Ending, Event
from nbcodex.mapping.bulk import BatchBackend
from nbcodex.mapping.stats import StatsCounter
from nbcodex.models import Request
from nbcodex.requests.event_queue import WAIT_SLICE_S
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from nbcodex.client import Client
    from nbcodex.journal.codec import Entry
    from nbcodex.mapping.map_run import EndAction
    from nbcodex.requests.handle import Handle

MOST = 512
"""Rows under way at once: at 200 a second, answers may take two and a half seconds."""

AHEAD = 64
"""Rows that wait for leave to be sent: enough that the ledger always has a next one, and no more,
for each of them is a task and a place in its row."""


class Backend(Protocol):
    """A way for rows to be answered: one after another now, or all of them later.

    Attributes
    ----------
    settings : Settings
        How the server is reached by the rows that are begun from now on.
    tally : StatsCounter
        Hears every event of the rows.
    window : int
        Rows of an iterator between the one that is to be given next and the last one begun.
    """

    settings: Settings
    tally: StatsCounter
    window: int

    @property
    def stage(self) -> str:
        """Where the server is with all of them, in a few words; empty where each goes alone."""
        ...

    def room(self) -> int:
        """Return how many more rows it takes now."""
        ...

    def start(self, request: Request, entry: Entry | None = None) -> None:
        """Begin with a request, or take up one that is in the journal."""
        ...

    def complete(self) -> None:
        """For now no more rows will come: what was held back may go."""
        ...

    def order(self, what: EndAction, /) -> None:
        """End what is under way; what a provider has, it goes on with."""
        ...

    def ended(self, *, within: float) -> list[Ending]:
        """Return the last events that have come, waiting for one at most `within` seconds."""
        ...

    def missed(self) -> list[Ending]:
        """Return the last events that `ended` may have told while an interrupt struck."""
        ...

    def forget(self, id_: str) -> None:
        """The end of this row has been noted."""
        ...


class LiveBackend:
    """Each row is a request of its own, paced with all others of this process."""

    window, stage = 1024, ""

    def __init__(self, client: Client, settings: Settings) -> None:
        self.tally = StatsCounter()
        self._client, self.settings = client, settings
        self._handles: dict[str, Handle] = {}
        self._endings: queue.SimpleQueue[Ending] = queue.SimpleQueue()
        self._started = 0

    def room(self) -> int:
        """Return how many more rows it takes now."""
        under_way = self._started - self.tally.ended
        return min(MOST - under_way, AHEAD - (under_way - self.tally.sent))

    def start(self, request: Request, entry: Entry | None = None) -> None:
        """Begin with a request, or take up one that is in the journal."""
        if entry is None:
            handle = self._client.handle(request, self.settings, listener=self._hear)
        else:
            handle = self._client.resume(entry, self.settings, listener=self._hear)
        self._handles[request.id] = handle
        self._started += 1
        handle.start()

    def complete(self) -> None:
        """For now no more rows will come: nothing is held back that could go."""

    def order(self, what: EndAction, /) -> None:
        """End what is under way."""
        with contextlib.suppress(RuntimeError):  # the interpreter ends, and has parked them
            for handle in list(self._handles.values()):
                handle.end(what)

    def ended(self, *, within: float) -> list[Ending]:
        """Return the last events that have come, waiting for one at most `within` seconds."""
        found: list[Ending] = []
        with contextlib.suppress(queue.Empty):
            if within > 0:
                found.append(self._endings.get(timeout=min(within, WAIT_SLICE_S or within)))
            while True:
                found.append(self._endings.get_nowait())
        return found

    def missed(self) -> list[Ending]:
        """Return the last events that `ended` may have told while an interrupt struck."""
        return [handle.wait() for handle in list(self._handles.values()) if handle.done]

    def forget(self, id_: str) -> None:
        """The end of this row has been noted."""
        self._handles.pop(id_, None)

    def _hear(self, event: Event) -> None:
        self.tally(event)
        if isinstance(event, Ending):
            self._endings.put(event)


def way(name: str, client: Client, settings: Settings) -> Backend:
    """Return the way that `name` means.

    Raises
    ------
    ConfigurationError
        If there is none.
    """
    if name not in WAYS:
        raise ConfigurationError(
            f"engine={name!r} is unknown.",
            advice="'live' asks row by row, 'batch' hands all in together.",
        )
    return WAYS[name](client, settings)


WAYS: dict[str, Callable[[Client, Settings], Backend]] = {
    "live": LiveBackend,
    "batch": BatchBackend,
}
"""Ways by the name that `nbcodex.map(engine=…)` knows them by."""
