"""The Files and Batch APIs: many requests uploaded in one file, their answers in another.

Shapes follow OpenAI's reference. Limits per minute do not apply to batches and are unknown here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from typing import Any

from nbcodex.runtime.clock import Clock
from nbcodex.simulator.error_responses import ErrorResponse
from nbcodex.simulator.generation import encode_json
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.parsed_request import parse_body
from nbcodex.simulator.routes import HttpRequest, Route

ENDPOINTS = ("/v1/responses", "/v1/chat/completions")
MAX_FILE_BYTES = 200_000_000
# Unanswered requests of a batch expire after this time.
BATCH_LIFETIME_S = 86_400.0
_OPEN = ("validating", "in_progress")

# (body, path, name of the key) -> (HTTP status, body)
AnswerRequest = Callable[[dict[str, Any], str, str], tuple[int, dict[str, Any]]]


@dataclass(slots=True, kw_only=True)
class File:
    """A file that a client uploaded or a batch produced."""

    id: str
    owner: str
    name: str
    data: bytes
    purpose: str
    created_at: float

    def file_object(self) -> dict[str, Any]:
        """Return the API's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.data),
            "created_at": int(self.created_at),
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


@dataclass(slots=True, kw_only=True)
class Batch:
    """A batch; `at` is its creation time on the clock, `duration` the seconds until its end."""

    id: str
    owner: str
    endpoint: str
    file: File
    at: float
    created_at: float
    metadata: dict[str, str]
    requests: list[dict[str, Any]]
    status: str = "validating"
    duration: float | None = None
    done: int = 0
    failed: int = 0
    output: File | None = None
    errors: File | None = None
    problems: list[dict[str, Any]] = field(default_factory=list)


