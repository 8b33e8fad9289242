"""Where a request goes, and with which key: resolved afresh for each one, before anything is sent.

Owns the rule that a key goes only to the host that it was configured for. Opens no connection.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from nbcodex.errors import ConfigurationError, MissingKeyError
from nbcodex.models import Request
from nbcodex.openai_api.pricing import provider_of
from nbcodex.openai_api.redaction import worth_hiding
from nbcodex.settings import OPENAI_BASE_URL, Secret, Settings

Kind = Literal["openai", "azure", "compatible"]

NO_KEY = Secret("none")
"""What is sent to a host whose entry in the keys is empty: it needs none."""

_SALT = secrets.token_bytes(16)
_WAYS_OUT = (
    "`%codex login` takes one, or set OPENAI_API_KEY; `%codex demo` (`nbcodex demo`) needs none."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One server, as one account reaches it.

    Parameters
    ----------
    kind : {"openai", "azure", "compatible"}
        Whose server it is.
    base_url : str
        Without a slash at the end; on a classic Azure endpoint, the part before ``/openai``.
    host : str
        Name and, unless it is the scheme's own, port.
    scope : str
        Whose limits count there: organization and project, else a salted hash of the key; on
        Azure nothing, for there the limits belong to the resource.
    key : Secret or None
        The key; None on a custom client, which has its own.
    entra : bool
        Whether the key is an Entra ID token.
    api_version : str or None
        Only on a classic Azure endpoint.
    organization, project : str or None
        Only at OpenAI.
    """

    kind: Kind
    base_url: str
    host: str
    scope: str = ""
    key: Secret | None = None
    entra: bool = False
    api_version: str | None = None
    organization: str | None = None
    project: str | None = None


def resolve(settings: Settings, request: Request) -> Endpoint:
    """Return the endpoint that a request goes to.

    Raises
    ------
    MissingKeyError
        If no key is known for its host.
    ConfigurationError
        If a setting makes no sense, or the request contains a secret.
    """
    global _last
    check_texts(request, settings.secrets())
    # Of many requests with the same settings, each would be resolved several times.
    last_settings, last_base, endpoint = _last
    if settings is not last_settings or request.api_base != last_base or endpoint is None:
        endpoint = _resolved(settings, request.api_base)
        _last = (settings, request.api_base, endpoint)
    return endpoint


_last: tuple[Settings | None, str | None, Endpoint | None] = (None, None, None)


def _resolved(settings: Settings, api_base: str | None) -> Endpoint:
    own = _configured(settings)
    if api_base is None:
        endpoint = own
    else:
        url = parse_base_url(api_base, "The base URL of this request")
        if origin(url) == origin(urlsplit(own.base_url)):
            # The same server in another path, and the same account.
            endpoint = own if plain(url) == own.base_url else _beside(own, url)
        else:
            endpoint = _compatible(url, _entry(settings, url), settings)
    if endpoint.key is None:
        raise _missing(endpoint, own=api_base is None)
    check_key(endpoint.key.reveal(), endpoint.host)
    _refuse_cleartext(endpoint, settings)
    return endpoint


def is_azure(settings: Settings) -> bool:
    """Whether the settings choose Azure: its endpoint is set, and nothing of OpenAI's is."""
    return bool(settings.azure_endpoint) and not (settings.api_key or settings.base_url)


def configured_host(settings: Settings) -> str:
    """Return the host that requests go to unless they name another."""
    return _configured(settings).host


def _configured(settings: Settings) -> Endpoint:
    """Return the endpoint of the settings alone; its key is None where there is none."""
    if is_azure(settings):
        return _azure(settings)
    url = parse_base_url(settings.base_url or OPENAI_BASE_URL, "OPENAI_BASE_URL")
    key = _entry(settings, url) or settings.api_key
    entra = False
    if not key and provider_of(plain(url)) == "azure":
        entra = not settings.azure_key and bool(settings.azure_ad_token)
        key = settings.azure_key or settings.azure_ad_token
    endpoint = _compatible(url, key or None, settings)
    return replace(endpoint, entra=entra)


def _azure(settings: Settings) -> Endpoint:
    """Return the endpoint of an Azure resource: the classic API, or v1 where no version is set."""
    url = parse_base_url(settings.azure_endpoint or "", "AZURE_OPENAI_ENDPOINT")
    base, _, rest = url.path.partition("/openai")
    resource = f"{url.scheme}://{host(url)}{base.rstrip('/')}"
    version = None if rest.startswith("/v1") else settings.api_version
    entry = _entry(settings, url)
    key = entry or settings.azure_key or settings.azure_ad_token
    return Endpoint(
        kind="azure",
        base_url=resource if version else f"{resource}/openai/v1",
        host=host(url),
        key=key or None,
        entra=bool(key) and not entry and not settings.azure_key,
        api_version=version,
    )


def _compatible(url: SplitResult, key: Secret | None, settings: Settings) -> Endpoint:
    """Return the endpoint at a base URL, whoever stands behind it."""
    kind: Kind = provider_of(plain(url)) or "compatible"
    organization = settings.organization if kind == "openai" else None
    project = settings.project if kind == "openai" else None
    scope = "/".join(s for s in (organization, project) if s)
    if not scope and key and kind != "azure":
        scope = fingerprint(key.reveal())
    return Endpoint(
        kind=kind,
        base_url=plain(url),
        host=host(url),
        scope=scope,
        key=key,
        organization=organization,
        project=project,
    )


def bucket_id(endpoint: Endpoint, model: str, *, salt: bytes) -> str:
    """Return a name for the limits of a model and account; with a common salt, a common name."""
    key, account = endpoint.key, endpoint.scope
    if key and account == fingerprint(key.reveal()):
        account = fingerprint(key.reveal(), salt)  # the scope's own salt is of this process alone
    return fingerprint(f"{endpoint.base_url} {account} {model}", salt)


