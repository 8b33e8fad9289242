"""A map under way: rows become requests, endings become replies, in order.

Owns order, the window, failures, and what Stop leaves. Works in the thread that asked, which also
calls the user's functions; how rows are answered is a `Backend`. Waits for nothing: `drive` does.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from nbcodex.errors import (
    AnswerError,
    BatchUnsupportedError,
    CredentialsError,
    MissingKeyError,
    ModelError,
    NbcodexError,
    PermanentError,
    QuotaError,
    Stopped,
)
from nbcodex.events import Cancelled, Ending, Parked
from nbcodex.journal.codec import equality_key
from nbcodex.mapping import shelf
from nbcodex.mapping.report import progress_of
from nbcodex.models import MapListener, MapOutcome, Origin, Reply, Request
from nbcodex.requests import repair
from nbcodex.requests.handle import reply_or_raise

if TYPE_CHECKING:
    from nbcodex.client import Client
    from nbcodex.journal.codec import Entry
    from nbcodex.mapping.backends import Backend
    from nbcodex.mapping.inputs import InputData, Row
    from nbcodex.mapping.rows import RowRequests
    from nbcodex.settings import Settings

OnError = Literal["keep", "raise"]
EndAction = Literal["cancel", "park"]

TOLD = 0.25
"""Seconds between two reports to the watcher."""
ALIKE = 8
"""Failures in a row, each of which would meet every row, after which nothing more is asked."""
LISTED = 1_000
"""Failed rows of an iterator that are remembered."""

_OF_ALL = (MissingKeyError, CredentialsError, QuotaError, ModelError)
_OF_ONE = (PermanentError, AnswerError)


@dataclass(slots=True, eq=False)
class Item:
    """One row on its way: `row` until there is a `request`; `entry` if it is in the journal.

    It is `answered` where an equal row has an answer, which it finds in the journal.
    """

    index: int
    label: str
    row: Row | None = None
    request: Request | None = None
    entry: Entry | None = None
    key: bytes | None = None
    answered: bool = False
    reply: Reply | None = None


class MapRun:
    """One map, from its first row to its last, or to Stop and on.

    Parameters
    ----------
    shape : InputData
        The data.
    recipe : RowRequests or None
        How its rows become requests; None where all of them are in the journal.
    way : Backend
        How they are answered.
    origin : Origin
        Where it was asked, and its id.
    on_error : {"keep", "raise"}
        Whether the first row that fails ends it.

    Attributes
    ----------
    failures : dict
        What each row is called that has no answer, and why it has none, by position.
    ordered : {"cancel", "park"} or None
        How its user ends it; nothing more is begun then. Any thread may set it.
    """

    def __init__(
        self,
        shape: InputData,
        recipe: RowRequests | None,
        way: Backend,
        *,
        origin: Origin,
        client: Client,
        settings: Settings,
        on_error: OnError = "keep",
    ) -> None:
        self.shape, self.way, self.origin = shape, way, origin
        self.client, self.settings = client, settings
        self.id, self.keeps_replies = origin.map_id or "", shape.total is not None
        self.on_stats: MapListener = lambda _: None
        self.replies: dict[int, Reply] = {}
        self.failures: dict[int, tuple[str, str]] = {}
        self.outcome: MapOutcome = ""
        self.end_action: EndAction | None = None
        self._recipe, self._on_error = recipe, on_error
        self._rows: Iterator[Row] = shape.rows()
        self._again: deque[Item] = deque()
        self._window: deque[Item] = deque()
        self._under_way: dict[str, Item] = {}
        self._undone: dict[int, Item] = {}
        self._leaders: set[bytes] = set()
        self._followers: dict[bytes, deque[Item]] = {}
        self._read, self._taken = recipe is None, 0
        self.refused = self._alike = 0
        self._fatal: NbcodexError | None = None
        self._told_at = float("-inf")

    # Going on.

    def advance(self) -> bool:
        """Begin as many rows as there is room for; return whether there is anything to wait for.

        Raises
        ------
        NbcodexError
            If a failure ends the map.
        """
        self.note(self.way.ended(within=0.0))
        room = self.way.room()
        while room > 0 and self._may_begin and (item := self._next()):
            room -= self._begin(item)
        if self._fatal is not None:
            raise self._fatal
        self._tell()
        return bool(self._under_way or self._window)

    @property
    def _may_begin(self) -> bool:
        return self._fatal is None and self.end_action is None

    def ready(self) -> Iterator[Reply]:
        """Yield the replies whose turn it is; between two of them the run may go on."""
        while self._window and (reply := self._window[0].reply) is not None:
            self._window.popleft()
            yield reply

    @property
    def left(self) -> bool:
        """Whether there are rows to take up again."""
        return bool(self._again) or not self._read

    @property
    def waits(self) -> int:
        """How many rows are under way."""
        return len(self._under_way)

    def rest(self) -> Iterator[Item]:
        """Yield what may not be in the journal yet: what was not sent, and not even begun."""
        for item in list(self._undone.values()):
            reply = item.reply  # one that failed unasked is told, and does not belong there
            if reply is None or not (reply.attempts or reply.status == "failed"):
                yield item
        while (begun := self._next()) is not None:
            yield begun

    def request_of(self, item: Item) -> Request:
        """Return the request that an item makes, made once.

        Raises
        ------
        NbcodexError
            If the row makes none.
        """
        if item.request is None and item.row is not None and self._recipe is not None:
            item.label = self._recipe.label(item.row)
            item.request = self._recipe.request(item.row)
            item.row = None
        assert item.request is not None  # noqa: S101 - an item has a row or a request
        return item.request

    def _next(self) -> Item | None:
        if self._again:
            return self._again.popleft()
        if not self.keeps_replies and len(self._window) >= self.way.window:
            self.way.complete()
            return None
        if (row := next(self._rows, None)) is None:
            self._read = True
            self.way.complete()
            return None
        item = self._undone[row.index] = Item(row.index, row.label, row=row)
        self._taken = row.index + 1  # only now, so that an interrupt loses no row
        if not self.keeps_replies:
            self._window.append(item)
        return item

    def _begin(self, item: Item) -> bool:
        """Set a row going; return whether it takes up room."""
        try:
            request = self.request_of(item)
        except NbcodexError as error:
            self._refuse(item, error)
            return False
        if request.reuse and self._may_follow(item):
            item.key = item.key or equality_key(request, base_url="")
            if item.key in self._leaders and not item.answered:  # an equal row is under way
                self._followers.setdefault(item.key, deque()).append(item)
                return False
            self._leaders.add(item.key)
        self._under_way[request.id] = item
        self.way.start(request, item.entry)
        return True

    def _may_follow(self, item: Item) -> bool:
        """Whether nobody is answering the row yet, so that an equal one's answer will do."""
        return item.entry is None or item.entry.batch_job is None

    # Endings.

    def note(self, endings: Sequence[Ending]) -> None:
        """Take note of what has ended; what is told twice counts once."""
        for ending in endings:
            if item := self._under_way.get(ending.request_id):
                self._settle(item, ending)
            self._under_way.pop(ending.request_id, None)
            self.way.forget(ending.request_id)

    def _settle(self, item: Item, ending: Ending) -> None:
        reply, error = _outcome_of(ending)
        if error is not None:
            if not (self._ends and isinstance(ending, Parked | Cancelled)):  # else it is our doing
                self._fail(item, error, raises=not isinstance(ending, Parked))
            self._alike = self._alike + 1 if isinstance(error, _OF_ALL) else 0
            if isinstance(error, BatchUnsupportedError):
                self._fatal = error
            elif self._alike >= ALIKE:
                self._fatal = self._fatal or self._with_a_way_on(error)
        else:
            self._alike = 0
        self._give(item, reply)
        if item.key is not None:
            self._leaders.discard(item.key)
            self._release(item.key, reply, shared=_is_shared(error))

    def _release(self, key: bytes, reply: Reply, *, shared: bool) -> None:
        """Let rows go on that followed an equal one, which has ended."""
        equal = self._followers.pop(key, deque())
        if reply:
            for item in equal:
                item.answered = True
            self._again.extend(equal)
        elif shared:
            for item in equal:
                self._pass_over(item, reply.error or reply.status)
        elif equal:  # the next one leads
            self._again.append(equal.popleft())
            self._followers[key] = equal

    def _pass_over(self, item: Item, why: str) -> None:
        """A row fails as an equal one did, without being asked."""
        self.refused += 1
        self._list(item, why)
        id_ = f"{self.id}-{item.index}"
        self._give(item, Reply(id=id_, status="failed", attempts=0, error=why))

    @property
    def _ends(self) -> bool:
        return bool(self.outcome or self.end_action)

    def _refuse(self, item: Item, error: NbcodexError) -> None:
        """A row makes no request. A function that fails at once was not meant so."""
        self.refused += 1
        self._fail(item, error, raises=True)
        if item.index == 0 and self._recipe is not None and self._recipe.calls:
            self._fatal = error
        id_ = f"{self.id}-{item.index}"
        self._give(item, Reply(id=id_, status="failed", attempts=0, error=str(error)))

    def _fail(self, item: Item, error: NbcodexError, *, raises: bool) -> None:
        self._list(item, str(error))
        if raises and self._on_error == "raise" and not self._ends:
            self._fatal = self._fatal or self._with_a_way_on(error)

    def _list(self, item: Item, why: str) -> None:
        if self.keeps_replies or len(self.failures) < LISTED:
            self.failures[item.index] = (item.label, why)

    def _with_a_way_on(self, error: NbcodexError) -> NbcodexError:
        error.advice = f"{error.advice} The rest is parked: `%codex resume {self.id}`.".strip()
        return error

    def _give(self, item: Item, reply: Reply) -> None:
        item.reply = reply
        if self.keeps_replies:
            self.replies[item.index] = reply
        if reply:
            self.failures.pop(item.index, None)
        if reply or not self.keeps_replies:
            self._undone.pop(item.index, None)

    # The end, and after it.

    def finish(self) -> None:
        """All rows have ended."""
        self.outcome = "done"
        self._tell(now=True)

    def stop(self, outcome: MapOutcome) -> None:
        """Park what is under way, and as much of the rest as a moment allows."""
        self.outcome = outcome
        if self.keeps_replies:  # an interrupt within what reads the rows has ended that
            self._rows = itertools.islice(self.shape.rows(), self._taken, None)
        shelf.put_away(self)
        self._tell(now=True)

    def take_up(self, entries: dict[str, Entry], settings: Settings) -> bool:
        """Begin again with what has no answer, with the settings in force now.

        `entries` are those of the journal, by id. What rows ask stays as it was. Returns whether
        there is anything new: answers that somebody else has got meanwhile, or rows left to ask.
        """
        self.settings = self.way.settings = settings
        self.way.tally.take_up()
        for held in (self._under_way, self._leaders, self._followers, self._again):
            held.clear()
        self.outcome, self.end_action = "", None
        self._fatal, self.refused, self._alike = None, 0, 0
        undone = [self._undone[index] for index in sorted(self._undone)]
        for item in undone:
            entry = entries.get(f"{self.id}-{item.index}")
            item.entry = entry if entry and entry.resumable else None
            item.answered, item.reply = False, None
            if entry and entry.reply:
                asked = item.request or entry.request
                self._give(item, repair.reused(asked, entry.reply) or entry.reply)
                self.way.tally.know()
            else:
                self._again.append(item)
        return len(self._again) < len(undone) or self.left

    def remember(self, item: Item, reply: Reply) -> None:
        """Put in what is known already of a row: an answer, or that it is to be taken up."""
        if reply:
            self.replies[item.index] = reply
            self.way.tally.know()
        else:
            self._undone[item.index] = item

    # Reports.

    @property
    def result(self) -> Any:
        """The replies, as the kind of data that was given; false where there is no answer."""
        return self.shape.back(self.replies_in_order())

    def replies_in_order(self) -> list[Reply]:
        """Return a reply for each row, in order; of an iterator none is kept."""
        return [self.replies.get(i) or self._none(i) for i in range(self.shape.total or 0)]

    def _none(self, index: int) -> Reply:
        if (found := self.replies.get(index)) is not None:
            return found
        return Reply(id=f"{self.id}-{index}", status="parked", attempts=0, error="Not asked yet.")

    def _tell(self, *, now: bool = False) -> None:
        if now or time.monotonic() - self._told_at >= TOLD:
            self._told_at = time.monotonic()
            self.on_stats(progress_of(self))


def _is_shared(error: NbcodexError | None) -> bool:
    """Whether a row failed by what it asks, as all that are equal would, and no others."""
    return isinstance(error, _OF_ONE) and not isinstance(error, _OF_ALL)


def _outcome_of(ending: Ending) -> tuple[Reply, NbcodexError | None]:
    """Return the reply of an ending, and why it is no answer."""
    try:
        return reply_or_raise(ending), None
    except NbcodexError as error:
        return replace(ending.reply, error=str(error)), error
    except Stopped as error:
        return replace(ending.reply, error=str(error)), NbcodexError(str(error))
