"""Makes and keeps the SDK's clients; no other module makes one.

The clients never retry: with ``Retry-After: 90`` the SDK would block for 180 s in silence, and it
never retries a stream that has begun. They follow no redirect: the prompt must not go to a server
that the user did not configure. The SDK takes 0.7 s to import, so it is imported at the first use.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nbcodex.errors import ConfigurationError, ConnectionSettingsError, ServerError, shorten
from nbcodex.openai_api.endpoints import Endpoint, ServerKind, fingerprint
from nbcodex.openai_api.pricing import known_provider

if TYPE_CHECKING:
    import httpx2
    from openai import AsyncOpenAI

# Reading has no timeout here: the stream knows whether an answer has begun, and bounds silence.
CONNECT_TIMEOUT_S = 15.0
WRITE_TIMEOUT_S = 60.0

# httpcore examines each idle connection whenever a request begins or ends: with a hundred of them,
# that took a sixth of the event loop's work at full speed.
MAX_IDLE_CONNECTIONS = 10

# Bounds on the decoded bodies that the SDK reads whole, before our code gets them.
MAX_ERROR_BODY_BYTES = 65_536
_ERROR_BODY_TIMEOUT_S = 10.0
MAX_JSON_BODY_BYTES = 4 * 1024 * 1024  # a list of a hundred batches, or of models, has some 100 kB

_MAX_CLIENTS = 64  # each Entra ID token, valid for an hour, has a client of its own
_PROXY_NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_OTHER_PROBLEM = "comes from the proxy or certificate settings of the environment."
_SETTINGS_ADVICE = "Check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE."
# The environment variables that a pool of connections obeys.
_POOL_VARIABLES = (*_PROXY_NAMES, *map(str.upper, _PROXY_NAMES), "SSL_CERT_FILE", "SSL_CERT_DIR")


class Connections:
    """One pool of connections per proxy and CA environment, one client per endpoint."""

    def __init__(self, *, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self._transport = transport
        self._pools: dict[tuple[str | None, ...], httpx2.AsyncClient] = {}
        self._cached_client = lru_cache(_MAX_CLIENTS)(_make_client)
        self._custom_clients: dict[Any, AsyncOpenAI] = {}  # by the user's factory (Codex.client)

    def client(self, endpoint: Endpoint) -> AsyncOpenAI:
        """Return the client for an endpoint, or raise a ConfigurationError on a bad environment."""
        # Requests in progress keep the pool of the environment in which they began.
        environment = tuple(os.environ.get(v) for v in _POOL_VARIABLES)
        if environment not in self._pools:
            self._pools[environment] = _open_pool(self._transport)
        return self._cached_client(endpoint, self._pools[environment])

    async def custom_client(self, factory: Callable[[], Any]) -> AsyncOpenAI:
        """Return the client that a user's factory makes; the factory is called only once."""
        if client := self.made_client(factory):
            return client
        try:
            made = await factory()
        except Exception as error:
            raise factory_error(error) from None
        return self._keep_client(factory, made)

    def made_client(self, factory: Callable[[], Any]) -> AsyncOpenAI | None:
        """Return a factory's client; None if it has to be awaited; a client stands for itself."""
        if factory not in self._custom_clients and not inspect.iscoroutinefunction(factory):
            try:
                made = factory() if callable(factory) else factory
            except Exception as error:
                raise factory_error(error) from None
            if inspect.iscoroutine(made):
                # Else Python warns that it is not awaited; `custom_client` calls the factory again.
                made.close()
            if not inspect.isawaitable(made):
                self._keep_client(factory, made)
        return self._custom_clients.get(factory)

    def custom_endpoint(self, factory: Callable[[], Any]) -> tuple[Endpoint, list[str]]:
        """Return the endpoint of a custom client, without its key, and the client's secrets."""
        import openai

        # The account is named by the factory, so that it is known before the client is made.
        account = fingerprint(f"client {id(factory)}")
        client = self.made_client(factory)
        if client is None:
            return Endpoint(kind="compatible", base_url="", host="", account=account), []
        base_url = str(client.base_url).rstrip("/")
        is_azure = isinstance(client, openai.AsyncAzureOpenAI)
        kind: ServerKind = "azure" if is_azure else known_provider(base_url) or "compatible"
        host = client.base_url.netloc.decode("ascii", "replace").rpartition("@")[2]
        endpoint = Endpoint(kind=kind, base_url=base_url, host=host, account=account)
        return endpoint, secrets_of(client)

    def _keep_client(self, factory: Callable[[], Any], made: object) -> AsyncOpenAI:
        import openai

        if not isinstance(made, openai.AsyncOpenAI):
            raise ConfigurationError(
                f"Codex.client made {shorten(type(made).__name__, 60)}, not an openai.AsyncOpenAI.",
                advice="Let it return openai.AsyncOpenAI(…) or openai.AsyncAzureOpenAI(…).",
            )
        hooks = made._client.event_hooks["response"]
        if _read_bounded_body not in hooks:
            hooks.append(_read_bounded_body)
        client = self._custom_clients[factory] = made.with_options(max_retries=0)
        return client

    async def close(self) -> None:
        """Close every connection, except those of custom clients, which belong to the user."""
        pools, self._pools = self._pools, {}
        self._custom_clients.clear()
        self._cached_client.cache_clear()
        for pool in pools.values():
            await pool.aclose()


