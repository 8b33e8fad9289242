"""Pacing under llmock's limits, in real time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbcodex.client import Client
from nbcodex.events import Finished
from nbcodex.models import MINUTE, Request, RequestOptions
from nbcodex.requests.options import build_request
from nbcodex.settings import Secret, Settings
from tests.servers.load_generator import LoadTest, LoadTestResult, warm_up
from tests.servers.mock import ANSWER, KEY, MODEL, TOKENS_PER_MINUTE, Mock, mocked

pytestmark = pytest.mark.server

NUMBER, BOUND = 150, 80
# Tokens of the minute that are left at the start.
TOKENS_AT_START = 6_000
# llmock charges a quarter of the bytes of the body, which is a third more than the usage that it
# reports. So the last requests, which use the reserve, may be refused: one was, and none of 600.
MAX_REFUSALS = 2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Mock]:
    """An llmock whose tokens run out before its requests."""
    with mocked(tmp_path, rpm=3_000) as running:
        running.reset()
        yield running


def settings_of(server: Mock, key: str) -> Settings:
    return Settings(
        api_key=Secret(key),
        base_url=f"{server.url}/v1",
        model=MODEL,
        api="responses",
        journal=False,
    )


def request(number: int, settings: Settings) -> Request:
    return build_request(
        f"Number {number}: what is special about it?", settings, RequestOptions(max_output=BOUND)
    )


def run_load_test(server: Mock) -> LoadTestResult:
    """Send all requests at once, through a client that knows no limit yet."""
    server.reset()
    load_client, settings = Client(), settings_of(server, KEY)
    try:
        warm_up(load_client, request(0, settings), settings_of(server, f"{KEY}-other"))
        server.use_up_tokens(but=TOKENS_AT_START)
        requests = [request(number, settings) for number in range(NUMBER)]
        return LoadTest(load_client, requests, settings).finish()
    finally:
        load_client.close()


def test_simultaneous_requests_use_the_limit_with_few_refusals(server: Mock) -> None:
    # Up to three times: other work on the processors makes it slow, and its requests arrive late.
    for _ in range(3):
        result = run_load_test(server)
        assert all(isinstance(e, Finished) and e.reply.text == ANSWER for e in result.endings)
        served = server.requests()
        assert len({str(each["body"]) for each in served}) == NUMBER
        assert [each["fault"] for each in served].count(None) == NUMBER
        assert server.findings() == []
        level = float(server.http.get("/v1/models").headers["x-ratelimit-remaining-tokens"])
        spent = TOKENS_AT_START + result.seconds * TOKENS_PER_MINUTE / MINUTE - level
        ideal = result.last + (spent - TOKENS_AT_START) / TOKENS_PER_MINUTE * MINUTE
        if len(served) - NUMBER <= MAX_REFUSALS and result.is_within(1.2 * ideal):
            return
    pytest.fail(f"{len(served) - NUMBER} refusals, {result.seconds=}, {ideal=}, {level=}")
