"""A hostile server echoes our key, or redirects to another host."""

from __future__ import annotations

import traceback
from typing import Any

import httpx2
import pytest

from nbcodex.openai_api.answers import MASK
from nbcodex.settings import Settings
from tests.openai_api.scripted import (
    KEY,
    Script,
    Server,
    completed,
    delta,
    event,
    failed,
    fails,
    play,
    refusal,
    text_of,
)


def test_echoed_key_is_masked_in_the_text() -> None:
    half = len(KEY) // 2
    thinking = event({"type": "response.reasoning_text.delta", "delta": f"{KEY}"})
    script = Script(
        [
            thinking,
            delta(f"Your key: {KEY[:half]}"),
            delta(f"{KEY[half:]}!"),
            completed(model=KEY, id=KEY),
        ],
        headers={"x-request-id": KEY, "openai-organization": KEY},
    )
    events = play(Server(script))
    assert KEY not in repr(events)
    assert text_of(events) == f"Your key: {MASK}!"


@pytest.mark.parametrize(
    "script",
    [
        refusal(401, f"Incorrect API key: {KEY}", code=KEY, type=KEY),
        refusal(429, f"Rate limit reached for {KEY} on tokens per min (TPM): Limit 5, Used 5"),
        Script([event({"type": "error", "error": {"code": KEY, "message": KEY}})]),
        Script([failed(KEY, KEY)]),
        Script([], 302, {"location": f"https://{KEY}.example/"}),
        httpx2.RemoteProtocolError(f"illegal header line: {KEY}"),
        Script([httpx2.RemoteProtocolError(f"illegal chunk: {KEY}")]),
    ],
)
def test_echoed_key_is_in_no_error_or_traceback(script: Any) -> None:
    error = fails(Server(script))
    assert KEY not in "".join(traceback.format_exception(error))
    assert KEY not in repr(vars(error))


def test_redirect_is_not_followed() -> None:
    server = Server(Script([], 307, {"location": "https://evil.example/v1/responses"}))
    error = fails(server)
    assert "evil.example" in error.message
    assert [r.url.host for r in server.requests] == ["gateway.example"]


@pytest.mark.parametrize("host", ["openai", "azure"])
@pytest.mark.parametrize(
    "answer",
    [httpx2.ConnectError("refused"), refusal(429), refusal(401)],
    ids=["no network", "429", "401"],
)
def test_no_frame_of_an_error_shows_the_key(host: str, answer: Any) -> None:
    environ = {"OPENAI_API_KEY": KEY}
    if host == "azure":
        environ = {
            "AZURE_OPENAI_ENDPOINT": "https://one.openai.azure.com",
            "AZURE_OPENAI_API_KEY": KEY,
            "OPENAI_API_VERSION": "2024-10-21",
        }
    chosen = Settings.read({"model": "m", "api": "chat"}, environ)
    error: BaseException | None = fails(Server(answer), chosen=chosen)
    while error is not None:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        of_libraries = [frame for frame in frames if "tests" not in frame.f_code.co_filename]
        assert of_libraries
        assert KEY not in repr([frame.f_locals for frame in of_libraries])
        request = getattr(error, "_request", None) or vars(error).get("request")
        assert KEY not in repr([request and request.headers.raw])
        error = error.__cause__ or error.__context__
