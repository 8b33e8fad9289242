"""Uses the provider's Batch API: requests are uploaded as a file, answers downloaded as another.

Owns the shapes of files and batches (OpenAI's references "Files" and "Batch") and the reading of
their answers, which are as untrusted as any other. Never retries.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nbcodex.errors import NbcodexError, ServerError, TransientError, shorten
from nbcodex.models import Request
from nbcodex.openai_api import answers, api_errors
from nbcodex.openai_api.answers import CompletedAnswer, Redactor
from nbcodex.openai_api.api_errors import AnswerFailedError
from nbcodex.openai_api.rate_limits import dicts_in
from nbcodex.openai_api.readers import ChatReader, ResponsesReader, split_reasoning
from nbcodex.openai_api.request_body import PATHS, DetectedApi
from nbcodex.openai_api.stream import close_body
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from nbcodex.openai_api.api_client import ApiClient

MAX_BATCH_REQUESTS = 50_000
MAX_BATCH_BYTES = 190_000_000  # OpenAI allows 200 MB, the multipart form of the upload included

_MAX_LINE_BYTES = 32_000_000  # of a result file: one answer
_STREAM_PARAMS = ("stream", "stream_options")  # the Batch API refuses them


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch as the server describes it; one that is not created yet has no id."""

    id: str = ""
    status: str = ""
    total: int = 0  # of requests, like the next two
    answered: int = 0
    failed: int = 0
    files: tuple[str, ...] = ()  # the ids of the files with answers and errors
    input_file_id: str | None = None  # the id of the uploaded file
    error: str = ""  # why it failed as a whole
    error_codes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)  # what it was created with

    @property
    def ended(self) -> bool:
        """Whether its status is final."""
        return self.status in {"completed", "failed", "expired", "cancelled"}

    @property
    def is_queue_full(self) -> bool:
        """Whether it failed because too many tokens of this key are enqueued already."""
        return self.status == "failed" and "token_limit_exceeded" in self.error_codes


