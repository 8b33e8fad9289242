"""The Files and Batch APIs: many requests uploaded in one file, their answers in another.

Objects follow OpenAI's reference. As there, limits per minute do not apply to batches.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from typing import Any

from nbcodex.runtime.clock import Clock
from nbcodex.simulator.http_messages import ErrorResponse, HttpRequest, encode_json
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.parsed_request import Route, parse_body

# The limits of OpenAI's Batch API. After a batch's lifetime, its unanswered requests expire.
MAX_BATCH_LINES = 50_000
BATCH_LIFETIME_S = 86_400.0
ENDPOINTS = ("/v1/responses", "/v1/chat/completions")
# Why a batch did not answer some of its requests, by its final status.
_UNANSWERED = {
    "expired": "This request could not be executed before it expired.",
    "cancelled": "This request was not executed: the batch was cancelled.",
}


@dataclass(slots=True, kw_only=True)
class Batch:
    """A batch of requests."""

    key_name: str  # which stands for the API key that created it, see `RequestRecord.key`
    started_at: float  # its creation on the clock
    requests: list[dict[str, Any]]
    problems: list[dict[str, Any]]  # why it will fail as a whole
    fields: dict[str, Any]  # the object by which the API describes it

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return self.fields["status"] in ("validating", "in_progress")

    def set_status(self, status: str, elapsed: float) -> None:
        """Set the status that it has since `elapsed` seconds after its creation."""
        self.fields |= {"status": status, f"{status}_at": int(self.fields["created_at"] + elapsed)}


@dataclass(kw_only=True, eq=False)
class BatchService:
    """The files and batches of all keys."""

    knobs: Callable[[], Knobs]  # returns the current settings
    clock: Clock
    # Answers one request, given its body, path and key's name: with an HTTP status and a body.
    answer_line: Callable[[dict[str, Any], str, str], tuple[int, dict[str, Any]]]
    server_id: str  # part of all ids
    _files: dict[tuple[str, str], bytes] = field(default_factory=dict)  # by the key's name, and id
    _file_numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _batches: dict[str, Batch] = field(default_factory=dict)

    def serve(self, request: HttpRequest, route: Route, key_name: str) -> dict[str, Any] | bytes:
        """Return the object that the API answers with, or the contents of a file."""
        match route.endpoint, request.method, route.id:
            case "files", "GET", id_:
                return self._contents(id_, key_name)
            case "files", "DELETE", id_:
                self._contents(id_, key_name)  # raises for an unknown file
                del self._files[key_name, id_]
                return {"id": id_, "object": "file", "deleted": True}
            case "files", _, _:
                return self._upload(request, key_name)
            case _, "GET", "":
                batches = [b for b in self._batches.values() if b.key_name == key_name]
                data = [self._as_object(batch) for batch in reversed(batches)]
                return {"object": "list", "data": data, "has_more": False}
            case _, "POST", "":
                return self._as_object(self._create(parse_body(request.body), key_name))
            case _, method, id_:
                batch = self._batches.get(id_)
                if batch is None or batch.key_name != key_name:
                    raise ErrorResponse(404, f"No batch found with id '{id_}'.", param="id")
                if method == "POST" and batch.is_open:
                    self._end(batch, "cancelled", duration=self.clock.now() - batch.started_at)
                return self._as_object(batch)

    def _contents(self, id_: str, key_name: str) -> bytes:
        if (key_name, id_) not in self._files:
            raise ErrorResponse(404, f"No such File object: {id_}", param="id")
        return self._files[key_name, id_]

    def _upload(self, request: HttpRequest, key_name: str) -> dict[str, Any]:
        head = f"content-type: {request.headers.get('content-type', '')}\r\n\r\n".encode()
        # A form is written like an e-mail with attachments.
        form = message_from_bytes(head + request.body, policy=policy.HTTP)
        parts = {p.get_param("name", header="content-disposition"): p for p in form.iter_parts()}
        contents = {name: part.get_payload(decode=True) for name, part in parts.items()}
        file = contents.get("file")
        if not isinstance(file, bytes) or contents.get("purpose") != b"batch":
            message = "A form with a 'file' and the purpose 'batch' is required."
            raise ErrorResponse(400, message, param="file")
        return {
            "id": self._store_file(file, key_name),
            "object": "file",
            "bytes": len(file),
            "created_at": int(self.clock.wall()),
            "filename": parts["file"].get_filename(),
            "purpose": "batch",
            "status": "processed",
        }

    def _store_file(self, data: bytes, key_name: str) -> str:
        id_ = f"file-{self.server_id}{next(self._file_numbers):06x}"
        self._files[key_name, id_] = data
        return id_

    def _create(self, body: dict[str, Any], key_name: str) -> Batch:
        endpoint, window = body.get("endpoint"), body.get("completion_window")
        if endpoint not in ENDPOINTS or window != "24h":
            message = "'endpoint' or 'completion_window' is invalid."
            raise ErrorResponse(400, message, param="endpoint")
        file_id = str(body.get("input_file_id"))
        requests, problems = parse_batch_file(self._contents(file_id, key_name), endpoint)
        max_requests = self.knobs().batch_queue
        batches = [b for b in self._batches.values() if b.key_name == key_name]
        enqueued = len(requests) + sum(len(b.requests) for b in batches if b.is_open)
        if not problems and max_requests is not None and enqueued > max_requests:
            message = (
                f"Enqueued limit reached for this model. Limit: {max_requests} enqueued requests. "
                "Please try again once some in_progress batches have been completed."
            )
            problems = [_problem("token_limit_exceeded", message)]
        id_ = f"batch_{self.server_id}{len(self._batches) + 1:06x}"
        created_at = self.clock.wall()
        fields = {
            "id": id_,
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": file_id,
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": int(created_at),
            "expires_at": int(created_at + BATCH_LIFETIME_S),
            "request_counts": {"total": len(requests), "completed": 0, "failed": 0},
            "metadata": dict(body.get("metadata") or {}),
        }
        batch = self._batches[id_] = Batch(
            key_name=key_name,
            started_at=self.clock.now(),
            requests=requests,
            problems=problems,
            fields=fields,
        )
        return batch

    def _as_object(self, batch: Batch) -> dict[str, Any]:
        """Return the API's object of a batch at the present time."""
        if not batch.is_open:
            return batch.fields
        # Validation takes a tenth of the duration.
        elapsed, duration = self.clock.now() - batch.started_at, self.knobs().batch_seconds
        if batch.problems and elapsed >= duration / 10:
            batch.fields["errors"] = {"object": "list", "data": batch.problems}
            batch.set_status("failed", duration / 10)
        elif elapsed >= min(duration, BATCH_LIFETIME_S):
            status = "completed" if duration <= BATCH_LIFETIME_S else "expired"
            self._end(batch, status, duration=min(duration, BATCH_LIFETIME_S))
        elif elapsed >= duration / 10:
            batch.set_status("in_progress", duration / 10)
            completed = int(len(batch.requests) * elapsed / duration)
            batch.fields["request_counts"]["completed"] = completed
        return batch.fields

    def _end(self, batch: Batch, status: str, *, duration: float) -> None:
        """Answer the requests reached within `duration` seconds, and write the result files."""
        share = 1.0 if status == "completed" else duration / self.knobs().batch_seconds
        answered = int(len(batch.requests) * min(1.0, share))
        results: dict[str, list[bytes]] = {"output": [], "error": []}  # by the file they are for
        path, request_id = batch.fields["endpoint"], f"req_{self.server_id}"
        for index, line in enumerate(batch.requests):
            http_status, response, error = 0, None, None
            if index < answered:
                http_status, body = self.answer_line(line["body"], path, batch.key_name)
                response = {"status_code": http_status, "request_id": request_id, "body": body}
            else:
                error = {"code": f"batch_{status}", "message": _UNANSWERED[status]}
            ids = {"id": f"batch_req_{line['custom_id']}", "custom_id": line["custom_id"]}
            result = encode_json({**ids, "response": response, "error": error})
            results["output" if http_status == 200 else "error"].append(result + b"\n")
        for file, count in (("output", "completed"), ("error", "failed")):
            batch.fields["request_counts"][count] = len(results[file])
            if results[file]:
                id_ = self._store_file(b"".join(results[file]), batch.key_name)
                batch.fields[f"{file}_file_id"] = id_
        batch.set_status(status, duration)


