"""The records, and the names under which a journal keeps them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nbcodex.journal.codec import decode
from nbcodex.models import (
    DAY,
    MINUTE,
    Limit,
    Origin,
    Reply,
    Request,
    TurnPosition,
    Usage,
    UsageTotals,
    new_id,
)


def test_ids_of_200_000_requests_do_not_repeat() -> None:
    assert len({new_id() for _ in range(200_000)}) == 200_000


def test_records_of_release_0_1_0_are_read_under_their_new_names() -> None:
    place = {"__record__": "Place", "chapter": 2, "number": 7, "begins": False}
    origin = {"__record__": "Origin", "batch": "m1", "item": 3, "of": 9, "place": place}
    text = json.dumps({"__record__": "Request", "prompt": "x", "origin": origin})
    position = TurnPosition(chapter=2, number=7)
    decoded = decode(Request, text)
    assert decoded is not None
    assert decoded.origin == Origin(map_id="m1", row_index=3, row_count=9, position=position)


@pytest.mark.parametrize(
    ("window", "name"),
    [
        (MINUTE, "tokens per minute (TPM)"),
        (DAY, "tokens per day (TPD)"),
        (7 * DAY, "tokens per week (TPW)"),
        (30 * DAY, "tokens per month"),
        (5 * 3600.0, "tokens per 300 minutes"),
        (None, "tokens limit"),
    ],
)
def test_limit_is_named_by_its_window(window: float | None, name: str) -> None:
    assert Limit(resource="tokens", window=window).name == name


@pytest.mark.parametrize(
    ("window", "name"), [(60.0, "rate limit per minute"), (None, "rate limit")]
)
def test_limit_that_names_no_resource_has_its_window_in_its_name(
    window: float | None, name: str
) -> None:
    assert Limit(window=window).name == name


def test_repr_of_a_reply_is_short() -> None:
    """It leaves out what has its default, and times have no more than milliseconds."""
    usage = Usage(input_tokens=8, output_tokens=2)
    reply = Reply(id="3f2a", text="hi", usage=usage, queued=0.0004239710033289157, seconds=1.23456)
    shown = "usage=Usage(input_tokens=8, output_tokens=2), seconds=1.235"
    assert repr(reply) == f"Reply(id='3f2a', text='hi', {shown})"
    assert "cut='max_output_tokens'" in repr(replace(reply, cut="max_output_tokens"))


@pytest.mark.parametrize(("attempts", "unknown"), [(0, 0), (1, 1)])
def test_cost_of_a_request_that_was_not_sent_is_not_unknown(attempts: int, unknown: int) -> None:
    totals = UsageTotals.of(Reply(id="3f2a", status="parked", attempts=attempts))
    assert (totals.unknown, totals.unpriced) == (unknown, unknown)
