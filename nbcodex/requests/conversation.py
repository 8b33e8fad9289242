"""Threads and their turns: what a request is told of what was said before it, and where it joins.

Owns the order of a conversation and how much of it fits a model. A cell that is run again keeps its
place: it sees the turns before it, and its answer takes the old one's stead. Only finished answers
are turns. Must not know cells of a front end beyond their ids, nor how a conversation is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, takewhile

from nbcodex.journal.conversations import ConversationStore, StoredConversation, TurnCandidate
from nbcodex.models import Request, Turn, TurnPosition
from nbcodex.openai_api import pricing
from nbcodex.settings import DEFAULT_MODEL, Settings

MAIN_THREAD = "main"
"""The thread of whoever names none."""

SMALL = 16_000
"""Tokens that every model is thought to hold: up to here nobody looks up how many it does."""

UNKNOWN = 32_000
"""Tokens that a model is thought to hold whose context window nobody knows."""

SHARE = 0.85
"""Of the context window, for our counts are estimates."""

ANSWER = 16_000
"""Tokens that are left for an answer without a bound of its own; an eighth of smaller windows."""

_Key = tuple[str | None, str]


@dataclass(frozen=True, slots=True)
class JoinedRequest:
    """A request with its earlier turns.

    Parameters
    ----------
    request : Request
        With turns, and its place among them.
    left_out : int
        How many older turns did not fit.
    """

    request: Request
    left_out: int = 0

    @property
    def notes(self) -> list[str]:
        """What the reader of the answer should know, in a few words each."""
        seen = len(self.request.turns)
        told = [_count(seen, "earlier")] if seen else []
        if self.left_out:
            told.append(f"{_count(self.left_out, 'older')} left out: the context is full")
        return told


@dataclass(slots=True)
class _Course:
    """What this process knows of one thread's course.

    Parameters
    ----------
    chapter : int or None
        The chapter that goes on; None: the latest.
    is_new : bool
        Whether it was begun here: what stands before it is then history, to which nobody returns.
    replayed : int or None
        How many turns were asked again from the top, by cells without a name; None: no more.
    """

    chapter: int | None = None
    is_new: bool = False
    replayed: int | None = 0


@dataclass(slots=True)
class Conversations:
    """The threads of one process."""

    _courses: dict[_Key, _Course] = field(default_factory=dict)

    def join(
        self,
        request: Request,
        threads: ConversationStore,
        settings: Settings,
        *,
        anew: bool = False,
    ) -> JoinedRequest:
        """Return `request` with the turns that it is to see, and the place where it joins.

        Parameters
        ----------
        request : Request
            Its thread and origin say which conversation; without a thread it joins none.
        threads : Threads
            The conversations of the journal in force.
        settings : Settings
            Tell the model, where the request names none.
        anew : bool
            Whether the conversation starts afresh with this request.
        """
        if request.thread is None:
            return JoinedRequest(request)
        thread = threads.find_conversation(request.origin.notebook, request.thread)
        place = self._place(request, thread, threads)
        place = replace(place, begins=anew)
        turns = _newest(threads.read_turns(before(thread.candidates, place)), settings.max_history)
        kept = fitting(turns, request, model=request.model or _usual(settings))
        origin = replace(request.origin, position=place)
        request = replace(request, turns=tuple(kept), origin=origin)
        return JoinedRequest(request, left_out=len(turns) - len(kept))

    def begin_anew(self, notebook: str | None, thread: str, threads: ConversationStore) -> None:
        """Start a thread afresh: what was said so far is not seen any more."""
        course = _Course(threads.start_chapter(notebook, thread), is_new=True, replayed=None)
        self._courses[notebook, thread] = course

    def turns(
        self,
        notebook: str | None,
        thread: str,
        threads: ConversationStore,
        *,
        most: int | None = None,
    ) -> list[Turn]:
        """Return the turns that the next new cell would see, `most` at most, if all of them fit."""
        found = threads.find_conversation(notebook, thread)
        chapter = self._course(notebook, thread).chapter
        place = TurnPosition(chapter=found.chapter if chapter is None else chapter)
        return _newest(threads.read_turns(before(found.candidates, place)), most)

    def _course(self, notebook: str | None, thread: str) -> _Course:
        return self._courses.setdefault((notebook, thread), _Course())

    def _place(
        self, request: Request, thread: StoredConversation, threads: ConversationStore
    ) -> TurnPosition:
        """Return the place of a cell that was run before, else one behind all others."""
        course = self._course(request.origin.notebook, request.thread or MAIN_THREAD)
        if course.chapter is None:
            course.chapter = thread.chapter
        slot = self._own(request, course, thread, threads)
        if slot is None:
            return TurnPosition(chapter=course.chapter)
        course.chapter = slot.chapter
        return TurnPosition(chapter=slot.chapter, number=slot.number)

    def _own(
        self,
        request: Request,
        course: _Course,
        thread: StoredConversation,
        threads: ConversationStore,
    ) -> TurnCandidate | None:
        """Return an entry at the place of the cell that asks, if it has one."""
        cell = request.origin.cell
        if cell is None:
            return _replayed(request, course, thread, threads)
        mine = (slot for slot in reversed(thread.candidates) if slot.cell == cell)
        return next((s for s in mine if not course.is_new or s.chapter == course.chapter), None)


def before(slots: Sequence[TurnCandidate], place: TurnPosition) -> list[int]:
    """Return the entries whose turns stand before a place in its chapter, oldest first."""
    if place.begins:
        return []
    newest: dict[int, TurnCandidate] = {}
    done: dict[int, TurnCandidate] = {}
    for slot in slots:
        earlier = place.number is None or slot.number < place.number
        if slot.chapter == place.chapter and earlier:
            newest[slot.number] = slot
            if slot.is_done:
                done[slot.number] = slot
    start = max((number for number, slot in newest.items() if slot.begins), default=0)
    return [done[number].entry for number in sorted(done) if number >= start]


def _newest(turns: list[Turn], most: int | None) -> list[Turn]:
    return turns if most is None else turns[max(0, len(turns) - most) :]


def fitting(turns: Sequence[Turn], request: Request, *, model: str | None) -> list[Turn]:
    """Return the newest of `turns` that fit the model's context beside the request."""
    own = pricing.estimate_request_tokens(replace(request, turns=()))
    sizes = list(accumulate(map(pricing.estimate_turn_tokens, reversed(turns))))
    if not sizes or own + sizes[-1] <= SMALL:
        return list(turns)
    context = pricing.context_window(model) or UNKNOWN
    answer = request.max_output or min(ANSWER, context // 8)
    room = context * SHARE - answer - own
    count = sum(1 for _ in takewhile(lambda size: size <= room, sizes))
    return list(turns[len(turns) - count :])


def _usual(settings: Settings) -> str | None:
    """Return the model that is asked where nobody names one, if it is known beforehand."""
    elsewhere = settings.base_url or settings.azure_endpoint or settings.client
    return settings.model or (None if elsewhere else DEFAULT_MODEL)


def _replayed(
    request: Request, course: _Course, thread: StoredConversation, threads: ConversationStore
) -> TurnCandidate | None:
    """Return the place at which an earlier process asked the same, from the top and in order.

    Where the front end names no cells, this is how a notebook that is run again after a restart is
    told from one that goes on.
    """
    at, course.replayed = course.replayed, None
    if at is None:
        return None
    nameless = [slot for slot in thread.candidates if slot.cell is None]
    chapters = [course.chapter] if at else sorted({s.chapter for s in nameless}, reverse=True)
    for chapter in chapters:
        places = {slot.number: slot for slot in nameless if slot.chapter == chapter}
        if at >= len(places):
            continue
        slot = places[sorted(places)[at]]
        if threads.read_prompt(slot.entry) == request.prompt:
            course.replayed = at + 1
            return slot
    return None


def _count(turns: int, which: str) -> str:
    return f"{turns} {which} turn{'s' * (turns != 1)}"
