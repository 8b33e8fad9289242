"""Turns any failure of a request into exactly one of our errors. Pure.

Owns the decision whether another attempt can help. Everything in an error comes from a server: it
is cut, cleaned of our secrets and put on one printable line.
"""

from __future__ import annotations

import ast
import contextlib
import html
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urljoin, urlsplit

from nbcodex import errors
from nbcodex.errors import NbcodexError, ServerError, TooLargeError, TransportError, shorten
from nbcodex.models import DAY, Limit
from nbcodex.openai_api import dialects, rate_limits
from nbcodex.openai_api.rate_limits import MAX_SEARCHED_CHARS, Headers

CleanText = Callable[[str], str]  # removes secrets; `str` removes none

MAX_ERROR_BODY_CHARS = 1_000_000
_MAX_CAUSES = 16  # exceptions can be chained in a circle
_ADVICE: dict[type[NbcodexError], str] = {
    **{getattr(errors, name): advice for name, advice in dialects.ERROR_ADVICE.items()},
    errors.CredentialsError: errors.Advice(
        "`%codex login` sets another key; this key may lack access to the model.",
        script="OPENAI_API_KEY sets another key; this key may lack access to the model.",
    ),
}
MAX_PARALLEL_WAIT_S = 10.0  # a longer wait is not about a limit on parallel requests
_ADDRESS_ADVICE = "Check the base URL (--api-base, OPENAI_BASE_URL): most end in /v1."
_PROXY_ADVICE = "Have the proxy allow the server, or list the server in NO_PROXY."
_WEB_PAGE = "it sent a web page instead of an answer"
_NOT_AN_ADDRESS = "is not an address of an API"
# What a page says in its title, and what XML says.
_MARKUP_WORDS = re.compile(r"<(title|message)\b[^<>]{0,200}>([^<]{1,1000})", re.IGNORECASE)
# What follows the base URL in the address of a call.
_CALL = re.compile(r"(/chat/completions|/responses|/models|/files|/batches)?/*([?#].*)?$")


