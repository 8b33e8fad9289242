"""The pace that is kept under llmock's limits, in real time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbcodex.client import Client
from nbcodex.events import Finished
from nbcodex.models import MINUTE, Request
from nbcodex.requests.options import RequestOptions, build_request
from nbcodex.settings import Secret, Settings
from tests.servers.mock import ANSWER, KEY, MODEL, TOKENS_PER_MINUTE, Mock, mocked
from tests.servers.racing import Racer, warm_up

pytestmark = pytest.mark.server

NUMBER, BOUND = 150, 80
AT_START = 6_000
"""Tokens that others have left of the minute."""
REFUSED = 2
"""llmock charges a quarter of the body's bytes, frame and all, which is a third more than its usage
tells: the last few, which spend what is kept back, may lack that much (one was seen; of 600 in a
minute, none)."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Mock]:
    """An llmock on which tokens run out before requests do."""
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


def test_the_limit_is_used_fully_and_not_met(server: Mock) -> None:
    """Of many requests at once each is answered, few are refused, and no time is lost."""
    racing, settings = Client(), settings_of(server, KEY)
    try:
        warm_up(racing, request(0, settings), settings_of(server, f"{KEY}-other"))
        server.use_up_tokens(but=AT_START)
        requests = [request(number, settings) for number in range(NUMBER)]
        race = Racer(racing, requests, settings).finish()
    finally:
        racing.close()
    assert all(isinstance(e, Finished) and e.reply.text == ANSWER for e in race.endings)
    served = server.requests()
    assert len({str(each["body"]) for each in served}) == NUMBER
    assert [each["fault"] for each in served].count(None) == NUMBER
    assert len(served) - NUMBER <= REFUSED
    assert server.findings() == []
    level = float(server.http.get("/v1/models").headers["x-ratelimit-remaining-tokens"])
    spent = AT_START + race.seconds * TOKENS_PER_MINUTE / MINUTE - level
    ideal = race.last + (spent - AT_START) / TOKENS_PER_MINUTE * MINUTE
    assert race.seconds <= 1.2 * ideal, (race.seconds, ideal, level)
