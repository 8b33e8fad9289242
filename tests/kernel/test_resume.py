"""Kernels that resume the requests of earlier kernels, without paying twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from nbcodex.simulator import Fault
from tests.kernel_client import MESSAGE_TIMEOUT_S, Kernel, kernel, wait_until
from tests.simulated import Simulated, simulated

pytestmark = pytest.mark.kernel

NOTEBOOK = "/lessons/one.ipynb"


@pytest.fixture
def server() -> Iterator[Simulated]:
    """A simulator whose answers take a moment."""
    with simulated(tpm=10**7, rpm=10**5, latency=0.01, speed=200.0) as running:
        yield running


def started_kernel(
    server: Simulated, home: Path, notebook: str = NOTEBOOK
) -> AbstractContextManager[Kernel]:
    """Return a kernel of a notebook, as a context."""
    return kernel(**server.environ, NBCODEX_HOME=str(home / "kept"), JPY_SESSION_NAME=notebook)


def load_extension(cell: Kernel) -> str:
    """Load the extension, and return what it prints."""
    printed = cell.run("%load_ext nbcodex").stream
    cell.run("%config Codex.display = 'text'")
    return printed


def park_request(cell: Kernel, server: Simulated, cellmagic: str) -> None:
    """Run a cell whose request a daily limit parks."""
    server.core.script([Fault("requests_per_day", seconds=5000)])
    assert cell.run(cellmagic).error == "ParkedError"


def test_a_parked_request_is_listed_and_resumed(server: Simulated, tmp_path: Path) -> None:
    """The next kernel of the notebook lists it, and resuming assigns its variable."""
    with started_kernel(server, tmp_path) as cell:
        assert load_extension(cell) == ""
        park_request(cell, server, "%%codex -o b\n[[echo: the answer]]")
    with started_kernel(server, tmp_path, "/lessons/two.ipynb") as cell:
        assert load_extension(cell) == ""
    with started_kernel(server, tmp_path) as cell:
        assert "1 parked or abandoned here" in load_extension(cell)
        known = len(server.prompts)
        ran = cell.run("%codex resume")
        assert "the answer" in ran.markdown
        assert cell.run("b.text").plain == "'the answer'"
        assert len(server.prompts) == known + 1
        assert "Nothing is parked" in cell.run("%codex resume").stream


def test_a_killed_demo_is_continued_by_the_next_one(server: Simulated, tmp_path: Path) -> None:
    """The demo has a journal on disk, and its requests may go to the next demo's simulator."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        cell.run("%codex demo calm")
        pid = int(cell.run("import os; os.getpid()").plain)
        execution = cell.start("%%codex -o a\n[[tokens=6000]] a long one")
        cell.wait_for(execution, "tokens/s")
        os.kill(pid, signal.SIGKILL)
    with started_kernel(server, tmp_path) as cell:
        assert load_extension(cell) == ""
        assert "1 parked or abandoned here" in cell.run("%codex demo calm").stream
        execution = cell.start("%codex resume")
        cell.wait_for(execution, "tokens/s")
        cell.interrupt()
        cell.finish(execution)
        assert "interrupted" in cell.run("%codex journal").stream
    assert server.prompts == []


def test_a_killed_kernels_request_is_resumed(server: Simulated, tmp_path: Path) -> None:
    """After SIGKILL in mid-stream the prompt is abandoned, its text kept, its answer complete."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        pid = int(cell.run("import os; os.getpid()").plain)
        execution = cell.start("%%codex -o a\n[[tokens=6000]] a long one")
        cell.wait_for(execution, "tokens/s")
        os.kill(pid, signal.SIGKILL)
    server.core.change_knobs(speed=10_000.0)
    with started_kernel(server, tmp_path) as cell:
        assert "1 parked or abandoned here" in load_extension(cell)
        listed = cell.run("%codex journal").stream
        assert "abandoned" in listed
        assert "(possibly paid)" in listed
        ran = cell.run("%codex resume")
        assert "may be paid twice" in ran.stream
        assert "possibly paid twice" in ran.plain
        assert cell.run("a.status, len(a.text) > 2000").plain == "('done', True)"


def test_two_kernels_that_resume_send_once(server: Simulated, tmp_path: Path) -> None:
    """Of two that resume the same request, one sends it."""
    with started_kernel(server, tmp_path) as one:
        load_extension(one)
        park_request(one, server, "%%codex -o b\n[[tokens=100]] once")
        entry = one.run("%codex journal").stream.split()[0]
        with started_kernel(server, tmp_path) as two:
            load_extension(two)
            known = len(server.prompts)
            executions = [cell.start(f"%codex resume {entry}") for cell in (one, two)]
            ran = [cell.finish(id_) for cell, id_ in zip((one, two), executions, strict=True)]
    ends = sorted(each.status for each in ran)
    assert ends == ["error", "ok"], [each.shown_error for each in ran]
    assert len(server.prompts) == known + 1


def test_resuming_a_done_or_running_request_is_refused(server: Simulated, tmp_path: Path) -> None:
    """The error takes no answer away."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        cell.run("%%codex -o good\n[[echo: an answer]]")
        cell.run("%%codex -b -o later\n[[tokens=200]] slow")
        for name in ("good", "later"):
            entry = cell.run(f"print({name}.id)").stream.strip()
            ran = cell.run(f"%codex resume {entry}")
            assert "cannot be resumed" in " ".join(ran.shown_error)
        assert cell.run("good.text, good.status").plain == "('an answer', 'done')"
        assert cell.run("len(later.text) > 100, later.status").plain == "(True, 'done')"


