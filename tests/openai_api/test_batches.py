"""Batches: created, found again, fetched, deleted; only our errors are raised."""

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
from tests.simulator_transport import SimulatorTransport
from tests.virtual import LoopClock, run_virtual

KEY = "sk-secret-0123456789abcdef"
SETTINGS = Settings(api_key=Secret(KEY), base_url="http://127.0.0.1/v1")
MODEL = "gpt-5.6-sol"


class BatchStage:
    """Batches at a simulator, in virtual time; made on the loop."""

    def __init__(self, transport: httpx2.AsyncBaseTransport | None = None, **knobs: Any) -> None:
        self.clock = LoopClock()
        self.core = Simulator(Knobs(batch_seconds=100.0, **knobs), clock=self.clock)
        api_client = ApiClient(
            clock=self.clock, transport=transport or SimulatorTransport(self.core)
        )
        self.batches = BatchClient(api_client, SETTINGS)

    async def upload_and_create(
        self, *requests: Request, metadata: dict[str, str] | None = None
    ) -> Batch:
        data = b"".join(self.batches.request_line(r, model=MODEL) for r in requests)
        return await self.start(data, requests[0], metadata or {})

    async def start(
        self, data: bytes, request: Request, metadata: dict[str, str] | None = None
    ) -> Batch:
        file = await self.batches.upload_file(data, request)
        return await self.batches.create_batch(file, request, metadata=metadata or {})

    async def results(self, batch: Batch) -> dict[str, CompletedAnswer | NbcodexError]:
        request = Request(prompt="x")
        return {id_: results async for id_, results in self.batches.results(batch, request)}

    async def ended(self, batch: Batch) -> Batch:
        await self.clock.wait(self.clock.now() + 101)
        return await self.batches.retrieve_batch(batch.id, Request(prompt="x"))


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_batch_answers_have_the_ids_of_their_requests(api: Any) -> None:
    async def main() -> None:
        stage = BatchStage()
        one = Request(prompt="[[echo: one]]", api=api, max_output=50)
        two = Request(prompt="[[echo: two]]", api=api)
        batch = await stage.ended(await stage.upload_and_create(one, two))
        assert (batch.status, batch.ended, batch.answered) == ("completed", True, 2)
        results = await stage.results(batch)
        assert {one.id: "one", two.id: "two"} == {
            id_: answer.text
            for id_, answer in results.items()
            if isinstance(answer, CompletedAnswer)
        }
        assert all(a.usage.total_tokens for a in results.values() if isinstance(a, CompletedAnswer))
        body = next(seen.body for seen in stage.core.log if seen.method == "BATCH")
        assert "stream" not in body
        assert body["model"] == MODEL

    run_virtual(main())


def test_rejected_request_in_a_batch_is_the_error_of_a_live_one() -> None:
    async def main() -> None:
        stage = BatchStage(models=(MODEL,))
        good, bad = Request(prompt="[[echo: one]]"), Request(prompt="x")
        data = stage.batches.request_line(good, model=MODEL)
        data += stage.batches.request_line(bad, model="none")
        created = await stage.start(data, good)
        results = await stage.results(await stage.ended(created))
        assert isinstance(results[good.id], CompletedAnswer)
        assert isinstance(results[bad.id], ModelError)

    run_virtual(main())


def test_unprocessed_requests_of_a_cancelled_batch_are_transient() -> None:
    async def main() -> None:
        stage = BatchStage()
        one, two = Request(prompt="one"), Request(prompt="two")
        batch = await stage.upload_and_create(one, two)
        await stage.clock.wait(stage.clock.now() + 60)
        results = await stage.results(await stage.batches.cancel_batch(batch.id, one))
        assert isinstance(results[one.id], CompletedAnswer)
        assert isinstance(results[two.id], TransientError)

    run_virtual(main())


def test_batch_is_found_by_its_metadata() -> None:
    """So that a kernel that died before it stored the batch's id does not create it twice."""

    async def main() -> None:
        stage = BatchStage()
        request = Request(prompt="one")
        mine = await stage.upload_and_create(request, metadata={"nbcodex": "map-1"})
        await stage.upload_and_create(request, metadata={"nbcodex": "map-2"})
        found = await stage.batches.find_batch(request, metadata={"nbcodex": "map-1"})
        assert found is not None
        assert found.id == mine.id
        assert await stage.batches.find_batch(request, metadata={"nbcodex": "map-3"}) is None

    run_virtual(main())


def test_failed_batch_has_the_servers_message_and_line() -> None:
    async def main() -> None:
        stage = BatchStage()
        request = Request(prompt="one")
        created = await stage.start(b"{\n", request)
        failed = await stage.ended(created)
        assert failed.status == "failed"
        assert failed.error == "This line is not a request. (line 1)"

    run_virtual(main())


def test_deleted_files_are_gone_at_the_provider() -> None:
    async def main() -> None:
        stage = BatchStage()
        batch = await stage.ended(await stage.upload_and_create(Request(prompt="one")))
        for _ in range(2):  # what is gone already is no error
            await stage.batches.delete_files(batch, Request(prompt="x"))
        assert stage.core.batches._files == {}
        with pytest.raises(NbcodexError):
            await stage.results(batch)

    run_virtual(main())


class FixedServer(httpx2.AsyncBaseTransport):
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
def test_any_batch_response_becomes_a_result_or_an_error_without_the_key(
    body: bytes, status: int
) -> None:
    async def main() -> None:
        stage = BatchStage(FixedServer(body, status))
        request, results = Request(prompt="x"), ""
        for operation in (
            lambda: stage.batches.retrieve_batch("b", request),
            lambda: stage.start(b"{}", request),
            lambda: stage.results(Batch(id="b", status="completed", files=("f",))),
        ):
            try:
                results += str(await operation())
            except NbcodexError as error:
                results += str(error)
        assert KEY not in results

    run_virtual(main())


def test_only_newlines_end_a_line_of_results() -> None:
    async def main() -> None:
        text = "one\u2028two\x85three"
        body = {"output": [{"type": "message", "content": [{"type": "output_text", "text": text}]}]}
        line = {"custom_id": "a", "response": {"status_code": 200, "body": body}}
        stage = BatchStage(FixedServer(json.dumps(line, ensure_ascii=False).encode()))
        results = (await stage.results(Batch(id="b", status="completed", files=("f",))))["a"]
        assert isinstance(results, CompletedAnswer)
        assert results.text == text

    run_virtual(main())
