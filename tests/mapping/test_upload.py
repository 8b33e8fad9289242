"""Batch uploads: rows are uploaded once, jobs are found again, files are erased."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from nbcodex import events
from nbcodex.errors import BatchUnsupportedError, BudgetError, ModelError, ParkedError
from nbcodex.journal.journal import Journal
from nbcodex.mapping import upload
from nbcodex.mapping.batch_rows import PendingRow
from nbcodex.mapping.upload import BatchUploader
from nbcodex.models import Origin, Request
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.requests.runner import Services
from nbcodex.settings import Secret, Settings
from nbcodex.simulator import Knobs, Simulator
from tests.simulated import KEY
from tests.simulator_transport import SimulatorTransport
from tests.virtual import LoopClock, run_virtual, stop_time_for_journal

pytestmark = pytest.mark.slow

SETTINGS = Settings(api_key=Secret(KEY), base_url="http://127.0.0.1/v1", model="gpt-5.6-sol")
HOUR = 3_600.0


class FaultyTransport(httpx2.AsyncBaseTransport):
    """Passes calls on to a simulator; `before` and `after` may answer or fail them instead."""

    def __init__(self, core: Simulator) -> None:
        self._inner = SimulatorTransport(core)
        self.calls: list[str] = []
        self.before: Callable[[str], httpx2.Response | None] = lambda _: None
        self.after: Callable[[str], None] = lambda _: None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        call = f"{request.method} {request.url.path}"
        self.calls.append(call)
        if (instead := self.before(call)) is not None:
            return instead
        response = await self._inner.handle_async_request(request)
        self.after(call)
        return response

    def count(self, start: str) -> int:
        return sum(call.startswith(start) for call in self.calls)


class World:
    """A server and a journal that outlive the processes which use them."""

    def __init__(self, **knobs: Any) -> None:
        self.clock = LoopClock()
        knobs = {"batch_seconds": HOUR, **knobs}
        self.core = Simulator(Knobs(**knobs), clock=self.clock)
        self.transport = FaultyTransport(self.core)
        self.journal = Journal()
        stop_time_for_journal(self.journal)
        self.events: list[events.Event] = []
        self._event_arrived = asyncio.Event()

    def uploader(
        self, settings: Settings = SETTINGS, *, cancels_jobs: bool = False
    ) -> BatchUploader:
        services = Services(
            api_client=ApiClient(clock=self.clock, transport=self.transport),
            journal=lambda _: self.journal,
            spending_journal=lambda _: self.journal,
            limiter=lambda _: None,  # type: ignore[arg-type,return-value]  # batches use no rate limit
            clock=self.clock,
        )
        return BatchUploader(services, settings, on_event=self._on_event, cancels_jobs=cancels_jobs)

    def _on_event(self, event: events.Event) -> None:
        self.events.append(event)
        self._event_arrived.set()

    async def run(self, uploader: BatchUploader, requests: list[Request], **known: Any) -> None:
        """Upload rows, and wait for all endings."""
        uploader.add([PendingRow(request, known.get(request.id)) for request in requests])
        uploader.flush()
        deadline = self.clock.now() + 3 * 86_400.0
        while len(self.endings) < len(requests):
            self._event_arrived.clear()
            assert await self.clock.wait(deadline, unless=self._event_arrived), "timed out"

    async def until(self, holds: Callable[[], bool], *, within: float = 86_401.0) -> None:
        deadline = self.clock.now() + within
        while not holds():
            assert self.clock.now() < deadline, "timed out"
            await asyncio.sleep(30.0)

    @property
    def endings(self) -> dict[str, events.Ending]:
        return {e.request_id: e for e in self.events if isinstance(e, events.Ending)}

    @property
    def sent_prompts(self) -> list[str]:
        """Prompts that were answered in batch jobs."""
        return [seen.prompt for seen in self.core.log if seen.method == "BATCH"]

    @property
    def files(self) -> int:
        return len(self.core.batches._files)

    def entries(self, batch: str = "m1") -> dict[str, Any]:
        return {entry.id: entry for entry in self.journal.maps.entries(batch)}


def requests(count: int, *, batch: str = "m1", prompt: str = "[[echo: {}]]", **o: Any) -> Any:
    return [
        Request(
            prompt=prompt.format(n),
            id=f"{batch}-{n}",
            origin=Origin(map_id=batch, row_index=n, row_count=count, engine="batch"),
            **{"reuse": True, **o},
        )
        for n in range(count)
    ]


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in virtual time."""

    def run() -> None:
        run_virtual(test())

    run.__doc__, run.__name__ = test.__doc__, test.__name__
    return run