def parse_batch_file(
    data: bytes, endpoint: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the requests of a batch file, and the problems found in it."""
    requests: list[dict[str, Any]] = []
    problems: list[dict[str, Any]] = []
    ids: set[str] = set()
    for number, text in enumerate(data.splitlines(), start=1):
        try:
            line = json.loads(text)
            id_, body = line["custom_id"], dict(line["body"])
            if id_ in ids:
                message = f"The custom_id '{id_}' occurs twice."
                problems.append(_problem("duplicate_custom_id", message, number))
            elif line["url"] != endpoint or line["method"] != "POST":
                message = "The URL does not match the batch's endpoint."
                problems.append(_problem("mismatched_url", message, number))
            else:
                requests.append({"custom_id": str(id_), "body": body})
            ids.add(id_)
        except (ValueError, TypeError, KeyError, RecursionError):
            problems.append(_problem("invalid_json_line", "This line is not a request.", number))
    if not requests and not problems:
        problems.append(_problem("empty_file", "The input file is empty."))
    if len(requests) > MAX_BATCH_LINES:
        problems.append(_problem("too_many_requests", "The file has too many lines."))
    return requests, problems


def _problem(code: str, message: str, line: int | None = None) -> dict[str, Any]:
    """Return an error of a batch, with the number of the line at fault, if it is about one."""
    return {"code": code, "message": message, "param": None, "line": line}
