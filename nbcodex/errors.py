"""The errors of this package: what happened, and what to do about it.

The class says whether an error is worth another attempt; ``docs/python.md`` draws the tree. Only
`openai_api` translates exceptions of the SDK and of HTTP into these.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbcodex.models import Limit, LimitSnapshot, Reply, Usage

MAX_ERROR_LINES, ERROR_WIDTH_CHARS = 6, 84
MAX_MESSAGE_CHARS = 400
_JOINERS = "\u200c\u200d"  # not printable, but parts of emoji and of several scripts


def shorten(text: str, max_chars: int = MAX_MESSAGE_CHARS) -> str:
    """Return `text` on one line, without control characters, cut to `max_chars`."""
    text = text[: max_chars * 8]  # a server may send megabytes; blanks are joined below
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c in _JOINERS else " " for c in text)
    line = " ".join(text.split())
    return line if len(line) <= max_chars else line[: max_chars - 1] + "…"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a sentence on an unknown `word`: ``; did you mean usage?`` or a stop."""
    import difflib  # here, because `%load_ext` has to be fast

    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else "."


class Advice(str):
    """Advice for the user of a cell; `script` is that for a script, which has no magics."""

    script: str

    def __new__(cls, cell: str, script: str = "") -> Advice:
        """Create it from the two texts."""
        advice = super().__new__(cls, cell)
        advice.script = script
        return advice


def advice_for_script(advice: str) -> str:
    """Return advice for Python code: a plain string names parameters in place of options."""
    if isinstance(advice, Advice):
        return advice.script
    return re.sub(r"--([a-z-]+)", lambda option: option[1].replace("-", "_"), advice)


def join_advice(*parts: str) -> Advice:
    """Return the pieces of advice that are not empty as one."""
    given = [part for part in parts if part]
    return Advice(" ".join(given), script=" ".join(map(advice_for_script, given)))


def render(title: str, message: str, advice: str) -> list[str]:
    """Return an error as at most six lines, in place of a traceback."""
    lines = textwrap.wrap(f"{title}: {shorten(message)}", ERROR_WIDTH_CHARS)
    arrow = f"→ {shorten(advice)}" if advice else ""
    advice_lines = textwrap.wrap(arrow, ERROR_WIDTH_CHARS, subsequent_indent="  ")[:3]
    return lines[: MAX_ERROR_LINES - len(advice_lines)] + advice_lines


class _ErrorBase(BaseException):
    """An error that IPython shows in a few lines, and that other processes can receive."""

    title = "nbcodex"

    def __init_subclass__(cls, *, title: str = "") -> None:
        super().__init_subclass__()
        cls.title = title or cls.title

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.message = message  # what happened
        self.advice = advice  # what the user can do

    # The default would call the class with `args` alone, which most of our classes do not accept.
    # Errors cross processes in `multiprocessing`, joblib and Dask.
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).__new__, (type(self), *self.args), self.__dict__

    # IPython calls this by name, for every exception that has it.
    def _render_traceback_(self) -> list[str]:
        return render(self.title, self.message, self.advice)


class NbcodexError(_ErrorBase, Exception):
    """The base class of all our errors, except Stopped."""

    reply: Reply | None = None  # what has arrived, if the request ran
    # The limits as the headers of the refusal state them, if it came with headers.
    snapshot: LimitSnapshot | None = None
    # Whether the simulator refused, which costs nothing and concerns no real limit.
    simulated: bool = False
    # What the failed attempt has used, as far as the server states it.
    usage: Usage | None = None
    # Whether the attempt costs nothing if no answer had begun.
    is_unbilled: bool = False

    def __str__(self) -> str:
        return f"{self.message} {self.advice}".strip()


class ConfigurationError(NbcodexError, title="Not done"):
    """A setting is missing or invalid; nothing was sent."""


class MissingKeyError(ConfigurationError):
    """No key is known for the server that the request would go to."""


class ConnectionSettingsError(ConfigurationError, title="Not connected"):
    """The address, the proxy or the certificates are wrong: no request gets to the server."""

    is_unbilled = True


class BatchUnsupportedError(ConfigurationError, title="No batches"):
    """The server has no Batch API, or does not accept this kind of batch."""