class BatchClient:
    """Creates and reads batches, through the connections of an `ApiClient`."""

    # The `request` of a call can be any of the batch's, which share their server and options.
    def __init__(self, api_client: ApiClient, settings: Settings) -> None:
        self._api_client, self._settings = api_client, settings
        self._capabilities = api_client.capabilities

    def api_for(self, request: Request) -> DetectedApi:
        """Return the API of a request; all requests of one batch must have the same."""
        endpoint = self._api_client.endpoint(request, self._settings)
        # The API does not depend on the model, which may not be known yet.
        return self._capabilities.prepare(request, self._settings, endpoint, model="").api

    def request_line(self, request: Request, *, model: str) -> bytes:
        """Return a request as a line of an input file; its id names the answer."""
        endpoint = self._api_client.endpoint(request, self._settings)
        prepared = self._capabilities.prepare(request, self._settings, endpoint, model)
        line = {
            "custom_id": request.id,
            "method": "POST",
            "url": f"/v1{PATHS[prepared.api]}",
            "body": {n: value for n, value in prepared.body.items() if n not in _STREAM_PARAMS},
        }
        return json.dumps(line, separators=(",", ":")).encode("ascii") + b"\n"

    async def upload_file(self, data: bytes, request: Request) -> str:
        """Upload at most `MAX_BATCH_REQUESTS` lines, of `MAX_BATCH_BYTES`; return the file's id."""
        async with self._api_client.connected(request, self._settings) as (client, _):
            file = await client.files.create(file=("nbcodex.jsonl", data), purpose="batch")
            return str(file.id)

    async def create_batch(
        self, file_id: str, request: Request, *, metadata: Mapping[str, str]
    ) -> Batch:
        """Create a batch; after a `TransientError`, `find_batch` shows whether it exists."""
        path: Any = f"/v1{PATHS[self.api_for(request)]}"
        async with self._api_client.connected(request, self._settings) as (client, redactor):
            created = await client.batches.create(
                input_file_id=file_id,
                endpoint=path,
                completion_window="24h",  # the only one that OpenAI offers
                metadata=dict(metadata),
            )
            return _read_batch(created.to_dict(), redactor)

    async def find_batch(self, request: Request, *, metadata: Mapping[str, str]) -> Batch | None:
        """Return this key's latest batch that has all of `metadata`, among the newest hundred."""
        async with self._api_client.connected(request, self._settings) as (client, redactor):
            # Newest first: a batch whose creation was interrupted is among them.
            page = await client.batches.list(limit=100)
            batches = [_read_batch(batch.to_dict(), redactor) for batch in page.data]
        return next((each for each in batches if metadata.items() <= each.metadata.items()), None)

    async def retrieve_batch(self, id_: str, request: Request) -> Batch:
        """Return a batch's state."""
        async with self._api_client.connected(request, self._settings) as (client, redactor):
            return _read_batch((await client.batches.retrieve(id_)).to_dict(), redactor)

    async def cancel_batch(self, id_: str, request: Request) -> Batch:
        """End a batch; what is answered can be fetched when it has ended."""
        async with self._api_client.connected(request, self._settings) as (client, redactor):
            return _read_batch((await client.batches.cancel(id_)).to_dict(), redactor)

    async def results(
        self, batch: Batch, request: Request
    ) -> AsyncGenerator[tuple[str, CompletedAnswer | NbcodexError]]:
        """Yield the ids of the requests that the files mention, each with its answer or error."""
        async with self._api_client.connected(request, self._settings) as (client, redactor):
            for file in batch.files:
                async with (
                    client.files.with_streaming_response.content(file) as response,
                    contextlib.aclosing(_lines(response.iter_bytes())) as lines,
                ):
                    simulated = self._api_client.is_simulated(response.headers, str(response.url))
                    async for line in lines:
                        try:
                            result = json.loads(line)
                            id_ = str(result["custom_id"])
                            outcome = self._outcome(result, redactor, request)
                        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                            # One malformed line must not cost the answers on the others.
                            continue
                        if simulated and isinstance(outcome, CompletedAnswer):
                            outcome = replace(outcome, simulated=True)
                        yield id_, outcome

    async def delete_files(self, batch: Batch, request: Request) -> None:
        """Delete the files of a batch at the server, its requests and its answers."""
        import openai

        async with self._api_client.connected(request, self._settings) as (client, _):
            for file in filter(None, (batch.input_file_id, *batch.files)):
                # An earlier deletion that was interrupted may have deleted this file.
                with contextlib.suppress(openai.NotFoundError):
                    await client.files.delete(file)

    def _outcome(
        self, result: dict[str, Any], redactor: Redactor, request: Request
    ) -> CompletedAnswer | NbcodexError:
        response = result.get("response")
        if not response:  # expired or cancelled before it was processed: nothing is charged
            error = result.get("error") or {}
            message = shorten(redactor.clean(str(error.get("message"))), 200)
            return TransientError(f"The batch ended before it reached this request: {message}")
        status, body = int(response["status_code"]), response["body"]
        clean, wall_time = redactor.clean, self._api_client.clock.wall()
        if status != 200:
            return api_errors.from_status(
                status, headers={}, body=json.dumps(body), wall_time=wall_time, clean=clean
            )
        # The line does not name its API; only a response of Responses has `output`. A body of Chat
        # Completions that does not state how the answer ended is accepted: nothing can follow it.
        reader = ResponsesReader() if "output" in body else ChatReader(accepts_missing_ending=True)
        try:
            reader.read_body(body)
        except (AnswerFailedError, NbcodexError) as error:
            return api_errors.from_exception(error, wall_time=wall_time, clean=clean)
        # Whose server it is decides whether tags in the text enclose reasoning.
        server_kind = self._api_client.endpoint(request, self._settings).kind
        text, _ = split_reasoning(reader.answer.text, server_kind)
        return reader.answer.completed(clean(text), redactor, request, server_kind)


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    # `splitlines` would not do: JSON may contain every line separator but a newline.
    unfinished = bytearray()
    try:
        async for chunk in chunks:
            *complete, last = chunk.split(b"\n")
            for line in complete:
                yield bytes(unfinished + line)
                unfinished.clear()
            unfinished += last
            if len(unfinished) > _MAX_LINE_BYTES:
                raise ServerError("The server sent a line without an end.")
    finally:
        await close_body(chunks)
    if unfinished:
        yield bytes(unfinished)


def _read_batch(payload: dict[str, Any], redactor: Redactor) -> Batch:
    counts = answers.dict_member(payload, "request_counts")
    metadata = answers.dict_member(payload, "metadata")
    listed = dicts_in(answers.dict_member(payload, "errors").get("data"))[:3]
    files = (payload.get("output_file_id"), payload.get("error_file_id"))
    reasons = []
    for error in listed:
        line = f" (line {error['line']})" if isinstance(error.get("line"), int) else ""
        text = f"{error.get('message') or error.get('code') or 'unknown'}{line}"
        reasons.append(shorten(redactor.clean(text), 200))
    return Batch(
        id=str(payload.get("id")),
        status=str(payload.get("status")).lower(),  # Together's are in capitals
        total=answers.count_value(counts, "total") or 0,
        answered=answers.count_value(counts, "completed") or 0,
        failed=answers.count_value(counts, "failed") or 0,
        files=tuple(file for file in files if isinstance(file, str)),
        input_file_id=answers.text_value(payload.get("input_file_id")) or None,
        error="; ".join(reasons),
        error_codes=tuple(str(error.get("code")) for error in listed),
        metadata={name: text for name, text in metadata.items() if isinstance(text, str)},
    )
