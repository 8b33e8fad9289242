"""Threads and their turns: which earlier turns a request is sent with, and its answer's position.

A cell that is run again keeps its position: it is sent with the turns before it, and its answer
replaces the old one. Only finished answers are turns. A thread that is started anew begins a new
chapter. If not all turns fit the model's context, the oldest are left out.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from itertools import accumulate

from nbcodex.journal.conversations import ConversationStore, StoredConversation, TurnCandidate
from nbcodex.models import Request, Turn, TurnPosition
from nbcodex.openai_api import pricing
from nbcodex.settings import DEFAULT_MODEL, Settings

MAIN_THREAD = "main"  # of cells that name no thread
# So few are assumed to fit every model: the first look-up of a context window takes 0.2 s.
SMALL_CONVERSATION_TOKENS = 16_000
DEFAULT_CONTEXT_TOKENS = 32_000  # of a model whose context window is unknown
USABLE_CONTEXT_SHARE = 0.85  # because our token counts are estimates
# Left for the answer to a request without `max_output`; but at most an eighth of the window.
FREE_ANSWER_TOKENS = 16_000


@dataclass(slots=True)
class _ThreadState:
    """What this process knows of one thread."""

    chapter: int | None = None  # the chapter that is continued; None: the latest
    # Whether this process started the chapter: cells then do not return to an earlier one.
    is_new: bool = False
    # Cells without an id: how many turns of an earlier process they have repeated, from its first
    # turn on; None: their prompts are no repetition, or not any more.
    repeated_turns: int | None = 0


@dataclass(slots=True)
class Conversations:
    """The threads of one process."""

    _states: dict[tuple[str | None, str], _ThreadState] = field(default_factory=dict)

    def join(
        self, request: Request, store: ConversationStore, settings: Settings, *, start_new: bool
    ) -> tuple[Request, list[str]]:
        """Return `request` with its position and earlier turns (none if `start_new`), and notes."""
        if request.thread is None:
            return request, []
        stored = store.find_conversation(request.origin.notebook, request.thread)
        position = replace(self._position(request, stored, store), starts_new=start_new)
        turns = _turns_before(position, stored, store, settings.max_history)
        # Only the server itself knows the default model of a server other than OpenAI's.
        other_server = settings.base_url or settings.azure_endpoint or settings.client
        default = settings.model or (None if other_server else DEFAULT_MODEL)
        kept = _newest_that_fit(turns, request, model=request.model or default)
        origin = replace(request.origin, position=position)
        request = replace(request, turns=tuple(kept), origin=origin)
        notes = [f"{len(kept)} earlier turn{'s' * (len(kept) != 1)}"] if kept else []
        if left_out := len(turns) - len(kept):
            older = f"{left_out} older turn{'s' * (left_out != 1)}"
            notes.append(f"{older} left out: the context is full")
        return request, notes

    def start_chapter(self, notebook: str | None, thread: str, store: ConversationStore) -> None:
        """Start a thread anew: its turns so far are not sent any more."""
        chapter = store.start_chapter(notebook, thread)
        self._states[notebook, thread] = _ThreadState(chapter, is_new=True, repeated_turns=None)

    def next_turns(
        self, notebook: str | None, thread: str, store: ConversationStore, max_turns: int | None
    ) -> list[Turn]:
        """Return the turns that the next new cell would be sent with, if all fit its model."""
        stored = store.find_conversation(notebook, thread)
        chapter = self._state(notebook, thread).chapter
        position = TurnPosition(chapter=stored.chapter if chapter is None else chapter)
        return _turns_before(position, stored, store, max_turns)

    def _state(self, notebook: str | None, thread: str) -> _ThreadState:
        return self._states.setdefault((notebook, thread), _ThreadState())

    def _position(
        self, request: Request, stored: StoredConversation, store: ConversationStore
    ) -> TurnPosition:
        """Return the position of a cell that was run before, else one after all others."""
        state = self._state(request.origin.notebook, request.thread or MAIN_THREAD)
        if state.chapter is None:
            state.chapter = stored.chapter
        cell = request.origin.cell
        if cell is None:
            earlier = _repeated_turn(request, state, stored, store)
        else:
            of_cell = (turn for turn in reversed(stored.candidates) if turn.cell == cell)
            chapter = state.chapter if state.is_new else None
            earlier = next((turn for turn in of_cell if chapter in (None, turn.chapter)), None)
        if earlier is None:
            return TurnPosition(chapter=state.chapter)
        state.chapter = earlier.chapter
        return TurnPosition(chapter=earlier.chapter, number=earlier.number)


def _turns_before(
    position: TurnPosition, stored: StoredConversation, store: ConversationStore, count: int | None
) -> list[Turn]:
    """Return the newest `count` turns (None: all) before a position in its chapter, in order."""
    if position.starts_new:
        return []
    # Candidates are the thread's entries, answered or not; several can have the same number.
    of_chapter = [turn for turn in stored.candidates if turn.chapter == position.chapter]
    earlier = [t for t in of_chapter if position.number is None or t.number < position.number]
    newest = {turn.number: turn for turn in earlier}  # later entries overwrite earlier ones
    # A cell that failed when it was run again keeps its last answer as a turn.
    done = {turn.number: turn for turn in earlier if turn.is_done}
    first = max((number for number, turn in newest.items() if turn.starts_new), default=0)
    turns = store.read_turns([done[number].entry for number in sorted(done) if number >= first])
    return turns if count is None else turns[max(0, len(turns) - count) :]


def _newest_that_fit(turns: list[Turn], request: Request, *, model: str | None) -> list[Turn]:
    """Return the newest of `turns` that fit the model's context beside the request."""
    request_tokens = pricing.estimate_request_tokens(replace(request, turns=()))
    # Tokens of the newest turn, of the two newest, and so on.
    sums = list(accumulate(map(pricing.estimate_turn_tokens, reversed(turns))))
    if not sums or request_tokens + sums[-1] <= SMALL_CONVERSATION_TOKENS:
        return turns
    context = pricing.context_window(model) or DEFAULT_CONTEXT_TOKENS
    answer_tokens = request.max_output or min(FREE_ANSWER_TOKENS, context // 8)
    available = context * USABLE_CONTEXT_SHARE - answer_tokens - request_tokens
    return turns[len(turns) - bisect_right(sums, available) :]


def _repeated_turn(
    request: Request, state: _ThreadState, stored: StoredConversation, store: ConversationStore
) -> TurnCandidate | None:
    """Return the next turn of an earlier process, if the request repeats its prompt."""
    # In a front end without cell ids, this distinguishes a notebook that is run again after a
    # restart from one that continues.
    index, state.repeated_turns = state.repeated_turns, None
    if index is None:
        return None
    without_cell = [turn for turn in stored.candidates if turn.cell is None]
    # The first prompt decides which chapter is repeated: the newest one that it begins.
    chapters = [state.chapter] if index else sorted({t.chapter for t in without_cell}, reverse=True)
    for chapter in chapters:
        by_number = {turn.number: turn for turn in without_cell if turn.chapter == chapter}
        if index >= len(by_number):
            continue
        turn = by_number[sorted(by_number)[index]]
        if store.read_prompt(turn.entry) == request.prompt:
            state.repeated_turns = index + 1
            return turn
    return None
