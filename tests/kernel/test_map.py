"""Maps in real kernels: frames, Stop and resume, and what a killed kernel leaves."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from nbcodex.settings import JOURNAL_FILENAME
from nbcodex.simulator import RequestRecord
from tests.kernel_client import MESSAGE_TIMEOUT_S, Kernel, kernel, wait_until
from tests.simulated import Simulated, simulated

pytestmark = pytest.mark.kernel

ROWS = 40


@pytest.fixture
def server() -> Iterator[Simulated]:
    """A simulator that answers at once, until a test gives it a limit."""
    with simulated(tpm=None, rpm=None, latency=0.05, speed=5_000.0, chunk=100) as running:
        yield running


def started_kernel(server: Simulated, home: Path) -> AbstractContextManager[Kernel]:
    return kernel(
        **server.environ, NBCODEX_HOME=str(home / "kept"), JPY_SESSION_NAME="/lessons/one.ipynb"
    )


def load_extension(cell: Kernel) -> str:
    output = cell.run("%load_ext nbcodex\nimport nbcodex").stream
    cell.run("%config Codex.display = 'text'")
    return output


def test_map_cell_assigns_a_frame_with_answers(server: Simulated, tmp_path: Path) -> None:
    """`--map` assigns a frame with answers, and shows the first of them and one line of figures."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        cell.run("import pandas as pd\nframe = pd.DataFrame({'word': ['one', 'two', None]})")
        ran = cell.run("%%codex --map frame -o back\n[[echo: <{word}>]]")
        assert ran.status == "ok"
        assert "2 of 3 rows answered · 1 failed" in ran.plain
        assert "no value in its column" in ran.plain
        assert "<one>" not in ran.markdown  # it would be a tag
        assert "one" in ran.markdown
        assert cell.run("list(back['answer'].dropna())").plain == "['<one>', '<two>']"
        assert "there is no such variable" in str(cell.run("%%codex --map x\nhi {}").outputs)
        assert cell.run("%%codex --map frame\n{wrod}").error == "ConfigurationError"


def test_settings_apply_before_the_first_magic(server: Simulated, tmp_path: Path) -> None:
    """`nbcodex.map` and `ask` use `%config Codex` as soon as the extension is loaded."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        ran = cell.run("r = nbcodex.map('[[echo: {}]]', ['a', 'b'])")
        assert "2 answered" in ran.plain
        assert "from now on prompts and answers are kept" in ran.plain
        assert "from now on" not in cell.run("r = nbcodex.map('[[echo: {}]]', ['c'])").plain
        cell.run("%config Codex.model = 'no-such-model'")
        assert cell.run("nbcodex.ask('hi')").error == "ModelError"


def test_an_expensive_map_asks_first(server: Simulated, tmp_path: Path) -> None:
    """Yes continues, no is an error; without an input line, the message says what to do."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        cell.run(
            "from nbcodex.openai_api import pricing\n"
            "pricing.cost, pricing.known_provider = lambda *_: 0.75, lambda _: 'openai'"
        )
        cell.client.allow_stdin = True
        for answer, error in (("y", ""), ("n", "NbcodexError")):
            execution = cell.start(f"nbcodex.map('[[echo: {answer} {{}}]]', ['a', 'b'])")
            question = cell.client.get_stdin_msg(timeout=MESSAGE_TIMEOUT_S)["content"]["prompt"]
            assert "~$1.50" in question
            cell.client.input(answer)
            assert cell.finish(execution).error == error
        known = len(server.prompts)
        cell.client.allow_stdin = False
        ran = cell.run("nbcodex.map('[[echo: 3 {}]]', ['a', 'b'])")
        assert "confirm=True" in "".join(ran.shown_error)
        assert len(server.prompts) == known == 2
        assert cell.run("nbcodex.map('[[echo: 3 {}]]', ['a', 'b'], confirm=True)").error == ""