def test_the_slower_of_two_kernels_keeps_its_variable(server: Simulated, tmp_path: Path) -> None:
    """Of two kernels that resume, the slower one's variable keeps its value."""
    with started_kernel(server, tmp_path) as one, started_kernel(server, tmp_path) as two:
        load_extension(one), load_extension(two)
        park_request(one, server, "%%codex -o b\n[[tokens=100]] once")
        assert two.run("b = 'mine'").status == "ok"
        entry = one.run("%codex journal").stream.split()[0]
        executions = [cell.start(f"%codex resume {entry}") for cell in (one, two)]
        ends = [cell.finish(id_).status for cell, id_ in zip((one, two), executions, strict=True)]
        assert sorted(ends) == ["error", "ok"]
        expected = {"ok": "done", "error": "parked"}
        assert one.run("b.status").plain == repr(expected[ends[0]])
        if ends[1] == "error":
            assert two.run("b").plain == "'mine'"


def test_a_resume_without_text_keeps_the_earlier_text(server: Simulated, tmp_path: Path) -> None:
    """Parked before anything arrives, the variable has the text of the earlier attempt."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        cell.run("%%codex -b -o r\n[[tokens=12000]] slow")
        entry = cell.run("print(r.id)").stream.strip()
        wait_until(lambda: len(cell.run(f"%codex journal {entry}").stream) > 300)
        cell.run("%codex park")
        text = cell.run("r.text").plain
        assert len(text) > 50
        park_request(cell, server, f"%codex resume {entry}")
        assert cell.run("r.text").plain == text


def test_run_all_again_sends_changed_cells_only(server: Simulated, tmp_path: Path) -> None:
    """With reuse, a restarted notebook sends nothing but what was changed."""
    cells = [f"%%codex -o r{n}\n[[echo: prompt {n}]]" for n in range(10)]
    for known in (10, 10):
        with started_kernel(server, tmp_path) as cell:
            load_extension(cell)
            cell.run("%config Codex.reuse = True")
            ran = [cell.run(each) for each in cells]
            assert len(server.prompts) == known
            if known == len(cells) and server.prompts and "reused" in ran[0].plain:
                changed = [
                    "%%codex\n[[echo: prompt 10]]",
                    "%%codex --system other\n[[echo: prompt 0]]",
                    "%%codex -m gpt-5.6-mini\n[[echo: prompt 0]]",
                    "%%codex -p '{\"temperature\": 1}'\n[[echo: prompt 0]]",
                ]
                for each in changed:
                    assert "reused" not in cell.run(each).plain
                assert len(server.prompts) == known + len(changed)
                return
    raise AssertionError("nothing was reused")


def test_background_answers_appear_in_their_cells(server: Simulated, tmp_path: Path) -> None:
    """Cells return at once; each answer replaces its own cell's output and fills its variable."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        with server.held("number"):
            for n in range(4):
                cell.run(f"%%codex -b -o r{n}\n[[tokens=120]] number {n}")
                ran = cell.run(f"type(r{n}).__name__, bool(r{n})")
                assert ran.plain == "('PendingReply', False)"
        assert cell.run("all(len(r.text) > 100 for r in (r0, r1, r2, r3))").plain == "True"
        assert cell.run("[bool(r) for r in (r0, r1, r2, r3)]").plain == str([True] * 4)