class AnswerFailedError(Exception):
    """The server states that the answer failed. If not `is_final`, reason or usage may follow."""

    def __init__(self, payload: object, *, is_final: bool = True) -> None:
        super().__init__()
        self.payload = payload
        self.is_final = is_final


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error as the server describes it, safe to show; what it does not state is empty."""

    status: int | None = None  # of HTTP, or that of the provider behind a gateway
    code: str = ""
    error_type: str = ""  # the error's `type`, or Google's `status`
    message: str = ""
    param: str = ""
    limit: Limit | None = None  # from structured details
    stated_wait: str = ""  # a duration, or the instant when it ends
    is_google: bool = False  # whether it has the form of Google's errors
    headers: Headers = field(default_factory=dict)  # of the provider behind a gateway

    def has_code(self, list_name: str) -> bool:
        """Return whether its code or type is in a list of `dialects`."""
        return dialects.has_code((self.code, self.error_type), list_name)

    def is_about(self, cause: str) -> bool:
        """Return whether its code, type or words are in the lists of a cause in `dialects`."""
        words = self.stated.lower()
        return self.has_code(f"{cause}_codes") or dialects.has_match(words, f"{cause}_patterns")

    def has_phrase(self, list_name: str) -> bool:
        """Return whether its message contains a phrase of a list of `dialects`."""
        return dialects.has_phrase(self.message.lower(), list_name)

    @property
    def stated(self) -> str:
        """What the server states; a message of one or two words ("Unauthorized") with its codes."""
        names = [n for n in (self.code, self.error_type) if n not in ("", str(self.status))]
        if names and 0 < len(self.message.split()) <= 2:
            return f"{self.message.rstrip('.')} ({', '.join(names)})"
        return self.message or self.code or self.error_type

    def sentence(self, words: str) -> str:
        """Return `words`, the status and what the server states, as one line."""
        status = f" (HTTP {self.status})" if self.status is not None else ""
        stated = self.stated
        if self.param and self.param not in stated:
            stated = f"{stated.rstrip('.')} (parameter {self.param!r})"
        stop = "" if stated.endswith((".", "!", "?", "\u3002")) else "."
        return shorten(f"{words}{status}: {stated}{stop}" if stated else f"{words}{status}.")


def from_status(
    status: int, headers: Headers, body: bytes | str, *, wall_time: float, clean: CleanText = str
) -> NbcodexError:
    """Return the error for an HTTP status other than 200; `wall_time` is Unix time."""
    if 300 <= status < 400:
        return _redirect_error(status, clean(headers.get("location", "")))
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else body
    # Some servers send a refusal as an event, because a stream was requested.
    if text.lstrip().startswith(("data:", "event:", "error:")):
        lines = (re.sub("^(data|error):", "", line).strip() for line in text.splitlines()[:20])
        text = next((line for line in lines if line.startswith(("{", "["))), text)
    return _classify(_describe(text, clean, status=status), headers, wall_time)


def from_exception(
    error: Exception, *, wall_time: float, headers: Headers | None = None, clean: CleanText = str
) -> NbcodexError:
    """Return the error for an exception of the SDK, of HTTP or of decoding."""
    import httpx2
    import openai

    # An error of our own in a hook of the HTTP library: the SDK wraps it.
    if isinstance(error.__cause__, NbcodexError) and isinstance(error, openai.APIConnectionError):
        return error.__cause__
    match error:
        case NbcodexError():
            return error
        case openai.APIStatusError():
            response = error.response
            if response.has_redirect_location:
                location = clean(response.headers["location"])
                return _redirect_error(response.status_code, location, str(response.url))
            status, body = response.status_code, response.content
            return from_status(status, response.headers, body, wall_time=wall_time, clean=clean)
        # Before APIConnectionError and OSError, of which these are subclasses.
        case openai.APITimeoutError() | httpx2.TimeoutException() | TimeoutError():
            return _disconnected(error, "The server did not answer in time.")
        case openai.APIConnectionError() | httpx2.TransportError() | OSError():
            reason = _reason(error, clean)
            message = f"The connection to the server failed{reason}."
            chain, advice = exception_chain(error), _setting_advice(reason)
            if proxy := next((e for e in chain if isinstance(e, httpx2.ProxyError)), None):
                message = f"The proxy (HTTPS_PROXY, ALL_PROXY) refused to connect{reason}."
                is_final = dialects.has_match(str(proxy).lower(), "proxy_refusal_patterns")
                advice = advice or (_PROXY_ADVICE if is_final else "")
            if advice:
                return errors.ConnectionSettingsError(message, advice=advice)
            if any(isinstance(e, httpx2.ConnectError) for e in chain):
                message += " Is the server running?"
            return _disconnected(error, message)
        case openai.APIError():  # of an SSE `error` event: it has neither status nor headers
            return _classify(_describe({"error": error.body}, clean), headers or {}, wall_time)
        case AnswerFailedError():
            return _classify(_describe(error.payload, clean), headers or {}, wall_time)
        case openai.OpenAIError():
            return errors.ConfigurationError(
                f"The SDK cannot send the request{_reason(error, clean)}.",
                advice="Check the key, or the client that Codex.client returns.",
            )
        case httpx2.HTTPError() | httpx2.StreamError():
            return broken_connection(f"The answer could not be read{_reason(error, clean)}.")
        case json.JSONDecodeError():
            payload = _parse(error.doc)
            if isinstance(payload, dict) or error.doc.lstrip().startswith("<"):
                return _classify(_describe(payload, clean), {}, wall_time)
            quote = shorten(clean(error.doc[:MAX_ERROR_BODY_CHARS]), 160)
            return invalid_answer(f"The server sent something that is not valid JSON: {quote}")
        case UnicodeError() | RecursionError() | ValueError():
            return invalid_answer("The server sent something that is not valid JSON.")
        case _:
            return invalid_answer(f"The answer cannot be understood ({type(error).__name__}).")


def is_api_exception(error: Exception) -> bool:
    """Whether an exception is of HTTP or the SDK, not of a user's token provider."""
    import httpx2
    import openai

    ours = NbcodexError | AnswerFailedError | RecursionError  # that of deeply nested JSON
    return isinstance(error, ours | openai.OpenAIError | httpx2.HTTPError | OSError | ValueError)


def explain_wrong_address(error: NbcodexError, base_url: str, path: str) -> None:
    """Name the address in an error about a wrong one, and advise one that is probably right."""
    if error.advice != _ADDRESS_ADVICE:
        return
    _, colon, detail = error.message.partition(": ")
    error.message = shorten(f"{base_url}{path} {_NOT_AN_ADDRESS}{colon}{detail or '.'}")
    error.args = (error.message,)
    if not urlsplit(base_url).path.strip("/"):
        error.advice = f"Set the base URL to {base_url}/v1."
    elif path == "/responses":
        error.advice = f"Use --api chat if the server lacks the Responses API. {error.advice}"


