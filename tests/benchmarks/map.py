"""Many rows through `nbcodex.map`: memory, CPU, and what a rerun costs.

The rows come from an iterator; the simulator answers in this process, without sockets and without
limits, so its own work is a part of the CPU. The journal is on disk. Memory is the resident set
over that at the hundredth row, when everything is imported and every pool is open.

Run with ``python -m tests.benchmarks.map [--rows N]``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbcodex
from nbcodex import client
from nbcodex.client import Client
from nbcodex.runtime.clock import BootClock
from nbcodex.simulator import Knobs, Simulator
from tests.benchmarks.table import table
from tests.simulated import KEY
from tests.simulator_transport import SimulatorTransport

WARM_UP_ROWS = 100  # they are not measured
MEGABYTE = 2**20


@dataclass
class Figures:
    """The figures of one pass over the rows."""

    seconds: float
    cpu: float
    most: float
    last: float
    reused: int


def resident() -> float:
    """Return the resident set in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


def rows(count: int) -> Iterator[str]:
    """Yield texts of 200 characters."""
    return (f"{number:8d} " + "word " * 38 for number in range(count))


def measure(simulator: Simulator, count: int) -> Figures:
    """Run the map over all rows once, without storing its replies."""
    start = most = 0.0
    reused = 0
    began = cpu = 0.0
    for number, reply in enumerate(
        nbcodex.map(
            "Say what this is about: {} [[tokens=60]]", rows(count + WARM_UP_ROWS), max_output=100
        )
    ):
        assert reply
        reused += reply.reused
        if number == WARM_UP_ROWS:
            start = most = resident()
            began, cpu = time.perf_counter(), time.process_time()
        if number % 500 == 0:
            most = max(most, resident())
            simulator.log.clear()  # it is the server's
    seconds, worked = time.perf_counter() - began, time.process_time() - cpu
    return Figures(seconds, worked, most - start, resident() - start, reused)


def main() -> None:
    """Print a table of a first pass and a rerun."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    count = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"NBCODEX_HOME": home, "OPENAI_API_KEY": KEY, "NBCODEX_MODEL": "gpt-5.6-sol"}
        simulator = Simulator(
            Knobs(tpm=None, rpm=None, latency=0.3, speed=200.0, chunk=20), clock=BootClock()
        )
        client._current = Client(transport=SimulatorTransport(simulator))
        lines = []
        for name in ("first pass", "run again"):
            found = measure(simulator, count)
            lines.append(
                [
                    name,
                    f"{found.most:.1f}",
                    f"{found.last:.1f}",
                    f"{count / found.seconds:.0f}",
                    f"{1000 * found.cpu / count:.2f}",
                    f"{found.reused:,}",
                ]
            )
        client._current.close()
    print(f"{count:,} rows from an iterator, {os.cpu_count()} cores.\n")
    heads = [
        "pass",
        "memory over the start, MB: most",
        "at the end",
        "rows/s",
        "CPU a row, ms",
        "reused",
    ]
    print(table(heads, lines))


if __name__ == "__main__":
    main()
