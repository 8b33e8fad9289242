"""The table and the plot of the outcomes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from nbcodex.simulator.knobs import Policy
from tests.benchmarks.peers.definitions import ALL, Peer
from tests.benchmarks.peers.trial import Outcome
from tests.benchmarks.table import table

POLICIES: tuple[Policy, ...] = get_args(Policy)
TABLE = Path(__file__).parents[1] / "peers.md"
PLOT = Path(__file__).parents[3] / "notebooks" / "images" / "peers.png"
OURS = ALL[0].name
Size = tuple[int, int]  # the number of prompts, and the tokens per minute
MAX_FAILED_PERCENT = 10.0  # if a run gave up more of its prompts, its time means nothing
INTRODUCTION = """\
# Measured: the rate limiter, compared with other libraries

```console
python -m tests.benchmarks peers
```

Efficiency: the time that a first-come-first-served oracle takes (it knows limits, policy and level,
not the outputs) over the time taken, with the same prompts and latencies, from a full bucket on.
The server keeps the charge for `max_output`, or refunds what was not used, or charges what was
used. Medians, lowest and highest. Virtual time; libraries as they are on PyPI. A time in brackets
is that of a run that gave some prompts up; a run that gave up more than 10 % has none. nbcodex is
configured with nothing; libraries that are configured with means are given those of the prompts,
which no user knows beforehand. 429s for each policy in turn. CPU includes the simulated server's.
"Not run" is for lack of time. With fewer prompts and a proportionally smaller limit, a job has the
same number of buckets.

More than 1 is possible, by another order than that given: aiolimiter and token-throttle send any
request that fits, so the large prompts wait until the end of the job, even if they came first. An
oracle that sends by size is faster than this one by 2 to 4 points where the server refunds (2,000
prompts, four seeds), as fewer answers are in flight at the end. nbcodex keeps the order, except for
the last four buckets of a long job, and no request waits more than twice as long.

![efficiency of each](../../notebooks/images/peers.png)"""
REAL = """\
## In real time

Some of the runs again, with real clocks and sockets and the limits scaled, so that each takes two
minutes at most: `python -m tests.benchmarks.peers --real --tpm 300000 --prompts 1200`. Beside each,
the same run in virtual time.

"""


@dataclass(frozen=True, slots=True)
class Run:
    """An outcome, and the seconds that the oracle takes for the same."""

    outcome: Outcome
    oracle: float

    @property
    def efficiency(self) -> float:
        """The oracle's time over the peer's; meaningless if many prompts were given up."""
        return self.oracle / self.outcome.seconds

    @property
    def refused(self) -> float:
        """Percent of all requests that met a 429."""
        return 100 * self.outcome.refused / self.outcome.requests

    @property
    def failed(self) -> float:
        """Percent of the prompts that were given up."""
        return 100 * self.outcome.failed / self.outcome.count

    @property
    def cpu(self) -> float:
        """Seconds of CPU for 1,000 prompts, including the simulated server."""
        return 1000 * self.outcome.cpu / self.outcome.count


def _cell(runs: Sequence[Run]) -> str:
    """Return the median efficiency of some seeds, with its range; or that prompts were given up."""
    if not runs:
        return "-"
    values = [run.efficiency for run in runs]
    figure = f"{statistics.median(values):.3f}"
    if len(values) > 1:
        figure += f" ({min(values):.3f} to {max(values):.3f})"
    if failed := max(run.failed for run in runs):
        return (
            f"gave up {failed:.2g} %"
            if failed > MAX_FAILED_PERCENT
            else f"[{figure}], gave up {failed:.2g} %"
        )
    return figure


def _mean(runs: Iterable[Run], figure: str) -> float:
    return statistics.fmean(getattr(run, figure) for run in runs)


def _row(peer: Peer, runs: Sequence[Run], missing: Mapping[str, str]) -> list[str]:
    by_policy = {policy: [r for r in runs if r.outcome.policy == policy] for policy in POLICIES}
    seeds = "/".join(str(len(by_policy[policy])) for policy in POLICIES)
    if not runs:
        return [peer.name, peer.configured_with, missing.get(peer.name, "not run"), *[""] * 6]
    refused = " / ".join(
        f"{_mean(by_policy[p], 'refused'):.2g}" if by_policy[p] else "-" for p in POLICIES
    )
    twice = max(run.outcome.twice for run in runs)
    cpu = _mean(runs, "cpu")
    cells = [_cell(by_policy[policy]) for policy in POLICIES]
    return [peer.name, peer.configured_with, *cells, refused, str(twice), f"{cpu:.2g}", seeds]


def lowest_median(runs: Sequence[Run]) -> float | None:
    """Return the lowest median of the policies; None if any prompt was given up."""
    by_policy = [[r for r in runs if r.outcome.policy == policy] for policy in POLICIES]
    if not all(by_policy) or any(run.failed for run in runs):
        return None
    return min(statistics.median(r.efficiency for r in rows) for rows in by_policy)


def runs_of(runs: Iterable[Run], peer: str, size: Size) -> list[Run]:
    """Return a peer's runs in virtual time of one size."""
    return [
        run
        for run in runs
        if run.outcome.peer == peer
        and not run.outcome.real
        and (run.outcome.count, run.outcome.tpm) == size
    ]


