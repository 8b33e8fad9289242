"""Stop works at once, wherever a request is, and what had arrived is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from nbcodex.simulator import Fault
from tests.kernel_client import CellResult, Kernel, kernel
from tests.simulated import Simulated, simulated

pytestmark = pytest.mark.kernel

# Without Stop, each of these requests takes at least 50 s.
STOP_TIMEOUT_S = 25.0

PROMPT = "[[tokens=4000]] a long answer"


@pytest.fixture(scope="module")
def slow() -> Iterator[Simulated]:
    """A simulator whose answers take their time."""
    with simulated(tpm=10_000_000, rpm=100_000, latency=0.05, speed=40.0) as running:
        yield running


@pytest.fixture(scope="module")
def cell(slow: Simulated) -> Iterator[Kernel]:
    """A kernel that has answered once, so that everything is imported."""
    with kernel(**slow.environ) as started:
        assert started.run("%load_ext nbcodex").status == "ok"
        assert started.run("%%codex\n[[echo: warm]]").status == "ok"
        yield started


def stop(cell: Kernel, asked: str, *, times: int = 1) -> tuple[CellResult, float]:
    """Press Stop; return what came of the cell, and the seconds from the first press to its end."""
    began = time.perf_counter()
    for _ in range(times):
        cell.interrupt()
        time.sleep(0.01 if times > 1 else 0)
    ran = cell.finish(asked)
    return ran, time.perf_counter() - began


def test_stop_in_a_stream_keeps_the_text(cell: Kernel) -> None:
    """The text so far stays, marked; the next cell runs."""
    asked = cell.start(f"%%codex -o reply\n{PROMPT}")
    cell.wait_for(asked, "answering")
    ran, seconds = stop(cell, asked)
    assert seconds < STOP_TIMEOUT_S
    assert ran.status == "error"
    assert "interrupted, this is not the whole answer" in ran.markdown
    assert cell.run("reply.status, bool(reply), len(reply.text) > 0").plain == (
        "('interrupted', False, True)"
    )


@pytest.mark.parametrize(
    ("fault", "shows"),
    [
        (Fault("tokens_per_minute", seconds=50), "waiting"),
        (Fault("stalled", after=-1), "sent"),
        (Fault("stalled", after=3), "answering"),
        (Fault("slow", seconds=50), "sent"),
    ],
    ids=["countdown", "stalled connection", "stalled stream", "no first byte"],
)
def test_stop_in_a_wait_ends_at_once(
    cell: Kernel, slow: Simulated, fault: Fault, shows: str
) -> None:
    """A countdown and a silent connection end as quickly as a stream."""
    slow.core.script([fault])
    known = len(slow.core.log)
    asked = cell.start(f"%%codex -m gpt-5.6-mini\n{PROMPT} {fault.kind} {fault.after}")
    while len(slow.core.log) == known:
        time.sleep(0.01)  # a fault that no request met would meet the next test's
    cell.wait_for(asked, shows)
    ran, seconds = stop(cell, asked)
    assert seconds < STOP_TIMEOUT_S
    assert ran.error == "Stopped"
    assert len(ran.shown_error) <= 6
    assert cell.lives()
    # The hold is shared by all who have the folder: the next test gets another.
    cell.run("import os, tempfile; os.environ['NBCODEX_HOME'] = tempfile.mkdtemp()")


def test_a_second_stop_changes_nothing(cell: Kernel) -> None:
    """A second Stop while the first is handled changes nothing."""
    asked = cell.start(f"%%codex -o reply\n{PROMPT}")
    cell.wait_for(asked, "answering")
    ran, seconds = stop(cell, asked, times=2)
    assert seconds < STOP_TIMEOUT_S
    assert ran.status == "error"
    assert "interrupted" in ran.markdown
    assert cell.lives()


PRESS_AGAIN = """
import signal
kernel = get_ipython().kernel
do_execute = kernel.do_execute
async def press_again(*args, **options):
    kernel.do_execute = do_execute
    reply = await do_execute(*args, **options)
    signal.raise_signal(signal.SIGINT)
    return reply
kernel.do_execute = press_again
"""


@pytest.mark.parametrize("mapped", [False, True], ids=["request", "map"])
def test_a_second_stop_after_the_cell_does_not_lose_its_reply(cell: Kernel, mapped: bool) -> None:
    """An interrupt after a cell's code has ended makes ipykernel lose the cell's reply."""
    assert cell.run(PRESS_AGAIN).status == "ok"
    ask = "import nbcodex; nbcodex.map('{item} [[tokens=4000]]', ['one'])"
    asked = cell.start(ask if mapped else f"%%codex -o reply\n{PROMPT}")
    cell.wait_for(asked, "at the server" if mapped else "answering")
    ran, _ = stop(cell, asked)
    assert ran.error == "Stopped"
    assert cell.lives()


@pytest.mark.parametrize("after", [0.0, 0.001, 0.003, 0.01, 0.03])
def test_an_early_stop_ends_the_request(cell: Kernel, slow: Simulated, after: float) -> None:
    """However early Stop comes, the cell ends, and no request continues without it."""
    # Before a cell's first line runs, ipykernel itself loses the reply to an interrupt.
    magic = f"get_ipython().run_cell_magic('codex', '', {f'{PROMPT} {after}'!r})"
    asked = cell.start(f"print('running')\n{magic}")
    cell.wait_for(asked, "'text': 'running")
    time.sleep(after)
    ran, seconds = stop(cell, asked)
    assert seconds < STOP_TIMEOUT_S
    assert ran.status == "error"
    time.sleep(0.1)
    assert (
        cell.run(
            "import asyncio; from nbcodex.runtime import event_loop\n"
            "async def left(): return [t for t in asyncio.all_tasks() if 'codex' in t.get_name()]\n"
            "event_loop.shared().submit(left()).result()"
        ).plain
        == "[]"
    )


def test_stop_ends_a_loop_that_catches_exceptions(cell: Kernel) -> None:
    """`except Exception` does not catch a Stop."""
    asked = cell.start(
        "import nbcodex\nfor n in range(100):\n    try:\n"
        f"        print(n); nbcodex.ask('{PROMPT}')\n    except Exception: pass"
    )
    cell.wait_for(asked, "import nbcodex")
    time.sleep(0.3)
    ran, seconds = stop(cell, asked)
    assert seconds < STOP_TIMEOUT_S
    assert ran.error == "Stopped"
    assert ran.stream.split() == ["0"]
