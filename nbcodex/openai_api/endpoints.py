"""Decides where a request goes, and with which key, before anything is sent.

Owns the rule that a key goes only to the (network) host it was configured for. Opens no connection.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from nbcodex.errors import Advice, ConfigurationError, EntryError, MissingKeyError, join_advice
from nbcodex.models import Request
from nbcodex.openai_api.answers import effective_secrets
from nbcodex.openai_api.pricing import is_local_server, known_provider
from nbcodex.settings import OPENAI_BASE_URL, Secret, Settings

ServerKind = Literal["openai", "azure", "compatible"]

NO_KEY = Secret("none")  # sent to a host whose entry in Codex.keys is empty: it needs none

_PROCESS_SALT = secrets.token_bytes(16)
_NO_KEY_ADVICE = Advice(
    "Use `%codex login`, or set OPENAI_API_KEY. `%codex demo` (`nbcodex demo`) needs no key.",
    script="Set OPENAI_API_KEY. `nbcodex demo` needs no key.",
)
_OTHER_HOST_SCRIPT_ADVICE = (
    "Keys go only to their own host: set OPENAI_BASE_URL and OPENAI_API_KEY for this one."
)
_DEFAULT_PORTS = {"https": 443, "http": 80}

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]")
_CALL_PATHS = ("/responses", "/chat/completions", "/completions", "/models")  # of API calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server, and the account that requests to it use."""

    kind: ServerKind  # whose server it is: ``compatible`` is any that is not OpenAI's or Azure's
    # Without a slash at the end; on a classic Azure endpoint, the part before ``/openai``.
    base_url: str
    host: str  # name, and the port unless it is the scheme's default
    # The account that has the limits: organization and project, else a salted hash of the key;
    # empty on Azure, where the resource has them.
    account: str = ""
    key: Secret | None = None  # None on a custom client, which has its own
    has_entra_token: bool = False  # whether the key is an Entra ID token
    api_version: str | None = None  # only on a classic Azure endpoint
    organization: str | None = None  # only at OpenAI, as is the project
    project: str | None = None

    @property
    def server(self) -> str | None:
        """The server for which prompts are written: its host; None where that is not known yet."""
        # All ports of this machine are one server: a local one may come back on another port.
        return "localhost" if is_local_server(self.base_url) else self.host or None


def check_server(request: Request, endpoint: Endpoint, *, command: str = "resume") -> None:
    """Raise an EntryError if an endpoint is not at the server that an entry was written for."""
    written_for, server = request.origin.server, endpoint.server
    if written_for and server and server != written_for:
        id_ = request.id if command == "retry" else request.origin.map_id or request.id
        raise EntryError(
            f"{id_} was written for {written_for}, but requests go to {server} now. Not sent.",
            advice=f"Set the base URL back, or let {server} have the prompt: "
            f"`%codex {command} {id_} --new-server`.",
        )


def resolve(settings: Settings, request: Request) -> Endpoint:
    """Return the endpoint that a request goes to, or raise a ConfigurationError."""
    check_for_secrets(request, settings.secrets())
    endpoint = configured = _configured(settings)
    if request.api_base is not None:
        url = parse_base_url(request.api_base, "The base URL of this request")
        if _origin(url) != _origin(urlsplit(configured.base_url)):
            endpoint = _endpoint_at(url, key_for_host(settings, url), settings)
        elif url.geturl() != configured.base_url:
            # Another path on the same server: the same account and key.
            endpoint = replace(configured, base_url=url.geturl(), api_version=None)
    target = urlsplit(endpoint.base_url)
    # OpenAI and Azure always offer https: an http address is a mistake, or not theirs.
    always_secure = endpoint.kind != "compatible"
    is_allowed = not always_secure and key_for_host(settings, target) is not None
    if not (_is_secure(target) or is_allowed):
        entry = f"`%config Codex.keys = {{'{_name_in_keys(target)}': 'KEY'}}`"
        allow = f"Use https://, or allow it with {entry}"
        advice = Advice(f"{allow}.", script=f"{allow} in a notebook.")
        raise ConfigurationError(
            f"http://{endpoint.host} would carry the key and the prompt unencrypted.",
            advice="Use https://." if always_secure else advice,
        )
    if endpoint.key is None:
        is_default = not (request.api_base or settings.api_key)
        raise _missing_key(endpoint, settings, is_default=is_default)
    key = endpoint.key.reveal()
    # Typical of a key that was copied together with its quotes or a line break.
    if not key.isascii() or not key.isprintable() or any(c in key for c in " \"'"):
        raise ConfigurationError(
            f"The API key for {endpoint.host} contains a space, a quote, a line break or a "
            "character that no key has.",
            advice="Copy it again, only the key itself.",
        )
    return endpoint


