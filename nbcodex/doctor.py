"""Checks the settings in force and reports where each comes from, without showing a secret."""

from __future__ import annotations

import os
import sqlite3
import ssl
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from nbcodex.client import Client
from nbcodex.errors import ModelError, NbcodexError, TransportError
from nbcodex.models import Request
from nbcodex.openai_api.api_errors import is_wrong_address
from nbcodex.openai_api.connections import proxies, proxy_problem
from nbcodex.openai_api.endpoints import Endpoint, key_for_host
from nbcodex.runtime import event_loop
from nbcodex.runtime.clock import format_duration
from nbcodex.runtime.sqlite_files import UnsafePathError, check_owner, is_on_network
from nbcodex.settings import DEFAULT_MODEL, JOURNAL_FILENAME, Settings, data_folder

# Variables of other HTTP clients, requests and curl, which httpx2 does not read.
_UNUSED_CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
MODEL_LIST_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    title: str  # what was checked
    text: str  # what was found
    advice: str = ""  # what to do about it
    is_problem: bool = False  # whether requests fail, or lose a feature, because of it
    is_known: bool = True  # False: it will be known after the first request

    def __str__(self) -> str:
        mark = "✗" if self.is_problem else "✓" if self.is_known else "·"
        line = f"{self.title:<10} {mark} {self.text}"
        return f"{line}\n{'':<13}→ {self.advice}" if self.advice else line


def report(settings: Settings, client: Client) -> Iterator[Finding]:
    """Yield the findings on the settings, and on environment variables that httpx2 reads."""
    endpoint = None
    try:
        any_request = Request(prompt="?")  # without a server of its own
        endpoint = client.services().api_client.endpoint(any_request, settings)
    except NbcodexError as error:
        yield Finding("server", error.message, error.advice, is_problem=True)
    else:
        # A custom client that an async factory makes is known only then.
        where = endpoint.base_url or "at an address that is known after the first request"
        yield Finding("server", f"{endpoint.kind}, {where}")  # such as "azure, https://…"
        yield Finding("key", _key_source(settings, endpoint))
    yield from check_proxies(os.environ)
    yield from check_authorities(os.environ)
    if endpoint is not None:
        yield from _check_server(settings, client, endpoint)
    patience, idle_timeout = format_duration(settings.patience), settings.idle_timeout
    yield Finding("patience", f"{patience}; idle timeout: {idle_timeout:g} s")
    yield from check_journal(settings)


