"""What is set, where it came from, and what to do about what does not fit. Never shows a secret.

Knows no notebook: what only a notebook can tell is found out in `notebook.checkup`.
"""

from __future__ import annotations

import os
import sqlite3
import ssl
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from nbcodex.errors import (
    ConfigurationError,
    CredentialsError,
    ModelError,
    NbcodexError,
    TransportError,
)
from nbcodex.models import Request
from nbcodex.runtime import event_loop
from nbcodex.runtime.clock import format_duration
from nbcodex.settings import DEFAULT_MODEL, JOURNAL_FILENAME, Settings, data_folder

if TYPE_CHECKING:
    from nbcodex.client import Client
    from nbcodex.openai_api.endpoints import Endpoint

_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_OTHER_AUTHORITIES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_SCHEMES = {"http", "https", "socks5", "socks5h"}

LONGEST = 15.0
"""Seconds that the server is given to answer."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Parameters
    ----------
    title : str
        What.
    text : str
        How it is.
    advice : str
        What to do about it.
    wrong : bool
        Whether requests suffer from it.
    """

    title: str
    text: str
    advice: str = ""
    wrong: bool = False

    def __str__(self) -> str:
        line = f"{self.title:<10} {'✗' if self.wrong else '✓'} {self.text}"
        return f"{line}\n{'':<13}→ {self.advice}" if self.advice else line


