"""SIGKILL at every step of a request's life, and 200 times at random: nothing is lost.

A second kernel of the same notebook resumes what the first one left: no prompt is lost, no text
older than a second, no answer is doubled, and a durable one is paid once, unless its kernel died
between the request and the first event: then there is a warning. The 200 random kills take some
minutes and print figures; ``pytest -s -m benchmark tests/crash`` runs them.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbcodex.settings import LIMITER_FILENAME
from nbcodex.simulator import Fault
from tests.crash.fork_server import KernelForkServer, fork_server
from tests.crash.scene import Asked, Killed, Scene, locked, reports, wait_until
from tests.simulated import Simulated, simulated

pytestmark = pytest.mark.kernel

# The options of each child's prompts: three in the background, and the last one in its cell.
LINES = ("-b", "-b --durable", "-b", "--durable")

FAULTS = (
    Fault("requests_per_minute", seconds=0.6),
    Fault("slow", seconds=0.8),
    Fault("stalled", after=-1, seconds=0.8),
    Fault("stalled", after=12, seconds=0.8),
    Fault("dropped", after=12),
    Fault("dropped", after=-1),
    Fault("cut", after=25),
    Fault("http", status=500),
)


@pytest.fixture(scope="module")
def kernels() -> Iterator[KernelForkServer]:
    """The process that forks kernels, in a folder with a short path."""
    folder = Path(tempfile.mkdtemp(prefix="nbc"))
    with fork_server(folder) as opened:
        yield opened
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server() -> Iterator[Simulated]:
    """A server for all tests of this module."""
    with simulated(tpm=10**7, rpm=10**5, latency=0.02) as server:
        yield server


@pytest.fixture(scope="module")
def warm_home(
    kernels: KernelForkServer, server: Simulated, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a journal, and with the limits of the server."""
    scene = Scene(kernels, server, tmp_path_factory.mktemp("warm"))
    scene.warm_up()
    return scene.home


@pytest.fixture
def scene(
    kernels: KernelForkServer, server: Simulated, warm_home: Path, tmp_path: Path
) -> Iterator[Scene]:
    """A notebook with a journal of its own, and a server that answers at a model's pace."""
    shutil.copytree(warm_home, tmp_path, dirs_exist_ok=True)
    server.core._faults.clear()
    server.core.log.clear()
    server.core.change_knobs(speed=80.0)
    scene = Scene(kernels, server, tmp_path)
    yield scene
    print(f"\n{scene.counts}")


class Life:
    """One kernel, from its first cell until it is killed."""

    def __init__(self, scene: Scene, *lines: str, words: int = 20) -> None:
        self.scene = scene
        self.child, self.log = scene.kernel()
        self.asked = scene.asked(*lines, words=words)

    def begin(self, how: str = "ask", *, which: slice = slice(None)) -> None:
        """Ask everything, or some of it."""
        cells = ", ".join(repr((each.line, each.prompt)) for each in self.asked[which])
        self.child.start(f"{how}({cells})")

    def halt(self, step: str, *, after: bool) -> None:
        """Ask everything, and stop each request at a step of the journal."""
        self.child.run(f"halt({step!r}, after={after})")
        self.begin("ask_apart")
        self.until_reported("halted")

    def until_reported(self, what: str, *, times: int | None = None) -> None:
        """Wait until the child has reported an event of so many requests, or of all."""
        wanted = len(self.asked) if times is None else times
        wait_until(lambda: len({id_ for _, w, id_, _ in reports(self.log) if w == what}) >= wanted)

    def until_sent(self) -> None:
        """Wait until all have reached the server."""
        wait_until(lambda: all(self.scene.sent(each) for each in self.asked))

    def until_all_shown(self) -> None:
        """Wait until the whole answers are shown."""
        whole = sum(len(each.answer) for each in self.asked)
        wait_until(lambda: sum(size for *_, size in reports(self.log)) >= whole)

    def kill(self) -> Killed:
        """Kill it now."""
        return self.scene.kill(self.child, self.log, self.asked)


def statuses(scene: Scene, asked: list[Asked]) -> list[str]:
    """Return the statuses of some requests in the journal."""
    found = scene.entries()
    return [entry.status for each in asked for entry in found.get(each.prompt, [])]


def test_kill_before_the_commit_sends_nothing(scene: Scene) -> None:
    # A conversation is read from the journal, and so waits while another process locks it.
    life = Life(scene, *(f"{line} --no-history" for line in LINES))
    with locked(scene.home):
        life.begin("ask_apart")
        life.until_reported("Queued")
        time.sleep(0.5)
        killed = life.kill()
    assert not scene.server.core.log
    assert statuses(scene, life.asked) == []
    scene.check(killed)
    assert scene.counts.unsent == 4


def test_kill_after_the_commit_sends_each_prompt_once(scene: Scene) -> None:
    """The next kernel sends it."""
    life = Life(scene, *LINES)
    life.halt("start_attempt", after=True)
    killed = life.kill()
    assert not scene.server.core.log
    scene.check(killed)
    assert scene.counts.resumed == 4
    assert [len(scene.sent(each)) for each in life.asked] == [1] * 4