@in_virtual_time
async def test_one_job_answers_all_rows_and_its_files_are_erased() -> None:
    world = World()
    await world.run(world.uploader(), requests(5))
    assert [world.endings[f"m1-{n}"].reply.text for n in range(5)] == list("01234")
    assert {entry.reply.status for entry in world.entries().values()} == {"done"}
    assert world.entries()["m1-3"].reply.usage.total_tokens
    assert world.endings["m1-3"].reply.simulated
    assert world.transport.count("POST /v1/batches") == 1
    assert world.files == 0
    polls = world.transport.count("GET /v1/batches/")
    assert 60 <= polls <= 90  # an hour, at most about once a minute


@in_virtual_time
async def test_rows_are_in_the_journal_before_the_upload() -> None:
    world = World()
    seen: list[set[Any]] = []
    world.transport.before = lambda call: (
        seen.append({entry.batch_job for entry in world.entries().values()})
        if call == "POST /v1/files"
        else None
    )
    await world.run(world.uploader(), requests(3))
    assert len(seen) == 1
    assert len(seen[0]) == 1
    assert None not in seen[0]


@in_virtual_time
async def test_answered_rows_are_not_uploaded() -> None:
    world = World()
    await world.run(world.uploader(), requests(2))
    world.events.clear()
    await world.run(world.uploader(), requests(3, batch="m2"))
    assert [world.endings[f"m2-{n}"].reply.reused for n in range(3)] == [True, True, False]
    assert sorted(world.sent_prompts) == ["[[echo: 0]]", "[[echo: 1]]", "[[echo: 2]]"]


@in_virtual_time
async def test_parked_job_is_fetched_by_a_resume() -> None:
    world = World()
    first, rows = world.uploader(), requests(3)
    first.add([PendingRow(request) for request in rows])
    first.flush()
    await world.until(lambda: first.stage == "in progress 1 of 3")
    await first.park()
    assert {type(ending) for ending in world.endings.values()} == {events.Parked}
    assert {entry.status for entry in world.entries().values()} == {"parked"}
    world.events.clear()
    await world.run(world.uploader(), rows, **world.entries())
    assert {ending.reply.status for ending in world.endings.values()} == {"done"}
    assert len(world.sent_prompts) == 3
    assert world.files == 0


@in_virtual_time
async def test_equal_rows_of_another_map_wait_for_the_existing_job() -> None:
    world = World()
    first = world.uploader()
    first.add([PendingRow(request) for request in requests(3)])
    first.flush()
    await world.until(lambda: world.transport.count("POST /v1/batches") == 1)
    await asyncio.sleep(100)
    await first.park()
    world.events.clear()
    again = world.uploader()
    again.add([PendingRow(request) for request in requests(4, batch="m2")])
    again.flush()
    await world.until(lambda: sum(id_.startswith("m2-") for id_ in world.endings) == 4)
    assert {world.endings[f"m2-{n}"].reply.text for n in range(4)} == set("0123")
    assert len(world.sent_prompts) == 4
    assert {entry.status for entry in world.entries("m1").values()} == {"done"}
    assert world.files == 0


@in_virtual_time
async def test_job_whose_id_was_lost_is_found_by_its_tag() -> None:
    """The process dies between the provider's answer and our commit."""
    world = World()
    first, rows = world.uploader(), requests(2)

    def die(call: str) -> None:
        if call == "POST /v1/batches":
            raise asyncio.CancelledError

    world.transport.after = die
    first.add([PendingRow(request) for request in rows])
    first.flush()
    await world.until(lambda: world.transport.count("POST /v1/batches") == 1)
    await asyncio.sleep(1)
    await first.park()
    world.events.clear()
    await world.run(world.uploader(), rows, **world.entries())
    assert {ending.reply.text for ending in world.endings.values()} == set("01")
    assert world.transport.count("POST /v1/batches") == 1
    assert world.files == 0


