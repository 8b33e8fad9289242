"""What a user sees of a map: a pure function of its progress."""

from __future__ import annotations

import time
from typing import Any

import pytest

from nbcodex.models import Limit, MapStats, Usage, UsageTotals
from nbcodex.notebook.display.map import MapState, reduce, status, summary, view

WALL = time.mktime((2026, 11, 24, 14, 0, 0, 0, 0, -1))
TPM = Limit(resource="tokens", window=60.0)


def after(*steps: dict[str, Any], total: int | None = 1_000) -> MapState:
    """Return what is seen after these figures, the first of which are those of the beginning."""
    state = reduce(None, MapStats(map_id="m1", at=100.0, total=total))
    for figures in steps:
        state = reduce(state, MapStats(map_id="m1", total=total, **figures))
    return state


def used(input_tokens: int, output_tokens: int, cost: float = 0.0, **more: int) -> UsageTotals:
    """Return totals of so many tokens."""
    usage = Usage(input_tokens=input_tokens, output_tokens=output_tokens)
    return UsageTotals(usage=usage, cost=cost, **more)


HALF = {
    "at": 160.0,
    "done": 500,
    "sent": 40,
    "waiting": 60,
    "totals": used(50_000, 10_000, 0.5),
}


def test_one_line_tells_all_that_matters() -> None:
    """Answered of all, at the server, waiting, speed, cost so far and expected, time left."""
    said = status(after({**HALF, "at": 159.0}, HALF | {"totals": used(50_000, 12_000, 0.5)}), WALL)
    assert said == (
        "500 of 1,000 rows answered · 40 at the server · 60 waiting · 2,000 tokens/s · "
        "$0.50 of ~$1.00 · about 1 min 00 s left"
    )


def test_a_hold_comes_before_the_time_left() -> None:
    """What is closed for a while takes that while longer."""
    open_ = after({**HALF, "sent": 0})
    held = after({**HALF, "sent": 0, "closed_until": 172.0, "limit": TPM})
    assert held.held > 0
    assert held.left == pytest.approx((open_.left or 0.0) + held.held)


def test_the_time_left_is_told_by_the_limit_where_that_is_slower() -> None:
    """While a full bucket is being spent, the pace is faster than it can stay."""
    limited = after(HALF | {"tokens_per_minute": 12_000.0})
    assert limited.left == pytest.approx(300.0)
    assert after(HALF | {"requests_per_minute": 50.0}).left == pytest.approx(600.0)


@pytest.mark.parametrize(
    "figures",
    [
        {"at": 160.0},
        {"at": 160.0, "done": 900, "reused": 900},
        {**HALF, "outcome": "stopped"},
        {**HALF, "at": 100.0},
    ],
)
def test_no_time_is_told_that_nobody_knows(figures: dict[str, Any]) -> None:
    """Not before some rows were answered anew, and not after the end."""
    assert after(figures).left is None


def test_of_an_iterator_neither_time_nor_cost_is_foretold() -> None:
    """Nobody knows how much is to come."""
    state = after(HALF, total=None)
    assert (state.left, state.expected) == (None, None)
    assert "500 rows answered" in status(state, WALL)


def test_unknown_prices_foretell_nothing() -> None:
    """A sum without some of its parts is no basis."""
    assert after(HALF | {"totals": used(50_000, 10_000, 0.5, unpriced=3)}).expected is None


def test_a_hold_says_which_limit_and_until_when() -> None:
    """While nothing is at the server, that is what is going on."""
    held = {**HALF, "sent": 0, "closed_until": 172.0, "limit": TPM}
    assert "tokens per minute (TPM) reached, goes on at 14:00:12 (in 12.0 s)" in status(
        after(held), WALL
    )
    assert view(after(held), WALL)["phase"] == "held"
    assert view(after(held | {"at": 173.0}), WALL)["phase"] == "going"


def test_the_last_line_says_what_it_came_to() -> None:
    """And how to go on, where something is left."""
    end = {**HALF, "sent": 0, "waiting": 0, "reused": 100, "failed": 2, "parked": 498}
    said = summary(after(end | {"outcome": "stopped", "model": "gpt-5.6-sol"}))
    assert said == (
        "map m1 · 500 of 1,000 rows answered (100 reused) · 2 failed · 498 parked · gpt-5.6-sol · "
        "50,000 in · 10,000 out · $0.50 · 1 min 00 s · `%codex resume m1` goes on"
    )


def test_only_a_few_seconds_are_remembered() -> None:
    """However long it goes on, the state does not grow."""
    state = after(*({"at": 100.0 + n / 4, "totals": used(0, n)} for n in range(2_000)))
    assert len(state.samples) <= 42
    assert state.speed == pytest.approx(4.0)


def test_failures_are_listed_with_how_many_more() -> None:
    """The first few rows, and where the others are."""
    shown = view(after(HALF | {"failed": 7, "failures": (("a", "too\nlarge"),)}), WALL)
    assert shown["failures"] == ["a: too large", "… and 6 more: nbcodex.map.last.failed"]
