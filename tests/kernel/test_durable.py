"""`--durable` in real kernels: broken streams, killed kernels, one answer, paid once."""

from __future__ import annotations

import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from nbcodex.settings import JOURNAL_FILENAME
from nbcodex.simulator import Fault
from tests.kernel_client import Kernel, kernel, wait_until
from tests.simulated import Simulated

pytestmark = pytest.mark.kernel

WORDS = " ".join(f"word{n}" for n in range(60))
CELL = f"%%codex --durable -o reply\n[[echo: {WORDS}]]"


def environment(simulator: Simulated, home: Path) -> dict[str, str]:
    # Both kernels stand for the same notebook.
    return {
        **simulator.environ,
        "NBCODEX_HOME": str(home),
        "JPY_SESSION_NAME": str(home / "n.ipynb"),
    }


def kill(running: Kernel) -> None:
    """End the kernel as the out-of-memory killer does."""
    os.kill(running.manager.provisioner.pid, signal.SIGKILL)


def has_stored_text(home: Path) -> bool:
    """Return whether the journal contains text of an answer, and its position in the stream."""
    uri = f"{(home / JOURNAL_FILENAME).as_uri()}?mode=ro"
    query = "SELECT count(*) FROM entries WHERE text != '' AND sequence IS NOT NULL"
    with closing(sqlite3.connect(uri, uri=True)) as journal:
        return bool(journal.execute(query).fetchone()[0])


def charges(simulator: Simulated) -> list[int]:
    """Return the charges of all requests that were charged."""
    return [seen.charged for seen in simulator.core.log if seen.charged]


def test_a_broken_durable_stream_continues(simulator: Simulated, tmp_path: Path) -> None:
    """A stream that breaks twice becomes one answer, in one piece, paid once."""
    simulator.core.script([Fault("dropped", after=20), Fault("cut", after=20)])
    with kernel(**environment(simulator, tmp_path)) as running:
        running.run("%load_ext nbcodex")
        ran = running.run(CELL)
        assert ran.status == "ok", ran.shown_error
        assert ran.markdown.count(WORDS) == 1
        assert running.run("reply.attempts, reply.notes").plain == "(3, ())"
    assert len(charges(simulator)) == 1
    assert sum(seen.charged for seen in simulator.core.log) == simulator.core.log[0].charged


def test_a_killed_kernels_durable_answer_is_paid_once(simulator: Simulated, tmp_path: Path) -> None:
    """After SIGKILL in mid-stream the next kernel gets the whole answer, at no further cost."""
    simulator.core.script([Fault("stalled", after=30)])
    with kernel(**environment(simulator, tmp_path)) as first:
        first.run("%load_ext nbcodex")
        first.start(CELL)
        wait_until(lambda: bool(simulator.core._stored) and has_stored_text(tmp_path))
        kill(first)
    with kernel(**environment(simulator, tmp_path)) as second:
        printed = second.run("%load_ext nbcodex").stream
        assert "%codex resume" in printed
        ran = second.run("%codex resume")
        assert ran.status == "ok", ran.shown_error
        assert "may be paid twice" not in ran.stream
        assert ran.markdown.count(WORDS) == 1
        text = second.run("print(reply.text)").stream
        assert text.count(WORDS) == 1
        assert second.run("print(reply.usage.output_tokens)").stream.strip() == str(
            simulator.core.log[0].output_tokens
        )
    assert len(charges(simulator)) == 1
    assert simulator.prompts == [f"[[echo: {WORDS}]]"]
    picked_up = simulator.core.log[-1]
    assert "starting_after=" in picked_up.path


def test_a_stopped_durable_answer_can_be_resumed(simulator: Simulated, tmp_path: Path) -> None:
    """After Stop, `%codex resume` continues with the same answer."""
    simulator.core.script([Fault("stalled", after=30)])
    with kernel(**environment(simulator, tmp_path)) as running:
        running.run("%load_ext nbcodex")
        execution = running.start(CELL)
        wait_until(lambda: bool(simulator.core._stored) and has_stored_text(tmp_path))
        running.interrupt()
        stopped = running.finish(execution)
        assert stopped.status == "error"
        (entry,) = [line.split()[0] for line in running.run("%codex journal").stream.splitlines()]
        assert f"`%codex resume {entry}` continues it." in " ".join(stopped.shown_error)
        ran = running.run("%codex resume " + running.run("print(reply.id)").stream.strip())
        assert ran.markdown.count(WORDS) == 1
        assert running.run("reply.status").plain == "'done'"
    assert len(charges(simulator)) == 1
