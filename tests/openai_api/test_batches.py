"""Batches on the wire: handed in, found again, fetched, erased; only our errors are raised."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from nbcodex.errors import ModelError, NbcodexError, TransientError
from nbcodex.models import Request
from nbcodex.openai_api.answers import CompletedAnswer
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.openai_api.batches import Batch, BatchClient
from nbcodex.settings import Secret, Settings
from nbcodex.simulator import Knobs, Simulator
from nbcodex.simulator.transport import SimulatorTransport
from tests.virtual import LoopClock, run_virtual

KEY = "sk-secret-0123456789abcdef"
SETTINGS = Settings(api_key=Secret(KEY), base_url="http://127.0.0.1/v1")
MODEL = "gpt-5.6-sol"


class Desk:
    """Batches at a simulator, in virtual time; made on the loop."""

    def __init__(self, transport: httpx2.AsyncBaseTransport | None = None, **knobs: Any) -> None:
        self.clock = LoopClock()
        self.core = Simulator(Knobs(batch_seconds=100.0, **knobs), clock=self.clock)
        api_client = ApiClient(
            clock=self.clock, transport=transport or SimulatorTransport(self.core)
        )
        self.batches = BatchClient(api_client)

    async def hand_in(self, *requests: Request, metadata: dict[str, str] | None = None) -> Batch:
        data = b"".join(self.batches.request_line(r, SETTINGS, model=MODEL) for r in requests)
        return await self.start(data, requests[0], metadata or {})

    async def start(
        self, data: bytes, request: Request, metadata: dict[str, str] | None = None
    ) -> Batch:
        file = await self.batches.upload_file(data, request, SETTINGS)
        return await self.batches.create_batch(file, request, SETTINGS, metadata=metadata or {})

    async def results(self, batch: Batch) -> dict[str, CompletedAnswer | NbcodexError]:
        request = Request(prompt="x")
        return {id_: told async for id_, told in self.batches.results(batch, request, SETTINGS)}

    async def ended(self, batch: Batch) -> Batch:
        await self.clock.wait(self.clock.now() + 101)
        return await self.batches.retrieve_batch(batch.id, Request(prompt="x"), SETTINGS)


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_answers_come_back_under_their_requests_ids(api: Any) -> None:
    """Text, usage and model are those of an ordinary answer, whichever API."""

    async def main() -> None:
        desk = Desk()
        one = Request(prompt="[[echo: one]]", api=api, max_output=50)
        two = Request(prompt="[[echo: two]]", api=api)
        batch = await desk.ended(await desk.hand_in(one, two))
        assert (batch.status, batch.ended, batch.answered) == ("completed", True, 2)
        told = await desk.results(batch)
        assert {one.id: "one", two.id: "two"} == {
            id_: answer.text for id_, answer in told.items() if isinstance(answer, CompletedAnswer)
        }
        assert all(a.usage.total_tokens for a in told.values() if isinstance(a, CompletedAnswer))
        body = next(seen.body for seen in desk.core.log if seen.method == "BATCH")
        assert "stream" not in body
        assert body["model"] == MODEL

    run_virtual(main())


def test_what_fails_is_one_of_our_errors() -> None:
    """A request that the server rejects comes back as the error it would be when asked at once."""

    async def main() -> None:
        desk = Desk(models=(MODEL,))
        good, bad = Request(prompt="[[echo: one]]"), Request(prompt="x")
        data = desk.batches.request_line(good, SETTINGS, model=MODEL)
        data += desk.batches.request_line(bad, SETTINGS, model="none")
        handed_in = await desk.start(data, good)
        told = await desk.results(await desk.ended(handed_in))
        assert isinstance(told[good.id], CompletedAnswer)
        assert isinstance(told[bad.id], ModelError)

    run_virtual(main())


def test_what_a_batch_did_not_come_to_can_be_asked_again() -> None:
    """After a cancel, the rest comes back as transient, for it has cost nothing."""

    async def main() -> None:
        desk = Desk()
        one, two = Request(prompt="one"), Request(prompt="two")
        batch = await desk.hand_in(one, two)
        await desk.clock.wait(desk.clock.now() + 60)
        told = await desk.results(await desk.batches.cancel_batch(batch.id, one, SETTINGS))
        assert isinstance(told[one.id], CompletedAnswer)
        assert isinstance(told[two.id], TransientError)

    run_virtual(main())


def test_a_batch_is_found_by_its_tags() -> None:
    """Whoever died before noting a batch's name finds it, and does not hand it in twice."""

    async def main() -> None:
        desk = Desk()
        request = Request(prompt="one")
        mine = await desk.hand_in(request, metadata={"nbcodex": "map-1"})
        await desk.hand_in(request, metadata={"nbcodex": "map-2"})
        found = await desk.batches.find_batches(request, SETTINGS, metadata={"nbcodex": "map-1"})
        assert [batch.id for batch in found] == [mine.id]

    run_virtual(main())


