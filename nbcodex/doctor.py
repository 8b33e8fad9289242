"""What is set, where it came from, and what to do about what does not fit. Never shows a secret."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from nbcodex.errors import NbcodexError
from nbcodex.records import Request
from nbcodex.settings import Settings

_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY")
_NO_MODEL = "not set: the default, or the only one that the server has"
_AUTHORITIES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def report(settings: Settings, environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Yield the findings, a line each; nothing is sent anywhere.

    Parameters
    ----------
    settings : Settings
        The settings in force.
    environ : mapping
        The environment, for what the HTTP library reads by itself.
    """
    from nbcodex.wire.providers import resolve

    try:
        endpoint = resolve(settings, Request(prompt="?"))
    except NbcodexError as error:
        yield f"server     ✗ {error}"
    else:
        yield f"server     ✓ {endpoint.kind}, {endpoint.base_url}"
        yield f"key        ✓ found for {endpoint.host} (not shown)"
    yield f"model      {settings.model or _NO_MODEL}"
    yield f"API        {settings.api}"
    yield f"patience   {settings.patience:g} s"
    for title, names in (("proxy", _PROXIES), ("CA", _AUTHORITIES)):
        found = [name for name in names if environ.get(name) or environ.get(name.lower())]
        yield f"{title:<10} {', '.join(found) + ' in force' if found else 'none set'}"