def test_kill_during_a_cooldown_resumes_without_doubt(scene: Scene) -> None:
    """A prompt that waits for a limit has cost nothing."""
    scene.server.core.script([Fault("requests_per_minute", seconds=60)])
    life = Life(scene, *LINES)
    life.begin(which=slice(1))
    life.until_reported("BackingOff", times=1)
    life.begin(which=slice(1, None))
    life.until_reported("CoolingDown", times=3)
    wait_until(lambda: statuses(scene, life.asked) == ["waiting"] * 4)
    killed = life.kill()
    for file in (scene.home / "kept").glob(f"{LIMITER_FILENAME}*"):
        file.unlink()  # the next kernel would wait until the cooldown ends
    scene.check(killed)
    assert (scene.counts.resumed, scene.counts.possibly_paid) == (4, 0)


def test_kill_before_the_first_byte_is_possibly_paid(scene: Scene) -> None:
    """The one gap in which it cannot be known whether an answer is paid: the user is warned."""
    scene.server.core.script([Fault("stalled", after=-1)] * 4)
    life = Life(scene, *LINES)
    life.begin()
    life.until_sent()
    scene.check(life.kill())
    assert (scene.counts.resumed, scene.counts.possibly_paid) == (4, 4)
    assert scene.counts.paid_twice_in_the_gap == 2


def test_kill_while_backing_off_keeps_the_possibly_paid_note(scene: Scene) -> None:
    scene.server.core.script([Fault("dropped", after=-1), Fault("http", status=500)])
    life = Life(scene, "--durable")
    life.begin()
    life.until_reported("BackingOff")
    wait_until(lambda: statuses(scene, life.asked) == ["waiting"])
    scene.check(life.kill())
    assert (scene.counts.resumed, scene.counts.possibly_paid) == (1, 1)
    assert scene.counts.paid_twice_in_the_gap == 1


def test_kill_after_the_first_event_pays_a_durable_answer_once(scene: Scene) -> None:
    life = Life(scene, "-b --durable", "--durable")
    life.halt("set_response_id", after=True)
    scene.check(life.kill())
    assert (scene.counts.resumed, scene.counts.possibly_paid) == (2, 0)


def test_kill_in_mid_stream_resumes_after_the_stored_text(scene: Scene) -> None:
    """A durable answer continues there."""
    scene.server.core.script([Fault("stalled", after=20)] * 4)
    life = Life(scene, *LINES, words=60)
    life.begin()

    def texts() -> list[str]:
        found = scene.entries()
        return [e.reply.text for each in life.asked for e in found.get(each.prompt, [])]

    wait_until(lambda: [len(text) > 50 for text in texts()] == [True] * 4)
    killed = life.kill()
    scene.check(killed)
    assert scene.counts.resumed == 4


@pytest.mark.parametrize("how", ["before finish", "in its commit"])
def test_kill_after_the_last_byte(scene: Scene, how: str) -> None:
    """An answer that arrived but was not committed: a durable one is fetched, not sent again."""
    life = Life(scene, *LINES, words=30)
    if how == "before finish":
        life.halt("finish", after=False)
        killed = life.kill()
    else:
        life.begin()
        life.until_reported("shown")
        with locked(scene.home):
            life.until_all_shown()
            killed = life.kill()
    assert statuses(scene, life.asked) == ["running"] * 4
    scene.check(killed)
    assert scene.counts.resumed == 4


def test_kill_after_the_answer_is_committed(scene: Scene) -> None:
    """It is not sent again, though its notebook never showed it."""
    life = Life(scene, *LINES)
    life.halt("finish", after=True)
    scene.check(life.kill())
    assert (scene.counts.answered_before, scene.counts.resumed) == (4, 0)
    assert [len(scene.sent(each)) for each in life.asked] == [1] * 4


def kill_at_random(scene: Scene, *, kills: int, at_once: int = 6) -> None:
    """Kill kernels, several at once in one notebook, at random moments."""
    dice = random.Random()
    for _ in range(0, kills, at_once):
        scene.server.core.change_knobs(speed=40.0)
        scene.server.core._faults.clear()
        scene.server.core.script(dice.choices((None, *FAULTS), (16, *[1] * len(FAULTS)), k=500))
        lives = [Life(scene, *LINES, words=dice.randint(5, 50)) for _ in range(at_once)]
        for life in lives:
            life.begin()
        begun = time.monotonic()
        moments = sorted(dice.uniform(0.0, 3.0) for _ in lives)
        killed = []
        for life, moment in zip(lives, moments, strict=True):
            time.sleep(max(0.0, begun + moment - time.monotonic()))
            killed.append(life.kill())
        scene.server.core._faults.clear()
        scene.server.core.change_knobs(speed=2_000.0)
        scene.check(*killed)


def test_kills_at_random_lose_no_prompt_and_no_answer(scene: Scene) -> None:
    kill_at_random(scene, kills=24)
    assert scene.counts.resumed > 0


@pytest.mark.long
def test_200_kills_at_random_lose_no_prompt_and_no_answer(scene: Scene) -> None:
    began, scene.max_lost_s = time.monotonic(), 1.0
    kill_at_random(scene, kills=200, at_once=8)
    print(f"\n{time.monotonic() - began:.0f} s")
    assert scene.counts.kills == 200
