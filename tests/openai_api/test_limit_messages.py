"""Limits and waits as messages state them."""

from __future__ import annotations

import time

import pytest

from nbcodex.models import DAY, MINUTE, Limit
from nbcodex.openai_api import rate_limits

TPM = (
    "Rate limit reached for gpt-5.6-sol in organization org-X on tokens per min (TPM): "
    "Limit 30000, Used 22999, Requested 12528. Please try again in 11.054s. Visit https://x."
)
RPD = (
    "Rate limit reached for m in organization o on requests per day (RPD): "
    "Limit 200, Used 200, Requested 1. Please try again in 7m12s."
)
GROQ = (
    "Rate limit reached for model `llama3-70b` in organization `o` service tier `on_demand` on "
    "tokens per minute (TPM): Limit 6,000, Used 5,800, Requested 1,000. Please try again in 8s."
)
OLD = (
    "Rate limit reached for default-x in organization o on requests per min. "
    "Limit: 3 / min. Please try again in 20s."
)
AZURE = (
    "Requests to the ChatCompletions_Create Operation have exceeded token rate limit of your "
    "current OpenAI S0 pricing tier. Please retry after 37 seconds."
)


@pytest.mark.parametrize(
    ("message", "limit"),
    [
        (
            TPM,
            Limit(
                resource="tokens",
                window=MINUTE,
                limit=30000,
                used=22999,
                requested=12528,
                model="gpt-5.6-sol",
            ),
        ),
        (
            RPD,
            Limit(resource="requests", window=DAY, limit=200, used=200, requested=1, model="m"),
        ),
        (
            GROQ,
            Limit(
                resource="tokens",
                window=MINUTE,
                limit=6000,
                used=5800,
                requested=1000,
                model="llama3-70b",
            ),
        ),
        (OLD, Limit(resource="requests", window=MINUTE, limit=3, model="default-x")),
        (AZURE, Limit(resource="tokens")),
        (
            # stanford-crfm/helm#97 names no model, Baidu's message neither.
            "Rate limit reached for tokens. Limit: 150000.000000 / min. Current: 176000.0 / min.",
            Limit(resource="tokens", window=MINUTE, limit=150_000, used=176_000),
        ),
        ("Rate limit reached for RPM", Limit(resource="requests", window=MINUTE)),
        # What is used stands before the limit: the longest window that is used up counts.
        (
            "Hit token rate limit. Minute limit: 0 / 1600000 tokens. Day limit: 2105 / 10 tokens. "
            "Week limit: 4209 / 20 tokens. Month limit: 144921 / 9223372036854775807 tokens.",
            Limit(resource="tokens", window=7 * DAY, limit=20, used=4209),
        ),
        (
            "Hit request rate limit. Minute limit: 0/16 requests. Day limit: 12 / 10 requests.",
            Limit(resource="requests", window=DAY, limit=10, used=12),
        ),
        ("Minute limit: 0 / 16 requests", Limit()),
        (
            "Daily quota: 12,000/10,000 tokens",
            Limit(resource="tokens", window=DAY, limit=10_000, used=12_000),
        ),
        (
            "You have used 15 of 15 requests per minute",
            Limit(resource="requests", window=MINUTE, limit=15, used=15),
        ),
        (
            "Token limit (500,000 per day) exceeded. Used: 508,311 tokens.",
            Limit(resource="tokens", window=DAY, limit=500_000, used=508_311),
        ),
        ("limit: 50 requests/day", Limit(resource="requests", window=DAY, limit=50)),
        # Other nouns are named as the server does (openai/codex#10059).
        (
            "Rate limit reached for organization org-x on input-images per min: Limit 10, Used 10, "
            "Requested 2. Please try again in 3s.",
            Limit(resource="input-images", window=MINUTE, limit=10, used=10, requested=2),
        ),
        (
            "Rate limit reached for images per minute in organization org-x. Limit: 5/1min.",
            Limit(resource="images", window=MINUTE, limit=5),
        ),
        ("on images per min (IPM): Limit 5", Limit(resource="images", window=MINUTE, limit=5)),
        ("IPM reached", Limit(resource="images", window=MINUTE)),
        ("limited to 20 messages per hour", Limit(resource="messages", window=3600, limit=20)),
        ("limit of 5 audio-seconds a day", Limit(resource="audio-seconds", window=DAY, limit=5)),
        ("limit of 60 times per minute", Limit(resource="requests", window=MINUTE, limit=60)),
        ("input_tokens_per_minute", Limit(resource="tokens", window=MINUTE)),
        ("You exceed your rate limits per minute", Limit()),
        ("Limited to 3 requests a day", Limit(resource="requests", window=DAY, limit=3)),
        # The figure is the use, not the limit; the words of a size are not a rate's.
        ("Limit reached. Your use is 500 tokens per minute.", Limit(resource="tokens", window=60)),
        ("The limit is 4096 tokens.", Limit()),
        ("Too many requests", Limit()),
        ("", Limit()),
    ],
)
def test_limit_is_read_from_the_message(message: str, limit: Limit) -> None:
    assert rate_limits.limit_in_message(message) == limit


def test_wait_is_understood_in_every_notation() -> None:
    """openai/codex #506 understood none of these."""
    read = rate_limits.wait_in_message
    assert read("Please try again in 80ms.") == pytest.approx(0.08)
    assert read("Please try again in 7m12s.") == pytest.approx(432)
    assert read("Please retry after 35 seconds.") == pytest.approx(35)


@pytest.mark.parametrize(
    ("message", "wait"),
    [
        (TPM, 11.054),
        (AZURE, 37.0),
        ("try again in 6h0m0s", 21600.0),
        ("Try again in 1 minute and 20 seconds.", 80.0),
        ("try again in 2 minutes, 5 secs", 125.0),
        ("try again in about 5 minutes", 300.0),
        ("Please retry in 35.5s", 35.5),
        ("try again in 1 day", DAY),
        ("try again in 9 days", 9 * DAY),
        ("try again in 1m", 60.0),
        ("try again in 0s", None),
        ("Please wait 587 hours 33 minutes before trying again.", 2_115_180.0),
        ("try again in 999999999999h", rate_limits.MAX_WAIT_S),
        ("try again later", None),
        ("try again in 5 moons", None),
        ("in 5 seconds all is over", None),
        ("upgrade your plan or wait 6 seconds", 6.0),
        ("the longest wait 6 seconds", None),
    ],
)
def test_wait_in_the_message_is_clamped(message: str, wait: float | None) -> None:
    assert rate_limits.wait_in_message(message) == (wait and pytest.approx(wait))


def test_wait_is_computed_from_the_figures() -> None:
    assert rate_limits.computed_wait(rate_limits.limit_in_message(TPM)) == pytest.approx(
        11.054, abs=1e-3
    )
    assert rate_limits.computed_wait(Limit(limit=10, used=5, requested=1, window=60)) is None
    assert rate_limits.computed_wait(Limit(limit=10, used=5)) is None


@pytest.mark.parametrize(
    "unit",
    [
        "try again in ",
        "1s",
        "1" * 60,
        " " * 60,
        "Limit ",
        "rate limit reached for a",
        "1,",
        "retry after 1m",
    ],
)
def test_long_message_is_cut_before_the_search(unit: str) -> None:
    text = unit * (10_000_000 // len(unit))
    before = time.process_time()
    rate_limits.limit_in_message(text)
    rate_limits.wait_in_message(text)
    # Without the cut it would take minutes.
    assert time.process_time() - before < 5.0
