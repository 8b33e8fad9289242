"""The clients: what they send, to which server, and by which route."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from nbcodex.errors import (
    ConfigurationError,
    CredentialsError,
    LimitError,
    NbcodexError,
    OverloadedError,
    RequestError,
    ServerError,
    TransientError,
)
from nbcodex.models import Request
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.openai_api.batches import Batch, BatchClient
from nbcodex.openai_api.connections import (
    MAX_ERROR_BODY_BYTES,
    Connections,
    _open_pool,
    proxy_problem,
)
from nbcodex.openai_api.endpoints import resolve
from nbcodex.settings import Secret, Settings
from tests.openai_api.scripted import (
    BASE,
    KEY,
    MODEL,
    Script,
    Server,
    Silence,
    chunk,
    completed,
    fails,
    play,
    settings,
)
from tests.virtual import LoopClock, run_virtual

AZURE = "https://me.openai.azure.com"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the proxies of the environment."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def sent_to(chosen: Settings) -> httpx2.Request:
    server = Server(Script([completed()]))
    play(server, chosen=chosen, model=MODEL)
    return server.requests[0]


@pytest.mark.parametrize(
    ("azure", "url", "headers"),
    [
        (
            {"azure_key": Secret(KEY), "api_version": "2025-04-01-preview"},
            f"{AZURE}/openai/responses?api-version=2025-04-01-preview",
            {"api-key": KEY},
        ),
        (
            {"azure_ad_token": Secret(KEY), "api_version": "2025-04-01-preview"},
            f"{AZURE}/openai/responses?api-version=2025-04-01-preview",
            {"authorization": f"Bearer {KEY}"},
        ),
        (
            {"azure_key": Secret(KEY)},
            f"{AZURE}/openai/v1/responses",
            {"authorization": f"Bearer {KEY}"},
        ),
    ],
)
def test_azure_url_and_authentication_follow_the_version(
    azure: dict[str, Any], url: str, headers: dict[str, str]
) -> None:
    chosen = settings(api_key=None, base_url=None, azure_endpoint=AZURE, **azure)
    request = sent_to(chosen)
    assert str(request.url) == url
    assert {n: request.headers[n] for n in headers} == headers


def test_classic_azure_chat_has_the_deployment_in_its_path() -> None:
    server = Server(Script([chunk("hi", finish="stop")]))
    chosen = settings(
        api="chat", api_key=None, base_url=None, azure_endpoint=AZURE, azure_key=Secret(KEY),
        api_version="2025-04-01-preview",
    )  # fmt: skip
    play(server, chosen=chosen, model="my-model")
    assert server.requests[0].url.path == "/openai/deployments/my-model/chat/completions"


def test_environment_credentials_reach_no_other_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secrets = {
        "OPENAI_API_KEY": "sk-environment",
        "OPENAI_ADMIN_KEY": "sk-admin",
        "OPENAI_ORG_ID": "org-environment",
        "OPENAI_PROJECT_ID": "proj-environment",
        "OPENAI_CUSTOM_HEADERS": "Authorization: sk-custom\nX-Custom: sk-custom",
        "AZURE_OPENAI_AD_TOKEN": "sk-entra",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine gateway.example login me password sk-netrc\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    request = sent_to(settings())
    assert request.headers["authorization"] == f"Bearer {KEY}"
    sent = str(request.headers.multi_items())
    assert not any(word in sent for word in ("environment", "sk-admin", "custom", "netrc", "entra"))


def test_organization_and_project_are_sent_to_openai() -> None:
    request = sent_to(settings(base_url=None, organization="org", project="p"))
    assert request.headers["openai-organization"] == "org"
    assert request.headers["openai-project"] == "p"


def test_client_is_reused_until_the_proxy_environment_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        connections = Connections()
        endpoint = resolve(settings(), Request(prompt=""))
        one = connections.client(endpoint)
        assert connections.client(endpoint) is one
        assert one.max_retries == 0
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        assert connections.client(endpoint) is not one
        await connections.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", "http://user:sk-proxy@x:nonsense"),
        ("ALL_PROXY", "gopher://user:sk-proxy@x"),
        ("SSL_CERT_FILE", "/no/such/file"),
    ],
)
def test_invalid_proxy_environment_is_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """The value is not shown."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        Connections().client(resolve(settings(), Request(prompt="")))
    assert "sk-proxy" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("ALL_PROXY", "socks://user:sk-proxy@127.0.0.1:7892/", "socks5://"),
        ("all_proxy", "socks4://127.0.0.1:7892", "socks5://"),
        ("https_proxy", "ftp://127.0.0.1:21", "http://HOST:PORT"),
    ],
)
def test_unusable_proxy_is_named_with_what_to_write(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, advice: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=name.upper()) as caught:
        Connections().client(resolve(settings(), Request(prompt="")))
    assert advice in caught.value.advice
    assert "sk-proxy" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_socks_proxy_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr("nbcodex.openai_api.connections.find_spec", lambda _: None)
    problem = proxy_problem(f"{scheme}://127.0.0.1:7892")
    assert problem is not None
    assert "pip install socksio" in problem[1]


