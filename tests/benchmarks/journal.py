"""What the journal costs: on the event loop, for a stream, on disk, and with a million entries.

Run ``python -m tests.benchmarks.journal [--rows N]``; it needs about 4 GB on disk for a million.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from nbcodex.journal.codec import encode, equality_key
from nbcodex.journal.journal import Journal
from nbcodex.models import Reply, Request
from nbcodex.settings import JOURNAL_FILENAME
from tests.kernel_client import kernel
from tests.simulated import simulator_process

TEXT = "An answer of some length, as models give them. " * 20


def show(what: str, figures: str) -> None:
    print(f"{what:<58} {figures}", flush=True)


def spread(seconds: list[float], unit: float = 1e3, name: str = "ms") -> str:
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    figures = (statistics.median(ordered), p99, ordered[-1])
    return "median {:.3f}  p99 {:.3f}  worst {:.3f} ".format(*(f * unit for f in figures)) + name


async def store_request(journal: Journal, n: int) -> None:
    """Store one request as the runner does, with two updates of its text."""
    request = Request(prompt=f"prompt {n} " + "word " * 200)
    await journal.insert(request, key=b"k" * 32)
    await journal.start_attempt(request.id, 1)
    await journal.update_text(request.id, TEXT[:300])
    await journal.update_text(request.id, TEXT)
    await journal.finish(Reply(id=request.id, text=TEXT, cost=0.001))


@dataclass
class Steps:
    """The seconds of single steps on the loop: of wall time, and of the journal's own CPU.

    A full garbage collection during a step visits every object of the process. Since that is not
    the journal's work, it is measured apart.
    """

    wall: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    collecting: float = 0.0

    def collect(self, phase: str, info: dict[str, int]) -> None:
        """Time a collection, as one of `gc.callbacks`."""
        if phase == "start":
            self._began = time.thread_time()
            return
        took = time.thread_time() - self._began
        self.collecting += took
        if info["generation"] == 2:
            self.full.append(took)


class Stepwise:
    """An awaitable whose steps on the loop are timed one by one."""

    def __init__(self, inner: Coroutine[Any, Any, None], steps: Steps) -> None:
        self._inner, self._steps = inner, steps

    def __await__(self) -> Generator[Any, None, None]:
        steps = self._steps
        while True:
            began, cpu, collecting = time.perf_counter(), time.thread_time(), steps.collecting
            try:
                waits_for = self._inner.send(None)
            except StopIteration:
                return
            finally:
                spent = time.thread_time() - cpu
                steps.wall.append(time.perf_counter() - began)
                steps.own.append(max(0.0, spent - (steps.collecting - collecting)))
            yield waits_for


def on_the_loop(journal: Journal, *, requests: int, at_once: int) -> list[float]:
    """Return the loop thread's CPU seconds per request."""
    costs = []

    async def main() -> None:
        for n in range(0, requests, at_once):
            began = time.thread_time()
            await asyncio.gather(*[store_request(journal, n + i) for i in range(at_once)])
            costs.append((time.thread_time() - began) / at_once)

    asyncio.run(main())
    return costs


def steps_on_the_loop(journal: Journal, *, requests: int, at_once: int) -> Steps:
    """Return for how long each step blocks the loop."""
    steps = Steps()

    async def stepwise(n: int) -> None:
        await Stepwise(store_request(journal, n), steps)

    async def main() -> None:
        for n in range(0, requests, at_once):
            await asyncio.gather(*[stepwise(n + i) for i in range(at_once)])

    gc.callbacks.append(steps.collect)
    asyncio.run(main())
    gc.callbacks.remove(steps.collect)
    return steps


def commits(journal: Journal, *, requests: int) -> float:
    """Return how many requests are stored per second, all started at once."""

    async def main() -> None:
        await asyncio.gather(*[store_request(journal, n) for n in range(requests)])

    began = time.perf_counter()
    asyncio.run(main())
    return requests / (time.perf_counter() - began)


# It measures the CPU of the journal, on the loop and on its thread, and that of the process.
IN_THE_KERNEL = """
import time
import nbcodex
from nbcodex.client import get_client
from nbcodex.journal.journal import Journal
%load_ext nbcodex


class Timed:
    spent = 0.0

    def __init__(self, inner):
        self.inner = inner

    def __await__(self):
        steps, value = self.inner.__await__(), None
        while True:
            began = time.thread_time()
            try:
                waits_for = steps.send(value)
            except StopIteration as end:
                return end.value
            finally:
                Timed.spent += time.thread_time() - began
            value = yield waits_for


def timed(name):
    method = getattr(Journal, name)

    async def step_by_step(*args, **named):
        return await Timed(method(*args, **named))

    setattr(Journal, name, step_by_step)


for name in ("insert", "start_attempt", "record_wait", "update_text", "finish", "read_spending"):
    timed(name)


def share(way, prompt):
    (journal,) = get_client()._journals.values()
    writer = time.pthread_getcpuclockid(journal._worker._thread.ident)
    whole, kept, Timed.spent = time.process_time(), time.clock_gettime(writer), 0.0
    way(prompt)
    whole, kept = time.process_time() - whole, time.clock_gettime(writer) - kept
    loop = Timed.spent
    print(
        f"on the loop {loop / whole:.2%} ({loop * 1e3:.2f} ms), "
        f"on its thread {kept / whole:.2%} ({kept * 1e3:.1f} ms), of {whole * 1e3:.0f} ms"
    )


def cell(prompt):
    get_ipython().run_cell_magic("codex", "-o reply", prompt)


cell("[[tokens=10]] to warm up")
"""


