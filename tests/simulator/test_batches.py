"""The Files and Batch APIs, as the SDK uses them."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest

from nbcodex.simulator import Knobs, Simulator
from tests.simulator_transport import SimulatorTransport
from tests.virtual import LoopClock, run_virtual


def line(number: int, prompt: str, **changes: Any) -> dict[str, Any]:
    body = {"model": "gpt-5.6-sol", "input": prompt}
    request = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/responses", "body": body}
    return request | changes


class BatchClient:
    """A client of the SDK on a simulator, in virtual time; create it on the loop."""

    def __init__(self, **knobs: Any) -> None:
        self.clock = LoopClock()
        self.core = Simulator(Knobs(batch_seconds=100.0, **knobs), clock=self.clock)
        http = httpx2.AsyncClient(transport=SimulatorTransport(self.core))
        self.sdk = openai.AsyncOpenAI(api_key="sk-x", http_client=http, max_retries=0)

    async def create(self, *lines: Any) -> Any:
        data = "\n".join(item if isinstance(item, str) else json.dumps(item) for item in lines)
        file = await self.sdk.files.create(file=("in.jsonl", data.encode()), purpose="batch")
        return await self.sdk.batches.create(
            input_file_id=file.id, endpoint="/v1/responses", completion_window="24h"
        )

    async def after(self, seconds: float, batch: Any) -> Any:
        await self.clock.wait(self.clock.now() + seconds)
        return await self.sdk.batches.retrieve(batch.id)

    async def lines(self, file_id: str) -> list[Any]:
        content = await self.sdk.files.content(file_id)
        return [json.loads(text) for text in content.text.splitlines()]


def test_batch_passes_through_its_states_and_answers_by_custom_id() -> None:
    async def main() -> None:
        client = BatchClient()
        batch = await client.create(line(1, "[[echo: one]]"), line(2, "[[echo: two]]"))
        assert batch.status == "validating"
        half = await client.after(50, batch)
        assert (half.status, half.request_counts.completed) == ("in_progress", 1)
        done = await client.after(51, batch)
        assert (done.status, done.request_counts.completed) == ("completed", 2)
        results = await client.lines(done.output_file_id)
        assert [r["custom_id"] for r in results] == ["row-1", "row-2"]
        assert results[0]["response"]["body"]["output"][-1]["content"][0]["text"] == "one"
        assert [seen.prompt for seen in client.core.log if seen.method == "BATCH"] == [
            "[[echo: one]]",
            "[[echo: two]]",
        ]

    run_virtual(main())


def test_rejected_request_is_in_the_error_file_only() -> None:
    async def main() -> None:
        client = BatchClient()
        wrong = line(2, "x", body={"model": "none", "input": "x"})
        done = await client.after(101, await client.create(line(1, "[[echo: one]]"), wrong))
        assert (done.request_counts.completed, done.request_counts.failed) == (1, 1)
        (results,) = await client.lines(done.error_file_id)
        assert results["response"]["status_code"] == 404
        assert "error" in results["response"]["body"]

    run_virtual(main())


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["{"], "invalid_json_line"),
        ([line(1, "a"), line(1, "b")], "duplicate_custom_id"),
        ([line(1, "a", url="/v1/chat/completions")], "mismatched_url"),
        ([""], "empty_file"),
    ],
)
def test_invalid_file_fails_the_whole_batch(lines: list[Any], code: str) -> None:
    async def main() -> None:
        client = BatchClient()
        failed = await client.after(101, await client.create(*lines))
        assert failed.status == "failed"
        assert failed.errors.data[0].code == code
        assert failed.output_file_id is None

    run_virtual(main())


def test_batch_beyond_the_queue_limit_fails() -> None:
    async def main() -> None:
        client = BatchClient(batch_queue=1)
        failed = await client.after(101, await client.create(line(1, "a"), line(2, "b")))
        assert failed.errors.data[0].code == "token_limit_exceeded"

    run_virtual(main())


def test_cancelled_batch_keeps_its_answers_and_names_the_rest() -> None:
    async def main() -> None:
        client = BatchClient()
        batch = await client.create(line(1, "a"), line(2, "b"))
        await client.after(60, batch)
        ended = await client.sdk.batches.cancel(batch.id)
        assert ended.status == "cancelled"
        assert len(await client.lines(ended.output_file_id)) == 1
        (left,) = await client.lines(ended.error_file_id)
        assert left["error"]["code"] == "batch_cancelled"

    run_virtual(main())


def test_batch_of_more_than_a_day_expires_with_its_answers() -> None:
    async def main() -> None:
        client = BatchClient()
        client.core.change_knobs(batch_seconds=2 * 86_400.0)
        batch = await client.create(line(1, "a"), line(2, "b"))
        ended = await client.after(86_401, batch)
        assert (ended.status, ended.request_counts.completed) == ("expired", 1)

    run_virtual(main())


def test_files_and_batches_are_visible_to_their_key_only() -> None:
    async def main() -> None:
        client = BatchClient()
        batch = await client.create(line(1, "a"))
        other = client.sdk.with_options(api_key="sk-y")
        with pytest.raises(openai.NotFoundError):
            await other.batches.retrieve(batch.id)
        await client.sdk.files.delete(batch.input_file_id)
        with pytest.raises(openai.NotFoundError):
            await client.sdk.files.content(batch.input_file_id)

    run_virtual(main())


def test_file_id_is_not_reused_after_a_deletion() -> None:
    async def main() -> None:
        client = BatchClient()
        first, second = [await client.create(line(n, f"[[echo: {n}]]")) for n in range(2)]
        await client.sdk.files.delete(first.input_file_id)
        third = await client.create(line(3, "[[echo: 3]]"))
        assert third.input_file_id != second.input_file_id
        assert [r["custom_id"] for r in await client.lines(second.input_file_id)] == ["row-1"]

    run_virtual(main())