def is_wrong_address(error: NbcodexError) -> bool:
    """Whether `explain_wrong_address` found that an error is about a wrong address."""
    return _NOT_AN_ADDRESS in error.message


def failed_generation(error: Exception) -> str | None:
    """Return the answer in Groq's error ``json_validate_failed``, as a status or as an event."""
    details = _error_object(getattr(error, "payload", None) or getattr(error, "body", None))
    if isinstance(details, str) or details.get("code") != "json_validate_failed":
        return None
    generation = details.get("failed_generation")
    return generation if isinstance(generation, str) else None


def exception_chain(error: BaseException) -> list[BaseException]:
    """Return an exception and its causes, the deepest last."""
    chain = [error]
    while len(chain) < _MAX_CAUSES and (cause := chain[-1].__cause__ or chain[-1].__context__):
        chain.append(cause)
    return chain


def broken_connection(message: str) -> TransportError:
    """Return the error for a connection that failed, broke or went silent."""
    return TransportError(message, advice=_ADVICE[TransportError])


def invalid_answer(message: str) -> ServerError:
    """Return the error for an answer that does not follow the protocol."""
    return ServerError(message, advice=_ADVICE[ServerError])


def _describe(
    payload: object, clean: CleanText, *, status: int | None = None, max_depth: int = 4
) -> ErrorInfo:
    """Return what an error's payload states, in any of the shapes that servers use."""
    payload = _parse(payload) if isinstance(payload, str) else payload
    if isinstance(payload, list) and payload:  # Gemini
        payload = payload[0]
    details = payload if isinstance(payload, str) else _error_object(payload)
    if isinstance(details, str):
        message = _one_line(details, clean)
        if details.lstrip("\ufeff \t\r\n").startswith("<"):
            found = _MARKUP_WORDS.search(details[:MAX_ERROR_BODY_CHARS])
            words = _one_line(html.unescape(found[2]), clean) if found else ""
            is_xml = found and found[1].lower() == "message"
            message = words if is_xml else f"{_WEB_PAGE}: {words}".removesuffix(": ")
        return ErrorInfo(status=status, message=message)
    for name in ("detail", "details", "data", "result"):  # the first is Apigee's and FastAPI's
        nested = _parse(value) if isinstance(value := details.get(name), str) else value
        if isinstance(nested, dict):
            stated = _error_object(nested)
            details = {**({"message": stated} if isinstance(stated, str) else stated), **details}
    code = _one_line(_first_value(details, *dialects.WORDS["code_members"]), clean)[:100]
    error_type = _one_line(_first_value(details, *dialects.WORDS["type_members"]), clean)[:100]
    google_details = rate_limits.dicts_in(details.get("details"))
    if not code.strip("0123456789"):  # Google's `code` is the status; ErrorInfo has the reason
        reasons = (_one_line(each.get("reason"), clean)[:100] for each in google_details)
        code = next(filter(None, reasons), code)
    # Gateways write the upstream status into `code` (OpenRouter: a number, Azure: a string).
    figures = [int(text) for text in (code, error_type) if re.fullmatch("[1-5][0-9]{2}", text)]
    as_status = figures[0] if figures else None
    text = _first_value(details, *dialects.WORDS["message_members"])
    if status is not None and not (text or code or error_type):
        text = details  # in a form that no server is known for
    metadata = details.get("metadata")
    parts = rate_limits.dicts_in([*google_details, details, metadata, payload])
    waits = [_first_value(part, *dialects.WORDS["wait_members"]) for part in parts]
    info = ErrorInfo(
        status=as_status if status is None else status,
        code=code,
        error_type=error_type,
        message=_one_line(text, clean),
        # LiteLLM writes "None" for a parameter that it does not know.
        param=_one_line(details.get("param"), clean)[:100].removeprefix("None"),
        limit=rate_limits.limit_in_google_details(google_details),
        stated_wait=_one_line(next(filter(None, waits), None), clean)[:64],
        is_google=error_type.isupper() and isinstance(details.get("details"), list),
    )
    # A relay can put the provider's whole error into its message, as JSON or as Python shows it,
    # after its own words, or into any member.
    members = [value for name, value in details.items() if name != "metadata"][:20]
    for member in [text, *members] if max_depth else []:
        start = member.find("{") if isinstance(member, str) else 0
        payload = _parse(member[start:MAX_ERROR_BODY_CHARS]) if isinstance(member, str) else member
        if start < 0 or not isinstance(payload, dict) or payload is text:
            continue
        inner = _describe(payload, clean, max_depth=max_depth - 1)
        is_whole_error = member is text and (start == 0 or "error" in payload)
        if inner.message and (inner.status or is_whole_error):
            words = _one_line(text[:start] if member is text else text, clean)
            # A refusal of the relay's own key at the provider is not one of ours.
            is_ours = inner.status not in {None, 401, 403, 407}
            is_wrapped = is_ours and info.status in {400, 424, 500, 502, 503}
            return replace(
                inner,
                status=inner.status if is_wrapped or info.status is None else info.status,
                message=f"{words} {inner.message}".lstrip(),
                stated_wait=inner.stated_wait or info.stated_wait,
            )
    return _with_provider(info, metadata, clean) if isinstance(metadata, dict) else info


