"""The limiter that shares its models with other processes, on its worker thread."""

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
from nbcodex.ratelimit.charge_policy import Need, Permit
from nbcodex.ratelimit.rate_limiter import QueueEntry, RateLimiter
from nbcodex.ratelimit.stores import MemoryStore, StoreError, sqlite
from nbcodex.ratelimit.worker import SharedLimiter, open_store
from nbcodex.runtime.clock import BootClock
from nbcodex.settings import LIMITER_FILENAME

ResultT = TypeVar("ResultT")
NEED = Need(10, 90)
SNAPSHOT = LimitSnapshot(at=0.0, tokens=LimitReading(limit=60_000, remaining=59_000, full_in=1.0))


class Kernel:
    """One process's limiter."""

    def __init__(self, opening: Callable[[], Any]) -> None:
        self.problems: list[str] = []
        self.clock = BootClock()
        self.limiter = SharedLimiter(opening, clock=self.clock, on_problem=self.problems.append)

    async def ask(self) -> Permit:
        """Acquire a permit, be admitted, and be answered."""

        def operation(core: RateLimiter) -> QueueEntry:
            return core.enqueue("b", NEED, lambda: None)

        entry = await self.limiter.run_operation(operation)
        answer = await self.limiter.run_operation(
            lambda core: core.try_acquire(entry, self.clock.now())
        )
        while not isinstance(answer, Permit):
            await self.clock.wait(answer.until)
            answer = await self.limiter.run_operation(
                lambda core: core.try_acquire(entry, self.clock.now())
            )
        permit = answer
        await self.limiter.run_operation(
            lambda core: core.observe(permit, SNAPSHOT, self.clock.now())
        )
        usage = Usage(input_tokens=10, output_tokens=20)
        await self.limiter.run_operation(lambda core: core.settle(permit, usage, self.clock.now()))
        return permit


@contextmanager
def kernel(folder: Path) -> Iterator[Kernel]:
    made = Kernel(partial(open_store, folder))
    try:
        yield made
    finally:
        made.limiter.close()


def run(main: Coroutine[Any, Any, ResultT]) -> ResultT:
    return asyncio.run(main)


def test_kernel_knows_limits_that_another_has_learned(tmp_path: Path) -> None:
    """Before it has sent anything itself."""

    async def main() -> None:
        with kernel(tmp_path) as first, kernel(tmp_path) as second:
            await first.ask()
            assert await first.limiter.salt() == await second.limiter.salt()
            (known,) = (await second.limiter.limit_states(second.clock.now(), "b")).values()
            assert known.tokens is not None
            assert known.tokens.limit == 60_000
            assert known.other_processes == 1
            assert second.problems == []

    run(main())


@pytest.mark.skipif(sys.platform == "win32", reason="modes mean nothing there")
def test_limiter_file_is_private(tmp_path: Path) -> None:
    """Mode 0600 in a folder of 0700."""

    async def main() -> None:
        with kernel(tmp_path / "home") as alone:
            await alone.ask()

    run(main())
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "home" / LIMITER_FILENAME).stat().st_mode) == 0o600


def damage_file(folder: Path) -> None:
    (folder / LIMITER_FILENAME).write_bytes(b"no database, " * 1000)


def put_folder_at_path(folder: Path) -> None:
    (folder / LIMITER_FILENAME).mkdir()


