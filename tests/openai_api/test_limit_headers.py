"""Durations, waits and snapshots as headers state them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbcodex.models import DAY
from nbcodex.openai_api import rate_limits

WALL = 1_800_000_000.0  # Fri, 15 Jan 2027 08:00:00 GMT


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("17ms", 0.017),
        ("8m51.438s", 531.438),
        ("1h0m0s", 3600.0),
        ("250µs", 250e-6),
        ("250us", 250e-6),
        ("12ns", 12e-9),
        ("2m59.56s", 179.56),
        ("2 minutes and 5 secs", 125.0),
        ("01:12:34", 4354.0),
        ("33011.382867", 33011.382867),
        ("0", 0.0),
        (" 1s ", 1.0),
        ("-1s", None),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("1e999", None),
        ("", None),
        (None, None),
        ("soon", None),
        ("1s or so", None),
        ("1s" * 100, None),
    ],
)
def test_reset_is_a_duration_or_plain_seconds(text: str | None, seconds: float | None) -> None:
    assert rate_limits.parse_duration(text) == (
        pytest.approx(seconds) if seconds is not None else None
    )


@pytest.mark.parametrize(
    ("given", "wait"),
    [
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after-ms": "nonsense", "retry-after": "7"}, 7.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "1m30s"}, 90.0),
        ({"retry-after": "Fri, 15 Jan 2027 08:00:30 GMT"}, 30.0),
        # The server's clock is an hour ahead of ours.
        (
            {
                "retry-after": "Fri, 15 Jan 2027 09:00:30 GMT",
                "date": "Fri, 15 Jan 2027 09:00:00 GMT",
            },
            30.0,
        ),
        ({"retry-after": "Fri, 15 Jan 2027 07:00:00 GMT"}, None),
        ({"retry-after": "Fri, 99 Foo 2027"}, None),
        ({"retry-after": "0"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1e300"}, rate_limits.MAX_WAIT_S),
        ({"retry-after": "864000"}, 10 * DAY),
        ({"retry-after-ms": "-1", "retry-after": "2"}, 2.0),
        ({}, None),
    ],
)
def test_first_valid_wait_header_counts(given: dict[str, str], wait: float | None) -> None:
    assert rate_limits.wait_in_headers(given, wall_time=WALL) == (wait and pytest.approx(wait))


def limits(resource: str, limit: str, remaining: str, reset: str = "") -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{resource}": limit,
        f"x-ratelimit-remaining-{resource}": remaining,
        f"x-ratelimit-reset-{resource}": reset,
    }


def test_snapshot_has_tokens_and_requests() -> None:
    found = rate_limits.read_snapshot(
        {
            **limits("tokens", "30000", "22999", "14.002s"),
            **limits("requests", "500", "499", "120ms"),
            "openai-processing-ms": "250",
        },
        at=7.0,
    )
    assert (found.at, found.processing) == (7.0, 0.25)
    assert found.tokens
    assert (found.tokens.limit, found.tokens.remaining, found.tokens.full_in) == (
        30000,
        22999,
        14.002,
    )
    assert found.requests
    assert found.requests.full_in == pytest.approx(0.12)


def test_tighter_of_account_and_project_limit_counts() -> None:
    found = rate_limits.read_snapshot(
        {**limits("tokens", "30000", "20000"), **limits("project-tokens", "9000", "100")}, at=0.0
    )
    assert found.tokens
    assert (found.tokens.limit, found.tokens.remaining) == (9000, 100)


def test_name_of_a_region_is_not_a_unit_of_time() -> None:
    found = rate_limits.read_snapshot(limits("tokens-us", "9000", "100"), at=0.0).tokens
    assert found
    assert (found.limit, found.remaining) == (9000, 100)


@pytest.mark.parametrize(
    ("limit", "remaining"),
    [("-1", "5"), ("0", "0"), ("5", "-1"), ("nan", "1"), ("x", "y"), ("1e300", "1"), ("", "")],
)
def test_placeholder_limits_are_absent(limit: str, remaining: str) -> None:
    """Azure and others send 0 or -1 where there is no limit."""
    assert rate_limits.read_snapshot(limits("tokens", limit, remaining), at=0.0).tokens is None


def test_invalid_reset_keeps_limit_and_level() -> None:
    gauge = rate_limits.read_snapshot(limits("tokens", "10", "5", "never"), at=0.0).tokens
    assert gauge
    assert gauge.full_in is None


NAMES = [
    *(
        f"x-ratelimit-{w}-{r}"
        for w in ("limit", "remaining", "reset")
        for r in ("tokens", "requests")
    ),
    "retry-after",
    "retry-after-ms",
    "date",
    "openai-processing-ms",
]


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=80)))
def test_any_headers_give_a_valid_wait_and_snapshot(given: dict[str, str]) -> None:
    wait = rate_limits.wait_in_headers(given, wall_time=WALL)
    assert wait is None or 0 < wait <= rate_limits.MAX_WAIT_S
    found = rate_limits.read_snapshot(given, at=1.0)
    for gauge in (found.tokens, found.requests):
        assert gauge is None or 0 <= gauge.remaining <= gauge.limit <= rate_limits.MAX_LIMIT


ANTHROPIC = {
    "anthropic-ratelimit-requests-limit": "50",
    "anthropic-ratelimit-requests-remaining": "49",
    "anthropic-ratelimit-tokens-limit": "40000",
    "anthropic-ratelimit-tokens-remaining": "30000",
    "anthropic-ratelimit-input-tokens-limit": "20000",
    "anthropic-ratelimit-input-tokens-remaining": "100",
    "anthropic-ratelimit-tokens-reset": "2027-01-15T08:00:15Z",
}
CEREBRAS = {
    "x-ratelimit-limit-requests-day": "14400",
    "x-ratelimit-remaining-requests-day": "7",
    "x-ratelimit-limit-tokens-minute": "60000",
    "x-ratelimit-remaining-tokens-minute": "59000",
    "x-ratelimit-reset-tokens-minute": "11.38",
}
MISTRAL = {
    "x-ratelimit-limit-tokens-minute": "500000",
    "x-ratelimit-remaining-tokens-minute": "499000",
    "x-ratelimit-limit-req-minute": "60",
    "x-ratelimit-remaining-req-minute": "58",
}


@pytest.mark.parametrize(
    ("headers", "tokens", "requests"),
    [
        (ANTHROPIC, (40_000, 30_000), (50, 49)),
        (CEREBRAS, (60_000, 59_000), None),
        (MISTRAL, (500_000, 499_000), (60, 58)),
    ],
    ids=["Anthropic", "Cerebras", "Mistral"],
)
def test_snapshot_is_read_from_headers_of_other_providers(
    headers: dict[str, str], tokens: tuple[float, float], requests: tuple[float, float] | None
) -> None:
    found = rate_limits.read_snapshot({**headers, "date": "Fri, 15 Jan 2027 08:00:00 GMT"}, at=0.0)
    assert found.tokens is not None
    assert (found.tokens.limit, found.tokens.remaining) == tokens
    assert found.tokens.full_in == (15.0 if headers is ANTHROPIC else None)
    reading = found.requests and (found.requests.limit, found.requests.remaining)
    assert reading == requests