class BatchService:
    """The files and batches of all keys.

    Parameters
    ----------
    knobs : callable
        Returns the current settings.
    clock : Clock
        The clock.
    answering : callable
        Answers one request of a batch.
    life : str
        Part of all ids, so that ids of another server are unknown here.
    """

    def __init__(
        self, *, knobs: Callable[[], Knobs], clock: Clock, answering: AnswerRequest, life: str
    ) -> None:
        self._knobs, self._clock, self._answering, self._life = knobs, clock, answering, life
        self._files: dict[str, File] = {}
        self._numbers = itertools.count(1)
        self._batches: dict[str, Batch] = {}

    def serve(self, call: HttpRequest, route: Route, owner: str) -> dict[str, Any] | bytes:
        """Return the API's object, or the contents of a file."""
        match route.collection, call.method, route.id:
            case "files", "GET", id_:
                return self._file(id_, owner).data
            case "files", "DELETE", id_:
                return self._delete(id_, owner)
            case "files", _, _:
                return self._upload(call, owner)
            case _, "GET", "":
                return self._list(owner)
            case _, "GET", id_:
                return self._batch_object(id_, owner)
            case _, _, "":
                return self._create(dict(parse_body(call.body)), owner)
            case _, _, id_:
                return self._cancel(id_, owner)

    def _upload(self, call: HttpRequest, owner: str) -> dict[str, Any]:
        """Store an uploaded file."""
        fields = parse_form(call)
        name, data = fields.get("file", ("", b""))
        purpose = fields.get("purpose", ("", b""))[1].decode("utf-8", "replace")
        if not name or purpose != "batch":
            raise ErrorResponse(400, "'file' and the purpose 'batch' are required.", param="file")
        if len(data) > MAX_FILE_BYTES:
            raise ErrorResponse(413, "The file is too large.", code="file_too_large")
        return self._store_file(name, data, owner=owner, purpose=purpose).file_object()

    def _store_file(self, name: str, data: bytes, *, owner: str, purpose: str) -> File:
        id_ = f"file-{self._life}{next(self._numbers):06x}"
        made = File(
            id=id_,
            owner=owner,
            name=name,
            data=data,
            purpose=purpose,
            created_at=self._clock.wall(),
        )
        self._files[id_] = made
        return made

    def _file(self, id_: str, owner: str) -> File:
        """Return a file of this key."""
        found = self._files.get(id_)
        if found is None or found.owner != owner:
            raise ErrorResponse(404, f"No such File object: {id_}", param="id")
        return found

    def _delete(self, id_: str, owner: str) -> dict[str, Any]:
        """Delete a file."""
        del self._files[self._file(id_, owner).id]
        return {"id": id_, "object": "file", "deleted": True}

    def _create(self, body: dict[str, Any], owner: str) -> dict[str, Any]:
        """Create a batch."""
        endpoint, window = body.get("endpoint"), body.get("completion_window")
        if endpoint not in ENDPOINTS or window != "24h":
            raise ErrorResponse(
                400, "'endpoint' or 'completion_window' is invalid.", param="endpoint"
            )
        file = self._file(str(body.get("input_file_id")), owner)
        requests, troubles = parse_batch_file(file.data, endpoint)
        id_ = f"batch_{self._life}{len(self._batches) + 1:06x}"
        batch = self._batches[id_] = Batch(
            id=id_,
            owner=owner,
            endpoint=endpoint,
            file=file,
            at=self._clock.now(),
            created_at=self._clock.wall(),
            metadata=dict(body.get("metadata") or {}),
            requests=requests,
            problems=troubles or self._queue_problems(requests, owner),
        )
        return self._as_object(batch)

    def _queue_problems(self, requests: list[dict[str, Any]], owner: str) -> list[dict[str, Any]]:
        """Return the problem of a batch that does not fit into the queue."""
        max_requests = self._knobs().batch_queue
        waiting = sum(
            len(b.requests)
            for b in self._batches.values()
            if b.owner == owner and b.status in _OPEN
        )
        if max_requests is None or waiting + len(requests) <= max_requests:
            return []
        message = (
            f"Enqueued limit reached for this model. Limit: {max_requests} enqueued requests. "
            "Please try again once some in_progress batches have been completed."
        )
        return [problem("token_limit_exceeded", message, None)]

    def _batch_object(self, id_: str, owner: str) -> dict[str, Any]:
        """Return the current batch object."""
        return self._as_object(self._found(id_, owner))

    def _list(self, owner: str) -> dict[str, Any]:
        """Return this key's batches, newest first."""
        mine = [self._as_object(b) for b in self._batches.values() if b.owner == owner]
        return {"object": "list", "data": mine[::-1], "has_more": False}

    def _cancel(self, id_: str, owner: str) -> dict[str, Any]:
        """Cancel a batch; answers that exist can be fetched."""
        batch = self._found(id_, owner)
        if batch.status in _OPEN:
            self._end(batch, "cancelled", self._clock.now() - batch.at)
        return self._as_object(batch)

    def _found(self, id_: str, owner: str) -> Batch:
        batch = self._batches.get(id_)
        if batch is None or batch.owner != owner:
            raise ErrorResponse(404, f"No batch found with id '{id_}'.", param="id")
        return batch

    def _advance(self, batch: Batch) -> None:
        """Bring a batch up to the present time."""
        if batch.status not in _OPEN:
            return
        elapsed, duration = self._clock.now() - batch.at, self._knobs().batch_seconds
        if batch.problems and elapsed >= duration / 10:
            batch.status, batch.duration = "failed", duration / 10
        elif elapsed >= min(duration, BATCH_LIFETIME_S):
            self._end(
                batch,
                "completed" if duration <= BATCH_LIFETIME_S else "expired",
                min(duration, BATCH_LIFETIME_S),
            )
        elif elapsed >= duration / 10:
            batch.status = "in_progress"
            batch.done = int(len(batch.requests) * elapsed / duration)

    def _end(self, batch: Batch, status: str, took: float) -> None:
        share = min(1.0, took / self._knobs().batch_seconds)
        answered = (
            len(batch.requests) if status == "completed" else int(len(batch.requests) * share)
        )
        succeeded: list[bytes] = []
        failed_lines: list[bytes] = []
        for number, line in enumerate(batch.requests):
            result = (
                self._answered(batch, line) if number < answered else unanswered_line(line, status)
            )
            is_good = result["error"] is None and result["response"]["status_code"] == 200
            (succeeded if is_good else failed_lines).append(encode_json(result))
        batch.done, batch.failed = len(succeeded), len(failed_lines)
        batch.status, batch.duration = status, took
        batch.output = self._result_file(batch, "output", succeeded)
        batch.errors = self._result_file(batch, "error", failed_lines)

    def _answered(self, batch: Batch, line: dict[str, Any]) -> dict[str, Any]:
        status, body = self._answering(dict(line["body"]), batch.endpoint, batch.owner)
        response = {"status_code": status, "request_id": f"req_{self._life}", "body": body}
        return result_line(line, response=response, error=None)

    def _result_file(self, batch: Batch, kind: str, requests: list[bytes]) -> File | None:
        if not requests:
            return None
        data = b"\n".join(requests) + b"\n"
        return self._store_file(
            f"{batch.id}_{kind}.jsonl", data, owner=batch.owner, purpose="batch_output"
        )

    def _as_object(self, batch: Batch) -> dict[str, Any]:
        self._advance(batch)
        ended = None if batch.duration is None else int(batch.created_at + batch.duration)
        failed = batch.status == "failed"
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": batch.endpoint,
            "errors": {"object": "list", "data": batch.problems} if failed else None,
            "input_file_id": batch.file.id,
            "completion_window": "24h",
            "status": batch.status,
            "output_file_id": batch.output and batch.output.id,
            "error_file_id": batch.errors and batch.errors.id,
            "created_at": int(batch.created_at),
            "expires_at": int(batch.created_at + BATCH_LIFETIME_S),
            f"{batch.status}_at": ended or int(batch.created_at),
            "request_counts": {
                "total": len(batch.requests),
                "completed": batch.done,
                "failed": batch.failed,
            },
            "metadata": batch.metadata,
        }