def secrets_of(client: AsyncOpenAI) -> list[str]:
    """Return the secrets that a client sends."""
    credentials = (client.api_key, getattr(client, "_azure_ad_token", None))
    return [secret for secret in credentials if isinstance(secret, str) and secret]


def factory_error(error: Exception) -> ConfigurationError:
    """Return the error for an exception of a user's factory, or of the client it made."""
    # Its message is left out: it might contain a secret that only the factory knows.
    return ConfigurationError(
        f"Codex.client raised {type(error).__name__}.",
        advice="Call it in a cell of its own to see why.",
    )


def _open_pool(transport: httpx2.AsyncBaseTransport | None) -> httpx2.AsyncClient:
    import httpx2

    limits = httpx2.Limits(max_connections=1000, max_keepalive_connections=MAX_IDLE_CONNECTIONS)
    try:
        return httpx2.AsyncClient(
            transport=transport,
            follow_redirects=False,
            # No cookies: a jar is shared by all keys, and by all ports of a machine.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S, write=WRITE_TIMEOUT_S),
            limits=limits,
            # The key for a server on this machine must not go through the proxy.
            mounts={f"all://{name}": None for name in ("localhost", "127.0.0.1", "[::1]")},
            event_hooks={"response": [_read_bounded_body]},
        )
    except (ValueError, TypeError, ImportError, OSError, httpx2.InvalidURL) as error:
        problems = ((n, *p) for n, v in proxies(os.environ) if (p := proxy_problem(v)))
        other = (type(error).__name__, _OTHER_PROBLEM, _SETTINGS_ADVICE)
        name, problem, advice = next(problems, other)
        raise ConnectionSettingsError(f"{name} {problem}", advice=advice) from None


def proxies(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the variables that name proxies, with their values."""
    values = ((n.upper(), environ.get(n) or environ.get(n.upper())) for n in _PROXY_NAMES[:3])
    return [(name, value) for name, value in values if value]


def proxy_problem(value: str) -> tuple[str, str] | None:
    """Return what is wrong with a proxy's address, which is not shown, and what to do about it."""
    scheme, has_host = "", False
    with contextlib.suppress(ValueError):  # of a port that is not a number
        url = urlsplit(value if "://" in value else f"http://{value}")
        scheme, has_host = url.scheme, bool(url.hostname) and url.port != 0
    if not has_host or scheme not in {"http", "https", "socks5", "socks5h"}:
        usable = "socks5" if scheme.startswith("socks") else "http"
        return "is not a valid address.", f"Write {usable}://HOST:PORT."
    if scheme.startswith("socks") and find_spec("socksio") is None:
        return "names a SOCKS proxy, which needs the package socksio.", "Run `pip install socksio`."
    return None


def _make_client(endpoint: Endpoint, pool: httpx2.AsyncClient) -> AsyncOpenAI:
    import openai

    key = endpoint.key.reveal() if endpoint.key else ""
    shared: Any = {"admin_api_key": "", "max_retries": 0, "http_client": pool}
    client: AsyncOpenAI
    if endpoint.api_version:
        client = openai.AsyncAzureOpenAI(
            azure_endpoint=endpoint.base_url,
            api_version=endpoint.api_version,
            api_key=None if endpoint.has_entra_token else key,
            azure_ad_token=key if endpoint.has_entra_token else None,
            **shared,
        )
    else:
        client = openai.AsyncOpenAI(base_url=f"{endpoint.base_url}/", api_key=key, **shared)
    # The SDK fills these from the environment for any server; custom headers may hold credentials.
    client.organization = endpoint.organization
    client.project = endpoint.project
    client._custom_headers = {}
    return client


async def _read_bounded_body(response: httpx2.Response) -> None:
    """Read a body that the SDK would read whole, up to a bound on what it decodes to."""
    path = response.request.url.path.rstrip("/")
    if response.headers.get("content-encoding", "").lower() == "x-gzip":  # an old name (RFC 9110)
        response.headers["content-encoding"] = "gzip"
    is_error = response.status_code >= 300
    is_listing = "/batches" in path or "/files" in path or path.endswith("/models")
    # Answers and result files are streams, which their readers bound.
    if not is_error and (not is_listing or path.endswith("/content")):
        return
    max_bytes = MAX_ERROR_BODY_BYTES if is_error else MAX_JSON_BODY_BYTES
    # 5 kB with ``content-encoding: gzip, gzip`` can decode to gigabytes. httpx2 decodes in pieces
    # of 1 MiB, so a loop that stops is enough; the SDK's `aread` has no bound.
    body = bytearray()
    timeout = asyncio.timeout(_ERROR_BODY_TIMEOUT_S if is_error else None)
    # An error whose body breaks off, is late or cannot be decoded is judged by its status.
    with contextlib.suppress(*([Exception] if is_error else [])):
        async with timeout, contextlib.aclosing(response.aiter_bytes()) as chunks:
            async for chunk in chunks:
                body += chunk[: max_bytes - len(body) + 1]
                if len(body) > max_bytes:
                    break
    await response.aclose()
    if len(body) > max_bytes and not is_error:
        raise ServerError(f"The server sent more than {max_bytes >> 20} MB.")
    response._content = bytes(body[:max_bytes])
