"""The lines of `%codex limits`."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nbcodex.models import Limit, LimitReading
from nbcodex.notebook.commands.usage import limit_lines
from nbcodex.ratelimit.sharing import LimitState

KNOWN = LimitState(
    tokens=LimitReading(limit=600_000, remaining=300_000, full_in=30.0),
    requests=None,
    undeclared=(),
    policy="kept",
    has_limit_headers=True,
    burst_tokens=None,
    foreign_rate=0.0,
    margin=0.005,
    max_parallel=math.inf,
    slow_down_rate=math.inf,
    other_processes=0,
    was_used=True,
    cooldown_until=None,
    cooldown_limit=None,
    output_share=None,
)
NOTHING = replace(KNOWN, tokens=None, has_limit_headers=False, was_used=False)
TPM = Limit(resource="tokens", window=60.0)
RPD = Limit(resource="requests", window=86_400.0, limit=200, used=30)


@pytest.mark.parametrize(
    ("known", "text"),
    [
        (KNOWN, "300,000 of 600,000 tokens left, 600,000 a minute, full in 30.0 s"),
        (KNOWN, "assumed charging: input and all of max_output"),
        (KNOWN, "safety margin: 0.5% of the limit"),
        (replace(KNOWN, policy="refunded", output_share=0.25), "refunded at its end (learned"),
        (replace(KNOWN, policy="refunded", output_share=0.25), "answers use 25% of it"),
        (
            replace(KNOWN, cooldown_until=110.0, cooldown_limit=TPM),
            "closed for another 10.0 s (tokens per minute",
        ),
        (
            replace(KNOWN, has_limit_headers=False),
            "inferred: the server sends no rate-limit headers",
        ),
        (replace(KNOWN, burst_tokens=5_000.0), "at most about 5,000 tokens at once"),
        (
            replace(KNOWN, undeclared=(RPD,)),
            "requests per day (RPD): limit 200, used 30, from a refusal",
        ),
        (replace(NOTHING, was_used=True, max_parallel=1.0), "at most 1 request at once"),
        (replace(KNOWN, max_parallel=5.0), "at most 5 requests at once: more were not accepted"),
        (replace(KNOWN, slow_down_rate=500.0), "about 30,000 tokens a minute are sent: the server"),
        (replace(KNOWN, foreign_rate=100.0), "other users take about 6,000 tokens a minute"),
        (replace(KNOWN, other_processes=1), "shared with 1 other active kernel"),
        (replace(KNOWN, other_processes=2), "shared with 2 other active kernels"),
        (
            replace(NOTHING, limit_before_reboot=90_000.0),
            "90,000 tokens a minute before the restart",
        ),
        (replace(NOTHING, was_used=True), "no limits stated yet"),
        (replace(KNOWN, tokens=LimitReading(limit=600, remaining=-5.0)), "0 of 600 tokens left"),
    ],
)
def test_each_known_fact_has_a_line(known: LimitState, text: str) -> None:
    """What is not known is left out."""
    found = limit_lines("m at s", known, 100.0)
    assert found[0] == "m at s"
    assert any(text in line for line in found[1:])
    assert not {"None", "inf", "nan"} & set(" ".join(found).split())


def test_unknown_model_has_no_lines() -> None:
    assert limit_lines("m at s", NOTHING, 100.0) == []
    assert limit_lines("m at s", replace(KNOWN, burst_tokens=math.inf), 100.0)