def configured_host(settings: Settings) -> str:
    """Return the name in `Codex.keys` of the host that requests go to unless they name another."""
    return _name_in_keys(urlsplit(_configured(settings).base_url))


def _configured(settings: Settings) -> Endpoint:
    if settings.azure_endpoint and not (settings.api_key or settings.base_url):
        return _azure_endpoint(settings)
    url = parse_base_url(settings.base_url or OPENAI_BASE_URL, "OPENAI_BASE_URL")
    key = key_for_host(settings, url)
    if key is None and (settings.api_key == NO_KEY or _is_server_of_key(settings, url)):
        key = settings.api_key
    if not key and known_provider(url.geturl()) == "azure":
        # The key of an Azure resource goes only to that resource's own host. Without a resource,
        # the base URL is the only host that the user has named beside the key.
        named = settings.azure_endpoint or url.geturl()
        resource = parse_base_url(named, "AZURE_OPENAI_ENDPOINT")
        if _origin(url) == _origin(resource):
            key = settings.azure_key or settings.azure_ad_token
    return _endpoint_at(url, key or None, settings)


def _is_server_of_key(settings: Settings, url: SplitResult) -> bool:
    """Return whether `api_key` may be sent to a base URL; servers on this machine get it, too."""
    # `key_base_url` is empty only in settings that were not read from an environment.
    own = urlsplit(settings.key_base_url.lower() or url.geturl())
    is_openai = known_provider(url.geturl()) == known_provider(own.geturl()) == "openai"
    return is_openai or _origin(own) == _origin(url) or is_local_server(url.geturl())


def _azure_endpoint(settings: Settings) -> Endpoint:
    """Return the endpoint of an Azure resource: the classic API, or v1 where no version is set."""
    url = parse_base_url(settings.azure_endpoint or "", "AZURE_OPENAI_ENDPOINT")
    base, _, rest = url.path.partition("/openai")
    # AZURE_OPENAI_ENDPOINT is often copied with the path of either API.
    version = None if rest.startswith("/v1") else settings.api_version
    key = key_for_host(settings, url) or settings.azure_key or settings.azure_ad_token
    url = url._replace(path=base.rstrip("/") + ("" if version else "/openai/v1"))
    return replace(_endpoint_at(url, key or None, settings, "azure"), api_version=version)


def _endpoint_at(
    url: SplitResult, key: Secret | None, settings: Settings, kind: ServerKind | None = None
) -> Endpoint:
    kind = kind or known_provider(url.geturl()) or "compatible"
    # Other servers have no use for OpenAI's account names, and must not learn them.
    organization = settings.organization if kind == "openai" else None
    project = settings.project if kind == "openai" else None
    account = "/".join(s for s in (organization, project) if s)
    if not account and key and kind != "azure":
        account = fingerprint(key.reveal())
    return Endpoint(
        kind=kind,
        base_url=url.geturl(),
        host=url.netloc,
        account=account,
        key=key,
        has_entra_token=key is not None and key is settings.azure_ad_token,
        organization=organization,
        project=project,
    )


def limits_id(endpoint: Endpoint, model: str, *, salt: bytes) -> str:
    """Return an id of the limits of a model and account; `salt` is that of their shared store."""
    key, account = endpoint.key, endpoint.account
    if key and account == fingerprint(key.reveal()):
        # The hash in `account` uses the salt of this process, which other kernels do not have.
        account = fingerprint(key.reveal(), salt)
    return fingerprint(f"{endpoint.base_url} {account} {model}", salt)


def fingerprint(secret: str, salt: bytes = _PROCESS_SALT) -> str:
    """Return an id of a secret that reveals nothing of it: a salted hash."""
    return hashlib.blake2b(secret.encode(), key=salt[:64], digest_size=8).hexdigest()


def key_for_host(settings: Settings, url: SplitResult) -> Secret | None:
    """Return the key that `Codex.keys` has for a URL's host."""
    host = url.netloc.removesuffix(f":{url.port}")
    port = url.port or _DEFAULT_PORTS[url.scheme]
    names = [f"{host}:{port}", f"{host}:*"]
    if port == _DEFAULT_PORTS[url.scheme]:
        names.insert(0, host)
    entries = [f"{url.scheme}://{name}" for name in names]
    # Without a scheme an entry means https: anyone on the network path can read a key sent by http.
    if _is_secure(url):
        entries += names
    keys = (settings.keys.get(entry) for entry in entries)
    return next((key or NO_KEY for key in keys if key is not None), None)


def _name_in_keys(url: SplitResult) -> str:
    return url.netloc if _is_secure(url) else _origin(url)