def shares_of_a_stream(place: Path, *, seconds: int = 20, speed: int = 80) -> dict[str, str]:
    """Return the journal's share of the CPU of a whole stream, for each way to send it."""
    with simulator_process(tpm="none", speed=speed) as server:
        places = {"NBCODEX_HOME": str(place), "JPY_SESSION_NAME": "benchmark.ipynb"}
        prompt = f"[[tokens={seconds * speed}]] a long one"
        with kernel(**server.environ, **places) as asking:
            asking.run(IN_THE_KERNEL)
            shares = {
                way: asking.run(f"share({call}, {prompt!r})", timeout=120).stream.strip()
                for way, call in (("%%codex", "cell"), ("ask", "nbcodex.ask"))
            }
    return shares


def fill(folder: Path, rows: int) -> None:
    """Write `rows` entries directly by SQL: 20 are parked, the others answered."""
    journal = Journal(folder)
    journal.read_totals()
    if journal.problem:
        raise RuntimeError(journal.problem)
    journal.close()
    request = encode(Request(prompt="word " * 100, id="00000000"))
    reply = encode(Reply(id="00000000"))
    now = time.time()
    entries = (
        (
            f"{n * 2654435761 % 2**32:08x}",
            "parked" if n % (rows // 20) == 0 else "done",
            f"{n % 50}.ipynb",
            now - n % 7_000_000,
            now - n % 7_000_000,
            request,
            reply,
            TEXT,
        )
        for n in range(rows)
    )
    with closing(sqlite3.connect(folder / JOURNAL_FILENAME, isolation_level=None)) as connection:
        # Neither a log nor a wait for the disk: each page is written once. The cache (400 MB) holds
        # all of the indexes, whose pages are met in no order.
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -400000"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("BEGIN")
        connection.executemany(
            """INSERT INTO entries (id, status, notebook, key, added_at, updated_at, request, reply,
            text) VALUES (?, ?, ?, randomblob(32), ?, ?, ?, ?, ?)""",
            entries,
        )
        connection.execute("COMMIT")


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def with_many(folder: Path) -> None:
    """Measure the reads of a notebook from a large journal."""
    key = equality_key(Request(prompt="x"), base_url="y")
    opened, journal = [], Journal(folder)
    for _ in range(7):
        journal = Journal(folder)
        opened.append(timed(lambda j=journal: j.resumable_entries(notebook="0.ipynb")))  # type: ignore[misc]
        journal.close()
    show("  open, and ask what can be resumed here", spread(opened))
    some = journal.recent_entries(1)[0].id
    reads: dict[str, Callable[[], Any]] = {
        "entries()": journal.recent_entries,
        "entries(100)": lambda: journal.recent_entries(100),
        "resumable()": lambda: journal.resumable_entries(notebook=None),
        "entry(prefix)": lambda: journal.find_entry(some[:7]),
        "totals()": journal.read_totals,
        "answered(key)": lambda: asyncio.run(journal.find_answer(key, reply_id="new")),
    }
    for name, read in reads.items():
        show(f"  {name}", spread([timed(read) for _ in range(30)]))
    show(
        "  a whole request",
        spread([timed(lambda: asyncio.run(store_request(journal, 0))) for _ in range(30)]),
    )
    show("  forget one", spread([timed(lambda: asyncio.run(journal.delete(some))) for _ in [0]]))
    if journal.problem:
        raise RuntimeError(journal.problem)
    journal.close()


def first_use() -> str:
    """Return milliseconds that importing the journal takes in a fresh interpreter."""
    script = (
        "import asyncio, sqlite3, time; began = time.perf_counter(); import nbcodex.journal;"
        "print(time.perf_counter() - began)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
        for _ in range(5)
    ]
    return spread([float(run.stdout) for run in runs])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, default=1_000_000)
    rows = options.parse_args().rows
    with tempfile.TemporaryDirectory(prefix="nbcodex-benchmark-") as place:
        show("import nbcodex.journal", first_use())
        journal = Journal(Path(place) / "small")
        on_the_loop(journal, requests=200, at_once=1)
        for at_once in (1, 64):
            costs = on_the_loop(journal, requests=3200, at_once=at_once)
            show(f"loop CPU per request of 5 calls, {at_once} at once", spread(costs))
            steps = steps_on_the_loop(journal, requests=3200, at_once=at_once)
            show("  one step on the loop (by the wall)", spread(steps.wall))
            show("  its CPU, without garbage collections", spread(steps.own))
            worst = f"{len(steps.full)}, the longest {max(steps.full, default=0.0) * 1e3:.1f} ms"
            show("  full collections of the process meanwhile", worst)
        show("requests stored per second, 2,000 at once", f"{commits(journal, requests=2000):,.0f}")
        journal.close()
        for way, share in shares_of_a_stream(Path(place) / "stream").items():
            show(f"the journal, of a 20 s stream's CPU, {way}", share)
        if rows:
            # In a process of its own, so that its cache is not in the peak memory.
            with ProcessPoolExecutor(mp_context=get_context("spawn")) as other:
                seconds = timed(other.submit(fill, Path(place) / "big", rows).result)
            show(f"filling in {rows:,} entries", f"{seconds:.0f} s")
            with_many(Path(place) / "big")
        show("peak memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
