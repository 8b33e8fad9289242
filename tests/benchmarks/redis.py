"""Several hosts on one key: what a reservation costs in Redis, and how well limits are used.

Hosts are network namespaces on one bridge (`tests.benchmarks.network`), each with a process of its
own; a real redis-server and the simulator stand beside them. Real time, real sockets.

Run with ``python -m tests.benchmarks.redis [cost|active|heavy|killed ...]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbcodex.runtime.clock import BootClock
from nbcodex.simulator import Knobs, Simulator
from nbcodex.simulator.server import SimulatorServer
from tests.benchmarks.bucket_level import LevelRecorder
from tests.benchmarks.kernels import jain
from tests.benchmarks.network import Host, Network, network
from tests.benchmarks.table import table
from tests.redis_server import RedisServer, redis_server

LIMIT = 600_000  # tokens per minute
RATE = LIMIT / 60
HOSTS = 4
PART_TIMEOUT_S = 500.0
PASSWORD = "a-password-of-redis"
START_DELAY_S = 0.5  # from the instant at which the last host is ready


@dataclass
class Setup:
    """The network of the hosts, Redis and a rate-limited server."""

    network: Network
    redis: RedisServer
    core: Simulator
    url: str

    def run(self, host: Host, **options: Any) -> subprocess.Popen[str]:
        """Start a process on a host."""
        given = {"redis": self.redis.url(PASSWORD).reveal(), "api": self.url, **options}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        command = [*host.prefix, sys.executable, "-m", "tests.benchmarks.redis_host", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


@contextmanager
def set_up(**knobs: Any) -> Iterator[Setup]:
    """Create everything; remove it afterwards."""
    with tempfile.TemporaryDirectory() as folder, network(HOSTS) as net:
        login = ("--requirepass", PASSWORD)
        with redis_server(Path(folder), *login, host=net.address) as redis:
            core = Simulator(Knobs(tpm=LIMIT, rpm=5_000, latency_sigma=0.4, chunk=1000, **knobs))
            server = SimulatorServer(core, host=net.address)
            try:
                yield Setup(net, redis, core, server.start())
            finally:
                server.stop()


def start_together(processes: list[subprocess.Popen[str]]) -> None:
    """Let all processes begin at the same instant, when the last one has imported everything."""
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{BootClock().now() + START_DELAY_S}\n")
        process.stdin.flush()


def read_reports(processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """Return the report of each process; end all processes in any case."""
    try:
        reports = [process.communicate(timeout=PART_TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads(text) for text in reports if text.strip()]


def cost() -> list[str]:
    """Measure operations: of one host alone, and of four with 50 requests a second each."""
    rows = []
    with set_up() as setup:
        for count in (1, HOSTS):
            hosts = setup.network.hosts[:count]
            runs = [setup.run(h, seconds=10, rate=50) for h in hosts]
            start_together(runs)
            reports = read_reports(runs)
            rows.append(
                (
                    f"{count} x 50 requests/s x 4 operations",
                    f"{1e3 * statistics.median(t['median'] for t in reports):.2f}",
                    f"{1e3 * max(t['p99'] for t in reports):.1f}",
                    f"{statistics.fmean(t['again'] for t in reports):.2f}",
                    f"{sum(t['operations'] for t in reports) / 10:.0f}",
                )
            )
    print(
        table(("hosts", "median, ms", "p99, ms", "done again, per operation", "operations/s"), rows)
    )
    return []


def admitted(setup: Setup) -> dict[int, Any]:
    """Return the requests that the server admitted, by the number of the prompt."""
    return {int(s.prompt.split()[0]): s for s in setup.core.log if s.status == 200 and s.prompt}


def refusals(setup: Setup) -> float:
    """Return the share of requests that the server refused."""
    asked = [s for s in setup.core.log if s.api]
    return sum(s.status == 429 for s in asked) / len(asked)


def active() -> list[str]:
    """Measure four hosts that all have many prompts."""
    with set_up(policy="refunded") as setup:
        runs = [
            setup.run(host, index=i, prompts=6_000, seconds=400)
            for i, host in enumerate(setup.network.hosts)
        ]
        start_together(runs)
        reports = read_reports(runs)
        at = admitted(setup)
        log = setup.core.log
        began, last = min(s.at for s in log), max(s.at for s in at.values())
        bound = (sum(s.charged for s in log) - LIMIT) / RATE / (last - began)
        ended = [
            max((s.at for n, s in at.items() if n % HOSTS == i), default=began)
            for i in range(HOSTS)
        ]
        until = min(ended)
        fair = jain(
            [
                sum(s.charged for n, s in at.items() if n % HOSTS == i and s.at <= until)
                for i in range(HOSTS)
            ]
        )
        refused = refusals(setup)
    each = {t["index"]: (t["finished"], t["operations"]) for t in reports}
    print(
        f"answered and operations by host {each}; last sent {[round(e - began) for e in ended]} s"
    )
    finished, twice = sum(t["finished"] for t in reports), sum(t["twice"] for t in reports)
    print(
        f"{finished} answered, {twice} twice, in {last - began:.1f} s; token bound {bound:.3f}, "
        f"429s {100 * refused:.2f} %, Jain index {fair:.3f}; an operation {_operation(reports)}"
    )
    return _missed(
        ("token bound", bound >= 0.97), ("429s", refused <= 0.005), ("Jain index", fair >= 0.98)
    )


def _operation(reports: list[dict[str, Any]]) -> str:
    median = 1e3 * statistics.median(t["median"] for t in reports)
    p99, again = 1e3 * max(t["p99"] for t in reports), statistics.fmean(t["again"] for t in reports)
    return f"{median:.2f} ms (p99 {p99:.1f}), done again {again:.2f} times"


def heavy() -> list[str]:
    """Measure one host with many prompts, and three that send one now and then."""
    waits = {}
    for name, first in (("alone", 1), ("beside a heavy one", 0)):
        with set_up(policy="refunded") as setup:
            runs = [
                setup.run(
                    host,
                    index=i,
                    prompts=16_000 if i == 0 else 400,
                    seconds=90,
                    every=0.0 if i == 0 else 3.0,
                )
                for i, host in enumerate(setup.network.hosts)
                if i >= first
            ]
            start_together(runs)
            light = [t for t in read_reports(runs) if t["index"]]
            refused = refusals(setup)
        left = [w for t in light for w in t["left"]]
        answered = [w for t in light for w in t["answered"]]
        waits[name] = statistics.quantiles(left, n=100)[98]
        whole = statistics.quantiles(answered, n=100)[98]
        print(
            f"light ones {name}: {len(left)} asked, p99 until answered {whole:.2f} s, "
            f"p99 until sent {waits[name]:.3f} s, "
            f"429s {100 * refused:.2f} %"
        )
    return _missed(("p99 wait", waits["beside a heavy one"] <= 2 * waits["alone"]))


def killed() -> list[str]:
    """Measure four busy hosts, one of which is killed."""
    with set_up(policy="refunded") as setup, LevelRecorder(setup.core) as level:
        runs = [
            setup.run(host, index=i, prompts=8_000, seconds=105)
            for i, host in enumerate(setup.network.hosts)
        ]
        start_together(runs)
        time.sleep(60)
        runs[0].kill()
        dead_at = setup.core.clock.now()
        reports = read_reports(runs)
        refused = refusals(setup)
    steps = [level.used_share(dead_at + step, dead_at + step + 5) for step in range(-5, 11, 5)]
    tail = level.used_share(dead_at + 10, dead_at + 40)
    print(
        f"{sum(t['finished'] for t in reports)} answered by the others; of the refill are used, "
        f"from 5 s before the kill on, in steps of 5 s {', '.join(f'{s:.2f}' for s in steps)}; "
        f"from 10 s after it on {tail:.3f}; 429s {100 * refused:.2f} %"
    )
    return _missed(("full rate within 10 s", tail >= 0.95))


def _missed(*checks: tuple[str, bool]) -> list[str]:
    return [name for name, was_met in checks if not was_met]


PARTS = {"cost": cost, "active": active, "heavy": heavy, "killed": killed}


def main() -> int:
    """Run what was named, or all; return how many bounds were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="one of " + ", ".join(PARTS))
    names = parser.parse_args().parts or list(PARTS)
    missed = 0
    for name in names:
        print(f"\n### {name}\n", flush=True)
        for bound in PARTS[name]():
            print(f"MISSED: {bound}")
            missed += 1
    return missed


if __name__ == "__main__":
    sys.exit(main())
