"""Requests among a kernel's reloads, forks, threads, event loops and subshells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel_client import MESSAGE_TIMEOUT_S, Kernel, kernel
from tests.simulated import KEY, Simulated, simulated

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def server() -> Iterator[Simulated]:
    """A simulator for all tests of this module."""
    with simulated(tpm=10_000_000, rpm=100_000, latency=0.01, speed=500.0) as running:
        yield running


@pytest.fixture(scope="module")
def cell(server: Simulated) -> Iterator[Kernel]:
    """A kernel with the extension loaded."""
    with kernel(**server.environ) as started:
        assert started.run("%load_ext nbcodex\nimport nbcodex").status == "ok"
        yield started


def test_reload_ext_leaves_working_magics(cell: Kernel) -> None:
    """`%reload_ext` leaves working magics and one `%config Codex`."""
    cell.run("%config Codex.patience = '5m'")
    ran = cell.run("%reload_ext nbcodex")
    assert ran.status == "ok"
    assert "hello" in cell.run("%%codex\n[[echo: hello]]").markdown
    assert (
        cell.run("sum(type(c).__name__ == 'Codex' for c in get_ipython().configurables)").plain
        == "1"
    )


def test_autoreload_of_changed_modules_works(cell: Kernel) -> None:
    """`%autoreload 2` with changed modules does not break a later cell."""
    cell.run("%load_ext autoreload\n%autoreload 2")
    touched = cell.run(
        "import importlib.util, os, time, pathlib\n"
        "for name in ('client', 'runtime.event_loop', 'models', 'events', 'errors', "
        "'notebook.extension'):\n"
        "    path = importlib.util.find_spec('nbcodex.' + name).origin\n"
        "    os.utime(path, (time.time() + 5, time.time() + 5))"
    )
    assert touched.status == "ok", touched.traceback
    for _ in range(2):
        ran = cell.run("%%codex -o reply\n[[echo: reloaded]]")
        assert ran.status == "ok", ran.shown_error
        assert "reloaded" in ran.markdown
    assert cell.run("nbcodex.ask('[[echo: too]]').text.count('too')").plain == "1"
    cell.run("%autoreload 0")


def test_a_forked_child_has_its_own_connections(cell: Kernel) -> None:
    """A forked child uses a loop and connections of its own, and its parent keeps its own."""
    ran = cell.run(
        "import multiprocessing\n"
        "def child(queue):\n"
        "    queue.put(nbcodex.ask('[[echo: from the child]]').text)\n"
        "context = multiprocessing.get_context('fork')\n"
        "queue = context.Queue()\n"
        "process = context.Process(target=child, args=(queue,)); process.start()\n"
        "said = queue.get(timeout=60); process.join(60)\n"
        "print(said, process.exitcode); print(nbcodex.ask('[[echo: parent]]').text)"
    )
    assert "from the child" in ran.stream
    assert "parent" in ran.stream


def test_ask_works_from_any_thread(cell: Kernel) -> None:
    """`ask` works from any thread, several at once."""
    ran = cell.run(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    said = list(pool.map(lambda n: nbcodex.ask(f'[[echo: number {n}]]').text, range(8)))\n"
        "print([f'number {n}' in text for n, text in enumerate(said)])"
    )
    assert ran.stream.strip() == str([True] * 8)


def test_ask_on_the_network_loop_is_refused(cell: Kernel) -> None:
    """`ask` in a callback on the network's loop raises instead of waiting for itself."""
    ran = cell.run(
        "from nbcodex.runtime import event_loop\n"
        "async def inside():\n    return nbcodex.ask('x')\n"
        "event_loop.shared().submit(inside()).result(timeout=60)"
    )
    assert ran.error == "ConfigurationError"
    assert "aask" in "".join(ran.shown_error)
    assert cell.lives()


def test_aask_leaves_the_kernels_loop_running(cell: Kernel) -> None:
    """`aask` is awaited on the kernel's loop, which runs on meanwhile."""
    ran = cell.run(
        "import asyncio\nticks = 0\n"
        "async def tick():\n    global ticks\n    while True:\n"
        "        ticks += 1; await asyncio.sleep(0.01)\n"
        "ticking = asyncio.create_task(tick())\n"
        "replies = await asyncio.gather(*(nbcodex.aask(f'[[tokens=500]] {n}') for n in range(3)))\n"
        "ticking.cancel(); print([bool(r) for r in replies], ticks > 5)"
    )
    assert ran.stream.strip() == "[True, True, True] True"


def test_cancelling_aask_ends_the_request(cell: Kernel, server: Simulated) -> None:
    """Cancelling the task that awaits `aask` ends the request."""
    ran = cell.run(
        "task = asyncio.create_task(nbcodex.aask('[[tokens=5000]] long'))\n"
        "await asyncio.sleep(0.2); task.cancel()\n"
        "try:\n    await task\nexcept asyncio.CancelledError: print('cancelled')"
    )
    assert ran.stream.strip() == "cancelled"


def test_a_subshell_can_ask_while_the_main_shell_is_busy(cell: Kernel) -> None:
    """A cell in a subshell's thread asks while another cell blocks the main one."""
    control = cell.client.session.msg("create_subshell_request", {})
    cell.client.control_channel.send(control)
    made = cell.client.control_channel.get_msg(timeout=MESSAGE_TIMEOUT_S)
    while made["msg_type"] != "create_subshell_reply":
        made = cell.client.control_channel.get_msg(timeout=MESSAGE_TIMEOUT_S)
    cell.run("import time\nis_answered = False")
    blocked = cell.start("while not is_answered: time.sleep(0.02)")
    code = (
        "get_ipython().run_cell_magic('codex', '', '[[echo: from below]]')\n"
        "get_ipython().user_ns['is_answered'] = True"
    )
    message = cell.client.session.msg(
        "execute_request", {"code": code, "silent": False, "allow_stdin": False}
    )
    message["header"]["subshell_id"] = made["content"]["subshell_id"]
    cell.client.shell_channel.send(message)
    replies = {}
    while len(replies) < 2:
        reply = cell.client.get_shell_msg(timeout=MESSAGE_TIMEOUT_S)
        replies[reply["parent_header"]["msg_id"]] = reply["content"]["status"]
    assert replies == {message["header"]["msg_id"]: "ok", blocked: "ok"}


def test_two_cells_at_once_keep_their_own_answers(cell: Kernel) -> None:
    """Two `%%codex` in one process keep to their own answers."""
    ran = cell.run(
        "from threading import Thread\n"
        "def one(n): get_ipython().run_cell_magic('codex', f'-o r{n}', f'[[echo: I am {n}]]')\n"
        "threads = [Thread(target=one, args=(n,)) for n in range(2)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print('I am 0' in r0.text, 'I am 1' in r1.text)"
    )
    assert "True True" in ran.stream


def test_a_script_ends_quietly_in_mid_stream(server: Simulated, tmp_path: Path) -> None:
    """A script whose main thread ends while a request runs ends at once."""
    import subprocess
    import sys

    script = (
        "import threading, nbcodex, time\n"
        "threading.Thread(target=nbcodex.ask, args=('[[tokens=9000]]',), daemon=True).start()\n"
        "time.sleep(1.5)"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**server.environ, "PATH": "/usr/bin", "NBCODEX_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0
    assert ended.stderr == ""
    assert KEY not in ended.stdout