def test_stop_parks_the_rows_of_iterators_and_awaits(server: Simulated, tmp_path: Path) -> None:
    """Running rows are parked over an iterator and on the kernel's own loop."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        server.core.change_knobs(latency=600.0)  # without Stop, `finish` would fail
        for code in (
            "for reply in nbcodex.map('[[echo: a {}]]', iter(range(100))): pass",
            "await nbcodex.amap('[[echo: b {}]]', list(range(100)))",
        ):
            known = len(server.prompts)
            execution = cell.start(code)
            wait_until(lambda known=known: len(server.prompts) > known)  # type: ignore[misc]
            cell.interrupt()
            ran = cell.finish(execution)
            assert ran.error in {"Stopped", "KeyboardInterrupt", "CancelledError"}
            assert cell.lives()
        assert "100 parked" in cell.run("%codex journal").stream


def test_stop_parks_a_map_and_resume_completes_it(server: Simulated, tmp_path: Path) -> None:
    """In the same kernel the variable has all rows, and nothing is paid twice."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        cell.run(f"rows = [f'row {{n}}' for n in range({ROWS})]")
        server.core.change_knobs(rpm=ROWS // 2)
        execution = cell.start("%%codex --map rows -o back\n[[echo: {}]]")
        wait_until_limit_is_reached(server, tmp_path)
        cell.interrupt()
        ran = cell.finish(execution)
        assert ran.error == "Stopped"
        assert any("%codex resume m" in line for line in ran.shown_error)
        assert int(cell.run("sum(map(bool, nbcodex.map.last))").plain) >= ROWS // 2 - 1
        assert "parked" in cell.run("%codex journal").stream
        server.core.change_knobs(rpm=100_000)
        ran = cell.run("%codex resume")
        assert f"{ROWS} answered" in ran.plain
        assert cell.run("[r.text for r in back] == rows").plain == "True"
        assert requests_answered(server) == ROWS
        assert "Nothing is parked" in cell.run("%codex resume").stream


def test_cancel_and_park_end_a_background_map(server: Simulated, tmp_path: Path) -> None:
    """By its id, a prefix of it, or `all`; one line says so, and resume continues."""
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        cell.run(f"import asyncio\nROWS = list(range({15 * ROWS}))")
        server.core.change_knobs(latency=0.5)
        for action, which, error in (
            ("cancel", "MAP", "CancelledError"),
            ("park", "MAP[:5]", "ParkedError"),
            ("cancel", "'all'", "CancelledError"),
        ):
            known = len(server.prompts)
            code = f"asyncio.create_task(nbcodex.amap('[[echo: {{}}]] {len(which)}', ROWS))"
            cell.run(f"nbcodex.map.last = None\ntask = {code}")
            cell.run("while not any(nbcodex.map.last or ()): await asyncio.sleep(0.05)")
            map_id = cell.run("MAP = nbcodex.map.last.id; MAP").plain.strip("'")
            output = cell.run(
                f"get_ipython().run_line_magic('codex', '{action} ' + {which})"
            ).stream
            assert output.startswith(f"{map_id}: {action}")
            assert output.count("\n") == 1
            assert f"`%codex resume {map_id}` continues it" in output
            assert cell.run("await task").error == error
            assert "is running" in "".join(cell.run(f"%codex {action} {map_id}").shown_error)
            # If rows were still sent, all of them would have been sent when none arrives any more.
            assert prompts_when_quiet(server) - known < 15 * ROWS
        server.core.change_knobs(latency=0.01)
        assert f"{15 * ROWS:,} answered" in cell.run(f"%codex resume {map_id}").plain


def test_a_killed_kernels_map_pays_only_for_missing_rows(server: Simulated, tmp_path: Path) -> None:
    """The next kernel lists it; the same cell again sends the missing rows only."""
    code = f"back = nbcodex.map('[[echo: {{}}]]', [f'row {{n}}' for n in range({ROWS})])"
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        pid = int(cell.run("import os; os.getpid()").plain)
        server.core.change_knobs(rpm=ROWS // 2)
        cell.start(code)
        wait_until_limit_is_reached(server, tmp_path)
        os.kill(pid, signal.SIGKILL)
    server.core.change_knobs(rpm=100_000)
    with started_kernel(server, tmp_path) as cell:
        assert "1 parked or abandoned here (map m" in load_extension(cell)
        ran = cell.run(code)
        assert f"{ROWS} answered" in ran.plain
        assert "reused" in ran.plain
        assert cell.run("[r.text for r in back][-1]").plain == f"'row {ROWS - 1}'"
        assert requests_answered(server) == ROWS


def test_a_batch_map_survives_its_kernel(server: Simulated, tmp_path: Path) -> None:
    """Killed after the upload; the next kernel lists it, fetches it, and nothing is paid twice.

    There, Stop leaves another one with the provider, and `%codex cancel` ends it.
    """
    server.core.change_knobs(batch_seconds=6.0)
    code = "back = nbcodex.map('[[echo: WORD {}]]', list(range(30)), engine='batch')"
    with started_kernel(server, tmp_path) as cell:
        load_extension(cell)
        pid = int(cell.run("import os; os.getpid()").plain)
        cell.start(code.replace("WORD", "one"))
        wait_until(lambda: jobs_created(server) == 1)
        os.kill(pid, signal.SIGKILL)
    with started_kernel(server, tmp_path) as cell:
        output = load_extension(cell)
        assert "1 parked or abandoned here (map m" in output
        map_id = output.partition("(map ")[2].partition(")")[0]
        ran = cell.run(f"%codex resume {map_id}")
        assert "30 answered" in ran.plain
        assert cell.run("[r.text for r in nbcodex.map.last.result][-1]").plain == "'one 29'"
        assert (jobs_created(server), batch_rows_answered(server)) == (1, 30)
        assert server.core.batches._files == {}
        server.core.change_knobs(batch_seconds=60.0)
        execution = cell.start(code.replace("WORD", "two"))
        known = len(server.core.log)
        wait_until(lambda: any(is_poll(seen) for seen in server.core.log[known:]))
        cell.interrupt()
        ran = cell.finish(execution)
        assert ran.error == "Stopped"
        assert "%codex cancel m" in "".join(ran.shown_error)
        ran = cell.run("%codex cancel " + cell.run("nbcodex.map.last.id").plain.strip("'"))
        assert "parked" in ran.plain
        assert server.core.batches._files == {}
        assert jobs_created(server) == 2


def jobs_created(server: Simulated) -> int:
    """Return how many batch jobs were created."""
    return sum((s.method, s.path) == ("POST", "/v1/batches") for s in server.core.log)


def is_poll(seen: RequestRecord) -> bool:
    """Whether a request asks for the status of a batch job, whose id the kernel then knows."""
    return seen.method == "GET" and seen.path.startswith("/v1/batches/")


def batch_rows_answered(server: Simulated) -> int:
    """Return how many rows batch jobs have answered."""
    return sum(seen.method == "BATCH" for seen in server.core.log)


def requests_answered(server: Simulated) -> int:
    """Return how many prompts the server has accepted."""
    return sum(bool(seen.api) and seen.status == 200 for seen in server.core.log)


def wait_until_limit_is_reached(server: Simulated, home: Path) -> None:
    """Wait until half of a map's rows are answered and stored, and no other row is active."""
    # All that the limit lets through at once: no other row can be accepted soon after.
    wait_until(lambda: requests_answered(server) >= ROWS // 2)
    server.core.change_knobs(rpm=4)  # the next row is accepted a quarter of a minute later
    uri = f"{(home / 'kept' / JOURNAL_FILENAME).as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as journal:
        query = "SELECT count(*) FROM entries WHERE status = 'done'"
        wait_until(lambda: journal.execute(query).fetchone()[0] == requests_answered(server))


def prompts_when_quiet(server: Simulated) -> int:
    """Return how many prompts have arrived, once none has arrived for a second."""
    count = -1
    while count != len(server.prompts):
        count = len(server.prompts)
        time.sleep(1.0)
    return count
