"""What a user sees of a map: a pure function of its progress, and its text twin.

Owns speed, the time that is left, and the expected cost. Must not know IPython, widgets, or what
time it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nbcodex.errors import shorten
from nbcodex.models import DAY, MINUTE, MapStats
from nbcodex.rendering.figures import format_dollars
from nbcodex.runtime.clock import format_duration, format_time

RECENT = 10.0
"""Seconds over which the speed is taken."""
SURE = 0.02
"""The share of the rows that must be answered before the cost of all is told."""

Sample = tuple[float, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MapState:
    """All that a user sees of a map.

    Parameters
    ----------
    now : Progress
        The latest figures.
    began : float
        The instant of the first ones.
    paid_before : int
        Rows that were answered anew when these figures began.
    samples : tuple of (float, int)
        Instants of the last seconds, and the tokens at each.
    """

    now: MapStats
    began: float
    paid_before: int = 0
    samples: tuple[Sample, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self.now.totals.usage.total_tokens or 0

    @property
    def speed(self) -> float:
        """Tokens a second of late."""
        (then, before), (at, tokens) = self.samples[0], self.samples[-1]
        return (tokens - before) / (at - then) if at > then else 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return self.now.at - self.began

    @property
    def held(self) -> float:
        """Seconds until the model opens again; 0 where it is open."""
        until = self.now.closed_until
        return 0.0 if until is None or self.now.sent else max(0.0, until - self.now.at)

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take, about; None where nobody can say.

        Both by the pace so far and by the limits, whichever takes longer: a full bucket is spent
        faster than it fills, and a slow server does not use up its limit. A hold comes first.
        """
        now, paid = self.now, self.now.paid - self.paid_before
        if now.total is None or paid < 3 or now.outcome or self.elapsed <= 0:
            return None
        rest = max(0, now.total - now.ended)
        times = [rest * self.elapsed / paid]
        if now.tokens_per_minute:
            times.append(rest * self.tokens / now.paid / now.tokens_per_minute * MINUTE)
        if now.requests_per_minute:
            times.append(rest / now.requests_per_minute * MINUTE)
        return self.held + max(times)

    @property
    def expected(self) -> float | None:
        """US dollars that all rows will cost, about; None where nobody can say."""
        now = self.now
        if (
            now.total is None
            or not now.totals.cost
            or now.totals.unpriced
            or now.paid < SURE * now.total
        ):
            return None
        return now.totals.cost * (1 + max(0, now.total - now.ended) / now.paid)


def reduce(state: MapState | None, progress: MapStats) -> MapState:
    """Return what is seen after hearing of progress."""
    tokens = progress.totals.usage.total_tokens or 0
    sample = (progress.at, tokens)
    if state is None or (state.now.outcome and not progress.outcome):
        return MapState(
            now=progress, began=progress.at, paid_before=progress.paid, samples=(sample,)
        )
    recent = [old for old in state.samples if progress.at - old[0] <= RECENT]
    return replace(state, now=progress, samples=(*(recent or state.samples[-1:]), sample))


def status(state: MapState, wall: float) -> str:
    """Return how far it has come, in one line."""
    now = state.now
    left = state.left
    return " · ".join(
        filter(
            None,
            (
                counted(now),
                holding(state, wall),
                shorten(now.stage, 120),
                f"{now.sent:,} at the server" if now.sent else "",
                f"{now.waiting:,} waiting" if now.waiting else "",
                f"{state.speed:,.0f} tokens/s" if state.speed >= 1 else "",
                cost(state),
                "" if left is None else f"about {spell_roughly(left)} left",
                f"{now.failed:,} failed" if now.failed else "",
            ),
        )
    )


def counted(now: MapStats) -> str:
    """Return how many rows have an answer, of how many."""
    if now.total is None:
        return f"{now.done:,} rows answered"
    return f"{now.done:,} of {now.total:,} rows answered"


def holding(state: MapState, wall: float) -> str:
    """Return which limit closes the model, and until when."""
    if not state.held:
        return ""
    name = state.now.limit.name if state.now.limit else "a limit"
    until = format_time(wall + state.held, now=wall)
    return f"{name} reached, goes on at {until} (in {format_duration(state.held)})"


def cost(state: MapState) -> str:
    """Return what it has cost so far, and what all of it may."""
    if not state.now.totals.cost:
        return ""
    expected = state.expected
    return format_dollars(state.now.totals.cost) + (
        "" if expected is None else f" of ~{format_dollars(expected)}"
    )


def summary(state: MapState) -> str:
    """Return what a map came to, in one line."""
    now = state.now
    reused = f" ({now.reused:,} reused)" if now.reused else ""
    rows = f"{now.done:,} answered" if now.done == now.total else counted(now)
    return " · ".join(
        filter(
            None,
            (
                f"map {now.map_id}",
                f"{rows}{reused}",
                f"{now.failed:,} failed" if now.failed else "",
                f"{now.parked:,} parked" if now.parked else "",
                shorten(now.model, 80) if now.model else "",
                f"{now.totals.usage.input_tokens:,} in" if now.totals.usage.input_tokens else "",
                f"{now.totals.usage.output_tokens:,} out" if now.totals.usage.output_tokens else "",
                format_dollars(now.totals.cost) if now.totals.cost else "",
                f"cost of {now.totals.unpriced:,} unknown" if now.totals.unpriced else "",
                format_duration(state.elapsed),
                "simulated" if now.simulated else "",
                f"`%codex resume {now.map_id}` goes on" if _goes_on(now) else "",
            ),
        )
    )


def failures(now: MapStats) -> list[str]:
    """Return a line for each of the first rows without an answer, and how many more there are."""
    lines = [f"{shorten(row, 60)}: {shorten(why, 200)}" for row, why in now.failures]
    more = now.failed - len(lines)
    return [*lines, f"… and {more:,} more: nbcodex.map.last.failed"] if more > 0 else lines


def view(state: MapState, wall: float) -> dict[str, Any]:
    """Return what the browser shows, as numbers and short texts."""
    now = state.now
    left, held = state.left, holding(state, wall)
    return {
        "phase": now.outcome or ("held" if held else "going"),
        "batch": now.map_id,
        "model": shorten(now.model, 80) if now.model else "",
        "total": now.total,
        "rows": counted(now),
        "parts": {
            "reused": now.reused,
            "done": now.paid,
            "failed": now.failed,
            "parked": now.parked,
            "sent": now.sent,
        },
        "waiting": now.waiting,
        "speed": f"{state.speed:,.0f}" if state.speed >= 1 else "",
        "tokens": f"{now.totals.usage.input_tokens:,} in · {now.totals.usage.output_tokens:,} out",
        "cost": cost(state),
        "left": "" if left is None else f"about {spell_roughly(left)}",
        "held": held or shorten(now.stage, 120),
        "elapsed": spell_roughly(state.elapsed),
        "failures": failures(now),
        "line": status(state, wall),
    }


def spell_roughly(seconds: float) -> str:
    """Return a duration without the digits that nobody can know."""
    if seconds >= 999 * DAY:
        return "a very long time"
    return f"{seconds:.0f} s" if seconds < 59.5 else format_duration(seconds)


def _goes_on(now: MapStats) -> bool:
    return now.total is not None and (now.outcome not in {"", "done"} or now.parked > 0)
