"""A request that is ended while the journal is slow still ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nbcodex import events
from nbcodex.engine import Order
from nbcodex.records import Request
from tests.scripted import InstantJournal, Stage, answer, ending
from tests.virtual import run_virtual


class SlowJournal(InstantJournal):
    async def add(self, request: Request, **where: Any) -> None:
        await asyncio.sleep(1.0)
        await super().add(request, **where)


@pytest.mark.parametrize("order", ["stop", "park", "cancel"])
def test_an_order_during_the_first_commit_ends_the_request(order: Order) -> None:
    """The commit goes on, the ending waits for it, and whoever waits hears of it."""

    async def main() -> tuple[Any, list[str]]:
        stage = Stage(answer("never"))
        stage.journal = SlowJournal()
        heard = await stage.play(Request(prompt="x", reuse=True), (0.5, order))
        return ending(heard), [deed for deed, _ in stage.journal.written]

    end, written = run_virtual(main())
    assert not isinstance(end, events.Finished)
    assert written == ["add", "finish"]
