"""Faults as data: what fails, when, and with which message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Kind = Literal[
    # Instead of an answer.
    "http",
    "tokens_per_minute",
    "requests_per_minute",
    "tokens_per_day",
    "requests_per_day",
    "too_large",
    "quota",
    "azure",
    "overloaded",
    "html_429",
    "html_502",
    "redirect",
    "refused",
    # Before an answer, or around it.
    "slow",
    "headers",
    "absurd_headers",
    # During generation: a background response fails for good.
    "error_event",
    "flat_error_event",
    "failed",
    "azure_failed",
    # During delivery: a background response continues without its reader.
    "truncated",
    "dropped",
    "cut",
    "malformed",
    "stalled",
    "huge_line",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

GENERATION = frozenset({"error_event", "flat_error_event", "failed", "azure_failed"})
DELIVERY = frozenset({"truncated", "dropped", "cut", "malformed", "stalled", "huge_line"})


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault for one request.

    Instead of an answer: ``http`` (with `status`, `code`, `type`, `message`), the 429s
    ``tokens_per_minute``, ``requests_per_minute``, ``tokens_per_day``, ``requests_per_day``,
    ``too_large``, ``quota`` and ``azure``, a 503 ``overloaded``, the gateway's pages ``html_429``
    and ``html_502``, a ``redirect`` to `location`, a connection that is closed without an answer
    (``refused``).

    Around an answer: ``slow`` (the first byte comes `seconds` later), ``headers`` (with additional
    `headers`), ``absurd_headers``.

    In mid-stream: the nested ``error_event``, the ``flat_error_event``, ``failed``
    (``response.failed`` with its error), ``azure_failed`` (the wait in the header of the 200, then
    ``response.failed`` without an error, then an error event), a clean end too early
    (``truncated``), a connection reset (``dropped``) or closed within a chunk (``cut``), broken
    JSON (``malformed``), silence for `seconds` or for ever (``stalled``), a line of `size` bytes
    (``huge_line``). Chat Completions has no ``failed`` and sends an error event instead.
    An answer that is not streamed is dropped, stalled, malformed, or a failure with `status`.
    """

    kind: Kind  # which fault
    after: int = 0  # number of text deltas before it; -1: before the first event of the stream
    # The wait that a 429 states (default 1.2), the delay, or the silence.
    seconds: float | None = None
    status: int = 500  # HTTP status of ``http`` (and of answers that are not streamed)
    # code, type, message: values in place of the usual ones.
    code: str | None = None
    type: str | None = None
    message: str | None = None
    # Additional headers; an empty value removes one.
    headers: Mapping[str, str] = field(default_factory=dict)
    location: str = "http://127.0.0.1:9/v1/responses"  # target of a ``redirect``
    size: int = 10_000_000  # bytes of a ``huge_line``

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is not a fault; choose from: {', '.join(KINDS)}")
        numbers = {"after": self.after, "status": self.status, "size": self.size}
        for name, value in {**numbers, "seconds": self.seconds or 0.0}.items():
            if not isinstance(value, int if name in numbers else (int, float)):
                raise ValueError(f"{name} of a fault must be a number, not {value!r}")  # noqa: TRY004

    @property
    def wait(self) -> float:
        """The seconds that a 429 states."""
        return 1.2 if self.seconds is None else self.seconds

    def strikes(self, deltas: int, *, is_delta: bool, is_end: bool) -> bool:
        """Return whether it applies before an event that follows `deltas` text deltas."""
        return self.after < 0 or (is_delta and deltas == self.after) or is_end


def parse_fault(data: Any) -> Fault | None:
    """Return the fault in JSON data: a name, an object with fields, or null for none.

    Raises
    ------
    ValueError
        If the fault or a field is unknown.
    """
    match data:
        case None:
            return None
        case str():
            return Fault(data)  # type: ignore[arg-type]
        case {"kind": str()}:
            try:
                return Fault(**data)
            except TypeError as exc:
                raise ValueError(str(exc)) from exc
        case _:
            raise ValueError("a fault must be null, a name, or an object with a kind")


class Dropped(Exception):  # noqa: N818 - a way to end a connection, not an error
    """Ends the connection without a proper HTTP ending.

    Parameters
    ----------
    partial : bytes
        The part of the next chunk that is still sent.
    reset : bool
        Whether the connection is reset rather than closed.
    """

    def __init__(self, partial: bytes = b"", *, reset: bool = False) -> None:
        super().__init__("reset" if reset else "closed")
        self.partial = partial
        self.reset = reset
