"""Words about the conversation: what was said, and starting afresh."""

from __future__ import annotations

from nbcodex.client import current
from nbcodex.errors import shorten
from nbcodex.notebook.commands.base import CommandGroup, print_line
from nbcodex.openai_api import pricing
from nbcodex.requests.conversation import MAIN_THREAD


class Talk(CommandGroup):
    """The conversation of this notebook."""

    def new(self, thread: str = MAIN_THREAD) -> None:
        """Start the conversation afresh: new [THREAD] (also reset)."""
        session = self._session
        current().conversations.begin_anew(session.notebook, thread, session.journal.conversations)
        print_line(
            f"The conversation{_named(thread)} starts afresh: what was said is not sent any more."
        )

    reset = new

    def history(self, thread: str = MAIN_THREAD) -> None:
        """Tell what the next cell would be told of the conversation: history [THREAD]."""
        session = self._session
        threads = session.journal.conversations
        most = self._settings.max_history
        turns = current().conversations.turns(session.notebook, thread, threads, most=most)
        for number, turn in enumerate(turns, start=1):
            seen = f" [{len(turn.images)} images]" if turn.images else ""
            print_line(
                f"{number:>3}  {shorten(turn.prompt, 70)}{seen}\n     → {shorten(turn.answer, 70)}"
            )
        if not turns:
            print_line(
                f"Nothing has been said yet{_within(thread)}: the next cell sees no earlier turn."
            )
            return
        size, count = sum(map(pricing.estimate_turn_tokens, turns)), len(turns)
        print_line(
            f"{count} turn{'s' * (count > 1)}{_within(thread)}, about {size:,} tokens; "
            f"`%codex new{_named(thread)}` leaves them."
        )


def _named(thread: str) -> str:
    return "" if thread == MAIN_THREAD else f" {shorten(thread, 60)}"


def _within(thread: str) -> str:
    return "" if thread == MAIN_THREAD else f" in the conversation{_named(thread)}"