def _with_provider(info: ErrorInfo, metadata: dict[str, Any], clean: CleanText) -> ErrorInfo:
    """Return OpenRouter's error with the details of the provider behind it."""
    # ``headers`` are those of OpenRouter's own limits (Gitlawb/openclaude#936), ``raw`` is the
    # provider's body, as text or as JSON in text (cline/cline#813).
    headers = metadata.get("headers")
    if isinstance(headers, dict):
        lower = {str(n).lower(): _one_line(v, clean) for n, v in list(headers.items())[:50]}
        info = replace(info, headers=lower)
    inner = _describe(metadata.get("raw"), clean)
    if not (inner.message or inner.code):
        return info
    provider = _one_line(metadata.get("provider_name"), clean)[:60]
    is_temporary = inner.status == 429 or inner.has_phrase("temporary_phrases")
    is_temporary |= rate_limits.wait_in_message(inner.message) is not None
    return replace(
        inner,
        # OpenRouter sends HTTP 400 even if the provider is only busy.
        status=429 if info.status == 400 and is_temporary else info.status,
        message=f"{provider}: {inner.message}" if provider else inner.message,
        code=inner.code or info.code,
        headers=info.headers,
    )


def _parse(text: str) -> object:
    """Return what a JSON text contains, also as the bytes that Python shows; else the text."""
    with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        if text.lstrip()[:2] in ("b'", 'b"'):
            text = ast.literal_eval(text.strip()[:MAX_SEARCHED_CHARS]).decode("utf-8", "replace")
        if text.startswith("{'") and "'message':" in text:  # as Python shows it
            return ast.literal_eval(text[: text.rindex("}", 0, 20_000) + 1])
        if text.startswith("{"):  # words may follow
            return json.JSONDecoder().raw_decode(text)[0]
        if text.lstrip()[:1] in ("{", "[", '"'):
            return json.loads(text)
    return text


def _first_value(details: Mapping[str, Any], *names: str) -> object:
    """Return the first member that is not empty; ``errorCode`` is ``error_code``, too."""
    values = {name.lower().replace("_", ""): value for name, value in details.items() if value}
    return next((v for name in names if (v := values.get(name.lower().replace("_", "")))), None)


def _error_object(payload: object) -> Mapping[str, Any] | str:
    """Return the part that describes the error: the payload, its error or its response's error."""
    for _ in range(3):
        if not isinstance(payload, dict):
            break
        inner = _first_value(payload, *dialects.WORDS["error_members"])
        if isinstance(inner, list) and inner:
            inner = inner[0]
        if not isinstance(inner, dict | str) or not inner:
            return payload
        if isinstance(inner, str):  # the message (TGI, xAI), or "Bad Request" (FastAPI, Spring)
            has_message = _first_value(payload, *dialects.WORDS["message_members"])
            return payload if has_message else {**payload, "message": inner}
        payload = {"name": payload.get("name"), **inner}  # Cloudflare's is beside its error
    return payload if isinstance(payload, dict | str) else {}


