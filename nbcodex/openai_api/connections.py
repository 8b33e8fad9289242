"""The SDK's clients, made when they are needed and kept. The only place that makes one.

Every wait is ours: the clients never retry. None follows a redirect: the prompt must not travel to
a host that nobody configured. The SDK takes 0.7 s to import, so it is imported at the first use.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from nbcodex.errors import ConfigurationError, shorten
from nbcodex.openai_api.endpoints import Endpoint, Kind, fingerprint
from nbcodex.openai_api.pricing import provider_of

if TYPE_CHECKING:
    import httpx2
    from openai import AsyncOpenAI

CONNECT, WRITE = 15.0, 60.0
"""Seconds for a connection to be made, and for it to take more of the request. Reading is bounded
by the attempt itself, which knows whether an answer has begun."""

IDLE = 10
"""Connections that stay open while they carry nothing: each is looked at whenever a request comes
or goes. Of the event loop's work at full speed, that took a sixth with a hundred allowed."""

REFUSAL_BYTES = 65_536
"""How much of a refusal is read; compressed, it may be a thousand times as much."""

_KEPT = 64
_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_ENVIRONMENT = (*_VARIABLES, *(v.upper() for v in _VARIABLES), "SSL_CERT_FILE", "SSL_CERT_DIR")


class Connections:
    """One pool of connections per proxy and CA environment, one client per endpoint.

    Parameters
    ----------
    transport : httpx2.AsyncBaseTransport or None
        Stands in for the network.
    """

    def __init__(self, *, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self._transport = transport
        self._pools: dict[tuple[str | None, ...], httpx2.AsyncClient] = {}
        self._clients: dict[tuple[Endpoint, httpx2.AsyncClient], AsyncOpenAI] = {}
        self._customs: dict[Any, AsyncOpenAI] = {}

    def client(self, endpoint: Endpoint) -> AsyncOpenAI:
        """Return the client for an endpoint.

        Raises
        ------
        ConfigurationError
            If the proxy or CA variables of the environment make no sense.
        """
        pool = self._pool()
        name = (endpoint, pool)
        if name not in self._clients:
            if len(self._clients) >= _KEPT:  # tokens that are renewed every hour
                self._clients.pop(next(iter(self._clients)))
            self._clients[name] = _make(endpoint, pool)
        return self._clients[name]

    async def custom(self, factory: Callable[[], Any]) -> AsyncOpenAI:
        """Return the client that a user's factory makes, made once.

        Raises
        ------
        ConfigurationError
            If the factory fails, or makes anything but an ``AsyncOpenAI``.
        """
        if factory in self._customs:
            return self._customs[factory]
        try:
            made = factory() if callable(factory) else factory
            made = await made if inspect.isawaitable(made) else made
        except Exception as error:
            raise failed(error) from None
        return self._adopt(factory, made)

    def custom_now(self, factory: Callable[[], Any]) -> AsyncOpenAI | None:
        """Return the client of a factory as `custom` does; None if it has to be awaited first."""
        if factory in self._customs or inspect.iscoroutinefunction(factory):
            return self._customs.get(factory)
        try:
            made = factory() if callable(factory) else factory
        except Exception as error:
            raise failed(error) from None
        if inspect.iscoroutine(made):
            made.close()
        return None if inspect.isawaitable(made) else self._adopt(factory, made)

    def _adopt(self, factory: Callable[[], Any], made: object) -> AsyncOpenAI:
        import openai

        if not isinstance(made, openai.AsyncOpenAI):
            found = shorten(type(made).__name__, 60)
            raise ConfigurationError(
                f"Codex.client made {found}, not an openai.AsyncOpenAI.",
                advice="Let it return openai.AsyncOpenAI(…) or openai.AsyncAzureOpenAI(…).",
            )
        client: AsyncOpenAI = made.with_options(max_retries=0)
        self._customs[factory] = client
        return client

    async def close(self) -> None:
        """Close every connection; a custom client's are its maker's."""
        pools = list(self._pools.values())
        for held in (self._pools, self._clients, self._customs):
            held.clear()
        for pool in pools:
            await pool.aclose()

    def _pool(self) -> httpx2.AsyncClient:
        """Return the pool for the environment as it is now; older ones serve out their streams."""
        name = tuple(os.environ.get(v) for v in _ENVIRONMENT)
        if name not in self._pools:
            self._pools[name] = _open_pool(self._transport)
        return self._pools[name]


def failed(error: Exception) -> ConfigurationError:
    """Return the error of a user's factory, or of the client it made."""
    # Its words are left out: they might contain a secret that only the factory knows.
    return ConfigurationError(
        f"Codex.client raised {type(error).__name__}.",
        advice="Call it in a cell of its own to see why.",
    )


def endpoint_of(client: AsyncOpenAI, factory: object) -> Endpoint:
    """Return the endpoint that a custom client stands for; its key stays its own."""
    import openai

    base_url = str(client.base_url).rstrip("/")
    kind: Kind = provider_of(base_url) or "compatible"
    if isinstance(client, openai.AsyncAzureOpenAI):
        kind = "azure"
    return Endpoint(
        kind=kind,
        base_url=base_url,
        host=client.base_url.netloc.decode("ascii", "replace").rpartition("@")[2],
        scope=custom_scope(factory),
    )


def custom_scope(factory: object) -> str:
    """Return a name for whatever account a custom client uses, the same before and after it."""
    return fingerprint(f"client {id(factory)}")


def secrets_of(client: AsyncOpenAI) -> list[str]:
    """Return the secrets that a client sends."""
    held = (client.api_key, getattr(client, "_azure_ad_token", None))
    return [secret for secret in held if isinstance(secret, str) and secret]


def _open_pool(transport: httpx2.AsyncBaseTransport | None) -> httpx2.AsyncClient:
    import httpx2

    try:
        return httpx2.AsyncClient(
            transport=transport,
            follow_redirects=False,
            timeout=httpx2.Timeout(None, connect=CONNECT, write=WRITE),
            limits=httpx2.Limits(max_connections=1000, max_keepalive_connections=IDLE),
            # A key for this machine is not for the proxy.
            mounts={f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")},
            event_hooks={"response": [_bound]},
        )
    except (ValueError, TypeError, ImportError, OSError, httpx2.InvalidURL) as error:
        raise ConfigurationError(
            f"The proxy or certificate settings of the environment fail ({type(error).__name__}).",
            advice="Look at HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE.",
        ) from None


def _make(endpoint: Endpoint, pool: httpx2.AsyncClient) -> AsyncOpenAI:
    import openai

    key = endpoint.key.reveal() if endpoint.key else ""
    client: AsyncOpenAI
    if endpoint.api_version:
        client = openai.AsyncAzureOpenAI(
            azure_endpoint=endpoint.base_url,
            api_version=endpoint.api_version,
            api_key=None if endpoint.entra else key,
            azure_ad_token=key if endpoint.entra else None,
            admin_api_key="",
            max_retries=0,
            http_client=pool,
        )
    else:
        client = openai.AsyncOpenAI(
            base_url=f"{endpoint.base_url}/",
            api_key=key,
            admin_api_key="",
            max_retries=0,
            http_client=pool,
        )
    # The SDK fills these from the environment, whatever the host.
    client.organization = endpoint.organization
    client.project = endpoint.project
    client._custom_headers = {}  # of OPENAI_CUSTOM_HEADERS, which may hold credentials
    return client


async def _bound(response: httpx2.Response) -> None:
    """Bound what the SDK reads, whole, of a refusal."""
    if response.status_code >= 300:
        response.stream = _bounded(response.stream)


def _bounded(stream: Any) -> Any:
    import httpx2

    class Bounded(httpx2.AsyncByteStream):
        """The first part of a body; the rest is never read."""

        async def __aiter__(self) -> AsyncIterator[bytes]:
            left = REFUSAL_BYTES
            async for chunk in stream:
                yield chunk[:left]
                left -= len(chunk)
                if left <= 0:
                    return

        async def aclose(self) -> None:
            await stream.aclose()

    return Bounded()