def test_local_server_is_not_reached_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = completed()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        api_client = ApiClient(clock=LoopClock())
        chosen = settings(base_url=f"http://127.0.0.1:{port}/v1")
        async for _ in api_client.stream(Request(prompt="Why?"), chosen, model=MODEL):
            pass
        await api_client.close()
        server.close()
        await server.wait_closed()

    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    asyncio.run(run())


def test_endless_error_body_is_read_in_part() -> None:
    read = 0

    def endless() -> Any:
        nonlocal read
        while True:
            read += 10_000
            yield b"x" * 10_000

    with pytest.raises(NbcodexError):
        play(Server(Script(endless(), 400)))
    assert read <= MAX_ERROR_BODY_BYTES + 20_000


CUT_JSON = b'{"error": {"message": "Not now: the words'


@pytest.mark.parametrize("is_custom", [False, True])
@pytest.mark.parametrize(
    "end",
    [
        httpx2.RemoteProtocolError("peer closed connection"),
        httpx2.ReadError("reset"),
        httpx2.DecodingError("not gzip"),
        Silence(10_000.0),
    ],
)
@pytest.mark.parametrize(
    ("status", "begun", "kind"),
    [
        (403, b"<html><head><title>403", RequestError),
        (403, b"", CredentialsError),
        (400, CUT_JSON, RequestError),
        (429, CUT_JSON, LimitError),
        (429, b"", LimitError),
        (503, CUT_JSON, OverloadedError),
        (500, b"", ServerError),
    ],
)
def test_error_whose_body_breaks_off_is_judged_by_its_status(
    status: int, begun: bytes, kind: type[NbcodexError], end: Any, *, is_custom: bool
) -> None:
    server = Server(Script([begun, end], status, {"retry-after": "7"}))
    chosen = settings()
    if is_custom:
        http = httpx2.AsyncClient(transport=server)
        custom = openai.AsyncOpenAI(api_key="k", base_url="http://x/v1", http_client=http)
        chosen = Settings(client=custom, api="responses", model=MODEL)
    with pytest.raises(NbcodexError) as caught:
        play(server, chosen=chosen)
    assert type(caught.value) is kind
    assert f"(HTTP {status})" in caught.value.message
    assert ("the words" in caught.value.message) == (begun == CUT_JSON)
    if isinstance(caught.value, TransientError):
        assert caught.value.wait == 7.0
    if status == 403:
        assert "firewall" in caught.value.advice


def test_error_body_that_never_ends_is_read_for_a_bounded_time() -> None:
    parts = itertools.chain.from_iterable(itertools.repeat([b"x", Silence(1.0)]))
    error = fails(Server(Script(parts, 400)))
    assert "(HTTP 400): xxxxx" in error.message


@functools.cache
def bomb(codings: int, size: int = 60_000_000) -> bytes:
    """Return zeros that are compressed repeatedly."""
    data = bytes(size)
    for _ in range(codings):
        data = gzip.compress(data)
    return data


@pytest.mark.parametrize("codings", [1, 2])
@pytest.mark.parametrize("status", [401, 429, 500])
@pytest.mark.parametrize("is_custom", [False, True])
def test_error_body_is_bounded_after_decoding(codings: int, status: int, is_custom: bool) -> None:
    coding = ", ".join(["gzip"] * codings)
    body = bomb(codings)
    server = Server(Script([body], status, {"content-encoding": coding}))
    chosen = settings()
    if is_custom:
        http = httpx2.AsyncClient(transport=server)
        client = openai.AsyncOpenAI(api_key="sk-custom-key", http_client=http, base_url=BASE)
        chosen = settings(client=lambda: client)
    tracemalloc.start()
    try:
        with pytest.raises(NbcodexError):
            play(server, chosen=chosen)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("call", ["retrieve_batch", "upload_file", "find_batch", "delete_files"])
