"""What a user sees of a map, as a function of its figures."""

from __future__ import annotations

import time
from typing import Any

import pytest

from nbcodex.models import Limit, MapStats, Usage, UsageTotals
from nbcodex.notebook.display import text_views, widget_views
from nbcodex.notebook.display.map_panel import (
    MapState,
    apply_stats,
    map_data,
    status_line,
    summary_line,
)

WALL = time.mktime((2026, 11, 24, 14, 0, 0, 0, 0, -1))
TPM = Limit(resource="tokens", window=60.0)


def state_after(*steps: dict[str, Any], total: int | None = 1_000) -> MapState:
    """Return the state after these figures, which follow those of the start."""
    state = apply_stats(None, MapStats(map_id="m1", at=100.0, total=total))
    for figures in steps:
        state = apply_stats(state, MapStats(map_id="m1", total=total, **figures))
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


def test_status_line_of_a_running_map() -> None:
    line = status_line(
        state_after({**HALF, "at": 159.0}, HALF | {"totals": used(50_000, 12_000, 0.5)}), WALL
    )
    assert line == (
        "500 of 1,000 rows answered · 40 at the server · 60 waiting · 2,000 tokens/s · "
        "$0.50 of ~$1.00 · about 1 min 00 s left"
    )


def test_counts_of_the_status_line_add_up_to_the_rows() -> None:
    """Special answers are in parentheses, because they are among those counted before."""
    counts = {"sent": 40, "waiting": 450, "failed": 7, "parked": 3, "reused": 20, "cut": 5}
    line = status_line(state_after(HALF | counts), WALL)
    assert line.startswith(
        "500 of 1,000 rows answered (20 reused, 5 cut by output limit or filter) · "
        "40 at the server · 450 waiting · "
    )
    assert line.endswith(" · 7 failed · 3 parked")


def test_time_left_includes_the_cooldown() -> None:
    open_ = state_after({**HALF, "sent": 0})
    closed = state_after({**HALF, "sent": 0, "cooldown_until": 172.0, "limit": TPM})
    assert closed.cooldown_left > 0
    assert closed.seconds_left == pytest.approx((open_.seconds_left or 0.0) + closed.cooldown_left)


def test_time_left_follows_the_slowest_limit() -> None:
    """While a full bucket is being spent, the pace is faster than it can stay."""
    limited = state_after(HALF | {"tokens_per_minute": 12_000.0})
    assert limited.seconds_left == pytest.approx(300.0)
    assert state_after(HALF | {"requests_per_minute": 50.0}).seconds_left == pytest.approx(600.0)


@pytest.mark.parametrize(
    "figures",
    [
        {"at": 160.0},
        {"at": 160.0, "done": 900, "reused": 900},
        {**HALF, "outcome": "stopped"},
        {**HALF, "at": 100.0},
    ],
)
def test_time_left_is_unknown_without_a_basis(figures: dict[str, Any]) -> None:
    """It needs some rows that were answered anew, and ends with the map."""
    assert state_after(figures).seconds_left is None


def test_iterator_has_no_estimates() -> None:
    """Without a number of rows, neither time nor cost can be estimated."""
    state = state_after(HALF, total=None)
    assert (state.seconds_left, state.expected_cost) == (None, None)
    assert "500 rows answered" in status_line(state, WALL)


def test_cost_is_not_estimated_with_unknown_prices() -> None:
    assert (
        state_after(HALF | {"totals": used(50_000, 10_000, 0.5, unpriced=3)}).expected_cost is None
    )


def test_cooldown_names_its_limit_and_end() -> None:
    """While rows are at the server, or after it, there is no cooldown to show."""
    closed = {**HALF, "sent": 0, "cooldown_until": 172.0, "limit": TPM}
    assert "tokens per minute (TPM) reached, continues at 14:00:12 (in 12.0 s)" in status_line(
        state_after(closed), WALL
    )
    assert map_data(state_after(closed), WALL)["phase"] == "cooldown"
    assert map_data(state_after(closed | {"at": 173.0}), WALL)["phase"] == "running"


def test_summary_line_of_a_stopped_map() -> None:
    """It says how to continue if something is left."""
    end = {**HALF, "sent": 0, "waiting": 0, "reused": 100, "failed": 2, "parked": 498}
    line = summary_line(state_after(end | {"outcome": "stopped", "model": "gpt-5.6-sol"}))
    assert line == (
        "map m1 · 500 of 1,000 rows answered (100 reused) · 2 failed · 498 parked · gpt-5.6-sol · "
        "50,000 in · 10,000 out · $0.50 · 1 min 00 s · `%codex resume m1` continues it"
    )