def _missing_key(endpoint: Endpoint, settings: Settings, *, is_default: bool) -> MissingKeyError:
    if endpoint.kind == "openai":
        return MissingKeyError("No API key is set for OpenAI.", advice=_NO_KEY_ADVICE)
    if endpoint.kind == "azure":
        advice = "Set AZURE_OPENAI_API_KEY or AZURE_OPENAI_AD_TOKEN, or see `nbcodex demo`."
        if settings.azure_endpoint and (settings.azure_key or settings.azure_ad_token):
            advice = Advice(
                "The Azure key goes to the host of AZURE_OPENAI_ENDPOINT only: enter one for this "
                f"host with `%codex login {endpoint.host}`.",
                script=_OTHER_HOST_SCRIPT_ADVICE,
            )
    elif is_local_server(endpoint.base_url):
        entry = f'`%config Codex.keys = {{"{endpoint.host}": ""}}`'
        entry += ", or set OPENAI_API_KEY=none" * is_default
        script = "Set OPENAI_API_KEY, or OPENAI_API_KEY=none if it needs no key."
        advice = Advice(
            f"If it needs no key: {entry}. Otherwise type `%codex login {endpoint.host}`.",
            script=script if is_default else _OTHER_HOST_SCRIPT_ADVICE,
        )
    elif is_default:
        advice = join_advice(_NO_KEY_ADVICE, "For a server without keys, set OPENAI_API_KEY=none.")
    else:
        advice = Advice(
            f"Keys go only to their own host: enter one with `%codex login {endpoint.host}`, or "
            f"with `%config Codex.keys = {{'{endpoint.host}': 'KEY'}}`.",
            script=_OTHER_HOST_SCRIPT_ADVICE,
        )
    return MissingKeyError(f"No API key is set for {endpoint.host}.", advice=advice)


@lru_cache  # a map needs the same one several times per row
def parse_base_url(text: str, name: str) -> SplitResult:
    """Return a base URL in parts, or raise a ConfigurationError; `name` is for the error.

    The host is in lower case; the scheme's default port and slashes at the end are left out.
    """
    problem = ""
    try:
        url = urlsplit(text.strip())
        port = url.port
        if url.scheme not in {"http", "https"}:
            problem = "does not begin with https://"
        elif "@" in url.netloc:
            # HTTP libraries turn it into credentials that replace the key.
            problem = "contains a user name or password"
        elif not _HOST.fullmatch(url.netloc.removesuffix(f":{port}")):
            problem = "does not contain a host"
        elif url.query or url.fragment or not text.strip().isprintable() or " " in text.strip():
            problem = "contains more than a host and a path"
        elif url.path.rstrip("/").endswith(_CALL_PATHS):
            problem = "is the address of one API call; leave out its last part"
    except ValueError:
        problem = "is not a URL"
    if problem:
        raise ConfigurationError(
            f"{name} {problem}.", advice="Write it like https://host.example/v1."
        )
    netloc = url.netloc.lower().removesuffix(f":{_DEFAULT_PORTS[url.scheme]}")
    return url._replace(netloc=netloc, path=url.path.rstrip("/"))


def _is_secure(url: SplitResult) -> bool:
    return url.scheme == "https" or is_local_server(url.geturl())


def _origin(url: SplitResult) -> str:
    return f"{url.scheme}://{url.netloc}"


def check_for_secrets(request: Request, secrets: Iterable[str]) -> None:
    """Raise a ConfigurationError if a request contains a secret, or text that cannot be sent."""
    # This catches mistakes (a cell that prints the environment), not intent: an encoded key passes.
    # The fields are selected by type, so that a new option is checked, too.
    values = [(field.name, getattr(request, field.name)) for field in fields(request)]
    texts = [(name, value) for name, value in values if isinstance(value, str)]
    texts += [("conversation", t) for turn in request.turns for t in (turn.prompt, turn.answer)]
    try:
        params = json.dumps(dict(request.params), ensure_ascii=False, allow_nan=False)
        texts.append(("params", params))
        schema = dict(request.schema.definition) if request.schema else {}
        texts.append(("schema", _to_json(schema)))
    except (TypeError, ValueError, RecursionError):
        raise ConfigurationError(
            "The params, or the schema, are not valid JSON, or are nested too deeply.",
            advice="Use strings, numbers, true, false, null, lists and objects.",
        ) from None
    plain_secrets = effective_secrets(secrets)
    # JSON escapes a quote or a backslash in a secret.
    forms = {*plain_secrets, *(_to_json(secret)[1:-1] for secret in plain_secrets)}
    for name, text in texts:
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise ConfigurationError(
                f"The {name} contains half a character (a lone surrogate).",
                advice="Read the text with its real encoding.",
            )
        if any(form in text for form in forms):
            raise ConfigurationError(
                f"The {name} contains an API key; nothing was sent.",
                advice="Remove it. If a notebook contains the key, replace it at the provider.",
            )


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
