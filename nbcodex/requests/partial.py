"""The part of an answer that is there, and where at the server the rest of it can be picked up.

Owns that text and mark fit together: whoever goes on at the mark neither loses nor doubles a word.
Must not know attempts, waits or the journal.
"""

from __future__ import annotations

from nbcodex.models import Request, Status, StreamPosition, Usage
from nbcodex.openai_api import pricing
from nbcodex.openai_api.answers import CompletedAnswer

ASKED_ANEW = "the server lost the answer: asked anew"


class Partial:
    """What there is of one request's answer.

    Attributes
    ----------
    mark : Mark or None
        Where the durable answer goes on behind `text`; None where there is no such answer.
    """

    def __init__(self) -> None:
        self.mark: StreamPosition | None = None
        self._shown: list[str] = []
        self._stale = False
        self._notes: list[str] = []

    @property
    def text(self) -> str:
        """The text that is shown."""
        return "".join(self._shown)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of the answer should know."""
        return tuple(self._notes)

    def note(self, text: str) -> None:
        """Add a note; the same one again changes nothing."""
        if text not in self._notes:
            self._notes.append(text)

    def take_up(self, mark: StreamPosition, text: str) -> None:
        """Begin with what an earlier kernel had."""
        self.mark, self._shown = mark, [text] if text else []

    def add(self, text: str) -> bool:
        """Add text; return whether it replaces what was shown."""
        anew, self._stale = self._stale, False
        if anew:
            self._shown.clear()
        self._shown.append(text)
        return anew

    def reach(self, mark: StreamPosition) -> None:
        """The text so far is the answer up to `mark`."""
        # While another answer's text is shown, this one is to be picked up from its beginning.
        self.mark = StreamPosition(mark.response_id) if self._stale else mark

    def replace(self) -> None:
        """Whatever text comes next replaces what is shown."""
        self._stale = bool(self._shown)

    def ask_anew(self) -> None:
        """There will be another answer: its first text replaces what is shown."""
        self.mark = None
        self.replace()

    def resume(self, mark: StreamPosition) -> str:
        """Return the text behind which the answer goes on at `mark`."""
        if mark.sequence is None:
            self.replace()
            return ""
        return self.text

    def goes_on(self, status: Status) -> bool:
        """Whether the answer of a request that ends like this goes on at the server."""
        return self.mark is not None and status in {"parked", "interrupted", "failed"}

    def usage(self, request: Request, status: Status, completed: CompletedAnswer | None) -> Usage:
        """Return what the answer has used: the server's figures, else an estimate marked so.

        A durable answer that goes on at the server is charged when it is picked up, and only then.
        """
        if completed and completed.usage != Usage():
            return completed.usage
        if self.goes_on(status):
            return Usage()
        return _estimate(request, completed.text) if completed else self.so_far(request)

    def so_far(self, request: Request) -> Usage:
        """Return what the attempt under way has used by the text that it has brought."""
        return _estimate(request, "" if self._stale else self.text)


def _estimate(request: Request, text: str) -> Usage:
    if not text:
        return Usage()
    return Usage(
        input_tokens=pricing.estimate_request_tokens(request),
        output_tokens=pricing.estimate_text_tokens(text),
        estimated=True,
    )
