"""Base URLs: what makes one, and which host it leads to. Pure."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import SplitResult, urlsplit

from nbcodex.errors import ConfigurationError

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]")
_MISTAKEN_ENDS = ("/responses", "/chat/completions", "/completions", "/models")
_ADVICE = "Write it like https://host.example/v1."


def parse_url(text: str, name: str) -> SplitResult:
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
