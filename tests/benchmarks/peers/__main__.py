"""How well this project's rate limiter uses a limit, compared with other libraries.

Each library is installed from PyPI into a virtual environment of its own below ``--cache``. There
it sends the same prompts under each charge policy, with five seeds, in virtual time, one process at
a time. The outcome of each run is kept there, so that a stopped benchmark continues. Then the table
(``tests/benchmarks/peers.md``) and the plot are written again.
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
from tests.benchmarks.pacing_wire import oracle_seconds
from tests.benchmarks.peers.definitions import PEERS, Peer
from tests.benchmarks.peers.environments import EnvironmentUnavailableError, interpreter_of
from tests.benchmarks.peers.report import Run, plot, write
from tests.benchmarks.peers.trial import Outcome
from tests.benchmarks.prompts import KNOBS, writable_workload

POLICIES: tuple[Policy, ...] = get_args(Policy)
RUN_TIMEOUT_S = 1_500.0  # in real time


class OutcomeFile:
    """The outcome of each run, one line of JSON each, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.outcomes = [_outcome(json.loads(line)) for line in lines]

    def contains(self, peer: Peer, **parameters: Any) -> bool:
        """Return whether the file holds a run of a peer with these parameters."""
        parameters["peer"] = peer.name
        return any(all(getattr(o, k) == v for k, v in parameters.items()) for o in self.outcomes)

    def add(self, line: str) -> None:
        """Add the line that a run printed."""
        self.outcomes.append(_outcome(json.loads(line)))
        with self._path.open("a") as file:
            file.write(f"{line}\n")


def _outcome(data: dict[str, Any]) -> Outcome:
    return Outcome(**{f.name: data[f.name] for f in fields(Outcome)})


def run_in_environment(
    peer: Peer, python: str, *, policy: str, seed: int, count: int, tpm: int, real: bool
) -> str:
    """Run one peer once, in its own interpreter, and return the line that it prints."""
    command = [python, "-m", "tests.benchmarks.peers.trial", peer.name]
    command += ["--policy", policy, "--seed", str(seed), "--prompts", str(count), "--tpm", str(tpm)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, *(["--real"] if real else [])],
        env=environment,
        stdout=subprocess.PIPE,
        timeout=RUN_TIMEOUT_S,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def compare_with_oracle(outcomes: list[Outcome]) -> list[Run]:
    """Return each outcome with the oracle's time for the same prompts and latencies."""
    times: dict[tuple[str, int, int, int], float] = {}
    runs = []
    for outcome in outcomes:
        key = (outcome.policy, outcome.seed, outcome.count, outcome.tpm)
        if key not in times:
            knobs = replace(KNOBS, policy=key[0], seed=key[1], tpm=key[3])
            times[key] = oracle_seconds(
                knobs, writable_workload(outcome.count, outcome.seed), outcome.seed
            )
        runs.append(Run(outcome, times[key]))
    return runs


def main() -> None:
    """Make the runs that are missing, and write the report."""
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
    outcome_file = OutcomeFile(options.cache / "outcomes.jsonl")
    missing: dict[str, str] = {}
    for seed in range(0 if options.report else options.seeds):
        for policy in options.policy or POLICIES:
            for peer in (PEERS[name] for name in options.peer or PEERS):
                parameters = {"policy": policy, "seed": seed, "count": options.prompts}
                parameters |= {"tpm": options.tpm, "real": options.real}
                if peer.name in missing or outcome_file.contains(peer, **parameters):
                    continue
                try:
                    python = interpreter_of(peer, options.cache)
                    line = run_in_environment(peer, python, **parameters)
                except EnvironmentUnavailableError as exc:
                    missing[peer.name] = str(exc)
                except subprocess.TimeoutExpired:
                    missing[peer.name] = f"takes longer than {RUN_TIMEOUT_S:g} s"
                except subprocess.SubprocessError:
                    missing[peer.name] = "failed"
                else:
                    print(line, flush=True)
                    outcome_file.add(line)
    runs = compare_with_oracle(outcome_file.outcomes)
    write(runs, missing)
    plot(runs)


if __name__ == "__main__":
    main()
