"""Files and batches, as the SDK speaks them: handed in, worked off in time, fetched once."""

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
    asked = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/responses", "body": body}
    return asked | changes


class Desk:
    """A client of the SDK on a simulator, in virtual time; made on the loop."""

    def __init__(self, **knobs: Any) -> None:
        self.clock = LoopClock()
        self.core = Simulator(Knobs(batch_seconds=100.0, **knobs), clock=self.clock)
        http = httpx2.AsyncClient(transport=SimulatorTransport(self.core))
        self.sdk = openai.AsyncOpenAI(api_key="sk-x", http_client=http, max_retries=0)

    async def hand_in(self, *lines: Any) -> Any:
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


def test_a_batch_is_worked_off_in_its_time() -> None:
    """Validating, in progress, completed: the answers lie in the output file by their ids."""

    async def main() -> None:
        desk = Desk()
        batch = await desk.hand_in(line(1, "[[echo: one]]"), line(2, "[[echo: two]]"))
        assert batch.status == "validating"
        half = await desk.after(50, batch)
        assert (half.status, half.request_counts.completed) == ("in_progress", 1)
        done = await desk.after(51, batch)
        assert (done.status, done.request_counts.completed) == ("completed", 2)
        told = await desk.lines(done.output_file_id)
        assert [t["custom_id"] for t in told] == ["row-1", "row-2"]
        assert told[0]["response"]["body"]["output"][-1]["content"][0]["text"] == "one"
        assert [seen.prompt for seen in desk.core.log if seen.method == "BATCH"] == [
            "[[echo: one]]",
            "[[echo: two]]",
        ]

    run_virtual(main())


def test_what_fails_lies_in_the_error_file() -> None:
    """A request that the server rejects does not harm the others."""

    async def main() -> None:
        desk = Desk()
        wrong = line(2, "x", body={"model": "none", "input": "x"})
        done = await desk.after(101, await desk.hand_in(line(1, "[[echo: one]]"), wrong))
        assert (done.request_counts.completed, done.request_counts.failed) == (1, 1)
        (told,) = await desk.lines(done.error_file_id)
        assert told["response"]["status_code"] == 404
        assert "error" in told["response"]["body"]

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
def test_a_wrong_file_fails_as_a_whole(lines: list[Any], code: str) -> None:
    """Nothing of it is answered, and the batch says which line is wrong."""

    async def main() -> None:
        desk = Desk()
        failed = await desk.after(101, await desk.hand_in(*lines))
        assert failed.status == "failed"
        assert failed.errors.data[0].code == code
        assert failed.output_file_id is None

    run_virtual(main())


def test_the_queue_is_limited() -> None:
    """What does not fit into the queue fails with the server's words."""

    async def main() -> None:
        desk = Desk(batch_queue=1)
        failed = await desk.after(101, await desk.hand_in(line(1, "a"), line(2, "b")))
        assert failed.errors.data[0].code == "token_limit_exceeded"

    run_virtual(main())


def test_a_cancelled_batch_keeps_what_is_done() -> None:
    """The answers until then can be fetched, the rest is named in the error file."""

    async def main() -> None:
        desk = Desk()
        batch = await desk.hand_in(line(1, "a"), line(2, "b"))
        await desk.after(60, batch)
        ended = await desk.sdk.batches.cancel(batch.id)
        assert ended.status == "cancelled"
        assert len(await desk.lines(ended.output_file_id)) == 1
        (left,) = await desk.lines(ended.error_file_id)
        assert left["error"]["code"] == "batch_cancelled"

    run_virtual(main())


def test_what_takes_longer_than_a_day_expires() -> None:
    """After 24 hours the rest is given up."""

    async def main() -> None:
        desk = Desk()
        desk.core.change_knobs(batch_seconds=2 * 86_400.0)
        batch = await desk.hand_in(line(1, "a"), line(2, "b"))
        ended = await desk.after(86_401, batch)
        assert (ended.status, ended.request_counts.completed) == ("expired", 1)

    run_virtual(main())


def test_a_file_is_its_owners() -> None:
    """Another key sees neither file nor batch, and a deleted file is gone."""

    async def main() -> None:
        desk = Desk()
        batch = await desk.hand_in(line(1, "a"))
        other = desk.sdk.with_options(api_key="sk-y")
        with pytest.raises(openai.NotFoundError):
            await other.batches.retrieve(batch.id)
        await desk.sdk.files.delete(batch.input_file_id)
        with pytest.raises(openai.NotFoundError):
            await desk.sdk.files.content(batch.input_file_id)

    run_virtual(main())


def test_a_files_name_is_never_another_s() -> None:
    """What is handed in after a file was deleted takes the place of none that is there."""

    async def main() -> None:
        desk = Desk()
        first, second = [await desk.hand_in(line(n, f"[[echo: {n}]]")) for n in range(2)]
        await desk.sdk.files.delete(first.input_file_id)
        third = await desk.hand_in(line(3, "[[echo: 3]]"))
        assert third.input_file_id != second.input_file_id
        assert [t["custom_id"] for t in await desk.lines(second.input_file_id)] == ["row-1"]

    run_virtual(main())