def report(
    settings: Settings, client: Client, environ: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """Yield the findings; the server is asked once, for its models, which costs nothing.

    Parameters
    ----------
    settings : Settings
        The settings in force.
    client : Client
        What asks, and what it has learnt.
    environ : mapping
        The environment, for what the HTTP library reads by itself.
    """
    endpoint = None
    try:
        endpoint = client.services().api_client.endpoint(Request(prompt="?"), settings)
    except NbcodexError as error:
        yield Finding("server", error.message, error.advice, wrong=True)
    else:
        where = endpoint.base_url or "known when Codex.client has been awaited"
        yield Finding("server", f"{endpoint.kind}, {where}")
        yield Finding("key", _key(settings, endpoint))
    yield from proxies(environ)
    yield from authorities(environ)
    if endpoint is not None:
        yield from _served(settings, client, endpoint)
    yield Finding(
        "patience", f"{format_duration(settings.patience)}; silence: {settings.idle_timeout:g} s"
    )
    yield from journal(settings)


def proxies(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yield what is to be said of the proxies that the environment names."""
    found = [(n, v) for n in _PROXIES if (v := environ.get(n) or environ.get(n.lower()))]
    for name, value in found:
        try:
            url = urlsplit(value if "://" in value else f"http://{value}")
            host, good = f"{url.hostname}:{url.port or 80}", url.scheme in _SCHEMES
        except ValueError:
            host, good = "", False
        if good and url.hostname:
            yield Finding("proxy", f"{name}: {host}")
        else:
            yield Finding("proxy", f"{name} is no address.", "Write http://HOST:PORT.", wrong=True)
    if not found:
        yield Finding("proxy", "none set")


def authorities(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yield what is to be said of the certificate authorities that the environment names."""
    file, folder = environ.get("SSL_CERT_FILE"), environ.get("SSL_CERT_DIR")
    if file:
        yield _bundle(file)
    if folder:
        good = Path(folder).is_dir()
        text = f"SSL_CERT_DIR: {folder}" if good else f"SSL_CERT_DIR: {folder} is no folder."
        yield Finding("CA", text, "" if good else "Mend it, or unset it.", wrong=not good)
    others = [name for name in _OTHER_AUTHORITIES if environ.get(name)]
    if others and not (file or folder):
        yield Finding("CA", f"{others[0]} is set, and not read.", "Set SSL_CERT_FILE to the same.")
    elif not (file or folder):
        yield Finding("CA", "the usual ones")


def _bundle(file: str) -> Finding:
    try:
        ssl.create_default_context(cafile=file)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        missing = isinstance(error, FileNotFoundError)
        why = "is not there." if missing else f"holds no certificates ({type(error).__name__})."
        return Finding("CA", f"SSL_CERT_FILE: {file} {why}", "Mend it, or unset it.", wrong=True)
    return Finding("CA", f"SSL_CERT_FILE: {file}")


def journal(settings: Settings) -> Iterator[Finding]:
    """Yield what is to be said of the folder that keeps prompts and answers; nothing is made."""
    from nbcodex.runtime.paths import on_network

    if not settings.journal:
        yield Finding("journal", "off: prompts and answers are kept in memory only")
        return
    folder = data_folder(settings)
    trouble = _trouble(folder)
    if trouble:
        advice = "Name another folder in NBCODEX_HOME. Prompts work, but are kept in memory only."
        yield Finding("journal", trouble, advice, wrong=True)
    elif on_network(folder):
        advice = "A local folder in NBCODEX_HOME is faster and safer; not two hosts at once here."
        yield Finding("journal", f"{folder}, on a network file system", advice)
    else:
        yield Finding("journal", f"{folder}")


def _trouble(folder: Path) -> str:
    """Return why a folder cannot keep the journal; nothing where it can."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            return f"{there} is no folder."
        if not os.access(there, os.W_OK | os.X_OK):
            return f"{there} cannot be written."
        if there == folder and hasattr(os, "geteuid"):
            found = folder.stat()
            if found.st_uid != os.geteuid():
                return f"{folder} belongs to another user."
            if found.st_mode & 0o022:
                return f"Others can write to {folder}: chmod 700 would mend that."
        path = folder / JOURNAL_FILENAME
        if path.exists():
            uri = f"{path.absolute().as_uri()}?mode=ro"
            with closing(sqlite3.connect(uri, uri=True, timeout=1.0)) as database:
                database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except (OSError, sqlite3.Error, ValueError) as error:
        return f"{folder} cannot be used ({type(error).__name__})."
    return ""


def _key(settings: Settings, endpoint: Endpoint) -> str:
    """Return where the key comes from, never the key."""
    if settings.client is not None:
        return "that of Codex.client"
    named = {
        "Codex.keys, or `%codex login`": settings.keys.get(endpoint.host),
        "AZURE_OPENAI_API_KEY": settings.azure_key if endpoint.kind == "azure" else None,
        "AZURE_OPENAI_AD_TOKEN": settings.azure_ad_token if endpoint.kind == "azure" else None,
        "OPENAI_API_KEY": settings.api_key,
    }
    won = next((n for n, key in named.items() if key and key == endpoint.key), "Codex.keys")
    both = settings.azure_endpoint and endpoint.kind != "azure"
    over = "; AZURE_OPENAI_ENDPOINT is not used, for OPENAI_… is set" if both else ""
    return f"{won}, for {endpoint.host} (not shown){over}"


def _served(settings: Settings, client: Client, endpoint: Endpoint) -> Iterator[Finding]:
    """Ask the server for its models, and yield what that tells."""
    quick = replace(settings, idle_timeout=min(settings.idle_timeout, LONGEST))
    try:
        names = event_loop.shared().submit(client.models(quick)).result()
    except NbcodexError as error:
        yield _unserved(error, endpoint)
    else:
        yield Finding("reached", f"{endpoint.host or 'the server'} names {len(names)} models")
        yield _model(settings, endpoint, names)
    api_client = client.services().api_client
    spoken = "responses" if endpoint.kind == "openai" else api_client.detected_api(endpoint)
    told = spoken or "found out by the first request"
    yield Finding("API", told if settings.api == "auto" else f"{settings.api}, as set")
    yield from _learnt(settings, client, endpoint)


def _unserved(error: NbcodexError, endpoint: Endpoint) -> Finding:
    match error:
        case CredentialsError():
            advice = f"The key is known, but not accepted by {endpoint.host}: is it this host's?"
        case ModelError():
            # A server without a list of models may answer prompts all the same.
            return Finding("reached", "it has no list of models (404)", "Name one with -m.")
        case TransportError():
            advice = "Look at the address, the proxy and the CA above."
        case ConfigurationError():
            advice = error.advice
        case _:
            advice = error.advice or "Try again later."
    return Finding("reached", error.message, advice, wrong=True)


def _model(settings: Settings, endpoint: Endpoint, names: list[str]) -> Finding:
    named = settings.model or (DEFAULT_MODEL if endpoint.kind == "openai" else None)
    model = settings.aliases.get(named, named) if named else None
    some = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    if model is None and len(names) == 1:
        return Finding("model", f"{names[0]}, its only one")
    if model is None:
        return Finding("model", "none is set.", f"Set NBCODEX_MODEL to one of {some}", wrong=True)
    if model in names or endpoint.kind == "azure":
        return Finding("model", model)
    advice = f"%codex models lists what there is: {some}"
    return Finding("model", f"{model} is not among the server's.", advice, wrong=True)


def _learnt(settings: Settings, client: Client, endpoint: Endpoint) -> Iterator[Finding]:
    """Yield what answers have told about limits, and what is believed to be charged."""
    known = event_loop.shared().submit(client.limits(settings)).result()
    mine = [each for label, each in known.items() if label.endswith(f" at {endpoint.base_url}")]
    if not mine:
        yield Finding("limits", "nothing asked yet")
        return
    told = any(each.declared for each in mine)
    charged = {each.policy for each in mine if each.history}
    policy = (
        f"charged: {', '.join(sorted(charged))}" if charged else "what is charged is not learnt"
    )
    headers = "told by x-ratelimit headers" if told else "no headers tell them"
    yield Finding("limits", f"{headers}; {policy}; `%codex limits` tells more")