def _one_line(value: object, clean: CleanText) -> str:
    """Return a value of any type on one line, cut before anything expensive is done."""
    if isinstance(value, dict):  # Mistral: {"detail": [...]}
        stated = _first_value(value, *dialects.WORDS["message_members"])
        # Of other forms, all that they state: {"messages": ["is required"]} (ASP.NET).
        value = stated or [{"loc": [n], "msg": v} for n, v in list(value.items())[:3] if v]
    if value is None or isinstance(value, dict | bool):
        return ""
    if isinstance(value, list):  # validation errors of FastAPI and pydantic (vLLM, Mistral)
        reasons = []
        for entry in value[:3]:
            members = entry if isinstance(entry, dict) else {"msg": entry}
            stated, loc = _first_value(members, "msg", "message"), members.get("loc")
            # Such as ["body", "temperature"].
            names = [str(n) for n in loc if n != "body"] if isinstance(loc, list) else []
            if isinstance(stated := stated[0] if isinstance(stated, list) else stated, str):
                reasons.append(": ".join([*filter(None, [".".join(names)]), stated]))
        value = "; ".join(reasons)
    if isinstance(value, int) and abs(value) > 2**63:
        return ""  # its digits alone could take minutes to compute
    # Cleaned before it is cut, because a cut through a secret would leave half of it.
    text = clean(str(value)[:MAX_ERROR_BODY_CHARS])
    return shorten(text[:MAX_SEARCHED_CHARS], MAX_SEARCHED_CHARS)


def _classify(info: ErrorInfo, headers: Headers, wall_time: float) -> NbcodexError:
    """Decide which error it is, the most specific first."""
    # The order matters: quota and size errors come as HTTP 429 with limit codes; no retry helps.
    status = info.status
    # A relay can answer HTTP 500 for a provider's 400; but words outrank a type (Mistral).
    is_wrapped = status in {500, 502} and info.has_code("wrapped_request_codes")
    is_wrapped &= not info.has_phrase("temporary_phrases")
    is_wrapped |= info.has_phrase("wrapped_request_phrases")
    is_wrapped |= headers.get("x-should-retry") == "false"  # OpenAI's SDK obeys it, too
    if status is not None and status >= 500 and is_wrapped:
        status = 400
    headers = {**headers, **info.headers} if info.headers else headers
    limit = info.limit or rate_limits.limit_in_message(info.message, error_type=info.error_type)
    worded_wait = rate_limits.wait_in_message(info.message, wall_time=wall_time)
    wait = (
        rate_limits.wait_in_headers(headers, wall_time=wall_time)
        or rate_limits.clamp_wait(rate_limits.parse_reset(info.stated_wait, wall_time))
        or worded_wait
    )
    has_quota_phrase = info.has_phrase("quota_phrases")
    is_limit_error = status == 429 or info.has_code("limit_codes") or has_quota_phrase
    is_exhausted = bool(limit.window and limit.limit and (limit.used or 0.0) >= limit.limit)
    if status in {None, 400, 403, 500, 502}:  # with these, relays pass a provider's 429 on
        is_limit_error |= is_exhausted or info.has_phrase("limit_phrases")
    # `quota_phrases` count with any status, `credit_phrases` not with that of a fault.
    # Limits per minute have the same words (Gemini) or codes (DashScope), but a wait that helps.
    is_quota = has_quota_phrase and not (wait or limit.limit)
    is_credit = (status or 400) < 500 and info.has_phrase("credit_phrases")
    is_per_minute = info.has_phrase("minute_limit_phrases") and not is_credit
    waiting_helps = status == 429 and (worded_wait or is_per_minute)
    is_quota |= info.has_code("quota_codes") and not info.has_phrase("overloaded_phrases")
    is_quota |= is_credit
    if status == 402 or (is_quota and not waiting_helps):
        return _quota_error(info, wall_time)
    excess = limit.requested - limit.limit if limit.limit and limit.requested else 0.0
    # A 5xx page can talk about a context window that has nothing to do with the request.
    is_described = (status or 400) < 500 or bool(info.code or info.error_type)
    is_too_large = status == 413 or (is_described and info.is_about("too_large"))
    if is_too_large or (is_limit_error and excess > 0):
        message = info.sentence("The request is too large")
        if excess > 0:
            over = f"{excess:,.0f} over the limit of {limit.limit:,.0f} {limit.name}"
            message = f"The request is too large: {over}."
        stated = limit if limit.limit is not None else None
        return TooLargeError(message, advice=_ADVICE[TooLargeError], limit=stated)
    if is_limit_error and limit.limit == 0:
        return errors.QuotaError(
            info.sentence("The plan does not include this model: its limit is 0"),
            advice="Choose another model (`%codex models`, `nbcodex doctor`), or another plan.",
        )
    for cause, (class_name, happened, advice) in dialects.REFUSALS.items():
        if info.is_about(cause) and worded_wait is None:
            refusal = _new_error(getattr(errors, class_name), info, happened)
            refusal.advice = advice or refusal.advice
            return refusal
    if info.has_code("growth_codes"):
        return _limit_error(info, Limit(resource="traffic growth"), wait, headers, wall_time)
    # Before limits: overload also arrives as 429, but no limit of this account is used up.
    is_overload = info.has_phrase("overloaded_phrases")
    if status is None or status == 429 or status >= 500:  # not a 400 such as "model_unavailable"
        is_overload |= info.has_code("overloaded_codes")
    if status in {498, 503, 529} or is_overload:  # 498 is Groq's, 529 Anthropic's
        return _new_error(errors.OverloadedError, info, "The server is overloaded", wait=wait)
    if is_limit_error:
        return _limit_error(info, limit, wait, headers, wall_time)
    return _classify_status(info, status, wait)


