"""The provider's Batch API: many requests handed in as a file, their answers fetched as another.

Owns the shapes of files and batches (OpenAI's reference of the Files and the Batch API), and the
reading of answers, which are as hostile here as anywhere. Never tries twice.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nbcodex.errors import NbcodexError, ServerError, TransientError, shorten
from nbcodex.models import Request
from nbcodex.openai_api import api_errors, exchange, rate_limits, responses
from nbcodex.openai_api.answers import CompletedAnswer
from nbcodex.openai_api.dialects import Spoken
from nbcodex.openai_api.redaction import Redactor
from nbcodex.openai_api.stream import let_go
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from nbcodex.openai_api.api_client import ApiClient

MAX_BATCH_REQUESTS, MAX_BATCH_BYTES = 50_000, 190_000_000
"""What one batch may hold (OpenAI allows 200 MB; a little is left for the form around it)."""
BATCH_PRICE_FACTOR = 0.5
"""What an answer of a batch costs of one that is asked for at once (OpenAI's price list)."""
LONGEST_LINE = 32_000_000
_PATHS: dict[Spoken, str] = {"responses": "/v1/responses", "chat": "/v1/chat/completions"}
_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
_QUEUE_FULL = "token_limit_exceeded"
_STREAMING = ("stream", "stream_options")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch as the server tells it.

    Parameters
    ----------
    id : str
        The server's name for it.
    status : str
        ``validating``, ``in_progress``, ``finalizing``, ``cancelling``; ``completed``, ``failed``,
        ``expired`` or ``cancelled`` are endings.
    total, answered, failed : int
        Its requests.
    files : tuple of str
        The files with answers and errors, as far as there are any.
    input_file : str or None
        The file that was handed in.
    error : str
        Why it failed as a whole.
    error_codes : tuple of str
        The same in the server's words for programs.
    metadata : mapping
        What it was tagged with.
    """

    id: str
    status: str
    total: int = 0
    answered: int = 0
    failed: int = 0
    files: tuple[str, ...] = ()
    input_file: str | None = None
    error: str = ""
    error_codes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in _ENDED

    @property
    def is_queue_full(self) -> bool:
        """Whether it failed because too much of this key's waits already."""
        return self.status == "failed" and _QUEUE_FULL in self.error_codes


class BatchClient:
    """Batches at any server that has them.

    Parameters
    ----------
    api_client : ApiClient
        The way to the server.
    """

    def __init__(self, api_client: ApiClient) -> None:
        self._api_client = api_client
        self._dialects = api_client.dialects

    def api_for(self, request: Request, settings: Settings) -> Spoken:
        """Return the API that a request is put in; those of one batch have it in common."""
        endpoint = self._api_client.endpoint(request, settings)
        return self._dialects.question(request, settings, endpoint, "").api

    def request_line(self, request: Request, settings: Settings, *, model: str) -> bytes:
        """Return a request as a line of a batch's file; its id is the answer's name."""
        endpoint = self._api_client.endpoint(request, settings)
        question = self._dialects.question(request, settings, endpoint, model)
        body = {name: v for name, v in question.body.items() if name not in _STREAMING}
        asked = {
            "custom_id": request.id,
            "method": "POST",
            "url": _PATHS[question.api],
            "body": body,
        }
        return json.dumps(asked, separators=(",", ":")).encode("ascii") + b"\n"

    async def upload_file(self, data: bytes, request: Request, settings: Settings) -> str:
        """Hand in a file of lines, at most `MOST_REQUESTS` and `MOST_BYTES`; return its name.

        `request` is any of them: here and below it names the server.
        """
        client, redactor = await self._reach(request, settings)
        try:
            file = await client.files.create(file=("nbcodex.jsonl", data), purpose="batch")
            return str(file.id)
        except Exception as error:
            failure, cause = self._api_client.translate(error, redactor)
            raise failure from cause

    async def create_batch(
        self, file: str, request: Request, settings: Settings, *, metadata: Mapping[str, str]
    ) -> Batch:
        """Have a file answered, whose lines are of one API and one model.

        Parameters
        ----------
        file : str
            As `upload_file` returned it.
        metadata : mapping
            Texts by which `find_batches` finds the batch again, however this ends.

        Raises
        ------
        NbcodexError
            Nothing else. After a `TransientError`, ask `find_batches` before starting it again.
        """
        path = _PATHS[self.api_for(request, settings)]

        def deed(client: AsyncOpenAI) -> Awaitable[Any]:
            return client.batches.create(
                input_file_id=file,
                endpoint=path,  # type: ignore[arg-type]  # a Literal there
                completion_window="24h",
                metadata=dict(metadata),
            )

        return await self._told(request, settings, deed)

    async def find_batches(
        self, request: Request, settings: Settings, *, metadata: Mapping[str, str]
    ) -> list[Batch]:
        """Return this key's batches that have all of `metadata`, among the newest hundred."""
        client, redactor = await self._reach(request, settings)
        try:
            page = await client.batches.list(limit=100)
            found = [_batch(made.to_dict(), redactor) for made in page.data]
        except Exception as error:
            failure, cause = self._api_client.translate(error, redactor)
            raise failure from cause
        return [batch for batch in found if metadata.items() <= batch.metadata.items()]

    async def retrieve_batch(self, id_: str, request: Request, settings: Settings) -> Batch:
        """Return how a batch stands."""
        return await self._told(request, settings, lambda sdk: sdk.batches.retrieve(id_))

    async def cancel_batch(self, id_: str, request: Request, settings: Settings) -> Batch:
        """End a batch; what is answered can be fetched when it has ended."""
        return await self._told(request, settings, lambda sdk: sdk.batches.cancel(id_))

    async def results(
        self, batch: Batch, request: Request, settings: Settings
    ) -> AsyncGenerator[tuple[str, CompletedAnswer | NbcodexError]]:
        """Yield each request's id with its answer, or with the reason why it has none.

        What the server says nothing about is not among them. Lines that make no sense are left out.
        """
        client, redactor = await self._reach(request, settings)
        for file in batch.files:
            try:
                async with client.files.with_streaming_response.content(file) as response:
                    simulated = rate_limits.is_simulated(response.headers)
                    async with contextlib.aclosing(_lines(response.iter_bytes())) as lines:
                        async for line in lines:
                            if told := self._read(line, redactor):
                                id_, verdict = told
                                if simulated and isinstance(verdict, CompletedAnswer):
                                    verdict = replace(verdict, simulated=True)
                                yield id_, verdict
            except Exception as error:
                failure, cause = self._api_client.translate(error, redactor)
                raise failure from cause

    async def delete_files(self, batch: Batch, request: Request, settings: Settings) -> None:
        """Have the server erase the files of a batch, its questions and its answers."""
        client, redactor = await self._reach(request, settings)
        for file in filter(None, (batch.input_file, *batch.files)):
            try:
                await client.files.delete(file)
            except Exception as error:
                if getattr(error, "status_code", 0) == 404:
                    continue  # it is gone already
                failure, cause = self._api_client.translate(error, redactor)
                raise failure from cause

    async def _reach(self, request: Request, settings: Settings) -> tuple[AsyncOpenAI, Redactor]:
        _, client = await self._api_client.client_for(request, settings)
        return client, exchange.redactor_for(settings, client)

    async def _told(
        self, request: Request, settings: Settings, deed: Callable[[AsyncOpenAI], Awaitable[Any]]
    ) -> Batch:
        """Return the batch that a call of the SDK returns; raise nothing but errors of ours."""
        client, redactor = await self._reach(request, settings)
        try:
            return _batch((await deed(client)).to_dict(), redactor)
        except Exception as error:
            failure, cause = self._api_client.translate(error, redactor)
            raise failure from cause

    def _read(
        self, line: bytes, redactor: Redactor
    ) -> tuple[str, CompletedAnswer | NbcodexError] | None:
        """Return what a line of a result says."""
        try:
            told = json.loads(line)
            return str(told["custom_id"]), self._verdict(told, redactor)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def _verdict(self, told: dict[str, Any], redactor: Redactor) -> CompletedAnswer | NbcodexError:
        response = told.get("response")
        if not response:
            words = told.get("error") or {}
            message = shorten(redactor.clean(str(words.get("message"))), 200)
            return TransientError(f"The batch ended before this request's turn: {message}")
        status, body = int(response["status_code"]), response["body"]
        wall = self._api_client.clock.wall()
        if status != 200:
            text = json.dumps(body)
            return api_errors.from_status(status, {}, text, wall=wall, clean=redactor.clean)
        reader = responses.reader("responses" if "output" in body else "chat")
        try:
            reader.whole(body)
        except api_errors.FailedError as failed:
            return api_errors.from_event(failed.payload, {}, wall=wall, clean=redactor.clean)
        except NbcodexError as error:
            return error
        return exchange.completed(redactor.clean(reader.ending.text), reader.ending, redactor)


async def _lines(blocks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Yield lines; only a newline ends one, for JSON may contain every other line separator."""
    rest = bytearray()
    try:
        async for block in blocks:
            *whole, last = block.split(b"\n")
            for part in whole:
                yield bytes(rest + part)
                rest.clear()
            rest += last
            if len(rest) > LONGEST_LINE:
                raise ServerError("The server sent a line without an end.")
    finally:
        await let_go(blocks)
    if rest:
        yield bytes(rest)


def _batch(told: dict[str, Any], redactor: Redactor) -> Batch:
    """Return a batch of what the server says, which may be anything."""
    counts, errors = told.get("request_counts"), told.get("errors")
    counts = counts if isinstance(counts, dict) else {}
    listed = errors.get("data") if isinstance(errors, dict) else None
    troubles = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    metadata = told.get("metadata")
    files = (told.get("output_file_id"), told.get("error_file_id"))
    return Batch(
        id=str(told.get("id")),
        status=str(told.get("status")),
        total=_count(counts, "total"),
        answered=_count(counts, "completed"),
        failed=_count(counts, "failed"),
        files=tuple(file for file in files if isinstance(file, str)),
        input_file=told["input_file_id"] if isinstance(told.get("input_file_id"), str) else None,
        error_codes=tuple(str(each.get("code")) for each in troubles[:3]),
        error="; ".join(shorten(redactor.clean(_words(e)), 200) for e in troubles[:3]),
        metadata={k: v for k, v in metadata.items() if isinstance(v, str)}
        if isinstance(metadata, dict)
        else {},
    )


def _words(trouble: dict[str, Any]) -> str:
    line = f" (line {trouble['line']})" if isinstance(trouble.get("line"), int) else ""
    return f"{trouble.get('message') or trouble.get('code') or 'unknown'}{line}"


def _count(counts: dict[str, Any], name: str) -> int:
    value = counts.get(name)
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0