def check_proxies(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Check the proxies in the environment."""
    found = proxies(environ)
    for name, value in found:
        if problem := proxy_problem(value):
            yield Finding("proxy", f"{name} {problem[0]}", problem[1], is_problem=True)
        else:
            url = urlsplit(value if "://" in value else f"http://{value}")
            yield Finding("proxy", f"{name}: {url.hostname}:{url.port or 80}")
    if not found:
        yield Finding("proxy", "none set")


def check_authorities(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Check the certificate authorities in the environment."""
    problems: dict[str, str] = {}  # by the variable; empty if it is right
    if file := environ.get("SSL_CERT_FILE"):
        problem = ""
        try:
            ssl.create_default_context(cafile=file)
        except FileNotFoundError:
            problem = " does not exist."
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            problem = f" contains no certificates ({type(error).__name__})."
        problems[f"SSL_CERT_FILE: {file}"] = problem
    if folder := environ.get("SSL_CERT_DIR"):
        problems[f"SSL_CERT_DIR: {folder}"] = "" if Path(folder).is_dir() else " is not a folder."
    for variable, problem in problems.items():
        advice = "Correct it, or unset it." if problem else ""
        yield Finding("CA", variable + problem, advice, is_problem=bool(problem))
    unused = [name for name in _UNUSED_CA_VARIABLES if environ.get(name)]
    if not problems and unused:
        yield Finding("CA", f"{unused[0]} is set but not used.", "Set SSL_CERT_FILE to the same.")
    elif not problems:
        yield Finding("CA", "the default ones")


def check_journal(settings: Settings) -> Iterator[Finding]:
    """Check the folder of the journal without creating anything."""
    if not settings.journal:
        yield Finding("journal", "off: prompts and answers are kept in memory only")
        return
    folder = data_folder(settings)
    if problem := _folder_problem(folder):
        advice = "Set NBCODEX_HOME to another folder. Prompts work, but are kept in memory only."
        yield Finding("journal", problem, advice, is_problem=True)
    elif is_on_network(folder):
        advice = "Set NBCODEX_HOME to a local folder; two machines must not use this one at once."
        yield Finding("journal", f"{folder}, on a network file system", advice)
    else:
        yield Finding("journal", f"{folder}")


def _folder_problem(folder: Path) -> str:
    """Return why a folder cannot hold the journal; an empty text if it can."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            return f"{existing} is not a folder."
        if not os.access(existing, os.W_OK | os.X_OK):
            return f"{existing} is not writable."
        if existing == folder:
            check_owner(folder, folder.stat(), kind="folder")
        path = folder / JOURNAL_FILENAME
        if path.exists():
            # Read-only, because a kernel may be writing to the file.
            uri = f"{path.absolute().as_uri()}?mode=ro"
            with closing(sqlite3.connect(uri, uri=True, timeout=1.0)) as database:
                database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except UnsafePathError as error:
        return str(error)
    except (OSError, sqlite3.Error, ValueError) as error:
        return f"{folder} cannot be used ({type(error).__name__})."
    return ""


def _key_source(settings: Settings, endpoint: Endpoint) -> str:
    """Return where the key comes from, but never the key itself."""
    if settings.client is not None:
        return "from Codex.client"
    keys = {
        "Codex.keys, or `%codex login`": key_for_host(settings, urlsplit(endpoint.base_url)),
        "AZURE_OPENAI_API_KEY": settings.azure_key if endpoint.kind == "azure" else None,
        "AZURE_OPENAI_AD_TOKEN": settings.azure_ad_token if endpoint.kind == "azure" else None,
        "OPENAI_API_KEY": settings.api_key,
    }
    source = next(name for name, key in keys.items() if key and key == endpoint.key)
    text = f"{source}, for {endpoint.host} (not shown)"
    if settings.azure_endpoint and endpoint.kind != "azure":
        other = "OPENAI_BASE_URL" if settings.base_url else "OPENAI_API_KEY"
        text += f"; AZURE_OPENAI_ENDPOINT is not used because {other} is set"
    return text


def _check_server(settings: Settings, client: Client, endpoint: Endpoint) -> Iterator[Finding]:
    """Check the key, the configured model, the API and the limits."""
    # The only request of the doctor lists the models, which costs nothing.
    timeout_s = min(settings.idle_timeout, MODEL_LIST_TIMEOUT_S)
    api_client = client.services().api_client
    try:
        names = event_loop.run(api_client.list_models(replace(settings, idle_timeout=timeout_s)))
    except NbcodexError as error:
        if isinstance(error, ModelError) and not is_wrong_address(error):
            # A server without a list of models may still answer prompts.
            text = "the server has no list of models (404)"
            yield Finding("connection", text, "Name one with -m.")
        else:
            advice = error.advice or "Try again later."
            if isinstance(error, TransportError):
                advice = "Check the address, the proxy and the CA above."
            yield Finding("connection", error.message, advice, is_problem=True)
    else:
        models = "1 model" if len(names) == 1 else f"{len(names)} models"
        yield Finding("connection", f"{endpoint.host or 'the server'} lists {models}")
        yield _check_model(settings, endpoint, names)
    detected_apis = api_client.capabilities.detected_apis
    api = "responses" if endpoint.kind == "openai" else detected_apis.get(endpoint.base_url)
    text = (api or "") if settings.api == "auto" else f"{settings.api}, as set"
    yield Finding("API", text or "detected with the first request", is_known=bool(text))
    by_label = event_loop.run(client.limits(settings))
    # A label is `MODEL at BASE_URL`; the limits of other servers are left out.
    server = f" at {endpoint.base_url}"
    limits = [state for label, state in by_label.items() if label.endswith(server)]
    # A list of models may state limits before any request was sent.
    if not any(state.was_used or state.has_limit_headers for state in limits):
        yield Finding("limits", "unknown until the first request", is_known=False)
        return
    declared = any(state.has_limit_headers for state in limits)
    # How answers are charged is known as soon as enough of them have ended.
    policies = {each.policy for each in limits if each.output_share is not None}
    charging = f"charged: {', '.join(sorted(policies))}" if policies else "charging not known yet"
    headers = "stated by x-ratelimit headers" if declared else "not stated by headers"
    yield Finding("limits", f"{headers}; {charging}; details: `%codex limits`")


def _check_model(settings: Settings, endpoint: Endpoint, names: list[str]) -> Finding:
    name = settings.model or (DEFAULT_MODEL if endpoint.kind == "openai" else None)
    model = settings.aliases.get(name, name) if name else None
    examples = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    if model is None and len(names) == 1:
        return Finding("model", f"{names[0]}, the only one")
    if model is None:
        advice = f"Set NBCODEX_MODEL to one of {examples}"
        return Finding("model", "none is set.", advice, is_problem=True)
    # Azure lists the models of a resource, but a request names one of its deployments.
    if model in names or endpoint.kind == "azure":
        return Finding("model", model)
    advice = f"`%codex models` lists the models: {examples}"
    return Finding("model", f"{model} is not in the server's list.", advice, is_problem=True)
