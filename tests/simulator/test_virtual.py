"""The event loop in virtual time that other tests use."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests import virtual
from tests.virtual import LoopClock, run_virtual


def test_hour_of_virtual_time_takes_no_real_time() -> None:
    async def main() -> float:
        clock = LoopClock()
        began = clock.now()
        assert not await clock.wait(began + 3600)
        return clock.now() - began

    began = time.monotonic()
    assert run_virtual(main()) == pytest.approx(3600, abs=1e-5)
    assert time.monotonic() - began < 600


def test_timers_fire_in_the_order_of_their_moments() -> None:
    woken: list[float] = []

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append(seconds)

    async def main() -> None:
        await asyncio.gather(*(sleep(s) for s in (30.0, 0.001, 5.0, 86_400.0 * 3)))

    run_virtual(main())
    assert woken == [0.001, 5.0, 30.0, 86_400.0 * 3]


def test_wait_returns_true_when_its_event_is_set() -> None:
    async def main() -> tuple[bool, float]:
        clock, event = LoopClock(), asyncio.Event()
        began = clock.now()
        asyncio.get_running_loop().call_later(7, event.set)
        return await clock.wait(began + 60, unless=event), clock.now() - began

    assert run_virtual(main()) == (True, pytest.approx(7, abs=1e-5))


def test_virtual_time_stops_while_an_executor_thread_works() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.timeout(1):
            await asyncio.to_thread(time.sleep, 0.02)
        return loop.time() - began

    assert run_virtual(main()) == 0


def test_deadlock_raises_instead_of_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual, "STUCK_TIMEOUT_S", 0.01)

    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(virtual.StuckError):
        run_virtual(main())
