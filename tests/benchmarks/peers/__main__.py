"""How well this project's pacing uses a limit, beside what others do; one process at a time.

Each peer is installed from PyPI by its name into a virtual environment of its own below ``--cache``
and asks the same prompts under each charge policy, five seeds each, in virtual time. What came of
each run is kept there too, so that a run that was stopped goes on. Then the table
(``tests/benchmarks/peers.md``) and the plot are made anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from nbcodex.simulator.knobs import Policy
from tests.benchmarks.pacing_wire import best
from tests.benchmarks.peers.homes import NoHomeError, python_of
from tests.benchmarks.peers.report import Run, plot, write
from tests.benchmarks.peers.roster import PEERS, Peer
from tests.benchmarks.peers.stage import Outcome
from tests.benchmarks.prompts import KNOBS, written

POLICIES: tuple[Policy, ...] = get_args(Policy)
SLOWEST = 1_500.0
"""Real seconds after which a run is given up."""


class Book:
    """What came of each run, one line of JSON each, in a file that outlives this process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.outcomes = [_outcome(json.loads(line)) for line in lines]

    def has(self, peer: Peer, **what: Any) -> bool:
        """Return whether a run is done."""
        what["peer"] = peer.name
        return any(all(getattr(o, k) == v for k, v in what.items()) for o in self.outcomes)

    def add(self, line: str) -> None:
        """Keep what a run printed."""
        self.outcomes.append(_outcome(json.loads(line)))
        with self._path.open("a") as file:
            file.write(f"{line}\n")


def _outcome(data: dict[str, Any]) -> Outcome:
    return Outcome(**{f.name: data[f.name] for f in fields(Outcome)})


def perform(
    peer: Peer, python: str, *, policy: str, seed: int, count: int, tpm: int, real: bool
) -> str:
    """Run one peer once, in its own interpreter, and return the line that it prints."""
    command = [python, "-m", "tests.benchmarks.peers.stage", peer.name]
    command += ["--policy", policy, "--seed", str(seed), "--prompts", str(count), "--tpm", str(tpm)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, *(["--real"] if real else [])],
        env=environment,
        stdout=subprocess.PIPE,
        timeout=SLOWEST,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def judge(outcomes: list[Outcome]) -> list[Run]:
    """Set each outcome beside the oracle's time for the very same prompts and latencies."""
    times: dict[tuple[str, int, int, int], float] = {}
    runs = []
    for outcome in outcomes:
        key = (outcome.policy, outcome.seed, outcome.count, outcome.tpm)
        if key not in times:
            knobs = replace(KNOBS, policy=key[0], seed=key[1], tpm=key[3])
            times[key] = best(knobs, written(outcome.count, outcome.seed), outcome.seed)
        runs.append(Run(outcome, times[key]))
    return runs


def main() -> None:
    """Run what is not yet done, and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "nbcodex-peers"))
    parser.add_argument("--peer", action="append", choices=PEERS, help="default: all")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="default: all")
    parser.add_argument("--prompts", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tpm", type=int, default=KNOBS.tpm)
    parser.add_argument("--real", action="store_true", help="in real time, through sockets")
    parser.add_argument("--report", action="store_true", help="only write the report")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    book = Book(options.cache / "outcomes.jsonl")
    missing: dict[str, str] = {}
    for seed in range(0 if options.report else options.seeds):
        for policy in options.policy or POLICIES:
            for peer in (PEERS[name] for name in options.peer or PEERS):
                what = {"policy": policy, "seed": seed, "count": options.prompts}
                what |= {"tpm": options.tpm, "real": options.real}
                if peer.name in missing or book.has(peer, **what):
                    continue
                try:
                    line = perform(peer, python_of(peer, options.cache), **what)
                except NoHomeError as exc:
                    missing[peer.name] = str(exc)
                except subprocess.TimeoutExpired:
                    missing[peer.name] = f"takes longer than {SLOWEST:g} s"
                except subprocess.SubprocessError:
                    missing[peer.name] = "broke off"
                else:
                    print(line, flush=True)
                    book.add(line)
    runs = judge(book.outcomes)
    write(runs, missing)
    plot(runs)


if __name__ == "__main__":
    main()
