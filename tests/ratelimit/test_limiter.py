"""The limiter: a ledger that other processes share, off the event loop, whatever its store does."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from nbcodex.models import LimitReading, LimitSnapshot, Usage
from nbcodex.ratelimit import worker
from nbcodex.ratelimit.charge_policy import Cost, Permit
from nbcodex.ratelimit.rate_limiter import QueueEntry, RateLimiter
from nbcodex.ratelimit.stores import MemoryStore, StoreError, sqlite
from nbcodex.ratelimit.worker import SharedLimiter, open_store
from nbcodex.runtime.clock import BootClock
from nbcodex.settings import LIMITER_FILENAME

T = TypeVar("T")
COST = Cost(10, 90)
SNAPSHOT = LimitSnapshot(at=0.0, tokens=LimitReading(limit=60_000, remaining=59_000, full_in=1.0))


class Kernel:
    """One process's limiter, as the engine has it."""

    def __init__(self, opening: Callable[[], Any]) -> None:
        self.told: list[str] = []
        self.clock = BootClock()
        self.limiter = SharedLimiter(opening, clock=self.clock, on_problem=self.told.append)

    async def ask(self) -> Permit:
        """Reserve, be let in, and be answered."""
        now = self.clock.now()

        def operation(core: RateLimiter) -> QueueEntry:
            return core.enqueue("b", COST, lambda: None)

        ticket = await self.limiter.run(operation)
        leave = await self.limiter.run(lambda core: core.try_acquire(ticket, self.clock.now()))
        while not isinstance(leave, Permit):
            await self.clock.wait(leave.until)
            leave = await self.limiter.run(lambda core: core.try_acquire(ticket, self.clock.now()))
        given = leave
        await self.limiter.run(lambda core: core.observe(given, SNAPSHOT, self.clock.now()))
        usage = Usage(input_tokens=10, output_tokens=20)
        await self.limiter.run(lambda core: core.settle(given, usage, self.clock.now()))
        assert self.clock.now() - now < 1.0
        return given


@contextmanager
def kernel(folder: Path) -> Iterator[Kernel]:
    made = Kernel(partial(open_store, folder))
    try:
        yield made
    finally:
        made.limiter.close()


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(main)


def test_kernels_share_what_is_known(tmp_path: Path) -> None:
    """What one kernel is told, the other one knows before it has asked."""

    async def main() -> None:
        with kernel(tmp_path) as first, kernel(tmp_path) as second:
            await first.ask()
            assert await first.limiter.salt() == await second.limiter.salt()
            (known,) = (await second.limiter.limit_states(second.clock.now(), "b")).values()
            assert known.tokens is not None
            assert known.tokens.limit == 60_000
            assert known.other_processes == 1
            assert second.told == []

    run(main())


@pytest.mark.skipif(sys.platform == "win32", reason="modes mean nothing there")
def test_the_file_is_the_user_s_own(tmp_path: Path) -> None:
    """0600 in a folder of 0700, and no name of a bucket can be read in it."""

    async def main() -> None:
        with kernel(tmp_path / "home") as alone:
            await alone.ask()

    run(main())
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "home" / LIMITER_FILENAME).stat().st_mode) == 0o600


def damaged(folder: Path) -> None:
    (folder / LIMITER_FILENAME).write_bytes(b"no database, " * 1000)


def foreign(folder: Path) -> None:
    (folder / LIMITER_FILENAME).mkdir()