def put_file_at_folder(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("a file where the folder should be")


def make_folder_writable(folder: Path) -> None:
    folder.chmod(0o777)


@pytest.mark.parametrize(
    "make_unusable", [damage_file, put_folder_at_path, put_file_at_folder, make_folder_writable]
)
def test_unusable_file_is_replaced_by_memory_and_reported_once(
    tmp_path: Path, make_unusable: Callable[[Path], None]
) -> None:
    """Requests are sent, paced for this kernel alone."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    make_unusable(folder)

    async def main() -> None:
        with kernel(folder) as alone:
            await alone.ask()
            await alone.ask()
            assert len(alone.problems) == 1
            assert "for this kernel alone" in alone.problems[0]
            assert alone.limiter.sharing_problem == alone.problems[0]

    run(main())


def test_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks cannot be trusted there; requests are paced for this kernel alone."""
    monkeypatch.setattr(sqlite.sqlite_files, "is_on_network", lambda _: True)

    async def main() -> None:
        with kernel(tmp_path) as alone:
            await alone.ask()
            assert "network" in alone.problems[0]

    run(main())


def test_locked_file_is_bridged_by_memory_until_unlocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_permit_of_a_failed_store_is_settled_in_memory(tmp_path: Path) -> None:
    """No request is left in flight."""

    async def main() -> tuple[int, int]:
        with kernel(tmp_path) as alone:
            clock, limiter = alone.clock, alone.limiter
            entry = await limiter.run_operation(lambda core: core.enqueue("b", NEED, lambda: None))
            permit = await limiter.run_operation(lambda core: core.try_acquire(entry, clock.now()))
            assert isinstance(permit, Permit)
            limiter._store._connection.close()  # type: ignore[union-attr]
            await limiter.run_operation(lambda core: core.observe(permit, SNAPSHOT, clock.now()))
            usage = Usage(input_tokens=10, output_tokens=20)
            await limiter.run_operation(lambda core: core.settle(permit, usage, clock.now()))
            (shared,) = limiter._core.store._models.values()  # type: ignore[attr-defined]
            return shared.model.output.in_flight, shared.model.awaiting_response

    assert run(main()) == (0, 0)


def test_failed_commit_leads_to_memory(tmp_path: Path) -> None:
    """Operations of the failed batch keep their results, and the user learns why."""

    class Full(MemoryStore):
        @contextmanager
        def batch(self) -> Iterator[None]:
            yield
            raise StoreError("The disk is full.")

    async def main() -> None:
        kernel = Kernel(Full)
        try:
            assert (await kernel.ask()).has_ended
            assert [text.split(" Req")[0] for text in kernel.problems] == ["The disk is full."]
        finally:
            kernel.limiter.close()

    run(main())


def test_simultaneous_operations_share_transactions(tmp_path: Path) -> None:
    """Fifty at once are two or three writes, and a few more on a busy machine."""
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
            await made.limiter.run_operation(lambda core: core.limit_states(0.0, "b"))
            begun.clear()
            operations = (
                made.limiter.run_operation(lambda core: core.limit_states(0.0, "b"))
                for _ in range(50)
            )
            await asyncio.gather(*operations)
        finally:
            made.limiter.close()

    run(main())
    assert sum(begun) <= 10


def test_post_after_a_run_waits_its_whole_delay(tmp_path: Path) -> None:
    async def main() -> None:
        with kernel(tmp_path) as alone:
            alone.limiter.post(lambda _: None)
            first = alone.limiter._timer
            await alone.limiter.run_operation(lambda _: None)
            alone.limiter.post(lambda _: None)
            second = alone.limiter._timer
            assert first is not None
            assert second is not None
            assert first.cancelled()
            assert second.when() > first.when()

    run(main())


def test_error_in_an_operation_reaches_its_caller_only(tmp_path: Path) -> None:
    """The thread goes on."""

    async def main() -> None:
        with kernel(tmp_path) as alone:
            with pytest.raises(ZeroDivisionError):
                await alone.limiter.run_operation(lambda _: 1 // 0)
            await alone.ask()
            assert alone.problems == []

    run(main())


def test_cancelled_wait_leaves_operations_done_in_order(tmp_path: Path) -> None:
    async def main() -> None:
        with kernel(tmp_path) as alone:
            done: list[int] = []
            gate = threading.Event()
            alone.limiter.post(lambda _: gate.wait(20))
            waiting = asyncio.ensure_future(alone.limiter.run_operation(lambda _: done.append(1)))
            await asyncio.sleep(0)
            waiting.cancel()
            alone.limiter.post(lambda _: done.append(2))
            gate.set()
            await alone.limiter.run_operation(lambda _: done.append(3))
            assert done == [1, 2, 3]

    run(main())


def test_waker_called_on_the_thread_wakes_the_loop(tmp_path: Path) -> None:
    async def main() -> None:
        with kernel(tmp_path) as alone:
            event = asyncio.Event()
            wake = alone.limiter.waker(event)
            alone.limiter.post(lambda _: wake())
            await asyncio.wait_for(event.wait(), 20)

    run(main())


def test_closed_limiter_leaves_its_share_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        with kernel(tmp_path) as stays:
            with kernel(tmp_path) as goes:
                entry = await goes.limiter.run_operation(lambda core: core.enqueue("b", NEED, int))
                await goes.limiter.run_operation(
                    lambda core: core.try_acquire(entry, goes.clock.now())
                )
            (known,) = (await stays.limiter.limit_states(stays.clock.now(), "b")).values()
            assert known.other_processes == 0

    run(main())


def test_heartbeats_continue_while_a_request_is_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without requests in flight, the thread sleeps."""
    monkeypatch.setattr(worker, "HEARTBEAT_INTERVAL_S", 0.01)

    async def main() -> None:
        with kernel(tmp_path) as alone:
            clock, limiter = alone.clock, alone.limiter
            renewals: list[bool] = []
            heartbeat = RateLimiter.heartbeat
            monkeypatch.setattr(
                RateLimiter,
                "heartbeat",
                lambda self, now: renewals.append(heartbeat(self, now)) or renewals[-1],
            )
            entry = await limiter.run_operation(lambda core: core.enqueue("b", NEED, lambda: None))
            permit = await limiter.run_operation(lambda core: core.try_acquire(entry, clock.now()))
            assert isinstance(permit, Permit)
            await asyncio.to_thread(_until, lambda: len(renewals) >= 5)
            assert all(renewals)
            await limiter.run_operation(lambda core: core.release(permit, clock.now()))
            await asyncio.to_thread(_until, lambda: limiter._heartbeat_at is None)

    run(main())


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_during_operations_leaves_both_processes_usable(tmp_path: Path) -> None:
    """A child opens the same file anew."""

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
    return int(store.transaction("b", lambda shared: shared.model.permit_count) < 1)


def test_store_error_names_the_file_and_the_problem(tmp_path: Path) -> None:
    damage_file(tmp_path)
    with pytest.raises(StoreError, match=r"ledger\.sqlite cannot be used: file is not a database"):
        open_store(tmp_path)


def test_limit_state_counts_waiting_requests(tmp_path: Path) -> None:
    """With the tokens that they may use."""

    async def main() -> tuple[int, float]:
        with kernel(tmp_path) as alone:

            def ask(core: RateLimiter) -> Any:
                return core.try_acquire(core.enqueue("b", NEED, lambda: None), alone.clock.now())

            for _ in range(5):  # the first goes, to find out what the limits are
                await alone.limiter.run_operation(ask)
            (known,) = (await alone.limiter.limit_states(alone.clock.now(), "b")).values()
            return known.waiting, known.waiting_tokens

    waiting, asked = run(main())
    assert 0 < waiting < 5
    assert asked == 100 * waiting
