"""Turns whatever goes wrong on the wire into exactly one of our errors.

Owns the verdict whether another attempt can help. Pure: it neither sends nor waits. Everything the
server says is hostile: read only so far, put on one short line, and cleaned of our secrets.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

from nbcodex.errors import (
    ConfigurationError,
    CredentialsError,
    LimitError,
    ModelError,
    NbcodexError,
    OverloadedError,
    QuotaError,
    RequestError,
    ServerError,
    TooLargeError,
    TransportError,
    shorten,
)
from nbcodex.models import Limit
from nbcodex.openai_api import messages
from nbcodex.openai_api.codes import (
    ADVICE,
    CREDENTIALS,
    LIMIT,
    MODEL,
    OVERLOADED,
    QUOTA,
    REQUEST,
    REQUEST_STARTS,
    TOO_LARGE,
    TOO_LARGE_WORDS,
)
from nbcodex.openai_api.complaints import Clean, ErrorInfo, heard, parsed
from nbcodex.openai_api.rate_limits import Headers, stated_wait

_DEEPEST = 16
_CERTIFICATES = "Name the file with your organisation's certificates in SSL_CERT_FILE."


class FailedError(Exception):
    """The stream says that the answer failed.

    Parameters
    ----------
    payload : object
        The event.
    final : bool
        Whether it says why; if not, the next event may.
    """

    def __init__(self, payload: object, *, final: bool = True) -> None:
        super().__init__()
        self.payload = payload
        self.final = final


def from_status(
    status: int, headers: Headers, body: bytes | str, *, wall: float, clean: Clean = str
) -> NbcodexError:
    """Return the error that an HTTP status other than 200 stands for.

    Parameters
    ----------
    status : int
        The HTTP status.
    headers : mapping
        Of the response.
    body : bytes or str
        Of the response, as it came.
    wall : float
        Seconds since the epoch, for waits that are given as a date.
    clean : callable
        Removes secrets from a text.
    """
    if 300 <= status < 400:
        return _redirected(status, clean(headers.get("location", "")))
    return _verdict(heard(parsed(body), clean, status=status), headers, wall)


def from_event(
    payload: object, headers: Headers, *, wall: float, clean: Clean = str
) -> NbcodexError:
    """Return the error that an event of a stream stands for: nested, flat, or a failed response.

    Parameters
    ----------
    payload : object
        The event's data, decoded.
    headers : mapping
        Of the response that the stream came with: Azure states the wait there.
    """
    return _verdict(heard(payload, clean), headers, wall)


def from_exception(
    error: BaseException, *, wall: float, headers: Headers | None = None, clean: Clean = str
) -> NbcodexError:
    """Return the error that an exception of the SDK, of HTTP or of decoding stands for."""
    import httpx2
    import openai

    match error:
        case NbcodexError():
            return error
        case openai.APIStatusError():
            response = error.response
            return from_status(
                response.status_code, response.headers, _content(response), wall=wall, clean=clean
            )
        case openai.APITimeoutError() | httpx2.TimeoutException() | TimeoutError():
            return _cut_off(error, "The server did not answer in time.")
        case openai.APIConnectionError() | httpx2.TransportError() | OSError():
            why = _why(error, clean)
            advice = _CERTIFICATES if "CERTIFICATE" in why else ""
            return _cut_off(error, f"The connection to the server failed{why}.", advice=advice)
        case openai.APIError():
            return from_event({"error": error.body}, headers or {}, wall=wall, clean=clean)
        case FailedError():
            return from_event(error.payload, headers or {}, wall=wall, clean=clean)
        case openai.OpenAIError():
            return ConfigurationError(
                f"The SDK cannot send the request{_why(error, clean)}.",
                advice="Look at the key, or at the client that Codex.client makes.",
            )
        case httpx2.HTTPError() | httpx2.StreamError():
            return broken(f"The answer could not be read{_why(error, clean)}.")
        case json.JSONDecodeError() | UnicodeError() | RecursionError() | ValueError():
            return nonsense("The server sent something that is no valid JSON.")
        case _:
            return nonsense(f"The answer makes no sense ({type(error).__name__}).")


def _cut_off(error: BaseException, message: str, *, advice: str = "") -> TransportError:
    """Return the error of a connection that failed; before there was one, nothing is paid."""
    failure = broken(message, advice=advice)
    failure.refused = _is_unconnected(error)
    failure.was_sent = not failure.refused
    return failure


def _is_unconnected(error: BaseException) -> bool:
    """Whether there was no connection yet, so that nothing can have been sent."""
    import httpx2

    unconnected = httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout
    return isinstance(error, unconnected) or isinstance(error.__cause__, unconnected)


def is_known(error: Exception) -> bool:
    """Whether an exception is the wire's own kind, not one of a user's token provider."""
    import httpx2
    import openai

    return isinstance(
        error, NbcodexError | openai.OpenAIError | httpx2.HTTPError | OSError | ValueError
    )


def broken(message: str, *, advice: str = "") -> TransportError:
    """Return the error of a connection that failed, broke or fell silent."""
    return TransportError(message, advice=advice or ADVICE[TransportError])


def nonsense(message: str) -> ServerError:
    """Return the error of an answer that makes no sense."""
    return ServerError(message, advice=ADVICE[ServerError])


def _verdict(told: ErrorInfo, headers: Headers, wall: float) -> NbcodexError:
    """Decide, the most particular first: what can never succeed must not be tried again."""
    names, status = told.names, told.status
    lower = told.message.lower()
    if names & QUOTA or status == 402:
        return _permanent(QuotaError, told, "The account has no credit left")
    limit = messages.limit(told.message, kind=told.kind)
    refused = status == 429 or bool(names & LIMIT)
    too_large = (status or 400) < 500 and any(word in lower for word in TOO_LARGE_WORDS)
    if too_large or names & TOO_LARGE or status == 413:
        return _too_large(told, limit)
    if refused and limit.limit and limit.requested and limit.requested > limit.limit:
        return _too_large(told, limit)
    if names & MODEL:
        return _permanent(ModelError, told, "The server knows no such model")
    wait = stated_wait(headers, wall=wall) or messages.stated_wait(told.message)
    if names & OVERLOADED or status in {503, 529}:
        message = _sentence("The server is overloaded", told)
        return OverloadedError(message, advice=ADVICE[OverloadedError], wait=wait)
    if refused:
        wait = wait or messages.reckoned_wait(limit)
        return LimitError(_refusal(told, limit), limit=limit, advice=ADVICE[LimitError], wait=wait)
    if status in {401, 403, 407} or names & CREDENTIALS:
        return _permanent(CredentialsError, told, "The server does not accept the key")
    if status == 404:
        return _permanent(ModelError, told, "The server knows no such model or address")
    if status in {408, 409, 425}:
        message = _sentence("The server asks to try again", told)
        return ServerError(message, advice=ADVICE[ServerError], wait=wait)
    if (status is not None and 400 <= status < 500) or _is_request(told):
        return _permanent(RequestError, told, "The server rejects the request")
    message = _sentence("The server failed", told)
    failure = ServerError(message, advice=ADVICE[ServerError], wait=wait)
    # Behind a gateway that gives up, the server may have made an answer for all that.
    failure.refused = status in {500, 501}
    return failure


def _is_request(told: ErrorInfo) -> bool:
    """Whether an error without a status is the request's own fault."""
    if told.status is not None:
        return False
    return bool(told.names & REQUEST) or any(
        name.startswith(REQUEST_STARTS) or name.endswith(("_policy", "policy_violation"))
        for name in told.names
    )


