"""The commands of `%codex` for the journal's entries, and a journal that cannot be written to."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nbcodex.journal.journal import Journal
from nbcodex.simulator import Fault
from tests.kernel_client import CLEAR_COOLDOWNS, Kernel, kernel
from tests.simulated import Simulated, simulated

pytestmark = pytest.mark.kernel

NOTEBOOK = "/lessons/one.ipynb"


@pytest.fixture(scope="module")
def server() -> Iterator[Simulated]:
    """A simulator for all tests of this module."""
    with simulated(tpm=10**7, rpm=10**5, latency=0.02, speed=200.0) as running:
        yield running


def started_kernel(server: Simulated, home: Path) -> Iterator[Kernel]:
    """Yield a kernel with the extension loaded, whose journal is in `home`."""
    with kernel(**server.environ, NBCODEX_HOME=str(home), JPY_SESSION_NAME=NOTEBOOK) as cell:
        cell.run("import os\n%load_ext nbcodex\n%config Codex.display = 'text'")
        yield cell


@pytest.fixture(scope="module")
def shared(server: Simulated, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """One kernel for the commands."""
    yield from started_kernel(server, tmp_path_factory.mktemp("journal") / "kept")


@pytest.fixture
def cell(shared: Kernel, server: Simulated) -> Kernel:
    """The kernel of the notebook, with an empty journal and no limits in its way."""
    shared.run(f"os.environ['JPY_SESSION_NAME'] = {NOTEBOOK!r}\n%codex forget all")
    assert shared.run(CLEAR_COOLDOWNS).status == "ok"
    server.core._faults.clear()
    return shared


def park(cell: Kernel, server: Simulated, text: str, *, seconds: float = 5000.0) -> str:
    """Run a cell whose request a limit parks, and return the request's id."""
    server.core.script([Fault("requests_per_day", seconds=seconds)])
    ran = cell.run(f"%%codex -o reply --patience 100ms\n[[echo: {text}]]")
    assert ran.error == "ParkedError", ran
    cell.run(CLEAR_COOLDOWNS)
    return cell.run("%codex journal").stream.split()[0]


def test_resume_at_reset_sends_at_the_reset(cell: Kernel, server: Simulated) -> None:
    """The cell returns at once; the request is sent when its limit resets, not earlier."""
    cell.run("%codex monitor")  # imports the monitor, so that the next call takes little time
    park(cell, server, "in its time", seconds=8.0)
    known, reset = len(server.prompts), server.core.log[-1].at + 8.0
    assert cell.run("%codex resume --at-reset").status == "ok"
    assert "cooldown" in cell.run("%codex monitor").plain
    assert len(server.prompts) == known
    assert " parked " in cell.run("%codex journal").stream
    assert cell.run("reply.text, reply.status").plain == "('in its time', 'done')"
    (sent,) = server.core.log[known:]
    assert sent.at >= reset
    assert " done " in cell.run("%codex journal").stream


def test_retry_makes_a_new_entry(cell: Kernel, server: Simulated) -> None:
    """The new entry has an answer of its own; the variable has it, the old entry stays."""
    first = park(cell, server, "once more")
    ran = cell.run(f"%codex retry {first[:5]}")
    assert "once more" in ran.markdown
    listed = cell.run("%codex journal").stream.splitlines()
    assert [line.split()[1] for line in listed] == ["done", "parked"]
    assert cell.run("reply.text, reply.id").plain == str(("once more", listed[0].split()[0]))
    assert server.prompts[-2:] == ["[[echo: once more]]"] * 2


def test_resume_all_is_limited_to_this_notebook(cell: Kernel, server: Simulated) -> None:
    """Requests of another notebook are resumed with `--everywhere` only."""
    park(cell, server, "from one")
    cell.run("os.environ['JPY_SESSION_NAME'] = '/lessons/two.ipynb'")
    park(cell, server, "from two")
    here = cell.run("%codex resume all").markdown
    assert "from two" in here
    assert "from one" not in here
    assert "Nothing is parked" in cell.run("%codex resume all").stream
    assert "from one" in cell.run("%codex resume all --everywhere").markdown
    assert "Nothing is parked" in cell.run("%codex resume all --everywhere").stream