def test_a_batch_that_fails_as_a_whole_says_why() -> None:
    """The server's words and the line, on one line."""

    async def main() -> None:
        desk = Desk()
        request = Request(prompt="one")
        handed_in = await desk.start(b"{\n", request)
        failed = await desk.ended(handed_in)
        assert failed.status == "failed"
        assert failed.error == "This line is no request. (line 1)"

    run_virtual(main())


def test_discarded_files_are_gone() -> None:
    """After `discard` the provider keeps neither questions nor answers."""

    async def main() -> None:
        desk = Desk()
        batch = await desk.ended(await desk.hand_in(Request(prompt="one")))
        for _ in range(2):  # what is gone already is no error
            await desk.batches.delete_files(batch, Request(prompt="x"), SETTINGS)
        assert desk.core.library._files == {}
        with pytest.raises(NbcodexError):
            await desk.results(batch)

    run_virtual(main())


class Liar(httpx2.AsyncBaseTransport):
    """Answers every call with the same bytes."""

    def __init__(self, body: bytes, status: int = 200) -> None:
        self._body, self._status = body, status

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await self._read(request.stream)
        headers = {"content-type": "application/json"}
        return httpx2.Response(self._status, headers=headers, content=self._body)

    @staticmethod
    async def _read(stream: Any) -> None:
        if isinstance(stream, AsyncIterator):
            async for _ in stream:
                pass


HOSTILE = [
    b"[]",
    b"null",
    b"{}",
    b'{"id": 7, "status": [], "request_counts": "x", "errors": {"data": [1, {"message": 5}]}}',
    b'{"custom_id": "a", "response": {"status_code": "x"}}',
    b'{"custom_id": "a", "response": {"status_code": 200, "body": []}}',
    b'{"custom_id": "a", "response": {"status_code": 200, "body": {"output": [[1], {}]}}}',
    b'{"custom_id": "a", "response": 5, "error": "x"}',
    b"\xff\xfe\n{",
    b"<html>",
    json.dumps({"custom_id": "a", "error": {"message": f"key {KEY}"}}).encode(),
]


@pytest.mark.parametrize("body", HOSTILE)
@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_hostile_server_does_no_harm(body: bytes, status: int) -> None:
    """Whatever is answered, there is a batch, a result or one of our errors, and never the key."""

    async def main() -> None:
        desk = Desk(Liar(body, status))
        request, told = Request(prompt="x"), ""
        for deed in (
            lambda: desk.batches.retrieve_batch("b", request, SETTINGS),
            lambda: desk.start(b"{}", request),
            lambda: desk.results(Batch(id="b", status="completed", files=("f",))),
        ):
            try:
                told += str(await deed())
            except NbcodexError as error:
                told += str(error)
        assert KEY not in told

    run_virtual(main())


def test_other_line_separators_end_no_line() -> None:
    """U+2028 within an answer, which JSON allows, does not tear it."""

    async def main() -> None:
        text = "one\u2028two\x85three"
        body = {"output": [{"type": "message", "content": [{"type": "output_text", "text": text}]}]}
        line = {"custom_id": "a", "response": {"status_code": 200, "body": body}}
        desk = Desk(Liar(json.dumps(line, ensure_ascii=False).encode()))
        told = (await desk.results(Batch(id="b", status="completed", files=("f",))))["a"]
        assert isinstance(told, CompletedAnswer)
        assert told.text == text

    run_virtual(main())
