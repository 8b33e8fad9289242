"""Where a request goes, and with which key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from nbcodex.errors import ConfigurationError, EntryError, MissingKeyError
from nbcodex.models import Origin, Request
from nbcodex.openai_api import request_body
from nbcodex.openai_api.endpoints import Endpoint, check_server, configured_host, resolve
from nbcodex.settings import Settings

KEY, OTHER = "sk-mine-0123456789", "sk-other-0123456789"
AZURE = "https://me.openai.azure.com"


def resolved(
    environ: Mapping[str, str], *, keys: Mapping[str, str] = {}, **request: Any
) -> Endpoint:
    settings = Settings.read({"keys": keys} if keys else {}, environ)
    return resolve(settings, Request(**{"prompt": "Why?", **request}))


def key_of(endpoint: Endpoint) -> str:
    return endpoint.key.reveal() if endpoint.key else ""


def test_openai_is_the_default_endpoint() -> None:
    found = resolved({"OPENAI_API_KEY": KEY, "OPENAI_ORG_ID": "org", "OPENAI_PROJECT_ID": "p"})
    assert (found.kind, found.base_url) == ("openai", "https://api.openai.com/v1")
    assert (found.host, found.account) == ("api.openai.com", "org/p")


def test_scope_differs_between_keys_and_contains_none() -> None:
    one, again = (resolved({"OPENAI_API_KEY": KEY}) for _ in range(2))
    other = resolved({"OPENAI_API_KEY": OTHER})
    assert one.account == again.account != other.account
    assert KEY not in f"{one!r}{one.account}"


@pytest.mark.parametrize(
    ("environ", "kind", "base_url", "version", "entra"),
    [
        (
            {
                "AZURE_OPENAI_ENDPOINT": AZURE,
                "AZURE_OPENAI_API_KEY": KEY,
                "OPENAI_API_VERSION": "2025-04-01-preview",
            },
            "azure",
            AZURE,
            "2025-04-01-preview",
            False,
        ),
        (
            {"AZURE_OPENAI_ENDPOINT": f"{AZURE}/", "AZURE_OPENAI_API_KEY": KEY},
            "azure",
            f"{AZURE}/openai/v1",
            None,
            False,
        ),
        (
            {
                "AZURE_OPENAI_ENDPOINT": f"{AZURE}/openai/v1/",
                "AZURE_OPENAI_AD_TOKEN": KEY,
                "OPENAI_API_VERSION": "2025-04-01-preview",
            },
            "azure",
            f"{AZURE}/openai/v1",
            None,
            True,
        ),
        (
            {"OPENAI_BASE_URL": f"{AZURE}/openai/v1", "OPENAI_API_KEY": KEY},
            "azure",
            f"{AZURE}/openai/v1",
            None,
            False,
        ),
        (
            {"OPENAI_BASE_URL": f"{AZURE}/openai/v1", "AZURE_OPENAI_API_KEY": KEY},
            "azure",
            f"{AZURE}/openai/v1",
            None,
            False,
        ),
        (
            {
                "AZURE_OPENAI_ENDPOINT": AZURE,
                "AZURE_OPENAI_API_KEY": OTHER,
                "OPENAI_API_KEY": KEY,
            },
            "openai",
            "https://api.openai.com/v1",
            None,
            False,
        ),
    ],
)
def test_azure_is_chosen_by_its_endpoint_and_classic_by_its_version(
    environ: dict[str, str], kind: str, base_url: str, version: str | None, entra: bool
) -> None:
    found = resolved(environ)
    assert (found.kind, found.base_url, found.api_version) == (kind, base_url, version)
    assert (key_of(found), found.has_entra_token) == (KEY, entra)


def test_configured_key_is_not_sent_to_another_host() -> None:
    for api_base in (
        "https://evil.example/v1",
        "http://localhost:8000/v1",
        "https://api.openai.com:8443/v1",
        "https://api.openai.com.evil.example/v1",
    ):
        with pytest.raises(MissingKeyError) as caught:
            resolved({"OPENAI_API_KEY": KEY}, api_base=api_base)
        assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "api_base"),
    [
        ("gw.example", "https://gw.example/v1"),
        ("GW.example:443", "https://gw.example/v1"),
        ("gw.example:8443", "https://gw.example:8443/v1"),
        ("gw.example:*", "https://gw.example:8443/v1"),
        ("https://gw.example:8443/v1", "https://gw.example:8443/v1"),
        ("localhost", "http://localhost/v1"),
        ("localhost:11434", "http://localhost:11434/v1"),
        ("localhost:*", "http://localhost:11434/v1"),
        ("[::1]:8000", "http://[::1]:8000/v1"),
        ("http://gateway:8000", "http://gateway:8000/v1"),
        ("http://gateway:*", "http://gateway:8000/v1"),
        ("http://gateway", "http://gateway/v1"),
    ],
)
def test_key_by_host_goes_to_the_host_and_port_that_its_entry_names(
    entry: str, api_base: str
) -> None:
    found = resolved({"OPENAI_API_KEY": KEY}, keys={entry: OTHER}, api_base=api_base)
    assert (found.kind, key_of(found)) == ("compatible", OTHER)


@pytest.mark.parametrize(
    ("entry", "api_base"),
    [
        ("localhost", "http://localhost:9/v1"),
        ("127.0.0.1", "http://127.0.0.1:8000/v1"),
        ("gw.example", "https://gw.example:8443/v1"),
        ("gw.example:8443", "https://gw.example/v1"),
        ("https://gw.example:8443", "https://gw.example:9443/v1"),
        ("http://gw.example", "https://gw.example/v1"),
    ],
)
def test_key_by_host_goes_to_no_other_port(entry: str, api_base: str) -> None:
    with pytest.raises(MissingKeyError) as caught:
        resolved({"OPENAI_API_KEY": KEY}, keys={entry: OTHER}, api_base=api_base)
    assert OTHER not in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "base_url", "key"),
    [
        ({}, "https://gateway.example/v1", None),
        ({}, "https://gateway.example:8443/v1", None),
        ({"OPENAI_BASE_URL": "https://first.example/v1"}, "https://second.example/v1", None),
        ({"OPENAI_BASE_URL": "https://first.example/v1"}, "https://api.openai.com/v1", None),
        ({"OPENAI_BASE_URL": "https://FIRST.example/v1"}, "https://first.example/v2", KEY),
        ({}, "https://eu.api.openai.com/v1", KEY),
        ({}, "http://localhost:11434/v1", KEY),
        ({"OPENAI_API_KEY": "none"}, "https://gateway.example/v1", "none"),
    ],
)
def test_base_url_of_the_settings_does_not_take_the_key_to_another_host(
    environ: dict[str, str], base_url: str, key: str | None
) -> None:
    settings = Settings.read({"base_url": base_url}, {"OPENAI_API_KEY": KEY, **environ})
    if key is not None:
        assert key_of(resolve(settings, Request(prompt="Why?"))) == key
        return
    with pytest.raises(MissingKeyError, match="No API key is set for") as raised:
        resolve(settings, Request(prompt="Why?"))
    assert "Codex.keys" in raised.value.advice or "login" in raised.value.advice
    assert settings.secrets() == [KEY]  # a prompt that contains it is still refused


def test_key_by_host_wins_over_the_configured_key() -> None:
    environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "https://gw.example/v1"}
    assert key_of(resolved(environ, keys={"gw.example": OTHER})) == OTHER


def test_another_path_on_the_configured_host_keeps_the_key() -> None:
    found = resolved({"OPENAI_API_KEY": KEY}, api_base="https://API.openai.com/v2/")
    assert (found.base_url, key_of(found)) == ("https://api.openai.com/v2", KEY)


def test_missing_key_of_a_local_server_advises_none_as_key() -> None:
    ollama = {"OPENAI_BASE_URL": "http://localhost:11434/v1"}
    with pytest.raises(MissingKeyError, match="OPENAI_API_KEY=none") as caught:
        resolved(ollama)
    assert '%config Codex.keys = {"localhost:11434": ""}' in caught.value.advice
    found = resolved({**ollama, "OPENAI_API_KEY": "none"})
    assert (found.kind, key_of(found), found.host) == ("compatible", "none", "localhost:11434")


def test_missing_key_advises_login_and_demo() -> None:
    with pytest.raises(MissingKeyError) as caught:
        resolved({})
    for way in ("%codex login", "OPENAI_API_KEY", "nbcodex demo"):
        assert way in caught.value.advice


@pytest.mark.parametrize(
    "url",
    [
        "api.openai.com/v1",
        "ftp://x.example",
        "https://",
        "https://x y.example/v1",
        "https://x.example/a b",
        "https://user:pw@x.example/v1",
        "https://x.example/v1?key=1",
        "https://x.example:99999/v1",
        "https://[::1/v1",
        "https://x.example/v1/chat/completions",
        "https://x.example/\x00",
        "https://ex\u0430mple.com/v1",
        "nonsense",
    ],
)
def test_invalid_base_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolved({"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url})
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("key", [f"Bearer {KEY}", f"{KEY}\nX-Evil: 1", f'"{KEY}"', f"{KEY}é"])
def test_invalid_key_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolved({"OPENAI_API_KEY": key})
    assert KEY not in str(caught.value)


def test_cleartext_needs_an_entry_that_says_http() -> None:
    environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "http://box.example:8000/v1"}
    for keys in ({}, {"box.example:8000": OTHER}, {"https://box.example:8000": OTHER}):
        with pytest.raises(ConfigurationError, match="unencrypted") as caught:
            resolved(environ, keys=keys)
        assert "{'http://box.example:8000': 'KEY'}" in caught.value.advice
    assert key_of(resolved(environ, keys={"http://box.example:8000": OTHER})) == OTHER
    assert key_of(resolved({**environ, "OPENAI_BASE_URL": "http://127.0.0.1:8000/v1"})) == KEY


@pytest.mark.parametrize(
    "host",
    [
        "api.openai.com",
        "eu.api.openai.com:8080",
        "api.openai.com.",
        "me.openai.azure.com",
        "me.services.ai.azure.com",
    ],
)
@pytest.mark.parametrize("scheme", ["", "http://"])
def test_key_never_goes_to_openai_or_azure_in_cleartext(host: str, scheme: str) -> None:
    for request in ({}, {"api_base": f"http://{host}/v1"}):
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": f"http://{host}/v1"}
        with pytest.raises(ConfigurationError, match="unencrypted"):
            resolved(environ, keys={f"{scheme}{host}": OTHER}, **request)


@pytest.mark.parametrize("variable", ["AZURE_OPENAI_API_KEY", "AZURE_OPENAI_AD_TOKEN"])
def test_azure_key_goes_to_the_host_of_its_endpoint_only(variable: str) -> None:
    environ = {"AZURE_OPENAI_ENDPOINT": AZURE, variable: KEY}
    own = {**environ, "OPENAI_BASE_URL": f"{AZURE}/openai/v1"}
    assert key_of(resolved(own)) == KEY
    for host in ("other.openai.azure.com", "me.services.ai.azure.com", "me.openai.azure.com:8443"):
        other = {**environ, "OPENAI_BASE_URL": f"https://{host}/openai/v1"}
        with pytest.raises(MissingKeyError, match="AZURE_OPENAI_ENDPOINT") as caught:
            resolved(other)
        assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "where",
    [
        {"prompt": f"my key is {KEY}."},
        {"system": KEY},
        {"model": KEY},
        {"params": {"metadata": {"a": ["b", {"c": KEY}]}}},
        {"params": {"metadata": {KEY: 1}}},
    ],
)
def test_request_that_contains_a_key_is_refused(where: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolved({"OPENAI_API_KEY": KEY}, **where)
    assert KEY not in str(caught.value)


def test_lone_surrogate_in_a_request_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="surrogate"):
        resolved({"OPENAI_API_KEY": KEY}, prompt="\ud800")


def test_repr_of_an_endpoint_has_no_key() -> None:
    assert KEY not in repr(resolved({"OPENAI_API_KEY": KEY}))


def test_login_stores_the_key_for_the_configured_host() -> None:
    assert configured_host(Settings.read({}, {})) == "api.openai.com"
    assert (
        configured_host(Settings.read({}, {"AZURE_OPENAI_ENDPOINT": AZURE}))
        == "me.openai.azure.com"
    )
    gateway = Settings.read({"base_url": "http://gateway:8000/v1"}, {})
    assert configured_host(gateway) == "http://gateway:8000"


@pytest.mark.parametrize(
    "params",
    [
        {"model": "x"},
        {"input": "x"},
        {"messages": []},
        {"stream": False},
        {"conversation": "conv_1"},
        {"conversation": {"id": "conv_1"}},
        {"max_output_tokens": 5},
        {"extra_headers": {"a": "b"}},
        {"extra_query": {}},
        {"timeout": 5},
        {"base_url": "https://x"},
        {1: 2},
    ],
)
def test_reserved_params_are_refused(params: dict[Any, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        request_body.check_params(params)
    assert caught.value.advice


@pytest.mark.parametrize("params", [{"temperature": float("nan")}, {"x": object()}])
def test_params_that_are_not_json_are_refused(params: dict[str, Any]) -> None:
    request = Request(prompt="Why?", params=params)
    with pytest.raises(ConfigurationError, match="not valid JSON"):
        resolve(Settings.read({}, {"OPENAI_API_KEY": KEY}), request)


def at(base_url: str) -> Endpoint:
    """Return the endpoint of a base URL."""
    return resolved({"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": base_url})


@pytest.mark.parametrize(
    ("written_for", "base_url"),
    [
        (None, "https://api.openai.com/v1"),  # an entry of an earlier release
        ("api.openai.com", "https://api.openai.com/v1"),
        ("gateway.example:8443", "https://gateway.example:8443/another/path"),
        ("localhost", "http://127.0.0.1:8001/v1"),
        ("localhost", "http://[::1]:9/v1"),
        ("localhost", "http://localhost:11434/v1"),
    ],
)
def test_entry_goes_to_the_server_that_it_was_written_for(
    written_for: str | None, base_url: str
) -> None:
    check_server(Request(prompt="x").with_server(written_for), at(base_url))


@pytest.mark.parametrize(
    ("written_for", "base_url"),
    [
        ("api.openai.com", "https://gateway.example/v1"),
        ("api.openai.com", "http://localhost:11434/v1"),
        ("localhost", "https://api.openai.com/v1"),
        ("gateway.example", "https://gateway.example:8443/v1"),
        ("one.openai.azure.com", "https://two.openai.azure.com/openai/v1"),
    ],
)
@pytest.mark.parametrize("command", ["resume", "retry"])
def test_entry_goes_to_no_other_server(written_for: str, base_url: str, command: str) -> None:
    endpoint, request = at(base_url), Request(prompt="x").with_server(written_for)
    with pytest.raises(EntryError) as caught:
        check_server(request, endpoint, command=command)
    assert f"written for {written_for}, but requests go to {endpoint.server}" in str(caught.value)
    assert f"%codex {command} {request.id} --new-server" in caught.value.advice


def test_refusal_for_a_row_names_its_map() -> None:
    row = Request(prompt="x", origin=Origin(map_id="m12345678", server="api.openai.com"))
    with pytest.raises(EntryError, match="resume m12345678 --new-server"):
        check_server(row, at("https://gateway.example/v1"))


def test_client_that_is_not_made_yet_is_not_checked() -> None:
    unknown = Endpoint(kind="compatible", base_url="", host="")
    check_server(Request(prompt="x").with_server("api.openai.com"), unknown)
