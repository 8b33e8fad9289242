"""Reads one response's body as stream events, until the protocol says that the answer has ended.

Owns server-sent events and how long a server may be silent. Knows neither the request nor what
becomes of a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from typing import Any

from nbcodex.models import StreamPosition
from nbcodex.openai_api import answers
from nbcodex.openai_api.answers import ReasoningDelta, Redactor, Reset, StreamEvent, TextDelta
from nbcodex.openai_api.api_errors import AnswerFailedError, broken_connection, invalid_answer
from nbcodex.openai_api.readers import AnswerReader, ReasoningSplitter, split_reasoning
from nbcodex.settings import Settings

# How many times the idle timeout a server may be silent before the first delta, when the model may
# be reasoning, and before an answer that comes in one piece.
FIRST_TEXT_FACTOR = 5
WHOLE_BODY_FACTOR = 10

# The usage, or the reason of a failure, can come after all else: neither is worth a long wait.
TRAILER_TIMEOUT_S = 5.0

# Once text has begun, packets are gathered for this long, because to wake up for one costs as much
# as for many. What has arrived already is read at once.
PACKET_GATHERING_S = 0.02

# A connection returns to the pool only when its body was read to the end: worth a short wait.
DRAIN_TIMEOUT_S = 0.1
_DRAIN_BYTES = 65_536

MAX_BODY_BYTES = 64 * 1024 * 1024  # of one event, or of an answer in one piece

_BOM = b"\xef\xbb\xbf"
_KEEPALIVE_NAMES = ("keepalive", "ping", "heartbeat")
_MAX_KEEPALIVE_CHARS = 80  # keep-alive events are shorter; hardly any other event is
SseEvent = tuple[str, str]  # its name and its data


class SseDecoder:
    """Turns chunks of bytes into server-sent events, wherever the network splits them."""

    # Source: "Interpreting an event stream" in the HTML standard, without ``id`` and ``retry``,
    # which serve a browser's reconnection; `AnswerStream` removes the byte order mark.

    def __init__(self) -> None:
        # Extended in place, so that many small chunks take linear time.
        self._line = bytearray()  # the unfinished line
        self._data = bytearray()  # of the unfinished event, with a newline after each line
        self._event_name = b""
        self._after_cr = False

    @property
    def pending_bytes(self) -> int:
        """Bytes of data in the unfinished event; comments do not count."""
        return len(self._data) + (0 if self._line.startswith(b":") else len(self._line))

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """Return the events that `chunk` completes."""
        # A CRLF may be split between two chunks.
        if self._after_cr and chunk:
            self._after_cr = False
            chunk = chunk.removeprefix(b"\n")
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")
        lines = chunk.splitlines()  # bytes are split at LF, CR and CRLF only, as the standard asks
        rest = b"" if chunk[-1:] in b"\r\n" else lines.pop()
        events: list[SseEvent] = []
        if lines and self._line:
            lines[0] = bytes(self._line + lines[0])
            self._line.clear()
        for line in lines:
            name, _, value = line.partition(b":")
            if not line:
                if self._data:
                    data = self._data[:-1].decode("utf-8", "replace")
                    events.append((self._event_name[:100].decode("utf-8", "replace"), data))
                    self._data.clear()
                self._event_name = b""
            elif name == b"data":
                self._data += value.removeprefix(b" ") + b"\n"
            elif name == b"event":
                self._event_name = value.removeprefix(b" ")
            elif name == b"error" and value.lstrip().startswith(b"{"):
                # llama.cpp until 2025 (ggml-org/llama.cpp#16109); other fields are ignored.
                events.append(("error", value.decode("utf-8", "replace").strip()))
        self._line += rest
        if len(self._data) + len(self._line) > MAX_BODY_BYTES:
            raise invalid_answer(f"The server sent an event of over {MAX_BODY_BYTES >> 20} MB.")
        return events

    def flush(self) -> list[SseEvent]:
        """Return the event that the end of the stream left without its empty line, if any."""
        return self.feed(b"\n\n") if self._line or self._data else []


class AnswerStream:
    """One answer as it arrives in the chunks of a response's body, without our secrets."""

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        reader: AnswerReader,
        settings: Settings,
        *,
        secrets: Iterable[str],
        patience: float = 0.0,  # seconds that keep-alives alone can hold a stream open
        server_kind: str = "openai",  # `Endpoint.kind`: others' texts can contain reasoning
        resumed_text: str = "",  # what earlier streams brought of a durable answer
    ) -> None:
        self._chunks, self._reader = chunks, reader
        self._idle_timeout, self._patience = settings.idle_timeout, patience
        self._max_chars, self._char_count = settings.max_answer, 0  # of the deltas so far
        # Each holds back the end of its own text.
        self._redactor, self._reasoning_redactor = Redactor(secrets), Redactor(secrets)
        self._decoder = SseDecoder()
        self._server_kind, self._splitter = server_kind, ReasoningSplitter(server_kind)
        self._has_restarted = False  # all text so far turned out to be reasoning
        self._first_chunk = b""  # the first chunk, which shows what kind of body it is
        self._payload: dict[str, Any] | None = None  # a body in one piece
        self._texts = [resumed_text] if resumed_text else []
        self._has_text = bool(resumed_text)
        self._reasonings: list[str] = []
        self._withheld_text = ""  # text of a durable answer after its last position
        self._half_character = ""  # of a surrogate pair that two deltas share
        self._position = self._emitted_position = reader.position
        self._waited_for_chunk = False  # whether the last chunk was not there yet
        self._error: Exception | None = None  # to be raised after the events that came before it
        # Its reason, or its usage, may follow.
        self._unfinished_failure: AnswerFailedError | None = None
        self.is_empty = False  # whether the body ended without any content

    @property
    def text(self) -> str:
        """All the text so far."""
        return "".join(self._texts)

    async def prefetch(self) -> None:
        """Read the first chunk, and the rest of a body in one piece."""
        deadline = self._deadline()
        while not self._first_chunk and (chunk := await self._next_chunk(deadline)):
            self._first_chunk = chunk.lstrip(_BOM + b" \t\r\n")
        if not self._first_chunk.startswith((b"{", b"[")):
            return
        body, chunk = bytearray(), self._first_chunk
        while chunk:
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise invalid_answer(f"The server sent more than {MAX_BODY_BYTES >> 20} MB.")
            chunk = await self._next_chunk(self._deadline())
        # A relay can append a stream's end marker (decolua/9router#3492).
        body = body.rstrip().removesuffix(b"[DONE]").rstrip().removesuffix(b"data:")
        try:
            self._payload = answers.json_object(body.decode("utf-8", "replace"))
        except ValueError:
            if b"\n{" not in body:
                raise
            # Chunks without ``data:``, one on a line (NDJSON).
            self._first_chunk = b"data: " + body.replace(b"\n", b"\ndata: ")
            return
        if answers.is_error_object(self._payload):  # raised here, the request can still be adapted
            raise AnswerFailedError(self._payload)

    async def events(self) -> AsyncGenerator[StreamEvent]:
        """Yield deltas and positions until the answer is complete; then close the body."""
        try:
            if not self._first_chunk:
                await self.prefetch()
            if self._first_chunk.startswith(b"<"):
                raise AnswerFailedError(self._first_chunk.decode("utf-8", "replace"))  # a web page
            if self._payload is None:
                async with contextlib.aclosing(self._read_stream(self._first_chunk)) as events:
                    async for event in events:
                        yield event
            else:
                try:
                    self._reader.read_body(self._payload)
                except Exception:
                    # An answer that is still being generated has an id, which must not be lost.
                    self._position = self._reader.position
                    for event in self._emit(text="", reasoning=""):
                        yield event
                    raise
            earlier_text = self.text
            rest, reasoning = self._splitter.flush()
            if self._half_character:
                rest += "\ufffd"
            text = self._withheld_text + self._redactor.feed(rest) + self._redactor.flush()
            self._texts.append(text)
            # The final event, or a body in one piece, has the whole text, which counts: deltas can
            # be lost, sent twice, or be what the model said before its answer.
            final, final_reasoning = split_reasoning(self._reader.answer.text, self._server_kind)
            final = self._redactor.clean(final)
            # But vLLM's can have only the last token (#30223): then the deltas before it do not
            # begin like it, as they would if a text had been sent twice.
            answer, streamed = self._reader.answer, (earlier_text + text).strip()
            lost = streamed.removesuffix(final.strip()).strip()
            is_whole = lost == streamed or final.strip().startswith(lost)
            is_whole |= self._reader.has_restarted or bool(answer.reasoning_text)
            differs = is_whole and final.strip() not in ("", streamed)
            if answer.is_unusable and not (final.strip() or streamed):
                # Like one without any ending, it is charged: the second in a row is accepted.
                self._reader.lacks_ending = not self._reader.accepts_missing_ending
                if self._reader.lacks_ending:
                    raise answers.failed_answer_error(answer.cut or "")
            if differs:
                self._has_restarted = not final.startswith(earlier_text)
                text = final if self._has_restarted else final.removeprefix(earlier_text)
                self._texts = [final]
            reasoning += answer.reasoning_text if differs or self._payload else ""
            reasoning += "" if self._char_count or reasoning else final_reasoning
            shown = self._reasoning_redactor.feed(reasoning) + self._reasoning_redactor.flush()
            for event in self._emit(text, shown):
                yield event
            answer.reasoning_text = "".join(self._reasonings)
            with contextlib.suppress(Exception):
                async with asyncio.timeout(DRAIN_TIMEOUT_S):
                    remaining_bytes = _DRAIN_BYTES
                    while remaining_bytes > 0:
                        remaining_bytes -= len(await anext(self._chunks))
        finally:
            await close_body(self._chunks)

    async def _read_stream(self, chunk: bytes) -> AsyncGenerator[StreamEvent]:
        """Yield what a stream of server-sent events adds, once per network chunk."""
        loop = asyncio.get_running_loop()
        progress_at = loop.time()
        while chunk:
            earlier_bytes = self._decoder.pending_bytes
            sse_events = self._decoder.feed(chunk)
            for event in self._emit(*self._read_events(sse_events)):
                yield event
            if self._error:
                raise self._error
            if self._reader.is_closed:
                break
            if self._char_count > self._max_chars:
                # A model in a loop never ends; the text so far is an answer, cut by our own bound.
                self._reader.answer.cut = answers.CUT_MAX_ANSWER
                self._reader.is_complete = self._reader.is_closed = True
                break
            deadline = self._deadline()
            # Comments and keep-alive events show that the server is alive and will still answer
            # (can1357/oh-my-pi#2177); but a gateway can send them for ever after a model has died.
            if any(map(_is_progress, sse_events)) or self._decoder.pending_bytes > earlier_bytes:
                progress_at = loop.time()
            else:
                allowed_silence = deadline - loop.time()
                deadline = min(deadline, progress_at + max(allowed_silence, self._patience))
            if self._texts and self._waited_for_chunk:
                await asyncio.sleep(PACKET_GATHERING_S)
            chunk = await self._next_chunk(deadline)
        else:
            for event in self._emit(*self._read_events(self._decoder.flush())):
                yield event
            if not self._error:
                self._reader.read_end()
        # Half an event at the end means a broken stream, not invalid JSON.
        error = self._error or self._unfinished_failure
        if isinstance(error, AnswerFailedError):
            raise error
        if not self._reader.is_complete:
            self.is_empty = not self._first_chunk
            failure = broken_connection("The stream ended before the answer was complete.")
            failure.ended_early = True
            raise failure

    def _deadline(self) -> float:
        """Return the loop's time until which the server may stay silent."""
        allowed_silence = self._idle_timeout * (1 if self._has_text else FIRST_TEXT_FACTOR)
        if self._reader.is_complete or self._unfinished_failure:
            allowed_silence = min(self._idle_timeout, TRAILER_TIMEOUT_S)
        return asyncio.get_running_loop().time() + allowed_silence

    async def _next_chunk(self, deadline: float) -> bytes:
        """Return the next chunk; b"" at the end, or if the connection is lost after the answer."""
        chunk, self._waited_for_chunk = b"", False
        # If the loop runs a callback before the chunk is there, the network was waited for. A clock
        # cannot show it: on a busy machine, reading what is there takes as long as waiting.
        marker = asyncio.get_running_loop().call_soon(setattr, self, "_waited_for_chunk", True)
        try:
            async with asyncio.timeout_at(deadline):
                while not chunk:
                    chunk = await anext(self._chunks)
        except StopAsyncIteration:
            return b""
        except Exception as error:
            is_silent = isinstance(error, TimeoutError)
            is_ended = self._reader.is_complete or (is_silent and self._reader.may_be_complete)
            if is_ended or self._unfinished_failure:
                return b""
            if is_silent:
                raise broken_connection("The server stopped sending.") from None
            raise
        finally:
            marker.cancel()
        return chunk

    def _read_events(self, events: list[SseEvent]) -> tuple[str, str]:
        """Return the text and the reasoning that events add; keep an error for `_read_stream`."""
        text = reasoning = ""
        for name, data in _split_lines(events):
            if self._reader.is_closed:
                break
            try:
                if not data.startswith(("{", "[")):
                    if name == "error":
                        raise AnswerFailedError(data)
                    # A relay can send OpenRouter's comments as data (mnfst/llm-gateway#2053), and
                    # keep-alives can be words or times. Anything else is a damaged event.
                    if "{" not in data and "}" not in data:
                        continue
                more_text, more_reasoning = self._reader.read_event(name, data)
            except (AnswerFailedError, ValueError, RecursionError) as error:
                if self._reader.is_complete:
                    # What goes wrong after the end of an answer does not undo it.
                    self._reader.is_closed = True
                elif isinstance(error, AnswerFailedError):
                    if not error.is_final:
                        self._unfinished_failure = error
                        continue
                    self._error = error
                else:
                    # A failure without a reason says more than invalid JSON after it.
                    self._error = self._unfinished_failure or error
                break
            text += more_text
            reasoning += more_reasoning
        text, self._half_character = answers.whole_characters(self._half_character + text)
        if text:
            text, tagged = self._splitter.feed(text)
            # Some servers send the same reasoning in both places.
            reasoning += "" if self._reader.reasoning_chars else tagged
            if self._splitter.has_restarted:
                self._texts.clear()
                self._redactor.flush()
                self._withheld_text, self._has_restarted = "", True
        self._char_count += len(text) + len(reasoning)
        if text:
            self._has_text = True
            text = self._redactor.feed(text)
        if self._reader.position:
            # A durable answer is shown up to its last position: what the redactor holds back would
            # be missing from an answer that is resumed after that position.
            self._withheld_text, text = self._withheld_text + text, ""
            if not self._redactor.tail:
                self._withheld_text, text = "", self._withheld_text
                self._position = self._reader.position
        if text:
            self._texts.append(text)
        return text, self._reasoning_redactor.feed(reasoning) if reasoning else ""

    def _emit(self, text: str, reasoning: str) -> Iterator[StreamEvent]:
        """Yield the events for what was added, and for a new position after it."""
        position = self._position
        if position and self._redactor.clean(position.response_id) != position.response_id:
            position = None  # an id that contains a secret is not stored
        if position and not self._emitted_position:
            yield StreamPosition(position.response_id)
        if self._has_restarted:
            self._has_restarted = False
            yield Reset()
        if reasoning:
            self._reasonings.append(reasoning)
            yield ReasoningDelta(reasoning)
        if text:
            yield TextDelta(text)
        if position and position != self._emitted_position:
            yield position
        self._emitted_position = position


def _split_lines(events: list[SseEvent]) -> Iterator[SseEvent]:
    """Yield events, of which servers can send several with only one newline between them."""
    for name, data in events:
        lines = [line.strip() for line in data.split("\n")]
        are_objects = all(line[:1] + line[-1:] in ("{}", "[]", "") for line in lines)
        for line in lines if are_objects else [data.strip()]:
            yield name, line


def _is_progress(event: SseEvent) -> bool:
    """Whether an event is more than a keep-alive."""
    name, data = event
    if name in _KEEPALIVE_NAMES or not data.lstrip().startswith(("{", "[")):
        return False
    return len(data) > _MAX_KEEPALIVE_CHARS or not any(f'"{n}"' in data for n in _KEEPALIVE_NAMES)


async def close_body(chunks: AsyncIterator[bytes]) -> None:
    """Close a body that was not read to its end."""
    # Otherwise the garbage collector closes the generator, at any moment and on any thread.
    if isinstance(chunks, AsyncGenerator):
        with contextlib.suppress(Exception):
            await chunks.aclose()