@in_virtual_time
async def test_recorded_part_without_a_job_is_uploaded() -> None:
    world = World()
    first, rows = world.uploader(), requests(2)
    world.transport.before = lambda call: httpx2.Response(503) if call.startswith("POST") else None
    first.add([PendingRow(request) for request in rows])
    first.flush()
    await world.until(lambda: world.transport.count("POST /v1/files") >= 2)
    await first.park()
    world.events.clear()
    world.transport.before = lambda _: None
    await world.run(world.uploader(), rows, **world.entries())
    assert {ending.reply.text for ending in world.endings.values()} == set("01")
    assert len(world.sent_prompts) == 2


@in_virtual_time
async def test_lost_response_does_not_create_a_second_job() -> None:
    world = World()

    def lose(call: str) -> None:
        if call == "POST /v1/batches" and world.transport.count(call) == 1:
            raise httpx2.ReadError("lost")

    world.transport.after = lose
    await world.run(world.uploader(), requests(2))
    assert world.transport.count("POST /v1/batches") == 1
    assert world.transport.count("POST /v1/files") == 1
    assert len(world.sent_prompts) == 2


@in_virtual_time
async def test_rows_are_parked_when_an_upload_outlasts_their_patience() -> None:
    """Rows without a patience of their own go on waiting, in a file of their own."""
    world = World()
    impatient, patient = requests(2, patience=60.0), requests(3, patience=HOUR)[2:]
    world.transport.before = lambda call: httpx2.Response(503) if call == "POST /v1/files" else None
    uploader = world.uploader()
    uploader.add([PendingRow(request) for request in [*impatient, *patient]])
    uploader.flush()
    await world.until(lambda: len(world.endings) == 2, within=120.0)
    error = world.endings["m1-0"].error  # type: ignore[union-attr]
    assert isinstance(error, ParkedError)
    assert error.message.endswith(
        "The next attempt would be later than your patience of 1 min 00 s allows."
    )
    assert error.advice == "`%codex resume m1` continues it."
    parked = [entry for entry in world.entries().values() if entry.status == "parked"]
    assert [(entry.id, entry.batch_job) for entry in parked] == [("m1-0", None), ("m1-1", None)]
    world.transport.before = lambda _: None
    await world.until(lambda: len(world.endings) == 3)
    assert world.endings["m1-2"].reply.text == "2"
    world.events.clear()
    await world.run(world.uploader(), impatient, **world.entries())
    assert [world.endings[f"m1-{n}"].reply.text for n in range(2)] == list("01")
    assert len(world.sent_prompts) == 3


@in_virtual_time
async def test_patience_counts_from_when_a_row_is_ready_not_from_its_turn() -> None:
    """Whatever the order of the rows, those with the shortest patience are uploaded first."""
    world = World()
    impatient = [
        replace(request, model=f"model-{n}") for n, request in enumerate(requests(3, patience=60.0))
    ]
    patient = requests(4, patience=HOUR)[3:]
    world.transport.before = lambda call: httpx2.Response(503) if call == "POST /v1/files" else None
    uploader = world.uploader()
    uploader.add([PendingRow(request) for request in [*patient, *impatient]])
    uploader.flush()
    await world.until(lambda: len(world.endings) == 3, within=90.0)
    assert set(world.endings) == {"m1-0", "m1-1", "m1-2"}
    await uploader.park()


@in_virtual_time
async def test_job_that_may_have_been_created_is_looked_for_after_the_patience() -> None:
    world = World()

    def fail(call: str) -> None:
        if "/v1/batches" in call:
            raise httpx2.ReadError("lost")

    world.transport.after = fail
    rows = requests(2, patience=60.0)
    await world.run(world.uploader(), rows)
    assert {type(ending) for ending in world.endings.values()} == {events.Parked}
    assert None not in {entry.batch_job for entry in world.entries().values()}
    world.transport.after = lambda _: None
    world.events.clear()
    await world.run(world.uploader(), rows, **world.entries())
    assert {ending.reply.text for ending in world.endings.values()} == set("01")
    assert world.transport.count("POST /v1/batches") == 1
    assert len(world.sent_prompts) == 2
    assert world.files == 0


@in_virtual_time
async def test_map_survives_faults_of_any_call() -> None:
    world, chance = World(), random.Random(7)
    world.transport.before = lambda _: httpx2.Response(503) if chance.random() < 0.3 else None
    await world.run(world.uploader(), requests(3))
    assert {ending.reply.text for ending in world.endings.values()} == set("012")
    assert len(world.sent_prompts) == 3
    assert world.files == 0


