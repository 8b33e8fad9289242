"""What is known of limits, in plain words."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nbcodex.models import Limit, LimitReading
from nbcodex.notebook.monitor.limits_text import lines
from nbcodex.ratelimit.sharing import LimitHistory, LimitState

KNOWN = LimitState(
    tokens=LimitReading(limit=600_000, remaining=300_000, full_in=30.0),
    requests=None,
    undeclared=(),
    policy="kept",
    declared=True,
    burst_tokens=None,
    foreign_rate=0.0,
    margin=0.005,
    other_processes=0,
    was_used=True,
    closed_until=None,
    limit=None,
    history=None,
)
NOTHING = replace(KNOWN, tokens=None, declared=False, was_used=False)
LEARNT = LimitHistory(policy="refunded", output_share=0.25, input_ratio=1.0)
TPM = Limit(resource="tokens", window=60.0)
RPD = Limit(resource="requests", window=86_400.0, limit=200, used=30)


@pytest.mark.parametrize(
    ("known", "says"),
    [
        (KNOWN, "300,000 of 600,000 tokens left, 600,000 a minute, full in 30.0 s"),
        (KNOWN, "charged, as long as nothing else is learnt: input and the whole of max_output"),
        (KNOWN, "kept back: 0.5% of the limit"),
        (replace(KNOWN, policy="refunded", history=LEARNT), "given back at its end (learnt"),
        (replace(KNOWN, policy="refunded", history=LEARNT), "answers use 25% of it"),
        (
            replace(KNOWN, closed_until=110.0, limit=TPM),
            "closed for another 10.0 s (tokens per minute",
        ),
        (replace(KNOWN, declared=False), "found out by trial"),
        (replace(KNOWN, burst_tokens=5_000.0), "no more than about 5,000 tokens"),
        (
            replace(KNOWN, undeclared=(RPD,)),
            "requests per day (RPD): limit 200, used 30, by a refusal",
        ),
        (replace(KNOWN, foreign_rate=100.0), "somebody else takes about 6,000 tokens a minute"),
        (replace(KNOWN, other_processes=1), "shared with 1 other active kernel"),
        (replace(KNOWN, other_processes=2), "shared with 2 other active kernels"),
        (replace(NOTHING, limit_before_reboot=90_000.0), "90,000 tokens a minute, last time"),
        (replace(NOTHING, was_used=True), "no limits told yet"),
        (replace(KNOWN, tokens=LimitReading(limit=600, remaining=-5.0)), "0 of 600 tokens left"),
    ],
)
def test_it_is_said(known: LimitState, says: str) -> None:
    """Each thing that is known is said, and what is not is left out."""
    told = lines("m at s", known, 100.0)
    assert told[0] == "m at s"
    assert any(says in line for line in told[1:])
    assert not any(word in " ".join(told) for word in ("None", "inf", "nan"))


def test_nothing_is_said_of_what_is_not_known() -> None:
    """A model that nobody has asked and nothing is known of makes no lines."""
    assert lines("m at s", NOTHING, 100.0) == []
    assert lines("m at s", replace(KNOWN, burst_tokens=math.inf), 100.0)