def test_a_background_failure_is_shown_in_its_cell(server: Simulated, tmp_path: Path) -> None:
    """Its place names the limit or budget, and how to continue."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        server.core.script([Fault("requests_per_day", seconds=5000)])
        for cap, why in (("off", "Requests per day (RPD) reached"), ("500", "budget")):
            cell.run(f"%codex budget {cap}")
            cell.start("%%codex -b -o r --max-output 3000\n[[tokens=20]]")
            shown = ""
            while "parked" not in shown:
                message = cell.client.get_iopub_msg(timeout=MESSAGE_TIMEOUT_S)
                if message["msg_type"] in {"display_data", "update_display_data"}:
                    shown = str(message["content"]["data"])
            assert why in shown
            assert "%codex resume" in shown


def test_a_killed_kernels_ask_is_resumed(server: Simulated, tmp_path: Path) -> None:
    """Requests of `nbcodex.ask` belong to their notebook, as cells do."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        pid = int(cell.run("import os, nbcodex; os.getpid()").plain)
        known = len(server.prompts)
        cell.start("nbcodex.ask('[[tokens=6000]] a long one')")
        wait_until(lambda: len(server.prompts) > known)
        os.kill(pid, signal.SIGKILL)
    server.core.change_knobs(speed=10_000.0)
    with started_kernel(server, tmp_path, "/lessons/two.ipynb") as cell:
        assert load_extension(cell) == ""
    with started_kernel(server, tmp_path) as cell:
        assert "1 parked or abandoned here" in load_extension(cell)
        assert "a long one" in cell.run("%codex resume").markdown


def test_stop_ends_only_the_wait_for_a_background_reply(server: Simulated, tmp_path: Path) -> None:
    """Reading `.text` early waits; Stop ends that wait, and the request continues."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        with server.held("slow"):
            cell.run("%%codex -b -o r\n[[tokens=300]] slow")
            execution = cell.start("print('reading')\nr.text")
            cell.wait_for(execution, "'text': 'reading")  # printed, and not the cell as it was sent
            cell.interrupt()
            assert cell.finish(execution).error == "KeyboardInterrupt"
        assert cell.run("len(r.text) > 100, r.status").plain == "(True, 'done')"


def test_a_kernel_shutdown_parks_running_requests(server: Simulated, tmp_path: Path) -> None:
    """A background request is parked by a shutdown, not abandoned."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        cell.run("%%codex -b -o r\n[[tokens=12000]] slow")
        wait_until(lambda: len(server.prompts) == 1)  # the SDK is loaded
        cell.manager.shutdown_wait_time = 30.0  # a busy machine needs more than the usual 5 s
        cell.manager.shutdown_kernel(now=False)
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        assert " parked " in cell.run("%codex journal").stream


def test_a_kernel_restart_parks_the_running_cell(server: Simulated, tmp_path: Path) -> None:
    """The interrupt before a restart is not a Stop: the next kernel lists the request."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        execution = cell.start("%%codex -o r\n[[tokens=12000]] slow")
        cell.wait_for(execution, "tokens/s")
        cell.manager.shutdown_wait_time = 30.0
        cell.manager.shutdown_kernel(now=False)
    with started_kernel(server, tmp_path) as cell:
        assert "1 parked or abandoned here" in load_extension(cell)
        server.core.change_knobs(speed=10_000.0)
        assert cell.run("%codex resume").status == "ok"
        assert cell.run("r.status").plain == "'done'"


def test_forget_erases_from_every_file(server: Simulated, tmp_path: Path) -> None:
    """Forgotten text is in no file."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        cell.run("%%codex\n[[echo: extraordinary secret]]")
        assert "1 erased" in cell.run("%codex forget all").stream
    for path in (tmp_path / "kept").rglob("*"):
        if path.is_file():
            assert b"extraordinary" not in path.read_bytes()


def test_without_journal_nothing_is_written(server: Simulated, tmp_path: Path) -> None:
    """`%config Codex.journal = False` keeps everything in memory."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        cell.run("%config Codex.journal = False")
        assert "hello" in cell.run("%%codex\n[[echo: hello]]").markdown
        assert "hello" in cell.run("%codex journal").stream
    assert list(tmp_path.rglob("*.sqlite3")) == []


def test_an_unusable_journal_is_reported(server: Simulated, tmp_path: Path) -> None:
    """Prompts work without it, and the cell says what is not kept."""
    (tmp_path / "kept").mkdir(mode=0o700)
    (tmp_path / "kept" / "journal.sqlite3").write_bytes(
        b"this is no database, but it is long enough" * 50
    )
    with started_kernel(server, tmp_path) as cell:
        assert "is damaged" in load_extension(cell)
        assert "is damaged" in cell.run("%codex resume").stream
        ran = cell.run("%%codex\n[[echo: hello]]")
        assert "hello" in ran.markdown
        assert "in memory" in ran.plain


def test_a_damaged_journal_does_not_stop_loading(server: Simulated, tmp_path: Path) -> None:
    """A file whose schema is damaged is reported when the extension is loaded."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        cell.run("%%codex\n[[echo: hello]]")
        cell.manager.shutdown_kernel(now=False)
    path = tmp_path / "kept" / "journal.sqlite3"
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE entries", b"CREATE T\xa8BLE entries"))
    with started_kernel(server, tmp_path) as cell:
        ran = cell.run("%load_ext nbcodex")
        assert ran.status == "ok", ran.shown_error
        assert "is damaged" in ran.stream