def sizes(runs: Iterable[Run]) -> list[Size]:
    """Return the sizes that more than three peers were run with, those with most peers first."""
    peers: dict[Size, set[str]] = {}
    for run in runs:
        if not run.outcome.real:
            size = run.outcome.count, run.outcome.tpm
            peers.setdefault(size, set()).add(run.outcome.peer)
    compared = [size for size, names in peers.items() if len(names) > 3]
    return sorted(compared, key=lambda size: (-len(peers[size]), -size[0]))


def write(runs: Sequence[Run], missing: Mapping[str, str]) -> None:
    """Write the tables."""
    parts = [INTRODUCTION]
    for size in sizes(runs):
        heads = ["peer", "configured with", *POLICIES, "429s, %", "twice", "CPU, s/1,000", "seeds"]
        rows = [
            _row(peer, found, missing)
            for peer in ALL
            if (found := runs_of(runs, peer.name, size)) or size == sizes(runs)[0]
        ]
        parts.append(f"## {size[0]:,} prompts at {size[1]:,} tokens a minute")
        parts += [table(heads, rows), _comparison_lines(runs, size)]
    descriptions = [[peer.name, peer.description] for peer in ALL]
    parts += [_real_time_section(runs), "## How each is used", table(["peer", "use"], descriptions)]
    TABLE.write_text("\n\n".join(parts) + "\n")


def _comparison_lines(runs: Sequence[Run], size: Size) -> str:
    """Return sentences that compare nbcodex with the best peers."""
    lines = []
    lowest = {
        p.name: w for p in ALL if (w := lowest_median(runs_of(runs, p.name, size))) is not None
    }
    if ours := lowest.pop(OURS, None):
        name = max(lowest, key=lowest.__getitem__, default="")
        if name:
            lines.append(
                f"In the worst policy, among those that answer everything: {OURS} {ours:.3f}; "
                f"{name} {lowest[name]:.3f}: {100 * (ours - lowest[name]):+.1f} points."
            )
    for policy in POLICIES:
        medians = {
            peer.name: statistics.median(r.efficiency for r in found)
            for peer in ALL
            if (found := [r for r in runs_of(runs, peer.name, size) if r.outcome.policy == policy])
            and not any(r.failed for r in found)
        }
        own = medians.pop(OURS, None)
        # No user knows the means beforehand.
        realistic = [p.name for p in ALL if p.name in medians and "mean" not in p.configured_with]
        if own is not None and realistic:
            name = max(realistic, key=medians.__getitem__)
            line = (
                f"Under *{policy}* the best peer that is configured with the limits is {name} with "
                f"{medians[name]:.3f}, {OURS} has {own:.3f}: "
                f"{100 * (own - medians[name]):+.1f} points."
            )
            first = max(medians, key=medians.__getitem__)
            if medians[first] > medians[name]:
                line += f" Configured with means as well, {first} has {medians[first]:.3f}."
            lines.append(line)
    return "\n".join(f"- {line}" for line in lines)


def _real_time_section(runs: Sequence[Run]) -> str:
    """Return a table of the runs in real time, each beside the same one in virtual time."""
    rows = []
    for run in runs:
        o = run.outcome
        if not o.real:
            continue
        virtual = [
            v
            for v in runs
            if not v.outcome.real
            and (v.outcome.peer, v.outcome.policy, v.outcome.seed) == (o.peer, o.policy, o.seed)
            and (v.outcome.count, v.outcome.tpm) == (o.count, o.tpm)
        ]
        twin = virtual[0] if virtual else None
        cells = [f"{twin.efficiency:.3f}", f"{twin.refused:.2g}"] if twin else ["-", "-"]
        size = f"{o.count:,} at {o.tpm:,}"
        real = [f"{run.efficiency:.3f}", f"{run.refused:.2g}", str(o.failed)]
        rows.append([o.peer, o.policy, size, *real, *cells])
    heads = ["peer", "policy", "prompts, TPM", "real", "429s, %", "given up", "virtual", "429s, %"]
    return REAL + table(heads, rows)


def plot(runs: Sequence[Run]) -> None:
    """Draw the efficiency of each peer under each policy; hollow where prompts were given up."""
    import matplotlib as mpl

    if not sizes(runs):
        return
    size = sizes(runs)[0]
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [peer for peer in ALL if runs_of(runs, peer.name, size)]
    figure, axes = plt.subplots(figsize=(7.5, 0.32 * len(shown) + 1.1), layout="constrained")
    for policy, shape, colour in zip(POLICIES, "os^", ("C0", "C1", "C2"), strict=True):
        for place, peer in enumerate(shown):
            found = [r for r in runs_of(runs, peer.name, size) if r.outcome.policy == policy]
            if not found or max(r.failed for r in found) > MAX_FAILED_PERCENT:
                continue
            value = statistics.median(r.efficiency for r in found)
            face = "none" if any(r.failed for r in found) else colour
            axes.plot(value, -place, shape, color=colour, mfc=face, ms=6, clip_on=False)
        axes.plot([], [], shape, color=colour, label=policy)
    axes.set_yticks([-i for i in range(len(shown))], [peer.name for peer in shown])
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("efficiency: the oracle's time over the time taken")
    axes.axvline(1, color="0.7", lw=0.8, zorder=0)
    axes.grid(axis="both", color="0.92")
    axes.legend(title="the server's policy", loc="upper left", fontsize=8, title_fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PLOT, dpi=110)
    plt.close(figure)