class TransientError(NbcodexError, title="Temporary failure"):
    """Worth another attempt."""

    def __init__(self, message: str, *, advice: str = "", wait: float | None = None) -> None:
        super().__init__(message, advice=advice)
        self.wait = wait  # seconds that the server asks for; None where it does not say


class LimitError(TransientError, title="Rate limit"):
    """The server's rate limit refused the request, or broke off its answer."""

    is_unbilled = True

    def __init__(
        self, message: str, *, limit: Limit, advice: str = "", wait: float | None = None
    ) -> None:
        super().__init__(message, advice=advice, wait=wait)
        self.limit = limit  # with the figures that the server states


class OverloadedError(TransientError, title="Server overloaded"):
    """The server is too busy; no limit is reached."""

    is_unbilled = True


class ServerError(TransientError, title="Server error"):
    """The server failed, or sent an invalid answer."""


class AnswerLostError(TransientError, title="Answer lost"):
    """A durable answer cannot be continued: the server no longer has it, or it failed there."""


class TransportError(TransientError, title="Connection lost"):
    """There was no connection, or it broke, or nothing was received for too long."""

    ended_early = False  # the server itself ended the stream before the answer was complete


class PermanentError(NbcodexError, title="Refused"):
    """The same request can never succeed; it is not sent again."""

    is_unbilled = True


class QuotaError(PermanentError, title="Quota exhausted"):
    """The account has no credit left: waiting does not help."""


class TooLargeError(PermanentError, title="Too large"):
    """The request is larger than the whole limit, or than the model's context."""

    def __init__(self, message: str, *, advice: str = "", limit: Limit | None = None) -> None:
        super().__init__(message, advice=advice)
        self.limit = limit


# For a request that its earlier turns have made too large.
LONG_CONVERSATION_ADVICE = Advice(
    "The conversation so far is sent along: ask with --new or --no-history, or start afresh with "
    "`%codex new`.",
    script="The conversation so far is sent along: leave out `thread`.",
)


class CredentialsError(PermanentError, title="Not allowed"):
    """The server does not accept the key, or does not allow it to do this."""


class ModelError(PermanentError, title="Model not found"):
    """There is no such model for this key."""


class RequestError(PermanentError, title="Request rejected"):
    """The server rejects the request as it stands."""


class NetworkRefusedError(RequestError):
    """The provider does not serve this country or network."""


class AnswerError(NbcodexError, title="Invalid answer"):
    """An answer arrived, but it is not usable; its text is in `reply`."""

    def __init__(self, message: str, *, advice: str = "", note: str = "") -> None:
        super().__init__(message, advice=advice)
        self.note = note  # for the line of figures; empty where the reply's `cut` says why


class EntryError(NbcodexError, title="Journal"):
    """An entry of the journal cannot be found, read, or resumed; the entry is unchanged."""


class EntryNotFoundError(EntryError):
    """No id in the journal begins with the given text."""


class ParkedError(NbcodexError, title="Parked"):
    """The request is kept for later: the wait exceeds the user's patience, or they parked it."""

    def __init__(
        self,
        message: str,
        *,
        advice: str = "",
        cause: TransientError | None = None,
        resume_at: float | None = None,
    ) -> None:
        super().__init__(message, advice=advice)
        self.cause = cause  # the failure that demands a wait; None if nothing failed
        self.resume_at = resume_at  # the earliest instant to send it, in seconds since the epoch

    @property
    def limit(self) -> Limit | None:
        """The limit that demands the wait, if one does."""
        return getattr(self.cause, "limit", None)


class BudgetError(ParkedError, title="Budget"):
    """The request would exceed the user's own budget: it was not sent, and is kept for later."""


class CancelledError(NbcodexError, title="Cancelled"):
    """The user ended this request."""


class Stopped(_ErrorBase, KeyboardInterrupt, title="Interrupted"):
    """The user pressed Stop: a KeyboardInterrupt, so that `except Exception` lets it pass."""

    def __init__(self, message: str, *, reply: Reply | None = None, advice: str = "") -> None:
        super().__init__(message, advice=advice)
        self.reply = reply  # with the text so far
