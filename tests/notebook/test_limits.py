"""What is known of limits, in plain words."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nbcodex.models import Gauge, Limit
from nbcodex.notebook.monitor.limits_text import lines
from nbcodex.ratelimit.prior import Known, Prior

KNOWN = Known(
    tokens=Gauge(limit=600_000, remaining=300_000, full_in=30.0),
    requests=None,
    windows=(),
    policy="kept",
    told=True,
    hidden=None,
    leak=0.0,
    margin=0.005,
    others=0,
    used=True,
    hold=None,
    limit=None,
    learnt=None,
)
NOTHING = replace(KNOWN, tokens=None, told=False, used=False)
LEARNT = Prior(policy="refunded", share=0.25, fit=1.0)
TPM = Limit(resource="tokens", window=60.0)
RPD = Limit(resource="requests", window=86_400.0, limit=200, used=30)


@pytest.mark.parametrize(
    ("known", "says"),
    [
        (KNOWN, "300,000 of 600,000 tokens left, 600,000 a minute, full in 30.0 s"),
        (KNOWN, "charged, as long as nothing else is learnt: input and the whole of max_output"),
        (KNOWN, "kept back: 0.5% of the limit"),
        (replace(KNOWN, policy="refunded", learnt=LEARNT), "given back at its end (learnt"),
        (replace(KNOWN, policy="refunded", learnt=LEARNT), "answers use 25% of it"),
        (replace(KNOWN, hold=110.0, limit=TPM), "closed for another 10.0 s (tokens per minute"),
        (replace(KNOWN, told=False), "found out by trial"),
        (replace(KNOWN, hidden=5_000.0), "no more than about 5,000 tokens"),
        (
            replace(KNOWN, windows=(RPD,)),
            "requests per day (RPD): limit 200, used 30, by a refusal",
        ),
        (replace(KNOWN, leak=100.0), "somebody else takes about 6,000 tokens a minute"),
        (replace(KNOWN, others=1), "shared with 1 other active kernel"),
        (replace(KNOWN, others=2), "shared with 2 other active kernels"),
        (replace(NOTHING, earlier=90_000.0), "90,000 tokens a minute, last time"),
        (replace(NOTHING, used=True), "no limits told yet"),
        (replace(KNOWN, tokens=Gauge(limit=600, remaining=-5.0)), "0 of 600 tokens left"),
    ],
)
def test_it_is_said(known: Known, says: str) -> None:
    """Each thing that is known is said, and what is not is left out."""
    told = lines("m at s", known, 100.0)
    assert told[0] == "m at s"
    assert any(says in line for line in told[1:])
    assert not any(word in " ".join(told) for word in ("None", "inf", "nan"))


def test_nothing_is_said_of_what_is_not_known() -> None:
    """A model that nobody has asked and nothing is known of makes no lines."""
    assert lines("m at s", NOTHING, 100.0) == []
    assert lines("m at s", replace(KNOWN, hidden=math.inf), 100.0)