def _beside(own: Endpoint, url: SplitResult) -> Endpoint:
    return replace(own, base_url=plain(url), api_version=None)


def fingerprint(secret: str, salt: bytes = _SALT) -> str:
    """Return a name for a key that tells nothing of it: the hash is salted."""
    return hashlib.blake2b(secret.encode(), key=salt[:64], digest_size=8).hexdigest()


def _entry(settings: Settings, url: SplitResult) -> Secret | None:
    """Return the key that the user named for this host, with its port or without."""
    for name in (host(url), (url.hostname or "").lower()):
        if (key := settings.keys.get(name)) is not None:
            return key or NO_KEY
    return None


def _missing(endpoint: Endpoint, *, own: bool) -> MissingKeyError:
    if endpoint.kind == "openai":
        return MissingKeyError("No API key is set for OpenAI.", advice=_WAYS_OUT)
    if endpoint.kind == "azure":
        advice = "Set AZURE_OPENAI_API_KEY or AZURE_OPENAI_AD_TOKEN, or see `nbcodex demo`."
    elif own:
        advice = f"{_WAYS_OUT} A server that needs none takes OPENAI_API_KEY=none."
    else:
        advice = f"Your keys are for other hosts. Set Codex.keys = {{'{endpoint.host}': '…'}}."
    return MissingKeyError(f"No API key is set for {endpoint.host}.", advice=advice)


# Checks.


def check_key(key: str, where: str) -> None:
    """Raise a ConfigurationError if a key cannot be one; it is not shown."""
    if not key.isascii() or not key.isprintable() or any(c in key for c in " \"'"):
        raise ConfigurationError(
            f"The API key for {where} contains a space, a quote, a line break or a character that "
            "no key has.",
            advice="Copy it again, only the key itself.",
        )


def _refuse_cleartext(endpoint: Endpoint, settings: Settings) -> None:
    """Refuse http:// beyond this machine, unless the user named the host among the keys."""
    url = urlsplit(endpoint.base_url)
    if url.scheme == "http" and not is_loopback(url) and _entry(settings, url) is None:
        raise ConfigurationError(
            f"http://{endpoint.host} would carry the key and the prompt unencrypted.",
            advice=f"Use https://, or allow it with Codex.keys = {{'{endpoint.host}': '…'}}.",
        )


def check_texts(request: Request, held: Iterable[str]) -> None:
    """Raise a ConfigurationError if a request contains a secret that is held, or no real text."""
    held = worth_hiding(held)
    for name, text in _texts(request):
        if not _is_text(text):
            raise ConfigurationError(
                f"The {name} contains half a character (a lone surrogate).",
                advice="Read the text with its real encoding.",
            )
        if any(secret in text for secret in held):
            raise ConfigurationError(
                f"The {name} contains an API key; nothing was sent.",
                advice="Take it out. If a notebook holds the key, replace it at the provider.",
            )


def _is_text(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _texts(request: Request) -> Iterator[tuple[str, str]]:
    """Yield all strings of a request that would travel."""
    yield "prompt", request.prompt
    for name in ("system", "model", "effort", "api_base"):
        yield name, getattr(request, name) or ""
    for text in _strings(request.params, 0):
        yield "params", text
    if request.schema:
        for text in _strings(request.schema.definition, 0):
            yield "schema", text
    for turn in request.turns:
        yield "conversation", turn.prompt
        yield "conversation", turn.answer


def _strings(value: object, depth: int) -> Iterator[str]:
    if depth > 100:
        raise ConfigurationError("The params, or the schema, are nested too deeply.")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from _strings(inner, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner, depth + 1)


# Base URLs.

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]")
_MISTAKEN_ENDS = ("/responses", "/chat/completions", "/completions", "/models")
_ADVICE = "Write it like https://host.example/v1."


def parse_base_url(text: str, name: str) -> SplitResult:
    """Return a base URL in parts, or raise a ConfigurationError that says what is wrong with it."""
    fault = ""
    try:
        url = urlsplit(text.strip())
        port = url.port
        if url.scheme not in {"http", "https"}:
            fault = "does not begin with https://"
        elif "@" in url.netloc:
            # HTTP libraries turn it into credentials that replace the key.
            fault = "contains a user name or password"
        elif not _HOST.fullmatch(url.netloc.removesuffix(f":{port}")):
            fault = "names no host"
        elif url.query or url.fragment or not text.strip().isprintable() or " " in text.strip():
            fault = "contains more than a host and a path"
        elif url.path.rstrip("/").endswith(_MISTAKEN_ENDS):
            fault = "names one call of the API; leave out the end"
    except ValueError:
        fault = "is no URL"
    if fault:
        raise ConfigurationError(f"{name} {fault}.", advice=_ADVICE)
    return url


def is_loopback(url: SplitResult) -> bool:
    """Whether a URL leads to this machine only."""
    host = (url.hostname or "").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def plain(url: SplitResult) -> str:
    """Return a base URL without a slash at the end."""
    return f"{url.scheme}://{host(url)}{url.path.rstrip('/')}"


def host(url: SplitResult) -> str:
    """Return the host in lower case, with its port unless that is the scheme's own."""
    name = (url.hostname or "").lower()
    name = f"[{name}]" if ":" in name else name
    usual = 443 if url.scheme == "https" else 80
    return name if url.port in {None, usual} else f"{name}:{url.port}"


def origin(url: SplitResult) -> tuple[str, str]:
    """Return what tells one server from another: scheme, and host with port."""
    return url.scheme, host(url)