def _classify_status(info: ErrorInfo, status: int | None, wait: float | None) -> NbcodexError:
    """Decide which error it is if it is not about limits, credit or size."""
    if status == 403 and info.message.startswith(_WEB_PAGE):
        advice = "A firewall or a proxy refused it: check the network, the VPN and the base URL."
        return errors.RequestError(info.sentence("Refused on the way to the server"), advice=advice)
    advice = _setting_advice("407 proxy" if status == 407 else info.message)
    if (status or 400) < 500 and advice:
        words = "The address of the proxy or the server is wrong"
        return errors.ConnectionSettingsError(info.sentence(words), advice=advice)
    is_key_rejected = status in {None, 400, 403} and info.has_phrase("credentials_phrases")
    is_key_rejected |= status == 401 or info.has_code("credentials_codes")
    if is_key_rejected:
        return _new_error(errors.CredentialsError, info, "The server does not accept the key")
    if status == 403:
        advice = "The key may lack access, or a firewall or a provider's rule refused it."
        return errors.CredentialsError(info.sentence("Access is refused"), advice=advice)
    if status == 404 and info.has_phrase("unknown_param_phrases"):
        status = 400
    passes = replace(info, error_type="").is_about("passing")  # a code outranks a generic type
    # The SDK retries 408 and 409, too; 425 is "Too Early" (RFC 8470).
    if status in {408, 409, 425} or (passes and (status or 400) < 500):
        return _new_error(ServerError, info, "The server cannot answer for now", wait=wait)
    # If the message does not name the model, a 404 usually means a wrong base URL.
    names_model = info.code.strip("0123456789") or "model" in info.message.lower()
    is_page = (status or 400) < 500 and info.message.startswith(_WEB_PAGE)
    has_no_such_call = is_page or info.has_phrase("no_such_call_phrases")
    if has_no_such_call or (status in {404, 405} and not names_model):
        words = "The server does not have this address"
        return errors.ModelError(info.sentence(words), advice=_ADDRESS_ADVICE)
    if status == 404:
        return _new_error(errors.ModelError, info, "The server does not have this model or address")
    if info.is_about("request") if status is None else 400 <= status < 500:
        return _new_error(errors.RequestError, info, "The server rejects the request")
    failure = _new_error(ServerError, info, "The server failed", wait=wait)
    # After 502 to 504 of a gateway that gave up, the server may still have made a paid answer.
    failure.is_unbilled = status in {500, 501}
    return failure


def _setting_advice(words: str) -> str:
    """Return what to change in the connection's settings, if that is what words are about."""
    return next((a for phrase, a in dialects.SETTING_ADVICE.items() if phrase in words.lower()), "")


def _new_error(error_class: type[Any], info: ErrorInfo, words: str, **details: Any) -> NbcodexError:
    error: NbcodexError = error_class(info.sentence(words), advice=_ADVICE[error_class], **details)
    return error