def _permanent(kind: type[Any], told: ErrorInfo, words: str) -> NbcodexError:
    error: NbcodexError = kind(_sentence(words, told), advice=ADVICE[kind])
    return error


def _too_large(told: ErrorInfo, limit: Limit) -> TooLargeError:
    words = "The request is too large"
    if limit.limit and limit.requested and limit.requested > limit.limit:
        over = limit.requested - limit.limit
        message = f"{words}: {over:,.0f} over the limit of {limit.limit:,.0f} {limit.name}."
    else:
        message = _sentence(words, told)
    known = limit if limit.limit is not None else None
    return TooLargeError(message, advice=ADVICE[TooLargeError], limit=known)


def _refusal(told: ErrorInfo, limit: Limit) -> str:
    """Say which limit was reached: in our words where its figures are known."""
    if limit.limit is None:
        return _sentence("The server's rate limit is reached", told)
    model = f" for {limit.model}" if limit.model else ""
    return f"{limit.name[0].upper()}{limit.name[1:]} reached{model}: {limit.figures}."


def _sentence(words: str, told: ErrorInfo) -> str:
    """Return our words, then the server's."""
    status = f" (HTTP {told.status})" if told.status is not None else ""
    said = "it sent a web page instead of an answer" if told.page else told.message
    said = said or told.code or told.kind
    stop = "" if said.endswith((".", "!", "?")) else "."
    return shorten(f"{words}{status}: {said}{stop}" if said else f"{words}{status}.")


def _redirected(status: int, location: str) -> RequestError:
    try:
        host = shorten(urlsplit(location).netloc.rpartition("@")[2], 100)
    except ValueError:
        host = ""
    return RequestError(
        f"The server redirects (HTTP {status}) to {host or 'another address'}; neither the key nor "
        "the prompt was sent there.",
        advice="If you trust that address, make it the base URL.",
    )


def _content(response: Any) -> bytes:
    """Return what was read of a response's body."""
    try:
        content = response.content
    except Exception:
        return b""
    return content if isinstance(content, bytes) else b""


def chain(error: BaseException) -> list[str]:
    """Return what an exception and its causes say, the deepest last."""
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(said) < _DEEPEST:
        said.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    return said


def _why(error: BaseException, clean: Clean) -> str:
    """Return the deepest reason of a connection error, in brackets."""
    words = shorten(clean(chain(error)[-1][:1000]), 160)
    return f" ({words})" if words else f" ({type(error).__name__})"
