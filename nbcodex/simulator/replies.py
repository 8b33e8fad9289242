"""The server's HTTP responses, put together. Must not know why they are as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbcodex.simulator import headers
from nbcodex.simulator.delivery import Body, once
from nbcodex.simulator.faults import Fault
from nbcodex.simulator.generation import encode
from nbcodex.simulator.refusals import Failure, retry_headers


@dataclass(slots=True)
class Answer:
    """An HTTP response.

    Parameters
    ----------
    status : int
        The status.
    headers : dict
        Headers by lower-case name.
    body : Body
        The bytes, to be iterated over once and closed. Iterating raises `Dropped` where the
        connection shall end.
    """

    status: int
    headers: dict[str, str]
    body: Body


def in_json(data: Any, common: dict[str, str]) -> Answer:
    """Return a response that holds `data`."""
    encoded = encode(data)
    size = {"content-length": str(len(encoded))}
    return Answer(200, common | headers.JSON | size, Body(once(encoded)))


def refused(failure: Failure, common: dict[str, str]) -> Answer:
    """Return the response for `failure`; a page is a gateway's, which knows nothing of limits."""
    if failure.html:
        data = failure.html.encode()
        given = {headers.SIMULATED: "true"} | headers.HTML
    else:
        data = encode({"error": failure.body})
        given = common | headers.JSON
    given |= failure.headers | {"content-length": str(len(data))}
    return Answer(failure.status, headers.without_empty(given), Body(once(data)))


def answered(given: dict[str, str], body: Body, *, fault: Fault | None, wall: float) -> Answer:
    """Return an answer, with what its fault does to the headers `given`."""
    match fault:
        case Fault(kind="absurd_headers"):
            given = given | headers.ABSURD
        case Fault(kind="azure_failed"):
            given = given | retry_headers(fault.wait, "seconds", wall)
    extra = dict(fault.headers) if fault else {}
    return Answer(200, headers.without_empty(given | extra), body)
