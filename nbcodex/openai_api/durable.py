"""Durable answers at the server: how one is picked up, fetched or ended there, and when it is lost.

The calls are those of OpenAI's guide to background mode: ``GET /responses/{id}``, with ``stream``
and ``starting_after``, and ``POST /responses/{id}/cancel``. Must not know the reading.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from nbcodex.errors import NbcodexError, ServerError, TransportError
from nbcodex.models import StreamPosition
from nbcodex.openai_api.api_errors import FailedError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

CANCELLING = 5.0
"""Seconds within which the server is to hear that an answer is not wanted any more."""

_REFUSED = {400, 404, 405, 410, 422, 501}
_ID = re.compile(r"[A-Za-z0-9][\w.:-]{0,199}", re.ASCII)


def usable(response_id: object) -> str | None:
    """Return the server's name for an answer if it may stand in an address, else None."""
    return response_id if isinstance(response_id, str) and _ID.fullmatch(response_id) else None


def streamed(client: AsyncOpenAI, mark: StreamPosition) -> Any:
    """Return the call that goes on with a stream, as a context that closes its response."""
    retrieve = client.responses.with_streaming_response.retrieve
    if mark.sequence is None:
        return retrieve(mark.response_id, stream=True)
    return retrieve(mark.response_id, stream=True, starting_after=mark.sequence)


def fetched(client: AsyncOpenAI, mark: StreamPosition) -> Any:
    """Return the call that fetches an answer as it stands, as a context."""
    return client.responses.with_streaming_response.retrieve(mark.response_id)


def cancelled(client: AsyncOpenAI, mark: StreamPosition) -> Any:
    """Return the call that ends an answer, as a context."""
    return client.responses.with_streaming_response.cancel(mark.response_id)


def tells_nothing(error: Exception, failure: NbcodexError, *, moved: bool) -> bool:
    """Whether a stream's end leaves open what became of the answer, so that it is to be fetched.

    A server may no longer have the events of an answer that it still has; one that was cancelled
    has a stream that merely ends; and an ``error`` event may be the stream's or the answer's.
    """
    if isinstance(error, FailedError) or refused(error):
        return True
    return not moved and isinstance(failure, TransportError | ServerError)


def refused(error: Exception) -> bool:
    """Whether the server does not know the answer, or not the call."""
    return getattr(error, "status_code", None) in _REFUSED