def test_estimated_tokens_of_a_map_are_marked() -> None:
    """As those of a cell are."""
    usage = Usage(input_tokens=57, output_tokens=6, estimated=True)
    state = state_after(HALF | {"totals": UsageTotals(usage=usage, cost=0.5)})
    assert " · ~57 in · ~6 out · ~$0.50 · " in summary_line(state)
    assert map_data(state, WALL)["tokens"] == "~57 in · ~6 out"
    unused = state_after(HALF | {"totals": UsageTotals()})
    assert "0" not in summary_line(unused).split("answered")[1].replace("1 min 00 s", "")


@pytest.mark.parametrize(
    ("cost", "running", "ended"),
    [(0.5, " · at least $0.50", " · at least $0.50 · "), (0.0, "", " · cost of 3 unknown · ")],
)
def test_sum_with_unknown_costs_is_a_lower_bound(cost: float, running: str, ended: str) -> None:
    """Without any known cost, a map that has ended says of how many rows it is unknown."""
    state = state_after(HALF | {"totals": used(50_000, 10_000, cost, unpriced=3)})
    assert map_data(state, WALL)["cost"] == running.removeprefix(" · ")
    assert running in status_line(state, WALL)
    assert ended in summary_line(state)


def test_state_keeps_a_few_seconds_of_samples() -> None:
    """However long the map runs, the state does not grow."""
    state = state_after(*({"at": 100.0 + n / 4, "totals": used(0, n)} for n in range(2_000)))
    assert len(state.samples) <= 42
    assert state.tokens_per_second == pytest.approx(4.0)


def test_first_failures_are_listed() -> None:
    """The line after them says how many more there are, and where."""
    shown = map_data(state_after(HALF | {"failed": 7, "failures": (("a", "too\nlarge"),)}), WALL)
    assert shown["failures"] == ["a: too large", "… and 6 more: nbcodex.map.last.failed"]


def test_rows_that_failed_for_one_reason_share_a_line() -> None:
    """The figures and ids in the reason may differ: the line has those of the first row."""
    failures = (
        ("a", "300 of 500 used: resume m1a2b3c4d-0"),
        ("b", "too large"),
        ("c", "310 of 500 used: resume m1a2b3c4d-2"),
    )
    shown = map_data(state_after(HALF | {"failed": 3, "failures": failures}), WALL)
    assert shown["failures"] == ["a, c: 300 of 500 used: resume m1a2b3c4d-0", "b: too large"]


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        (
            "Bad gateway (HTTP 502). Retried for 6.2 s.",
            "Bad gateway (HTTP 502). Retried for 7 s.",
            1,
        ),
        ("3f2a3f2a3f2a is still running", "4e5b4e5b4e5b is still running", 1),
        ("row m1a2b3c4d-1 is lost", "row m1a2b3c4d-21 is lost", 1),
        ("Refused (HTTP 401).", "Refused (HTTP 500).", 2),
        ("No model gpt-5.6-sol", "No model gpt-4o", 2),
        ("No model o3", "No model o4", 2),
    ],
)
def test_only_figures_and_ids_may_differ_in_one_cause(one: str, other: str, count: int) -> None:
    """An HTTP status and the name of a model are causes of their own."""
    failures = (("a", one), ("b", other))
    shown = map_data(state_after(HALF | {"failed": 2, "failures": failures}), WALL)
    assert len(shown["failures"]) == count


def test_stop_click_interrupts_only_a_running_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """A click that arrives when the map has ended must not interrupt the next cell."""
    interrupts: list[None] = []
    monkeypatch.setattr(widget_views._thread, "interrupt_main", lambda: interrupts.append(None))
    monkeypatch.setattr(text_views, "display", lambda *_, **__: None)
    monkeypatch.setattr(text_views, "update_display", lambda *_, **__: None)
    view = widget_views.WidgetMapView()
    view.render(state_after(HALF), WALL)
    widget = view._widget
    assert widget is not None
    widget._receive(widget, {"type": "action", "name": "stop", "id": 1}, [])
    assert len(interrupts) == 1
    view.close({"text/plain": "done"})
    widget._receive(widget, {"type": "action", "name": "stop", "id": 2}, [])
    assert len(interrupts) == 1
