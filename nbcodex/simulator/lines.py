"""What is handed in for a batch, read and checked; and the lines of what comes out. Pure."""

from __future__ import annotations

import json
from email import message_from_bytes, policy
from typing import Any

from nbcodex.simulator.refusals import Failure
from nbcodex.simulator.routes import Call

MOST_LINES = 50_000
"""Requests in a batch."""


def form(call: Call) -> dict[str, tuple[str, bytes]]:
    """Return a multipart form's fields: file name and contents of each."""
    head = f"content-type: {call.headers.get('content-type', '')}\r\n\r\n".encode()
    message = message_from_bytes(head + call.body, policy=policy.HTTP)
    if not message.is_multipart():
        raise Failure(400, "A multipart form is expected.")
    fields: dict[str, tuple[str, bytes]] = {}
    for part in message.iter_parts():
        name = str(part.get_param("name", header="content-disposition"))
        contents = part.get_payload(decode=True)
        fields[name] = part.get_filename() or "", contents if isinstance(contents, bytes) else b""
    return fields


def read(data: bytes, endpoint: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a batch's requests, and what is wrong with its file."""
    lines: list[dict[str, Any]] = []
    troubles: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            lines.append(_request(json.loads(line), endpoint, seen))
        except (ValueError, TypeError, KeyError, RecursionError):
            troubles.append(trouble("invalid_json_line", "This line is no request.", number))
        except Failure as failure:
            troubles.append(trouble(failure.error["code"] or "", str(failure), number))
    if not lines and not troubles:
        troubles.append(trouble("empty_file", "The input file is empty.", None))
    if len(lines) > MOST_LINES:
        troubles.append(trouble("too_many_requests", "The file has too many lines.", None))
    return lines, troubles


def _request(line: dict[str, Any], endpoint: str, seen: set[str]) -> dict[str, Any]:
    id_ = line["custom_id"]
    if id_ in seen:
        raise Failure(400, f"The custom_id '{id_}' is there twice.", code="duplicate_custom_id")
    seen.add(id_)
    if line["url"] != endpoint or line["method"] != "POST":
        raise Failure(400, "The URL does not match the batch's endpoint.", code="mismatched_url")
    return {"custom_id": str(id_), "body": dict(line["body"])}


def left_over(line: dict[str, Any], status: str) -> dict[str, Any]:
    """Return the line of a request that a batch did not come to."""
    words = {
        "expired": ("batch_expired", "This request could not be executed before it expired."),
        "cancelled": ("batch_cancelled", "This request was not executed: the batch was cancelled."),
    }
    code, message = words[status]
    return told(line, response=None, error={"code": code, "message": message})


def told(line: dict[str, Any], *, response: Any, error: Any) -> dict[str, Any]:
    """Return a line of an output or an error file."""
    id_ = f"batch_req_{line['custom_id']}"
    return {"id": id_, "custom_id": line["custom_id"], "response": response, "error": error}


def trouble(code: str, message: str, line: int | None) -> dict[str, Any]:
    """Return what is wrong with a line, or with the whole file."""
    return {"code": code, "message": message, "param": None, "line": line}