@in_virtual_time
async def test_rejected_row_fails_and_the_others_are_answered() -> None:
    world = World()
    rows = [*requests(1), *requests(2, model="no-such-model")[1:]]
    await world.run(world.uploader(), rows)
    assert world.endings["m1-0"].reply.text == "0"
    ending = world.endings["m1-1"]
    assert isinstance(ending, events.Failed)
    assert isinstance(ending.error, ModelError)
    assert world.entries()["m1-1"].status == "failed"


@in_virtual_time
async def test_rows_of_an_expired_job_are_parked_and_uploaded_again() -> None:
    world = World(batch_seconds=2 * 86_400.0)
    rows = requests(4)
    await world.run(world.uploader(), rows)
    kinds = [type(world.endings[f"m1-{n}"]) for n in range(4)]
    assert kinds == [events.Finished] * 2 + [events.Parked] * 2
    assert world.files == 0
    world.core.change_knobs(batch_seconds=HOUR)
    world.events.clear()
    await world.run(world.uploader(), rows[2:], **world.entries())
    assert {ending.reply.text for ending in world.endings.values()} == {"2", "3"}
    assert len(world.sent_prompts) == 4


@in_virtual_time
async def test_cancelled_job_returns_finished_rows_and_nothing_is_uploaded() -> None:
    world = World()
    first, rows = world.uploader(), requests(4)
    first.add([PendingRow(request) for request in rows])
    first.flush()
    await world.until(lambda: first.stage == "in progress 2 of 4")
    await first.park()
    world.events.clear()
    await world.run(world.uploader(cancels_jobs=True), rows, **world.entries())
    kinds = [type(world.endings[f"m1-{n}"]) for n in range(4)]
    assert kinds == [events.Finished] * 2 + [events.Parked] * 2
    assert world.transport.count("POST /v1/batches") == 2  # the batch, and its cancelling
    assert world.files == 0


@in_virtual_time
async def test_full_queue_is_waited_for_with_smaller_parts() -> None:
    world = World(batch_queue=4, batch_seconds=600.0)
    await world.run(world.uploader(), requests(20))
    assert {ending.reply.status for ending in world.endings.values()} == {"done"}
    assert len(world.sent_prompts) == 20
    assert (
        world.sent_prompts[:4] == [f"[[echo: {n}]]" for n in range(4)]
        or len(world.sent_prompts[:2]) == 2
    )
    assert world.files == 0


@in_virtual_time
async def test_part_is_bounded_in_rows_and_bytes() -> None:
    world = World()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(upload, "MAX_BATCH_REQUESTS", 3)
        await world.run(world.uploader(), requests(7))
        patched.setattr("nbcodex.mapping.upload.MAX_BATCH_BYTES", 700)
        patched.setattr(upload, "MAX_BATCH_REQUESTS", 50)
        world.events.clear()
        made = world.transport.count("POST /v1/files")
        assert made == 3
        await world.run(world.uploader(), requests(4, batch="m2", prompt="x" * 100 + "{}"))
        assert world.transport.count("POST /v1/files") - made >= 2
    assert len(world.sent_prompts) == 11


@in_virtual_time
async def test_server_without_batch_api_names_the_live_engine() -> None:
    world = World()
    world.transport.before = lambda _: httpx2.Response(
        404, json={"error": {"message": "Not Found"}}
    )
    await world.run(world.uploader(), requests(2))
    ending = world.endings["m1-0"]
    assert isinstance(ending, events.Failed)
    assert isinstance(ending.error, BatchUnsupportedError)
    assert "engine='live'" in str(ending.error)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "Cannot find file file-1, or project proj_1 does not have access to it."),
        (404, "No such File object: file-1"),
        (400, "The input file file-1 is not processed yet."),
    ],
)
@pytest.mark.parametrize("times", [1, 3, 100])
def test_file_that_is_not_found_after_its_upload_is_tried_a_few_times(
    status: int, message: str, times: int
) -> None:
    @in_virtual_time
    async def upload_rows() -> None:
        world = World()

        def refuse(call: str) -> httpx2.Response | None:
            if call == "POST /v1/batches" and world.transport.count(call) <= times:
                error = {"message": message, "type": "invalid_request_error", "param": "file_id"}
                return httpx2.Response(status, json={"error": error})
            return None

        world.transport.before = refuse
        await world.run(world.uploader(), requests(2))
        is_refused = times == 100
        assert world.transport.count("POST /v1/batches") == min(times + 1, 6)
        assert world.transport.count("POST /v1/files") == 1
        assert len(world.sent_prompts) == 2 * (not is_refused)
        expected = events.Failed if is_refused else events.Finished
        assert {type(ending) for ending in world.endings.values()} == {expected}

    upload_rows()


