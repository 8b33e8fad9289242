"""Files and batches: many requests handed in as one file, their answers fetched as another.

Owns what a batch goes through by the clock. Must not know limits per minute, which batches do not
draw on. Shapes: OpenAI's reference of the Batch and the Files API.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nbcodex.runtime.clock import Clock
from nbcodex.simulator.asked import read_body
from nbcodex.simulator.generation import encode
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.lines import form, left_over, read, told, trouble
from nbcodex.simulator.refusals import Failure
from nbcodex.simulator.routes import Call, Route

ENDPOINTS = ("/v1/responses", "/v1/chat/completions")
MOST_BYTES = 200_000_000
WINDOW = 86_400.0
"""Seconds after which what is left of a batch expires."""
_OPEN = ("validating", "in_progress")

Answering = Callable[[dict[str, Any], str, str], tuple[int, dict[str, Any]]]
"""Takes a body, a path and a key's name; returns HTTP status and body."""


@dataclass(slots=True, kw_only=True)
class File:
    """A file that somebody handed in, or a batch left."""

    id: str
    owner: str
    name: str
    data: bytes
    purpose: str
    created_at: float

    def shown(self) -> dict[str, Any]:
        """Return what the API says of it."""
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
    """A batch; `at` and `took` are the instant of its making and the seconds until its end."""

    id: str
    owner: str
    endpoint: str
    file: File
    at: float
    created_at: float
    metadata: dict[str, str]
    lines: list[dict[str, Any]]
    status: str = "validating"
    took: float | None = None
    done: int = 0
    failed: int = 0
    output: File | None = None
    errors: File | None = None
    troubles: list[dict[str, Any]] = field(default_factory=list)