@pytest.mark.parametrize("codings", [1, 2])
def test_body_of_a_batch_call_is_bounded_after_decoding(call: str, codings: int) -> None:
    headers = {
        "content-encoding": ", ".join(["gzip"] * codings),
        "content-type": "application/json",
    }
    server = Server(Script([bomb(codings)], 200, headers))
    batches = BatchClient(ApiClient(clock=LoopClock(), transport=server), settings())
    arguments: dict[str, tuple[Any, ...]] = {
        "retrieve_batch": ("batch_1",),
        "upload_file": (b"{}",),
        "find_batch": (),
        "delete_files": (Batch(id="b", status="failed", input_file_id="f"),),
    }
    more = {"metadata": {}} if call == "find_batch" else {}

    async def main() -> None:
        with pytest.raises(ServerError, match="more than 4 MB"):
            await getattr(batches, call)(*arguments[call], Request(prompt="?"), **more)

    tracemalloc.start()
    try:
        run_virtual(main())
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


# Custom clients.


def custom(server: Server, **options: Any) -> openai.AsyncOpenAI:
    http = httpx2.AsyncClient(transport=server)
    return openai.AsyncOpenAI(
        api_key=KEY, base_url="https://private.example/v1", http_client=http, **options
    )


def test_custom_client_is_made_once_without_retries() -> None:
    """By a sync factory and by an async one."""
    made: list[openai.AsyncOpenAI] = []
    server = Server(Script([], 500))

    def factory() -> openai.AsyncOpenAI:
        made.append(custom(server, max_retries=5))
        return made[-1]

    async def later() -> openai.AsyncOpenAI:
        return factory()

    async def run() -> None:
        for maker in (factory, later):
            chosen = Settings(client=maker, api="responses")
            api_client = ApiClient(clock=LoopClock())
            request = Request(prompt="Why?", model="m")
            for _ in range(2):
                api_client.endpoint(request, chosen)
                assert await api_client.resolve_model(request, chosen) == "m"
                with contextlib.suppress(NbcodexError):
                    async for _ in api_client.stream(request, chosen, model="m"):
                        pass
            assert api_client.endpoint(request, chosen).base_url == "https://private.example/v1"

    run_virtual(run())
    assert len(made) == 2
    assert len(server.requests) == 4


def test_custom_clients_key_is_neither_sent_nor_shown() -> None:
    server = Server(Script([completed(model=KEY)]))
    client = custom(server)
    chosen = Settings(client=lambda: client, api="responses")
    assert KEY not in repr(play(server, chosen=chosen, model="m"))
    with pytest.raises(ConfigurationError, match="contains an API key"):
        play(server, chosen=chosen, model="m", prompt=KEY)


@pytest.mark.parametrize("body", [b'{"error": {"message": "no"}}', b"[" * 100_000])
def test_unusable_body_of_a_200_is_not_blamed_on_the_custom_client(body: bytes) -> None:
    client = custom(Server(Script([body], headers={"content-type": "application/json"})))
    with pytest.raises(ServerError):
        play(Server(), chosen=Settings(client=lambda: client, api="responses"), model="m")


@pytest.mark.parametrize(
    "factory",
    [
        lambda: openai.OpenAI(api_key=KEY),
        lambda: "a client",
        lambda: 1 / 0,
        lambda: openai.AsyncOpenAI(api_key=None),
        lambda: asyncio.sleep(0),
    ],
)
def test_factory_without_an_async_client_is_a_configuration_error(factory: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Codex\.client"):
        play(Server(Script()), chosen=Settings(client=factory), model="m")


def test_failing_token_provider_is_a_configuration_error() -> None:
    async def provider() -> str:
        raise KeyError("secret")

    client = openai.AsyncOpenAI(api_key=provider, base_url="https://private.example/v1")
    with pytest.raises(ConfigurationError, match="KeyError"):
        play(Server(Script()), chosen=Settings(client=lambda: client), model="m")


@pytest.mark.parametrize(
    "cookie", ["a=1", "a=1; Path=/; HttpOnly", "a=1; Domain=gw.example; Max-Age=900"]
)
def test_no_cookies_are_kept(cookie: str) -> None:
    sent: list[str | None] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        sent.append(request.headers.get("cookie"))
        return httpx2.Response(200, headers={"set-cookie": cookie})

    async def main() -> None:
        async with _open_pool(httpx2.MockTransport(handler)) as pool:
            for port in (443, 443, 8443):
                await pool.get(f"https://gw.example:{port}/v1/models")

    asyncio.run(main())
    assert sent == [None, None, None]