@in_virtual_time
async def test_rows_beyond_the_budget_are_parked() -> None:
    world = World()
    settings = replace(SETTINGS, budgets=("250",))
    await world.run(world.uploader(settings), requests(5, max_output=60))
    parked = [e for e in world.endings.values() if isinstance(e, events.Parked)]
    assert 0 < len(parked) < 5
    assert isinstance(parked[0].error, BudgetError)
    assert len(world.sent_prompts) == 5 - len(parked)


async def reserved_tokens(world: World) -> int:
    """Return the tokens that are reserved for all kernels."""
    return (await world.journal.read_spending("2030-01-01")).reserved.tokens


@in_virtual_time
async def test_reservation_is_released_for_rows_without_a_job() -> None:
    world = World(batch_queue=2)
    await world.journal.set_budget("90k/day")
    first = world.uploader()
    first.add([PendingRow(request) for request in requests(12)])
    first.flush()
    await world.until(lambda: first.stage == "the provider's queue is full")
    assert await reserved_tokens(world) > 0
    await first.park()
    assert await reserved_tokens(world) == 0


@in_virtual_time
async def test_reservation_stays_until_a_parked_job_is_fetched() -> None:
    world = World()
    await world.journal.set_budget("90k/day")
    first, rows = world.uploader(), requests(3)
    first.add([PendingRow(request) for request in rows])
    first.flush()
    await world.until(lambda: first.stage.startswith("in progress"))
    before = await reserved_tokens(world)
    await first.park()
    assert await reserved_tokens(world) == before > 0
    world.events.clear()
    await world.run(world.uploader(), rows, **world.entries())
    assert await reserved_tokens(world) == 0


@in_virtual_time
async def test_job_of_another_server_is_left_alone() -> None:
    world = World()
    first, rows = world.uploader(), requests(2)
    first.add([PendingRow(request) for request in rows])
    first.flush()
    await world.until(lambda: world.transport.count("GET /v1/batches/") > 0)
    await first.park()
    world.events.clear()
    other_server = replace(SETTINGS, base_url="http://127.0.0.2/v1")
    await world.run(world.uploader(other_server), rows, **world.entries())
    assert "127.0.0.1" in str(world.endings["m1-0"].error)  # type: ignore[union-attr]
    assert {entry.status for entry in world.entries().values()} == {"parked"}
    world.events.clear()
    await world.run(world.uploader(), rows, **world.entries())
    assert len(world.sent_prompts) == 2


@in_virtual_time
async def test_leftover_files_are_erased_by_the_next_map() -> None:
    world = World()
    world.transport.before = lambda call: (
        httpx2.Response(500) if call.startswith("DELETE") else None
    )
    await world.run(world.uploader(), requests(1))
    assert world.files == 2
    world.transport.before = lambda _: None
    world.events.clear()
    await world.run(world.uploader(), requests(2))
    await world.until(lambda: world.files == 0)


@in_virtual_time
async def test_file_without_a_job_is_erased() -> None:
    world = World()
    first, rows = world.uploader(), requests(2)
    world.transport.before = lambda call: (
        httpx2.Response(503) if call == "POST /v1/batches" else None
    )
    first.add([PendingRow(request) for request in rows])
    first.flush()
    await world.until(lambda: world.transport.count("POST /v1/batches") >= 2)
    await first.park()
    assert world.files == 1
    world.events.clear()
    world.transport.before = lambda _: None
    await world.run(world.uploader(), rows, **world.entries())
    assert len(world.sent_prompts) == 2
    assert world.files == 0


@in_virtual_time
async def test_files_are_kept_if_the_setting_says_so() -> None:
    world = World()
    await world.run(world.uploader(replace(SETTINGS, keep_files=True)), requests(1))
    assert world.files == 2
