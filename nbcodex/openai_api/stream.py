"""Reads a stream to the end that the protocol gives it, or finds out that there will be none.

Owns silence: how long a server may say nothing. Yields text as it comes, once per network chunk, so
that thousands of deltas a second stay cheap; without our secrets.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from nbcodex.models import StreamPosition
from nbcodex.openai_api import api_errors, sse
from nbcodex.openai_api.api_errors import FailedError, nonsense
from nbcodex.openai_api.redaction import Redactor
from nbcodex.openai_api.responses import Reader, decoded, is_alive

BEFORE_TEXT = 5
"""How many times the idle timeout a model may think before its first word."""

BEFORE_WHOLE = 10
"""How many times the idle timeout an answer may take that comes in one piece."""

AFTERMATH = 5.0
"""Seconds to wait for what may follow the last word, or a failure: figures, or reasons."""

GATHER = 0.02
"""Seconds to let packets gather once text has begun: to wake for each costs as much as for many.
What has come already is read at once."""

DRAIN = 0.1
"""Seconds to wait for the end of a body, so that its connection can be used again."""

_BLANK = b"\xef\xbb\xbf \t\r\n"


class Reading:
    """One answer on its way.

    Parameters
    ----------
    chunks : async iterator of bytes
        The body of the response.
    reader : Reader
        Knows the API.
    redactor, thoughts : Redactor
        For the answer, and for the thinking.
    idle : float
        Seconds of silence after which a stream that has begun is broken.
    begun : bool
        Whether it goes on with a text that has begun.
    """

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        reader: Reader,
        *,
        redactor: Redactor,
        thoughts: Redactor,
        idle: float,
        begun: bool = False,
    ) -> None:
        self._chunks, self._reader, self._idle = chunks, reader, idle
        self._redactor, self._thoughts = redactor, thoughts
        self._decoder = sse.Decoder()
        self._said: list[str] = []
        self._begun, self._withheld = begun, ""
        self._mark = reader.mark
        self.is_whole = False
        self._waited = False
        self._fault: Exception | None = None
        self._told: FailedError | None = None  # a failure whose reason may follow

    @property
    def text(self) -> str:
        """All the text so far."""
        return "".join(self._said)

    @property
    def mark(self) -> StreamPosition | None:
        """Where a durable answer goes on, behind the text that was yielded."""
        return self._mark

    async def pieces(self) -> AsyncGenerator[tuple[str, str]]:
        """Yield (text, thought) until the answer is whole.

        Raises
        ------
        FailedError
            If the stream says that the answer failed.
        Exception
            Whatever breaks the stream before.
        """
        first = await self._first()
        if first.startswith((b"{", b"[")):
            self.is_whole = True
            try:
                text = await self._whole(first)
            except Exception:
                self._mark = self._reader.mark
                yield "", ""  # an answer that is not finished has told its name
                raise
            yield text, ""
            return
        if first.startswith(b"<"):
            raise nonsense("The server sent a web page instead of an answer.")
        async with contextlib.aclosing(self._streamed(first)) as streamed:
            async for piece in streamed:
                yield piece
        if rest := self._rest():
            yield rest
        await self._drain()

    async def close(self) -> None:
        """Let go of the body."""
        await let_go(self._chunks)

    async def _first(self) -> bytes:
        """Return the first chunk that is not blank, which tells what kind of body it is."""
        deadline = self._deadline()
        while chunk := await self._next(deadline):
            if head := chunk.lstrip(_BLANK):
                return head
        return b""

    async def _streamed(self, chunk: bytes) -> AsyncGenerator[tuple[str, str]]:
        """Yield what a stream of events brings, each network chunk at once."""
        deadline = self._deadline()
        while chunk:
            pending = self._decoder.pending
            events = self._decoder.feed(chunk)
            if piece := self._take(events):
                yield piece
            if self._fault:
                raise self._fault
            if self._reader.closed:
                break
            if any(is_alive(*e) for e in events) or self._decoder.pending > pending:
                deadline = self._deadline()
            if self._said and self._waited:
                await asyncio.sleep(GATHER)
            chunk = await self._next(deadline)
        else:
            if piece := self._take(self._decoder.flush()):
                yield piece
        # Half an event at the end is no nonsense, but a stream that was cut.
        fault = self._fault or self._told
        if isinstance(fault, FailedError):
            raise fault
        if not self._reader.finished:
            raise api_errors.broken("The stream ended before the answer was complete.")

    def _deadline(self) -> float:
        """Return the instant, on the loop, until which the server may be silent from now on."""
        if self._reader.finished or self._told:
            silence = min(self._idle, AFTERMATH)
        else:
            silence = self._idle * (1 if self._begun else BEFORE_TEXT)
        return asyncio.get_running_loop().time() + silence

    async def _next(self, deadline: float) -> bytes:
        """Return the next chunk; none at the end, or where a lost connection costs no text."""
        chunk, self._waited = b"", False
        # Where the loop takes a turn before the chunk is here, the network was waited for. No clock
        # tells that: on a busy machine, what is there takes as long as what comes.
        turn = asyncio.get_running_loop().call_soon(self._note_turn)
        try:
            async with asyncio.timeout_at(deadline):
                while not chunk:
                    chunk = await anext(self._chunks)
        except StopAsyncIteration:
            return b""
        except TimeoutError:
            if not (self._reader.finished or self._told):
                raise api_errors.broken("The server fell silent.") from None
        except Exception:
            if not (self._reader.finished or self._told):
                raise
        finally:
            turn.cancel()
        return chunk

    def _note_turn(self) -> None:
        self._waited = True

    def _take(self, events: list[tuple[str, str]]) -> tuple[str, str] | None:
        """Return what events add; a fault in them is kept until that has been shown."""
        texts: list[str] = []
        thoughts: list[str] = []
        for name, data in events:
            if self._reader.closed:
                break
            if not data.strip():
                continue
            try:
                text, thought = self._reader.read(name, data)
            except (FailedError, ValueError, RecursionError) as fault:
                if self._failed(fault):
                    break
                continue
            if text:
                texts.append(text)
            if thought:
                thoughts.append(thought)
        text = self._shown("".join(texts))
        thought = self._thoughts.feed("".join(thoughts)) if thoughts else ""
        if text:
            self._said.append(text)
        return (text, thought) if text or thought or self._reader.mark else None

    def _shown(self, text: str) -> str:
        """Return what may be shown now; of a durable answer, only up to where it has a mark.

        What the redactor holds back would be lost to whoever picks the answer up behind it.
        """
        if text:
            self._begun = True
            text = self._redactor.feed(text)
        if self._reader.mark is None:
            return text
        self._withheld += text
        if self._redactor.holds:
            return ""
        text, self._withheld = self._withheld, ""
        self._mark = self._reader.mark
        return text

    def _failed(self, fault: Exception) -> bool:
        """Note a fault; return whether no event after it matters."""
        if self._reader.finished:
            # The answer is whole: what goes wrong behind it does not undo it.
            self._reader.closed = True
            return True
        if isinstance(fault, FailedError) and not fault.final:
            self._told = fault
            return False
        self._fault = self._told if self._told and not isinstance(fault, FailedError) else fault
        return True

    def _rest(self) -> tuple[str, str] | None:
        """Return what was held back, and the text that came only with the ending."""
        held, self._withheld = self._withheld, ""
        if not self._begun:
            held = self._redactor.feed(self._reader.ending.text)
        held += self._redactor.flush()
        thought = self._thoughts.flush()
        if held:
            self._said.append(held)
        return (held, thought) if held or thought else None

    async def _whole(self, first: bytes) -> str:
        """Return the answer of a server that does not stream."""
        body = await whole_body(self._rest_of_body(first))
        self._reader.whole(decoded(body.decode("utf-8", "replace")))
        text = self._redactor.clean(self._reader.ending.text)
        self._said.append(text)
        return text

    async def _rest_of_body(self, chunk: bytes) -> AsyncIterator[bytes]:
        while chunk:
            yield chunk
            chunk = await self._next(self._deadline())

    async def _drain(self) -> None:
        """Read to the end of the body, if that is near."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(DRAIN):
                left = 65_536
                while left > 0:
                    left -= len(await anext(self._chunks))


async def let_go(chunks: AsyncIterator[bytes]) -> None:
    """Close a body where it was left: else the collector does, at any moment and on any thread."""
    if isinstance(chunks, AsyncGenerator):
        with contextlib.suppress(Exception):
            await chunks.aclose()


async def whole_body(chunks: AsyncIterator[bytes]) -> bytes:
    """Return a whole body, or raise a ServerError if it is larger than any answer."""
    parts, size = [], 0
    try:
        async for chunk in chunks:
            parts.append(chunk)
            size += len(chunk)
            if size > sse.LARGEST:
                raise nonsense(f"The server sent more than {sse.LARGEST >> 20} MB.")
    finally:
        await let_go(chunks)
    return b"".join(parts)
