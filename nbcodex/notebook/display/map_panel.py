"""What a user sees of a map: a state derived from its figures, and that state as text or data.

The speed, the time left and the expected cost are computed here. All functions are pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from nbcodex.errors import shorten
from nbcodex.models import DAY, MINUTE, MapStats
from nbcodex.notebook.display.panel import stale_output_hint
from nbcodex.rendering.figures import format_dollars, join_figures, token_figures, total_cost
from nbcodex.runtime.clock import format_duration, format_time

SPEED_WINDOW_S = 10.0
# With fewer answers than these, the cost of all rows and the time left would be guesses.
MIN_ANSWERED_SHARE = 0.02
MIN_ANSWERED_ROWS = 3

# Figures and our ids, in which failures of one cause differ: "1,200", "m1a2b3c4d-17". The numbers
# in "HTTP 401" and "gpt-5.6" name a cause.
_VARYING_PARTS = re.compile(r"\bm?[0-9a-f]{8,12}(-\d+)?\b|(?<!HTTP )(?<![\w.-])\d[\d.,:]*(?![\w-])")


@dataclass(frozen=True, slots=True, kw_only=True)
class MapState:
    """All that a user sees of a map."""

    stats: MapStats
    started_at: float
    # `MapStats.paid`, rows answered anew, when the map was resumed: they do not count in its pace.
    paid_before: int = 0
    # Pairs of the last `SPEED_WINDOW_S` seconds: an instant, and the tokens used until then.
    samples: tuple[tuple[float, int], ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """The average speed in `samples`."""
        (start, before), (end, after) = self.samples[0], self.samples[-1]
        return (after - before) / (end - start) if end > start else 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the first figures."""
        return self.stats.at - self.started_at

    @property
    def cooldown_left(self) -> float:
        """Seconds until the model opens again; 0 if it is open or rows are at the server."""
        # Rows at the server still bring answers, so a cooldown is not what the user waits for.
        until = self.stats.cooldown_until
        return 0.0 if until is None or self.stats.sent else max(0.0, until - self.stats.at)

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the last row has ended; None while there is no basis for it."""
        stats, answered = self.stats, self.stats.paid - self.paid_before
        if stats.total is None or stats.outcome:
            return None
        if answered < MIN_ANSWERED_ROWS or self.elapsed <= 0:
            return None
        # The longest of three estimates: by the pace so far, which is too fast while a full token
        # bucket is being spent, and by the two limits, which a slow server does not use up.
        rows_left = max(0, stats.total - stats.ended)
        estimates = [rows_left * self.elapsed / answered]
        if stats.tokens_per_minute:
            tokens_per_row = (stats.totals.usage.total_tokens or 0) / stats.paid
            estimates.append(rows_left * tokens_per_row / stats.tokens_per_minute * MINUTE)
        if stats.requests_per_minute:
            estimates.append(rows_left / stats.requests_per_minute * MINUTE)
        return self.cooldown_left + max(estimates)

    @property
    def expected_cost(self) -> float | None:
        """Estimated US dollars for all rows; None while there is no basis for it."""
        stats = self.stats
        if stats.total is None or not stats.totals.cost or stats.totals.unpriced:
            return None
        if stats.paid < MIN_ANSWERED_SHARE * stats.total:
            return None
        return stats.totals.cost * (1 + max(0, stats.total - stats.ended) / stats.paid)


def apply_stats(state: MapState | None, stats: MapStats) -> MapState:
    """Return the state after new figures."""
    sample = (stats.at, stats.totals.usage.total_tokens or 0)
    # A map that was stopped can be resumed with the same listener: speed and time begin again.
    if state is None or (state.stats.outcome and not stats.outcome):
        return MapState(stats=stats, started_at=stats.at, paid_before=stats.paid, samples=(sample,))
    recent = [old for old in state.samples if stats.at - old[0] <= SPEED_WINDOW_S]
    return replace(state, stats=stats, samples=(*(recent or state.samples[-1:]), sample))


def status_line(state: MapState, wall: float) -> str:
    """Return how far the map has come, in one line; `wall` is in seconds since the epoch."""
    stats, texts = state.stats, _short_texts(state)
    return join_figures(
        texts["rows"] + _answer_kinds(stats),
        _cooldown_text(state, wall),
        shorten(stats.stage, 120),  # what the map waits for, if it is not a limit
        _count(stats.sent, "at the server"),
        _count(stats.waiting, "waiting"),
        f"{texts['speed']} tokens/s" if texts["speed"] else "",
        texts["cost"],
        f"{texts['left']} left" if texts["left"] else "",
        _count(stats.failed, "failed"),
        _count(stats.parked, "parked"),
    )


def summary_line(state: MapState) -> str:
    """Return the result of a map that has ended, in one line."""
    stats, totals, usage = state.stats, state.stats.totals, state.stats.totals.usage
    rows = f"{stats.done:,} answered" if stats.done == stats.total else _rows_answered(stats)
    unfinished = stats.total is not None and (stats.outcome not in {"", "done"} or stats.parked > 0)
    return join_figures(
        f"map {stats.map_id}",
        rows + _answer_kinds(stats),
        _count(stats.failed, "failed"),
        _count(stats.parked, "parked"),
        shorten(stats.model or "", 80),
        *(token_figures(usage) if usage.total_tokens else ()),
        total_cost(totals),
        format_duration(state.elapsed),
        "simulated" if stats.simulated else "",
        f"`%codex resume {stats.map_id}` continues it" if unfinished else "",
    )


def map_data(state: MapState, wall: float) -> dict[str, Any]:
    """Return what the page shows, as numbers and short texts."""
    stats, usage = state.stats, state.stats.totals.usage
    cooldown = _cooldown_text(state, wall)
    return {
        "phase": stats.outcome or ("cooldown" if cooldown else "running"),
        "model": shorten(stats.model or "", 80),
        "total": stats.total,
        "counts": {
            "reused": stats.reused,
            "done": stats.paid,
            "failed": stats.failed,
            "parked": stats.parked,
            "sent": stats.sent,
        },
        "waiting": stats.waiting,
        "tokens": join_figures(*token_figures(usage)),
        "stage": cooldown or shorten(stats.stage, 120),
        "elapsed": _rounded_duration(state.elapsed),
        "failures": failure_lines(stats),
        # In place of the widget, where no kernel updates it.
        "text": f"Codex map {stats.map_id} · {stale_output_hint(stats.map_id)}",
        **_short_texts(state),
    }


def failure_lines(stats: MapStats) -> list[str]:
    """Return a line for each cause of the first failures, and one for the number of the others."""
    causes: dict[str, list[tuple[str, str]]] = {}  # by the message without `_VARYING_PARTS`
    for row, error in stats.failures:
        causes.setdefault(_VARYING_PARTS.sub("", error), []).append((shorten(row, 60), error))
    lines = [
        f"{', '.join(row for row, _ in failures)}: {shorten(failures[0][1], 200)}"
        for failures in causes.values()
    ]
    if (unlisted := stats.failed - len(stats.failures)) > 0:
        lines.append(f"… and {unlisted:,} more: nbcodex.map.last.failed")
    return lines


def _short_texts(state: MapState) -> dict[str, str]:
    """Return the figures that the line of status and the widget share; "" if unknown."""
    totals, expected = state.stats.totals, state.expected_cost
    left, speed = state.seconds_left, state.tokens_per_second
    of_expected = "" if expected is None else f" of ~{format_dollars(expected)}"
    return {
        "rows": _rows_answered(state.stats),
        "speed": f"{speed:,.0f}" if speed >= 1 else "",
        "cost": f"{total_cost(totals)}{of_expected}" if totals.cost else "",
        "left": "" if left is None else f"about {_rounded_duration(left)}",
    }


def _count(count: int | None, noun: str) -> str:
    return f"{count:,} {noun}" if count else ""


def _rows_answered(stats: MapStats) -> str:
    of_total = "" if stats.total is None else f" of {stats.total:,}"
    return f"{stats.done:,}{of_total} rows answered"


def _answer_kinds(stats: MapStats) -> str:
    """Return in brackets how many of the answers were reused or cut; empty if none."""
    kinds = _count(stats.reused, "reused"), _count(stats.cut, "cut by output limit or filter")
    return f" ({', '.join(filter(None, kinds))})" if any(kinds) else ""


def _cooldown_text(state: MapState, wall: float) -> str:
    if not (left := state.cooldown_left):
        return ""
    name = state.stats.limit.name if state.stats.limit else "a limit"
    until = format_time(wall + left, now=wall)
    return f"{name} reached, continues at {until} (in {format_duration(left)})"


def _rounded_duration(seconds: float) -> str:
    # The tenths of a second that `format_duration` shows would mean nothing in an estimate.
    if seconds >= 999 * DAY:
        return "a very long time"
    return f"{seconds:.0f} s" if seconds < 59.5 else format_duration(seconds)
