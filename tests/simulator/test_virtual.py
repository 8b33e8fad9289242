"""The virtual loop that the other tests stand on."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests import virtual
from tests.virtual import LoopClock, run_virtual


def test_an_hour_takes_no_time() -> None:
    """An hour's wait ends an hour later on the loop and at once on the wall."""

    async def main() -> float:
        clock = LoopClock()
        began = clock.now()
        assert not await clock.wait(began + 3600)
        return clock.now() - began

    began = time.monotonic()
    assert run_virtual(main()) == pytest.approx(3600, abs=1e-5)
    assert time.monotonic() - began < 600


def test_sleepers_wake_in_order() -> None:
    """Timers fire in the order of their moments, not of their making."""
    woken: list[float] = []

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append(seconds)

    async def main() -> None:
        await asyncio.gather(*(sleep(s) for s in (30.0, 0.001, 5.0, 86_400.0 * 3)))

    run_virtual(main())
    assert woken == [0.001, 5.0, 30.0, 86_400.0 * 3]


def test_a_wait_ends_when_its_event_is_set() -> None:
    """`wait` says True, and at the moment of the event, when it is ended by it."""

    async def main() -> tuple[bool, float]:
        clock, event = LoopClock(), asyncio.Event()
        began = clock.now()
        asyncio.get_running_loop().call_later(7, event.set)
        return await clock.wait(began + 60, unless=event), clock.now() - began

    assert run_virtual(main()) == (True, pytest.approx(7, abs=1e-5))


def test_time_stands_still_while_a_thread_works() -> None:
    """A thread of the executor is waited for, whatever timers are set meanwhile."""

    async def main() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.timeout(1):
            await asyncio.to_thread(time.sleep, 0.02)
        return loop.time() - began

    assert run_virtual(main()) == 0


def test_a_deadlock_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where everybody waits for nothing, the test fails instead of hanging."""
    monkeypatch.setattr(virtual, "STUCK", 0.01)

    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(virtual.StuckError):
        run_virtual(main())
