"""A notebook whose kernels are killed: what each has reported, and what the next one does.

Each kernel writes what happens in it to a file that outlives a SIGKILL. The rest is read from
the simulator, the journal, and what the kernels have put into the notebook.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbcodex.journal.journal import Journal
from nbcodex.journal.reads import Entry
from nbcodex.runtime.clock import BootClock
from nbcodex.simulator import RequestRecord
from tests.crash.fork_server import Child, KernelForkServer
from tests.kernel_client import CellResult
from tests.simulated import Simulated

# What a kernel runs first: it loads nbcodex, and reports what happens from then on.
PROLOGUE = """
import asyncio, json, os, threading
from nbcodex import events
from nbcodex.client import get_client
from nbcodex.journal.journal import Journal
from nbcodex.requests.entry_writer import EntryWriter
%load_ext nbcodex
%config Codex.display = "text"
_log = os.open(PATH, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

def report(what, id, size=0):
    os.write(_log, (json.dumps([get_client().clock.now(), what, id, size]) + "\\n").encode())

def on_event(event):
    match event:
        case events.Delta(text=text, reasoning=False):
            report("shown", event.request_id, len(text))
        case _:
            report(type(event).__name__, event.request_id)

get_client().listeners.append(on_event)

def reporting(owner, name, what):
    original = getattr(owner, name)
    async def wrapped(self, first, *args, **kwargs):
        result = await original(self, first, *args, **kwargs)
        report(what, getattr(first, "id", first))
        return result
    setattr(owner, name, wrapped)

reporting(Journal, "insert", "added")
reporting(Journal, "set_response_id", "named")
reporting(Journal, "finish", "finished")

def halt(name, *, after):
    original = getattr(EntryWriter, name)
    async def halted(self, *args, **kwargs):
        if after:
            await original(self, *args, **kwargs)
        report("halted", self._request.id)
        await asyncio.Event().wait()
    setattr(EntryWriter, name, halted)

def ask(*cells):
    for line, prompt in cells:
        get_ipython().run_cell_magic("codex", line, prompt)

def ask_apart(*cells):  # where each of them is to be halted before its cell returns
    for cell in cells:
        threading.Thread(target=ask, args=(cell,), daemon=True).start()
"""

MAY_BE_PAID = "may be paid twice"
NOTE = "possibly paid twice"


@dataclass(frozen=True)
class Asked:
    """One cell's request; its answer is known in advance, and differs from all others."""

    number: int
    line: str
    words: int

    @property
    def answer(self) -> str:
        """The whole answer."""
        return " ".join(f"q{self.number}w{n}" for n in range(self.words)) + f" end{self.number}."

    @property
    def prompt(self) -> str:
        """What is asked."""
        return f"[[echo: {self.answer}]]"

    @property
    def durable(self) -> bool:
        """Whether the server keeps it."""
        return "--durable" in self.line


# What a kernel reported: when, what, of which request, and of how many characters.
Report = tuple[float, str, str, int]


def reports(log: Path) -> list[Report]:
    """Return what a kernel has reported so far."""
    text = log.read_text() if log.exists() else ""
    return [tuple(json.loads(line)) for line in text.splitlines()]


@dataclass
class Killed:
    """A kernel that was killed, and the requests that it had been given."""

    asked: list[Asked]
    at: float  # when, on the boot clock
    reports: list[Report]
    output: CellResult

    def has(self, id_: str, what: str) -> bool:
        """Whether the kernel had reported this of a request."""
        return any(what == w and id_ == i for _, w, i, _ in self.reports)

    def shown(self, id_: str, before: float) -> int:
        """Return how many characters were shown at an instant; -1 if they were replaced later."""
        size = 0
        for at, what, i, more in self.reports:
            if i != id_:
                continue
            if what == "Restarted" and at > before:
                return -1
            size = 0 if what == "Restarted" else size + more if at <= before else size
        return size


@dataclass
class Counts:
    """The figures of a run of kills."""

    kills: int = 0
    prompts: int = 0
    unsent: int = 0
    answered_before: int = 0
    resumed: int = 0
    durable: int = 0
    possibly_paid: int = 0
    paid_twice_in_the_gap: int = 0
    oldest_lost: float = 0.0

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.3g}" for name, value in vars(self).items())


