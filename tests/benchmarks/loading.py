"""What loading costs: ``%load_ext nbcodex``, and the imports of the first request.

CPU seconds of the process during the magic, in fresh kernels, in turns with jupyter_ai_magics in an
environment of its own. Then, also in fresh kernels, how much longer a cell that computes for 50 ms
takes while another thread sends the first request, and so imports the SDK.

Run with ``python -m tests.benchmarks.loading [--kernels N] [--peer PYTHON]``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jupyter_client.manager import KernelManager

from tests.benchmarks.table import spread, table
from tests.kernel_client import Kernel

PEER = "jupyter_ai_magics"
PEERS = [f"{PEER}==2.31.7", "ipykernel"]

ENVIRON = {
    "OPENAI_API_KEY": "sk-benchmark-0123456789",
    "OPENAI_BASE_URL": "http://127.0.0.1:9/v1",
    "NBCODEX_MODEL": "gpt-5.6-sol",
}

LOAD = """
import time
began = time.process_time()
get_ipython().run_line_magic("load_ext", {name!r})
print(time.process_time() - began)
"""

ASK_ONCE = """
import nbcodex

try:
    nbcodex.ask("Is anybody there?", api="responses", patience=0)
except nbcodex.NbcodexError:
    pass
"""

# No server listens at the address: the first request imports all it needs, and fails.
MEANWHILE = """
import sys, threading, time
import nbcodex


def compute(rounds):
    began, total = time.perf_counter(), 0
    for number in range(rounds):
        total += number * number % 7
    return time.perf_counter() - began


def ask():
    try:
        nbcodex.ask("Is anybody there?", api="responses", patience=0)
    except nbcodex.NbcodexError:
        assert "openai" in sys.modules


def imports():
    import openai, openai.resources.responses, genai_prices


compute(100_000)
rounds = int(100_000 * 0.05 / min(compute(100_000) for _ in range(10)))
alone = sorted(compute(rounds) for _ in range(9))[4]
cells = []
began = time.perf_counter()
thread = threading.Thread(target={background})
thread.start()
while thread.is_alive():
    cells.append(compute(rounds))
print(alone, max(cells[:-1]), sum(cells[:-1]) / len(cells[:-1]), time.perf_counter() - began)
"""
BACKGROUND = {
    "ask": "the first `nbcodex.ask`",
    "imports": "`import openai, openai.resources.responses, genai_prices`",
}


@contextmanager
def fresh(python: str, home: str | None = None) -> Iterator[Kernel]:
    """Start a kernel of an interpreter, with a new home or a given one; end it afterwards."""
    manager = KernelManager(kernel_name="python3")
    spec = manager.kernel_spec
    assert spec is not None
    spec.argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    with tempfile.TemporaryDirectory() as new:
        manager.start_kernel(env=os.environ | ENVIRON | {"NBCODEX_HOME": home or new})
        client = manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
            yield Kernel(manager, client)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
            manager.cleanup_resources()


def figures(python: str, code: str, home: str | None = None) -> list[float]:
    """Return the numbers that a cell prints in a fresh kernel."""
    with fresh(python, home) as session:
        ran = session.run(code, timeout=120)
        if ran.error:
            raise AssertionError("\n".join(ran.shown_error))
        return [float(figure) for figure in ran.stream.split()[-4:]]


@contextmanager
def peer() -> Iterator[str]:
    """Install jupyter_ai_magics in an environment of its own; return its interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS], check=True)
        yield python


def load(python: str, kernels: int) -> None:
    """Load both extensions in turns, each in kernels of its own, and print the table."""
    with tempfile.TemporaryDirectory() as used:
        figures(sys.executable, ASK_ONCE, used)
        ways = {
            "`%load_ext nbcodex`, nothing asked yet": ("nbcodex", sys.executable, None),
            "`%load_ext nbcodex`, with a journal": ("nbcodex", sys.executable, used),
            f"`%load_ext {PEER}`": (PEER, python, None),
        }
        spent: dict[str, list[float]] = {label: [] for label in ways}
        for number in range(kernels + 1):
            for label, (name, interpreter, home) in ways.items():
                seconds = figures(interpreter, LOAD.format(name=name), home)
                if number:  # the first compiles
                    spent[label] += seconds
    ours = statistics.median(next(iter(spent.values())))
    rows = [
        [label, spread(of, 1000), f"{statistics.median(of) / ours:.1f}"]
        for label, of in spent.items()
    ]
    print(f"CPU of loading, {kernels} fresh kernels each, in turns, 2 cores.\n")
    print(table(["extension", "CPU, ms", "times the first"], rows))


def meanwhile(kernels: int) -> None:
    """Compute beside the first imports, and print the table."""
    rows = []
    measured: dict[str, list[list[float]]] = {way: [] for way in BACKGROUND}
    for _ in range(kernels):
        for way in BACKGROUND:
            code = MEANWHILE.replace("{background}", way)
            measured[way].append(figures(sys.executable, code))
    for way, runs in measured.items():
        alone, worst, mean, whole = zip(*runs, strict=True)
        rows.append(
            [
                BACKGROUND[way],
                spread(alone, 1000),
                spread([m / a for m, a in zip(mean, alone, strict=True)]),
                spread([w / a for w, a in zip(worst, alone, strict=True)]),
                spread(whole, 1000),
            ]
        )
    print(f"\nA cell of 50 ms beside the imports, {kernels} fresh kernels each, 2 cores.\n")
    heads = ["thread", "alone, ms", "beside it: mean, times", "the slowest, times", "imports, ms"]
    print(table(heads, rows))


def main() -> None:
    """Measure both, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", type=int, default=15)
    parser.add_argument("--peer", help="interpreter that has jupyter_ai_magics, if there is one")
    chosen = parser.parse_args()
    if chosen.peer:
        load(chosen.peer, chosen.kernels)
    else:
        with peer() as python:
            load(python, chosen.kernels)
    meanwhile(chosen.kernels)


if __name__ == "__main__":
    main()
