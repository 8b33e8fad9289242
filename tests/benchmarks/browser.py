"""The cost of the display: bytes and long tasks of one answer, and a monitor of fifty requests.

A real JupyterLab in Chromium; the answer comes from a simulator in another process. Its bytes are
the payloads of all websocket frames that the page receives while the cell runs; long tasks are what
the page's PerformanceObserver sees. The monitor's load is the CPU of the page's renderer and of the
kernel, from `/proc`, against the same requests without a monitor.

Run with ``python -m tests.benchmarks.browser [--rounds N]``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from nbcodex.rendering.markdown import sanitize_markdown
from nbcodex.simulator import Fault
from tests.benchmarks.table import spread, table
from tests.browser.lab import CHROMIUM, FLAGS, Lab, Notebook, serve
from tests.simulated import Served, simulated, simulator_process

# Tokens of the answer, of four characters each.
TOKENS = 4_000

# Requests at once in the monitor, and for how long they are measured.
REQUESTS, SECONDS = 50, 20.0

_WATCH = """() => {
  window.longTasks = [];
  new PerformanceObserver((list) => list.getEntries().forEach(
    (task) => window.longTasks.push(task.duration),
  )).observe({ type: 'longtask' });
}"""

SHOW_PID = "import os\nprint(os.getpid())"
ANSWER = f"%%codex -o answer\nHello [[tokens={TOKENS}]]"
LOAD = f"""import asyncio, nbcodex
asked = [asyncio.ensure_future(nbcodex.aask(f"Question {{n}} [[tokens=4000]]", patience="1h"))
         for n in range({REQUESTS})]