@dataclass
class Scene:
    """One journal, one notebook, one server, and any number of kernels after each other."""

    fork_server: KernelForkServer
    server: Simulated
    home: Path
    notebook: str = "/lessons/crash.ipynb"
    # Text may be lost if it was shown this long before the kill or later. The benchmark demands the
    # second that is documented; on a busy machine a commit alone may take that long.
    max_lost_s: float = 10.0
    counts: Counts = field(default_factory=Counts)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def kernel(self) -> tuple[Child, Path]:
        """Return a new kernel of the notebook, with nbcodex loaded, and the file it reports to."""
        log = self.home / f"log-{next(self._numbers)}"
        child = self.fork_server.kernel(
            **self.server.environ,
            NBCODEX_HOME=str(self.home / "kept"),
            JPY_SESSION_NAME=self.notebook,
        )
        ran = child.run(PROLOGUE.replace("PATH", repr(str(log))))
        assert ran.status == "ok", ran.shown_error
        return child, log

    def asked(self, *lines: str, words: int) -> list[Asked]:
        """Return new requests, one for each line of options."""
        return [
            Asked(next(self._numbers), f"{line} -o a{next(self._numbers)}", words) for line in lines
        ]

    def kill(self, child: Child, log: Path, asked: list[Asked]) -> Killed:
        """Kill a kernel now, and return what it had reported and shown."""
        at = BootClock().now()
        child.kill()
        self.counts.kills += 1
        output = child.unread_output()
        self.fork_server.discard(child)
        return Killed(asked, at, reports(log), output)

    def entries(self) -> dict[str, list[Entry]]:
        """Return what the journal holds, by prompt."""
        journal = Journal(self.home / "kept")
        found: dict[str, list[Entry]] = {}
        for entry in journal.recent_entries(100_000):
            found.setdefault(entry.request.prompt, []).append(entry)
        journal.close()
        return found

    def sent(self, asked: Asked) -> list[RequestRecord]:
        """Return the requests for an answer that reached the server."""
        return [seen for seen in self.server.core.log if seen.api and seen.prompt == asked.prompt]

    def warm_up(self) -> None:
        """Let a kernel send a prompt, so that the journal exists and the limits are known.

        Until limits are known, one request is sent before all others.
        """
        child, _ = self.kernel()
        ran = child.run("ask(('--no-history', 'hello'))")
        assert ran.status == "ok", ran.shown_error
        self.fork_server.discard(child)

    def resume(self) -> CellResult:
        """Let another kernel of the notebook resume everything; return what it shows."""
        child, _ = self.kernel()
        ran = child.run("%codex resume all", timeout=120)
        assert ran.status == "ok", ran.shown_error
        self.fork_server.discard(child)
        return ran

    def check(self, *killed: Killed) -> None:
        """Check what kernels that were killed have left, and that another one resumes it."""
        before = self.entries()
        for kernel in killed:
            for asked in kernel.asked:
                self._check_kept(kernel, asked, before.get(asked.prompt, []))
        ran = self.resume()
        after = self.entries()
        for kernel in killed:
            for asked in kernel.asked:
                if asked.prompt in before:
                    (was,), (now,) = before[asked.prompt], after[asked.prompt]
                    self._check_resumed(kernel, asked, was, now, ran)
                else:
                    assert asked.prompt not in after

    def _check_kept(self, kernel: Killed, asked: Asked, found: list[Entry]) -> None:
        """A request that was sent is in the journal once, with all of its text but the latest."""
        self.counts.prompts += 1
        assert len(found) == bool(found)
        if not found:
            self.counts.unsent += 1
            assert not self.sent(asked), "sent before it was committed"
            return
        (entry,) = found
        text = entry.reply.text
        assert asked.answer.startswith(text)
        oldest = kernel.at - self.max_lost_s
        assert kernel.shown(entry.id, oldest) <= len(text), "older text is lost"
        self.counts.oldest_lost = max(self.counts.oldest_lost, _age_of_lost(kernel, entry))
        if kernel.has(entry.id, "finished") or kernel.has(entry.id, "Finished"):
            assert (entry.status, text) == ("done", asked.answer)
        if entry.status == "done":
            self.counts.answered_before += 1
            assert text == asked.answer

    def _check_resumed(
        self, kernel: Killed, asked: Asked, was: Entry, now: Entry, ran: CellResult
    ) -> None:
        """Its answer is there, complete and once; a warning has preceded a second payment."""
        assert (now.status, now.reply.text) == ("done", asked.answer)
        shown = (finals(kernel.output, asked), finals(ran, asked))
        if was.status == "done":
            assert shown in {(0, 0), (1, 0)}
        else:
            self.counts.resumed += 1
            assert shown == (0, 1)
        warned = any(was.id in line and MAY_BE_PAID in line for line in ran.stream.splitlines())
        assert warned == was.possibly_paid
        self.counts.possibly_paid += warned
        if asked.durable:
            self.counts.durable += 1
            paid = [seen.charged for seen in self.sent(asked) if seen.charged]
            in_the_gap = warned or NOTE in now.reply.notes
            assert len(paid) == 1 or in_the_gap, "paid twice without a warning"
            self.counts.paid_twice_in_the_gap += len(paid) > 1
            if kernel.has(was.id, "named") and not kernel.has(was.id, "BackingOff"):
                assert (len(paid), warned) == (1, False)


def _age_of_lost(kernel: Killed, entry: Entry) -> float:
    """Return for how many seconds the first lost character had been shown."""
    size, kept, restarted = 0, len(entry.reply.text), False
    for at, what, id_, more in kernel.reports:
        if id_ == entry.id:
            restarted = restarted or what == "Restarted"
            size += more
            if size > kept and not restarted:
                return kernel.at - at
    return 0.0


def finals(ran: CellResult, asked: Asked) -> int:
    """Return how many finished answers to a request are in the outputs."""
    bodies = [o["data"].get("text/markdown", "") for o in ran.outputs if "data" in o]
    return sum(asked.answer in body and "<sub>" in body for body in bodies)


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """Lock the journal, as another process in a transaction does."""
    import sqlite3

    from nbcodex.settings import JOURNAL_FILENAME

    connection = sqlite3.connect(home / "kept" / JOURNAL_FILENAME, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def wait_until(holds: Any, seconds: float = 120.0) -> None:
    """Wait until `holds()` returns true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)