MAX_BATCH_LINES = 50_000
"""Requests in a batch."""


def parse_form(call: HttpRequest) -> dict[str, tuple[str, bytes]]:
    """Return file name and contents of each field of a multipart form."""
    head = f"content-type: {call.headers.get('content-type', '')}\r\n\r\n".encode()
    message = message_from_bytes(head + call.body, policy=policy.HTTP)
    if not message.is_multipart():
        raise ErrorResponse(400, "A multipart form is expected.")
    fields: dict[str, tuple[str, bytes]] = {}
    for part in message.iter_parts():
        name = str(part.get_param("name", header="content-disposition"))
        contents = part.get_payload(decode=True)
        fields[name] = part.get_filename() or "", contents if isinstance(contents, bytes) else b""
    return fields


def parse_batch_file(
    data: bytes, endpoint: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the requests of a batch file, and the problems found in it."""
    requests: list[dict[str, Any]] = []
    troubles: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            requests.append(_parse_line(json.loads(line), endpoint, seen))
        except (ValueError, TypeError, KeyError, RecursionError):
            troubles.append(problem("invalid_json_line", "This line is not a request.", number))
        except ErrorResponse as failure:
            troubles.append(problem(failure.error["code"] or "", str(failure), number))
    if not requests and not troubles:
        troubles.append(problem("empty_file", "The input file is empty.", None))
    if len(requests) > MAX_BATCH_LINES:
        troubles.append(problem("too_many_requests", "The file has too many lines.", None))
    return requests, troubles


def _parse_line(line: dict[str, Any], endpoint: str, seen: set[str]) -> dict[str, Any]:
    id_ = line["custom_id"]
    if id_ in seen:
        raise ErrorResponse(400, f"The custom_id '{id_}' occurs twice.", code="duplicate_custom_id")
    seen.add(id_)
    if line["url"] != endpoint or line["method"] != "POST":
        raise ErrorResponse(
            400, "The URL does not match the batch's endpoint.", code="mismatched_url"
        )
    return {"custom_id": str(id_), "body": dict(line["body"])}


def unanswered_line(line: dict[str, Any], status: str) -> dict[str, Any]:
    """Return the error line of a request that a batch did not answer."""
    words = {
        "expired": ("batch_expired", "This request could not be executed before it expired."),
        "cancelled": ("batch_cancelled", "This request was not executed: the batch was cancelled."),
    }
    code, message = words[status]
    return result_line(line, response=None, error={"code": code, "message": message})


def result_line(line: dict[str, Any], *, response: Any, error: Any) -> dict[str, Any]:
    """Return a line of an output or error file."""
    id_ = f"batch_req_{line['custom_id']}"
    return {"id": id_, "custom_id": line["custom_id"], "response": response, "error": error}


def problem(code: str, message: str, line: int | None) -> dict[str, Any]:
    """Return the API's error object for a line, or for the whole file."""
    return {"code": code, "message": message, "param": None, "line": line}
