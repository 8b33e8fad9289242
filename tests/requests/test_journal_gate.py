"""A request that is ended while the journal is slow still ends."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from nbcodex import events
from nbcodex.errors import LimitError
from nbcodex.models import Limit, Request
from nbcodex.requests.runner import EndAction
from tests.scripted import InstantJournal, ScriptedServices, answer, ending
from tests.virtual import run_virtual


class SlowJournal(InstantJournal):
    async def insert(self, request: Request, **where: Any) -> None:
        await asyncio.sleep(1.0)
        await super().insert(request, **where)


@pytest.mark.parametrize("order", ["stop", "park", "cancel"])
def test_end_during_first_commit_waits_for_the_commit(order: EndAction) -> None:
    async def main() -> tuple[Any, list[str]]:
        scripted = ScriptedServices(answer("never"))
        scripted.journal = SlowJournal()
        received = await scripted.run(Request(prompt="x", reuse=True), (0.5, order))
        return ending(received), [operation for operation, _ in scripted.journal.written]

    end, written = run_virtual(main())
    assert not isinstance(end, events.Finished)
    assert written == ["insert", "finish"]


class InsertRecorder(InstantJournal):
    def __init__(self) -> None:
        super().__init__()
        self.inserts: list[tuple[str, int | None]] = []

    async def insert(self, request: Request, **where: Any) -> None:
        self.inserts.append((request.prompt, where.get("attempt")))
        await super().insert(request, **where)


def test_request_sent_at_once_is_inserted_as_running() -> None:
    async def main() -> InsertRecorder:
        scripted = ScriptedServices(answer("hi"))
        scripted.journal = journal = InsertRecorder()
        await scripted.run(Request(prompt="x", model="m"))
        assert [operation for operation, _ in journal.written] == [
            "insert",
            "start_attempt",
            "finish",
        ]
        return journal

    assert run_virtual(main()).inserts == [("x", 1)]


def test_waiting_request_is_inserted_meanwhile() -> None:
    limit = LimitError("Rate limit reached.", limit=Limit(resource="requests"), wait=30.0)

    async def main() -> tuple[InsertRecorder, list[str]]:
        scripted = ScriptedServices([limit], answer("one"), answer("two"))
        scripted.journal = journal = InsertRecorder()
        committed: list[str] = []
        runs = [
            scripted.start(
                Request(prompt=name, model="m"), on_committed=partial(committed.append, name)
            )
            for name in ("first", "second")
        ]
        await asyncio.sleep(1.0)
        assert committed == ["first", "second"]
        await asyncio.wait([run.task for run in runs])
        return journal, [ending(received).reply.text for received in scripted.events.values()]

    journal, texts = run_virtual(main())
    assert journal.inserts == [("first", 1), ("second", None)]
    assert sorted(texts) == ["one", "two"]