def _limit_error(
    info: ErrorInfo, limit: Limit, wait: float | None, headers: Headers, wall_time: float
) -> errors.LimitError:
    """Return the error of a rate limit, with figures from the headers that the body lacks."""
    if info.has_code("parallel_codes") and limit.resource is None:
        limit = replace(limit, resource="parallel requests")
    is_per_window = limit.resource not in {"parallel requests", "traffic growth"}
    limits = rate_limits.header_limits(headers, wall_time=wall_time) if is_per_window else []
    noun = limit.resource or ""  # "input-images" are images
    used_up = [
        e for e in limits if e.is_exhausted and (not noun or noun.endswith(e.resource or ""))
    ]
    exhausted = max(used_up, key=lambda each: each.reset_in or 0.0, default=None)
    if exhausted and limit.limit is None:
        bound, remaining = exhausted.limit, exhausted.remaining
        limit = replace(
            limit,
            resource=limit.resource or exhausted.resource,
            window=limit.window or exhausted.window,
            limit=bound,
            used=None if bound is None or remaining is None else max(0.0, bound - remaining),
        )
    reset_in = exhausted.reset_in if exhausted else None
    wait = wait or rate_limits.computed_wait(limit) or rate_limits.clamp_wait(reset_in)
    if wait is None and limit.window and limit.window >= DAY:
        # Nothing says when the window ends: a day's limit is tried again each hour.
        wait = rate_limits.clamp_wait(limit.window / 24)
    if info.is_google and limit.window == DAY:
        wait = max(wait or 0.0, rate_limits.seconds_to_pacific_midnight(wall_time))
    if limit.resource == "parallel requests" and (wait or 0.0) > MAX_PARALLEL_WAIT_S:
        # LiteLLM states the end of its other limits' minute; a slot is free when any request ends.
        wait = None
    message = info.sentence("The server's rate limit is reached")
    if limit.resource == "traffic growth":
        message = info.sentence("Traffic to the server has grown too fast")
    if limit.limit is not None:
        model = f" for {limit.model}" if limit.model else ""
        message = f"{limit.name[0].upper()}{limit.name[1:]} reached{model}: {limit.figures}."
    advice = dialects.LIMIT_ADVICE.get(limit.resource or "", _ADVICE[errors.LimitError])
    return errors.LimitError(message, limit=limit, advice=advice, wait=wait)


def _quota_error(info: ErrorInfo, wall_time: float) -> NbcodexError:
    """Return the error for missing credit, or for a spend limit, which resets each month."""
    stated = f"{info.code} {info.error_type} {info.message}".lower()
    texts = (text for pattern, text in dialects.QUOTA_TEXTS.items() if re.search(pattern, stated))
    words, advice = next(texts, ("", ""))
    if not words:
        return _new_error(errors.QuotaError, info, "The account has no credit left")
    next_month = datetime.fromtimestamp(wall_time, UTC).replace(day=1) + timedelta(days=31)
    advice = advice.format(reset=f"1 {next_month:%B} (UTC)")
    return errors.QuotaError(info.sentence(words), advice=advice)


def _redirect_error(status: int, location: str, url: str = "") -> NbcodexError:
    """Return the error for a redirect to `location` from `url`, which was called."""
    with contextlib.suppress(ValueError):
        location = urljoin(url, location)
    target, called = (_CALL.sub("", re.sub("//[^/]*@", "//", a[:500]), 1) for a in (location, url))
    address = shorten(target, 100) if "://" in target else "another address"
    advice = f"If you trust that address, make it the base URL: {address}"
    if target == called:
        advice = "Only a slash at the end differs: let the server or gateway accept both forms."
    words = f"The server redirects (HTTP {status}) to {address}"
    words += "; neither the key nor the prompt was sent there."
    return errors.RequestError(words, advice=advice)


def _disconnected(error: BaseException, message: str) -> TransportError:
    """Return the error for a failed connection; a request without a connection costs nothing."""
    import httpx2

    unconnected = httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout
    failure = broken_connection(message)
    failure.is_unbilled = isinstance(error, unconnected) or isinstance(error.__cause__, unconnected)
    return failure


def _reason(error: BaseException, clean: CleanText) -> str:
    """Return the deepest reason of a connection error, in brackets."""
    words = shorten(clean(str(exception_chain(error)[-1])[:1000]), 160)
    return f" ({words})" if words else f" ({type(error).__name__})"
