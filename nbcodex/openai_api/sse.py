"""Server-sent events from bytes, however the network cuts them. Pure; knows nothing of the API.

Source: the "event stream interpretation" of the HTML standard, of which ``id`` and ``retry`` are
of no use here.
"""

from __future__ import annotations

from nbcodex.errors import ServerError

LARGEST = 64 * 1024 * 1024
"""Bytes of one event, after which the server is taken to be broken."""

_BOM = b"\xef\xbb\xbf"


class Decoder:
    """Turns chunks of bytes into events.

    Each byte is looked at once: a line in a million pieces costs no more than in one.
    """

    def __init__(self, *, largest: int = LARGEST) -> None:
        self._largest = largest
        self._pieces: list[bytes] = []  # of the line that has not ended
        self._lines: list[bytes] = []  # the data of the event that has not ended
        self._event = b""
        self._size = self._rest = 0  # bytes of those lines, and of those pieces
        self._after_cr = self._begun = False

    @property
    def pending(self) -> int:
        """Bytes of data in the event that has not ended; comments do not count."""
        comment = self._pieces and self._pieces[0][:1] == b":"
        return self._size + (0 if comment else self._rest)

    def feed(self, chunk: bytes) -> list[tuple[str, str]]:
        """Return the events that `chunk` completes, as (name, data).

        Raises
        ------
        ServerError
            If an event grows beyond all bounds.
        """
        if self._after_cr and chunk:
            self._after_cr = False
            chunk = chunk.removeprefix(b"\n")
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")
        lines = chunk.splitlines()  # of bytes: at LF, CR and CRLF only
        rest = b"" if chunk[-1:] in b"\r\n" else lines.pop()
        events: list[tuple[str, str]] = []
        if lines and self._pieces:
            lines[0] = b"".join([*self._pieces, lines[0]])
            self._pieces.clear()
            self._rest = 0
        for line in lines:
            self._take(line, events)
        if rest:
            self._pieces.append(rest)
            self._rest += len(rest)
            self._bound()
        return events

    def flush(self) -> list[tuple[str, str]]:
        """Return the event that the end of the stream left without its empty line, if any."""
        return self.feed(b"\n\n") if self._pieces or self._lines else []

    def _take(self, line: bytes, events: list[tuple[str, str]]) -> None:
        """Take one whole line."""
        if not self._begun:
            self._begun = True
            line = line.removeprefix(_BOM)
        if not line:
            self._dispatch(events)
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            value = value.removeprefix(b" ")
            self._lines.append(value)
            self._size += len(value) + 1
            self._bound()
        elif name == b"event":
            self._event = value.removeprefix(b" ")

    def _dispatch(self, events: list[tuple[str, str]]) -> None:
        if self._lines:
            data = b"\n".join(self._lines).decode("utf-8", "replace")
            events.append((self._event[:100].decode("utf-8", "replace"), data))
            self._lines.clear()
            self._size = 0
        self._event = b""

    def _bound(self) -> None:
        if self._size + self._rest > self._largest:
            raise ServerError(
                f"The server sent an event of more than {self._largest >> 20} MB.",
                advice="The server or a gateway before it is broken; it is tried again by itself.",
            )