class Library:
    """The files and batches of all keys.

    Parameters
    ----------
    knobs : callable
        Returns the server's knobs now.
    clock : Clock
        The time.
    answering : callable
        Answers one request of a batch.
    life : str
        Goes into ids, so that another server's mean nothing.
    """

    def __init__(
        self, *, knobs: Callable[[], Knobs], clock: Clock, answering: Answering, life: str
    ) -> None:
        self._knobs, self._clock, self._answering, self._life = knobs, clock, answering, life
        self._files: dict[str, File] = {}
        self._numbers = itertools.count(1)
        self._batches: dict[str, Batch] = {}

    def serve(self, call: Call, where: Route, owner: str) -> dict[str, Any] | bytes:
        """Return what the API says, or a file's contents."""
        match where.deed, call.method, where.id:
            case "files", "GET", id_:
                return self.file(id_, owner).data
            case "files", "DELETE", id_:
                return self.delete(id_, owner)
            case "files", _, _:
                return self.upload(call, owner)
            case _, "GET", "":
                return self.batches(owner)
            case _, "GET", id_:
                return self.batch(id_, owner)
            case _, _, "":
                return self.create(dict(read_body(call.body)), owner)
            case _, _, id_:
                return self.cancel(id_, owner)

    def upload(self, call: Call, owner: str) -> dict[str, Any]:
        """Take a file in."""
        fields = form(call)
        name, data = fields.get("file", ("", b""))
        purpose = fields.get("purpose", ("", b""))[1].decode("utf-8", "replace")
        if not name or purpose != "batch":
            raise Failure(400, "'file' and the purpose 'batch' are required.", param="file")
        if len(data) > MOST_BYTES:
            raise Failure(413, "The file is too large.", code="file_too_large")
        return self._filed(name, data, owner=owner, purpose=purpose).shown()

    def _filed(self, name: str, data: bytes, *, owner: str, purpose: str) -> File:
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

    def file(self, id_: str, owner: str) -> File:
        """Return a file of this key's."""
        found = self._files.get(id_)
        if found is None or found.owner != owner:
            raise Failure(404, f"No such File object: {id_}", param="id")
        return found

    def delete(self, id_: str, owner: str) -> dict[str, Any]:
        """Let a file go."""
        del self._files[self.file(id_, owner).id]
        return {"id": id_, "object": "file", "deleted": True}

    def create(self, body: dict[str, Any], owner: str) -> dict[str, Any]:
        """Begin a batch."""
        endpoint, window = body.get("endpoint"), body.get("completion_window")
        if endpoint not in ENDPOINTS or window != "24h":
            raise Failure(400, "'endpoint' or 'completion_window' is invalid.", param="endpoint")
        file = self.file(str(body.get("input_file_id")), owner)
        lines, troubles = read(file.data, endpoint)
        id_ = f"batch_{self._life}{len(self._batches) + 1:06x}"
        batch = self._batches[id_] = Batch(
            id=id_,
            owner=owner,
            endpoint=endpoint,
            file=file,
            at=self._clock.now(),
            created_at=self._clock.wall(),
            metadata=dict(body.get("metadata") or {}),
            lines=lines,
            troubles=troubles or self._too_many(lines, owner),
        )
        return self._shown(batch)

    def _too_many(self, lines: list[dict[str, Any]], owner: str) -> list[dict[str, Any]]:
        """Return the trouble of a batch that does not fit into the queue."""
        most = self._knobs().batch_queue
        waiting = sum(
            len(b.lines) for b in self._batches.values() if b.owner == owner and b.status in _OPEN
        )
        if most is None or waiting + len(lines) <= most:
            return []
        message = (
            f"Enqueued limit reached for this model. Limit: {most} enqueued requests. Please try "
            "again once some in_progress batches have been completed."
        )
        return [trouble("token_limit_exceeded", message, None)]

    def batch(self, id_: str, owner: str) -> dict[str, Any]:
        """Return how a batch stands now."""
        return self._shown(self._found(id_, owner))

    def batches(self, owner: str) -> dict[str, Any]:
        """Return this key's batches, newest first."""
        mine = [self._shown(b) for b in self._batches.values() if b.owner == owner]
        return {"object": "list", "data": mine[::-1], "has_more": False}

    def cancel(self, id_: str, owner: str) -> dict[str, Any]:
        """End a batch; what is answered by now can be fetched."""
        batch = self._found(id_, owner)
        if batch.status in _OPEN:
            self._end(batch, "cancelled", self._clock.now() - batch.at)
        return self._shown(batch)

    def _found(self, id_: str, owner: str) -> Batch:
        batch = self._batches.get(id_)
        if batch is None or batch.owner != owner:
            raise Failure(404, f"No batch found with id '{id_}'.", param="id")
        return batch

    def _move_on(self, batch: Batch) -> None:
        """Let the time pass for a batch."""
        if batch.status not in _OPEN:
            return
        gone, takes = self._clock.now() - batch.at, self._knobs().batch_seconds
        if batch.troubles and gone >= takes / 10:
            batch.status, batch.took = "failed", takes / 10
        elif gone >= min(takes, WINDOW):
            self._end(batch, "completed" if takes <= WINDOW else "expired", min(takes, WINDOW))
        elif gone >= takes / 10:
            batch.status = "in_progress"
            batch.done = int(len(batch.lines) * gone / takes)

    def _end(self, batch: Batch, status: str, took: float) -> None:
        share = min(1.0, took / self._knobs().batch_seconds)
        answered = len(batch.lines) if status == "completed" else int(len(batch.lines) * share)
        good: list[bytes] = []
        bad: list[bytes] = []
        for number, line in enumerate(batch.lines):
            told = self._answered(batch, line) if number < answered else left_over(line, status)
            is_good = told["error"] is None and told["response"]["status_code"] == 200
            (good if is_good else bad).append(encode(told))
        batch.done, batch.failed = len(good), len(bad)
        batch.status, batch.took = status, took
        batch.output = self._left(batch, "output", good)
        batch.errors = self._left(batch, "error", bad)

    def _answered(self, batch: Batch, line: dict[str, Any]) -> dict[str, Any]:
        status, body = self._answering(dict(line["body"]), batch.endpoint, batch.owner)
        response = {"status_code": status, "request_id": f"req_{self._life}", "body": body}
        return told(line, response=response, error=None)

    def _left(self, batch: Batch, kind: str, lines: list[bytes]) -> File | None:
        if not lines:
            return None
        data = b"\n".join(lines) + b"\n"
        return self._filed(
            f"{batch.id}_{kind}.jsonl", data, owner=batch.owner, purpose="batch_output"
        )

    def _shown(self, batch: Batch) -> dict[str, Any]:
        self._move_on(batch)
        ended = None if batch.took is None else int(batch.created_at + batch.took)
        failed = batch.status == "failed"
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": batch.endpoint,
            "errors": {"object": "list", "data": batch.troubles} if failed else None,
            "input_file_id": batch.file.id,
            "completion_window": "24h",
            "status": batch.status,
            "output_file_id": batch.output and batch.output.id,
            "error_file_id": batch.errors and batch.errors.id,
            "created_at": int(batch.created_at),
            "expires_at": int(batch.created_at + WINDOW),
            f"{batch.status}_at": ended or int(batch.created_at),
            "request_counts": {
                "total": len(batch.lines),
                "completed": batch.done,
                "failed": batch.failed,
            },
            "metadata": batch.metadata,
        }