@pytest.fixture
def waiting(cell: Kernel, server: Simulated) -> Iterator[list[str]]:
    """The ids of requests that wait for a limit; at least two begin with the same digit."""
    server.core.script([Fault("requests_per_day", seconds=5000)] * 20)
    cell.run(
        "%config Codex.patience = '2h'\n"
        "for n in range(17):\n    get_ipython().run_cell_magic('codex', '-b', f'waits {n}')"
    )
    yield [line.split()[0] for line in cell.run("%codex journal").stream.splitlines()]
    server.core._faults.clear()
    cell.run("%codex cancel all\n%config Codex.patience = '10m'")


def test_an_ambiguous_id_is_refused(cell: Kernel, server: Simulated, waiting: list[str]) -> None:
    """All candidates are named; nothing is sent, ended or erased."""
    digits = [id_[0] for id_ in waiting]
    digit = next(each for each in digits if digits.count(each) > 1)
    cell.run("%codex limits")
    known = len(server.prompts)
    for command in ("resume", "retry", "journal", "forget", "cancel", "park"):
        printed = "\n".join(cell.run(f"%codex {command} {digit}").shown_error)
        assert "Type more of the id" in printed, command
        assert [id_ in printed for id_ in waiting if id_[0] == digit][:7].count(False) == 0
    listed = cell.run("%codex journal").stream.splitlines()
    assert [line.split()[1] for line in listed] == ["waiting"] * 17
    assert len(server.prompts) == known


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], None] | None]:
    """Put the journal's folder on a disk of 1 MB, and return what mounts it anew; None: cannot."""
    folder, mount = tmp_path / "kept", shutil.which("mount") or "mount"
    folder.mkdir(mode=0o700)
    options = "size=1m,mode=0700"

    def run(how: str) -> bool:
        command = [mount, "-t", "tmpfs", "-o", how, "none", str(folder)]
        with suppress(OSError):
            return subprocess.run(command, capture_output=True).returncode == 0
        return False

    if not run(options):
        yield None
        return
    yield lambda how: run(f"remount,{how},{options}") or pytest.fail("it cannot be mounted anew")
    subprocess.run(["umount", "--lazy", folder], check=True)


# Where no small disk can be mounted: no file of this kernel grows any more.
FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
"""


def test_a_full_disk_is_reported_once_per_cell(
    server: Simulated, tmp_path: Path, disk: Callable[[str], None] | None
) -> None:
    """The prompt is answered all the same, and one line says what is not kept."""
    for cell in started_kernel(server, tmp_path / "kept"):
        cell.run("%%codex\n[[echo: kept]]")
        if disk:
            with suppress(OSError), (tmp_path / "kept" / "filler").open("wb", 0) as filler:
                while filler.write(b"x" * 4096):
                    pass
        else:
            cell.run(FULL)
        words = " ".join(f"word{n}" for n in range(3000))
        server.core.change_knobs(speed=50_000.0)
        for _ in range(2):
            ran = cell.run(f"%%codex -o reply\n[[echo: {words}]]")
            assert ran.status == "ok", ran.shown_error
        check_journal_in_memory(cell, ran.plain, words)
        if disk:
            assert "is full" in ran.plain


@pytest.mark.parametrize("exists", [True, False])
def test_a_read_only_folder_is_reported(
    server: Simulated, tmp_path: Path, disk: Callable[[str], None] | None, exists: bool
) -> None:
    """The same on a read-only file system, with or without a journal."""
    if disk is None:
        pytest.skip("this user cannot mount a read-only file system")
    if exists:
        journal = Journal(tmp_path / "kept")
        journal.read_totals()
        journal.close()
    disk("ro")
    for cell in started_kernel(server, tmp_path / "kept"):
        ran = cell.run("%%codex -o reply\n[[echo: answered]]")
        assert ran.status == "ok", ran.shown_error
        check_journal_in_memory(cell, ran.plain, "answered")


def check_journal_in_memory(cell: Kernel, shown: str, answer: str) -> None:
    """Check that the answer is complete, and that one line says that only memory keeps it."""
    assert cell.run(f"reply.text == {answer!r}, reply.status").plain == "(True, 'done')"
    lines = [line for line in shown.splitlines() if "in memory only" in line]
    assert len(lines) == 1
    listed = cell.run("%codex journal").stream.splitlines()
    assert " done " in listed[0]
    assert "in memory only" in listed[-1]
    assert cell.lives()