def no_folder(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("a file where the folder should be")


def writable(folder: Path) -> None:
    folder.chmod(0o777)


@pytest.mark.parametrize("spoil", [damaged, foreign, no_folder, writable])
def test_a_file_that_cannot_serve_costs_nothing_but_sharing(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """Requests go, paced by this kernel's own core, and it is said once."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    spoil(folder)

    async def main() -> None:
        with kernel(folder) as alone:
            await alone.ask()
            await alone.ask()
            assert len(alone.told) == 1
            assert "for this kernel alone" in alone.told[0]
            assert alone.limiter.sharing_problem == alone.told[0]

    run(main())


def test_a_network_file_system_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks lie there: the pace is this kernel's own, and that is said."""
    monkeypatch.setattr(sqlite, "on_network", lambda _: True)

    async def main() -> None:
        with kernel(tmp_path) as alone:
            await alone.ask()
            assert "network" in alone.told[0]

    run(main())


def test_a_locked_file_holds_nobody_up_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another program keeps locked is given up for memory, and taken up again later."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(worker, "STORE_RETRY_S", 0.0)

    async def main() -> None:
        with kernel(tmp_path) as alone:
            await alone.ask()
            with sqlite3.connect(tmp_path / LIMITER_FILENAME, isolation_level=None) as other:
                other.execute("BEGIN EXCLUSIVE")
                await alone.ask()
                assert alone.limiter.sharing_problem
                other.execute("ROLLBACK")
            other.close()
            await alone.ask()
            assert alone.limiter.sharing_problem is None
            (known,) = (await alone.limiter.limit_states(alone.clock.now())).values()
            assert known.tokens is not None

    run(main())


def test_what_is_under_way_when_the_store_fails_ends_in_the_next_one(tmp_path: Path) -> None:
    """A reservation of a lost store is settled in memory, and nothing is left under way."""

    async def main() -> tuple[int, int]:
        with kernel(tmp_path) as alone:
            clock, limiter = alone.clock, alone.limiter
            ticket = await limiter.run(lambda core: core.enqueue("b", COST, lambda: None))
            given = await limiter.run(lambda core: core.try_acquire(ticket, clock.now()))
            assert isinstance(given, Permit)
            limiter._store._connection.close()  # type: ignore[union-attr]
            await limiter.run(lambda core: core.observe(given, SNAPSHOT, clock.now()))
            usage = Usage(input_tokens=10, output_tokens=20)
            await limiter.run(lambda core: core.settle(given, usage, clock.now()))
            (shared,) = limiter._core._store._models.values()  # type: ignore[attr-defined]
            return shared.model.output.in_flight, shared.model.unanswered

    assert run(main()) == (0, 0)


def test_a_write_that_fails_leads_to_memory(tmp_path: Path) -> None:
    """Where what was done together cannot be kept, the asker goes on, and its user is told."""

    class Full(MemoryStore):
        @contextmanager
        def batch(self) -> Iterator[None]:
            yield
            raise StoreError("The disk is full.")

    async def main() -> None:
        kernel = Kernel(Full)
        try:
            assert (await kernel.ask()).is_closed
            assert [told.split(" So ")[0] for told in kernel.told] == ["The disk is full."]
        finally:
            kernel.limiter.close()

    run(main())


def test_deeds_that_come_together_share_a_transaction(tmp_path: Path) -> None:
    """However many come at once, the file is written two or three times."""
    begun = []

    class Counting(sqlite.SqliteStore):
        @contextmanager
        def batch(self) -> Iterator[None]:
            begun.append(not self._in_batch)
            with super().batch():
                yield

    def opening() -> Counting:
        return Counting(tmp_path / LIMITER_FILENAME, boot="b")

    async def main() -> None:
        made = Kernel(opening)
        try:
            await made.limiter.run(lambda core: core.limit_states(0.0, "b"))
            begun.clear()
            deeds = (made.limiter.run(lambda core: core.limit_states(0.0, "b")) for _ in range(50))
            await asyncio.gather(*deeds)
        finally:
            made.limiter.close()

    run(main())
    assert sum(begun) <= 3


def test_what_nobody_waits_for_lingers_anew_once_it_was_taken_along(tmp_path: Path) -> None:
    """After an operation that took the others along, the next post waits its whole time."""

    async def main() -> None:
        with kernel(tmp_path) as alone:
            alone.limiter.post(lambda _: None)
            first = alone.limiter._timer
            await alone.limiter.run(lambda _: None)
            alone.limiter.post(lambda _: None)
            second = alone.limiter._timer
            assert first is not None
            assert second is not None
            assert first.cancelled()
            assert second.when() > first.when()

    run(main())


def test_a_defect_in_a_deed_is_the_asker_s(tmp_path: Path) -> None:
    """An error that is none of the store's reaches whoever asked, and the thread goes on."""

    async def main() -> None:
        with kernel(tmp_path) as alone:
            with pytest.raises(ZeroDivisionError):
                await alone.limiter.run(lambda _: 1 // 0)
            await alone.ask()
            assert alone.told == []

    run(main())


def test_a_cancelled_wait_does_not_undo_the_deed(tmp_path: Path) -> None:
    """Deeds are done in their order, whoever still waits for them."""

    async def main() -> None:
        with kernel(tmp_path) as alone:
            done: list[int] = []
            gate = threading.Event()
            alone.limiter.post(lambda _: gate.wait(10))
            waiting = asyncio.ensure_future(alone.limiter.run(lambda _: done.append(1)))
            await asyncio.sleep(0)
            waiting.cancel()
            alone.limiter.post(lambda _: done.append(2))
            gate.set()
            await alone.limiter.run(lambda _: done.append(3))
            assert done == [1, 2, 3]

    run(main())


def test_wakes_reach_the_loop(tmp_path: Path) -> None:
    """Who is woken on the ledger's thread wakes on the loop."""

    async def main() -> None:
        with kernel(tmp_path) as alone:
            event = asyncio.Event()
            wake = alone.limiter.waker(event)
            alone.limiter.post(lambda _: wake())
            await asyncio.wait_for(event.wait(), 5)

    run(main())


def test_a_kernel_that_ends_leaves_its_part(tmp_path: Path) -> None:
    """What it held is the others' at once."""

    async def main() -> None:
        with kernel(tmp_path) as stays:
            with kernel(tmp_path) as goes:
                ticket = await goes.limiter.run(lambda core: core.enqueue("b", COST, int))
                await goes.limiter.run(lambda core: core.try_acquire(ticket, goes.clock.now()))
            (known,) = (await stays.limiter.limit_states(stays.clock.now(), "b")).values()
            assert known.other_processes == 0

    run(main())


def test_signs_of_life_are_given_while_anything_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that takes long keeps its share; where nothing is under way, the thread sleeps."""
    monkeypatch.setattr(worker, "HEARTBEAT_INTERVAL_S", 0.01)

    async def main() -> None:
        with kernel(tmp_path) as alone:
            clock, limiter = alone.clock, alone.limiter
            beats: list[bool] = []
            beat = RateLimiter.heartbeat
            monkeypatch.setattr(
                RateLimiter,
                "heartbeat",
                lambda self, now: beats.append(beat(self, now)) or beats[-1],
            )
            ticket = await limiter.run(lambda core: core.enqueue("b", COST, lambda: None))
            given = await limiter.run(lambda core: core.try_acquire(ticket, clock.now()))
            assert isinstance(given, Permit)
            await asyncio.to_thread(_until, lambda: len(beats) >= 5)
            assert all(beats)
            await limiter.run(lambda core: core.release(given, clock.now()))
            await asyncio.to_thread(_until, lambda: limiter._heartbeat_at is None)

    run(main())


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_during_deeds_leaves_both_in_order(tmp_path: Path) -> None:
    """A child opens the same file anew, whatever its parent's thread was doing."""

    async def main() -> int:
        with kernel(tmp_path) as parent:
            await parent.ask()
            for _ in range(200):
                parent.limiter.post(lambda core: core.limit_states(0.0))
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = _child(tmp_path)
                finally:
                    os._exit(code)
            await parent.ask()
            _, status = await asyncio.to_thread(os.waitpid, pid, 0)
            return os.waitstatus_to_exitcode(status)

    assert run(main()) == 0


def _child(folder: Path) -> int:
    """Use the file in a forked child."""
    store = open_store(folder)
    return int(store.transaction("b", lambda shared: shared.model.sent) < 1)


def test_a_store_error_says_why(tmp_path: Path) -> None:
    """The sentence names the file and what is wrong with it."""
    damaged(tmp_path)
    with pytest.raises(StoreError, match=r"ledger\.sqlite cannot be used: file is not a database"):
        open_store(tmp_path)


def test_it_is_known_who_waits(tmp_path: Path) -> None:
    """Those who have no leave yet are counted, with the tokens that they may use."""

    async def main() -> tuple[int, float]:
        with kernel(tmp_path) as alone:

            def ask(core: RateLimiter) -> Any:
                return core.try_acquire(core.enqueue("b", COST, lambda: None), alone.clock.now())

            for _ in range(5):  # the first goes, to find out what the limits are
                await alone.limiter.run(ask)
            (known,) = (await alone.limiter.limit_states(alone.clock.now(), "b")).values()
            return known.waiting, known.waiting_tokens

    waiting, asked = run(main())
    assert 0 < waiting < 5
    assert asked == 100 * waiting