None"""


class Frames:
    """What the page receives by websocket: bytes, and the times of messages to widgets."""

    def __init__(self, page: Page) -> None:
        self.bytes, self.times = 0, list[float]()
        page.on("websocket", lambda socket: socket.on("framereceived", self._receive))

    def _receive(self, payload: str | bytes) -> None:
        self.bytes += len(payload if isinstance(payload, bytes) else payload.encode())
        frame = payload if isinstance(payload, bytes) else payload.encode()
        if b"comm_msg" in frame[:2000]:
            self.times.append(time.monotonic())

    def clear(self) -> None:
        """Start counting again."""
        self.bytes = 0
        self.times.clear()

    @property
    def busiest(self) -> int:
        """The most comm messages within any second."""
        return max((sum(at <= t < at + 1 for t in self.times) for at in self.times), default=0)


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with (
        tempfile.TemporaryDirectory() as root,
        serve(Path(root)) as lab,
        sync_playwright() as playwright,
    ):
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        print(f"An answer of {TOKENS:,} tokens; {rounds} rounds, {os.cpu_count()} cores.\n")
        _print_answers(chromium, lab, rounds)
        print(f"\n{REQUESTS} requests at once for {SECONDS:.0f} s; {rounds} rounds.\n")
        _print_loads(chromium, lab, rounds)
        chromium.close()


@contextmanager
def opened(
    chromium: Browser, lab: Lab, simulator: Served, *cells: str
) -> Iterator[tuple[Notebook, Frames]]:
    """Open a notebook that is ready to ask, and count what its page receives."""
    context = chromium.new_context(viewport={"width": 1100, "height": 900})
    page = context.new_page()
    frames = Frames(page)
    name = f"{os.urandom(3).hex()}.ipynb"
    lab.write(name, simulator.setup, "%%codex\nHello [[tokens=9]]", SHOW_PID, *cells)
    nb = Notebook(page, lab, name).open()
    for index in range(3):
        nb.run(index)
        nb.wait()
    page.wait_for_timeout(1000)
    page.evaluate(_WATCH)
    frames.clear()
    yield nb, frames
    context.close()
    lab.reset()


WAYS = {
    "at full speed": {"speed": 1e6, "chunk": 20},
    "in 10 s": {"speed": 400.0, "chunk": 20},
}


def _print_answers(chromium: Browser, lab: Lab, rounds: int) -> None:
    rows = []
    for name, knobs in WAYS.items():
        found = [_answer(chromium, lab, knobs) for _ in range(rounds)]
        text, size, busiest, longest, lost = zip(*found, strict=True)
        rows.append(
            [
                name,
                spread(text, 1e-3),
                spread(size, 1e-3),
                f"{(statistics.median(size) - 20_000) / statistics.median(text):.2f}",
                spread(busiest),
                spread(longest),
                str(sum(lost)),
            ]
        )
    heads = [
        "answer",
        "text, kB",
        "to the page, kB",
        "of the text, but for 20 kB",
        "messages in a second, at most",
    ]
    print(table([*heads, "longest task, ms (0: none over 50)", "answers not whole"], rows))


def _answer(
    chromium: Browser, lab: Lab, knobs: dict[str, float]
) -> tuple[int, int, int, float, bool]:
    """Return bytes of text and of frames, the busiest second, the longest task, what was lost."""
    with (
        simulator_process(tpm=10_000_000, latency=0.3, **knobs) as simulator,
        opened(chromium, lab, simulator, ANSWER, "print(answer.text)") as found,
    ):
        nb, frames = found
        nb.run(3)
        nb.wait()
        nb.page.wait_for_timeout(1000)
        size, busiest = frames.bytes, frames.busiest
        longest = nb.page.evaluate("Math.max(0, ...window.longTasks)")
        shown = "".join(nb.outputs(3)[-1]["data"]["text/markdown"])
        nb.run(4)
        nb.wait()
        text = nb.text(4).removesuffix("\n")
        lost = len(text) < 3 * TOKENS or sanitize_markdown(text) not in shown
    return len(text.encode()), size, busiest, longest, lost


def _print_loads(chromium: Browser, lab: Lab, rounds: int) -> None:
    rows = []
    for name, watched in (("without a monitor", False), ("with a monitor", True)):
        found = [_load(chromium, lab, watched=watched) for _ in range(rounds)]
        page, kernel, size, busiest = zip(*found, strict=True)
        figures = (spread(page, 100), spread(kernel, 100), spread(size, 1e-3 / SECONDS))
        rows.append([name, *figures, spread(busiest)])
    heads = ["", "page, % of a core", "kernel, % of a core", "kB a second to the page"]
    print(table([*heads, "messages in a second, at most"], rows))


def _load(chromium: Browser, lab: Lab, *, watched: bool) -> tuple[float, float, int, int]:
    """Return the shares of a core that page and kernel take, bytes, and the busiest second."""
    cell = "%codex monitor" if watched else "pass"
    with (
        simulated(tpm=10_000_000, rpm=60_000, latency=0.3, speed=20.0) as simulator,
        opened(chromium, lab, simulator, cell, LOAD) as (nb, frames),
    ):
        kernel = int(nb.text(2))
        page = _renderer(chromium, nb.page)
        refused = Fault("tokens_per_minute", seconds=60.0)  # half of them wait, half stream
        simulator.core.script([*[None] * (REQUESTS // 2), *[refused] * (REQUESTS // 2)])
        for index in (3, 4):
            nb.run(index)
            nb.wait()
        nb.page.wait_for_timeout(3000)
        frames.clear()
        before, began = (cpu(page), cpu(kernel)), time.monotonic()
        nb.page.wait_for_timeout(SECONDS * 1000)
        passed = time.monotonic() - began
        used = [
            (now - then) / passed
            for now, then in zip((cpu(page), cpu(kernel)), before, strict=True)
        ]
        return used[0], used[1], frames.bytes, frames.busiest


def cpu(pid: int) -> float:
    """Return the seconds of CPU that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _renderer(chromium: Browser, page: Page) -> int:
    """Return the process that renders the page: the one that a loop in it makes busy."""
    session = chromium.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    pids = [process["id"] for process in processes if process["type"] == "renderer"]
    before = {pid: cpu(pid) for pid in pids}
    page.evaluate("() => { const end = Date.now() + 500; while (Date.now() < end); }")
    return max(pids, key=lambda pid: cpu(pid) - before[pid])


if __name__ == "__main__":
    main()
